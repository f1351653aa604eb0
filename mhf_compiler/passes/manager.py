"""Which passes run over Inductor's graphs, in which order, and what happens if one fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ..compat import counters, disables_added_passes, run_pass, with_pass
from ..errors import MhfCompilerWarning, fault, only_reporting
from ..options import Options
from .cache_key import cache_key
from .layers import Layers, name_layers, names_in
from .layouts import fix_layouts
from .memory import calls_our_op
from .norm_network import fuse_norm_network
from .norm_router import fuse_norm_router
from .outcome import Fusion, Obstacle
from .overloads import call_without_checks
from .overwrite import overwrite_dead_buffers

#: In this order: queries that were normalised are dead after the op, too. Inductor disables a pass
#: by a part of a name, so no name may contain that of another, or of the pass before autograd.
PASSES: dict[str, Callable[[fx.Graph], list[Fusion]]] = {
    "mhf_norm_router": fuse_norm_router,
    "mhf_overwrite": overwrite_dead_buffers,
    "mhf_norm_network": fuse_norm_network,
}
_FOR_TRAINING = ("mhf_overwrite",)  # the backward pass reads what the others would overwrite

Tell = Callable[[Sequence[Fusion], Sequence[str]], None]


def with_post_grad_passes(
    gm: fx.GraphModule,
    config: dict[str, Any],
    options: Options,
    *,
    tell: Tell | None = None,
    layers: Layers | None = None,
) -> dict[str, Any]:
    """Inductor's settings for one of Dynamo's graphs, with our passes if the graph has the op.

    Args:
        gm: the graph.
        config: the settings.
        options: the back end's. Under ``strict`` a pass that fails raises, instead of being undone
            with a warning.
        tell: is called after the passes with what they did and declined, and with remarks; for
            training once for the forward graph and once for the backward graph. Not called if
            Inductor finds the compiled graph in its cache.
        layers: what to call the layers that compute the ops, in a profile.
    """
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    if not any(calls_our_op(node) for graph in graphs for node in graph.nodes):
        return config
    if disables_added_passes():
        warnings.warn(
            "Inductor's option 'disabled_passes' leaves out the step that fixes the strides of the "
            "op's arguments: results on a GPU may be wrong",
            MhfCompilerWarning,
            stacklevel=2,
        )
    names = passes_for(training=torch.is_grad_enabled())
    layers = layers or {}
    run = partial(run_passes, names, options.strict, tell, layers=layers)
    return with_pass(config, run, cache_key(options, names, names_in(gm, layers)))


def passes_for(*, training: bool) -> tuple[str, ...]:
    """The names of the passes for graphs before and after which gradients are recorded, or not."""
    return _FOR_TRAINING if training else tuple(PASSES)


def run_passes(
    names: Sequence[str],
    strict: bool,
    tell: Tell | None,
    graph: fx.Graph,
    *,
    layers: Layers | None = None,
) -> None:
    """Run passes over a graph, count what they did, fix the layouts for our ops, and call them
    without checks, by names that say which of the ``layers`` they compute.

    The layouts are needed for correct results. So that step is none of the passes that can be
    disabled, and if it fails the back end compiles the original graph.
    """
    fusions: list[Fusion] = []
    notes: list[str] = []
    with only_reporting("the names of layers in profiles"):
        name_layers(graph, layers or {})  # first: what a pass puts in a call's place is named so
    for name in names:
        found = _run(name, strict, graph)
        if found is None:
            notes.append(f"the pass {name!r} is disabled, left out by a bisection, or has failed")
        else:
            fusions += found
    fix_layouts(graph)
    call_without_checks(graph)
    _count(fusions)
    if tell is not None:
        tell(fusions, notes)


def _run(name: str, strict: bool, graph: fx.Graph) -> list[Fusion] | None:
    """Run one pass, and undo it if it fails; None if it did not run, or was undone."""
    before = fx.Graph()
    _copy(graph, before)
    found: list[Fusion] = []
    owner = graph.owning_module or fx.GraphModule(torch.nn.Module(), graph)
    try:
        ran = run_pass(
            owner, name, lambda _: found.extend(PASSES[name](graph)), after_autograd=True
        )
    except Exception as error:
        for node in reversed(graph.nodes):
            graph.erase_node(node)
        _copy(before, graph)
        what = f"not all memory is reused, since the pass {name} failed"
        fault("pass", what, error, strict=strict)
        return None
    failed = [fusion for fusion in found if fusion.obstacle is Obstacle.KERNEL_FAILED]
    if strict and failed:
        raise RuntimeError("; ".join(map(str, failed)))
    return found if ran else None


def _count(fusions: Sequence[Fusion]) -> None:
    tally = counters["flashmhf"]
    for fusion in fusions:
        if fusion.obstacle is None:
            tally[fusion.op] += 1
        else:
            tally[f"{fusion.op}_declined"] += 1
            tally[f"{fusion.op}_declined.{fusion.obstacle.name}"] += 1


def _copy(graph: fx.Graph, empty: fx.Graph) -> None:
    """Copy a graph with the metadata of its output, where Inductor keeps required strides."""
    output = empty.output(empty.graph_copy(graph, {}))
    output.meta.update(graph.output_node().meta)
