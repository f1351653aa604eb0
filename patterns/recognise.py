"""The recogniser's entry point: the MH-FFNs of a Dynamo graph.

``find_sites`` takes a graph and returns what it found, and a reason for every near-miss:

1. a cheap look at the graph, so that models without a feed-forward network cost nothing;
2. ``tracer.trace``: the copy to read;
3. anchors: contractions of something activated, each a possible down projection;
4. from each anchor up to the candidates for its output, through what the grammar allows;
5. from the highest candidate down: ``grammar.read_output``, then ``checks.build_site``; the first
   candidate that passes is a site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from mhf_compiler.compat import computes_gradients

from .axes import Axis, axis_form
from .canonical import INPUT, OPAQUE, SCATTER, CanonicalCopy, UntraceableGraph, Value
from .checks import TWO_DIMENSIONS, build_site, check_form
from .contractions import Contraction, as_contraction
from .grammar import is_outside_operation, read_output
from .meaning import LINEAR, POINTWISE
from .operations import DROPOUT, is_cast, is_other_pointwise, operation_name
from .products import MATRIX_PRODUCTS, is_product_call, may_be_product_call
from .reasons import Declined, Kind, Reason, Unreadable
from .site import Location, Site
from .source import locate
from .tracer import trace
from .views import LIKES, MERGES, grows_into, is_view

aten = torch.ops.aten

_SOON = 24  # operations
_PROJECTED, _ACTIVATED, _SOFTENED, _ATTENDING = 1, 2, 4, 8
#: why a network keeps its biases, routers or sums to itself, which are then not part of the site
_OF_PRECISION = frozenset({Kind.MIXED_PRECISION, Kind.ROUNDING_CAST, Kind.FLOAT16_RANGE})
#: of what activates no projection, which tells nothing where it is a projection itself
_OF_HIDDEN_UNITS = frozenset({Kind.NOT_A_PRODUCT, Kind.ADDED_PROJECTIONS})
_PLAIN_SUMS = frozenset({aten.add.Tensor, aten.sum.dim_IntList})
_MERGED = MERGES | {SCATTER}
#: in between they are no part of an MH-FFN, but what follows still is a near-miss
_PASSED_ON = DROPOUT | {
    SCATTER,
    aten.constant_pad_nd.default,
    aten.cumprod.default,
    aten.cumsum.default,
    aten.detach.default,
    aten.flip.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.logcumsumexp.default,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
    aten.roll.default,
}


@dataclass(frozen=True)
class NearMiss:
    """A feed-forward network that was examined and declined."""

    reason: Reason
    location: Location | None
    anchor: Value  # its down projection


@dataclass
class Findings:
    """What ``find_sites`` found in one graph."""

    sites: list[Site] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    copy: CanonicalCopy | None = None
    looked_at: int = 0  # possible down projections
    unreadable: Reason | None = None  # why the graph was not analysed


def find_sites(gm: fx.GraphModule, shape_env: Any | None = None) -> Findings:
    """Find every MH-FFN in a Dynamo graph. The graph is not changed.

    Args:
        gm: the graph as Dynamo hands it to a backend.
        shape_env: the shape environment of its symbolic sizes, if it has any.
    """
    findings = Findings()
    if not _may_contain_site(gm):
        return findings
    try:
        copy = trace(gm, shape_env)
    except UntraceableGraph as error:
        findings.unreadable = error.reason
        return findings
    findings.copy = copy
    anchors = list(_anchors(copy))
    findings.looked_at = len(anchors)
    inside: set[Value] = set()  # of paths: what lies between parts of a value and where they meet
    paths = {anchor: _path(anchor, copy, inside) for anchor in anchors}
    outside = frozenset(value for path in paths.values() for value in path) | inside
    tried: dict[Value, Site | Reason] = {}
    above: dict[Value, list[Value]] = {}  # the candidates above the output of each site
    missed: list[NearMiss] = []
    for anchor in anchors:
        outputs = frozenset(site.output for site in findings.sites)
        found = _best(paths[anchor], outside, copy, tried, outputs)
        if isinstance(found, Site):
            if all(found is not site for site in findings.sites):
                findings.sites.append(found)
                path = paths[anchor]
                above[found.output] = path[path.index(found.output) + 1 :]
        elif not computes_gradients(anchor.origin):
            missed.append(_near_miss(found, anchor))
    missed = _as_loops_or_ordinary(missed, paths, outside, copy)
    inner = {value for anchor in anchors for value in _projections_of(anchor)}
    reported: dict[Value, NearMiss] = {}
    for miss in missed:
        projects = miss.anchor in inner and miss.reason.kind in _OF_HIDDEN_UNITS
        if not projects and not any(_belongs_to(site, miss.anchor) for site in findings.sites):
            reported.setdefault(paths[miss.anchor][-1], miss)
    apart = _why_apart(findings.sites, above, tried, copy)
    findings.near_misses = [*reported.values(), *apart]
    return findings


def _near_miss(reason: Reason, value: Value) -> NearMiss:
    """Of a value, at the line that the reason names if it names one that is known."""
    where = None if reason.node is None else locate(reason.node)
    return NearMiss(reason, where or locate(value.origin), value)


def _why_apart(
    sites: list[Site],
    above: dict[Value, list[Value]],
    tried: dict[Value, Site | Reason],
    copy: CanonicalCopy,
) -> Iterator[NearMiss]:
    """Why sites that look like parts of one network are sites of their own, once for each."""
    told = [*_parts_of_one(sites, above, tried)]
    vague = [one for one in told if one[1].reason.kind is Kind.UNEQUAL_HEADS]
    clear = [one for one in told if one not in vague]
    said: set[Value] = set()
    clear += _left_out(sites, above, tried)
    for outputs, miss in (*clear, *_summed_apart(sites, copy), *_merged_apart(sites, copy), *vague):
        if said.isdisjoint(outputs):
            yield miss
        said |= outputs


def _parts_of_one(
    sites: list[Site], above: dict[Value, list[Value]], tried: dict[Value, Site | Reason]
) -> Iterator[tuple[set[Value], NearMiss]]:
    """Sites that one candidate sums or merges, and why that candidate is no site.

    Networks that are summed are parts of one if they read the same queries. All have the same form.
    """
    parts: dict[Value, dict[Value, Site]] = {}
    for site in sites:
        for value in above[site.output]:
            if value.op in _PLAIN_SUMS | MATRIX_PRODUCTS | _MERGED:
                parts.setdefault(value, {})[site.output] = site
    for whole, members in sorted(parts.items(), key=lambda item: item[0].step):
        merged = whole.op in _MERGED
        forms = {_form(site, with_query=not merged) for site in members.values()}
        # Of a sum that grows in a loop, all but the last term may be one site.
        counted = {_form(site, with_query=not merged, counted=merged) for site in members.values()}
        if len(members) > 1 and len(counted) == 1:
            path = above[next(iter(members))]
            results = [tried.get(value) for value in path[: path.index(whole) + 1]]
            reasons = [result for result in results if isinstance(result, Reason)]
            if not reasons:
                continue  # the sum is the output of the last of them
            reason = max(reasons, key=_tells)
            if len(forms) > 1 and reason.kind is not Kind.MUTATION:
                continue  # networks of different sizes
            if reason.kind is Kind.UNEQUAL_HEADS and whole.op not in _MERGED:
                continue  # the sum of two whole networks
            if reason.detail == TWO_DIMENSIONS and whole.op in _MERGED:
                continue  # two whole networks of the same queries
            if reason.kind is Kind.UNKNOWN_OPERATION:
                kind = Kind.OPERATION_IN_LOOP if whole.op in _MERGED else Kind.SUMMED_APART
                reason = Reason(kind, reason.detail or operation_name(whole), reason.node)
            yield set(members), _near_miss(reason, whole)


def _left_out(
    sites: list[Site], above: dict[Value, list[Value]], tried: dict[Value, Site | Reason]
) -> Iterator[tuple[set[Value], NearMiss]]:
    """What is computed with a site's output and would be part of the site in another precision."""
    for site in sites:
        adds = False
        for value in above[site.output]:
            adds |= not (is_view(value) or is_cast(value))
            reason = tried.get(value)
            if adds and isinstance(reason, Reason) and reason.kind in _OF_PRECISION:
                yield {site.output}, _near_miss(reason, value)
                break


