"""The three rooms: who may import whom, and that their tables agree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.patterns import Kind, meaning

ROOT = Path(__file__).parents[1]
MODULES = [
    path.relative_to(ROOT)
    for room in ("mhf_compiler", "patterns", "lowering")
    for path in sorted((ROOT / room).rglob("*.py"))
]
COMPAT = Path("mhf_compiler/compat.py")


def imported(path: Path) -> Iterator[str]:
    """The absolute names of the modules that a file imports, anywhere in it."""
    package = ["mhf_compiler", *path.parts[:-1]] if path.parts[0] != "mhf_compiler" else []
    package = package or list(path.parts[:-1])
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_look_in_one_direction(path: Path):
    others = {"patterns": ("lowering",), "lowering": ("patterns",)}.get(path.parts[0], ())
    for name in imported(path):
        assert not any(name.startswith(f"mhf_compiler.{other}") for other in others), name
        if path.parts[0] == "patterns":
            assert not name.startswith("triton"), name
        if path.parts[0] == "lowering":
            assert not name.startswith("torch.fx"), name


@pytest.mark.parametrize("path", [path for path in MODULES if path != COMPAT], ids=str)
def test_private_modules_of_torch_are_imported_in_one_file(path: Path):
    private = [name for name in imported(path) if re.match(r"torch\.(.*\.)?_", name)]
    assert not private


def test_every_activation_that_is_recognised_can_be_computed():
    assert set(meaning.ACTIVATIONS) == set(ACTIVATIONS)


def test_the_reason_names_every_activation():
    named = Kind.UNKNOWN_ACTIVATION.sentence.split("none of ")[1].split(", ")
    assert set(named) == set(ACTIVATIONS)
