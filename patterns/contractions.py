"""Contractions: sums of products of two tensors, spelled by any operator.

``as_contraction`` reads the matrix products of ``products.py``, convolutions one element wide among
them, and a sum over a product as one thing: the two operands with the indices they are read at, and
the summed axes. An einsum or ``@`` arrives as one of these, because the canonical copy is
decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .axes import Affine, Axis, Index, axis_form, quotient, through_reshape
from .canonical import Value
from .parts import is_number
from .views import broadcast, through_views

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Operand:
    """A value and the index it is read at."""

    value: Value
    index: Index


@dataclass(frozen=True, slots=True)
class Contraction:
    """``scale * sum over summed of left * right + bias_scale * bias``, read at one index."""

    value: Value
    left: Operand
    right: Operand
    summed: tuple[Axis, ...]
    bias: Operand | None = None
    scale: float = 1.0
    bias_scale: float = 1.0
    product: Value | None = None  # the elementwise product that is summed, where there is one
    crossed: frozenset[Value] = frozenset()  # the views between the product and the sum

    @property
    def is_product(self) -> bool:
        """Whether nothing is summed: an outer product, which einsum spells as a matmul."""
        return all(axis.size == 1 for axis in self.summed)


def as_contraction(value: Value, index: Index) -> Contraction | None:
    """The value, read at an index, as a sum of products; None if it is none."""
    rule = _RULES.get(value.op)
    return None if rule is None else rule(value, index)


def _matmul(value: Value, index: Index, left: Value, right: Value, **others: Any) -> Contraction:
    """``[..., m, k] @ [..., k, n]`` with equal leading dimensions."""
    *batch, row, column = index
    k = Axis(left.shape[-1])
    return Contraction(
        value,
        Operand(left, (*batch, row, axis_form(k))),
        Operand(right, (*batch, axis_form(k), column)),
        (k,),
        **others,
    )


def _mm(value: Value, index: Index) -> Contraction:
    return _matmul(value, index, value.args[0], value.args[1])


def _mv(value: Value, index: Index) -> Contraction:
    """``[..., k] @ [k]``: a matrix or a vector with a vector."""
    left, right = value.args
    k = Axis(left.shape[-1])
    return Contraction(
        value, Operand(left, (*index, axis_form(k))), Operand(right, (axis_form(k),)), (k,)
    )


def _product_of(
    value: Value, index: Index, left: Value, right: Value, **others: Any
) -> Contraction:
    """A product that is added to a bias: ``addmm``, ``baddbmm``, ``addmv`` and their like."""
    if value.op is not aten.addbmm.default and len(right.shape) > 1:
        return _matmul(value, index, left, right, **others)
    k = axis_form(Axis(left.shape[-1]))
    batch = axis_form(Axis(left.shape[0]))
    row = index[0]
    if len(right.shape) == 1:
        return Contraction(value, Operand(left, (row, k)), Operand(right, (k,)), k.axes(), **others)
    return Contraction(
        value,
        Operand(left, (batch, row, k)),
        Operand(right, (batch, k, index[1])),
        (*batch.axes(), *k.axes()),
        **others,
    )


def _addmm(value: Value, index: Index) -> Contraction | None:
    bias, left, right = value.args[:3]
    scale, bias_scale = value.argument(4, "alpha", 1), value.argument(3, "beta", 1)
    if not is_number(scale) or not is_number(bias_scale) or scale == 0:
        return None
    if bias_scale == 0:
        # Not read, even if it is NaN. But it gets a gradient of zeros, not None.
        unread = not value.requires_grad_mode or not bias.may_need_gradient()
        return _product_of(value, index, left, right, scale=float(scale)) if unread else None
    return _product_of(
        value,
        index,
        left,
        right,
        bias=Operand(bias, broadcast(index, bias.shape)),
        scale=float(scale),
        bias_scale=float(bias_scale),
    )


def _linear(value: Value, index: Index) -> Contraction:
    tokens, weight = value.args[:2]
    bias = value.argument(2, "bias", None)
    k = Axis(tokens.shape[-1])
    return Contraction(
        value,
        Operand(tokens, (*index[:-1], axis_form(k))),
        Operand(weight, (index[-1], axis_form(k))),
        (k,),
        bias=None if bias is None else Operand(bias, index[-1:]),
    )


def _convolution(value: Value, index: Index) -> Contraction | None:
    """A grouped convolution one element wide is a per-group matrix product over channels."""
    tokens, weight, bias, stride, padding, _, transposed, _, groups = value.args[:9]
    width_one = all(size == 1 for size in weight.shape[2:])
    if not width_one or transposed or any(s != 1 for s in stride) or any(padding):
        return None
    batch, channel, *space = index
    outputs, inputs = weight.shape[:2]
    per_group = quotient(outputs, groups)
    if per_group is None:
        return None
    digits = through_reshape((channel,), (outputs,), (groups, per_group))
    if digits is None:
        return None
    c = Axis(inputs)
    group = digits[0].scaled(inputs)
    read = Affine((*group.terms, (c, 1)), group.offset)
    return Contraction(
        value,
        Operand(tokens, (batch, read, *space)),
        Operand(weight, (channel, axis_form(c), *(Affine() for _ in space))),
        (c,),
        bias=None if bias is None else Operand(bias, (channel,)),
    )


def _sum_of_product(value: Value, index: Index) -> Contraction | None:
    """``(left * right).sum(dims)``."""
    inner, summed = summed_index(value, index)
    crossed: set[Value] = set()
    product, at = through_views(value.source, inner, crossed)
    if product.op is not aten.mul.Tensor or len(product.operands) != 2:
        return None
    left, right = product.args
    return Contraction(
        value,
        Operand(left, broadcast(at, left.shape)),
        Operand(right, broadcast(at, right.shape)),
        summed,
        product=product,
        crossed=frozenset(crossed),
    )


def summed_index(value: Value, index: Index) -> tuple[Index, tuple[Axis, ...]]:
    """The index into the operand of a sum, with new axes for the summed dimensions."""
    shape = value.source.shape
    dims = value.argument(1, "dim", None)
    dims = range(len(shape)) if dims is None or len(dims) == 0 else dims
    summed = {dim % len(shape): Axis(shape[dim % len(shape)]) for dim in dims}
    keepdim = bool(value.argument(2, "keepdim", False))
    kept = iter(index)
    inner: list[Affine] = []
    for dim in range(len(shape)):
        if dim in summed:
            inner.append(axis_form(summed[dim]))
            if keepdim:
                next(kept)
        else:
            inner.append(next(kept))
    return tuple(inner), tuple(summed.values())


_RULES: dict[Any, Callable[[Value, Index], Contraction | None]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.addbmm.default: _addmm,
    aten.addmv.default: _addmm,
    aten.mv.default: _mv,
    aten.dot.default: _mv,
    aten.linear.default: _linear,
    aten.convolution.default: _convolution,
    aten.sum.dim_IntList: _sum_of_product,
}
