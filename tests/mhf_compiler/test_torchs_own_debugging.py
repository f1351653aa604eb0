"""What PyTorch offers for finding a fault works with this back end as with Inductor's.

Where a setting is tested, the script is a process of its own, which begins with the setting.
"""

import re
import runpy
import traceback
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from support.forks import run_script
from support.inductor import no_caches
from torch._inductor import lowering

BACKENDS = ["inductor", "flashmhf"]

SCRIPT = """
import sys
import torch
from torch import nn


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *s)) for s in ((8, 5), (5, 8)))

    def forward(self, x):
        out = (x @ self.up).relu() @ self.down  # the network
        return out.sin()  # after it


class Wrong(Heads):
    def forward(self, x):
        return super().forward(x) + x[:, 1:]  # does not fit


def call(model, backend, **options):
    if backend == "flashmhf":
        options["rewrite"] = "always"
    torch.compile(model, backend=backend, options=options)(torch.randn(4, 6, 8))


if __name__ == "__main__":
    training = sys.argv[2] == "training"
    torch.set_grad_enabled(training)
    call(Heads(), sys.argv[1], fallback_by_default=not training)  # without C++ for inference
"""
# In place of a C++ compiler: a failure that takes no time.
NO_COMPILER = """#!/bin/sh
case "$*" in
  *-dumpversion*|*--version*) echo "g++ (GCC) 12.2.0";;
  *) echo "no compiler today"; exit 1;;
esac
"""


#: Of graphs alone: where all are disabled, the headers of Inductor's C++ are compiled each time.
NO_CACHES = {
    "torch._inductor.config.fx_graph_cache": False,
    "torch._functorch.config.enable_autograd_cache": False,
}


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(SCRIPT.splitlines(), 1) if text in line)


def execute(script: Path, *arguments: str, **how: Any) -> CompletedProcess[str]:
    settings = NO_CACHES | how.pop("settings", {})
    return run_script(script, *arguments, settings=settings, **how)


def run(folder: Path, backend: str, what: str, **how: Any) -> CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return execute(script, backend, what, **how)


def without_compiler(folder: Path) -> dict[str, Any]:
    """Settings."""
    compiler = folder / "c++"
    compiler.write_text(NO_COMPILER)
    compiler.chmod(0o755)
    return {"torch._inductor.config.cpp.cxx": str(compiler)}


def debug_dir(folder: Path) -> dict[str, Any]:
    return {"torch._dynamo.config.debug_dir_root": str(folder / "torch_compile_debug")}


# The minifier.


@pytest.fixture(scope="module", params=["dynamo", "aot"])
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that the minifier writes where the compiled graph does not compile."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = without_compiler(folder) | {"torch._dynamo.config.repro_after": request.param}
    done = run(folder, "flashmhf", "training", settings=settings | debug_dir(folder))
    assert "no compiler today" in done.stderr
    (path,) = folder.rglob("minifier_launcher.py")
    return path


def test_the_minifiers_program_names_the_back_end_or_has_the_op(launcher: Path):
    text = launcher.read_text()
    if "after_aot" in text:
        assert "torch.ops.mhf_compiler.multi_head_ffn.default(" in text
        assert "import mhf_compiler.lowering" in text
    else:
        assert "backend='flashmhf'" in text
        assert "multi_head_ffn" not in text


def test_the_minifiers_program_fails_as_the_model_did(launcher: Path):
    done = execute(launcher, "run", settings=without_compiler(launcher.parent))
    assert done.returncode != 0
    assert "no compiler today" in done.stderr


def test_the_minifier_finds_a_smaller_program(launcher: Path):
    if "after_aot" in launcher.read_text():
        pytest.skip("what fails in the C++ compiler is not minified after autograd, by none")
    done = execute(launcher, "minify", settings=without_compiler(launcher.parent))
    assert "Wrote minimal repro out to" in done.stderr
    assert "backend='flashmhf'" in (launcher.parent / "repro.py").read_text()


# Errors.


def error_of(folder: Path, model: str, backend: str) -> str:
    """What a user would see of the error of a compiled model of the script, frames and all."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    module = runpy.run_path(str(script))
    torch.compiler.reset()
    with pytest.raises(Exception) as raised:  # noqa: PT011
        module["call"](module[model](), backend)
    return "".join(traceback.format_exception(raised.value))


def told(error: str) -> list[str]:
    """The last lines of an error, without what differs from run to run."""
    text = re.sub(r"/\S+/|0x\w+|\d+\.\d+", "", error)
    return [line for line in text.splitlines() if line.strip()][-8:]


def test_an_error_of_the_model_is_told_as_with_inductor(tmp_path: Path):
    errors = [error_of(tmp_path, "Wrong", backend) for backend in BACKENDS]
    for error in errors:
        assert f'script.py", line {line_of("does not fit")}, in forward' in error
        assert "return super().forward(x) + x[:, 1:]  # does not fit" in error
    assert told(errors[0]) == told(errors[1])


def test_what_inductor_cannot_compile_is_told_with_the_users_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unlowered(x: Any) -> Any:
        raise NotImplementedError("this is not lowered")

    monkeypatch.setitem(lowering.lowerings, torch.ops.aten.sin.default, unlowered)
    for backend in BACKENDS:
        with no_caches():
            error = error_of(tmp_path, "Heads", backend)
        assert "this is not lowered" in error
        assert f'script.py", line {line_of("after it")}, in forward' in error, backend


# TORCH_COMPILE_DEBUG.


def debug_folder(folder: Path, backend: str) -> Path:
    settings = {"torch._inductor.config.trace.enabled": True} | debug_dir(folder)
    environment = {"TORCH_COMPILE_DEBUG": "1"}
    done = run(folder, backend, "inference", environment=environment, settings=settings)
    assert done.returncode == 0, done.stderr
    (found,) = {path.parent for path in folder.glob("torch_compile_debug/**/output_code.py")}
    return found


@pytest.fixture(scope="module")
def inductors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_folder(tmp_path_factory.mktemp("inductor"), "inductor")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_folder(tmp_path_factory.mktemp("flashmhf"), "flashmhf")


def test_the_debug_folder_shows_the_op_with_the_users_line(ours: Path):
    graph = (ours / "fx_graph_readable.py").read_text()
    above = graph.split("torch.ops.mhf_compiler.multi_head_ffn.default(")[0]
    assert f"script.py:{line_of('# the network')} in forward" in above.rpartition("# File: ")[2]
    assert "multi_head_ffn" in (ours / "output_code.py").read_text()


def test_the_debug_folder_is_that_of_inductor(ours: Path, inductors: Path):
    names = {path.name for path in inductors.iterdir()}
    assert {"fx_graph_readable.py", "fx_graph_runnable.py", "output_code.py"} <= names
    assert {path.name for path in ours.iterdir()} == names


def test_the_debug_folders_program_runs(ours: Path):
    done = execute(ours / "fx_graph_runnable.py")
    assert done.returncode == 0, done.stderr
