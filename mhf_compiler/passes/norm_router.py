"""The norm of the queries, the product before their router and its activation, as one op.

In inference these are three memory-bound kernels before the op. A pass over Inductor's graph
replaces them by a call of ``norm_and_route`` (lowering/ops/norm_router.py), which normalises
queries in place. It reads that graph because there every spelling of a norm has become the same
few operations, and because it shows who reads what:

    wide   = query as float32
    scale  = rsqrt(mean(wide * wide) + number)
    q      = wide * scale                    rounded to the queries' dtype
             (wide * scale) * weight         rounded
             rounded(wide * scale) * weight  rounded
    logits = router_product(q, ..)
    r      = logits | sigmoid(logits) | sigmoid(logits) / (sum, clamped or with a number added),
             rounded or not

             becomes

    r, q   = norm_and_route(query, weight, .., routing="sigmoid")

in any order of the factors. q and the logits may be followed by views that drop or add dimensions
of size one, which the edit inserts for a single sequence. A norm that rounds at other places is
declined: the op has to compute what the graph says. A call is inserted if all of this holds:

- only the network and the router's product read q, and nothing else reads what lies between it and
  the query; the op ends at the first result on the way to r that something else reads;
- the query is dense, fills its storage, and has the strides of q; the storage belongs to no input,
  and only the norm reads it. So not in training, where the backward pass reads it.

The call is inserted in functional form, like those of overwrite.py, whose pass runs after this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from ..compat import has_symbols, named_arguments, statically_known_true
from ..lowering.ops.router import NARROW_DTYPES, WEIGHT_DTYPES
from .functional import (
    call_over,
    item_of,
    replace_by_item,
    replace_with_views,
    runs,
    viewed,
)
from .memory import (
    Memory,
    is_call_of,
    strides_are_equal,
    takes_the_same_memory,
    unit_view_of,
    views_down_to,
)
from .outcome import Declined, Fusion, Obstacle, declined, fused, require

_DEVICES = ("cuda",)  # on a CPU Inductor's own loops are as good

_aten = torch.ops.aten


class _Norm(NamedTuple):
    """How q is computed."""

    wide: fx.Node  # the query in float32
    weight: fx.Node | None
    eps: float
    rounds_first: bool  # before the weight, and again after it
    inside: list[fx.Node]  # all between the query and q

    @property
    def query(self) -> fx.Node:
        return self.wide.args[0]  # type: ignore[return-value]


class _Routing(NamedTuple):
    """How weights are computed from the logits, up to a node that the op may replace."""

    result: fx.Node
    views: tuple[fx.Node, ...] = ()  # of the logits, before anything else
    name: str = "none"
    sum_floor: float = 0.0  # sigmoids are positive
    sum_eps: float = 0.0
    inside: tuple[fx.Node, ...] = ()  # all between the logits and the result, with the logits


class _Site(NamedTuple):
    q: fx.Node
    views: list[fx.Node]  # of q, down to what the product reads
    seen: list[fx.Node]  # what the product and the networks read, which all look alike
    product: fx.Node  # that reads q, and makes the logits
    norm: _Norm
    routing: _Routing

    def constants(self) -> tuple[Any, ...]:
        """The op's arguments after the tensors, up to the dtype of r."""
        norm, routing = self.norm, self.routing
        return (
            *(norm.eps, norm.rounds_first),
            *(routing.name, routing.sum_floor, routing.sum_eps, _example(routing.result).dtype),
        )


_OP = "norm_and_route"


def fuse_norm_router(graph: fx.Graph) -> list[Fusion]:
    """Replace a norm of queries and their router by one op."""
    outcomes = []
    for product in [node for node in graph.nodes if is_call_of(node, "router_product")]:
        memory = Memory(graph)  # again: what one site makes, the next may read
        try:
            site = _read(product, memory)
            _check_kernel(site)
        except Declined as reason:
            outcomes.append(declined(_OP, product, reason))
            continue
        outcomes.append(fused(_OP, product))
        _replace(graph, site, memory)
    return outcomes


def _read(product: fx.Node, memory: Memory) -> _Site:
    """What computes and reads the argument of a router's product.

    Raises:
        Declined: the op cannot replace it.
    """
    from ..lowering.ops.norm_router import MOST_HEAD_DIM

    argument = named_arguments(product)["q"]
    example = _example(argument)
    require(example.device.type in _DEVICES, Obstacle.DEVICE)
    require(example.dtype in NARROW_DTYPES, Obstacle.DTYPE)
    require(statically_known_true(example.shape[3] <= MOST_HEAD_DIM), Obstacle.WIDE_HEADS)
    views = views_down_to(argument)
    q = unit_view_of(views[0]) if views else argument
    assert q is not None
    readers = _readers(q)
    for reader, seen in readers:
        require(_reads_as_query(reader, seen, product, memory), Obstacle.READ_ELSEWHERE, reader)
    norm = _norm_of(q, example)
    if norm is None:
        raise Declined(Obstacle.NO_NORM)
    known = memory.readers_of(norm.query)
    if known is None:
        raise Declined(Obstacle.INPUT)
    require(known == {norm.wide}, Obstacle.READ_ELSEWHERE)
    require(takes_the_same_memory(norm.query, _example(q)), Obstacle.DIFFERENT_LAYOUT)
    between = {*norm.inside, q}
    outside = [reader for node in norm.inside for reader in node.users if reader not in between]
    require(not outside, Obstacle.INTERMEDIATE_READ, next(iter(outside), None))
    routing = list(_routings_of(product))[-1]
    return _Site(q, views, list(dict.fromkeys(seen for _, seen in readers)), product, norm, routing)