def _form(site: Site, with_query: bool, counted: bool = True) -> Any:
    """What sub-networks of one sum, or heads of one network, have in common.

    Unless ``counted``, whatever the number of sub-networks.
    """
    sizes = site.heads, site.head_dim, site.sub_networks if counted else None, site.hidden
    return sizes, site.activation, site.gated, site.query.value if with_query else None


def _alike(sites: list[Site], with_query: bool) -> Iterator[list[Site]]:
    """Groups of more than one site that have the same form."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault(_form(site, with_query), []).append(site)
    yield from (group for group in groups.values() if len(group) > 1)


def _summed_apart(sites: list[Site], copy: CanonicalCopy) -> Iterator[tuple[set[Value], NearMiss]]:
    """Sub-networks of one sum that are sites of their own, and the operation that keeps them apart.

    They read the same queries, and have the same sizes.
    """
    for group in _alike(sites, with_query=True):
        first, second, *_ = group
        ways, other_ways = _sums_after(first, copy), _sums_after(second, copy)
        sums = [value for value in ways if value in other_ways]
        apart = (other_ways[sums[0]] or ways[sums[0]]) if sums else None
        if apart is not None:
            reason = Reason(Kind.SUMMED_APART, operation_name(apart), apart.origin)
            yield {site.output for site in group}, _near_miss(reason, first.output)


def _merged_apart(sites: list[Site], copy: CanonicalCopy) -> Iterator[tuple[set[Value], NearMiss]]:
    """Heads that are sites of their own, and the operation before they are merged.

    None of them reads what another one has made.
    """
    for group in _alike(sites, with_query=False):
        outputs = {site.output for site in group}
        if all(site.query.value.ancestors().isdisjoint(outputs) for site in group):
            first, second, *_ = (_merges(site.output, copy) for site in group)
            for merge in first.keys() & second.keys():
                yield outputs, _merged_after(first[merge], group[0].output)


def _merged_after(through: Value, output: Value) -> NearMiss:
    """The reason why an output is not merged at once: what it goes through."""
    detail = f"{operation_name(through)} before the heads are merged"
    return _near_miss(Reason(Kind.OPERATION_IN_LOOP, detail, through.origin), output)


def _sums_after(site: Site, copy: CanonicalCopy) -> dict[Value, Value | None]:
    """The values soon after a site that its output is in, and what they do to it but add it."""
    found: dict[Value, Value | None] = {}
    todo: list[tuple[Value, Value | None]] = [(site.output, None)]
    for _ in range(_SOON):
        if not todo:
            break
        value, done = todo.pop(0)
        for reader in value.readers:
            projects = reader.op in MATRIX_PRODUCTS and value is not reader.operands[0]
            if copy.is_live(reader) and reader not in found and not projects:
                plain = is_view(reader) or reader.op in _PLAIN_SUMS
                found[reader] = then = done if plain or done is not None else reader
                todo.append((reader, then))
    sums = _PLAIN_SUMS | MATRIX_PRODUCTS  # some products add
    return {v: done for v, done in found.items() if len(v.operands) > 1 and v.op in sums}


def _as_loops(
    missed: list[NearMiss], paths: dict[Value, list[Value]], copy: CanonicalCopy
) -> list[NearMiss]:
    """Give ordinary networks that a loop over heads merges the reason that keeps them apart."""
    merges: dict[Value, list[tuple[NearMiss, Value]]] = {}
    for miss in missed:
        if miss.reason.kind is Kind.PLAIN_FFN:
            for merge, through in _merges(paths[miss.anchor][-1], copy).items():
                merges.setdefault(merge, []).append((miss, through))
    replaced: dict[Value, NearMiss | None] = {}
    for members in merges.values():
        ((first, through), *others) = members
        if others and not any(member.anchor in replaced for member, _ in members):
            replaced |= {other.anchor: None for other, _ in others}
            replaced[first.anchor] = _merged_after(through, first.anchor)
    kept = [replaced.get(miss.anchor, miss) for miss in missed]
    return [miss for miss in kept if miss is not None]


def _as_loops_or_ordinary(
    missed: list[NearMiss],
    paths: dict[Value, list[Value]],
    outside: frozenset[Value],
    copy: CanonicalCopy,
) -> list[NearMiss]:
    """As ``_as_loops``; what is ordinary whatever else keeps it from being a site is said to be so.

    An ordinary network may drop hidden units, or stand in a transform.
    """
    others = (miss for miss in missed if miss.reason.kind is not Kind.PLAIN_FFN)
    ordinary = {
        miss.anchor: replace(miss, reason=Reason(Kind.PLAIN_FFN))
        for miss in others
        if _is_ordinary_without_dropout(paths[miss.anchor], outside)
    }
    kept = _as_loops(missed, paths, copy)
    # In a loop over heads, dropout is what keeps them apart.
    alone = _as_loops([ordinary.get(miss.anchor, miss) for miss in missed], paths, copy)
    apart = {miss.anchor: miss for miss in alone if ordinary.get(miss.anchor) is miss}
    return [apart.get(miss.anchor, miss) for miss in kept]


def _is_ordinary_without_dropout(path: list[Value], outside: frozenset[Value]) -> bool:
    """Whether a candidate is an ordinary network if its hidden units are not dropped."""
    reasons = []
    for root in path:
        try:
            check_form(read_output(root, outside, without_dropout=True), root)
            return False
        except Declined as declined:
            reasons.append(declined.reason)
    return max(reasons, key=_tells).kind is Kind.PLAIN_FFN


def _merges(output: Value, copy: CanonicalCopy) -> dict[Value, Value]:
    """The node that merges an output with others, and the first reader on the way to it.

    The search ends after a few operations and at any other projection.
    """
    found: dict[Value, Value] = {}
    todo = [(reader, reader) for reader in output.readers]
    for _ in range(_SOON):
        if not todo:
            break
        value, first = todo.pop(0)
        if not copy.is_live(value):
            continue
        if value.op in MERGES:
            if value is not first:
                found.setdefault(_grown(value), first)
        elif value.op not in MATRIX_PRODUCTS:
            todo += [(reader, first) for reader in value.readers]
    return found


def _grown(value: Value) -> Value:
    """What a tensor that grows piece by piece has become in the end."""
    while (whole := next((r for r in value.readers if grows_into(value, r)), None)) is not None:
        value = whole
    return value


def _may_contain_site(gm: fx.GraphModule) -> bool:
    """Whether the graph has at least two calls that may be contractions, by their names."""
    return sum(map(may_be_product_call, gm.graph.nodes)) > 1


def _anchors(copy: CanonicalCopy) -> Iterator[Value]:
    """Live contractions with an operand that is computed by an activation.

    A softmax is taken for one between products with weights: of products of tokens with tokens, and
    a softmax, attention is made. Weights that are no parameters may be tokens; but attention
    activates nothing after its softmax, and multiplies it with no other projection.
    """
    flags: dict[Value, int] = {}
    of_tokens: set[Value] = set()
    weighed: set[Value] = set()  # products with weights, and what is computed from them
    for value in copy.values:
        if (value.op in (INPUT, OPAQUE) and not value.is_parameter) or not of_tokens.isdisjoint(
            value.operands
        ):
            of_tokens.add(value)
        if value.op in MATRIX_PRODUCTS:
            if not of_tokens.issuperset(value.operands):
                weighed.add(value)
        elif not weighed.isdisjoint(value.operands):
            weighed.add(value)
        inherited = 0
        for operand in value.operands:
            inherited |= flags.get(operand, 0)
        contraction = _contraction(value)
        if value.op in MATRIX_PRODUCTS or contraction is not None:
            activated = inherited & _ACTIVATED
            activated |= inherited & _SOFTENED and not of_tokens.issuperset(value.operands)
            gated = _ATTENDING | _PROJECTED
            activated |= any(flags.get(one, 0) & gated == gated for one in value.operands)
            if activated and copy.is_live(value):
                yield value
            outer = contraction is not None and contraction.is_product
            flags[value] = inherited if outer else _PROJECTED
        elif is_view(value) or value.op in LINEAR | MERGES | _PASSED_ON:
            flags[value] = inherited
        elif value.op is aten._softmax.default:
            soft = _SOFTENED if value in weighed else _ATTENDING
            flags[value] = soft if inherited else 0
        elif _is_pointwise(value):
            flags[value] = _ACTIVATED if inherited else 0
        elif value.op == OPAQUE:
            product = is_product_call(value.origin)
            if product and inherited & _ACTIVATED and copy.is_live(value):
                yield value  # of a subclass, or written over one of its operands
            if product:
                flags[value] = _PROJECTED
            elif value.subclass:
                flags[value] = _ACTIVATED if inherited else 0
            else:
                flags[value] = _passed_on(value, copy, flags)
        elif _may_be_activation(value, flags):
            flags[value] = _ACTIVATED
        else:
            flags[value] = inherited if _keeps_form(value, flags) else 0


def _passed_on(value: Value, copy: CanonicalCopy, flags: dict[Value, int]) -> int:
    """Whether the result of a higher-order operation may be hidden units or a projection.

    Such operations are an ``autograd.Function`` of gate and up projection, or a hook on a tensor.
    """
    given = [one for one in copy.made_from.get(value, value.operands) if one.shape == value.shape]
    activated = any(flags.get(one, 0) & _ACTIVATED for one in given)
    projected = sum(flags.get(one, 0) & _PROJECTED for one in given)
    return _ACTIVATED if activated or projected == 2 else _PROJECTED if projected == 1 else 0


def _may_be_activation(value: Value, flags: dict[Value, int]) -> bool:
    """Whether somebody's own op may make hidden units: of projections, packed in one or as two."""
    if isinstance(value.op, str) or value.op.namespace in ("aten", "prims"):
        return False
    projected = 0 < len(value.operands) <= 2 and all(
        flags.get(one, 0) & _PROJECTED and one.shape[:-1] == value.shape[:-1]
        for one in value.operands
    )
    return projected and value.operands[0].shape[-1] in (value.shape[-1], 2 * value.shape[-1])


