"""Hidden units that were merged, and the places where they are read."""

from __future__ import annotations

import pytest
import sympy
import torch
from support.values import a_value

from mhf_compiler.patterns.axes import Affine, Axis, axis_form
from mhf_compiler.patterns.canonical import INPUT
from mhf_compiler.patterns.hidden import _one_piece, check_bounds
from mhf_compiler.patterns.reasons import Declined, Kind

N = sympy.Symbol("n", integer=True, positive=True)


def test_one_of_merged_tensors_is_read():
    first, second = a_value(INPUT), a_value(INPUT)
    merged = a_value(torch.ops.aten.cat.default, [first, second], shape=(8, 6))
    row, column = axis_form(Axis(4)), axis_form(Axis(6))
    assert _one_piece(merged, (row, column)) == (first, (row, column))
    assert _one_piece(merged, (row.shifted(4), column)) == (second, (row, column))
    assert _one_piece(merged, (axis_form(Axis(8)), column)) is None  # both
    assert _one_piece(merged, (row.shifted(2), column)) is None  # a half of each
    assert _one_piece(first, (row, column)) is None


def test_tensors_of_unequal_width_or_dtype_are_not_taken_apart():
    row, column = axis_form(Axis(4)), axis_form(Axis(6))
    for other in (a_value(INPUT, shape=(3, 6)), a_value(INPUT, dtype=torch.float64)):
        shape = (4 + other.shape[0], 6)
        merged = a_value(torch.ops.aten.cat.default, [other, a_value(INPUT)], shape=shape)
        assert _one_piece(merged, (row, column)) is None


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (axis_form(Axis(4)), None),
        (axis_form(Axis(5)), Kind.UNEQUAL_HEADS),
        (axis_form(Axis(N)), Kind.UNSUPPORTED_PROBLEM),
    ],
    ids=["all", "more", "a dynamic number"],
)
def test_nothing_is_read_beyond_a_value(form: Affine, kind: Kind | None):
    index = (form, axis_form(Axis(6)))
    if kind is None:
        check_bounds(a_value(INPUT), index)
        return
    with pytest.raises(Declined) as declined:
        check_bounds(a_value(INPUT), index)
    assert declined.value.reason.kind is kind
