"""Importing modules of the package from other syntax trees than those of their files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

from .points import ROOT

PACKAGE = "mhf_compiler"


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._tree, self.path, "exec", dont_inherit=True)


class Replacing(MetaPathFinder):
    """Finds modules of the package as ever, and gives some of them another tree.

    Args:
        tree_of: from a file, relative to the repository, to what to compile in place of it; None
            leaves it alone.
    """

    def __init__(self, tree_of: Callable[[str], ast.Module | None]) -> None:
        loaded = [name for name in sys.modules if name.startswith(PACKAGE)]
        assert not loaded, f"already imported: {loaded}"
        self.tree_of = tree_of

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{PACKAGE}.") or path is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not spec.origin.startswith(f"{ROOT}/"):
            return None
        tree = self.tree_of(spec.origin.removeprefix(f"{ROOT}/"))
        if tree is None:
            return None
        spec.loader = _Loader(fullname, spec.origin, tree)
        return spec
