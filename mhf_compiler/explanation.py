"""``explain``: what the back end would do with a model, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .buckets import rewrite_whole
from .compat import (
    BucketCut,
    bucket_cut,
    compiled_in_place_set_aside,
    is_part_of_buckets,
)
from .errors import forget_warnings
from .options import GivenOptions, Options, parse_options
from .report import Report
from .substitution.graph import Keep, rewrite_graph


def explain(
    model: Callable[..., Any], *, options: GivenOptions | None = None
) -> Callable[..., Report]:
    """Say what ``torch.compile(model, backend="flashmhf")`` rewrites, and what it declines.

    Called as ``torch._dynamo.explain`` is:

        report = mhf_compiler.explain(model)(*args, **kwargs)
        print(report)

    The model runs once, in its rewritten form but otherwise eagerly: Inductor does not run, nor do
    the passes after autograd, whose work is counted and logged during a compilation. As
    ``torch._dynamo.explain`` does, it resets Dynamo before and after, so compiled functions compile
    again.

    Args:
        model: a module or function, compiled already or not.
        options: the options that ``torch.compile`` would be given, a dict or ``Options``.

    Returns:
        A function that takes the model's arguments and returns a ``Report``.
    """
    parsed = parse_options(None, options)
    return lambda *args, **kwargs: reported(model, parsed, args, kwargs)


def reported(
    model: Callable[..., Any],
    options: Options,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    keep: Keep | None = None,
) -> Report:
    """What ``explain`` finds; ``keep`` is given each rewritten site, with its graph."""
    report = Report()
    cut: list[BucketCut] = []  # graphs that DDP's buckets have cut

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        whole = bucket_cut() if is_part_of_buckets(gm) else None
        if whole is None:
            report.graphs.append(rewrite_graph(gm, options, keep))
        elif not any(seen.gm is whole.gm for seen in cut):  # the first of its parts
            cut.append(whole)
            _, graph, _ = rewrite_whole(whole, options, keep)
            report.graphs.append(graph)
        return gm.forward

    forget_warnings()
    call_once(model, collect, *args, **kwargs)
    return report


def call_once(
    model: Callable[..., Any], collect: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Give the graphs of a model to a back end of our own, and leave nothing of it behind."""
    torch.compiler.reset()
    try:
        with compiled_in_place_set_aside(model):
            torch.compile(model, backend=collect)(*args, **kwargs)
    finally:
        torch.compiler.reset()
