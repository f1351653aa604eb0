"""The grammar of an MH-FFN, read from the output down.

``read_output`` takes a value and reads it as

    output   = view | cast | number * output | router * output | sum of outputs
             | pieces of (output [+ residual]) | sum over sub-networks of output | down
    down     = sum over hidden units of hidden * weight  [+ bias]     a contraction
    hidden   = act(gate) [* up] [* router]                            see hidden.py
    gate, up = sum over the head width of query * weight  [+ bias]    a contraction

Every step pushes the index that the output is read at one operation further back, so that what is
left at the leaves is each tensor with the index it is read at. Nothing here looks at names, shapes
or spellings; whether the leaves make an MH-FFN is for ``checks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch

from .axes import (
    Axis,
    Index,
    Size,
    axis_form,
    multiply,
    paired,
    product,
    real_axes,
    same_index,
    through_reshape,
)
from .canonical import COPY, INPUT, SCATTER, Value, written_range
from .casts import above_views, through_casts, uncast
from .contractions import Contraction, Operand, as_contraction, summed_index
from .hidden import HiddenReader, check_bounds, check_subclass
from .meaning import read_hidden
from .operations import REDUCTIONS, is_cast, is_zero, operation_name
from .parts import is_number
from .products import MATRIX_PRODUCTS
from .reasons import Declined, Kind, Reason
from .rolling import in_reading_order, join_pieces, join_sum, renamed
from .terms import (
    Projection,
    Residual,
    Term,
    adds_tokens,
    may_be_bias,
    scaled,
    summed,
    with_bias,
    without_residual,
)
from .views import (
    MERGES,
    broadcast,
    is_view,
    piece_index,
    pieces_of,
    stages_of,
    through_view,
    through_views,
)

aten = torch.ops.aten

_ADDITIONS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
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
    *,
    without_dropout: bool = False,
    repeated: AbstractSet[Value] = frozenset(),
    repetitions: set[Value] | None = None,
) -> Reading:
    """Read ``root`` as the output of an MH-FFN.

    Args:
        root: the candidate.
        outside: the values between down projections and candidates; all others are leaves.
        outputs: the outputs of sites found before, which are leaves even where they are views.
        is_held: whether a node has a value; others cannot be candidates.
        without_dropout: read hidden units as if none were dropped, which tells what kind of network
            it is. No site may be made of that.
        repeated: tensors in which queries are repeated, and are read as they stand.
        repetitions: is given all such tensors that are found, even if the root cannot be read.

    Raises:
        Declined: the root cannot be read so.
    """
    if 0 in root.shape:
        raise Declined(Kind.UNSUPPORTED_PROBLEM, "its output is empty", root.origin)
    index = tuple(axis_form(Axis(size)) for size in root.shape)
    outer = tuple(axis for form in index for axis in form.axes())
    found = set() if repetitions is None else repetitions
    reader = _Reader(outside, outputs, is_held, without_dropout, outer, repeated, found)
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


@dataclass(slots=True)
class _Reader:
    """One reading. ``computed`` collects the values that the op would compute itself."""

    outside: AbstractSet[Value]
    outputs: AbstractSet[Value]
    is_held: Callable[[Value], bool]
    without_dropout: bool
    outer: Sequence[Axis]  # of the root
    repeated: AbstractSet[Value]
    repetitions: set[Value]
    computed: set[Value] = field(default_factory=set)
    crossed: set[Value] = field(default_factory=set)
    in_loop: bool = False  # whether one piece of an unrolled loop is read

    def leaf(self, value: Value, index: Index) -> Operand:
        found = Operand(*through_views(value, index, self.crossed, self.outputs))
        return above_views(found, self.is_held, self.outputs)

    def output(self, value: Value, index: Index) -> Term:
        """The value as a term, read at an index.

        Raises:
            Declined: no rule of the grammar holds for it.
        """
        if value not in self.outside:
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        check_bounds(value, index)
        step = through_view(value, index)
        if step is not None:
            self.crossed.add(value)
            return self.output(*step)
        self.computed.add(value)
        if is_cast(value):
            term = self.output(value.source, index)
            return term if value.dtype is value.source.dtype else without_residual(term, value)
        if value.op in _ADDITIONS or self.accumulated(value, index) is not None:
            return _Sum(self, value, index).term()
        if value.op is aten.neg.default:
            return scaled(self.output(value.source, index), -1.0)
        if value.op in _PRODUCTS:
            return self._product(value, index)
        if value.op in MERGES:
            return self._pieces(value, index)
        if value.op is SCATTER:
            return self._written(value, index)
        contraction = as_contraction(value, index)
        if contraction is not None:
            return self.contraction(contraction, index)
        return self._reduction(value, index)

    def _reduction(self, value: Value, index: Index) -> Term:
        """The sum or the mean over sub-networks."""
        if value.op in (aten.sum.dim_IntList, aten.mean.dim):
            inner, axes = summed_index(value, index)
            count = product(axis.size for axis in axes) if value.op is aten.mean.dim else 1
            if isinstance(count, int) and count:
                term = summed(self.output(value.source, inner), axes)
                return term if count == 1 else scaled(term, 1 / count)
        check_subclass(value)
        raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)

    def is_highest(self, value: Value) -> bool:
        """Whether no candidate is without what is added: it is a product's, or no node has one."""
        inner = [operand for operand in value.operands if operand in self.outside]
        return value.op in MATRIX_PRODUCTS or not any(map(self.is_held, inner))

    def accumulated(self, value: Value, index: Index) -> Contraction | None:
        """A product that is added to a sum, as ``addmm`` does: to outputs, zeros or a residual.

        What does not move along all axes of the output is the product's bias.
        """
        contraction = as_contraction(value, index)
        if contraction is None or contraction.bias is None:
            return None
        bias = contraction.bias
        source, at = through_views(bias.value, bias.index, stops=self.outputs)
        if is_zero(source):
            return contraction
        if len(bias.value.shape) != len(value.shape):
            return None  # of one token a bias moves along all axes, too
        return contraction if real_axes(index) <= real_axes(at) else None

    def adds_bias(self, value: Value, index: Index) -> bool:
        """Whether an addition inside of a sum belongs to one term: a sub-network with its bias."""
        for operand in value.operands:
            if operand not in self.outside and not is_zero(operand):
                leaf = self.leaf(operand, broadcast(index, operand.shape))
                if not real_axes(index) <= real_axes(leaf.index):
                    return True
                return _may_be_weight(leaf.value) and self._is_biased(value, index, leaf)
        return False

    def _is_biased(self, value: Value, index: Index, leaf: Operand) -> bool:
        """Whether what is added to an output could be its bias: always so where there is one token.

        Read twice, but only for weights that move along all axes of the output.
        """
        other = next(operand for operand in value.operands if operand in self.outside)
        try:
            term = self.output(other, broadcast(index, other.shape))
        except Declined:
            return False
        return may_be_bias(term, leaf) and _is_apart(leaf.value, term)

    def _product(self, value: Value, index: Index) -> Term:
        """A number or a router times an output."""
        left, right = value.args[:2]
        if isinstance(right, (int, float)):
            divides = value.op in (aten.div.Tensor, aten.div.Scalar)
            if right == 0:
                raise Declined(Kind.UNKNOWN_OPERATION, f"scaled by {right}", value.origin)
            return scaled(self.output(left, index), 1.0 / right if divides else float(right))
        if not isinstance(right, Value):
            raise Declined(Kind.VARYING_NUMBER, node=value.origin)
        if value.op is not aten.mul.Tensor:
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        # The router may be the output of a network, too: it is the one that lacks an axis.
        moves = real_axes(index) <= real_axes(broadcast(index, right.shape))
        if left not in self.outside or (right in self.outside and moves):
            left, right = right, left
        router = self.leaf(right, broadcast(index, right.shape))
        if real_axes(index) <= real_axes(router.index):
            raise Declined(Kind.UNKNOWN_OPERATION, "multiplied elementwise", value.origin)
        term = without_residual(self.output(left, broadcast(index, left.shape)), value)
        return replace(term, routers=(*term.routers, router))

    def _pieces(self, value: Value, index: Index) -> Term:
        """Outputs that are concatenated or stacked: an unrolled loop over heads."""
        pieces = pieces_of(value)
        dim = value.argument(1, "dim", 0) % len(value.shape)
        alike = all(len(piece.shape) == len(value.shape) for piece in pieces)
        widths = [piece.shape[dim] for piece in pieces] if alike else []
        if len(set(widths)) > 1:
            cats = [piece for piece in pieces if piece.op is aten.cat.default]
            if any(cat.requires_grad_mode is not value.requires_grad_mode for cat in cats):
                detail = "heads are merged in two steps, one of which records gradients"
                raise Declined(Kind.GRADIENTS_CUT, detail, value.origin)
            sizes = ", ".join(map(str, widths))
            detail = f"outputs of different sizes are concatenated: {sizes}"
            raise Declined(Kind.UNEQUAL_HEADS, detail, value.origin)
        read = piece_index(value, index, dim)
        if read is None:
            raise Declined(Kind.UNSUPPORTED_LAYOUT, node=value.origin)
        position, inner = read
        self.computed |= stages_of(value)
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
        if not tiled:
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

    def contraction(self, contraction: Contraction, index: Index) -> Term:
        """The down projection, or a router that is applied and summed by a matmul."""
        if contraction.product is not None:
            self.computed.add(contraction.product)
            self.crossed |= contraction.crossed
        sides = (contraction.left, contraction.right), (contraction.right, contraction.left)
        reasons: list[Declined] = []
        for hidden, weight in sides:
            if through_views(weight.value, weight.index)[0] in self.outside:
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
        if not real_axes(index) & real_axes(router.index) <= real_axes(output.index):
            value = contraction.value
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)
        term = self.output(output.value, output.index)
        term = without_residual(term, contraction.value)
        term = replace(term, routers=(*term.routers, self.leaf(router.value, router.index)))
        return summed(scaled(term, contraction.scale), contraction.summed)

    def _down(self, contraction: Contraction, hidden: Operand, weight: Operand) -> Term:
        weight, factors = self._without_factors(weight, real_axes(hidden.index))
        units = HiddenReader(
            real_axes(hidden.index),
            frozenset(contraction.summed),
            self.outputs,
            self.is_held,
            self.without_dropout,
            in_loop=self.in_loop,
            repeated=self.repeated,
            outer=self.outer,
            repetitions=self.repetitions,
        )
        expression = units.expression(hidden.value, hidden.index)
        if not units.projections:
            raise _without_projection(contraction, units)
        try:
            meaning = read_hidden(expression, hidden.value.dtype)
        except Declined as declined:
            raise _at_the_hidden_units(declined.reason, hidden, units) from None
        if hidden.value.dtype is torch.float16:
            meaning = meaning.scaled_inside()
        gate = units.projection(meaning.gate)
        up = None if meaning.up is None else units.projection(meaning.up)
        term = Term(
            activation=meaning.activation,
            gate=gate,
            up=None if up is None else _with_query_of(gate, up),
            down=self.leaf(weight.value, weight.index),
            bias=None,
            bias_scale=1.0,
            routers=(*(units.leaf(symbol) for symbol in meaning.factors), *factors),
            hidden=contraction.summed,
            sub_networks=(),
            scale=1.0,
            value=contraction.value,
        )
        term = scaled(term, meaning.scale * contraction.scale)
        if contraction.bias is not None:
            bias = self.leaf(contraction.bias.value, contraction.bias.index)
            term = with_bias(term, bias, contraction.bias_scale, contraction.value)
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
            value, index = through_views(weight.value, weight.index, self.crossed, self.outputs)
            outer = as_contraction(value, index)
            if value.op is aten.mul.Tensor and len(value.operands) == 2:
                left, right = (Operand(v, broadcast(index, v.shape)) for v in value.args)
            elif outer is not None and outer.is_product and outer.bias is None and outer.scale == 1:
                left, right = outer.left, outer.right
            else:
                return weight, factors
            if real_axes(left.index) <= hidden:
                left, right = right, left
            router, rest = real_axes(right.index), real_axes(left.index)
            if not router <= hidden or router <= rest:
                return weight, factors
            self.computed.add(value)
            weight = left
            factors.append(self.leaf(right.value, right.index))