def _keeps_form(value: Value, flags: dict[Value, int]) -> bool:
    """Whether an operation of ATen returns numbers in the form of a projection or of hidden units.

    A dimension may have become one, so as to be expanded again. What attends to tokens is none, and
    a batch norm is for convolutions.
    """
    name = str(value.op)
    if isinstance(value.op, str) or "attention" in name or "batch_norm" in name:
        return False
    if value.op.namespace != "aten" or not value.dtype.is_floating_point:
        return False
    shapes = [one.shape for one in value.operands if flags.get(one, 0)]
    return any(
        len(shape) == len(value.shape)
        and all(mine in (1, other) for mine, other in zip(value.shape, shape, strict=True))
        and value.shape[-1] == shape[-1]
        for shape in shapes
    )


def _is_pointwise(value: Value) -> bool:
    known = value.op in POINTWISE or value.op is aten.glu.default
    return known or is_other_pointwise(value)


def _contraction(value: Value) -> Contraction | None:
    return as_contraction(value, tuple(axis_form(Axis(size)) for size in value.shape))


def _projections_of(anchor: Value) -> set[Value]:
    """The contractions that an anchor reads through views and pointwise operations."""
    return {value for value in _read_pointwise(anchor) if value.op in MATRIX_PRODUCTS}


def _belongs_to(site: Site, anchor: Value) -> bool:
    """Whether an anchor is inside a site, or what is activated in it is a site's output."""
    return anchor in site.replaces or site.output in _read_pointwise(anchor)


