"""Casts and views in either order: autocast casts below the views of some products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import graph_of
from support.values import a_value
from torch import Tensor, fx

import mhf_compiler
from mhf_compiler.patterns import STACK, Kind, Site, find_sites
from mhf_compiler.patterns.axes import Affine, Axis, axis_form
from mhf_compiler.patterns.canonical import INPUT, Value
from mhf_compiler.patterns.casts import above_views, as_one_cast, repetition, same_cast
from mhf_compiler.patterns.contractions import Operand
from mhf_compiler.patterns.tracer import trace

T, H, E, d, f = 6, 3, 2, 8, 5
OPTIONS = {"rewrite": "always", "fallback": "eager", "strict": True, "verify": True}

torch.manual_seed(0)
X = torch.randn(T, H, d)
GATE, UP = (torch.randn(H, d, f) / 3 for _ in range(2))
DOWN = torch.randn(H, f, d) / 3


def the_site(function: Callable[..., Any], *args: Tensor) -> Site:
    """The one site of a function under autocast, after its results have been compared."""
    found: list[Site] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.extend(find_sites(gm).sites)
        return gm.forward

    args = tuple(x.clone().requires_grad_() for x in args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(function, backend=backend)(*args)
        (site,) = found
        torch.compiler.reset()
        compiled = torch.compile(function, backend="flashmhf", options=OPTIONS)
        results = [run(*args) for run in (compiled, function)]
        gradients = [torch.autograd.grad(y.float().sum(), args) for y in results]
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)
    return site


def reasons(function: Callable[..., Any], *args: Tensor, autocast: bool = True) -> set[Kind]:
    """Why nothing is rewritten."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        report = mhf_compiler.explain(function, options={"rewrite": "always"})(*args)
    assert not report.rewritten
    return {site.reason.kind for site in report.declined if site.reason is not None}


# One query, cast more than once.

#: products of (T, d) and (d, f); each views its arguments in another way before they are cast
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, w: q @ w,
    "tensordot": lambda q, w: torch.tensordot(q, w, dims=([1], [0])),
    "einsum": lambda q, w: torch.einsum("td,df->tf", q, w),
    "linear": lambda q, w: F.linear(q, w.T),
    "transposed": lambda q, w: (w.T @ q.T).T,
    "conv": lambda q, w: F.conv1d(q[:, :, None], w.T[:, :, None])[:, :, 0],
}


@pytest.mark.parametrize("of_up", PRODUCTS)
@pytest.mark.parametrize("of_gate", ["matmul", "einsum"])
def test_gate_and_up_may_be_spelled_by_different_products(of_gate: str, of_up: str):
    gate_of, up_of = PRODUCTS[of_gate], PRODUCTS[of_up]

    def heads(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.stack(
            [
                (F.silu(gate_of(x[:, h], gate[h])) * up_of(x[:, h], up[h])) @ down[h]
                for h in range(H)
            ],
            1,
        )

    site = the_site(heads, X, GATE, UP, DOWN)
    assert (site.heads, site.groups) == (H, H)


def batched(q: Tensor, other: Tensor) -> Tensor:
    """The gate reads one tensor, the up projection another; by different products."""
    gate = torch.einsum("thd,hdf->thf", q, GATE)
    up = (other.transpose(0, 1) @ UP).transpose(0, 1)
    return torch.einsum("thf,hfd->thd", F.silu(gate) * up, DOWN)


def test_batched_heads_by_different_products():
    site = the_site(lambda x: batched(x, x), X)
    assert (site.heads, site.sub_networks) == (H, 1)


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (lambda x: x.roll(1, 0), Kind.DIFFERENT_QUERIES),
        (lambda x: x.flip(-1), Kind.DIFFERENT_QUERIES),
        (lambda x: x.transpose(0, 1).reshape(T, H, d), Kind.DIFFERENT_QUERIES),
        (lambda x: torch.cat((x[1:], x[:1])), Kind.DIFFERENT_QUERIES),
        (lambda x: x.half(), Kind.MIXED_PRECISION),
    ],
    ids=["other tokens", "reversed", "rearranged", "cut and glued", "rounded to other digits"],
)
def test_casts_of_other_elements_are_other_queries(other: Callable[[Tensor], Tensor], kind: Kind):
    assert reasons(lambda x: batched(x, other(x)), X) == {kind}


