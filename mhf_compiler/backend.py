"""The back end that ``torch.compile(model, backend="flashmhf")`` calls.

This module is what the entry point names, so importing it must stay cheap: the recogniser, the op
and its kernels are loaded when the first graph arrives.
"""

from __future__ import annotations

import sys
import warnings
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
    from .options import inductor_config, parse_options
    from .passes.manager import with_post_grad_passes
    from .rewrite.graph import rewrite_graph

    parsed = parse_options(mode, options)
    counted = counters["flashmhf"].copy()
    report, folder = None, None
    try:
        report = rewrite_graph(gm, parsed)
        if parsed.dump_dir is not None:
            from .debug.dump import dump

            folder = dump(report, gm, parsed.dump_dir)
    except Exception as error:
        _warn_or_raise("rewriting failed, the graph is compiled as it is", error, parsed.strict)

    def tell(fusions: Sequence[Fusion], notes: Sequence[str]) -> None:
        try:
            _report_fusions(fusions, notes, report, folder)
        except Exception as error:
            _warn_or_raise("a report could not be completed", error, parsed.strict)

    config = with_post_grad_passes(gm, inductor_config(parsed), strict=parsed.strict, tell=tell)
    # The user may have called the op, too: what matters is whether it is defined.
    if parsed.fallback == "inductor" and "mhf_compiler.lowering" in sys.modules:
        from .lowering.ops import ALL, MUTATING

        tell_inductor_of(ALL, MUTATING)
    try:
        return compile_graph(parsed.fallback, gm, example_inputs, config)
    except Exception:
        # Nothing was compiled, and Dynamo may trace the code again: where AOTAutograd wants a
        # symbolic float to be a constant, it says so by an exception.
        counters["flashmhf"] = counted
        raise


def _report_fusions(
    fusions: Sequence[Fusion],
    notes: Sequence[str],
    report: GraphReport | None,
    folder: Path | None,
) -> None:
    """Log what the passes after autograd did, and add it to the report of the graph."""
    from .report.logs import announce_fusions

    announce_fusions(fusions, notes)
    if report is None:
        return
    report.fusions = [*(report.fusions or ()), *fusions]
    report.notes += notes
    if folder is not None:
        from .debug.dump import dump_report

        dump_report(report, folder)


def _warn_or_raise(what: str, error: Exception, strict: bool) -> None:
    """Count a failure; raise it if told so, otherwise warn."""
    from .compat import counters
    from .errors import MhfCompilerWarning

    counters["flashmhf"]["failures"] += 1
    if strict:
        raise error
    warnings.warn(f"{what}: {type(error).__name__}: {error}", MhfCompilerWarning, stacklevel=3)


def _reset() -> None:
    """Called by ``torch.compiler.reset``, as for Inductor: drops recorded CUDA graphs."""
    from .compat import reset_cuda_graphs

    reset_cuda_graphs()


flashmhf.reset = _reset  # type: ignore[attr-defined]
