"""Every private name of PyTorch that mhf_compiler/compat.py uses, read from its source."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mhf_compiler.compat

COMPAT = Path(mhf_compiler.compat.__file__)
#: what the fallback itself is called by; these are documented
DOCUMENTED = {"torch._inductor.compile", "torch._dynamo.lookup_backend"}


def private_names(tree: ast.Module) -> Iterator[tuple[str, ast.alias | ast.Attribute]]:
    """Every private name, as it is written, with the node that says it."""
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            yield from ((f"{node.module}:{alias.name}", alias) for alias in node.names)
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            name = ast.unparse(node)
            if name.startswith("torch.") and "._" in name and name not in DOCUMENTED:
                yield name, node


def missing(source: str | None = None) -> list[str]:
    """The names that this PyTorch lacks, in order; `source` stands in for compat.py's."""
    tree = ast.parse(COMPAT.read_text() if source is None else source)
    return sorted({name for name, _ in private_names(tree) if not _exists(name)})


def _exists(name: str) -> bool:
    module, _, attribute = name.partition(":")
    if attribute:
        found: Any = importlib.import_module(module)
        return hasattr(found, attribute) or _is_module(f"{module}.{attribute}")
    place, *parts = name.split(".")
    found = importlib.import_module(place)
    for part in parts:
        place = f"{place}.{part}"
        if not hasattr(found, part) and not _is_module(place):
            return False
        found = getattr(found, part)
    return True


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
