"""From a term to a site: one function for each check that can decline.

``read_output`` (grammar.py) found a sum of products of the right form. That is not yet an MH-FFN:
the axes must have the right roles. ``assign_roles`` names the axes, the checks prove what the op
needs, ``build_site`` puts the op's arguments together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import overload

import torch
from torch import fx

from .axes import (
    Affine,
    Axis,
    Index,
    Size,
    at_most,
    axes_of,
    axis_form,
    leaves,
    paired,
    product,
    quotient,
    real,
    same_index,
)
from .canonical import COPY, INPUT, OPAQUE, SCATTER, CanonicalCopy, Value
from .casts import cast_from
from .contractions import Operand, as_contraction, summed_index
from .grammar import Reading
from .meaning import POINTWISE
from .operations import holds, is_cast, is_other_pointwise
from .reasons import Declined, Kind
from .rolling import STACK, in_reading_order, renamed, same_tensor
from .site import WIDE_BIAS, Site, TensorView
from .source import locate
from .terms import Term, multiplied_in
from .views import LIKES, MERGES, all_pieces, broadcast, is_view, through_view, through_views

#: operations that autograd saves nothing of
_UNSAVED = MERGES | {
    *(SCATTER, COPY, torch.ops.aten._to_copy.default),
    *(torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.neg.default),
    *(torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim),
}
#: what is said of weights that differ along two dimensions, where sub-networks are not summed, too
TWO_DIMENSIONS = "they differ along two dimensions of the tokens"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: of the factors of projections, which are multiplied in float32, or in float64 where all is; the
#: dtypes reach a little further
_LARGEST_FACTOR = {torch.float32: 2.0**126, torch.float64: 2.0**1022}
#: and of those moved into a tensor, which leaves as much to the numbers in it
_LARGEST_MOVED = {torch.float32: 2.0**63, torch.float64: 2.0**511}


@dataclass(frozen=True, slots=True)
class Roles:
    """The axes of a term by what they count, outermost first."""

    tokens: tuple[Axis, ...]
    groups: tuple[Axis, ...]  # heads that have weights of their own
    sharers: tuple[Axis, ...]  # heads that share the weights of their group
    sub_networks: tuple[Axis, ...]
    hidden: tuple[Axis, ...]
    width: tuple[Axis, ...]  # contracted by gate and up
    out_width: tuple[Axis, ...]


def build_site(reading: Reading, root: Value, copy: CanonicalCopy) -> Site:
    """Prove that a reading is an MH-FFN, and write it as the arguments of the op.

    Raises:
        Declined: a check failed.
    """
    term, roles = check_form(reading, root)
    check_gradients(reading, root, copy)
    check_no_escape(reading, root, copy)
    check_memory(term.operands().values(), root, copy)
    check_saved(term, reading, copy)
    check_place(root, copy)
    check_autocast(term, root, copy)
    pieces = tuple(piece for piece in _parts_of(root) if is_read_apart(piece, root, copy))
    for piece in pieces:
        check_piece(piece, reading, root, copy)
    check_apart(term, pieces)
    check_gradients_apart(pieces, root, copy)
    return _site(term, roles, reading, root, copy, pieces)


def check_form(reading: Reading, root: Value) -> tuple[Term, Roles]:
    """Prove that a reading computes what an MH-FFN does, wherever it stands.

    Raises:
        Declined: a check failed.
    """
    term = one_query(reading.term)
    roles = assign_roles(term, reading.index)
    check_weights(term, roles)
    check_static_sizes(term, roles)
    check_router(term, roles)
    check_biases(term, roles)
    check_multi_head(roles)  # an ordinary network may be as wide as it likes
    check_widths(roles)
    check_dtypes(term, root)
    check_rounding(term, reading, root)
    check_range(term)
    return term, roles


def one_query(term: Term) -> Term:
    """Gate and up projection read the same query. The result reads it over the same axes."""
    gate, up = term.gate, term.up
    if up is None:
        return term
    mine = in_reading_order(up.contracted, up.query.index)
    theirs = in_reading_order(gate.contracted, gate.query.index)
    mapping = paired(mine, theirs)
    if mapping is None:
        raise Declined(Kind.DIFFERENT_QUERIES, node=up.value.origin)
    query = renamed(up.query, mapping)
    if not same_tensor(query.value, gate.query.value):
        queries = map(_first, (query.value, gate.query.value))
        (source, casts), (other, other_casts) = map(cast_from, queries)
        same = source is other and casts != other_casts
        kind = Kind.MIXED_PRECISION if same else Kind.DIFFERENT_QUERIES
        raise Declined(kind, node=up.value.origin)
    if not same_index(query.index, gate.query.index):
        packed = up.weight.value is gate.weight.value
        kind = Kind.UNPAIRED_BRANCHES if packed else Kind.DIFFERENT_QUERIES
        raise Declined(kind, "they read other parts of one tensor", up.value.origin)
    return term.mapped(
        lambda role, operand: renamed(operand, mapping) if role in ("up", "up_query") else operand
    )


def _first(value: Value) -> Value:
    """A query, or the first one of a stack."""
    return value.args[0] if value.op == STACK else value


def assign_roles(term: Term, root: Index) -> Roles:
    """Name each axis of a term by where it occurs.

    In the query and not in the weights it counts tokens; in both, heads; summed and in the router,
    sub-networks; summed otherwise, hidden units.

    Raises:
        Declined: an axis occurs where none of its role may.
    """
    gate, up, down = term.gate, term.up, term.down
    width = leaves(gate.contracted)
    summed = leaves(term.hidden) + leaves(term.sub_networks)
    query = axes_of(gate.query.index)
    weights = axes_of(gate.weight.index) | (set() if up is None else axes_of(up.weight.index))
    weights |= axes_of(down.index) & query
    routed = set().union(*(axes_of(router.index) for router in term.routers))
    own_sub_networks = set(leaves(term.sub_networks))
    sub_networks = tuple(a for a in summed if a in own_sub_networks or a in routed)
    hidden = tuple(a for a in summed if a not in sub_networks)
    _check_query(term, set(width), set(sub_networks), set(hidden))

    order = [axis for form in root for axis in form.axes()]
    groups = {a for a in order if a in weights}
    tokens = [a for a in order if a in query and a not in groups]
    out_width = [a for a in order if a not in query and a not in groups]
    inside = _inside_heads(gate.query.index, set(width), groups)
    inside |= _inside_tokens(term, root, [a for a in tokens if a not in inside], groups, out_width)
    sharers = tuple(a for a in tokens if a in inside)
    down_order = in_reading_order(hidden, down.index)
    # Those that the gate's weights do not read, as heads in groups, stay as the query has them.
    heads = in_reading_order([a for a in order if a in groups], gate.query.index)
    return Roles(
        tokens=tuple(a for a in tokens if a not in inside),
        groups=in_reading_order(heads, gate.weight.index),
        sharers=in_reading_order(sharers, gate.query.index),
        sub_networks=in_reading_order(sub_networks, down.index),
        hidden=down_order,
        width=in_reading_order(width, gate.query.index),
        out_width=tuple(a for a in out_width if a.size != 1),
    )


def _check_query(term: Term, width: set[Axis], sub_networks: set[Axis], hidden: set[Axis]) -> None:
    query = term.gate.query
    read = real(axes_of(query.index))
    scaled = query.value.op is torch.ops.aten.mul.Tensor and not real(hidden) <= read
    if read & sub_networks or (read & hidden and scaled):
        raise Declined(Kind.ROUTER_ON_INPUT, node=query.value.origin)
    if read & hidden or not real(width) <= read:
        raise Declined(Kind.UNPAIRED_BRANCHES, node=query.value.origin)


def _inside_heads(query: Index, width: set[Axis], groups: set[Axis]) -> set[Axis]:
    """Token-like axes that are read from within the feature dimension: heads that share weights.

    Mathematically such a head is one more token.
    """
    found: set[Axis] = set()
    for axes in (set(form.axes()) for form in query):
        if axes & width:
            found |= axes - width - groups
    return {axis for axis in found if isinstance(axis.size, int)}  # the number of heads is fixed


def _inside_tokens(
    term: Term, root: Index, tokens: list[Axis], groups: set[Axis], out_width: list[Axis]
) -> set[Axis]:
    """Axes of tokens, nested in the dimension of the heads, that are heads themselves.

    Dispatched tokens lie there, too: ``(E * C, d)``, viewed as ``(E, C, d)``. As heads
    they would be E * C of one token each, and every one would load its weights again. So such an
    axis counts tokens unless something else needs it as a head: a result or a router that keeps it
    within its features, or tokens that take both of the op's dimensions without it. Where there are
    no other tokens, nothing does: both dimensions are free, and a result may be flat.
    """
    nested = _nested(term.gate.query.index, groups) & set(tokens)
    outer = real(tokens) - nested
    if len(outer) > 1:
        return nested
    if not outer and len(nested) <= 2:
        return set()
    inner = real(leaves(term.sub_networks)) | real(leaves(term.hidden))
    kept = [(form, real(out_width)) for form in root]
    kept += [(form, inner) for router in term.routers for form in router.index]
    within = {a for form, features in kept for a in form.axes() if features & set(form.axes())}
    return nested & within


def _nested(query: Index, groups: set[Axis]) -> set[Axis]:
    """The axes that lie inside heads with weights of their own, in one dimension with them."""
    found: set[Axis] = set()
    for form in query:
        terms = form.resolved().terms
        steps = [_as_number(c) for axis, c in terms if axis in groups]
        found |= {axis for axis, c in terms if _as_number(c) < max(steps, default=0)}
    return {axis for axis in found if axis.size != 1 and isinstance(axis.size, int)}


def check_weights(term: Term, roles: Roles) -> None:
    """The weights depend on heads, sub-networks, hidden units and width, and on nothing else."""
    gate, up, down = term.gate, term.up, term.down
    inner = real(roles.groups) | real(roles.sub_networks) | real(roles.hidden)
    for operand, width in (
        (gate.weight, roles.width),
        (None if up is None else up.weight, roles.width),
        (down, roles.out_width),
    ):
        if operand is None:
            continue
        read = real(axes_of(operand.index))
        if not real(roles.hidden) | real(width) <= read or not read <= inner | real(width):
            raise Declined(Kind.UNPAIRED_BRANCHES, node=operand.value.origin)
        if depends_on(operand.value, gate.query.value):
            tokens = token_inputs(gate.query, set(roles.tokens))
            if not tokens.isdisjoint(operand.value.inputs()):
                raise _of_tokens(term, roles, operand.value)


def _of_tokens(term: Term, roles: Roles, weight: Value, detail: str = "") -> Declined:
    """Why the weights are not the same for every token.

    A router may be multiplied with them before a cast. So autocast computes an einsum of three: it
    casts what the last product reads.
    """
    value, index = through_views(term.down.value, term.down.index)
    if is_cast(value):
        inner, at = through_views(value.source, index)
        if inner.op is torch.ops.aten.mul.Tensor and len(inner.operands) == 2:
            width = real((*roles.hidden, *roles.out_width))
            sides = [real(axes_of(broadcast(at, one.shape))) for one in inner.operands]
            router, weights = sorted(sides, key=lambda axes: len(axes & width))
            if not router & width and not router <= weights:
                what = f"router and weights are multiplied in {inner.dtype}, before a cast"
                return Declined(Kind.MIXED_PRECISION, what, value.origin)
    return Declined(Kind.TOKEN_DEPENDENT_WEIGHTS, detail, weight.origin)


def check_static_sizes(term: Term, roles: Roles) -> None:
    """Only tokens may have dynamic sizes: the op's weights are three tensors [G, E, f, d]."""
    gate = term.gate
    for axes, what in (
        (roles.sub_networks, "sub-networks"),
        (roles.hidden, "hidden units"),
        ((*roles.width, *roles.out_width), "features of a head"),
    ):
        if not all(isinstance(axis.size, int) for axis in axes):
            detail = f"the number of {what} is dynamic"
            raise Declined(Kind.UNSUPPORTED_PROBLEM, detail, gate.value.origin)
    if not all(isinstance(axis.size, int) for axis in roles.groups):
        detail = "a batch of weights, or a dynamic number of heads"
        raise _of_tokens(term, roles, gate.value, detail)
    if len(roles.groups) > 1 and not _contiguous(roles.groups, gate.query.index):
        raise Declined(Kind.TOKEN_DEPENDENT_WEIGHTS, TWO_DIMENSIONS, gate.value.origin)


