"""Casts and views, in either order.

A cast is elementwise, so a cast of a view has the same elements as a view of a cast. Autocast
casts what a product reads: below the views of one spelling of a product, above those of another,
and each head of a loop by itself. What it has cast may be read as a view of one cast of the whole,
which is in no graph yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import fx

from .axes import (
    Axis,
    Index,
    Size,
    at_most,
    axis_form,
    leaves,
    plus,
    product,
    real,
    real_axes,
)
from .canonical import Value
from .contractions import Operand
from .operations import is_cast
from .products import is_product_call
from .views import is_view, through_view

aten = torch.ops.aten


def through_casts(value: Value, index: Index) -> tuple[Value, Index, list[Value]]:
    """What a value is cast from and a view of, where it is read, and the values on the way."""
    passed: list[Value] = []
    while True:
        step = (value.source, index) if is_cast(value) else through_view(value, index)
        if step is None:
            return value, index, passed
        passed.append(value)
        value, index = step


def cast_from(value: Value) -> tuple[Value, list[torch.dtype]]:
    """What a value is cast from and a view of, and through which dtypes, the last one first."""
    casts: list[torch.dtype] = []
    while is_cast(value) or is_view(value):
        casts += [value.dtype] if is_cast(value) else []
        value = value.source
    return value, casts


def uncast(value: Value) -> Value:
    """What a value is cast from and a view of."""
    return cast_from(value)[0]


def same_cast(a: Value, b: Value) -> bool:
    """Whether two values are casts of one value to one dtype."""
    alike = is_cast(a) and is_cast(b) and a.dtype is b.dtype and a.source is b.source
    return alike and a.requires_grad_mode is b.requires_grad_mode


def repetition(
    read: Operand,
    axes: AbstractSet[Axis],
    *,
    in_loop: bool = False,
    stops: AbstractSet[Value] = frozenset(),
) -> Value | None:
    """The tensor in which elements are repeated along some of the axes; None if there is none.

    Reading further loses those axes. Of the tensors that have them, and are more than a step inside
    of a call, it is the lowest whose memory has room for the repeated elements, so that different
    views of it are views of one tensor.

    Args:
        read: where the walk begins.
        axes: those that count; others may be lost, such as sub-networks that share queries.
        in_loop: whether a place in a dimension is the loop's, which goes along all of it.
        stops: the walk goes no further.
    """
    value, index = read.value, read.index
    above: fx.Node | None = None
    whole: list[Value] = []
    while value not in stops:
        if value.origin is not above and not is_product_call(value.origin):
            whole.append(value)
        if in_loop:
            index, passed = _along_loops(index, value.shape)
            axes = axes | passed
        before, above = real_axes(index), value.origin
        step = (value.source, index) if is_cast(value) else through_view(value, index)
        if step is None:
            break
        value, index = step
        # Reading may have split an axis.
        if not real(leaves(before)) & real(leaves(axes)) <= real_axes(index) and whole:
            return next(filter(_has_room, reversed(whole)), whole[-1])
    return None


def _along_loops(index: Index, shape: Sequence[Size]) -> tuple[Index, set[Axis]]:
    """The index with an axis in place of each number, and those axes."""
    own = {at: Axis(size) for at, size in enumerate(shape) if not index[at].axes()}
    moved = (axis_form(own[at]) if at in own else form for at, form in enumerate(index))
    return tuple(moved), set(own.values())


def _has_room(value: Value) -> bool:
    """Whether no two elements are one in memory."""
    return all(
        step != 0 for step, size in zip(value.strides, value.shape, strict=True) if size != 1
    )


def above_views(
    operand: Operand, is_held: Callable[[Value], bool], stops: AbstractSet[Value] = frozenset()
) -> Operand:
    """A cast of views, read as views of a cast.

    One that a node holds stays: it is there. So does one of a part, as the whole would be more, and
    one of what no node holds, such as the product below the views of an ``einsum``: it would be
    computed again. The walk goes no further than ``stops``.
    """
    value = operand.value
    if not is_cast(value) or is_held(value):
        return operand
    held = [one for one in _below(value, operand.index, stops)[1:] if is_held(one.value)]
    if not held or not at_most(product(held[-1].value.shape), product(value.shape)):
        return operand
    return Operand(_cast_of(held[-1].value, value), held[-1].index)


def as_one_cast(copies: Sequence[Operand]) -> list[Operand] | None:
    """Casts of parts of one tensor, read as parts of one cast; None unless they are all of it."""
    first = copies[0].value
    ways: list[dict[Value, Operand]] = []
    for copy in copies:
        value = copy.value
        alike = value.dtype is first.dtype and value.requires_grad_mode is first.requires_grad_mode
        if not alike or not is_cast(value):
            return None
        ways.append({one.value: one for one in _below(value, copy.index)})
    base = next((value for value in ways[0] if all(value in way for way in ways)), None)
    parts = {copy.value for copy in copies}
    covered: Size = 0
    for part in parts:
        covered = plus(covered, product(part.shape))
    if base is None or not at_most(product(base.shape), covered):
        return None
    cast = _cast_of(base, max((copy.value for copy in copies), key=lambda value: value.step))
    return [Operand(cast, way[base].index) for way in ways]


def _below(cast: Value, index: Index, stops: AbstractSet[Value] = frozenset()) -> list[Operand]:
    """What a cast is a cast of, what that is a view of, and so on, each with the index there.

    Gradients must flow through the views as they do through the cast.
    """
    value = cast.source
    found = [Operand(value, index)]
    while value not in stops and value.requires_grad_mode is cast.requires_grad_mode:
        step = through_view(value, index)
        if step is None:
            break
        value, index = step
        found.append(Operand(value, index))
    return found


def _cast_of(base: Value, like: Value) -> Value:
    """A cast of all of ``base``, of which ``like`` is a cast of a part or a view."""
    return Value(
        op=aten._to_copy.default,
        args=(base,),
        kwargs={"dtype": like.dtype},
        shape=base.shape,
        dtype=like.dtype,
        device=like.device,
        origin=like.origin,
        step=like.step,
        requires_grad_mode=like.requires_grad_mode,
        strides=base.strides,
    )
