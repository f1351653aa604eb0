"""The grammar of an MH-FFN, read from the output down.

``read_output`` takes a value and reads it as

    output   = view | cast | number * output | router * output | sum of outputs
             | pieces of (output [+ residual]) | sum over sub-networks of output | down
    down     = sum over hidden units of hidden * weight  [+ bias]     a contraction
    hidden   = act(gate) [* up] [* router]                            see meaning.py
    gate, up = sum over the head width of query * weight  [+ bias]    a contraction

Every step pushes the index that the output is read at one operation further back, so that what is
left at the leaves is each tensor with the index it is read at. Nothing here looks at names, shapes
or spellings; whether the leaves make an MH-FFN is for ``checks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from .axes import Axis, Index, Size, axis_form, multiply, product, through_reshape, within
from .canonical import COPY, OPAQUE, SCATTER, Value, written_range
from .contractions import Contraction, Operand, as_contraction, summed_index
from .meaning import POINTWISE, Line, number, plus, pointwise_arguments, read_hidden, times
from .parts import is_number
from .products import MATRIX_PRODUCTS
from .reasons import Declined, Kind
from .rolling import Projection, Residual, Term, join_pieces, join_sum
from .views import MERGES, behind_views, broadcast, is_view, piece_index, through_view

aten = torch.ops.aten

DROPOUT = frozenset(
    {aten.native_dropout.default, aten.bernoulli.p, aten.bernoulli.default, aten.bernoulli_.float}
)
#: activations that not every release of PyTorch tags as pointwise
_OTHER_ACTIVATIONS = frozenset(
    {
        aten.elu.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.log_sigmoid_forward.default,
        aten._prelu_kernel.default,
    }
)
_ZEROS = frozenset(
    {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.zero.default}
)
_FULLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
#: higher-order operations by which a graph gets another backward pass than its operations have
_OWN_BACKWARDS = ("autograd_function_apply", "register_hook")
_ADDITIONS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


@dataclass(frozen=True, slots=True)
class Reading:
    """What ``read_output`` found."""

    term: Term
    index: Index  # of the root, over the axes that the term uses
    computed: frozenset[Value]  # what the op would compute in place of the graph
    crossed: frozenset[Value]  # the views on the way to what it would read


def read_output(
    root: Value,
    outside: AbstractSet[Value],
    outputs: AbstractSet[Value] = frozenset(),
    is_held: Callable[[Value], bool] = lambda _: True,
) -> Reading:
    """Read ``root`` as the output of an MH-FFN.

    Args:
        root: the candidate.
        outside: the values between down projections and candidates; all others are leaves.
        outputs: the outputs of sites found before, which are leaves even where they are views.
        is_held: whether a node has a value; others cannot be candidates.

    Raises:
        Declined: the root cannot be read so.
    """
    if 0 in root.shape:
        raise Declined(Kind.UNSUPPORTED_PROBLEM, "its output is empty", root.origin)
    index = tuple(axis_form(Axis(size)) for size in root.shape)
    reader = _Reader(outside, outputs, is_held)
    term = reader.output(root, index)
    return Reading(term, index, frozenset(reader.computed), frozenset(reader.crossed))


def is_outside_operation(value: Value) -> bool:
    """Whether the grammar has a rule for ``value`` between the down projection and the output."""
    return (
        is_view(value)
        or value.op in _ADDITIONS
        or value.op in _PRODUCTS
        or value.op in MERGES
        or value.op in (aten.neg.default, aten._to_copy.default, SCATTER, COPY)
        or value.op in (aten.sum.dim_IntList, aten.mean.dim)
        or value.op in MATRIX_PRODUCTS
    )


def operation_name(value: Value) -> str:
    """The operation of a value, as a report names it."""
    return str(value.op).removeprefix("aten.").removesuffix(".default")


def is_other_pointwise(value: Value) -> bool:
    """A pointwise operation that ``meaning.py`` does not know."""
    tagged = torch.Tag.pointwise in getattr(value.op, "tags", ())
    return value.op not in POINTWISE and (tagged or value.op in _OTHER_ACTIVATIONS)


def is_cast(value: Value) -> bool:
    """A change of floating dtype and of nothing else."""
    if value.op is not aten._to_copy.default and value.op != COPY:
        return False
    source = value.source
    floating = value.dtype.is_floating_point and source.dtype.is_floating_point
    return floating and value.device == source.device and value.shape == source.shape


@dataclass(slots=True)
class _Reader:
    """One reading. ``computed`` collects the values that the op would compute itself."""

    outside: AbstractSet[Value]
    outputs: AbstractSet[Value]
    is_held: Callable[[Value], bool]
    computed: set[Value] = field(default_factory=set)
    crossed: set[Value] = field(default_factory=set)
    in_loop: bool = False  # whether one piece of an unrolled loop is read

    def leaf(self, value: Value, index: Index) -> Operand:
        return Operand(*behind_views(value, index, self.crossed, self.outputs))

    def output(self, value: Value, index: Index) -> Term:
        if value not in self.outside:
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        _check_bounds(value, index)
        step = through_view(value, index)
        if step is not None:
            self.crossed.add(value)
            return self.output(*step)
        self.computed.add(value)
        if is_cast(value):
            term = self.output(value.source, index)
            return term if value.dtype is value.source.dtype else _without_residual(term, value)
        if value.op in _ADDITIONS or self._accumulates(value, index) is not None:
            return self._sum(value, index)
        if value.op is aten.neg.default:
            return _scaled(self.output(value.source, index), -1.0)
        if value.op in _PRODUCTS:
            return self._product(value, index)
        if value.op in MERGES:
            return self._pieces(value, index)
        if value.op is SCATTER:
            return self._written(value, index)
        contraction = as_contraction(value, index)
        if contraction is not None:
            return self._contraction(contraction, index)
        if value.op is aten.sum.dim_IntList:
            inner, summed = summed_index(value, index)
            return _summed(self.output(value.source, inner), summed)
        if value.op is aten.mean.dim:
            inner, summed = summed_index(value, index)
            count = product(axis.size for axis in summed)
            if isinstance(count, int) and count:
                return _scaled(_summed(self.output(value.source, inner), summed), 1 / count)
        _check_subclass(value)
        raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)

    def _sum(self, value: Value, index: Index) -> Term:
        """A chain of additions: the terms of an unrolled loop, a bias, a residual.

        A residual is taken only where no candidate is without it: inside a loop over heads or
        ``vmap``, and in a sum over sub-networks that begins with it.
        """
        inside = self.outside - self.outputs
        terms: list[Term] = []
        narrow: list[Residual] = []  # biases, or residuals that are the same for some heads
        residuals: list[Residual] = []
        dtypes = {value.dtype}
        todo: list[tuple[float, Value, Index, Value]] = [(1.0, value, index, value)]
        while todo:
            sign, current, at, addition = todo.pop()
            inner, inner_at = current, at
            while inner in inside and (step := through_view(inner, inner_at)) is not None:
                self.crossed.add(inner)
                inner, inner_at = step
            biased = inner is not value and self._adds_bias(inner, inner_at)
            if inner in inside and inner.op in _ADDITIONS and not biased:
                self.computed.add(inner)
                dtypes.add(inner.dtype)
                alpha = inner.argument(2, "alpha", 1)
                if not is_number(alpha) or alpha == 0:
                    detail = f"scaled by {alpha}"
                    raise Declined(Kind.UNKNOWN_OPERATION, detail, inner.origin)
                weight = float(alpha) * _ADDITIONS[inner.op]
                left, right = inner.args[0], inner.args[1]
                for factor, operand in ((1.0, left), (weight, right)):
                    if not isinstance(operand, Value):
                        if operand == 0:
                            continue
                        raise Declined(Kind.UNKNOWN_OPERATION, "a number is added", inner.origin)
                    if not _is_zero(operand):
                        where = broadcast(inner_at, operand.shape)
                        todo.append((sign * factor, operand, where, inner))
            elif inner in inside and (product := self._accumulates(inner, inner_at)) is not None:
                assert product.bias is not None
                self.computed.add(inner)
                dtypes.add(inner.dtype)
                alone = replace(product, bias=None, bias_scale=1.0)
                terms.append(_scaled(self._contraction(alone, inner_at), sign))
                added = product.bias
                if not _is_zero(added.value):
                    todo.append((sign * product.bias_scale, added.value, added.index, inner))
            elif inner in inside:
                dtypes.add(inner.dtype)
                terms.append(_scaled(self.output(inner, inner_at), sign))
            else:
                leaf = self.leaf(inner, inner_at)
                whole = _axes(index) <= _axes(leaf.index)
                (residuals if whole else narrow).append(Residual(leaf, sign))
                if whole:
                    dtypes.add(inner.dtype)
                    allowed = self.in_loop or addition is not value or self._is_highest(value)
                    if not allowed or len(residuals) > 1 or len(dtypes) > 1:
                        detail = f"{operation_name(inner)} is added"
                        raise Declined(Kind.UNKNOWN_OPERATION, detail, value.origin)
        if not terms:
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        if len(terms) > 1 or narrow or residuals:
            terms = [_without_residual(term, value) for term in terms]
        term = join_sum(terms[::-1])
        for one in narrow:
            added = one.operand
            if residuals or not _adds_tokens(term, added) or not self._is_highest(value):
                term = _with_bias(term, added, one.scale, value)
            else:
                residuals.append(one)
                dtypes.add(added.value.dtype)
        if not residuals:
            return term
        if len(dtypes) > 1:
            raise Declined(Kind.UNKNOWN_OPERATION, "a residual of another dtype", value.origin)
        return replace(term, residual=residuals[0])

    def _is_highest(self, value: Value) -> bool:
        """Whether no candidate is without what is added: it is a product's, or no node has one."""
        inner = [operand for operand in value.operands if operand in self.outside]
        return value.op in MATRIX_PRODUCTS or not any(map(self.is_held, inner))

    def _accumulates(self, value: Value, index: Index) -> Contraction | None:
        """A product that is added to a sum, as ``addmm`` does: to outputs, zeros or a residual.

        What does not move along all axes of the output is the product's bias.
        """
        if value not in self.outside or value.op not in MATRIX_PRODUCTS:
            return None
        contraction = as_contraction(value, index)
        if contraction is None or contraction.bias is None:
            return None
        bias = contraction.bias
        source, at = behind_views(bias.value, bias.index, stops=self.outputs)
        whole = _is_zero(source) or source in self.outside
        if not whole and not source.is_parameter and len(bias.value.shape) == len(value.shape):
            whole = _axes(index) <= _axes(at)  # of one token a bias does, too
        return contraction if whole else None

    def _adds_bias(self, value: Value, index: Index) -> bool:
        """Whether an addition inside of a sum belongs to one term: a sub-network with its bias."""
        if value not in self.outside or value.op not in _ADDITIONS:
            return False
        for operand in value.operands:
            if operand not in self.outside and not _is_zero(operand):
                leaf = self.leaf(operand, broadcast(index, operand.shape))
                return not _axes(index) <= _axes(leaf.index)
        return False

    def _product(self, value: Value, index: Index) -> Term:
        """A number or a router times an output."""
        left, right = value.args[:2]
        if isinstance(right, (int, float)):
            divides = value.op in (aten.div.Tensor, aten.div.Scalar)
            if right == 0 or not math.isfinite(right) or math.isinf(1 / right):
                raise Declined(Kind.UNKNOWN_OPERATION, f"scaled by {right}", value.origin)
            return _scaled(self.output(left, index), 1.0 / right if divides else float(right))
        both = isinstance(left, Value) and isinstance(right, Value)
        if value.op is not aten.mul.Tensor or not both:
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        if left not in self.outside or right in self.outside:
            left, right = right, left
        router = self.leaf(right, broadcast(index, right.shape))
        if _axes(index) <= _axes(router.index):
            raise Declined(Kind.UNKNOWN_OPERATION, "multiplied elementwise", value.origin)
        term = _without_residual(self.output(left, broadcast(index, left.shape)), value)
        return replace(term, routers=(*term.routers, router))

    def _pieces(self, value: Value, index: Index) -> Term:
        """Outputs that are concatenated or stacked: an unrolled loop over heads."""
        pieces: Sequence[Value] = value.args[0]
        dim = value.argument(1, "dim", 0) % len(value.shape)
        widths = {piece.shape[dim] for piece in pieces} if value.op is aten.cat.default else {1}
        if len(widths) > 1:
            sizes = ", ".join(str(piece.shape[dim]) for piece in pieces)
            detail = f"outputs of different sizes are concatenated: {sizes}"
            raise Declined(Kind.UNEQUAL_HEADS, detail, value.origin)
        read = piece_index(value, index, dim)
        if read is None:
            raise Declined(Kind.UNSUPPORTED_LAYOUT, node=value.origin)
        position, inner = read
        if not position.resolved().terms and isinstance(position.offset, int):
            return self._iteration(pieces[position.offset], inner)
        return join_pieces([self._iteration(piece, inner) for piece in pieces], position)

    def _iteration(self, value: Value, index: Index) -> Term:
        """One piece of an unrolled loop."""
        if value not in self.outside:
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        around, self.in_loop = self.in_loop, True
        try:
            return self.output(value, index)
        except Declined as declined:
            reason = declined.reason
            if reason.kind is not Kind.UNKNOWN_OPERATION:
                raise
            raise Declined(Kind.OPERATION_IN_LOOP, reason.detail, reason.node) from None
        finally:
            self.in_loop = around

    def _written(self, value: Value, index: Index) -> Term:
        """A buffer that is filled part by part: pieces along the written dimension."""
        parts: dict[int, Value] = {}
        widths: set[Size] = set()
        dim: int | None = None
        base = value
        while base.op is SCATTER:
            old, part = base.args
            written = written_range(base)
            if written is None:
                raise Declined(Kind.UNKNOWN_OPERATION, "a part of a tensor is written", base.origin)
            if dim not in (None, written.dim):
                raise Declined(Kind.UNKNOWN_OPERATION, "parts of two dimensions", base.origin)
            dim = written.dim
            widths.add(written.width)
            if written.place is None:
                raise Declined(Kind.UNKNOWN_OPERATION, "an uneven part is written", base.origin)
            parts.setdefault(written.place, part)
            self.computed.add(base)
            base = old
        assert dim is not None
        size = value.shape[dim]
        count = len(parts)
        tiled = len(widths) == 1 and multiply(count, *widths) == size
        if not tiled or sorted(parts) != list(range(count)):
            raise Declined(Kind.UNEQUAL_HEADS, "the buffer is not filled evenly", value.origin)
        digits = through_reshape((index[dim],), (size,), (count, *widths))
        if digits is None:
            raise Declined(Kind.UNSUPPORTED_LAYOUT, node=value.origin)
        form, rest = digits
        terms = []
        for position in range(count):
            part = parts[position]
            inner = (*index[:dim], rest, *index[dim + 1 :])
            if len(part.shape) < len(value.shape):  # written through select
                inner = (*index[:dim], *index[dim + 1 :])
            terms.append(self._iteration(part, broadcast(inner, part.shape)))
        return join_pieces(terms, form)

    def _contraction(self, contraction: Contraction, index: Index) -> Term:
        """The down projection, or a router that is applied and summed by a matmul."""
        if contraction.product is not None:
            self.computed.add(contraction.product)
            self.crossed |= contraction.crossed
        sides = (contraction.left, contraction.right), (contraction.right, contraction.left)
        reasons: list[Declined] = []
        for hidden, weight in sides:
            if behind_views(weight.value, weight.index)[0] in self.outside:
                continue
            try:
                return self._down(contraction, hidden, weight)
            except Declined as declined:
                reasons.append(declined)
        for output, router in sides:
            if output.value in self.outside:
                return self._routed(contraction, output, router, index)
        raise min(reasons, key=lambda d: d.reason.kind is Kind.NOT_A_PRODUCT)

    def _routed(
        self, contraction: Contraction, output: Operand, router: Operand, index: Index
    ) -> Term:
        if not _axes(index) & _axes(router.index) <= _axes(output.index):
            value = contraction.value
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        term = self.output(output.value, output.index)
        term = _without_residual(term, contraction.value)
        term = replace(term, routers=(*term.routers, self.leaf(router.value, router.index)))
        return _summed(_scaled(term, contraction.scale), contraction.summed)

    def _down(self, contraction: Contraction, hidden: Operand, weight: Operand) -> Term:
        weight, factors = self._without_factors(weight, _axes(hidden.index))
        units = _Hidden(_axes(hidden.index), frozenset(contraction.summed), self.outputs)
        expression = units.expression(hidden.value, hidden.index)
        if not units.projections:
            raise Declined(Kind.NOT_A_PRODUCT, node=contraction.value.origin)
        try:
            meaning = read_hidden(expression, hidden.value.dtype)
        except Declined as declined:
            reason = declined.reason
            raise Declined(reason.kind, reason.detail, hidden.value.origin) from None
        if hidden.value.dtype is torch.float16:
            meaning = meaning.scaled_inside()
        term = Term(
            activation=meaning.activation,
            gate=units.projection(meaning.gate),
            up=None if meaning.up is None else units.projection(meaning.up),
            down=self.leaf(weight.value, weight.index),
            bias=None,
            bias_scale=1.0,
            routers=(*(units.leaf(symbol) for symbol in meaning.factors), *factors),
            hidden=contraction.summed,
            sub_networks=(),
            scale=meaning.scale * contraction.scale,
            value=contraction.value,
        )
        if contraction.bias is not None:
            bias = self.leaf(contraction.bias.value, contraction.bias.index)
            term = _with_bias(term, bias, contraction.bias_scale, contraction.value)
        self.computed |= units.computed
        self.crossed |= units.crossed
        return term

    def _without_factors(
        self, weight: Operand, hidden: frozenset[Axis]
    ) -> tuple[Operand, list[Operand]]:
        """The weight without the factors that depend on the token: they are routers.

        An einsum of router, weight and hidden units multiplies the first two of them first.
        """
        factors: list[Operand] = []
        while True:
            value, index = behind_views(weight.value, weight.index, self.crossed, self.outputs)
            outer = as_contraction(value, index)
            if value.op is aten.mul.Tensor and len(value.operands) == 2:
                left, right = (Operand(v, broadcast(index, v.shape)) for v in value.args)
            elif outer is not None and outer.is_product and outer.bias is None and outer.scale == 1:
                left, right = outer.left, outer.right
            else:
                return weight, factors
            if _axes(left.index) <= hidden:
                left, right = right, left
            router, rest = _axes(right.index), _axes(left.index)
            if not router <= hidden or rest <= hidden or router <= rest:
                return weight, factors
            self.computed.add(value)
            weight = left
            factors.append(self.leaf(right.value, right.index))