def check_router(term: Term, roles: Roles) -> None:
    """A router weight depends on token, head and sub-network alone."""
    if roles.sub_networks and product(axis.size for axis in roles.hidden) == 1:
        detail = "a factor differs between the hidden units"
        raise Declined(Kind.UNKNOWN_OPERATION, detail, term.value.origin)
    allowed = (
        real(roles.tokens) | real(roles.groups) | real(roles.sharers) | real(roles.sub_networks)
    )
    for router in term.routers:
        if not real(axes_of(router.index)) <= allowed:
            detail = "a factor differs between the hidden units or output features of a head"
            raise Declined(Kind.UNKNOWN_OPERATION, detail, router.value.origin)
        if not router.value.dtype.is_floating_point:
            raise Declined(Kind.UNSUPPORTED_DTYPE, str(router.value.dtype), router.value.origin)


def check_biases(term: Term, roles: Roles) -> None:
    """A bias depends on head, sub-network and its own feature alone."""
    shared = real(roles.groups) | real(roles.sub_networks)
    for bias, features in (
        (term.gate.bias, roles.hidden),
        (None if term.up is None else term.up.bias, roles.hidden),
        (term.bias, roles.out_width),
    ):
        if bias is None:
            continue
        if not real(axes_of(bias.index)) <= shared | real(features):
            raise Declined(Kind.TOKEN_DEPENDENT_WEIGHTS, "a bias", bias.value.origin)