def _may_be_weight(value: Value) -> bool:
    """Whether it is made of parameters alone, or comes from outside as it is: a buffer."""
    return value.op == INPUT or not value.inputs()


def _is_apart(value: Value, term: Term) -> bool:
    """Whether it and the query are made of different inputs."""
    return value.inputs().isdisjoint(term.gate.query.value.inputs())


def _without_projection(contraction: Contraction, units: HiddenReader) -> Declined:
    """Why what is multiplied with the weights is no hidden units: none reads a projection.

    A mean over tokens, expanded again, does not move along them.
    """
    for leaf in units.operands:
        if leaf.value.op in REDUCTIONS:
            name = operation_name(leaf.value)
            return Declined(Kind.NOT_A_PRODUCT, f"{name} in between", leaf.value.origin)
    return Declined(Kind.NOT_A_PRODUCT, node=contraction.value.origin)


def _at_the_hidden_units(reason: Reason, hidden: Operand, units: HiddenReader) -> Declined:
    """A reason with its place: what mixes units or tokens of a projection, or the last operation.

    The views above that are often the down projection's own.
    """
    projected = {projection.value for projection in units.projections}
    for leaf in units.operands if reason.kind is Kind.NOT_A_PRODUCT else ():
        value = leaf.value
        if value.op in REDUCTIONS or not projected.isdisjoint(value.ancestors()):
            name = f"{operation_name(value)} in between"
            return Declined(reason.kind, reason.detail or name, value.origin)
    last, _ = through_views(hidden.value, hidden.index)
    return Declined(reason.kind, reason.detail, last.origin)