def _readers(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads a node or such a view of it, and which of them."""
    found, rest = [], [node]
    while rest:
        seen = rest.pop()
        for reader in seen.users:
            if reader.users and unit_view_of(reader) is seen:
                rest.append(reader)
            else:
                found.append((reader, seen))
    return found


def _reads_as_query(reader: fx.Node, seen: fx.Node, product: fx.Node, memory: Memory) -> bool:
    """Whether a node is the product, or a network after it, that reads the same queries.

    As its queries only, and in the same shape.
    """
    if reader is not product and not (
        is_call_of(reader, "multi_head_ffn") and memory.position[reader] > memory.position[product]
    ):
        return False
    shapes = (_example(seen).shape, _example(named_arguments(product)["q"]).shape)
    return (
        [name for name, value in named_arguments(reader).items() if value is seen] == ["q"]
        and len(shapes[0]) == len(shapes[1])
        and all(statically_known_true(one == other) for one, other in zip(*shapes, strict=True))
    )


# The norm, from its result on.


def _norm_of(q: fx.Node, seen: torch.Tensor) -> _Norm | None:
    """How q is computed, of which the op sees a view like ``seen``, (B, L, H, d)."""
    dtype = _example(q).dtype
    unrounded = _cast_from(q, dtype)
    if unrounded is not None:
        found = _scaled(unrounded)
        if found is not None:
            wide, eps, inside = found
            return _Norm(wide, None, eps, False, [*inside, unrounded])
        if _example(unrounded).dtype is not torch.float32:
            return None
    product = q if unrounded is None else unrounded
    for normed, weight in _factors(product):
        rounded = _cast_from(normed, dtype)
        found = _scaled(normed if rounded is None else rounded)
        if found is None or not _is_weight(weight, q, seen):
            continue
        wide, eps, inside = found
        inside += [normed] if rounded is None else [rounded, normed]
        inside += [] if unrounded is None else [unrounded]
        return _Norm(wide, weight, eps, rounded is not None, inside)
    return None


def _scaled(node: fx.Node) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """Of ``wide * rsqrt(mean(wide * wide) + eps)``: wide, eps, and the nodes within."""
    for wide, scale in _factors(node):
        narrow = _cast_from(wide, torch.float32)
        if narrow is None or _example(narrow).dtype not in NARROW_DTYPES:
            continue
        shifted = _argument(scale, _aten.rsqrt.default)
        mean = _argument(shifted, _aten.add.Scalar, _aten.add.Tensor)
        square = _over_last_dim(mean, _aten.mean.dim)
        eps = None if mean is None else _number_added(shifted)
        if eps is not None and square is not None and _is_square(square, wide):
            return wide, eps, [wide, square, mean, shifted, scale]  # type: ignore[list-item]
    return None


def _is_square(node: fx.Node, of: fx.Node) -> bool:
    if node.target is _aten.pow.Tensor_Scalar:
        return node.args[0] is of and node.args[1] in (2, 2.0)
    return node.target is _aten.mul.Tensor and node.args[0] is of and node.args[1] is of


def _is_weight(node: fx.Node, q: fx.Node, seen: torch.Tensor) -> bool:
    """Whether a factor of q has the shape (d) or (H, d)."""
    weight, shape = _example(node), _example(q).shape
    if weight.dim() not in (1, 2) or weight.dim() > len(shape) or weight.dtype not in WEIGHT_DTYPES:
        return False
    return all(
        statically_known_true(weight.shape[i] == other[i])
        for i in range(-weight.dim(), 0)
        for other in (shape, seen.shape)
    )


# The weights, from the logits on.


def _routings_of(product: fx.Node) -> Iterator[_Routing]:
    """Chains of increasing length that begin at the logits and that nothing else reads."""
    yield _Routing(product)
    readers = _readers(product)
    if len(readers) != 1:
        return
    ((_, logits),) = readers  # perhaps a view of them
    views = tuple(views_down_to(logits))
    last = _Routing(logits, views, inside=(product, *views[:-1]))
    for longer in _activations(last):
        if strides_are_equal(_example(longer.result), _example(logits)):
            yield longer


def _activations(last: _Routing) -> Iterator[_Routing]:
    logits = last.result
    activated = _only_reader(logits)
    if activated is not None and activated.target is _aten.sigmoid.default:
        inside = (*last.inside, logits)
        last = last._replace(result=activated, name="sigmoid", inside=inside)
        yield last
        normalised = _normalised(last)
        if normalised is not None:
            last = normalised
            yield last
    rounded = _only_reader(last.result)
    if rounded is not None and _cast_from(rounded, *NARROW_DTYPES) is not None:
        yield last._replace(result=rounded, inside=(*last.inside, last.result))


def _normalised(last: _Routing) -> _Routing | None:
    """The quotient of sigmoids by their sum, if nothing else reads the sigmoids."""
    activated = last.result
    if len(activated.users) != 2:
        return None
    total = next((n for n in activated.users if n.target is _aten.sum.dim_IntList), None)
    if _over_last_dim(total, _aten.sum.dim_IntList) is None:
        return None
    divisor: fx.Node = total  # type: ignore[assignment]
    inside = [*last.inside, activated, divisor]
    floor: Any = 0.0
    eps: Any = 0.0
    reader = _only_reader(divisor)
    if reader is not None and reader.target is _aten.clamp_min.default:
        floor, divisor = reader.args[1], reader
        inside.append(divisor)
        reader = _only_reader(divisor)
    if reader is not None and _argument(reader, _aten.add.Scalar, _aten.add.Tensor) is divisor:
        eps, divisor = _number_added(reader), reader
        inside.append(divisor)
        reader = _only_reader(divisor)
    if not (_is_number(floor) and _is_number(eps)):
        return None
    if reader is None or reader.target is not _aten.div.Tensor:
        return None
    if reader.args != (activated, divisor):  # so it is the second reader of the sigmoids
        return None
    return last._replace(
        result=reader,
        name="normalised",
        sum_floor=float(floor),
        sum_eps=float(eps),
        inside=tuple(inside),
    )


# Single nodes.


def _example(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _argument(node: Any, *targets: Any) -> fx.Node | None:
    """The first argument of a call of one of these functions."""
    if not isinstance(node, fx.Node) or node.target not in targets or not node.args:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _cast_from(node: fx.Node, *dtypes: torch.dtype) -> fx.Node | None:
    """What a node casts to one of these dtypes."""
    source = _argument(node, torch.ops.prims.convert_element_type.default)
    return source if source is not None and node.args[1] in dtypes else None


def _factors(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The factors of a product of two tensors, in both orders."""
    if node.target is _aten.mul.Tensor:
        one, other = node.args
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            yield one, other
            yield other, one


def _number_added(node: Any) -> float | None:
    """What a call of ``add`` adds to its first argument, if that is a number."""
    arguments = named_arguments(node)
    number = arguments["other"]
    return float(number) if _is_number(number) and arguments["alpha"] == 1 else None


def _over_last_dim(node: Any, target: Any) -> fx.Node | None:
    """What a call of a sum or mean, in float32, reduces over the last dimension."""
    source = _argument(node, target)
    if source is None:
        return None
    arguments = named_arguments(node)
    last = _example(source).dim() - 1
    over_last = list(arguments["dim"] or []) in ([-1], [last]) and arguments["keepdim"]
    as_it_is = arguments["dtype"] in (None, torch.float32)
    return source if over_last and as_it_is else None


# The call.


def _check_kernel(site: _Site) -> None:
    """The kernel must run on this machine."""
    from ..lowering.ops.norm_router import trial_run

    q, weight = (_example(named_arguments(site.product)[name]) for name in ("q", "weight"))
    norm_weight = None if site.norm.weight is None else _example(site.norm.weight)
    # Comparing a dynamic size would specialise it.
    dynamic = any(has_symbols(x.shape) for x in (weight, norm_weight) if x is not None)
    require(not dynamic, Obstacle.DYNAMIC_SIZES)
    ran = runs(
        "the norm before a router",
        site.product,
        trial_run,
        q.dtype,
        int(q.shape[2]),
        None if norm_weight is None else (norm_weight.dtype, _sizes(norm_weight)),
        (weight.dtype, _sizes(weight)),
        site.constants(),
        q.device,
    )
    require(ran, Obstacle.KERNEL_FAILED)


def _sizes(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in x.shape)


def _replace(graph: fx.Graph, site: _Site, memory: Memory) -> None:
    norm, routing = site.norm, site.routing
    product = named_arguments(site.product)
    names = ("norm_eps", "rounds_first", "routing", "sum_floor", "sum_eps", "r_dtype")
    op = torch.ops.mhf_compiler.norm_and_route.default
    with graph.inserting_before(site.product):
        query = viewed(norm.query, site.views)
        arguments = {"q": query, "norm_weight": norm.weight, "weight": product["weight"]}
        arguments |= dict(zip(names, site.constants(), strict=True))
        arguments |= {"out_order": product["out_order"]}
        call = call_over(graph, site.product, op, arguments)
        r = viewed(item_of(site.product, call, 0), routing.views)
        replace_with_views(routing.result, r)
        for seen in site.seen:
            replace_by_item(seen, call, 1)  # the argument follows what the op returns
    replaced = {*norm.inside, site.q, *site.seen, *routing.inside, routing.result, site.product}
    for seen in site.seen:
        replaced |= {*views_down_to(seen)}
    for node in sorted(replaced, key=memory.position.__getitem__, reverse=True):
        graph.erase_node(node)
