"""A norm, a router and the network that reads both, as one op.

The last pass over Inductor's graph. After the other two, a network may appear there as two calls
that write to the same memory:

    before   r, q = norm_and_route(query, ..)              from norm_router.py
             out  = multi_head_ffn_over_query(q, .., r)    from overwrite.py
    after    out  = normed_multi_head_ffn_over_query(query, ..)

If nothing else reads q and r, and the machine has a kernel that does all of it, one call of
``normed_multi_head_ffn_over_query`` replaces the two: then the queries are read and written once,
and r is never written.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..compat import auto_functionalized, has_symbols, statically_known_true
from .functional import call_over, replace_by_item, runs
from .memory import views_down_to
from .outcome import Declined, Fusion, Obstacle, declined, fused, require

# The op's arguments after the queries.
_TENSORS = ("norm_weight", "router", "k", "u", "v")
_CONSTANTS = ("norm_eps", "rounds_first", "routing", "sum_floor", "sum_eps", "r_dtype")
_NETWORK = ("activation", "k_scale", "u_scale", "out_scale")


_OP = "normed_multi_head_ffn_over_query"


def fuse_norm_network(graph: fx.Graph) -> list[Fusion]:
    """Replace ``norm_and_route`` and the network after it by one op."""
    outcomes = []
    for network in [node for node in graph.nodes if _calls(node, "multi_head_ffn_over_query")]:
        try:
            router = _router_of(network)
            arguments = _arguments(router, network)
            _check_kernel(network, arguments)
        except Declined as reason:
            outcomes.append(declined(_OP, network, reason))
            continue
        outcomes.append(fused(_OP, network))
        _replace(graph, router, network, arguments)
    return outcomes


def _calls(node: fx.Node, name: str) -> bool:
    """Whether a node is the functional form of a call of one of our ops."""
    op = getattr(torch.ops.mhf_compiler, name, None)
    return node.target is auto_functionalized and op is not None and node.args[0] is op.default


def _router_of(network: fx.Node) -> fx.Node:
    """The call of ``norm_and_route`` whose results this network reads, and nothing else."""
    given = network.kwargs
    q, r = given["q"], given["r"]
    if not isinstance(q, fx.Node) or not isinstance(r, fx.Node):
        raise Declined(Obstacle.NO_NORM_AND_ROUTE)
    views = views_down_to(r)
    weights = views[0].args[0] if views else r
    if not isinstance(weights, fx.Node) or weights.target is not operator.getitem:
        raise Declined(Obstacle.NO_NORM_AND_ROUTE)
    router = weights.args[0]
    if not isinstance(router, fx.Node) or not _calls(router, "norm_and_route"):
        raise Declined(Obstacle.NO_NORM_AND_ROUTE)
    ours = q in router.users and (weights.args[1], q.args[1]) == (0, 1)
    require(ours, Obstacle.NO_NORM_AND_ROUTE)
    items = {item for item in router.users if item.users}
    alone = items == {q, weights} and all(len(node.users) == 1 for node in (q, weights, *views))
    require(alone, Obstacle.READ_ELSEWHERE)
    biased = any(given[name] is not None for name in ("k_bias", "u_bias", "v_bias"))
    require(not biased, Obstacle.BIAS)
    made, read = weights.meta["val"].shape, r.meta["val"].shape
    alike = len(made) == len(read) and all(map(statically_known_true, map(operator.eq, made, read)))
    require(alike, Obstacle.DIFFERENT_LAYOUT)
    return router


def _arguments(router: fx.Node, network: fx.Node) -> dict[str, Any]:
    """The arguments of the op."""
    one, other = router.kwargs, network.kwargs
    return {
        "q": one["q"],
        "norm_weight": one["norm_weight"],
        "router": one["weight"],
        **{name: other[name] for name in ("k", "u", "v")},
        **{name: one[name] for name in _CONSTANTS},
        **{name: other[name] for name in _NETWORK},
    }


def _check_kernel(network: fx.Node, arguments: dict[str, Any]) -> None:
    """There must be a kernel for this machine, and it must run."""
    from ..lowering.ops.norm_network import Like, may_pay, trial_run

    q = arguments["q"].meta["val"]
    tensors = [arguments[name] and arguments[name].meta["val"] for name in _TENSORS]
    # Comparing a dynamic size would specialise it.
    require(not has_symbols([q.shape[2], *tensors]), Obstacle.DYNAMIC_SIZES)
    likes = tuple(x if x is None else Like(x.dtype, *map(tuple, (x.shape, x.stride())))
                  for x in tensors)  # fmt: skip
    tokens = q.shape[0] * q.shape[1]
    known = tokens if isinstance(tokens, int) else None
    k = likes[_TENSORS.index("k")]
    assert k is not None
    pays = may_pay(known, k, arguments["u"] is not None, q.device)
    require(pays, Obstacle.DOES_NOT_PAY)
    constants = tuple(arguments[name] for name in (*_CONSTANTS, *_NETWORK))
    what = "the norm before a network"
    ran = runs(what, network, trial_run, q.shape[2], likes, constants, q.device)
    require(ran, Obstacle.KERNEL_FAILED)


def _replace(graph: fx.Graph, router: fx.Node, network: fx.Node, arguments: dict[str, Any]) -> None:
    op = torch.ops.mhf_compiler.normed_multi_head_ffn_over_query.default
    views = views_down_to(network.kwargs["r"])  # type: ignore[arg-type]
    with graph.inserting_before(network):
        call = call_over(graph, network, op, arguments)
        for item in list(network.users):
            replace_by_item(item, call, 1)  # item 0 is what the op returns, which is nothing
            graph.erase_node(item)
    for node in (network, *reversed(views), *list(router.users), router):
        graph.erase_node(node)
