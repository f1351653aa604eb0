"""The names of layers in Inductor's code, where a profile finds them.

In front of each call Inductor writes a comment with the nodes that it is made of. It takes their
names from ``from_node``, where PyTorch keeps what a node was traced from. Our ops get a name there
that says the layer; lowering/ops/profiled.py reads it.

Inductor's cache keeps the code, so the names are a part of its key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..compat import named_source, tracks_provenance
from ..lowering.ops.profiled import mark_of
from ..patterns import Site, modules_around
from ..report.paths import compressed
from ..report.values import SiteReport
from .memory import calls_our_op

__all__ = ["Layers", "layers_of", "name_layers", "names_in"]

#: what the report calls the layers, by the paths of their modules as Dynamo has them
Layers = Mapping[str, str]


def layers_of(
    sites: Sequence[tuple[fx.GraphModule, Site]], reports: Sequence[SiteReport]
) -> dict[str, str]:
    """The layers of all sites. A graph inside of another may compute several of them."""
    found: dict[str, str] = {}
    for (_, site), report in zip(sites, reports, strict=False):
        name = compressed(module for module in report.modules if module).replace(", ", ",")
        paths = _paths(modules_around(site))
        if paths and name:
            found[paths[-1]] = name
    return found


def names_in(gm: fx.GraphModule, layers: Layers) -> tuple[str, ...]:
    """The names of all calls of our ops in a graph and in those inside of it, in their order."""
    return tuple(
        _layer(node, layers)
        for one in gm.modules()
        if isinstance(one, fx.GraphModule)
        for node in one.graph.nodes
        if calls_our_op(node)
    )


def name_layers(graph: fx.Graph, layers: Layers) -> None:
    """Give every call of our ops in one of Inductor's graphs a name that says its layer."""
    if tracks_provenance():  # it adds nodes of its own there, and a name would get lost
        return
    for node in graph.nodes:
        if calls_our_op(node):
            source = named_source(mark_of(node.name, _layer(node, layers)))
            node.meta["from_node"] = [source, *node.meta.get("from_node", ())]


def _layer(node: fx.Node, layers: Layers) -> str:
    """The layer of the innermost module that has one; nothing if none has.

    A node of the backward pass is in the modules of the one that it is the derivative of.
    """
    meta = node.meta
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
    return next((layers[path] for path in reversed(_paths(stack)) if path in layers), "")


def _paths(stack: Mapping[str, tuple[str, Any]]) -> list[str]:
    return [path for path, _ in stack.values()]  # outermost first
