"""Which part of a tensor a chain of views shows, and whether two parts are known to be apart."""

from typing import Any

import pytest
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mhf_compiler.compat import FloorDiv, symbolic_size
from mhf_compiler.patterns.axes import Size
from mhf_compiler.patterns.parts import Range, ViewStep, is_number, plain, shown_range

aten = torch.ops.aten
n = sympy.Symbol("n", integer=True, positive=True)
ROWS: tuple[Size, ...] = (6, 4)


def row(*args: Any) -> ViewStep:
    return ViewStep(aten.select.int, args, {}, None, (4,), (1,), torch.float32)


def rows(width: Size, *args: Any) -> ViewStep:
    return ViewStep(aten.slice.Tensor, args, {}, None, (width, 4), (4, 1), torch.float32)


SHOWN: dict[str, tuple[ViewStep, Range]] = {
    "a row": (row(0, 2), Range(0, 2, 1, True)),
    "a row from the end": (row(-2, -1), Range(0, 5, 1, True)),
    "rows": (rows(2, 0, 4, 6), Range(0, 4, 2, False)),
    "the first rows": (rows(2, 0, None, 2), Range(0, 0, 2, False)),
    "the last rows": (rows(2, 0, -2), Range(0, 4, 2, False)),
}


@pytest.mark.parametrize(("step", "part"), SHOWN.values(), ids=SHOWN)
def test_a_view_shows_a_range(step: ViewStep, part: Range):
    assert shown_range([step], ROWS) == part


UNKNOWN: dict[str, ViewStep] = {
    "no row": rows(0, 0, 6, 6),
    "every second row": rows(3, 0, 0, 6, 2),
    "more rows than there are": rows(4, 0, 4, 8),
    "an unknown row": row(0, n - 2),
    "a row before the first": row(0, -7),
    "rows up to an unknown one": rows(n, 0, 0, n),
    "with names": ViewStep(
        aten.slice.Tensor, (0,), {"start": 2}, None, (4, 4), (4, 1), torch.float32
    ),
    "another view": ViewStep(aten.t.default, (), {}, None, (4, 6), (1, 4), torch.float32),
}


@pytest.mark.parametrize("step", UNKNOWN.values(), ids=UNKNOWN)
def test_others_show_no_range_that_is_known(step: ViewStep):
    assert shown_range([step], ROWS) is None


def test_a_range_in_a_range_is_none():
    assert shown_range([rows(2, 0, 4, 6), row(0, 1)], ROWS) is None
    assert shown_range([rows(6, 0, 0, 6), row(0, 1)], ROWS) == Range(0, 1, 1, True)


def test_a_range_in_an_unknown_part_is_none():
    assert shown_range([rows(3, 0, 0, 6, 2), row(0, 1)], ROWS) is None
    in_another_order = ViewStep(
        aten.as_strided.default, ((6, 4), (1, 6)), {}, None, ROWS, (1, 6), torch.float32
    )
    assert shown_range([in_another_order, row(0, 1)], ROWS) is None


@pytest.mark.parametrize(
    ("part", "apart"),
    [
        (Range(0, 2, 2, False), True),
        (Range(0, 0, 2, False), False),  # the same
        (Range(1, 2, 2, False), False),  # of another dimension
        (Range(0, 4, 1, False), False),  # of another width
        (Range(0, 3, 2, False), False),  # between two places
        (Range(0, n, 2, False), False),  # anywhere
    ],
)
def test_different_pieces_of_one_partition_are_apart(part: Range, apart: bool):
    first = Range(0, 0, 2, False)
    assert first.is_disjoint(part) is part.is_disjoint(first) is apart


def test_plain_arguments_have_expressions_for_symbolic_sizes():
    size = ShapeEnv().create_unbacked_symint()
    symbol = symbolic_size(size)
    assert isinstance(symbol, sympy.Expr)
    number, (first, name), named = plain([1, (size, "a"), {"b": [size]}])
    assert (number, name) == (1, "a")
    assert first is named["b"][0] is symbol


def test_only_quotients_without_a_remainder_are_divided():
    env = ShapeEnv()
    size = env.create_unbacked_symint()
    s = symbolic_size(size)
    assert symbolic_size((2 * size + 4) // 2) == s + 2
    for rounded in (size // 2, (size + 1) // 2, (3 * size + 2) // 4):
        expression = symbolic_size(rounded)
        assert expression.has(FloorDiv)
        assert expression.subs(s, 5) == rounded.node.expr.subs(s, 5)


@pytest.mark.parametrize(
    ("value", "known"),
    [
        (2, True),
        (0.5, True),
        (float("inf"), False),
        (float("nan"), False),
        (n, False),
        (None, False),
    ],
)
def test_numbers_are_known_and_finite(value: Any, known: bool):
    assert is_number(value) is known


def test_rows_that_begin_before_the_first_are_not_known():
    """PyTorch begins them at the first."""
    assert shown_range([rows(3, 0, -10, 3)], ROWS) is None
