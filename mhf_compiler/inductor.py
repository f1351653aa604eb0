"""The same rewriting as passes of Inductor's own, for those who cannot choose the back end.

Dynamo's graph is rewritten in Inductor's pass before autograd, in the same form in which the back
end sees it. The difference: Inductor compiles what comes of it, so if that fails, the graph as it
was is not compiled in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from . import compat
from .compilation import Compilation, tell_of_buckets
from .errors import fault
from .options import GivenOptions, OptionError, Options, inductor_config, parse_options
from .passes.cache_key import cache_key, package_hash
from .passes.layers import Layers, names_in
from .passes.manager import PASSES, Tell, passes_for, run_passes
from .passes.memory import calls_our_op
from .report.logs import announce
from .report.values import GraphReport


def options_with_passes(options: GivenOptions | None) -> dict[str, Any]:
    """Inductor's settings among ``options``, and the passes that do what the others say.

    Raises:
        OptionError: an unknown option, a value it does not take, or another fallback than Inductor.
    """
    parsed = parse_options(None, options)
    if parsed.fallback != "inductor":
        raise OptionError(
            f"option 'fallback' is {parsed.fallback!r}; allowed for Inductor's options: 'inductor'"
        )
    ours = replace(parsed, inductor={}, mode=None)
    return compat.with_added_passes(
        inductor_config(parsed),
        partial(rewrite_before_autograd, ours),
        partial(run_after_autograd, ours.strict),
        (package_hash(), repr(replace(ours, report=None))),  # the address of a function is no key
        partial(_key_now, ours),
    )


@dataclass(frozen=True)
class _Graph:
    """What the passes after autograd have to know of a graph that is being compiled.

    Attributes:
        passes: the names of those that run.
        tell: is told what they did.
        layers: what to call the layers in a profile.
        names: of all calls of our ops.
    """

    passes: tuple[str, ...]
    tell: Tell
    layers: Layers
    names: tuple[str, ...]


_compiling: WeakKeyDictionary[Any, _Graph] = WeakKeyDictionary()


def _key_now(options: Options) -> tuple[str, ...] | None:
    """What stands for the passes in the caches of the graph that is being compiled."""
    try:
        context = compat.tracing_context()
    except Exception:  # the pass itself asks for it, too, and says so
        context = None
    found = None if context is None else _compiling.get(context)
    return cache_key(options, tuple(PASSES), () if found is None else found.names)


def rewrite_before_autograd(options: Options, graph: fx.Graph) -> None:
    """Put the ops into a graph of Dynamo's and into those inside of it.

    Whatever fails leaves all of them as they were, with a warning; under ``strict`` it is raised.
    """
    gm = graph.owning_module
    try:
        if gm is not None and compat.is_graph_of_dynamo(gm):
            # The back end's conditions: with the dispatcher that Inductor has set, operations
            # decompose otherwise.
            with compat.no_python_dispatcher():
                _rewrite(options, gm)
        elif not any(map(compat.has_examples_of_dynamo, graph.nodes)):
            _tell_of_other_graph(graph)
        # Else it is inside of one of Dynamo's, whose turn comes later: that shows under which modes
        # of autocast and gradients it is called.
    except Exception as error:
        if options.strict:
            raise
        fault("rewrite", "rewriting failed, the graph is compiled as it is", error)


def _rewrite(options: Options, gm: fx.GraphModule) -> None:
    tuned = {"max_autotune": compat.setting_of_inductor("max_autotune")}
    compilation = Compilation(replace(options, inductor=tuned))
    if not compat.runs_pass_after_autograd():
        what = (
            "Inductor's setting 'post_grad_custom_post_pass' has lost the pass that fixes strides"
        )
        compilation.failed(LookupError(what))
        return
    if compat.is_part_of_buckets(gm):
        only_here = LookupError("a pass of Inductor's sees one part at a time")
        tell_of_buckets(gm, only_here, strict=options.strict)
    context = compat.tracing_context()
    compilation.rewrite(gm)
    if context is not None:
        passes = passes_for(training=torch.is_grad_enabled())
        # Else code of an equal graph, which has other names, would be found under a key without.
        layers = compilation.layers if compat.looks_up_rewritten_graph() else {}
        names = names_in(gm, layers)
        _compiling[context] = _Graph(passes, compilation.tell, layers, names)
    compilation.hand_over()


def _tell_of_other_graph(graph: fx.Graph) -> None:
    code = str(graph)
    note = "the graph was not looked at: Dynamo did not make it, see mhf_compiler.rewrite"
    announce(GraphReport(code, code, operations=len(graph.nodes), notes=[note]))


def run_after_autograd(strict: bool, graph: fx.Graph) -> None:
    """Run our passes over one of Inductor's graphs, if it calls one of our ops."""
    if not any(map(calls_our_op, graph.nodes)):
        return
    context = compat.tracing_context()
    found = None if context is None else _compiling.get(context)
    if found is None:
        run_passes(passes_for(training=True), strict, None, graph)
    else:
        run_passes(found.passes, strict, found.tell, graph, layers=found.layers)
