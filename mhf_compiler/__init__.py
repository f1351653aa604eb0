"""mhf_compiler: multi-head feed-forward networks (FlashMHF, arXiv 2512.06989), compiled.

    torch.compile(model, backend="flashmhf")     every MH-FFN of the model as one fused op
    mhf_compiler.explain(model)(*args)           what is rewritten, and why the rest is not
    mhf_compiler.assert_rewritten(model, args)   the same as a test of your own
    mhf_compiler.multi_head_ffn(q, k, u, v, r)   the op itself

The package has three rooms: this one is what a user touches, ``patterns`` knows what an MH-FFN is,
``lowering`` what replaces it. Importing the package loads none of them: names are loaded when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import flashmhf
    from .errors import MhfCompilerWarning
    from .explanation import explain
    from .lowering import ArgumentError, multi_head_ffn
    from .options import OptionError, Options
    from .report import Report, SiteReport
    from .testing import assert_rewritten

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "MhfCompilerWarning",
    "OptionError",
    "Options",
    "Report",
    "SiteReport",
    "__version__",
    "assert_rewritten",
    "explain",
    "flashmhf",
    "multi_head_ffn",
]

_HOMES = {
    "ArgumentError": "lowering",
    "MhfCompilerWarning": "errors",
    "OptionError": "options",
    "Options": "options",
    "Report": "report",
    "SiteReport": "report",
    "assert_rewritten": "testing",
    "explain": "explanation",
    "flashmhf": "backend",
    "multi_head_ffn": "lowering",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
