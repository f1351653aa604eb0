"""Buffers that our ops access keep the strides of the graph from the moment they are written.

Inductor decides late on the layout of a buffer. Until then it may plan to pad the strides, and a
view that it lowers meanwhile is computed from the padded plan. If an op then asks for the strides
of the graph, as ours do, the buffer gets those, and the view reads and writes past its rows: wrong
values, seen on a GPU with torch 2.11, where any other custom op is affected too
(docs/reliability.md).

So every buffer that one of our ops reads or writes is marked, and Inductor realizes it with the
graph's strides as soon as it lowers it. Then no plan can change after a view was computed from it,
and no copy is needed to undo the padding.

This is needed for correct results, unlike the other passes, which only save time and memory.
"""

from __future__ import annotations

from torch import fx

from ..compat import realize_to_strides, storage_of
from .memory import calls_our_op

__all__ = ["fix_layouts"]


def fix_layouts(graph: fx.Graph) -> None:
    """Mark the buffers under the arguments of our ops, through any views of them."""
    owners: dict[int, fx.Node] = {}  # storage -> its first node, which writes it
    for node in graph.nodes:
        storage = storage_of(node)
        if storage is not None:
            owners.setdefault(storage, node)
        if calls_our_op(node):
            for argument in node.all_input_nodes:
                storage = storage_of(argument)
                if storage is not None and owners[storage].op == "call_function":
                    realize_to_strides(owners[storage])
