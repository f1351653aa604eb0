"""A model still compiles where PyTorch lacks a private name that this package needs.

All private names are in ``compat.py``, so where one is gone, that module cannot be imported, nor
can any that reads it. This one imports nothing of PyTorch but what its documentation names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .errors import fault

if TYPE_CHECKING:
    from torch import fx

    from .options import Options

_OURS = ("rewrite", "strict", "fallback", "dump_dir", "verify", "report", "mode")


def compile_without(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    mode: str | None,
    options: Options | Mapping[str, Any] | None,
    error: Exception,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's as it is, because of ``error``; raise that under ``strict``."""
    given = _tell(options, error)
    return compiled_by(
        str(given.get("fallback") or "inductor"),
        gm,
        example_inputs,
        mode or given.get("mode"),
        {key: value for key, value in given.items() if key not in _OURS},
    )


def settings_without(
    options: Options | Mapping[str, Any] | None, error: Exception
) -> dict[str, Any]:
    """Inductor's settings among the options, without a pass of ours, because of ``error``."""
    given = _tell(options, error)
    settings = {key: value for key, value in given.items() if key not in _OURS}
    return _settings_of(given.get("mode"), settings)


def _tell(options: Options | Mapping[str, Any] | None, error: Exception) -> dict[str, Any]:
    """Warn of the error, or raise it under ``strict``; the options by name."""
    given = _as_mapping(options)
    message = f"torch {torch.__version__} lacks what mhf_compiler needs, nothing is rewritten"
    fault("torch", message, error, strict=bool(given.get("strict")))
    return given


def compiled_by(
    name: str,
    gm: fx.GraphModule,
    example_inputs: list[Any],
    mode: str | None,
    settings: dict[str, Any],
) -> Callable[..., Any]:
    """Compile a graph with one of Dynamo's back ends, by documented names alone."""
    if name == "inductor":
        import torch._inductor

        return torch._inductor.compile(gm, example_inputs, _settings_of(mode, settings))
    import torch._dynamo

    return torch._dynamo.lookup_backend(name)(gm, example_inputs)


def _settings_of(mode: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    import torch._inductor

    ours = {} if mode in (None, "default") else dict(torch._inductor.list_mode_options(mode))
    return ours | {key.replace("-", "_"): value for key, value in settings.items()}


def _as_mapping(options: Options | Mapping[str, Any] | None) -> dict[str, Any]:
    if options is None or isinstance(options, Mapping):
        return dict(options or {})
    return {**options.inductor, **{name: getattr(options, name) for name in _OURS}}