@dataclass(slots=True)
class _Hidden:
    """Reads the hidden units as an expression over projections (p0, p1) and leaves (l0, l1)."""

    axes: frozenset[Axis]  # of the hidden units; what lacks one of them is a leaf
    summed: frozenset[Axis]
    outputs: AbstractSet[Value]
    computed: set[Value] = field(default_factory=set)
    crossed: set[Value] = field(default_factory=set)
    projections: list[Contraction] = field(default_factory=list)
    reads: list[Operand] = field(default_factory=list)  # where each projection is read
    leaves: list[Operand] = field(default_factory=list)
    known: dict[Value, list[tuple[Index, sympy.Expr]]] = field(default_factory=dict)

    def expression(self, value: Value, index: Index) -> sympy.Expr:
        _check_bounds(value, index)
        value, index = behind_views(value, index, self.crossed)
        for known_index, expression in self.known.get(value, ()):
            if _same_index(known_index, index):
                return expression
        expression = self._read(value, index)
        self.known.setdefault(value, []).append((index, expression))
        return expression

    def _read(self, value: Value, index: Index) -> sympy.Expr:
        if not _real(self.axes) <= _axes(index):
            return self._leaf(value, index)
        if value.op in POINTWISE and (value.op is not aten._to_copy.default or is_cast(value)):
            self.computed.add(value)
            arguments: list[Any] = []
            for argument in pointwise_arguments(value):
                if isinstance(argument, Value):
                    where = broadcast(index, argument.shape)
                    arguments.append(self.expression(argument, where))
                else:
                    arguments.append(number(argument))
            return POINTWISE[value.op](value, *arguments)
        if value.op is aten.glu.default:
            return self._glu(value, index)
        piece = _one_piece(value, index)
        if piece is not None:
            self.computed.add(value)
            return self.expression(*piece)
        contraction = as_contraction(value, index)
        if contraction is None:
            if value.op in DROPOUT:
                raise Declined(Kind.DROPOUT_INSIDE, node=value.origin)
            if value.op is aten.detach.default:
                raise Declined(Kind.GRADIENTS_CUT, "detach", value.origin)
            if is_other_pointwise(value):
                raise Declined(Kind.UNKNOWN_ACTIVATION, operation_name(value), value.origin)
            if value.op is SCATTER:
                raise Declined(Kind.UNKNOWN_OPERATION, "a part is overwritten", value.origin)
            _check_subclass(value)
            if value.op == OPAQUE:
                name = str(value.origin.target)
                kind = Kind.OWN_BACKWARD if name in _OWN_BACKWARDS else Kind.UNKNOWN_OPERATION
                raise Declined(kind, name, value.origin)
            if not isinstance(value.op, str):
                raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
            return self._leaf(value, index)
        self.computed.add(value)
        if contraction.product is not None:
            self.computed.add(contraction.product)
            self.crossed |= contraction.crossed
        if contraction.is_product:
            left, right = contraction.left, contraction.right
            factor = self.expression(left.value, left.index)
            return times(factor, self.expression(right.value, right.index))
        self.projections.append(contraction)
        self.reads.append(Operand(value, index))
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
        self.leaves.append(Operand(value, index))
        return sympy.Symbol(f"l{len(self.leaves) - 1}")

    def operand(self, read: Operand) -> Operand:
        return Operand(*behind_views(read.value, read.index, self.crossed, self.outputs))

    def leaf(self, symbol: sympy.Symbol) -> Operand:
        return self.leaves[int(symbol.name[1:])]

    def projection(self, line: Line) -> Projection:
        contraction = self.projections[int(line.projection.name[1:])]
        left, right = contraction.left, contraction.right
        hidden = _leaves_of(self.summed)
        query, weight = (left, right) if _axes(right.index) & hidden else (right, left)
        return Projection(
            query=self.operand(query),
            weight=self.operand(weight),
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
    pieces: Sequence[Value] = value.args[0]
    piece = pieces[read[0].offset]
    return (piece, read[1]) if piece.dtype is value.dtype else None


def _scaled(term: Term, factor: float) -> Term:
    residual = term.residual
    if residual is not None:
        residual = replace(residual, scale=residual.scale * factor)
    scale = term.scale * factor
    # Outside of these, float32 rounds to zero or to infinity.
    if not (_SMALLEST <= abs(scale) <= _LARGEST or term.value.dtype is torch.float64):
        raise Declined(Kind.UNKNOWN_OPERATION, f"scaled by {scale}", term.value.origin)
    return replace(term, scale=scale, residual=residual)


def _without_residual(term: Term, at: Value) -> Term:
    """A residual is added last: no router scales it, no sum goes over it, no cast follows it."""
    if term.residual is not None:
        detail = "a residual is part of what is scaled, summed or cast"
        raise Declined(Kind.UNKNOWN_OPERATION, detail, at.origin)
    return term


def _summed(term: Term, axes: tuple[Axis, ...]) -> Term:
    term = _without_residual(term, term.value)
    if term.bias is not None and any(
        not _leaves_of({axis}) & _axes(term.bias.index) and axis.size != 1 for axis in axes
    ):
        bias_axes = _axes(term.bias.index)
        router_axes = frozenset().union(*(_axes(router.index) for router in term.routers))
        if not all(_leaves_of({axis}) <= bias_axes | router_axes for axis in axes):
            raise Declined(Kind.UNSUPPORTED_LAYOUT, "a bias is summed", term.value.origin)
    return replace(term, sub_networks=(*term.sub_networks, *axes))


def _adds_tokens(term: Term, added: Operand) -> bool:
    """Whether what is added is no bias but made of tokens."""
    weights = _axes(term.gate.weight.index) | _axes(term.down.index)
    return bool(_axes(added.index) & _axes(term.gate.query.index) - weights)


def _with_bias(term: Term, bias: Operand, scale: float, at: Value) -> Term:
    """Add a bias; it must be inside of everything that routers and sums have done to the term."""
    weights = _axes(term.gate.weight.index) | _axes(term.down.index)
    if (
        term.bias is not None
        or term.routers
        or term.sub_networks
        or not _axes(bias.index) <= weights
    ):
        raise Declined(Kind.UNKNOWN_OPERATION, "a tensor is added to the output", at.origin)
    return replace(term, bias=bias, bias_scale=scale / term.scale)


def _check_subclass(value: Value) -> None:
    if value.subclass:
        raise Declined(Kind.TENSOR_SUBCLASS, value.subclass, value.origin)


def _check_bounds(value: Value, index: Index) -> None:
    """Nothing is read beyond a value: that would be some other tensor's element."""
    if not all(within(form, size) for form, size in zip(index, value.shape, strict=True)):
        raise Declined(Kind.UNEQUAL_HEADS, "a part is smaller than its place", value.origin)


def _is_zero(value: Value) -> bool:
    while is_view(value) or is_cast(value) or value.op is aten.detach.default:
        value = value.source
    if value.op in _ZEROS:
        return True
    return value.op in _FULLS and value.args[_FULLS[value.op]] == 0


def _same_index(a: Index, b: Index) -> bool:
    return len(a) == len(b) and all(
        x.offset == y.offset and frozenset(x.resolved().terms) == frozenset(y.resolved().terms)
        for x, y in zip(a, b, strict=True)
    )


def _axes(index: Index) -> frozenset[Axis]:
    """The axes, as split by now, that an index moves along."""
    return frozenset(axis for form in index for axis in form.axes() if axis.size != 1)


def _real(axes: AbstractSet[Axis]) -> frozenset[Axis]:
    return frozenset(leaf for leaf in _leaves_of(axes) if leaf.size != 1)


def _leaves_of(axes: AbstractSet[Axis]) -> frozenset[Axis]:
    return frozenset(leaf for axis in axes for leaf in axis.leaves())
