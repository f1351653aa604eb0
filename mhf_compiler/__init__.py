"""mhf_compiler: multi-head feed-forward networks (FlashMHF, arXiv 2512.06989), compiled.

    torch.compile(model, backend="flashmhf")     every MH-FFN of the model as one fused op
    torch.compile(model, options=mhf_compiler.inductor_options())   the same through Inductor's
    mhf_compiler.explain(model)(*args)           what is rewritten, and why the rest is not
    mhf_compiler.compilation_report()            the same of what this process has compiled
    mhf_compiler.assert_rewritten(model, args)   a test of your own
    mhf_compiler.rewrite(exported_program)       an exported program with the op in it
    mhf_compiler.build_ops(folder)               the op for C++ programs without Python
    mhf_compiler.multi_head_ffn(q, k, u, v, r)   the op itself

The package has three parts: this one is what a user touches, ``patterns`` knows what an MH-FFN is,
``lowering`` what replaces it. Importing the package defines the ops, so that a saved program that
names them can be loaded, and loads the back end; the recogniser, the kernels and Dynamo are loaded
when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .backend import flashmhf, inductor_options
from .lowering import ops as _ops  # noqa: F401  (defines torch.ops.mhf_compiler)

if TYPE_CHECKING:
    from .errors import MhfCompilerWarning, NotAnalysedError
    from .explanation import explain
    from .exported import rewrite
    from .history import compilation_report
    from .lowering import ArgumentError, multi_head_ffn, multi_head_ffn_reference
    from .lowering.library import build_ops
    from .options import OptionError, Options
    from .passes.outcome import Fusion, Obstacle
    from .patterns import Kind as DeclineKind
    from .patterns import Location, Reason
    from .report import GraphReport, Report, SiteReport
    from .report.dot import DrawingError
    from .testing import assert_rewritten

__version__ = "0.1.0.dev0"  # the only place: pyproject.toml reads it from here

__all__ = [
    "ArgumentError",
    "DeclineKind",
    "DrawingError",
    "Fusion",
    "GraphReport",
    "Location",
    "MhfCompilerWarning",
    "NotAnalysedError",
    "Obstacle",
    "OptionError",
    "Options",
    "Reason",
    "Report",
    "SiteReport",
    "__version__",
    "assert_rewritten",
    "build_ops",
    "compilation_report",
    "explain",
    "flashmhf",
    "inductor_options",
    "multi_head_ffn",
    "multi_head_ffn_reference",
    "rewrite",
]

_HOMES = {  # name -> module, and its name there if that is another
    "ArgumentError": "lowering",
    "DeclineKind": "patterns:Kind",
    "DrawingError": "report.dot",
    "Fusion": "passes.outcome",
    "GraphReport": "report",
    "Location": "patterns",
    "MhfCompilerWarning": "errors",
    "NotAnalysedError": "errors",
    "Obstacle": "passes.outcome",
    "OptionError": "options",
    "Options": "options",
    "Reason": "patterns",
    "Report": "report",
    "SiteReport": "report",
    "assert_rewritten": "testing",
    "build_ops": "lowering.library",
    "compilation_report": "history",
    "explain": "explanation",
    "multi_head_ffn": "lowering",
    "multi_head_ffn_reference": "lowering",
    "rewrite": "exported",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), original or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
