"""Which passes run over Inductor's graphs, in which order, and what happens if one fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .. import compat
from ..compat import counters, with_pass
from ..errors import MhfCompilerWarning
from . import functional, layouts, memory, norm_network, norm_router, overwrite
from .layouts import fix_layouts
from .memory import is_call_of
from .norm_network import join_networks
from .norm_router import join_norms
from .overwrite import reuse_memory


def with_post_grad_passes(
    gm: fx.GraphModule, config: dict[str, Any], *, strict: bool
) -> dict[str, Any]:
    """Inductor's settings for a graph of Dynamo's, with our passes if the graph has the op.

    Where gradients are recorded, norms stay: their backward pass reads what they read.
    """
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    if not any(is_call_of(node, "multi_head_ffn") for graph in graphs for node in graph.nodes):
        return config
    from ..lowering import normed_network, normed_router, overwriting, routing

    files: tuple[str, ...] = (__file__, compat.__file__, layouts.__file__, functional.__file__)
    files += (overwriting.__file__, memory.__file__, overwrite.__file__)
    if torch.is_grad_enabled():
        return with_pass(config, partial(_run, [reuse_memory, fix_layouts], strict), files)
    # In this order: the queries that were normalised are dead behind the op, too.
    passes = [join_norms, reuse_memory, join_networks, fix_layouts]
    modules = (norm_router, norm_network, normed_router, normed_network, routing)
    files += tuple(str(module.__file__) for module in modules)
    # Where it pays to join a network is decided there; to import it would ask for Triton.
    files += (str(Path(routing.__file__).parent / "kernels" / "tiles.py"),)
    return with_pass(config, partial(_run, passes, strict), files)


def _run(passes: Sequence[Callable[[fx.Graph], None]], strict: bool, graph: fx.Graph) -> None:
    """Run all passes; where one fails, undo it and warn, or raise if told so."""
    for run in passes:
        before = fx.Graph()
        _copy(graph, before)
        try:
            run(graph)
        except Exception as error:
            if strict:
                raise
            for node in reversed(graph.nodes):
                graph.erase_node(node)
            _copy(before, graph)
            counters["flashmhf"]["failures"] += 1
            warnings.warn(
                f"not all memory is reused, since a pass failed: {type(error).__name__}: {error}",
                MhfCompilerWarning,
                stacklevel=2,
            )


def _copy(graph: fx.Graph, empty: fx.Graph) -> None:
    """Copy all of a graph: what Inductor has to keep of its results stands at the output."""
    output = empty.output(empty.graph_copy(graph, {}))
    output.meta.update(graph.output_node().meta)
