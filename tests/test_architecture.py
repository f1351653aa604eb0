"""The architecture: who may import whom, and that the tables of different folders agree."""

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.patterns import Kind, meaning

ROOT = Path(__file__).parents[1]
PRODUCT = "mhf_compiler"
MODULES = {
    ".".join(
        [
            *([] if part == PRODUCT else [PRODUCT]),
            *path.relative_to(ROOT)
            .with_suffix("")
            .parts[: -1 if path.stem == "__init__" else None],
        ]
    ): path
    for part in (PRODUCT, "patterns", "lowering")
    for path in sorted((ROOT / part).rglob("*.py"))
}
COMPAT = f"{PRODUCT}.compat"
#: the modules that run where compat.py cannot be imported -> what they take of PyTorch instead
WITHOUT_COMPAT = {
    f"{PRODUCT}.without": {
        "torch._inductor",
        "torch._inductor.compile",
        "torch._inductor.list_mode_options",
        "torch._dynamo",
        "torch._dynamo.lookup_backend",
    },
    # Every import of the product registers the ops, and compat.py would load Dynamo for it.
    f"{PRODUCT}.lowering.ops.common": {"torch._subclasses"},
    f"{PRODUCT}.lowering.ops.profiled": {"torch._C", "torch._C._autograd"},
}
#: part -> whose names it may import, of this product; and which others it may not
ALLOWED = {part: (f"{PRODUCT}.{part}", COMPAT) for part in ("patterns", "lowering")}
FORBIDDEN = {"patterns": ("triton",), "lowering": ("torch.fx",)}


def imports(nodes: Iterable[ast.AST], package: str) -> Iterator[str]:
    """What import statements import: absolute names of modules, or of names inside them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else 0
            if called in ("import_module", "__import__") and isinstance(name, str):
                yield name if not name.startswith(".") else package + name
        elif isinstance(node, ast.Attribute):  # torch._dynamo, without an import of its own
            parts = ast.unparse(node).split(".")
            if parts[0] == "torch" and all(map(str.isidentifier, parts)):
                yield ".".join(parts)


def is_within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def trespasses(code: str, package: str) -> list[str]:
    """The names that code in a package must not import."""
    names = set(imports(ast.walk(ast.parse(code)), package))
    found = {name for name in names if re.match(r"torch\.(?!ops\.)(.*\.)?_(?!_)", name)}
    part = package.split(".")[1] if "." in package else ""
    if part in ALLOWED:
        ours = {name for name in names if is_within(name, [PRODUCT])}
        found |= {name for name in ours if not is_within(name, ALLOWED[part])}
        found |= {name for name in names if is_within(name, FORBIDDEN[part])}
    return sorted(found)


def package_of(module: str) -> str:
    return module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]


@pytest.mark.parametrize("module", [module for module in MODULES if module != COMPAT])
def test_nobody_imports_what_it_must_not(module: str):
    """The parts look in one direction, and private names of PyTorch are imported in one file."""
    found = {*trespasses(MODULES[module].read_text(), package_of(module))}
    assert found == WITHOUT_COMPAT.get(module, set())


@pytest.mark.parametrize(
    ("package", "code"),
    [
        *(
            (f"{PRODUCT}.{part}", code.format(other=other))
            for part, other in (("patterns", "lowering"), ("lowering", "patterns"))
            for code in (
                "import mhf_compiler.{other}",
                "import mhf_compiler.{other}.site as other",
                "from mhf_compiler import {other}",
                "from mhf_compiler.{other} import Site",
                "from .. import {other}",
                "from ..{other} import Site",
                "from .. import compat, {other}",
                "def later():\n    from .. import {other}",
                "import importlib\nimportlib.import_module('mhf_compiler.{other}')",
                "from mhf_compiler.substitution.edit import rewrite",
                "from .. import options",
                "from ..report import Report",
                "import mhf_compiler",
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import options",
            )
        ),
        (f"{PRODUCT}.patterns", "from triton import language"),
        (f"{PRODUCT}.lowering.kernels", "from torch import fx"),
        (f"{PRODUCT}.lowering", "from torch.fx import Node"),
        (f"{PRODUCT}.lowering", "import torch\ntorch.fx.Graph()"),
        *(
            (PRODUCT, code)
            for code in (
                "import torch._dynamo",
                "from torch import _dynamo",
                "from torch._dynamo import utils",
                "from torch.utils import _pytree",
                "from torch.utils._pytree import tree_map",
                "import torch\ntorch._dynamo.reset()",
            )
        ),
    ],
)
def test_the_guard_sees_every_way_of_importing(package: str, code: str):
    assert trespasses(code, package)


@pytest.mark.parametrize("part", ALLOWED)
def test_the_guard_lets_through_what_is_allowed(part: str):
    code = (
        f"from .. import compat\nfrom ..compat import counters\nfrom mhf_compiler.{part} import x"
    )
    assert trespasses(code, f"{PRODUCT}.{part}") == []


def executed(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, without those for type checkers."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if isinstance(node, ast.stmt):
                yield node
            todo += ast.iter_child_nodes(node)


def loads(module: str, code: str) -> set[str]:
    """The modules of this product that the import of one executes, itself not counted.

    A package runs before its modules, except those that import from inside: it is running then.
    """
    found = set()
    for name in imports(executed(ast.parse(code)), package_of(module)):
        target = name
        while target and target not in MODULES:  # a name inside a module
            target = target.rpartition(".")[0]
        parts = target.split(".")
        packages = {".".join(parts[:end]) for end in range(1, len(parts))}
        found |= {target, *(package for package in packages if not is_within(module, [package]))}
    return found & set(MODULES) - {module}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_run_in_no_circle():
    assert circle({name: loads(name, path.read_text()) for name, path in MODULES.items()}) == []


def test_a_circle_of_imports_is_found():
    """Also through a package that runs before its module; not for type checkers, and not later."""
    values, page = "mhf_compiler.report.values", "mhf_compiler.report.page"
    graph = {name: loads(name, path.read_text()) for name, path in MODULES.items()}
    for harmless in (
        "if TYPE_CHECKING:\n    from .page import page",
        "def later():\n    from .page import page",
    ):
        assert circle(graph | {values: loads(values, harmless)}) == []
    for code in (
        "from .page import page",
        "from . import page",
        "try:\n    from . import page\nfinally: pass",
    ):
        assert page in circle(graph | {values: loads(values, code)})
    compat = "mhf_compiler.compat"
    assert compat in circle(
        graph | {compat: loads(compat, "from .substitution.graph import rewrite_graph")}
    )


def test_every_activation_that_is_recognised_can_be_computed():
    assert set(meaning.ACTIVATIONS) == set(ACTIVATIONS)


def test_the_reason_names_every_activation():
    named = Kind.UNKNOWN_ACTIVATION.sentence.split("none of ")[1].split(", ")
    assert set(named) == set(ACTIVATIONS)