def test_another_part_of_one_cast_tensor_is_another_query():
    """Both are cast alike from one tensor: it is not their precision that differs."""

    def parts(x: Tensor) -> Tensor:
        return batched(x[:T].bfloat16(), x[T:].bfloat16())

    assert reasons(parts, torch.cat((X, X))) == {Kind.DIFFERENT_QUERIES}


def test_a_cast_without_gradients_is_another_query():
    def cut(x: Tensor) -> Tensor:
        with torch.no_grad():
            other = x.transpose(0, 1).bfloat16()
        return batched(x, other.transpose(0, 1))

    assert reasons(cut, X.clone().requires_grad_()) <= {Kind.DIFFERENT_QUERIES, Kind.GRADIENTS_CUT}


# Parts of one tensor, each cast by itself.


def test_heads_that_share_weights_are_heads_where_each_is_cast_by_itself():
    def heads(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        queries = x.split(d, -1)
        return torch.cat([(F.silu(q @ gate) * (q @ up)) @ down for q in queries], -1)

    site = the_site(heads, X.flatten(1), GATE[0], UP[0], DOWN[0])
    assert (site.heads, site.groups) == (H, 1)
    assert site.query.value.op != STACK


def of_heads(x: Tensor, which: range) -> Tensor:
    """The networks of some heads, in a loop."""
    hidden = [F.silu(x[:, h] @ GATE[h]) * (x[:, h] @ UP[h]) for h in which]
    return torch.stack([y @ DOWN[h] for h, y in zip(which, hidden, strict=True)], 1)


def test_weights_of_a_loop_are_read_from_one_cast():
    site = the_site(lambda x: of_heads(x, range(H)), X)
    assert all(view.value.op != STACK for view in site.views().values())
    assert site.gate.value.shape == GATE.shape


def test_a_part_of_the_heads_is_cast_alone():
    """A cast of all of them would be more work than the model has."""
    site = the_site(lambda x: of_heads(x, range(H - 1)), X)
    assert site.heads == H - 1
    assert all(view.value.op == STACK for view in site.views().values())


def test_repeated_weights_are_cast_before_they_are_repeated():
    def grouped(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, up, down = (w.repeat_interleave(2, 0) for w in (gate, up, down))
        hidden = F.silu(torch.einsum("thd,hdf->thf", x, gate)) * torch.einsum("thd,hdf->thf", x, up)
        return torch.einsum("thf,hfd->thd", hidden, down).flatten(1)

    site = the_site(grouped, torch.randn(T, 2 * H, d), GATE, UP, DOWN)
    assert (site.heads, site.groups) == (2 * H, H)


def test_a_tensor_that_is_overwritten_after_its_cast():
    """The op would read the new numbers."""

    def written(x: Tensor) -> Tensor:
        x = x * 1.5
        halves = [part.bfloat16() for part in x.split(d, -1)]
        x.zero_()
        return torch.cat([(F.silu(q @ GATE[0]) * (q @ UP[0])) @ DOWN[0] for q in halves], -1)

    x = X.flatten(1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(written, backend="flashmhf", options=OPTIONS)
        torch.testing.assert_close(compiled(x), written(x), rtol=0.05, atol=0.05)


# Gradients, and other networks, on the way to what is cast.


def views_cut(x: Tensor, gate: Tensor) -> Tensor:
    with torch.no_grad():
        x, gate = x.transpose(0, 1), gate.transpose(1, 2)
    return torch.bmm(F.silu(torch.bmm(x, gate.transpose(1, 2))) * torch.bmm(x, UP), DOWN)


def parts_cut(x: Tensor, gate: Tensor) -> Tensor:
    with torch.no_grad():
        parts = gate.unbind(0)
    hidden = [F.silu(x[:, h] @ part) * (x[:, h] @ UP[h]) for h, part in enumerate(parts)]
    return torch.stack([y @ down for y, down in zip(hidden, DOWN, strict=True)], 1)


def one_part_cut(x: Tensor, gate: Tensor) -> Tensor:
    with torch.no_grad():
        first = gate[0]
    parts = (first, gate[1], gate[2])
    hidden = [F.silu(x[:, h] @ part) * (x[:, h] @ UP[h]) for h, part in enumerate(parts)]
    return torch.stack([y @ down for y, down in zip(hidden, DOWN, strict=True)], 1)


@pytest.mark.parametrize("cut", [views_cut, parts_cut, one_part_cut])
def test_views_without_gradients_stay_without_where_a_cast_follows(cut: Callable[..., Tensor]):
    """What autocast casts is a view that gives no gradients to what it shows."""
    compiled = torch.compile(cut, backend="flashmhf", options=OPTIONS)
    gradients = []
    for run in (cut, compiled):
        args = [tensor.clone().requires_grad_() for tensor in (X, GATE)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(*args)
        gradients.append(torch.autograd.grad(y.float().sum(), args, allow_unused=True))
    for expected, found in zip(*gradients, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def batched_bmm(x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return torch.bmm(F.silu(torch.bmm(x, GATE)) * torch.bmm(x, UP), DOWN).transpose(0, 1)


@pytest.mark.parametrize(
    "second", [batched_bmm, lambda x: of_heads(x, range(H))], ids=["batched", "loop"]
)
def test_a_network_that_reads_another_of_more_digits(second: Callable[[Tensor], Tensor]):
    """Views are crossed down to the other's output, and not into it."""

    def two(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = batched(x, x)
        return second(y)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = mhf_compiler.explain(two, options={"rewrite": "always"})(X)
    assert len(report.rewritten) == 2
    assert not report.declined


def test_what_no_node_holds_is_not_computed_again():
    """The views of an ``einsum`` are crossed down to its result, not to the product below."""

    def projected(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = torch.einsum("thd,de->the", x, DOWN[0].T @ DOWN[0])
        return batched(x, x)

    assert the_site(projected, X).heads == H


# Values by themselves.

BFLOAT16, HALF = torch.bfloat16, torch.float16
TO = torch.ops.aten._to_copy.default


def test_casts_are_the_same_if_they_are_to_one_dtype():
    x = a_value(INPUT)
    assert same_cast(a_value(TO, x, dtype=BFLOAT16), a_value(TO, x, dtype=BFLOAT16))
    assert not same_cast(a_value(TO, x, dtype=BFLOAT16), a_value(TO, x, dtype=HALF))
    assert not same_cast(a_value(TO, x, dtype=HALF), a_value(TO, a_value(INPUT), dtype=HALF))


def test_numbers_that_are_reinterpreted_are_not_cast():
    x = a_value(INPUT, dtype=BFLOAT16)
    cast = a_value(TO, x, dtype=HALF)
    view = a_value(torch.ops.aten.view.dtype, x, HALF, dtype=HALF)
    assert not same_cast(view, cast)
    assert not same_cast(cast, view)


def rows_of(x: Value, start: int, **modes: bool) -> Value:
    return a_value(torch.ops.aten.slice.Tensor, x, 0, start, start + 2, shape=(2, 6), **modes)


@pytest.mark.parametrize(
    ("given", "one"), [({}, True), ({"requires_grad_mode": False}, False), ({"dtype": HALF}, False)]
)
def test_casts_of_parts_are_one_cast_if_they_are_alike(given: dict[str, Any], one: bool):
    x = a_value(INPUT)
    index = axis_form(Axis(2)), axis_form(Axis(6))
    modes = {name: mode for name, mode in given.items() if name == "requires_grad_mode"}
    casts = [
        a_value(
            TO,
            rows_of(x, start, **(modes if options else {})),
            **{"shape": (2, 6), "dtype": BFLOAT16} | options,
        )
        for start, options in ((0, {}), (2, given))
    ]
    whole = as_one_cast([Operand(cast, index) for cast in casts])
    assert (whole is not None) is one


def test_a_cast_is_not_read_beyond_the_output_of_another_network():
    x = a_value(INPUT)
    view = a_value(torch.ops.aten.view.default, x, (24,), shape=(24,))
    cast = Operand(a_value(TO, view, shape=(24,), dtype=BFLOAT16), (axis_form(Axis(24)),))
    held = lambda value: value in (x, view)  # noqa: E731
    assert above_views(cast, held).value.source is x
    assert above_views(cast, held, stops={view}).value.source is not x


@pytest.mark.parametrize("recorded", [True, False])
def test_a_cast_is_read_below_views_that_gradients_flow_through_as_through_it(recorded: bool):
    x = a_value(INPUT)
    view = a_value(torch.ops.aten.view.default, x, (24,), shape=(24,), requires_grad_mode=recorded)
    cast = Operand(a_value(TO, view, shape=(24,), dtype=BFLOAT16), (axis_form(Axis(24)),))
    source = above_views(cast, lambda value: value is x).value.source
    assert source is (x if recorded else view)


def test_a_cast_that_a_node_holds_is_read_as_it_is_and_so_is_what_is_no_cast():
    x = a_value(INPUT)
    view = a_value(torch.ops.aten.view.default, x, (24,), shape=(24,))
    for op in (TO, torch.ops.aten.sin.default):
        read = Operand(a_value(op, view, shape=(24,), dtype=HALF), (axis_form(Axis(24)),))
        held = {x} if op is not TO else {x, read.value}
        assert above_views(read, held.__contains__) is read


# Repetitions.


def read_by(
    function: Callable[..., Any], *, number: int | None = None
) -> tuple[Operand, set[Axis]]:
    """What a function of (T, H, d) returns, read along all dimensions but for a number."""
    gm = graph_of(function, X)
    (value,) = trace(gm).reads[gm.graph.output_node()].values()
    axes = [Axis(size) for size in value.shape]
    index = tuple(map(axis_form, axes))
    if number is not None:
        index = (Affine((), number), *index[1:])
    return Operand(value, index), {*axes}


@pytest.mark.parametrize(
    ("function", "maker"),
    [
        (lambda x: x.repeat(2, 1, 1), "repeat"),
        (lambda x: x.repeat(2, 1, 1).view(2, T, H * d).transpose(0, 2), "repeat"),
        (lambda x: x.repeat_interleave(2, 1), "repeat_interleave"),
        (lambda x: x[:, None].expand(T, 2, H, d), "expand"),
        (lambda x: x[:, None].expand(T, 2, H, d).flatten(0, 1).transpose(0, 1), "flatten"),
        (lambda x: x.repeat(2, 1, 1).bfloat16().unsqueeze(0), "repeat"),
        (lambda x: torch.cat([x[:2], x[:2]]), "cat"),
    ],
)
def test_a_repetition_is_the_lowest_tensor_with_room_for_it(
    function: Callable[[Tensor], Tensor], maker: str
):
    read, axes = read_by(function)
    found = repetition(read, axes)
    assert found is not None
    assert found.origin.name == maker
    assert repetition(read, axes, stops={found}) is None
    assert repetition(read, set()) is None  # no axis counts


@pytest.mark.parametrize(
    "function", [lambda x: x[1:4, :, ::2].mT, lambda x: x[:, None], lambda x: x.repeat(1, 1, 1) + x]
)
def test_what_shows_each_element_once_is_no_repetition(function: Callable[[Tensor], Tensor]):
    assert repetition(*read_by(function)) is None


def test_what_a_product_repeats_is_no_tensor_of_the_graph():
    """Its own call broadcasts the queries, and reads them in one step."""
    gm = graph_of(lambda x, w: torch.matmul(x, w[:, None]), X, torch.randn(E, d, f))
    (product,) = [value for value in trace(gm).values if value.op is torch.ops.aten.bmm.default]
    axes = [Axis(size) for size in product.source.shape]
    assert repetition(Operand(product.source, tuple(map(axis_form, axes))), {*axes}) is None


def test_a_loop_goes_along_all_places_of_a_dimension():
    read, axes = read_by(lambda x: x.repeat(2, 1, 1), number=7)
    assert repetition(read, axes) is None
    assert repetition(read, axes, in_loop=True) is read.value
