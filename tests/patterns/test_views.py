"""Views by themselves: what cannot be read as an index map ends the walk."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from support.values import a_value

from mhf_compiler.patterns.axes import Affine, Axis, axis_form
from mhf_compiler.patterns.canonical import INPUT, Value
from mhf_compiler.patterns.views import (
    all_pieces,
    grows_into,
    is_factory,
    piece_index,
    pieces_of,
    stages_of,
    through_view,
)

aten = torch.ops.aten
N = sympy.Symbol("n", integer=True, positive=True)
SOME = sympy.Symbol("m", integer=True)


def read(value: Value, *index: Affine) -> Any:
    """Where the first dimension of a view is read; the others have axes of their own."""
    rest = [axis_form(Axis(size)) for size in value.shape[len(index) :]]
    step = through_view(value, (*index, *rest))
    return None if step is None else step[1]


def a_slice(start: Any, stop: Any, step: Any = 1, size: Any = 8, width: Any = 3) -> Value:
    source = a_value(INPUT, shape=(size, 6))
    return a_value(aten.slice.Tensor, source, 0, start, stop, step, shape=(width, 6))


@pytest.mark.parametrize(
    ("view", "offset"),
    [
        (a_slice(2, 5), 2),
        (a_slice(None, 3), 0),
        (a_slice(-3, None), 5),
        (a_slice(N, None, size=N + 3), N),
        (a_slice(N * N + N - 1, None, size=N * N + N + 2), N * N + N - 1),
        (a_slice(N, None), None),
        (a_slice(SOME, None), None),
        (a_slice(SOME, None, size=SOME + 3), None),
        (a_slice(2, None, width=SOME), None),
        (a_slice(2, 5, size=N), 2),
        (a_slice(-3, None, size=N), None),
        (a_slice(0, None, step=N), None),
    ],
    ids=[
        "here",
        "from the beginning",
        "from the end",
        "symbolic",
        "a sum",
        "perhaps outside",
        "perhaps negative",
        "perhaps from the end",
        "perhaps beyond the end",
        "a fixed part of n",
        "of n",
        "every nth",
    ],
)
def test_a_slice_starts_where_it_is_known_to(view: Value, offset: Any):
    index = read(view)
    assert (None if index is None else index[0].offset) == offset


@pytest.mark.parametrize(
    ("at", "size", "offset"),
    [(2, 8, 2), (-1, 8, 7), (2, N, 2), (-1, N, None), (N, 8, None)],
    ids=["here", "the last", "of n", "the last of n", "the nth"],
)
def test_a_place_is_a_known_one(at: Any, size: Any, offset: Any):
    source = a_value(INPUT, shape=(size, 6))
    index = read(a_value(aten.select.int, source, 0, at, shape=(6,)))
    assert (None if index is None else index[0].offset) == offset


def test_a_repeated_tensor_is_read_within_one_copy():
    value = a_value(aten.repeat.default, a_value(INPUT), (2, 1), shape=(8, 6))
    axis = Axis(4)
    index = read(value, Affine(((axis, 1),), 4))
    assert index[0].terms == ((axis, 1),)
    assert read(value, Affine(((axis, 1),), 2)) is None


def cat(*pieces: Value, dim: int = 0, **given: Any) -> Value:
    return a_value(aten.cat.default, list(pieces), dim, **given)


@pytest.mark.parametrize(
    "parts",
    [((0, 3), (3, 5)), ((0, 4), (4, 2), (8, 6))],
    ids=["two", "of the first one's width on average"],
)
def test_pieces_of_unequal_width_are_not_read_together(parts: tuple[tuple[int, int], ...]):
    source = a_value(INPUT, shape=(14, 6))
    pieces = [
        a_value(aten.slice.Tensor, source, 0, start, start + width, shape=(width, 6))
        for start, width in parts
    ]
    assert read(cat(*pieces, shape=(sum(width for _, width in parts), 6))) is None


def test_an_empty_piece_without_dimensions_of_its_own_is_not_read():
    """It decides the dtype."""
    empty = a_value(INPUT, shape=(0,), dtype=torch.float64)
    value = cat(empty, a_value(INPUT), dim=1, dtype=torch.float64)
    assert piece_index(value, tuple(axis_form(Axis(size)) for size in value.shape), 1) is None


def test_pieces_that_are_no_index_maps_are_not_read_together():
    """Rows of 5 out of rows of 7."""
    piece = a_value(aten.view.default, a_value(INPUT, shape=(5, 7)), (7, 5), shape=(7, 5))
    assert read(piece) is None
    assert read(cat(piece.source, piece.source, shape=(10, 7))) is None
    assert read(cat(piece, piece, shape=(14, 5))) is None


def test_what_is_merged_with_something_that_is_no_view_is_not_read_as_one():
    rows = a_slice(0, 3)
    assert read(cat(rows, a_value(INPUT, shape=(3, 6)), shape=(6, 6))) is None


def test_only_a_cat_along_the_same_dimension_grows():
    a = a_value(INPUT)
    inner = cat(a, a, shape=(8, 6))
    assert grows_into(inner, cat(inner, a, shape=(12, 6)))
    assert not grows_into(inner, cat(inner, inner, dim=1, shape=(8, 12)))
    assert not grows_into(inner, a_value(aten.stack.default, [inner, inner], shape=(2, 8, 6)))
    assert not grows_into(a, cat(inner, a, shape=(12, 6)))


@pytest.mark.parametrize("wanted", [False, True])
def test_a_cat_without_gradients_grows_into_one_with_them_if_none_is_wanted(wanted: bool):
    a = a_value(INPUT, requires_grad=wanted)
    inner = cat(a, a, shape=(8, 6), requires_grad_mode=False)
    assert grows_into(inner, cat(inner, a, shape=(12, 6))) is not wanted
    same = {"requires_grad_mode": False}
    assert grows_into(inner, cat(inner, a, shape=(12, 6), **same))


def test_a_cat_that_is_a_piece_is_no_stage():
    a = a_value(INPUT)
    inner = cat(a, a, shape=(8, 6))
    assert stages_of(cat(inner, inner, shape=(16, 6))) == set()
    assert stages_of(cat(inner, a, shape=(12, 6))) == {inner}


def test_empty_pieces_are_no_pieces_where_there_are_others():
    nothing, a = a_value(INPUT, shape=(0, 6)), a_value(INPUT)
    assert list(pieces_of(cat(nothing, nothing, shape=(0, 6)))) == [nothing, nothing]
    assert list(pieces_of(cat(nothing, a, a, shape=(8, 6)))) == [a, a]


def test_an_empty_piece_may_cast_the_others():
    """Without it, what is merged would be read as the tensor of another dtype that was cut up."""
    nothing = a_value(INPUT, shape=(0, 6), dtype=torch.float64)
    source = a_value(INPUT, shape=(8, 6))
    halves = [
        a_value(aten.slice.Tensor, source, 0, start, start + 4, shape=(4, 6)) for start in (0, 4)
    ]
    assert read(cat(*halves, shape=(8, 6))) is not None
    assert read(cat(*halves, nothing, shape=(8, 6), dtype=torch.float64)) is None


def test_each_piece_begins_where_the_one_before_it_ends():
    a, b = a_value(INPUT), a_value(INPUT, shape=(3, 6))
    assert all_pieces(cat(a, b, a, shape=(11, 6))) == {a: 0, b: 4}
    c = a_value(INPUT)
    assert all_pieces(a_value(aten.stack.default, [a, c], shape=(2, 4, 6))) == {a: 0, c: 1}


def test_random_numbers_are_no_factory():
    assert is_factory(a_value(aten.zeros.default, (4, 6)))
    assert not is_factory(a_value(aten.rand.default, (4, 6)))
