"""Memory that nobody needs any more, for what the op writes.

In inference the queries are dead behind the op, in the backward pass the gradient of its result is:
each as large as what the op then writes. The op itself stays functional, in Dynamo's graph and
through autograd. Only where Inductor is about to decide what is written in place, when the readers
of every tensor are known, are calls replaced by those of ops that write to an argument.

They are put there in the functional form that PyTorch has for such ops: where Inductor finds
another reader in the graph, it copies. That would take more memory than before, and Inductor does
not see who reads late: what it computes only where it is used, in one kernel with its reader. So a
call is replaced only if all of this holds, and the last of it is what makes the result right:

- what is overwritten is dense, fills its memory, and has the dtype, the shape and the strides that
  the result has;
- its memory is no input's or parameter's, nor that of another argument;
- nothing reads it behind the op, the graph's output included, and nothing that Inductor computes
  late, when it is read, would have read it.

A router that reads the queries has a part in their gradient, another tensor as large. Where both
parts are only read to be added, the router's backward pass adds its own to the op's.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..compat import named_arguments
from .functional import call_over, replace_by_item
from .memory import Memory, takes_the_same_memory


def reuse_memory(graph: fx.Graph) -> None:
    """Let the op write over the queries, and its backward pass over the gradient that it read."""
    _add_parts_in_place(graph)
    ops = torch.ops.mhf_compiler
    replace = {
        ops.multi_head_ffn.default: (_may_write_over_query, _write_over_query),
        ops.multi_head_ffn_backward.default: (_may_write_over_gradient, _write_over_gradient),
    }
    calls = [node for node in graph.nodes if node.target in replace]
    if not calls:
        return
    memory = Memory(graph)
    # All are judged before the first is replaced: new nodes have no place in the graph's memory.
    for node in [node for node in calls if replace[node.target][0](node, memory)]:
        replace[node.target][1](graph, node)


def _may_write_over_query(node: fx.Node, memory: Memory) -> bool:
    q = named_arguments(node)["q"]
    return takes_the_same_memory(q, node.meta.get("val")) and memory.is_dead_after(q, node)


def _may_write_over_gradient(node: fx.Node, memory: Memory) -> bool:
    arguments = named_arguments(node)
    grad_out, gradients = arguments["grad_out"], node.meta.get("val", ())
    return (
        bool(arguments["needs"][0])
        and all(reader.target is operator.getitem for reader in node.users)
        and takes_the_same_memory(grad_out, next(iter(gradients), None))
        and memory.is_dead_after(grad_out, node)
    )


def _write_over_query(graph: fx.Graph, node: fx.Node) -> None:
    arguments = named_arguments(node)
    for name in ("out_order", "out_dtype"):  # they are those of q
        del arguments[name]
    op = torch.ops.mhf_compiler.multi_head_ffn_over_query.default
    with graph.inserting_before(node):
        call = call_over(graph, node, op, arguments)
        replace_by_item(node, call, 1)  # behind what the op returns, which is nothing
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
            # What is written over comes behind the gradients of all arguments but the queries.
            item = len(arguments["needs"]) - 1 if which == 0 else which - 1
            replace_by_item(reader, call, item)
            graph.erase_node(reader)
    graph.erase_node(node)


def _add_parts_in_place(graph: fx.Graph) -> None:
    """Let routers' backward passes add to the gradient of the queries that is there before them."""
    ops = torch.ops.mhf_compiler
    calls = [node for node in graph.nodes if node.target is ops.router_product_backward.default]
    computed = set()  # by the op, or by what stands below
    for node in graph.nodes:
        if node.target is ops.multi_head_ffn_backward.default and named_arguments(node)["needs"][0]:
            computed |= set(_items(node, 0))
    for node in calls:
        parts = _items(node, 0) if named_arguments(node)["needs"][0] else []
        totals = [total for part in parts for total in part.users]
        if len(totals) == 1 and _may_add_onto(totals[0], parts[0], node, computed):
            computed.add(_add_onto(graph, node, parts[0], totals[0]))


def _items(node: fx.Node, index: int) -> list[fx.Node]:
    """The readers of one of the tensors that a call returns."""
    return [x for x in node.users if x.target is operator.getitem and x.args[1] == index]


def _may_add_onto(total: fx.Node, part: fx.Node, node: fx.Node, computed: set[fx.Node]) -> bool:
    """Whether a sum adds a part to a gradient that is there before, and nothing else reads it."""
    if total.target is not torch.ops.aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return False
    left, right = total.args
    onto = left if right is part else right
    return (
        isinstance(onto, fx.Node)
        and onto in computed
        and onto < node
        and len(onto.users) == 1
        and onto.meta["val"].dtype is part.meta["val"].dtype
        and takes_the_same_memory(onto, total.meta["val"])
    )


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
        result = replace_by_item(total, call, 1)  # what is added to comes behind what is returned
    for old in (total, part, node):
        graph.erase_node(old)
    return result
