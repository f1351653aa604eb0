"""Single operations by kind, and the nearest ones that are of another kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.values import a_value
from torch import fx

from mhf_compiler.patterns.canonical import COPY, INPUT, OPAQUE
from mhf_compiler.patterns.operations import (
    is_cast,
    is_other_pointwise,
    is_zero,
    operation_name,
)

aten = torch.ops.aten
META = torch.device("meta")


@pytest.mark.parametrize(
    ("op", "given", "cast"),
    [
        (aten._to_copy.default, {}, True),
        (COPY, {}, True),
        (aten.sin.default, {}, False),
        (COPY, {"dtype": torch.int64}, False),
        (COPY, {"source": torch.int64}, False),
        (COPY, {"device": META}, False),
        (COPY, {"shape": (2, 4, 6)}, False),
    ],
    ids=["to", "copied", "computed", "to integers", "of integers", "moved", "broadcast"],
)
def test_a_cast_changes_a_floating_dtype_and_nothing_else(
    op: Any, given: dict[str, Any], cast: bool
):
    given = {"dtype": torch.float64} | given
    source = a_value(INPUT, dtype=given.pop("source", torch.float32))
    assert is_cast(a_value(op, source, **given)) is cast


@pytest.mark.parametrize(
    ("op", "args", "zero"),
    [
        (aten.zeros.default, ((4, 6),), True),
        (aten.full.default, ((4, 6), 0), True),
        (aten.full.default, ((4, 6), 1.0), False),
        (aten.ones.default, ((4, 6),), False),
    ],
    ids=["zeros", "full of zeros", "full of ones", "ones"],
)
def test_zeros_are_what_a_factory_made(op: Any, args: tuple[Any, ...], zero: bool):
    made = a_value(op, *args)
    assert is_zero(made) is zero
    assert is_zero(a_value(aten.detach.default, made)) is zero
    assert is_zero(a_value(aten._to_copy.default, made, dtype=torch.float64)) is zero
    assert not is_zero(a_value(aten.sin.default, made))


def test_an_activation_of_the_table_is_no_other_pointwise_operation():
    assert not is_other_pointwise(a_value(aten.relu.default, a_value(INPUT)))
    assert is_other_pointwise(a_value(aten.sin.default, a_value(INPUT)))
    assert is_other_pointwise(a_value(aten.hardswish.default, a_value(INPUT)))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (int, "int"),
        (torch.sin, "sin"),
        (torch.einsum, "einsum"),
        (aten.sin.default, "aten.sin.default"),
        (fx.Graph, str(fx.Graph)),
    ],
    ids=["a builtin type", "a builtin function", "a function", "an op", "a class of a module"],
)
def test_what_is_not_known_is_named_by_its_function(target: Any, name: str):
    node = fx.Graph().call_function(target)
    assert operation_name(a_value(OPAQUE, origin=node)) == name
