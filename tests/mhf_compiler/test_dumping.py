"""``dump_dir``: the programs run, agree, and the folder reads well."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.positive import POSITIVE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

OPTIONS = {"rewrite": "always", "fallback": "eager", "strict": True}


def compiled(model: Any, folder: Path, *inputs: Any, **settings: Any) -> None:
    options = OPTIONS | {"dump_dir": folder}
    torch.compile(model, backend="flashmhf", options=options, **settings)(*inputs)


def printed(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, path.name], cwd=path.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def differences(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"relative difference (\S+)", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case, folder = POSITIVE["RouterOnHidden"], tmp_path_factory.mktemp("dump")
    torch.compiler.reset()
    compiled(nn.Sequential(case.build(), nn.Linear(32, 32)), folder, *case.inputs())
    compiled(lambda x: x.sin(), folder, torch.randn(3))
    return folder


def test_the_index_has_a_line_for_each_graph(folder: Path):
    lines = (folder / "index.md").read_text().splitlines()
    assert lines[-2].startswith("| [graph_0](graph_0/report.html) | ")
    assert lines[-2].endswith(" | 1 | 0 | 0 |")  # the module's name is 0
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


def test_the_programs_run_and_agree(folder: Path):
    assert "tensor(" in printed(folder / "graph_0" / "before.py")
    (difference,) = differences(printed(folder / "graph_0" / "compare.py"))
    assert difference < 1e-5
    (difference,) = differences(printed(folder / "graph_0" / "site_0.py"))
    assert difference < 1e-5


def test_compare_tells_a_wrong_rewrite(folder: Path, tmp_path: Path):
    for name in ("before.py", "after.py", "compare.py"):
        text = (folder / "graph_0" / name).read_text()
        (tmp_path / name).write_text(text.replace("activation = 'silu'", "activation = 'relu'"))
    (difference,) = differences(printed(tmp_path / "compare.py"))
    assert difference > 1e-3


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
    (difference,) = differences(printed(tmp_path / "graph_0" / "compare.py"))
    assert difference < 1e-5
    assert "'k_scale': 0.5" in (tmp_path / "graph_0" / "site_0.py").read_text()
    (difference,) = differences(printed(tmp_path / "graph_0" / "site_0.py"))
    assert difference < 1e-5
