"""``explain``: what the back end would do with a model, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from .buckets import rewrite_whole
from .calls import Calls, Names, write_absent
from .compat import (
    BucketCut,
    bucket_cut,
    compiled_in_place_set_aside,
    interruptions,
    is_part_of_buckets,
    run_afresh,
)
from .errors import forget_warnings
from .options import GivenOptions, Options, chosen, parse_options
from .report import Report
from .report.context import context_of
from .report.describe import breaks_without_graph
from .substitution.graph import Keep, rewrite_graph

if TYPE_CHECKING:
    from .lowering.device import Card


def explain(
    model: Callable[..., Any],
    *,
    options: GivenOptions | None = None,
    dynamic: bool | None = None,
    device: str | None = None,
) -> Callable[..., Report]:
    """Say what ``torch.compile(model, backend="flashmhf")`` rewrites, and what it declines.

    Called as ``torch._dynamo.explain`` is:

        report = mhf_compiler.explain(model)(*args, **kwargs)
        print(report)

    The model runs once, in its rewritten form but otherwise eagerly: Inductor does not run, nor do
    the passes after autograd, whose work is counted and logged during a compilation. Unlike
    ``torch._dynamo.explain``, it does not reset Dynamo: compiled functions stay compiled.

    Args:
        model: a module or function, compiled already or not.
        options: the options that ``torch.compile`` would be given, a dict or ``Options``.
        dynamic: its argument of that name.
        device: a card that need not be there, such as ``"cuda:h100"``: times are estimated and
            kernels chosen as for it, and nothing is tried. The model runs where it is; on
            the meta device nothing is computed.

    Returns:
        A function that takes the model's arguments and returns a ``Report``.

    Raises:
        ValueError: ``device`` is no card that is known.
    """
    from .lowering.device import ANY_CARD, find_card

    parsed = parse_options(None, options)
    card = ANY_CARD if device is None else find_card(device)
    return lambda *args, **kwargs: reported(model, parsed, args, kwargs, dynamic=dynamic, card=card)


def reported(
    model: Callable[..., Any],
    options: Options,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    keep: Keep | None = None,
    dynamic: bool | None = None,
    card: Card | None = None,
) -> Report:
    """What ``explain`` finds; ``keep`` is given each rewritten site, with its graph."""
    names = Names(model)
    found: list[Calls] = []
    cut: list[tuple[BucketCut, Calls]] = []  # graphs that DDP's buckets have cut

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        whole = bucket_cut() if is_part_of_buckets(gm) else None
        if whole is None:
            calls = Calls(rewrite_graph(gm, options, keep, card=card), names)
            found.append(calls)
            return calls.followed(gm)
        for seen, calls in cut:
            if seen.gm is whole.gm:
                return calls.followed(gm, first=False)
        _, graph, _ = rewrite_whole(whole, options, keep)  # for the first of its parts
        calls = Calls(graph, names)
        cut.append((whole, calls))
        found.append(calls)
        return calls.followed(gm)

    forget_warnings()
    with interruptions() as noted:
        call_once(model, collect, args, kwargs, dynamic)
    for calls in found:
        calls.write()
    write_absent(found, names)
    graphs = [calls.report for calls in found]
    context = context_of(model, args, kwargs, chosen(options), card.name if card else None)
    return Report(graphs, breaks_without_graph(noted, graphs), context)


def call_once(
    model: Callable[..., Any],
    collect: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: bool | None = None,
) -> None:
    """Give the graphs of a model to a back end of our own, and leave nothing of it behind."""
    with compiled_in_place_set_aside(model):
        run_afresh(model, collect, args, kwargs, dynamic)
