"""Unrolled loops, rolled up: isomorphic terms become one term with one more axis.

A loop over heads or sub-networks arrives as many copies of the same small expression that differ in
where they read. ``join`` lays the copies over each other. A tensor that all of them read at offsets
in arithmetic progression is read along a new axis; tensors that differ as such, as the weights of
a ``ModuleList`` do, become one stacked tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .axes import (
    Affine,
    Axis,
    Index,
    along,
    axis_form,
    contiguous_strides,
    each_of,
    leaves,
    real,
    real_axes,
    run_length,
    same_index,
    same_steps,
    stride_order,
)
from .canonical import Value
from .casts import as_one_cast, same_cast
from .contractions import Operand
from .reasons import Declined, Kind
from .terms import Term, scaled

STACK = "stack"  # a value that is in no graph yet: its args, stacked along a new first dimension


def join_sum(terms: Sequence[Term]) -> Term:
    """The sum of isomorphic terms: their sub-networks become an axis that is summed.

    A term that is added several times is a multiple of it.

    Raises:
        Declined: the terms differ in form, or the op would multiply by the same weights for each.
    """
    terms = _counted(terms)
    if len(terms) == 1:
        return terms[0]
    ordered = sorted(terms, key=_weight_offset)  # addition commutes: find the order of storage
    axis = Axis(len(terms))
    joined = _join(ordered, axis_form(axis))
    inner = [joined.gate.query, joined.gate.weight, joined.down, *joined.routers]
    inner += [] if joined.up is None else [joined.up.weight]
    if not real(leaves((axis,))) <= frozenset().union(*(real_axes(one.index) for one in inner)):
        detail = "sub-networks that share all of their weights"
        raise Declined(Kind.UNEQUAL_HEADS, detail, terms[0].value.origin)
    return replace(joined, sub_networks=(axis, *joined.sub_networks))


def _counted(terms: Sequence[Term]) -> list[Term]:
    """The terms, each of them once, times the number of times that it occurs."""
    kinds: dict[tuple[int, tuple[Any, ...]], list[list[Term]]] = {}
    for term in terms:
        place = id(term.down.value), tuple(form.offset for form in term.down.index)
        equal = kinds.setdefault(place, [])
        known = next((group for group in equal if _same_term(group[0], term)), None)
        if known is None:
            equal.append([term])
        else:
            known.append(term)
    groups = [group for equal in kinds.values() for group in equal]
    return [scaled(group[0], len(group)) if len(group) > 1 else group[0] for group in groups]


def _same_term(one: Term, other: Term) -> bool:
    """Whether two terms are the same formula of the same elements."""
    if _form(one) != _form(other):
        return False
    ours, theirs = one.operands(), _renamed(other, one).operands()
    return all(
        same_tensor(ours[role].value, theirs[role].value)
        and same_index(ours[role].index, theirs[role].index)
        for role in ours
    )


def join_pieces(terms: Sequence[Term], position: Affine) -> Term:
    """Terms that were concatenated: term ``i`` is read where ``position`` is ``i``."""
    return _join(terms, position)


def _join(terms: Sequence[Term], position: Affine) -> Term:
    first = terms[0]
    for other in terms[1:]:
        if _form(other) != _form(first):
            raise Declined(Kind.UNEQUAL_HEADS, _difference(first, other), other.value.origin)
    aligned = [first, *(_renamed(other, first) for other in terms[1:])]
    copies = [term.operands() for term in aligned]

    def over_all(role: str, _: Operand) -> Operand:
        return _join_operand([copy[role] for copy in copies], position)

    return first.mapped(over_all)


def _form(term: Term) -> tuple[Any, ...]:
    """The properties that must agree between terms before their operands are compared."""
    up = term.up
    return (
        term.activation,
        tuple(term.operands()),
        (term.gate.scale, term.gate.bias_scale, term.gate.value.dtype),
        None if up is None else (up.scale, up.bias_scale, up.value.dtype),
        (term.scale, term.bias_scale, term.value.dtype),
        None if term.residual is None else term.residual.scale,
        [[axis.size for axis in axes] for axes in _inner_axes(term)],
    )


def _difference(first: Term, other: Term) -> str:
    if first.activation != other.activation:
        return f"{first.activation} and {other.activation}"
    sizes = [[axis.size for axis in _inner_axes(term)[0]] for term in (first, other)]
    if sizes[0] != sizes[1]:
        return f"input widths {sizes[0]} and {sizes[1]}"
    sizes = [[axis.size for axis in _inner_axes(term)[2]] for term in (first, other)]
    if sizes[0] != sizes[1]:
        return f"hidden units {sizes[0]} and {sizes[1]}"
    if first.scale != other.scale:
        return f"factors {first.scale:g} and {other.scale:g}"
    ours, theirs = (set(term.operands()) for term in (first, other))
    return f"only some have a {', '.join(sorted(ours ^ theirs))}" if ours != theirs else ""


def _inner_axes(term: Term) -> list[tuple[Axis, ...]]:
    """The summed axes of a term, in an order that isomorphic terms share."""
    gate, up = term.gate, term.up
    return [
        in_reading_order(gate.contracted, gate.query.index),
        () if up is None else in_reading_order(up.contracted, up.query.index),
        in_reading_order(term.hidden, term.down.index),
        in_reading_order(term.sub_networks, term.down.index),
    ]


def in_reading_order(axes: Sequence[Axis], index: Index) -> tuple[Axis, ...]:
    """The axes, split as they are by now, outermost first as ``index`` reads them."""
    split = leaves(axes)
    order: list[Axis] = []
    for form in index:
        terms = [(axis, c) for axis, c in form.resolved().terms if axis in split]
        terms.sort(key=lambda term: stride_order(term[1]), reverse=True)
        order += [axis for axis, _ in terms]
    return tuple(dict.fromkeys((*order, *split)))


def _renamed(term: Term, like: Term) -> Term:
    """``term`` over the summed axes of ``like``."""
    mapping: dict[Axis, Axis] = {}
    for mine, theirs in zip(_inner_axes(term), _inner_axes(like), strict=True):
        mapping |= dict(zip(mine, theirs, strict=True))
    return term.mapped(lambda _, operand: renamed(operand, mapping))


def renamed(operand: Operand, mapping: dict[Axis, Axis]) -> Operand:
    """The operand read over other axes."""
    return Operand(operand.value, tuple(form.replaced(mapping) for form in operand.index))


def _weight_offset(term: Term) -> tuple[int, ...]:
    offsets = [form.offset for form in term.down.index]
    return tuple(o if isinstance(o, int) else 0 for o in offsets)


def _join_operand(copies: Sequence[Operand], position: Affine) -> Operand:
    first = copies[0]
    for other in copies[1:]:
        if not same_steps(first.index, other.index):
            raise Declined(Kind.UNEQUAL_HEADS, "they read differently", other.value.origin)
    if not all(same_tensor(copy.value, first.value) for copy in copies):
        return _of_one_cast(copies, position) or _stacked(copies, position)
    index = along([copy.index for copy in copies], position)
    if index is None:
        raise Declined(Kind.IRREGULAR_WEIGHTS, node=first.value.origin)
    return Operand(first.value, index)


def _of_one_cast(copies: Sequence[Operand], position: Affine) -> Operand | None:
    """Different tensors, if they are parts of one that are cast one by one."""
    parts = as_one_cast(copies)
    if parts is None:
        return None
    index = along([part.index for part in parts], position)
    return None if index is None else Operand(parts[0].value, index)


def same_tensor(a: Value, b: Value) -> bool:
    """One value, casts of one, or stacks of the same values."""
    if a.op == b.op == STACK and len(a.args) == len(b.args):
        return all(map(same_tensor, a.args, b.args))
    return a is b or same_cast(a, b)


def _stacked(copies: Sequence[Operand], position: Affine) -> Operand:
    """Different tensors, read alike: one tensor with a new first dimension."""
    values = [copy.value for copy in copies]
    times = run_length([id(value) for value in values])
    if 1 < times < len(values):  # the heads of a group share one
        whole = each_of(position, len(values), times)
        if whole is not None:
            values, position = values[::times], whole
    first = values[0]
    for copy in copies[1:]:
        if copy.value.shape != first.shape or copy.value.dtype != first.dtype:
            raise Declined(Kind.UNEQUAL_HEADS, "their tensors differ", copy.value.origin)
        if [f.offset for f in copy.index] != [f.offset for f in copies[0].index]:
            raise Declined(Kind.IRREGULAR_WEIGHTS, node=copy.value.origin)
    stack = Value(
        op=STACK,
        args=tuple(values),
        kwargs={},
        shape=(len(values), *first.shape),
        dtype=first.dtype,
        device=first.device,
        origin=max(values, key=lambda value: value.step).origin,
        step=max(value.step for value in values),
        requires_grad_mode=first.requires_grad_mode,
        strides=tuple(contiguous_strides((len(values), *first.shape))),
    )
    return Operand(stack, (position, *copies[0].index))
