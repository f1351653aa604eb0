"""The back end that ``torch.compile(model, backend="flashmhf")`` calls.

This module is what the entry point names, so importing it must stay cheap: the recogniser, the op
and its kernels are loaded when the first graph arrives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import fx

    from .options import Options
    from .passes.outcome import Fusion
    from .report.values import GraphReport


def flashmhf(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite every multi-head feed-forward network of a graph, then compile the graph.

    Args:
        gm: the graph from Dynamo.
        example_inputs: its inputs.
        mode: one of Inductor's modes.
        options: ``mhf_compiler.Options``, or a dict of its names and of Inductor's settings.

    Returns:
        The compiled graph.

    Raises:
        OptionError: an unknown option, or a value it does not take.
    """
    from .compat import compile_graph, counters, tell_inductor_of
    from .errors import raise_or_warn
    from .options import inductor_config, parse_options
    from .passes.manager import with_post_grad_passes
    from .rewrite.graph import Originals, rewrite_graph

    parsed = parse_options(mode, options)
    counted = counters["flashmhf"].copy()
    originals, folder = Originals(gm), None
    report = rewrite_graph(gm, parsed)
    try:
        if parsed.dump_dir is not None:
            from .debug.dump import dump

            folder = dump(report, gm, parsed.dump_dir)
    except Exception as error:
        raise_or_warn("a graph could not be dumped", error, parsed.strict)

    def tell(fusions: Sequence[Fusion], notes: Sequence[str]) -> None:
        try:
            _report_fusions(fusions, notes, report, folder)
        except Exception as error:
            raise_or_warn("a report could not be completed", error, parsed.strict)

    try:
        config = with_post_grad_passes(gm, inductor_config(parsed), strict=parsed.strict, tell=tell)
        # The user may have called the op, too: what matters is whether it is defined.
        if parsed.fallback == "inductor" and "mhf_compiler.lowering" in sys.modules:
            from .lowering.ops import ALL, MUTATING

            tell_inductor_of(ALL, MUTATING)
        return compile_graph(parsed.fallback, gm, example_inputs, config)
    except Exception as error:
        # Nothing was compiled, and Dynamo may trace the code again: where AOTAutograd wants a
        # symbolic float to be a constant, it says so by an exception.
        counters["flashmhf"] = counted
        if parsed.strict or not originals.were_replaced:
            raise
        originals.restore()
        compiled = compile_graph(parsed.fallback, gm, example_inputs, inductor_config(parsed))
        # It is the rewritten graph alone that does not compile.
        raise_or_warn("the rewritten graph is not compiled, but the original", error, strict=False)
        return compiled


def _report_fusions(
    fusions: Sequence[Fusion],
    notes: Sequence[str],
    report: GraphReport,
    folder: Path | None,
) -> None:
    """Log what the passes after autograd did, and add it to the report of the graph."""
    from .report.logs import announce_fusions

    announce_fusions(fusions, notes)
    report.fusions = [*(report.fusions or ()), *fusions]
    report.notes += notes
    if folder is not None:
        from .debug.dump import dump_report

        dump_report(report, folder)


def _reset() -> None:
    """Called by ``torch.compiler.reset``, as for Inductor: drops CUDA graphs, tells all anew."""
    from .compat import reset_cuda_graphs
    from .errors import forget_warnings

    forget_warnings()
    reset_cuda_graphs()


flashmhf.reset = _reset  # type: ignore[attr-defined]