def _with_query_of(gate: Projection, up: Projection) -> Projection:
    """The up projection over the query of the gate, if both are cast alike from the same elements.

    Autocast casts what a product reads, which is below the views of one spelling of a product and
    above those of another. Gradients must flow through all of it, or nothing.
    """
    base, at, passed = through_casts(up.query.value, up.query.index)
    other_base, other_at, other_passed = through_casts(gate.query.value, gate.query.index)
    casts, other_casts = ([v.dtype for v in way if is_cast(v)] for way in (passed, other_passed))
    modes = {value.requires_grad_mode for value in (*passed, *other_passed)}
    mine = in_reading_order(up.contracted, at)
    theirs = in_reading_order(gate.contracted, other_at)
    to_mine = paired(theirs, mine)
    if base is not other_base or casts != other_casts or len(modes) > 1 or to_mine is None:
        return up
    if not same_index(tuple(form.replaced(to_mine) for form in other_at), at):
        return up
    return replace(up, query=renamed(gate.query, to_mine))


def _projected_by(value: Value) -> Value | None:
    """What a product with weights projects, if the value is one but for numbers and views."""
    while value.op in _PRODUCTS and len(value.operands) == 1:
        value = value.source
    value = uncast(value)
    projected = [one for one in map(uncast, value.operands) if not _may_be_weight(one)]
    return projected[0] if value.op in MATRIX_PRODUCTS and len(projected) == 1 else None


