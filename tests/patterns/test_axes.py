"""Index maps: which element of which tensor a chain of views reads, checked element by element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils._sympy.functions import Max

from mhf_compiler.compat import FakeTensorMode, FloorDiv
from mhf_compiler.patterns.axes import (
    Affine,
    Axis,
    Index,
    along,
    at_most,
    axis_form,
    each_of,
    multiply,
    paired,
    plus,
    quotient,
    real,
    run_length,
    same_index,
    same_steps,
    split,
    stride_in_sizes,
    stride_order,
    through_reshape,
)
from mhf_compiler.patterns.canonical import INPUT, Value
from mhf_compiler.patterns.tracer import trace
from mhf_compiler.patterns.views import through_views

View = Callable[[Tensor], Tensor]


def canonical(function: View, example: Tensor) -> Value:
    """The value that a function returns."""
    gm = fx.symbolic_trace(function)
    (node,) = gm.graph.find_nodes(op="placeholder")
    node.meta["val"] = FakeTensorMode().from_tensor(example)
    (value,) = trace(gm).reads[gm.graph.output_node()].values()
    return value


def elements(axes: tuple[Axis, ...], index: Index) -> Iterator[tuple[int, ...]]:
    """The coordinates that ``index`` names, for every setting of the axes in row-major order."""
    for setting in itertools.product(*(range(axis.size) for axis in axes)):
        at = dict(zip(axes, setting, strict=True))
        for axis in axes:
            at |= _digits_of(axis, at[axis])
        yield tuple(form.offset + sum(at[a] * c for a, c in form.terms) for form in index)


def _digits_of(axis: Axis, value: int) -> dict[Axis, int]:
    """The value of each part of a split axis."""
    if axis.parts is None:
        return {axis: value}
    outer, inner = axis.parts
    high, low = divmod(value, inner.size)
    return _digits_of(outer, high) | _digits_of(inner, low)


def read_through(function: View, base: Tensor) -> Tensor:
    """What ``function`` shows of ``base``, by the index map alone."""
    value = canonical(function, base)
    axes = tuple(Axis(size) for size in value.shape)
    source, index = through_views(value, tuple(axis_form(axis) for axis in axes))
    assert source.op == INPUT, f"the walk ended at {source}"
    found = [base[at] for at in elements(axes, index)]
    return torch.stack(found).reshape(value.shape) if found else base.new_empty(value.shape)


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


# Chains of views.


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[str, View]:
    """One view of a tensor of ``shape``: its name and a function."""
    rank = len(shape)
    dim = draw(st.integers(0, rank - 1))
    size = shape[dim]
    kind = draw(
        st.sampled_from(
            [
                *("permute", "transpose", "split", "merge", "flatten", "slice", "select"),
                *("unbind", "chunk", "expand", "repeat", "unsqueeze"),
            ]
        )
    )
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return f"permute{order}", lambda x: x.permute(order)
    if kind == "transpose":
        other = draw(st.integers(-rank, rank - 1))
        return f"transpose({dim}, {other})", lambda x: x.transpose(dim, other)
    if kind == "split":
        inner = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        return f"unflatten({dim}, {inner})", lambda x: x.unflatten(dim, (-1, inner))
    if kind == "merge" and rank > 1:
        last = draw(st.integers(dim, rank - 1))
        merged = (*shape[:dim], math.prod(shape[dim : last + 1]), *shape[last + 1 :])
        return f"reshape{merged}", lambda x: x.reshape(merged)
    if kind == "slice":
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        step = draw(st.integers(1, 3))
        where = (slice(None),) * dim + (slice(start, stop, step),)
        return f"[{where}]", lambda x: x[where]
    if kind == "select" and rank > 1:
        at = draw(st.integers(-size, size - 1))
        return f"select({dim}, {at})", lambda x: x.select(dim, at)
    if kind == "unbind" and rank > 1:
        at = draw(st.integers(0, size - 1))
        return f"unbind({dim})[{at}]", lambda x: x.unbind(dim)[at]
    if kind == "chunk" and size % 2 == 0:
        return f"chunk(2, {dim})[1]", lambda x: x.chunk(2, dim)[1]
    if kind == "expand" and math.prod(shape) < 200:
        sizes = (2, *shape)
        return f"expand{sizes}", lambda x: x.expand(sizes)
    if kind == "repeat" and math.prod(shape) < 200:
        times = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank + 1))
        if math.prod(times) * math.prod(shape) < 400:
            return f"repeat{times}", lambda x: x.repeat(times)
    if kind == "flatten" and rank > 1:
        return "flatten", lambda x: x.flatten()
    place = draw(st.integers(-rank - 1, rank))
    return f"unsqueeze({place})", lambda x: x.unsqueeze(place)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, View]]]:
    base = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3)))
    shown, chain = numbered(*base), []
    for _ in range(draw(st.integers(1, 5))):
        view = draw(views(tuple(shown.shape)))
        shown = view[1](shown)
        chain.append(view)
    return base, chain


@settings(max_examples=150, deadline=None, derandomize=True)
@given(chains())
def test_chains_of_views_read_what_torch_reads(
    drawn: tuple[tuple[int, ...], list[tuple[str, View]]],
):
    """As far as the walk goes; where it ends early, the rest is an ordinary tensor."""
    shape, chain = drawn

    def function(x: Tensor) -> Tensor:
        for _, view in chain:
            x = view(x)
        return x

    base = numbered(*shape)
    value = canonical(function, base)
    axes = tuple(Axis(size) for size in value.shape)
    source, index = through_views(value, tuple(axis_form(axis) for axis in axes))
    tensor = _shown_by(value, base)[source]
    found = [int(tensor[at]) for at in elements(axes, index)]
    assert found == function(base).flatten().tolist()


def _shown_by(value: Value, base: Tensor) -> dict[Value, Tensor]:
    """What each value of a chain of views is, by running the views themselves."""
    if value.op == INPUT:
        return {value: base}
    tensors = _shown_by(value.source, base)
    result = value.op(tensors[value.source], *value.args[1:], **value.kwargs)
    return tensors | {value: result if value.item is None else result[value.item]}


WALKED = {
    "pieces stacked again": lambda x: torch.stack(torch.unbind(x, 1), 1),
    "parts concatenated again": lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
    "heads of a feature": lambda x: x.view(2, 6, 4, 3).transpose(1, 2),
    "there and back": lambda x: x.view(2, 6, 4, 3).transpose(1, 2).transpose(1, 2).flatten(2),
    "tokens merged": lambda x: x.view(12, 12).view(4, 3, 12)[1],
    "a digit across two dimensions": lambda x: x.flatten().view(4, 36)[2],
    "merged after a permute": lambda x: x.permute(2, 0, 1).flatten(1),
    "every other feature": lambda x: x[..., 1::2],
    "the last features": lambda x: x[..., -4:],
    "one of many": lambda x: x.unbind(1)[3].split([5, 7], -1)[1],
    "pieces": lambda x: x.chunk(3, -1)[2].unflatten(-1, (2, 2)),
    "movedim and mT": lambda x: x.movedim(0, 2).mT,
    "broadcast": lambda x: x[:, None].expand(2, 5, 6, 12),
    "repeated": lambda x: x[:1, :2].repeat(3, 1, 2, 1)[2],
    "squeezed": lambda x: x.unsqueeze(0).unsqueeze(-1).squeeze(),
    "copied": lambda x: x.transpose(0, 1).contiguous().clone(),
    "unfolded": lambda x: x.narrow(1, 2, 3).narrow(2, 4, 8).reshape(2, 3, 2, 4),
}


@pytest.mark.parametrize("function", WALKED.values(), ids=WALKED)
def test_these_are_walked_to_the_end(function: View):
    base = numbered(2, 6, 12)
    assert read_through(function, base).tolist() == function(base).tolist()


ENDS = {
    "pieces stacked in another order": lambda x: torch.stack([x[:, 1], x[:, 0]], 1),
    "pieces of two tensors": lambda x: torch.stack([x[:, 0], (x + 1)[:, 1]], 1),
    "parts of unequal width": lambda x: torch.cat([x[:, :1], x[:, 1:]], 1),
    "a part and what is no view": lambda x: torch.stack([x[:, 0], x[:, 1] + 1], 1),
    "across the edge of a sequence": lambda x: x.view(12, 12).view(3, 4, 12)[1],
    "flipped": lambda x: x.flip(-1),
    "rolled": lambda x: x.roll(1, -1),
    "gathered": lambda x: x[:, torch.tensor([2, 0, 1])],
}


@pytest.mark.parametrize("function", ENDS.values(), ids=ENDS)
def test_the_walk_ends_at_what_is_no_affine_map(function: View):
    value = canonical(function, numbered(2, 6, 12))
    index = tuple(axis_form(Axis(size)) for size in value.shape)
    assert through_views(value, index)[0].op != INPUT


def test_casts_are_no_views():
    value = canonical(lambda x: x.half(), numbered(2, 3).float())
    index = tuple(axis_form(Axis(size)) for size in value.shape)
    assert through_views(value, index)[0] is value


def test_detach_is_no_view():
    """Gradients are part of the meaning."""
    value = canonical(lambda x: x.detach(), numbered(2, 3).float())
    index = tuple(axis_form(Axis(size)) for size in value.shape)
    assert through_views(value, index)[0] is value


# Reshapes.


def test_a_reshape_splits_the_axis_that_it_cuts():
    feature = Axis(12)
    index = through_reshape((axis_form(feature),), (12,), (4, 3))
    assert index is not None
    head, width = feature.leaves()
    assert (head.size, width.size) == (4, 3)
    assert [form.terms for form in index] == [((head, 1),), ((width, 1),)]


def test_forms_written_before_a_split_stay_true_after_it():
    axis = Axis(12)
    form = axis_form(axis).scaled(5).shifted(2)
    assert form.resolved() is form
    assert split(axis, 3)
    assert split(axis.leaves()[0], 2)
    outer, middle, inner = axis.leaves()
    assert [a.size for a in axis.leaves()] == [2, 2, 3]
    assert form.resolved() == Affine(((outer, 30), (middle, 15), (inner, 5)), 2)
    assert form.axes() == (outer, middle, inner)
    assert form.coefficient(middle) == 15


def test_an_axis_is_split_by_divisors_only():
    axis = Axis(12)
    assert not split(axis, 5)
    assert axis.leaves() == (axis,)


# Dynamic sizes.

n = sympy.Symbol("n", integer=True, positive=True)
m = sympy.Symbol("m", integer=True, positive=True)


def test_sizes_with_symbols():
    assert multiply(n, 4) == 4 * n
    assert plus(n, 1) == n + 1
    assert plus(n + 1, -n) == 1
    assert isinstance(plus(n + 1, -n), int)
    assert quotient(12 * n * m, 4 * n) == 3 * m
    assert quotient(12 * n, 12 * n) == 1
    assert quotient(4 * n + 4, 4) == n + 1
    assert isinstance(quotient(12 * n, n), int)
    assert isinstance(quotient(0, n), int)


def test_strides_are_products_of_sizes():
    """Of a tensor without elements they would not be, but are never used."""
    some = sympy.Symbol("some", integer=True, nonnegative=True)
    for stride in (8 * Max(1, some), 8 * Max(some, 1), 8 * some):
        assert stride_in_sizes(stride) == 8 * some
    assert stride_in_sizes(8 * m * Max(1, n - 1)) == multiply(multiply(8, m), n - 1)
    # the last of which is 16 for none
    for other in (4 * Max(m, some), 4 * Max(1, m, some), 8 * Max(1, some) + 8):
        assert stride_in_sizes(other) == other
    assert isinstance(stride_in_sizes(sympy.Integer(8)), int)
    assert stride_in_sizes(8) == 8


def test_sizes_are_expanded_whichever_of_two_is_a_number():
    """Otherwise equal ones would differ: sympy multiplies out by numbers alone."""
    assert plus(1, n * (n + 1)) == plus(n * (n + 1), 1) == n**2 + n + 1
    assert quotient(n * (n + 1), 1) == n**2 + n


@pytest.mark.parametrize(
    ("a", "b"), [(n, 2), (n + 1, 4), (n, m), (n + 1, n), (7, n), (7, 2), (7, 0)]
)
def test_a_division_has_to_be_exact_for_all_values(a: Any, b: Any):
    assert quotient(a, b) is None


@pytest.mark.parametrize(
    ("a", "b", "known"),
    [
        (3, 4, True),
        (4, 3, False),
        (n, 2 * n, True),
        (n, n + 1, True),
        (n, m, False),
        (2 * n, n, False),
        # n is at least 1
        (FloorDiv(n, 2), n, True),
        (n, FloorDiv(n, 2), False),
        (0, FloorDiv(n, 2), True),
        (1, FloorDiv(n, 2), False),
        (FloorDiv(n + 1, 2), n, True),
        (FloorDiv(n + 2, 2), n, False),  # of 1
        (2 * FloorDiv(n + 1, 2) - 1, n, True),
        (2 * FloorDiv(n + 1, 2), n, False),  # of odd ones
        (3 * FloorDiv(n, 3), n, True),
        (n, 3 * FloorDiv(n, 3) + 2, True),
        (n, 3 * FloorDiv(n, 3) + 1, False),
        (FloorDiv(n, 3), FloorDiv(n, 2), False),  # it is, but the remainders are not known
        (FloorDiv(n, 2) + FloorDiv(n, 3), n, True),
        (FloorDiv(FloorDiv(n, 2) + 1, 2), n, True),
        (0, FloorDiv(n, 3), True),  # n - 2 is not, for 1
        (FloorDiv(n, m), n, False),
        (FloorDiv(n, -2), n, False),  # not read
        (FloorDiv(n, 2) ** 2, n**2, False),
        (m * FloorDiv(n, 2), m * n, False),
    ],
)
def test_order_has_to_hold_for_all_values(a: Any, b: Any, known: bool):
    assert at_most(a, b) is known


def test_reshapes_with_symbols():
    token, feature = Axis(n), Axis(12)
    index = through_reshape((axis_form(token), axis_form(feature)), (n, 12), (n, 4, 3))
    assert index is not None
    assert [form.axes() for form in index] == [(token,), *((leaf,) for leaf in feature.leaves())]


def test_a_place_in_a_dimension_that_a_reshape_keeps():
    """Element 1 of n was read: whether n may be 1 is no question any more."""
    feature = Axis(12)
    index = through_reshape((Affine((), 1), axis_form(feature)), (n, 12), (n, 4, 3))
    assert index is not None
    assert index[0] == Affine((), 1)
    assert through_reshape((Affine((), 1), axis_form(Axis(m))), (n, m), (m, n)) is None


def test_a_reshape_that_holds_for_some_values_only_is_not_read():
    """``(n, 4)`` as ``(2, m)``: right when m is 2 n, which nobody knows."""
    token, feature = Axis(n), Axis(4)
    assert through_reshape((axis_form(token), axis_form(feature)), (n, 4), (2, m)) is None


def test_nothing_is_read_of_no_elements():
    assert through_reshape((axis_form(Axis(0)), axis_form(Axis(6))), (0, 6), (0, 2, 3)) is None


def test_a_power_counts_as_that_many_factors():
    """Equal batch and length have one symbol: the stride of a head is its square."""
    s = sympy.Symbol("s", positive=True, integer=True)
    assert sorted([3 * s**2, 3, 3 * s, 1], key=stride_order) == [1, 3, 3 * s, 3 * s**2]


# Indices.


def test_indices_move_alike_along_the_same_axes_in_the_same_steps():
    a, b = axis_form(Axis(3)), axis_form(Axis(4))
    assert same_steps((a, b), (a.shifted(1), b))
    assert not same_index((a, b), (a.shifted(1), b))
    assert same_index((a, b), (a, b))
    for other in ((a,), (b, a), (a.scaled(2), b), (a, b, b)):
        assert not same_steps((a, b), other)
        assert not same_index((a, b), other)


def test_indices_that_do_not_move_alike_have_none_in_common():
    a, b = axis_form(Axis(3)), axis_form(Axis(4))
    assert along([(a,), (b,)], axis_form(Axis(2))) is None


def test_axes_of_size_one_are_not_real():
    one, three = Axis(1), Axis(3)
    assert real((one, three)) == {three}


@pytest.mark.parametrize(
    ("offset", "shape", "source", "places"),
    [
        (n, (2 * n,), (2, n), (1, 0)),
        (n + 1, (2 * n,), (2, n), None),  # in the second row, but not in one digit
        (4 * n + 1, (24 * n,), (6 * n, 4), None),  # the same
        (n + 1, (24 * n,), (6 * n, 4), None),  # in a row that is not known
        (3, (4 * n * m,), (n, m, 4), (0, 0, 3)),  # in the first row, however long rows are
        (7, (12,), (3, 4), (1, 3)),
        (12, (12,), (3, 4), None),  # beyond it
    ],
)
def test_a_place_has_digits_where_they_are_known(
    offset: Any, shape: tuple[Any, ...], source: tuple[Any, ...], places: tuple[Any, ...] | None
):
    index = through_reshape((Affine((), offset),), shape, source)
    found = None if index is None else tuple(form.offset for form in index)
    assert found == places
    # A number of sympy's would not be known to be a place, as of one of several pieces.
    assert not any(isinstance(place, sympy.Integer) for place in found or ())


def test_a_product_with_no_elements_is_a_plain_zero():
    assert type(multiply(n, 0)) is type(multiply(0, n)) is int


def test_an_index_beyond_a_tensor_has_no_digits():
    axis = Axis(8)
    assert through_reshape((axis_form(axis),), (4,), (2, 2)) is None
    assert through_reshape((Affine((), 1),), (1,), ()) is None


def test_fewer_than_all_digits_are_placed():
    """Three of the four columns, in one row."""
    axis = Axis(3)
    index = through_reshape((axis_form(axis),), (8,), (2, 4))
    assert index == (Affine(), axis_form(axis))


@pytest.mark.parametrize(
    ("items", "times"), [("aabb", 2), ("abab", 1), ("aab", 1), ("abb", 1), ("aaa", 3)]
)
def test_a_run_length_is_that_of_all_runs(items: str, times: int):
    assert run_length(items) == times


def test_a_place_that_is_not_divided_evenly_reads_no_repeated_offsets():
    """Heads of which each two share weights, from the second head on."""
    offsets = [(Affine((), offset),) for offset in (0, 0, 5, 5)]
    assert along(offsets, axis_form(Axis(4))) is not None
    assert along(offsets, Affine(((Axis(3), 1),), 1)) is None


def test_a_place_of_items_that_are_not_repeated_is_the_item():
    """Also one of so many heads that nobody knows: there are at most as many as items."""
    place = axis_form(Axis(n)).shifted(1)
    assert each_of(place, 4, 1) == place


@pytest.mark.parametrize(
    ("sizes", "others"),
    [([8], [4, 2]), ([4, 2], [8]), ([2, 6], [4, 3]), ([1, 8], [8]), ([2, 3, 4], [24]), ([5], [5])],
)
def test_paired_axes_count_the_same_in_the_same_order(sizes: list[int], others: list[int]):
    mine, theirs = [*map(Axis, sizes)], [*map(Axis, others)]
    pairs = paired(mine, theirs)
    assert pairs is not None
    assert [a.size for a in pairs] == [b.size for b in pairs.values()]
    ours, places = ([leaf for axis in axes for leaf in axis.leaves()] for axes in (mine, theirs))
    assert [pairs[leaf] for leaf in ours if leaf.size != 1] == [p for p in places if p.size != 1]


@pytest.mark.parametrize(("sizes", "others"), [([6], [4]), ([2, 3], [4, 2]), ([8], [4]), ([3], [])])
def test_axes_that_count_differently_are_no_pairs(sizes: list[int], others: list[int]):
    assert paired(map(Axis, sizes), map(Axis, others)) is None
