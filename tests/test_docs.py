"""The documentation says what the code says."""

import importlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mhf_compiler
from mhf_compiler import Options, compat, lowering
from mhf_compiler.options import _CHOICES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def table_of(text: str, heading: str) -> dict[str, str]:
    """The rows of the first table after a heading, by their first cell."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file as a module of its name, which can be imported while the test runs."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_every_reason_is_listed_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """Update the page with ``python docs/make_reasons.py``."""
    script = load(DOCS / "make_reasons.py", monkeypatch)
    assert (DOCS / "reasons.md").read_text() == script.page()


def test_every_option_is_listed_with_its_values_and_default():
    rows = table_of((DOCS / "options.md").read_text(), "Options")
    options = {entry.name: entry for entry in fields(Options) if entry.name != "inductor"}
    assert set(rows) == set(options)
    for name, row in rows.items():
        _, values, default, _ = (cell.strip() for cell in f"|{row}".split("|"))
        assert default == (
            "none" if options[name].default is None else f"`{options[name].default}`"
        )
        if name in _CHOICES:
            assert re.findall(r"`(\w+)`", values) == list(_CHOICES[name])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text):
        goal = (page.parent / target) if target else page
        assert goal.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor[1:] in slugs, anchor


def test_the_index_names_every_page():
    text = (DOCS / "index.md").read_text()
    for page in PAGES:
        assert page.name == "index.md" or f"({page.name})" in text, page.name


def keep_as_it_is(name: str, gm: torch.fx.GraphModule, *others: Any) -> Any:
    """In place of a compiler: what is asked here is what a reader's code does, not Inductor's."""
    return gm.forward


#: what a block needs that has such a line, beyond the packages that tests need anyway
NEEDED = {"transformers.Trainer(": "accelerate", "import peft": "peft"}


def can_run(block: str) -> bool:
    needed = [package for line, package in NEEDED.items() if line in block]
    return all(importlib.util.find_spec(package) for package in needed)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As ``torchrun --nproc-per-node 1`` would start it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(port))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


WITH_CODE = ["quick-start", "numerics", "deployment", "hugging-face", "several-gpus"]


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """Its blocks as one module, as a reader would put them together, and the tests among them."""
    monkeypatch.setattr(compat, "compile_graph", keep_as_it_is)
    if name == "several-gpus":  # others would train as one of several processes, too
        request.getfixturevalue("one_process")
    text = (DOCS / f"{name}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if can_run(block)]
    assert blocks
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    torch.manual_seed(0)
    path = tmp_path / f"{name}.py"
    path.write_text("\n\n".join(blocks))
    page = load(path, monkeypatch)
    for title in [title for title in vars(page) if title.startswith("test_")]:
        getattr(page, title)()
    if name == "several-gpus":
        page.save(tmp_path / "checkpoint")
        expected, loaded = page.make().state_dict(), page.load(tmp_path / "checkpoint").state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    torch.compiler.reset()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built where a warning is an error and no network is there."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_on_the_site(site: Path):
    """In addition to the pages of the folder, those that lie above it."""
    pages = {path.stem for path in PAGES} | {"contributing", "changelog"}
    assert {path.stem for path in site.glob("*.html")} == pages | {"404"}
    assert not list(site.rglob("*.py"))
    assert 'href="changelog.html"' in (site / "index.html").read_text()


def test_the_site_loads_nothing_from_elsewhere(site: Path):
    loads = r"<(?:script|img|iframe)\b[^>]*\bsrc=\W?https?:|<link\b[^>]*\bhref=\W?https?:"
    for page in site.glob("*.html"):
        assert not re.search(loads, page.read_text()), page.name


def test_the_reference_lists_what_is_public():
    """Names of the top by themselves; others by the module that they are imported from."""
    listed = set(re.findall(r"^::: mhf_compiler\.(\S+)$", (DOCS / "api.md").read_text(), re.M))
    assert {name for name in listed if "." not in name} == {
        name for name in mhf_compiler.__all__ if not name.startswith("__")
    }
    for name in listed:
        module, _, last = f"mhf_compiler.{name}".rpartition(".")
        assert last in importlib.import_module(module).__all__, name


def test_every_op_has_its_section_and_its_arguments():
    page = (DOCS / "ops.md").read_text()
    for op in lowering.ops.ALL:
        name = op.default.name().removeprefix("mhf_compiler::")
        assert f"| `{name}` |" in page, name
        described = page + (lowering.router_product.__doc__ or "")
        for argument in op.default._schema.arguments:
            assert re.search(rf"\b{argument.name}\b", described), f"{name}: {argument.name}"


def test_every_public_name_can_be_imported():
    for name in mhf_compiler.__all__:
        assert getattr(mhf_compiler, name) is not None
    assert set(mhf_compiler.__all__) <= set(dir(mhf_compiler))


def test_the_reference_has_every_public_name(site: Path):
    text = (site / "api.html").read_text()
    for name in mhf_compiler.__all__:
        assert name.startswith("__") or f'id="mhf_compiler.{name}"' in text, name


def test_the_cpp_of_a_page_is_that_of_the_example():
    """Which is built and run by tests/examples/test_cpp.py."""
    text = (DOCS / "deployment.md").read_text()
    blocks = re.findall(r"^```(cmake|cpp)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    files = {"cmake": "CMakeLists.txt", "cpp": "main.cpp"}
    assert {language for language, _ in blocks} == set(files)
    for language, block in blocks:
        assert block in (ROOT / "examples" / "cpp" / files[language]).read_text()