@dataclass(frozen=True, slots=True)
class _Addend:
    """``sign * value``, read at an index, as a part of the sum that ``addition`` computes."""

    sign: float
    value: Value
    index: Index
    addition: Value


@dataclass(frozen=True, slots=True)
class _Leaf:
    """An addend that is not read further."""

    addend: _Addend
    value: Value
    operand: Operand  # the value, or what it is a view of
    is_whole: bool  # moves along all axes of the sum


@dataclass(slots=True)
class _Sum:
    """A chain of additions: the terms of an unrolled loop, a bias, a residual.

    A residual is taken only where no candidate is without it: inside a loop over heads or ``vmap``,
    and in a sum over sub-networks that begins with it.
    """

    reader: _Reader
    root: Value
    index: Index
    terms: list[Term] = field(default_factory=list)
    biases: list[_Leaf] = field(
        default_factory=list
    )  # or residuals of some heads, or of parameters
    residuals: list[Residual] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    inside: AbstractSet[Value] = field(init=False)  # values that are read, not leaves

    def __post_init__(self) -> None:
        self.inside = self.reader.outside - self.reader.outputs

    def term(self) -> Term:
        """The whole sum.

        Raises:
            Declined: something that is added is no term, no bias and no residual.
        """
        self.dtypes.add(self.root.dtype)
        todo = [_Addend(1.0, self.root, self.index, self.root)]
        while todo:
            todo += self._take(todo.pop())
        if not self.terms:
            raise Declined(Kind.UNKNOWN_OPERATION, operation_name(self.root), self.root.origin)
        return self._joined()

    def _take(self, addend: _Addend) -> list[_Addend]:
        """Take one addend; if it is a sum itself, return its addends."""
        reader, value, index = self.reader, addend.value, addend.index
        while value in self.inside and (step := through_view(value, index)) is not None:
            reader.crossed.add(value)
            value, index = step
        if value not in self.inside:
            self._take_leaf(addend, value, index)
            return []
        self.dtypes.add(value.dtype)
        if value.op in _ADDITIONS and (value is self.root or not reader.adds_bias(value, index)):
            return self._operands(addend.sign, value, index)
        contraction = reader.accumulated(value, index)
        if contraction is not None:
            return self._take_product(addend.sign, contraction, index)
        try:
            self.terms.append(scaled(reader.output(value, index), addend.sign))
        except Declined:
            if self._is_adapter(value):
                raise Declined(Kind.ADDED_PROJECTIONS, node=value.origin) from None
            raise
        return []

    def _is_adapter(self, value: Value) -> bool:
        """Whether two matrices in a row project what another product projects at once."""
        narrow = _projected_by(value)
        source = None if narrow is None else _projected_by(narrow)
        if source is None:
            return False
        sources = {source}
        if source.op is aten.mul.Tensor:  # perhaps by the mask of a dropout
            sources.update(map(uncast, source.operands))
        products = (one for one in self.inside if one.op in MATRIX_PRODUCTS)
        return sum(not sources.isdisjoint(map(uncast, p.operands)) for p in products) > 1

    def _operands(self, sign: float, value: Value, index: Index) -> list[_Addend]:
        """What an addition or subtraction adds."""
        self.reader.computed.add(value)
        alpha = value.argument(2, "alpha", 1)
        if not is_number(alpha) or alpha == 0:
            raise Declined(Kind.UNKNOWN_OPERATION, f"scaled by {alpha}", value.origin)
        addends: list[_Addend] = []
        weight = float(alpha) * _ADDITIONS[value.op]
        for factor, operand in ((1.0, value.args[0]), (weight, value.args[1])):
            if isinstance(operand, Value):
                if not is_zero(operand):
                    where = broadcast(index, operand.shape)
                    addends.append(_Addend(sign * factor, operand, where, value))
            elif operand != 0:
                raise Declined(Kind.UNKNOWN_OPERATION, "a number is added", value.origin)
        return addends

    def _take_product(self, sign: float, contraction: Contraction, index: Index) -> list[_Addend]:
        """A product and an addition in one: a term and one more addend."""
        added = contraction.bias
        assert added is not None
        self.reader.computed.add(contraction.value)
        alone = replace(contraction, bias=None, bias_scale=1.0)
        self.terms.append(scaled(self.reader.contraction(alone, index), sign))
        if is_zero(added.value):
            return []
        scale = sign * contraction.bias_scale
        return [_Addend(scale, added.value, added.index, contraction.value)]

    def _take_leaf(self, addend: _Addend, value: Value, index: Index) -> None:
        """A tensor from elsewhere: a residual if it moves as the output does, or else a bias.

        For one token a bias moves so as well. Whether a weight is one is decided when all terms
        have been read.
        """
        operand = self.reader.leaf(value, index)
        whole = real_axes(self.index) <= real_axes(operand.index)
        leaf = _Leaf(addend, value, operand, whole)
        if whole and not _may_be_weight(operand.value):
            self._take_residual(leaf)
        else:
            self.biases.append(leaf)

    def _take_residual(self, leaf: _Leaf) -> None:
        self.residuals.append(Residual(leaf.operand, leaf.addend.sign))
        self.dtypes.add(leaf.value.dtype)
        later = leaf.addend.addition is not self.root
        allowed = self.reader.in_loop or later or self.reader.is_highest(self.root)
        if not allowed or len(self.residuals) > 1:
            detail = f"{operation_name(leaf.value)} is added"
            raise Declined(Kind.UNKNOWN_OPERATION, detail, self.root.origin)

    def _joined(self) -> Term:
        """The terms as one, with the biases and the residual."""
        terms, root = self.terms, self.root
        if len(terms) > 1 or self.biases or self.residuals:
            terms = [without_residual(term, root) for term in terms]
        term = join_sum(terms[::-1])
        for leaf in self.biases:
            added = leaf.operand
            of_weights = may_be_bias(term, added) and _is_apart(added.value, term)
            if leaf.is_whole and not of_weights:
                self._take_residual(leaf)
            elif self.residuals or not adds_tokens(term, added) or not self.reader.is_highest(root):
                term = with_bias(term, added, leaf.addend.sign, leaf.addend.addition)
            else:
                self.residuals.append(Residual(added, leaf.addend.sign))
                self.dtypes.add(added.value.dtype)
        if not self.residuals:
            return term
        if len(self.dtypes) > 1:
            raise Declined(Kind.UNKNOWN_OPERATION, "a residual of another dtype", root.origin)
        return replace(term, residual=self.residuals[0])