def check_widths(roles: Roles) -> None:
    """The output of a head is as wide as its input."""
    inner, outer = (product(a.size for a in axes) for axes in (roles.width, roles.out_width))
    if inner != outer:
        raise Declined(Kind.UNEQUAL_WIDTHS, f"{inner} in, {outer} out")


def check_multi_head(roles: Roles) -> None:
    """There is more than one head or sub-network."""
    many = (*roles.groups, *roles.sharers, *roles.sub_networks)
    if product(axis.size for axis in many) == 1:
        raise Declined(Kind.PLAIN_FFN)


def check_dtypes(term: Term, root: Value) -> None:
    """Everything that is multiplied has the dtype that the products have, and the op computes in.

    A bias is read in that dtype, or in float32 next to 16 bits; a router in its own.
    """
    projections = [term.gate, *([] if term.up is None else [term.up])]
    values = [term.value, *(projection.value for projection in projections)]
    values += [operand.value for p in projections for operand in (p.query, p.weight)]
    dtypes = {value.dtype for value in (*values, term.down.value)}
    named = ", ".join(sorted(map(str, dtypes)))
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise Declined(Kind.UNSUPPORTED_DTYPE, named, term.value.origin)
    if len(dtypes) > 1:
        raise Declined(Kind.MIXED_PRECISION, named, term.value.origin)
    dtype, device = dtypes.pop(), term.value.device
    for one in (dtype, root.dtype):
        if one not in _DTYPES and not (one is torch.float64 and device.type == "cpu"):
            raise Declined(Kind.UNSUPPORTED_DTYPE, str(one), term.value.origin)
    for bias in (term.bias, *(projection.bias for projection in projections)):
        if bias is not None and not any(holds(one, bias.value.dtype) for one in (dtype, WIDE_BIAS)):
            detail = f"a bias in {bias.value.dtype}, projections in {dtype}"
            raise Declined(Kind.MIXED_PRECISION, detail, bias.value.origin)
    for router in term.routers:
        if router.value.dtype is torch.float64 is not dtype and router.value.shape:
            detail = f"a router in {router.value.dtype}, projections in {dtype}"
            raise Declined(Kind.MIXED_PRECISION, detail, router.value.origin)


