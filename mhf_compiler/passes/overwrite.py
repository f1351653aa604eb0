"""Reuse dead buffers: let the op write its result over an input that is no longer needed.

In inference the queries are dead after the op; in the backward pass, so is the gradient of its
result. Each has exactly the size of the tensor that the op writes. The op itself stays functional,
in Dynamo's graph and through autograd. Only when the readers of every tensor are known, just before
Inductor decides what is written in place, are calls replaced by calls of mutating ops.

They are inserted in the functional form that PyTorch has for such ops: Inductor copies an argument
that has another reader in the graph. Such a copy would take more memory than before, and Inductor
does not see late readers: nodes that it inlines into their readers. So a call is replaced only if
all of this holds, and the last condition is what makes the result right:

- what is overwritten is dense, fills its storage, and has the dtype, the shape and the strides of
  the result;
- its storage belongs to no input or parameter, and to no other argument;
- nothing reads it after the op, the graph's output included, and nothing that Inductor may inline
  into a later node has read it.

A router that reads the queries contributes to their gradient, in another tensor of that size. If
both parts are only read by their sum, the router's backward pass adds its part in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import fx

from ..compat import named_arguments
from .functional import call_over, replace_by_item
from .memory import Memory, is_call_of, takes_the_same_memory
from .outcome import Declined, Fusion, Obstacle, declined, fused, require

_OVER_QUERY = "multi_head_ffn_over_query"
_OVER_GRADIENT = "multi_head_ffn_backward_over_gradient"
_ONTO = "router_product_backward_onto"


def overwrite_dead_buffers(graph: fx.Graph) -> list[Fusion]:
    """Let the op write over the queries, and its backward pass over the gradient that it read.

    Before and after:

        out = multi_head_ffn(q, ..)                  out = multi_head_ffn_over_query(q, ..)
        dq, .. = multi_head_ffn_backward(dout, ..)   dq, .. = multi_head_ffn_backward_over_gradient
        dq + router_product_backward(..)[0]          router_product_backward_onto(.., dq)
    """
    outcomes = _add_parts_in_place(graph)
    calls = list(_calls(graph))
    if not calls:
        return outcomes
    memory = Memory(graph)
    # All are judged before the first is replaced: ``memory`` does not know new nodes.
    judged = [(call, _judge(call, memory)) for call in calls]
    for call, outcome in judged:
        if outcome.obstacle is None:
            call.replace(graph, call.node)
    return outcomes + [outcome for _, outcome in judged]


class _Call(NamedTuple):
    """A call whose result could take the place of an argument."""

    node: fx.Node
    op: str
    check: Callable[[fx.Node, Memory], None]
    replace: Callable[[fx.Graph, fx.Node], None]


def _calls(graph: fx.Graph) -> Iterator[_Call]:
    for node in graph.nodes:
        if is_call_of(node, "multi_head_ffn"):
            yield _Call(node, _OVER_QUERY, _check_query, _write_over_query)
        elif is_call_of(node, "multi_head_ffn_backward") and named_arguments(node)["needs"][0]:
            yield _Call(node, _OVER_GRADIENT, _check_gradient, _write_over_gradient)


def _judge(call: _Call, memory: Memory) -> Fusion:
    try:
        call.check(call.node, memory)
    except Declined as reason:
        return declined(call.op, call.node, reason)
    return fused(call.op, call.node)


def _check_query(node: fx.Node, memory: Memory) -> None:
    q = named_arguments(node)["q"]
    require(takes_the_same_memory(q, node.meta.get("val")), Obstacle.DIFFERENT_LAYOUT)
    memory.require_dead_after(q, node)


def _check_gradient(node: fx.Node, memory: Memory) -> None:
    grad_out, gradients = named_arguments(node)["grad_out"], node.meta.get("val", ())
    items = all(reader.target is operator.getitem for reader in node.users)
    require(items, Obstacle.READ_ELSEWHERE)
    same = takes_the_same_memory(grad_out, next(iter(gradients), None))
    require(same, Obstacle.DIFFERENT_LAYOUT)
    memory.require_dead_after(grad_out, node)


def _write_over_query(graph: fx.Graph, node: fx.Node) -> None:
    arguments = named_arguments(node)
    for name in ("out_order", "out_dtype"):  # they are those of q
        del arguments[name]
    op = torch.ops.mhf_compiler.multi_head_ffn_over_query.default
    with graph.inserting_before(node):
        call = call_over(graph, node, op, arguments)
        replace_by_item(node, call, 1)  # item 0 is what the op returns, which is nothing
    graph.erase_node(node)


def _write_over_gradient(graph: fx.Graph, node: fx.Node) -> None:
    arguments = named_arguments(node)
    op = torch.ops.mhf_compiler.multi_head_ffn_backward_over_gradient.default
    wanted = [i for i, needed in enumerate(arguments["needs"]) if needed]
    with graph.inserting_before(node):
        call = call_over(graph, node, op, arguments)
        for reader in list(node.users):
            (_, index) = reader.args
            which = wanted[int(index)]  # type: ignore[arg-type]
            # The overwritten argument follows the gradients of all arguments except the queries.
            item = len(arguments["needs"]) - 1 if which == 0 else which - 1
            replace_by_item(reader, call, item)
            graph.erase_node(reader)
    graph.erase_node(node)


def _add_parts_in_place(graph: fx.Graph) -> list[Fusion]:
    """Let routers' backward passes add to a gradient of the queries that was computed before."""
    calls = [
        node
        for node in graph.nodes
        if is_call_of(node, "router_product_backward") and named_arguments(node)["needs"][0]
    ]
    computed = set()  # gradients of queries, by the op or by a call that was replaced here
    for node in graph.nodes:
        if is_call_of(node, "multi_head_ffn_backward") and named_arguments(node)["needs"][0]:
            computed |= set(_items(node, 0))
    outcomes = []
    for node in calls:
        try:
            part, total = _sum_of(node, computed)
        except Declined as reason:
            outcomes.append(declined(_ONTO, node, reason))
            continue
        outcomes.append(fused(_ONTO, node))
        computed.add(_add_onto(graph, node, part, total))
    return outcomes