def _read_pointwise(anchor: Value) -> set[Value]:
    """All values that an anchor reads through views, pointwise operations and norms."""
    seen: set[Value] = set()
    todo = list(anchor.operands)
    while todo:
        value = todo.pop()
        if value not in seen:
            seen.add(value)
            if is_view(value) or value.op in _PASSED_ON or _is_pointwise(value):
                todo += value.operands
    return seen


def _path(anchor: Value, copy: CanonicalCopy, inside: set[Value]) -> list[Value]:
    """The candidates for the output above an anchor, through which all that reads it goes.

    The output of one head may have more readers than what merges the heads. What lies between
    readers of different parts and the value in which they meet is added to ``inside``.
    """
    path = [anchor, *_views_of_its_node(anchor, copy)]
    while True:
        between: set[Value] = set()
        reader = None if path[-1] in copy.escaping else _meeting(path[-1], copy, between)
        reader = reader or _merge_of(path[-1], copy)
        if reader is None or not is_outside_operation(reader):
            return path
        inside |= between
        path.append(reader)


def _views_of_its_node(value: Value, copy: CanonicalCopy) -> list[Value]:
    """The views of a contraction up to the one that its node has returned, lowest first.

    They may have no live reader, where that is overwritten next.
    """
    views: list[Value] = []
    current = copy.value_of.get(value.origin, value)
    while is_view(current):  # as no contraction is
        views.append(current)
        current = current.source
    return views[::-1] if current is value else []