def check_rounding(term: Term, reading: Reading, root: Value) -> None:
    """No intermediate value has fewer digits than both the op's computation and its result.

    If an intermediate value is as narrow as the result, the op's single rounding is at least as
    accurate as the model's several.
    """
    dtype = term.value.dtype
    for value in sorted(reading.computed, key=lambda value: value.step):
        if not (holds(value.dtype, dtype) or holds(value.dtype, root.dtype)):
            detail = f"to {value.dtype}, in a network in {dtype}"
            raise Declined(Kind.ROUNDING_CAST, detail, value.origin)


def check_range(term: Term) -> None:
    """No factor that is moved into a tensor can make it overflow, or vanish.

    ``(y + bias) * 4`` is finite in float16 where the sum is small; ``4 * bias`` need not be. In
    float32, ``1e-30 * y + 1e30 * bias`` is; ``1e60 * bias`` is not.
    """
    projections = [term.gate, *([] if term.up is None else [term.up])]
    moved = [p.bias_scale for p in projections if p.bias is not None]
    moved += [term.bias_scale] if term.bias is not None else []
    moved += [term.residual.scale] if term.residual is not None else []
    if term.value.dtype is torch.float16 and any(abs(scale) > 1 for scale in moved):
        detail = f"multiplied by {max(moved, key=abs):g}"
        raise Declined(Kind.FLOAT16_RANGE, detail, term.value.origin)
    held = multiplied_in(term.value.dtype)
    inside = [p.scale for p in projections]
    for scales, largest in ((moved, _LARGEST_MOVED[held]), (inside, _LARGEST_FACTOR[held])):
        for scale in scales:
            if not 1 / largest <= abs(scale) <= largest:
                detail = f"a factor of {scale:g}"
                raise Declined(Kind.UNSUPPORTED_PROBLEM, detail, term.value.origin)


