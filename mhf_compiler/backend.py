"""What ``torch.compile`` is given: the back end, or options for Inductor that do the same.

This module is what the entry point names, so importing it must stay cheap: the recogniser, the op
and its kernels are loaded when they are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from .options import Options

#: when this process began to read the sources, see passes/cache_key.py
IMPORTED_AT = time.time()


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
    try:
        from .compilation import compile_graph_of_dynamo
        from .options import parse_options

        parsed = parse_options(mode, options)
    except (ImportError, AttributeError) as error:
        from .without import compile_without

        return compile_without(gm, example_inputs, mode, options, error)
    return compile_graph_of_dynamo(gm, example_inputs, parsed)


def inductor_options(options: Options | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options for Inductor that rewrite as the back end does, where the back end cannot be chosen.

        torch.compile(model, options=mhf_compiler.inductor_options())
        torch._inductor.config.load_config(mhf_compiler.inductor_options())  # for every model

    Passes that the user has set, in ``options`` or before this call in ``torch._inductor.config``,
    run as well: those before autograd see the ops in the graph, those after autograd run before
    ours. docs/options.md says in what this differs from the back end.

    Args:
        options: ``mhf_compiler.Options``, or a dict of its names and of Inductor's settings. An
            Inductor ``mode`` is one of them. ``fallback`` has to be ``"inductor"``.

    Returns:
        The settings for Inductor in ``options`` with two passes, ``pre_grad_custom_pass`` and
        ``post_grad_custom_post_pass``; from torch 2.13 on also with ``pre_grad_pass_timing``.

    Raises:
        OptionError: an unknown option, or a value it does not take.
    """
    try:
        from .inductor import options_with_passes

        return options_with_passes(options)
    except (ImportError, AttributeError) as error:
        from .without import settings_without

        return settings_without(options, error)


def _reset() -> None:
    """Called by ``torch.compiler.reset``: drops recorded CUDA graphs and what was told."""
    from .errors import forget_warnings

    forget_warnings()
    try:
        from .compat import reset_cuda_graphs
        from .history import forget
    except (ImportError, AttributeError):
        return  # such a PyTorch compiles without us
    forget()
    reset_cuda_graphs()


flashmhf.reset = _reset  # type: ignore[attr-defined]