def _merge_of(value: Value, copy: CanonicalCopy) -> Value | None:
    """The first that merges a value with others."""
    merges = (reader for reader in value.readers if reader.op in MERGES and copy.is_live(reader))
    return next((reader for reader in merges if len(set(reader.args[0])) > 1), None)


def _meeting(value: Value, copy: CanonicalCopy, between: set[Value]) -> Value | None:
    """The first value through which all that reads this one's numbers goes: often its only reader.

    Parts of a batched product are read one by one, and meet in a sum or where they are merged.
    What lies between, which the grammar has rules for, is added to ``between``.
    """
    todo = _readers(value, copy)
    while len(todo) > 1:
        # Operands come first in the order of execution: all that may meet in it is known by then.
        first = min(todo, key=lambda one: one.step)
        if first in copy.escaping or not is_outside_operation(first):
            return None
        between.add(first)
        todo = (todo - {first}) | _readers(first, copy)
    return todo.pop() if todo else None


def _readers(value: Value, copy: CanonicalCopy) -> set[Value]:
    """The live readers of a value's numbers."""
    readers = {reader for reader in value.readers if copy.is_live(reader)}
    return {reader for reader in readers if not _reads_sizes(reader, copy)}


def _reads_sizes(value: Value, copy: CanonicalCopy) -> bool:
    """Whether a reader, or the readers of a view or a cast, use sizes alone."""
    if not (is_view(value) or is_cast(value)) or value in copy.escaping:
        return value.op in LIKES
    return all(_reads_sizes(reader, copy) for reader in value.readers if copy.is_live(reader))


