"""The back end that ``torch.compile(model, backend="flashmhf")`` calls.

This module is what the entry point names, so importing it must stay cheap: the recogniser, the op
and its kernels are loaded when the first graph arrives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx


def flashmhf(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite every multi-head feed-forward network of a graph, then compile the graph.

    Args:
        gm: the graph from Dynamo.
        example_inputs: its inputs.
        mode: one of Inductor's modes.
        options: see ``mhf_compiler.Options``; other keys are Inductor's.

    Returns:
        The compiled graph.

    Raises:
        OptionError: an unknown option, or a value it does not take.
    """
    from .compat import compile_graph, counters
    from .errors import MhfCompilerWarning
    from .options import inductor_config, parse_options
    from .passes.manager import with_post_grad_passes
    from .rewrite.graph import rewrite_graph

    parsed = parse_options(mode, options)
    try:
        report = rewrite_graph(gm, parsed)
        if parsed.dump_dir is not None:
            from .debug.dump import dump

            dump(report, gm, parsed.dump_dir)
    except Exception as error:
        counters["flashmhf"]["failures"] += 1
        if parsed.strict:
            raise
        warnings.warn(
            f"rewriting failed, the graph is compiled as it is: {type(error).__name__}: {error}",
            MhfCompilerWarning,
            stacklevel=2,
        )
    config = with_post_grad_passes(gm, inductor_config(parsed), strict=parsed.strict)
    return compile_graph(parsed.fallback, gm, example_inputs, config)


def _reset() -> None:
    """Called by ``torch.compiler.reset``, as for Inductor: drops recorded CUDA graphs."""
    from .compat import reset_cuda_graphs

    reset_cuda_graphs()


flashmhf.reset = _reset  # type: ignore[attr-defined]