def check_gradients(reading: Reading, root: Value, copy: CanonicalCopy) -> None:
    """Either the whole network records gradients, or none of it, where any are wanted.

    What is computed under inference mode is of another kind of tensor in any case.
    """
    inner = reading.computed | reading.crossed
    modes = {value.requires_grad_mode for value in inner}
    regions = {value.origin in copy.inference for value in inner}
    if len(regions) > 1 or (len(modes) > 1 and root.may_need_gradient()):
        raise Declined(Kind.GRADIENTS_CUT, node=reading.term.value.origin)


def check_no_escape(reading: Reading, root: Value, copy: CanonicalCopy) -> None:
    """No other node reads a value that the op no longer computes, except parts of the result.

    A node that reads only its sizes does no harm if its own result disappears: zeros to add to.
    """
    parts = {root, *_parts_of(root)}
    writes = {SCATTER} if copy.takes_place_of_node(root) else set()  # into the result's memory
    likes: set[Value] = set()
    for value in reading.computed:
        todo = [value]
        while todo:
            current = todo.pop()
            if current in parts:
                continue
            if current in copy.escaping:
                raise Declined(Kind.ESCAPING_INTERMEDIATE, "it is returned", value.origin)
            for reader in _outer_readers(current, reading, copy):
                if reader.op in writes:
                    continue
                if reader.op in LIKES:
                    likes.add(reader)
                elif not (reader in reading.crossed or is_view(reader) or is_cast(reader)):
                    detail = f"read by {_shown(reader)}"
                    raise Declined(Kind.ESCAPING_INTERMEDIATE, detail, value.origin)
                todo.append(reader)
    for operand in reading.term.operands().values() if likes else ():
        if not likes.isdisjoint(operand.value.ancestors()):
            detail = "a tensor that the network reads has its sizes"
            raise Declined(Kind.ESCAPING_INTERMEDIATE, detail, operand.value.origin)


def _outer_readers(value: Value, reading: Reading, copy: CanonicalCopy) -> Iterator[Value]:
    """Live readers that the op does not replace."""
    for reader in value.readers:
        if reader not in reading.computed and copy.is_live(reader):
            yield reader


def _parts_of(root: Value) -> dict[Value, Size]:
    """The outputs of single heads, where the output merges them, and what grew into it of them."""
    return all_pieces(root) if root.op in MERGES else {}


def is_read_apart(piece: Value, root: Value, copy: CanonicalCopy) -> bool:
    """Whether a head's output has readers other than what merges the heads."""
    merged = {root, *_parts_of(root)}
    others = any(reader not in merged and copy.is_live(reader) for reader in piece.readers)
    return others or piece in copy.escaping


def check_piece(piece: Value, reading: Reading, root: Value, copy: CanonicalCopy) -> None:
    """A head's output can be cut out of the result for nodes that read it separately."""
    node = copy.made_by(piece)
    if node is None or piece.dtype is not root.dtype:
        raise Declined(Kind.ESCAPING_INTERMEDIATE, "the output of one head", piece.origin)
    if (writer := copy.overwriter_of(piece)) is not None:
        raise Declined(Kind.MUTATION, "the output of one head is overwritten", writer)
    _check_not_overwritten(root, copy)  # the head would be a part of it
    _check_memory_inside(piece, copy)
    _check_returned_alone(piece, copy)
    if copy.shares_what_is_returned(piece):
        detail = "a head's output is returned with other views of its memory"
        raise Declined(Kind.MUTATION, detail, node)
    if piece.memory_order() is None:
        raise Declined(Kind.UNSUPPORTED_LAYOUT, "a head's output has gaps in memory", node)
    merged = copy.positions[_maker(root, copy)]
    inside = reading.computed | reading.crossed
    for reader, _ in copy.readers_of.get(piece, ()):
        if copy.positions[reader] < merged and copy.value_of.get(reader) not in inside:
            detail = "a head's output is read before the heads are merged"
            raise Declined(Kind.ESCAPING_INTERMEDIATE, detail, reader)


def check_apart(term: Term, pieces: tuple[Value, ...]) -> None:
    """No head reads what another one has made."""
    for operand in term.operands().values() if pieces else ():
        if not operand.value.ancestors().isdisjoint(pieces):
            detail = "one head reads what another one has made"
            raise Declined(Kind.UNEQUAL_HEADS, detail, operand.value.origin)


def check_gradients_apart(pieces: tuple[Value, ...], root: Value, copy: CanonicalCopy) -> None:
    """Where a head has a gradient, the merged output has one.

    Else the other heads would get zeros where eager gives them none, which an optimizer tells
    apart.
    """
    if not root.may_need_gradient() or _has_gradient(root, copy):
        return
    if any(_has_gradient(piece, copy) for piece in pieces):
        raise Declined(Kind.GRADIENTS_CUT, "of the merged heads", root.origin)