def _best(
    path: list[Value],
    outside: frozenset[Value],
    copy: CanonicalCopy,
    tried: dict[Value, Site | Reason],
    outputs: frozenset[Value],
) -> Site | Reason:
    """The site of the highest candidate that passes, or the most telling reason why none does."""
    reasons: list[Reason] = []
    for root in reversed(path):
        if root not in tried or (isinstance(tried[root], Reason) and _adds_to(root, outputs)):
            tried[root] = _try(root, outside, copy, outputs)
        result = tried[root]
        if isinstance(result, Site):
            return result
        if not _is_unfinished(root):  # as the anchor never is
            reasons.append(result)
    best = max(reversed(reasons), key=_tells)
    if best.detail == TWO_DIMENSIONS:
        return _not_summed(path, reasons, copy) or _parts_apart(path[-1], copy) or best
    return best


def _is_unfinished(value: Value) -> bool:
    """Whether a buffer is written to again: that it is not full yet tells nothing."""
    return value.op is SCATTER and any(reader.op is SCATTER for reader in value.readers)


def _not_summed(path: list[Value], reasons: list[Reason], copy: CanonicalCopy) -> Reason | None:
    """The operation between the outputs of sub-networks and their later sum, if there is one.

    Below it, each sub-network is a network of its own, which differs along heads and sub-networks.
    """
    offends = [r for r in reasons if r.kind is Kind.UNKNOWN_OPERATION and r.detail]
    value = path[-1]
    if offends and any(one.op in (aten.sum.dim_IntList, aten.mean.dim) for one in path[1:]):
        return offends[-1]
    for _ in range(_SOON):
        readers = [reader for reader in value.readers if copy.is_live(reader)]
        if not readers or readers[0].op in MATRIX_PRODUCTS or value in copy.escaping:
            return None
        reduces = len(readers[0].shape) < len(value.shape) and not is_view(readers[0])
        value = readers[0]
        if not (offends or is_outside_operation(value)):
            offends = [Reason(Kind.UNKNOWN_OPERATION, operation_name(value), value.origin)]
        if reduces:
            return offends[-1] if offends else None
    return None


