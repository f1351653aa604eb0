"""The arguments of our ops have the strides that the graph gives them as soon as they are written.

Inductor decides late how a buffer lies in memory. Until then it may plan to pad the strides, and a
view that it lowers meanwhile is laid over the padded plan. When an op then asks for the strides of
the graph, as ours do, the buffer gets them, and the view reads and writes past its rows: wrong
values on a GPU with torch 2.11, which any other custom op meets as well (docs/reliability.md).

So every buffer that one of our ops reads or writes is marked, and Inductor realizes it with the
graph's strides as soon as it lowers it. No plan is left that could change behind a view, and no
copy is needed to undo the padding.
"""

from __future__ import annotations

from torch import fx

from .compat import realize_to_strides, storage_of
from .replacing import calls_our_op

__all__ = ["fix_layouts"]


def fix_layouts(graph: fx.Graph) -> None:
    """Mark the buffers under the arguments of our ops, whatever views lie between."""
    owners: dict[int, fx.Node] = {}  # storage -> the first node that has it, which writes it
    for node in graph.nodes:
        storage = storage_of(node)
        if storage is not None:
            owners.setdefault(storage, node)
        if calls_our_op(node):
            for argument in node.all_input_nodes:
                storage = storage_of(argument)
                if storage is not None and owners[storage].op == "call_function":
                    realize_to_strides(owners[storage])