def _has_gradient(value: Value, copy: CanonicalCopy) -> bool:
    """Whether a result of the graph has a gradient of the value."""
    seen: set[Value] = set()
    todo = [value]
    while todo:
        current = todo.pop()
        if current in seen or current.op is torch.ops.aten.detach.default:
            continue
        seen.add(current)
        has_slope = current.dtype.is_floating_point or current.dtype.is_complex
        if current.op in LIKES or not (current.requires_grad_mode and has_slope):
            continue
        if current in copy.escaping:
            return True
        todo += [reader for reader in current.readers if copy.is_live(reader)]
    return False


def check_memory(operands: Iterable[Operand], root: Value, copy: CanonicalCopy) -> None:
    """The op's operands are intact at its position, and its result may be overwritten later."""
    node = _maker(root, copy)
    if not copy.takes_place_of_node(root):
        _check_not_overwritten(root, copy)
    _check_memory_inside(root, copy)
    _check_returned_alone(root, copy)
    for operand in operands:
        _check_readable(operand.value, copy, node, root.requires_grad_mode)


def _check_not_overwritten(root: Value, copy: CanonicalCopy) -> None:
    """Whoever reads the result's memory reads the result."""
    if (writer := copy.overwriter_of(root)) is not None:
        raise Declined(Kind.MUTATION, "its output is overwritten, or a part of it", writer)
    for reader, seen in copy.changed_reads(root):
        if seen is not root and root in seen.ancestors():
            raise Declined(Kind.MUTATION, "its output is read through an older view", reader)


def _check_memory_inside(value: Value, copy: CanonicalCopy) -> None:
    """It is not what an input's memory was given; a copy that was put there is another value."""
    for writer, values in copy.written_outside.items():
        if value in values:
            raise Declined(Kind.MUTATION, "its output is computed in an input's memory", writer)


def _check_returned_alone(value: Value, copy: CanonicalCopy) -> None:
    """Results that alias each other must go on to alias: a write to one changes the other."""
    node = copy.returned_as_part(value)
    if node is not None:
        raise Declined(Kind.MUTATION, "its output is returned in other memory", node)


def check_saved(term: Term, reading: Reading, copy: CanonicalCopy) -> None:
    """No node overwrites what the backward pass reads again, before or after the op.

    Where a write goes through ``.data`` or a detached alias, eager computes gradients from the new
    numbers, and the op, which saves only its arguments, computes others. A bias, which eager does
    not save, may even be updated in the forward pass; the op could not go back then.
    """
    if not any(value.requires_grad_mode for value in reading.computed):
        return
    named = replace(term, residual=None).operands()  # an addition saves nothing
    read = {operand.value for operand in named.values()} | _saved(reading)
    for value in sorted(read, key=lambda value: value.step):
        if copy.is_overwritten(value, but_by=reading.computed):
            detail = f"{_said(value)} is overwritten, which its backward pass reads again"
            raise Declined(Kind.MUTATION, detail, copy.overwriter_of(value, reading.computed))


def _said(value: Value) -> str:
    """What a value is called in a sentence."""
    return f"what {value.origin.name} made" if value.operands else f"the input {value.origin.name}"


def _saved(reading: Reading) -> set[Value]:
    """What autograd saves for the network's operations, and the tensors that it is a view of.

    It saves nothing for operations that only add, merge or copy.
    """
    todo = [v for value in reading.computed if value.op not in _UNSAVED for v in value.operands]
    found: set[Value] = set()
    while todo:
        value = todo.pop()
        if value not in found:
            found.add(value)
            if value in reading.crossed:
                todo += value.operands
    return found


def check_place(root: Value, copy: CanonicalCopy) -> None:
    """The output fills its storage, and is computed where the op can be inserted.

    A part of a larger tensor would be computed from the whole of it.
    """
    node = _maker(root, copy)
    levels = copy.levels.get(node, ())
    if levels is None:
        raise Declined(Kind.FUNCTION_TRANSFORM, node=node)
    if levels and not root.requires_grad_mode and root.may_need_gradient():
        # There, an operator with a backward pass of its own records what PyTorch's do not.
        raise Declined(Kind.FUNCTION_TRANSFORM, "without gradients", root.origin)
    if node in copy.inference:
        raise Declined(Kind.INFERENCE_REGION, node=node)
    if root.memory_order() is None:
        raise Declined(Kind.UNSUPPORTED_LAYOUT, "the output has gaps in memory", root.origin)


