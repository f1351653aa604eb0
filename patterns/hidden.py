"""The hidden units, read as an expression: ``act(gate) * up * factors``.

    silu(q @ k.T + b) * (q @ u.T)     reads as     (p0 + l0) * sigmoid(p0 + l0) * p1

with a symbol for each projection (p0, p1) and one for each other tensor (l0). ``meaning.py`` says
what activation, scales and factors the expression stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import sympy
import torch

from .axes import Axis, Index, leaves, real, real_axes, same_index, within
from .canonical import OPAQUE, SCATTER, Value
from .casts import above_views, repetition, uncast
from .contractions import Contraction, Operand, as_contraction
from .meaning import POINTWISE, Line, number, plus, pointwise_arguments, times
from .operations import DROPOUT, is_cast, is_other_pointwise, operation_name
from .reasons import Declined, Kind
from .terms import Projection
from .views import MERGES, broadcast, piece_index, pieces_of, stages_of, through_views

aten = torch.ops.aten

#: higher-order operations by which a graph gets another backward pass than its operations have
_OWN_BACKWARDS = ("autograd_function_apply", "register_hook")


@dataclass(slots=True)
class HiddenReader:
    """Reads the hidden units as an expression over projections (p0, p1) and leaves (l0, l1)."""

    axes: frozenset[Axis]  # of the hidden units; what lacks one of them is a leaf
    summed: frozenset[Axis]
    outputs: AbstractSet[Value]
    is_held: Callable[[Value], bool]  # whether a node has a value
    without_dropout: bool = False  # whether they are read as if none were dropped
    in_loop: bool = False  # whether one piece of an unrolled loop is read
    repeated: AbstractSet[Value] = frozenset()  # tensors that queries are read from as they stand
    outer: Sequence[Axis] = ()  # of the output
    repetitions: set[Value] = field(default_factory=set)  # of queries, along those or their width
    computed: set[Value] = field(default_factory=set)
    crossed: set[Value] = field(default_factory=set)
    projections: list[Contraction] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)  # by leaf
    known: dict[Value, list[tuple[Index, sympy.Expr]]] = field(default_factory=dict)

    def expression(self, value: Value, index: Index) -> sympy.Expr:
        """What the value is at the index, over the symbols of projections and leaves.

        Raises:
            Declined: an operation in it is not known.
        """
        check_bounds(value, index)
        value, index = through_views(value, index, self.crossed)
        for known_index, expression in self.known.get(value, ()):
            if same_index(known_index, index):
                return expression
        expression = self._read(value, index)
        self.known.setdefault(value, []).append((index, expression))
        return expression

    def _read(self, value: Value, index: Index) -> sympy.Expr:
        if not real(leaves(self.axes)) <= real_axes(index):
            return self._leaf(value, index)
        if value.op in POINTWISE and (value.op is not aten._to_copy.default or is_cast(value)):
            return self._pointwise(value, index)
        if value.op is aten.glu.default:
            return self._glu(value, index)
        if self.without_dropout and value.op in DROPOUT:
            # Where dropout is no operation of its own, units are multiplied by what is drawn.
            whole = value.op is aten.native_dropout.default
            return self.expression(value.operands[0], index) if whole else number(1)
        piece = _one_piece(value, index)
        if piece is not None:
            self.computed |= {value, *stages_of(value)}
            return self.expression(*piece)
        contraction = as_contraction(value, index)
        if contraction is None:
            reason = _reason_against(value)
            if reason is not None:
                raise reason
            return self._leaf(value, index)
        return self._contraction(contraction, index)

    def _pointwise(self, value: Value, index: Index) -> sympy.Expr:
        self.computed.add(value)
        arguments = [
            self.expression(argument, broadcast(index, argument.shape))
            if isinstance(argument, Value)
            else number(argument)
            for argument in pointwise_arguments(value)
        ]
        return POINTWISE[value.op](value, *arguments)

    def _contraction(self, contraction: Contraction, index: Index) -> sympy.Expr:
        """A product that sums nothing is one; any other is a projection of its own."""
        self.computed.add(contraction.value)
        if contraction.product is not None:
            self.computed.add(contraction.product)
            self.crossed |= contraction.crossed
        if contraction.is_product:
            left, right = contraction.left, contraction.right
            factor = self.expression(left.value, left.index)
            return times(factor, self.expression(right.value, right.index))
        self.projections.append(contraction)
        symbol: sympy.Expr = sympy.Symbol(f"p{len(self.projections) - 1}")
        if contraction.scale != 1:
            symbol = times(number(contraction.scale), symbol)
        if contraction.bias is not None:
            bias = self.expression(contraction.bias.value, contraction.bias.index)
            symbol = plus(symbol, times(number(contraction.bias_scale), bias))
        return symbol

    def _glu(self, value: Value, index: Index) -> sympy.Expr:
        """``first * sigmoid(second)`` for the halves of one dimension."""
        self.computed.add(value)
        dim = value.argument(1, "dim", -1) % len(index)
        second = list(index)
        second[dim] = index[dim].shifted(value.shape[dim])
        gate = POINTWISE[aten.sigmoid.default](value, self.expression(value.source, tuple(second)))
        return times(self.expression(value.source, index), gate)

    def _leaf(self, value: Value, index: Index) -> sympy.Expr:
        self.operands.append(Operand(value, index))
        return sympy.Symbol(f"l{len(self.operands) - 1}")

    def _through_views(self, read: Operand, stops: AbstractSet[Value]) -> Operand:
        found = Operand(*through_views(read.value, read.index, self.crossed, stops))
        return above_views(found, self.is_held, stops)

    def leaf(self, symbol: sympy.Symbol) -> Operand:
        """The tensor that a symbol of ``expression`` stands for."""
        return self.operands[int(symbol.name[1:])]

    def projection(self, line: Line) -> Projection:
        """Gate or up, as a product of query and weight with its scale and bias."""
        contraction = self.projections[int(line.projection.name[1:])]
        left, right = contraction.left, contraction.right
        hidden = frozenset(leaves(self.summed))
        both = left, right
        of_weights = [bool(real_axes(one.index) & hidden) for one in both]
        if not any(of_weights):  # nothing moves along a single unit
            of_weights = [uncast(one.value).is_parameter for one in both]
        query, weight = (right, left) if of_weights == [True, False] else both
        along = {*self.outer, *contraction.summed}
        repeated = repetition(query, along, in_loop=self.in_loop, stops=self.outputs)
        if repeated is not None:
            self.repetitions.add(repeated)
        return Projection(
            query=self._through_views(query, self.outputs | self.repeated),
            weight=self._through_views(weight, self.outputs),
            contracted=contraction.summed,
            scale=line.scale,
            bias=None if line.bias is None else self.leaf(line.bias),
            bias_scale=line.bias_scale,
            value=contraction.value,
        )


def _one_piece(value: Value, index: Index) -> tuple[Value, Index] | None:
    """The one of merged tensors that an index reads: gate or up, where they were merged."""
    if value.op not in MERGES:
        return None
    read = piece_index(value, index, value.argument(1, "dim", 0) % len(value.shape))
    if read is None or read[0].resolved().terms or not isinstance(read[0].offset, int):
        return None
    piece = pieces_of(value)[read[0].offset]
    return (piece, read[1]) if piece.dtype is value.dtype else None


def _reason_against(value: Value) -> Declined | None:
    """Why a value that moves along all hidden units is no leaf; None for an input."""
    if value.op in DROPOUT:
        return Declined(Kind.DROPOUT_INSIDE, node=value.origin)
    if value.op is aten.detach.default:
        return Declined(Kind.GRADIENTS_CUT, "detach", value.origin)
    if is_other_pointwise(value):
        return Declined(Kind.UNKNOWN_ACTIVATION, operation_name(value), value.origin)
    if value.op is SCATTER:
        return Declined(Kind.UNKNOWN_OPERATION, "a part is overwritten", value.origin)
    check_subclass(value)
    if value.op == OPAQUE:
        name = operation_name(value)
        kind = Kind.OWN_BACKWARD if name in _OWN_BACKWARDS else Kind.UNKNOWN_OPERATION
        return Declined(kind, name, value.origin)
    if not isinstance(value.op, str):
        return Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
    return None


def check_subclass(value: Value) -> None:
    """The value was not made of a tensor subclass, which does something else in every operation."""
    if value.subclass:
        raise Declined(Kind.TENSOR_SUBCLASS, value.subclass, value.origin)


def check_bounds(value: Value, index: Index) -> None:
    """Nothing is read beyond a value: that would be some other tensor's element."""
    for form, size in zip(index, value.shape, strict=True):
        if within(form, size):
            continue
        sizes = [size, *(axis.size for axis in form.axes())]
        if not all(isinstance(one, int) for one in sizes):
            detail = f"a dimension of {size} is read by another size that is dynamic"
            raise Declined(Kind.UNSUPPORTED_PROBLEM, detail, value.origin)
        raise Declined(Kind.UNEQUAL_HEADS, "a part is smaller than its place", value.origin)