def _parts_apart(value: Value, copy: CanonicalCopy) -> Reason | None:
    """Why parts of a value that are put together are not all of it: what is done with others.

    Parts of a batched product are sub-networks where all that are read are added.
    """
    changes = _changes_after(value, copy)
    together: set[Value] = set()
    for one, change in changes.items():
        parts = changes.keys() & set(one.operands)
        if len(parts) > 1 and (one.op in _PLAIN_SUMS | MERGES or change is not None):
            changed = next((changes[x] for x in (*parts, one) if changes[x] is not None), None)
            if changed is not None:
                return Reason(Kind.UNKNOWN_OPERATION, operation_name(changed), changed.origin)
            together.add(one)
    if not together:
        return None
    for one in changes:
        if one in together:
            continue
        if one in copy.escaping:
            return Reason(Kind.ESCAPING_INTERMEDIATE, "a part is returned", one.origin)
        for reader in _readers(one, copy):
            if reader.op in MATRIX_PRODUCTS or not is_outside_operation(reader):
                detail = f"a part is read by {operation_name(reader)}"
                return Reason(Kind.ESCAPING_INTERMEDIATE, detail, reader.origin)
    if all(one.op not in _PLAIN_SUMS for one in together):
        return None
    return Reason(Kind.ESCAPING_INTERMEDIATE, "its parts are in several sums", value.origin)


def _changes_after(value: Value, copy: CanonicalCopy) -> dict[Value, Value | None]:
    """What is made of a value without a product, each with the operation that changed it first.

    Views, sums and the like change nothing.
    """
    changes: dict[Value, Value | None] = {value: None}
    todo = {value}
    for _ in range(_SOON):
        if not todo:
            break
        one = min(todo, key=lambda each: each.step)
        todo.remove(one)
        for reader in _readers(one, copy):
            if reader.op not in MATRIX_PRODUCTS and reader not in changes:
                unchanged = changes[one] is None and is_outside_operation(reader)
                changes[reader] = None if unchanged else changes[one] or reader
                todo.add(reader)
    return changes


def _adds_to(root: Value, outputs: frozenset[Value]) -> bool:
    """Whether a product is added to a site's output, so that reading it again may succeed.

    No candidate below has the product without what it is added to.
    """
    return root.op in MATRIX_PRODUCTS and not outputs.isdisjoint(root.operands)


def _try(
    root: Value, outside: frozenset[Value], copy: CanonicalCopy, outputs: frozenset[Value]
) -> Site | Reason:
    held = copy.made_by(root) is not None
    levels = copy.levels.get(root.origin, ())
    if not held and not levels:
        kind = Kind.FUNCTION_TRANSFORM if levels is None else Kind.UNKNOWN_OPERATION
        return Reason(kind, "", root.origin)

    def read(repeated: frozenset[Value], repetitions: set[Value]) -> Site | Reason:
        try:
            reading = read_output(
                root,
                outside,
                outputs,
                lambda one: copy.made_by(one) is not None,
                repeated=repeated,
                repetitions=repetitions,
            )
            if held:
                return build_site(reading, root, copy)
            check_form(reading, root)
        except Declined as declined:
            return declined.reason
        # No node has it without its gradients.
        return Reason(Kind.FUNCTION_TRANSFORM, "", root.origin)

    repetitions: set[Value] = set()
    result = read(frozenset(), repetitions)
    if isinstance(result, Site) or not repetitions:
        return result
    # What is read through a repetition lacks axes: of tokens, of heads that share queries.
    return read(frozenset(repetitions), set())


def _tells(reason: Reason) -> tuple[int, bool]:
    """How telling a reason is: least for a candidate that is too high.

    For one that is too low, before the sum over sub-networks, weights and tokens share dimensions;
    that is telling only if no other candidate got further. A projection that is added explains why
    the candidates below it are no site, as it reads hidden units as well.
    """
    ranks: dict[Kind | Unreadable, int] = {
        Kind.UNKNOWN_OPERATION: 0,
        Kind.PLAIN_FFN: 1,
        Kind.NOT_A_PRODUCT: 2,
        Kind.TOKEN_DEPENDENT_WEIGHTS: 3,
        Kind.ADDED_PROJECTIONS: 5,
    }
    rank = ranks.get(reason.kind, 4)
    return rank, rank == 0 and reason.detail != ""