def _check_readable(value: Value, copy: CanonicalCopy, op: fx.Node, records: bool) -> None:
    """A node holds the value where the op will stand, or it can be computed again there."""
    if copy.holder_at(value, copy.positions[op]) is not None:
        return
    if copy.made_by(value) is not None or value.op in (INPUT, OPAQUE, COPY, SCATTER):
        raise Declined(Kind.MUTATION, "its input or weights", value.origin)
    if torch.Tag.nondeterministic_seeded in getattr(value.op, "tags", ()):
        raise Declined(Kind.UNKNOWN_OPERATION, "random numbers are drawn", value.origin)
    fused = any(name in str(value.origin.target) for name in ("addcmul", "fma"))
    if fused and value.dtype in (torch.bfloat16, torch.float16):
        # The model rounds the sum alone; the product by itself may leave the range.
        raise Declined(Kind.ROUNDING_CAST, "a product that is not rounded by itself", value.origin)
    if value.op != STACK:  # computed again, but under the modes of now
        if value.requires_grad_mode is not records and value.may_need_gradient():
            raise Declined(Kind.GRADIENTS_CUT, "what the op reads", value.origin)
        modes = copy.autocast.get(value.origin), copy.autocast[op]
        if modes[0] != modes[1] and not (is_view(value) or is_cast(value)):
            raise Declined(Kind.AUTOCAST_BOUNDARY, "what the op reads", value.origin)
    for operand in value.operands:
        _check_readable(operand, copy, op, records)


def _maker(root: Value, copy: CanonicalCopy) -> fx.Node:
    node = copy.made_by(root)
    assert node is not None, "only values that a node holds are candidates"
    return node


def check_autocast(term: Term, root: Value, copy: CanonicalCopy) -> None:
    """Autocast at the place of the output does not change the op's precision."""
    node = _maker(root, copy)
    dtype = copy.autocast[node].get(root.device.type)
    if dtype not in (None, term.value.dtype):
        raise Declined(Kind.AUTOCAST_BOUNDARY, f"{term.value.dtype} under {dtype}", node)


def _site(
    term: Term,
    roles: Roles,
    reading: Reading,
    root: Value,
    copy: CanonicalCopy,
    pieces: tuple[Value, ...],
) -> Site:
    gate, up = term.gate, term.up
    batch, length = two_token_dims(roles.tokens, gate.query.index)
    if real(length) <= _nested(gate.query.index, set(roles.groups)):
        sizes_of = [product(axis.size for axis in axes) for axes in (length, batch)]
        if at_most(*sizes_of):
            batch, length = length, batch  # the kernels cut the longer one into tiles
    heads = (*roles.groups, *roles.sharers)
    per_unit = (roles.groups, roles.sub_networks, roles.hidden)
    output_dims = tuple(form.axes() for form in reading.index)

    sizes = {role: product(a.size for a in axes) for role, axes in _sized(roles)}
    down_bias_dims = (roles.groups, roles.sub_networks, roles.out_width)
    residual = term.residual
    return Site(
        query=_view(gate.query, (batch, length, heads, roles.width)),
        gate=_view(gate.weight, (*per_unit, roles.width)),
        up=None if up is None else _view(up.weight, (*per_unit, roles.width)),
        down=_view(term.down, (*per_unit, roles.out_width)),
        routers=tuple(_view(r, (batch, length, heads, roles.sub_networks)) for r in term.routers),
        gate_bias=_view(gate.bias, per_unit, gate.bias_scale),
        up_bias=None if up is None else _view(up.bias, per_unit, up.bias_scale),
        down_bias=_view(term.bias, down_bias_dims, term.bias_scale),
        residual=None if residual is None else _view(residual.operand, output_dims, residual.scale),
        activation=term.activation,
        gate_scale=gate.scale,
        up_scale=1.0 if up is None else up.scale,
        out_scale=term.scale,
        heads=_int(sizes["groups"]) * _int(sizes["sharers"]),
        groups=_int(sizes["groups"]),
        head_dim=_int(sizes["width"]),
        sub_networks=_int(sizes["sub_networks"]),
        hidden=_int(sizes["hidden"]),
        tokens=(product(a.size for a in batch), product(a.size for a in length)),
        dtype=gate.value.dtype,
        out_dtype=root.dtype,
        device=root.device,
        output=root,
        output_node=_maker(root, copy),
        output_dims=output_dims,
        pieces=pieces,
        location=locate(term.value.origin),
        replaces=reading.computed,
    )


