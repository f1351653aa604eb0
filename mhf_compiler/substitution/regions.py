"""What the calls of the graphs inside of a graph give them.

Dynamo makes one graph of a region that is to be compiled once (``nested_compile_region``), and
calls it for every layer:

    invoke_subgraph(subgraph_1, "subgraph_1", x, layers.1.gate, layers.1.up, layers.1.down)
    invoke_subgraph(subgraph_1, "subgraph_1", y, layers.2.gate, layers.2.up, layers.2.down)
"""

from __future__ import annotations

from torch import fx

from ..compat import HigherOrderOperator, tree_leaves
from ..patterns import called_graphs

#: for a call: the inputs of the whole graph, by the names of the inputs of the graph inside of it
Given = dict[str, fx.Node]


def calls_in(gm: fx.GraphModule) -> dict[fx.GraphModule, list[Given]]:
    """What each graph in ``gm``, itself included, is given at each of its calls.

    A graph that is called by another counts once for each call of that. What is computed, and what
    cannot be told, has no entry.
    """
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    found: dict[fx.GraphModule, list[Given]] = {}
    _follow(gm, inputs, found)
    return found


def _follow(gm: fx.GraphModule, given: Given, found: dict[fx.GraphModule, list[Given]]) -> None:
    found.setdefault(gm, []).append(given)
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            for _, inner in called_graphs(gm, node):
                inputs = inner.graph.find_nodes(op="placeholder")
                # Whatever else an operation takes comes first.
                last = tree_leaves(node.args)[-len(inputs) :] if inputs else []
                passed = {
                    one.name: given[argument.name]
                    for one, argument in zip(inputs, last, strict=False)
                    if isinstance(argument, fx.Node) and argument.name in given
                }
                _follow(inner, passed, found)