def _items(node: fx.Node, index: int) -> list[fx.Node]:
    """The readers of one of the tensors that a call returns."""
    return [x for x in node.users if x.target is operator.getitem and x.args[1] == index]


def _sum_of(node: fx.Node, computed: set[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """A call's part of the gradient, and the sum that adds it to one computed before.

    Raises:
        Declined: there is no such sum, or something else reads what it adds.
    """
    parts = _items(node, 0)
    totals = [total for part in parts for total in part.users]
    require(len(totals) == 1, Obstacle.NOT_ADDED)
    part, total = parts[0], totals[0]
    plain = not total.kwargs and len(total.args) == 2
    require(total.target is torch.ops.aten.add.Tensor and plain, Obstacle.NOT_ADDED)
    left, right = total.args
    onto = left if right is part else right
    if not (isinstance(onto, fx.Node) and onto in computed and onto < node):
        raise Declined(Obstacle.NOT_ADDED)
    require(len(onto.users) == 1, Obstacle.READ_ELSEWHERE)
    alike = onto.meta["val"].dtype is part.meta["val"].dtype
    alike = alike and takes_the_same_memory(onto, total.meta["val"])
    require(alike, Obstacle.DIFFERENT_LAYOUT)
    return part, total


def _add_onto(graph: fx.Graph, node: fx.Node, part: fx.Node, total: fx.Node) -> fx.Node:
    """Add in place, and return the sum."""
    arguments = named_arguments(node)
    (onto,) = set(total.args) - {part}
    (_, needs_weight) = arguments.pop("needs")
    arguments |= {"dq": onto, "needs_weight": needs_weight}
    op = torch.ops.mhf_compiler.router_product_backward_onto.default
    with graph.inserting_before(node):
        call = call_over(graph, node, op, arguments)
        for reader in _items(node, 1):
            replace_by_item(reader, call, 0)
            graph.erase_node(reader)
        result = replace_by_item(total, call, 1)  # the argument follows what the op returns
    for old in (total, part, node):
        graph.erase_node(old)
    return result