_Dims = tuple[tuple[Axis, ...], ...]


@overload
def _view(operand: Operand, dims: _Dims, scale: float = 1.0) -> TensorView: ...


@overload
def _view(operand: None, dims: _Dims, scale: float = 1.0) -> None: ...


def _view(operand: Operand | None, dims: _Dims, scale: float = 1.0) -> TensorView | None:
    """An operand with these dimensions, each made of the axes that it counts."""
    return None if operand is None else TensorView(operand.value, operand.index, dims, scale)


def _sized(roles: Roles) -> list[tuple[str, tuple[Axis, ...]]]:
    names = ("groups", "sharers", "width", "sub_networks", "hidden")
    return [(name, getattr(roles, name)) for name in names]


def two_token_dims(
    tokens: tuple[Axis, ...], query: Index
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The op has two token dimensions, (B, L): the axes that the query keeps together are L."""
    ordered = in_reading_order(tokens, query)
    for cut in range(len(ordered)):
        if _contiguous(ordered[cut:], query):
            return ordered[:cut], ordered[cut:]
    return ordered[:-1], ordered[-1:]


def _contiguous(axes: tuple[Axis, ...], index: Index) -> bool:
    """Whether the axes are digits of one dimension, without gaps and in this order."""
    for form in index:
        terms = dict(form.resolved().terms)
        if all(axis in terms for axis in axes):
            return all(
                quotient(terms[outer], terms[inner]) == inner.size
                for outer, inner in pairwise(axes)
            )
    return False


def depends_on(weight: Value, query: Value) -> bool:
    """Whether a computed weight and the query come from a common tensor, which may be tokens."""
    if weight.op in (INPUT, STACK):
        return False
    return not weight.inputs().isdisjoint(query.inputs())


def token_inputs(query: Operand, tokens: set[Axis]) -> set[Value]:
    """The inputs that the query's tokens come from.

    Inputs that are the same for all tokens do not count: a scale, the weights of a projection, a
    codebook that tokens index. All operands of an unknown operation count.
    """
    moving: set[Axis] = set()  # along tokens, over axes of our own: walking splits them
    index: list[Affine] = []
    for form, size in zip(query.index, query.value.shape, strict=True):
        axis = Axis(size)
        index.append(axis_form(axis))
        if not tokens.isdisjoint(form.axes()):
            moving.add(axis)
    if not real(moving):
        return query.value.inputs()  # one token
    found: set[Value] = set()
    seen: set[tuple[Value, tuple[bool, ...]]] = set()
    todo: list[tuple[Value, Index]] = [(query.value, tuple(index))]
    while todo:
        value, at = todo.pop()
        along = tuple(not {*form.axes()}.isdisjoint(leaves(moving)) for form in at)
        if not any(along) or (value, along) in seen:
            continue
        seen.add((value, along))
        read = _read_at(value, at)
        if read is None:
            found |= value.inputs()
        else:
            todo += read
    return found


def _read_at(value: Value, index: Index) -> list[tuple[Value, Index]] | None:
    """What a value is computed from, and where each is read; None where that is not known."""
    step = through_view(value, index)
    if step is not None:
        return [step]
    if value.op in POINTWISE or is_other_pointwise(value):
        return [(operand, broadcast(index, operand.shape)) for operand in value.operands]
    contraction = as_contraction(value, index)
    if contraction is not None:
        read = [contraction.left, contraction.right]
        read += [] if contraction.bias is None else [contraction.bias]
        return [(operand.value, operand.index) for operand in read]
    if value.op in (torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim):
        return [(value.source, summed_index(value, index)[0])]
    if value.op is torch.ops.aten.embedding.default:
        table, places = value.args[:2]
        rows = index[: len(places.shape)]
        every = axis_form(Axis(table.shape[0]))
        return [(places, rows), (table, (every, *index[len(places.shape) :]))]
    if value.op is torch.ops.aten.index.Tensor and len(value.operands) == 2:
        places = value.args[1][0]
        if places is not None and places.dtype is not torch.bool:
            rows = index[: len(places.shape)]
            every = axis_form(Axis(value.source.shape[0]))
            return [(places, rows), (value.source, (every, *index[len(places.shape) :]))]
    return None


def _as_number(coefficient: object) -> float:
    return float(coefficient) if isinstance(coefficient, int) else float("inf")


def _int(size: object) -> int:
    assert isinstance(size, int)
    return size


def _shown(value: Value) -> str:
    where = locate(value.origin)
    return str(value.op) if where is None else f"{where.file}:{where.line}: {where.code}"
