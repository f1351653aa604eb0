"""``dump_dir``: the programs run, agree, and the folder reads well."""

import ast
import contextlib
import dataclasses
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.positive import POSITIVE
from support.forks import run_script
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mhf_compiler
from mhf_compiler import GraphReport, Location, MhfCompilerWarning
from mhf_compiler.compat import counters
from mhf_compiler.debug import dump

OPTIONS = {"rewrite": "always", "fallback": "eager", "strict": True}


def compiled(model: Any, folder: Path, *inputs: Any, **settings: Any) -> None:
    options = OPTIONS | {"dump_dir": folder}
    torch.compile(model, backend="flashmhf", options=options, **settings)(*inputs)


def run_alone(path: Path) -> str:
    """What a program prints, in a process of its own."""
    done = run_script(path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(path: Path, code: int = 0) -> str:
    """What a program prints, if it exits with ``code``: in this process, which has PyTorch."""
    printed = io.StringIO()
    found: Any = 0
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.chdir(path.parent)
        monkeypatch.syspath_prepend(path.parent)
        try:
            runpy.run_path(path.name, run_name="__main__")
        except SystemExit as exit:
            found = exit.code or 0
        finally:
            for name in ("before", "after"):  # what other folders call theirs as well
                sys.modules.pop(name, None)
    assert found == code, printed.getvalue()
    return printed.getvalue()


def compared(text: str) -> list[str]:
    """The results that a program names, those that are wrong with a mark."""
    rows = [line.split(": ") for line in text.splitlines() if "allowed" in line]
    return [f"{name} {'wrong' if rest[-1] == 'MISMATCH' else 'right'}" for name, *rest in rows]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.head = POSITIVE["RouterOnHidden"].build(), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ffn(x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case, folder = POSITIVE["RouterOnHidden"], tmp_path_factory.mktemp("dump")
    torch.compiler.reset()
    compiled(Model(), folder, *case.inputs())
    compiled(lambda x: x.sin(), folder, torch.randn(3))
    return folder


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inference")
    torch.compiler.reset()
    with torch.no_grad():
        compiled(Model(), folder, *POSITIVE["RouterOnHidden"].inputs())
    return folder


def test_the_index_has_a_line_for_each_graph(folder: Path):
    lines = (folder / "index.md").read_text().splitlines()
    assert lines[-2].startswith("| [graph_0](graph_0/report.html) | ")
    assert lines[-2].endswith(" | 1 | 0 | ffn |")
    assert lines[-1].startswith("| [graph_1](graph_1/report.html) | ")
    assert lines[-1].endswith(" | 0 | 0 | nothing |")


def test_a_graph_has_its_programs_and_its_report(folder: Path):
    names = sorted(path.name for path in (folder / "graph_0").iterdir())
    reports = ["report.html", "report.json", "report.txt"]
    assert names == ["after.py", "before.py", "compare.py", *reports, "site_0.py"]
    assert "multi_head_ffn.default" in (folder / "graph_0" / "after.py").read_text()
    assert "multi_head_ffn.default" not in (folder / "graph_0" / "before.py").read_text()
    (graph,) = json.loads((folder / "graph_0" / "report.json").read_text())["graphs"]
    assert len(graph["rewritten"]) == 1
    assert not (folder / "graph_1" / "site_0.py").exists()


GRADIENTS = ["x", "ffn.gate", "ffn.up", "ffn.down", "ffn.route"]


def test_results_and_gradients_are_compared(folder: Path):
    assert "tensor(" in run_alone(folder / "graph_0" / "before.py")
    text = run_alone(folder / "graph_0" / "compare.py")
    linear = ["head.weight", "head.bias"]
    expected = ["output 0 right", *(f"gradient of {name} right" for name in [*GRADIENTS, *linear])]
    assert sorted(compared(text)) == sorted(expected)
    assert text.endswith("no mismatch\n")
    text = run_alone(folder / "graph_0" / "site_0.py")
    assert compared(text) == ["output 0 right", *(f"gradient of {name} right" for name in "qkuvr")]


def test_a_graph_for_inference_has_no_gradients(inference: Path):
    for name in ("compare.py", "site_0.py"):
        assert compared(run(inference / "graph_0" / name)) == ["output 0 right"]


def broken(folder: Path, to: Path, name: str, right: str, wrong: str) -> Path:
    """The programs of a graph, one of them with a mistake."""
    for path in folder.glob("graph_0/*.py"):
        (to / path.name).write_text(path.read_text())
    text = (to / name).read_text()
    assert right in text
    (to / name).write_text(text.replace(right, wrong))
    return to


def test_a_wrong_result_is_told(folder: Path, tmp_path: Path):
    place = broken(folder, tmp_path, "after.py", "activation = 'silu'", "activation = 'gelu'")
    text = run(place / "compare.py", code=1)
    assert "output 0 wrong" in compared(text)
    assert "gradient of ffn.gate wrong" in compared(text)
    assert "gradient of head.bias right" in compared(text)
    assert text.endswith(" of 8 differ by more than rounding\n")


def test_a_wrong_gradient_behind_a_right_result_is_told(folder: Path, tmp_path: Path):
    """The gate's weights are detached: the op computes the same, and trains less."""
    text = (folder / "graph_0" / "after.py").read_text()
    (call,) = re.findall(r"multi_head_ffn\.default\([^)]*?, (\w+), \w+, \w+, \w+,", text)
    right, wrong = f", {call}, ", f", {call}.detach(), "
    place = broken(folder, tmp_path, "after.py", right, wrong)
    found = compared(run(place / "compare.py", code=1))
    assert [name for name in found if name.endswith("wrong")] == ["gradient of ffn.gate wrong"]


def test_a_wrong_op_is_told(folder: Path, tmp_path: Path):
    right, wrong = "return multi_head_ffn(", "return 1.0001 * multi_head_ffn("
    place = broken(folder, tmp_path, "site_0.py", right, wrong)
    found = compared(run(place / "site_0.py", code=1))
    assert found == ["output 0 wrong", *(f"gradient of {name} wrong" for name in "qkuvr")]


class Checkpointed(nn.Module):
    """A graph inside a graph, and scales and biases of a site."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = (
            nn.Parameter(torch.randn(4, 8, 5)),
            nn.Parameter(torch.randn(4, 5, 8)),
        )
        self.bias = nn.Parameter(torch.randn(4, 1, 5))

    def network(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        hidden = torch.sigmoid(0.5 * (q @ self.gate) + self.bias)
        return (hidden @ self.down).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=False)


def test_inner_graphs_and_dynamic_sizes_run_too(tmp_path: Path):
    compiled(Checkpointed(), tmp_path, torch.randn(2, 6, 32), dynamic=True)
    found = compared(run(tmp_path / "graph_0" / "compare.py"))
    assert set(found) >= {"output 0 right", "gradient of gate right", "gradient of x right"}
    assert "'k_scale': 0.5" in (tmp_path / "graph_0" / "site_0.py").read_text()
    assert "gradient of k_bias right" in compared(run(tmp_path / "graph_0" / "site_0.py"))


class Normed(nn.Module):
    """A buffer that is written to, and numbers that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ffn = nn.BatchNorm1d(6), POSITIVE["Bmm"].build()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.ffn(self.norm(x)))


def test_graphs_that_write_and_draw_are_compared_too(tmp_path: Path):
    compiled(Normed(), tmp_path, *POSITIVE["Bmm"].inputs())
    text = run(tmp_path / "graph_0" / "compare.py")
    assert "gradient of norm.weight right" in compared(text)
    assert "gradient of norm.running_mean right" not in compared(text)
    assert "of plain PyTorch" not in text  # compared with each other


HOSTILE = [
    '"""; raise SystemExit(7)  # ',
    "\nraise SystemExit(7)",
    "\r\x0craise SystemExit(7)",
    "\\N{nothing} \\x",
    "a|b <script>alert(1)</script> [link](x) `code`",
    "\u2028raise SystemExit(7)\ud800",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_are_never_code(name: str, folder: Path, tmp_path: Path):
    """A module, a class or a folder may be called anything."""
    report = mhf_compiler.explain(POSITIVE["RouterOnHidden"].build(), options=OPTIONS)(
        *POSITIVE["RouterOnHidden"].inputs()
    )
    (site,) = report.rewritten
    location = Location(f"/{name}/model.py", 3, name, name)
    site = dataclasses.replace(site, module=name, module_class=name, location=location)
    program = dump.site_program(site)
    path = tmp_path / "site_0.py"
    path.write_text(program)  # which text that is no UTF-8 could not be
    lines = ast.parse(program).body
    assert isinstance(lines[1], ast.Import)  # after the docstring
    assert "right" in " ".join(compared(run(path)))
    dump._add_to_index(tmp_path / "index.md", "graph_0", GraphReport("", "", 1, rewritten=[site]))
    row = (tmp_path / "index.md").read_text().splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert not re.search(r"(?<!\\)[<`\[](?!graph_0)", row)


def test_symbolic_links_are_not_followed(tmp_path: Path):
    """In a folder that others may write to, links may lead to files of the user's."""
    precious, folder = tmp_path / "precious", tmp_path / "dump"
    precious.write_text("mine")
    folder.mkdir()
    (folder / "index.md").symlink_to(precious)
    (folder / "graph_0").symlink_to(tmp_path)
    with pytest.warns(MhfCompilerWarning, match="the compiled model is not affected"):
        compiled(POSITIVE["Bmm"].build(), folder, *POSITIVE["Bmm"].inputs())
    assert precious.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "dump"}
    report = folder / "graph_1" / "report.txt"
    report.unlink()
    report.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        dump.dump_report(GraphReport("", ""), folder / "graph_1")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("strict", [False, True])
def test_a_folder_that_cannot_be_written_changes_nothing(strict: bool, tmp_path: Path):
    (tmp_path / "file").touch()
    model, args = POSITIVE["Bmm"].build(), POSITIVE["Bmm"].inputs()
    options = OPTIONS | {"dump_dir": tmp_path / "file", "strict": strict}
    counters.clear()
    with pytest.warns(MhfCompilerWarning, match="the compiled model is not affected"):
        found = torch.compile(model, backend="flashmhf", options=options)(*args)
    torch.testing.assert_close(found, model(*args))
    assert counters["flashmhf"]["sites_rewritten"] == 1
    assert counters["flashmhf"]["failures.report"] == 1
