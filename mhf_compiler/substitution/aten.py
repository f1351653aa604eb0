"""What an edit has inserted, spelled as exported programs are: ATen operations with ``val``.

The editor writes functions of Python's and PyTorch's, as Dynamo does. An exported program consists
of ATen operations, each with a fake tensor of what it returns, in the mode and over the symbolic
sizes of the others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..compat import FakeTensor, OpOverload, example_of, no_new_guards, tree_leaves
from ..patterns import CanonicalCopy, Kind, Modes
from .edit import Edit
from .emit import EditError

aten = torch.ops.aten

#: function -> ATen operation, with the same arguments
_FUNCTIONS: dict[Any, OpOverload] = {
    torch.broadcast_to: aten.expand.default,
    torch.clone: aten.clone.default,
    torch.flatten: aten.flatten.using_ints,
    torch.narrow: aten.narrow.default,
    torch.permute: aten.permute.default,
    torch.reshape: aten.reshape.default,
    torch.select: aten.select.int,
    torch.squeeze: aten.squeeze.dim,
    torch.stack: aten.stack.default,
    torch.unflatten: aten.unflatten.int,
    torch.unsqueeze: aten.unsqueeze.default,
}
#: of tensors; of sizes they stay what they are
_OPERATORS = {operator.add: aten.add.Tensor, operator.mul: aten.mul.Tensor}
_OF_SIZES = (operator.add, operator.mul, operator.floordiv)


def spell_in_aten(edit: Edit, copy: CanonicalCopy, shape_env: Any | None = None) -> None:
    """Make ATen operations with ``val`` of all nodes that an edit has inserted, in place.

    Args:
        edit: an edit of a graph whose nodes carry fake tensors as ``val``.
        copy: what the given graph computes.
        shape_env: the shape environment of its symbolic sizes, if it has any.

    Raises:
        EditError: a node has no such spelling, or does not run on fake tensors.
    """
    mode = _fake_mode(edit.graph)
    with no_new_guards(shape_env), mode, torch.no_grad():
        for node in edit.graph.nodes:
            site = edit.inserted.get(node)
            if site is None:
                continue
            modes = Modes.of(site.output.requires_grad_mode, copy.autocast[site.output_node])
            try:
                _spell(node)
                with modes.entered(), torch.no_grad():
                    node.meta["val"] = _result(node)
            except Exception as error:
                first, *_ = str(error).splitlines() or [type(error).__name__]
                name = getattr(node.target, "__name__", node.target)
                message = f"{name} cannot be written into an exported program: {first}"
                raise EditError(message, Kind.CHANGED_RESULT, site) from error


def _fake_mode(graph: fx.Graph) -> Any:
    """The mode of the fake tensors of a graph."""
    for node in graph.nodes:
        for example in tree_leaves(example_of(node)):
            if isinstance(example, FakeTensor):
                return example.fake_mode
    raise LookupError("no node of the graph has a fake tensor")


def _spell(node: fx.Node) -> None:
    """Give a node an ATen operation as its target, unless it has one or computes a size."""
    if node.target in _FUNCTIONS:
        node.target = _FUNCTIONS[node.target]
    elif _reads_tensors(node) and node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
    elif node.target is operator.getitem and isinstance(node.args[1], tuple):
        *before, part = node.args[1]
        assert isinstance(part, slice)
        args = (node.args[0], len(before), part.start, part.stop, part.step)
        node.target, node.args = aten.slice.Tensor, args
    elif not isinstance(node.target, OpOverload) and node.target not in (
        *_OF_SIZES,
        operator.getitem,
    ):
        raise LookupError("it is no ATen operation")


def _reads_tensors(node: fx.Node) -> bool:
    examples = map(example_of, node.all_input_nodes)
    return any(isinstance(example, torch.Tensor) for example in examples)


def _result(node: fx.Node) -> Any:
    """What a node returns, as a fake tensor without gradients."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), example_of)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return fx.node.map_aggregate(
        result, lambda part: part.detach() if isinstance(part, torch.Tensor) else part
    )
