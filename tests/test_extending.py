"""What docs/extending.md asks a newcomer for is all that an addition needs: no file is left out.

Which files those are is read off what is there: an activation, a spelling or a family of kernels
that was added before has left its name in each of them.
"""

import ast
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler import SiteReport
from mhf_compiler.lowering import activations as computed
from mhf_compiler.lowering.cpu import compiled
from mhf_compiler.patterns import meaning

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FOLDERS = ("patterns", "lowering", "mhf_compiler", "benchmarks", "tests", "docs")
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".md")
] + ["README.md", "CHANGELOG.md", "pyproject.toml"]
SELF = "tests/test_extending.py"


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def unnamed(files: list[str], title: str) -> list[str]:
    """Those that a section names neither by themselves nor by a pattern or their folder."""
    named = re.findall(r"`([\w./*-]+)`", section(title))
    return [
        file
        for file in files
        if file != SELF and not any(fnmatch(file, n) or file == n + "__init__.py" for n in named)
    ]


def code_of(file: str) -> str:
    """A file's text; of Python, without what is only said about the code."""
    text = (ROOT / file).read_text()
    if not file.endswith(".py"):
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`([\w/*-]+/[\w./*-]*)`", PAGE):
        place = ROOT / name
        assert place.exists() or list(ROOT.glob(name)) or (ROOT / "mhf_compiler" / name).exists(), (
            name
        )


# An activation.


def test_an_activation_every_file_that_lists_them_is_named():
    names = "silu", "gelu", "relu", "sigmoid", "tanh"
    lists = [
        file
        for file in FILES
        if all(re.search(rf"\b{name}\b", (ROOT / file).read_text(), re.I) for name in names)
    ]
    assert len(lists) > 10
    assert unnamed(lists, "An activation") == []


class Heads(nn.Module):
    """A gated network for each of four heads."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act = act
        shapes = (4, 8, 5), (4, 8, 5), (4, 5, 8)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(s) / 4) for s in shapes)

    def forward(self, q: Tensor) -> Tensor:
        return (self.act(q @ self.gate) * (q @ self.up)) @ self.down


def test_an_activation_added_as_the_page_says(monkeypatch: pytest.MonkeyPatch):
    """It is found, and computed by PyTorch's operations until there is C++ for it."""
    options = {"rewrite": "always", "fallback": "eager", "strict": True}

    def site_of(act: Callable[[Tensor], Tensor]) -> SiteReport:
        torch.compiler.reset()
        report = mhf_compiler.explain(Heads(act), options=options)(torch.randn(4, 6, 8))
        (site,) = report.rewritten + report.declined
        return site

    assert site_of(F.mish).reason is not None
    names: dict[str, Any] = {"sympy": sympy, "torch": torch, "F": F, "aten": torch.ops.aten}
    names |= {"Tensor": Tensor, "Activation": computed.Activation}
    names |= {"ACTIVATIONS": meaning.ACTIVATIONS}
    tables = meaning.ACTIVATIONS, meaning.POINTWISE, computed.ACTIVATIONS
    blocks = re.findall(r"```python\n(.*?)```", section("An activation"), re.S)
    for table, block in zip(tables, blocks, strict=True):
        *definition, entries = block.rsplit("\n\n", 1)
        exec("\n".join(definition), names)
        for name, value in eval(f"{{{entries}}}", names).items():
            monkeypatch.setitem(table, name, value)
    meaning.read_hidden.cache_clear()
    for act in (F.mish, lambda x: x * (1 + x.exp()).log().tanh()):
        site = site_of(act)
        assert (site.reason, site.activation) == (None, "mish")
    assert site_of(lambda x: x * (1.1 + x.exp()).log().tanh()).reason is not None

    assert not compiled.takes(torch.empty(1, 64, 4, 8), "mish")
    model, q = Heads(F.mish), torch.randn(4, 6, 8)
    torch.compiler.reset()
    results = []
    for function in (torch.compile(model, backend="flashmhf", options=options), model):
        out = function(q)
        results.append([out, *torch.autograd.grad(out.sum(), list(model.parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()


# A spelling.


def test_a_spelling_every_file_that_knows_one_is_named():
    """``baddbmm`` came after the other products; the op's own code calls it for other reasons."""
    know = [
        file
        for file in FILES
        if "baddbmm" in (ROOT / file).read_text()
        and not file.startswith(("lowering/", "docs/reliability.md"))
    ]
    assert len(know) > 5
    assert unnamed(know, "A spelling that is not found") == []


def test_a_spelling_the_tables_of_rules_are_there():
    title = "A spelling that is not found"
    places = re.findall(r"`(\w+)` in `patterns/(\w+)\.py`", section(title))
    assert len(places) == 3
    for table, module in places:
        found = getattr(__import__(f"mhf_compiler.patterns.{module}", fromlist=[table]), table)
        assert isinstance(found, dict)
        assert unnamed([f"patterns/{module}.py"], title) == []


# A kernel for a new card.


def test_a_kernel_every_file_that_knows_a_family_is_named():
    know = [
        file
        for file in FILES
        if not file.startswith(("lowering/kernels/hopper/", "docs/"))
        and re.search("hopper", code_of(file), re.I)
        and file != "CHANGELOG.md"
    ]
    assert len(know) > 10
    know += ["lowering/kernels/__init__.py", "docs/compatibility.md", "docs/kernels.md"]
    assert unnamed(know, "A kernel") == []
