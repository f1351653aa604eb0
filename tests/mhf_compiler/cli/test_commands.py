"""The command line: what it prints, its exit codes, and one line for whatever goes wrong."""

import builtins
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import mhf_compiler.__main__
import mhf_compiler.cli.doctor
from mhf_compiler import compat
from mhf_compiler.cli.bench import peak_memory
from mhf_compiler.cli.commands import commands
from mhf_compiler.cli.doctor import Check
from mhf_compiler.cli.inputs import GivenError, TensorSpec, find_dtype, parse_tensor
from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.lowering.cpu import compiled

MODELS = """
import torch
from torch import nn

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *s)) for s in ((8, 5), (5, 8)))

    def forward(self, x, shift=0):
        return (x @ self.up).relu() @ self.down + shift

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Heads() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x) / 8
        return x

class Clamped(Heads):
    def forward(self, x):
        return (x @ self.up).relu().clamp(max=1) @ self.down

made = Heads()
number = 5

def broken():
    raise TypeError("it cannot\\nbe made")

def nothing():
    return None

def sized(heads):
    return Heads()

def never_called():
    raise AssertionError
"""


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_of_a_user.py").write_text(MODELS)
    (tmp_path / "unimportable.py").write_text("import nowhere_to_be_found")
    monkeypatch.delitem(sys.modules, "models_of_a_user", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(commands, arguments)


def explain(model: str, *arguments: str, inputs: Sequence[str] = ("float32[4,6,8]",)) -> Result:
    given = [text for spec in inputs for text in ("--input", spec)]
    return call("explain", f"models_of_a_user:{model}", *given, *arguments)


def test_explain_prints_the_report():
    done = explain("Heads", "--rewrite", "always")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("1 MH-FFN rewritten, 0 declined")
    assert "models_of_a_user.py:" in done.stdout


def test_a_module_is_taken_as_it_is():
    assert "1 MH-FFN rewritten" in explain("made", "--rewrite", "always").stdout


def test_inputs_by_name():
    done = explain("Heads", "--rewrite", "always", inputs=["float32[4,6,8]", "shift=float32[8]"])
    assert "1 MH-FFN rewritten" in done.stdout


@pytest.mark.parametrize(
    ("model", "strict", "code"),
    [("Heads", True, 0), ("Clamped", False, 0), ("Clamped", True, 1)],
)
def test_strict_fails_where_nothing_was_rewritten(model: str, strict: bool, code: int):
    done = explain(model, "--rewrite", "always", *(["--strict"] if strict else []))
    assert done.exit_code == code
    assert ("clamped" in done.stdout) == (model == "Clamped")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("Tower", ["--sites", "3"], ""),
        ("Tower", ["--sites", "3", "--strict", "--fail-on-declined"], ""),
        ("Tower", ["--sites", "4"], "--sites is 4, but 3 are rewritten"),
        ("Clamped", ["--sites", "0"], ""),
        ("Clamped", ["--sites", "0", "--fail-on-declined"], "--fail-on-declined: 1 are declined"),
        ("Clamped", ["--strict"], "--strict: nothing is rewritten"),
    ],
)
def test_what_a_build_asks_for(model: str, arguments: list[str], message: str):
    done = explain(model, "--rewrite", "always", *arguments)
    assert done.exit_code == bool(message)
    assert done.stderr == (f"Error: {message}\n" if message else "")
    assert "MH-FFN" in done.stdout


@pytest.mark.parametrize("name", ["float", "float32", "torch.float32", "fp32"])
def test_dtypes_have_torchs_names_and_aliases(name: str):
    assert parse_tensor(f"{name.removeprefix('torch.')}[2]").dtype is torch.float32
    assert find_dtype(name, "") is torch.float32


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--dtype", "bf16"], "(4, 1, 5, 8) bfloat16"),
        (["--autocast", "bfloat16"], "(4, 1, 5, 8) bfloat16"),
        (["--dynamic"], "tokens (dynamic)"),
        (["--device", "meta"], "1 MH-FFN rewritten"),
        (["--device", "cuda:h100", "--dtype", "bf16"], "backward kernel of dV"),
        (["--option", "rewrite=never"], "option 'rewrite' is 'never'"),
    ],
)
def test_how_a_model_is_called(arguments: list[str], shown: str):
    done = explain("Heads", "--rewrite", "always", *arguments)
    assert done.exit_code == 0, done.output
    assert shown in done.stdout


def test_a_factory_takes_arguments():
    done = explain("sized", "--rewrite", "always", "--factory-arg", "heads=4")
    assert "1 MH-FFN rewritten" in done.stdout


def test_a_file_is_as_good_as_a_module(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "of_a_file.py").write_text(f"{MODELS}\nimport beside_it")
    (tmp_path / "folder" / "beside_it.py").write_text("")
    for name in ("of_a_file.py", "of_a_file"):
        given = ("--input", "float32[4,6,8]", "--rewrite", "always")
        done = call("explain", f"{tmp_path}/folder/{name}:Heads", *given)
        assert "1 MH-FFN rewritten" in done.stdout, done.output


@pytest.mark.parametrize("flag", ["--html", "--json"])
def test_a_file_that_cannot_be_written_fails_before_the_run(flag: str):
    done = explain("never_called", flag, "/nowhere/at/all/report")
    assert done.exit_code == 2
    assert done.stderr == (
        "Error: '/nowhere/at/all/report' cannot be written: /nowhere/at/all does not exist\n"
    )


def test_no_grad_is_honoured():
    assert "backward" in explain("Heads", "--rewrite", "always").stdout
    assert "backward" not in explain("Heads", "--rewrite", "always", "--no-grad").stdout


def test_explain_writes_files(tmp_path: Path):
    path, page = tmp_path / "report.json", tmp_path / "report.html"
    explain("Heads", "--rewrite", "always", "--json", str(path), "--html", str(page))
    assert len(json.loads(path.read_text())["graphs"][0]["rewritten"]) == 1
    assert "<title>1 MH-FFN rewritten" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models_of_a_user"], "must be package.module:factory or file.py:factory"),
        (["models_of_a_user.Heads"], "is it models_of_a_user:Heads?"),
        (["model_of_a_user:Heads"], "the nearest is 'models_of_a_user'"),
        (["nowhere/model.py:Heads"], "cannot import 'nowhere/model.py': there is no such file"),
        (["models_of_a_user:Heads", "--factory-arg", "4"], "must be name=value"),
        (["models_of_a_user:made", "--factory-arg", "a=4"], "which takes no --factory-arg"),
        (["models_of_a_user:sized"], "'heads'; --factory-arg name=value passes an argument"),
        (["models_of_a_user:Heads", "--dtype", "flot16"], "the nearest is float16"),
        (["models_of_a_user:Heads", "--dtype", "int64"], "must be a floating one"),
        (["models_of_a_user:Heads", "--option", "rewite=never"], "the nearest is 'rewrite'"),
        (["unimportable:f"], "cannot import 'unimportable': ModuleNotFoundError: No module"),
        (["unimportable:f"], "unimportable.py:1"),
        (["models_of_a_user:Head"], "has no 'Head'; the nearest is 'Heads'"),
        (["models_of_a_user:number"], "is of type int, must be a factory or a module"),
        (["models_of_a_user:broken"], "the factory raised TypeError: it cannot, at "),
        (["models_of_a_user:nothing"], "the factory returned a NoneType, not a module"),
        (["models_of_a_user:Heads", "--input", "float32"], "such as float32[2,16,768]"),
        (["models_of_a_user:Heads", "--input", "float32[2,x]"], "must be dtype[sizes]"),
        (["models_of_a_user:Heads", "--input", "float32[2,,3]"], "has an empty size"),
        (["models_of_a_user:Heads", "--input", "flot32[2]"], "the nearest is float32"),
        (
            ["models_of_a_user:Heads", "--input", "float32[4,6,7]"],
            "the model raised RuntimeError: ",
        ),
        (["models_of_a_user:Heads", "--input", "float32[4,6,7]"], "models_of_a_user.py:11"),
        (["models_of_a_user:Heads", "--device", "toaster"], "must be cpu, cuda or cuda:N"),
        (["models_of_a_user:Heads", "--device", "mps"], "must be cpu, cuda or cuda:N"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("command", ["explain", "bench"])
def test_what_cannot_be_done_is_one_line(command: str, arguments: list[str], message: str):
    done = call(command, *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_a_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = explain("Heads", "--device", "cuda")
    assert done.exit_code == 2
    assert done.stderr == "Error: device 'cuda': torch sees no CUDA device\n"


def bench(model: str, *arguments: str) -> Result:
    given = ("--input", "float32[4,6,8]", "--rounds", "2")
    return call("bench", f"models_of_a_user:{model}", *given, *arguments)


def times(output: str) -> list[str]:
    """What was timed: the first words of the rows that have times."""
    return [line.split("  ")[0] for line in output.splitlines() if " ms " in line]


def test_bench_compares_both_ways():
    done = bench("Heads", "--no-grad")
    assert done.exit_code == 0, done.output
    assert times(done.stdout) == ["forward"]
    assert "as written     rewritten   speed-up" in done.stdout
    assert re.search(r"^peak memory +[\d.]+ k?B +[\d.]+ k?B +[\d.]+ x$", done.stdout, re.MULTILINE)


def test_the_peak_memory_is_what_is_alive_at_once():
    """Three tensors of 4 kB; the first of them is gone when the last is made."""

    def run() -> Tensor:
        second = torch.ones(1000) + 1
        return second * 2

    if not torch.cuda.is_available():
        assert 8000 <= peak_memory(run) < 8100  # and numbers


def test_bench_takes_one_site_by_its_number_in_the_report():
    done = bench("Tower", "--site", "1")
    assert done.exit_code == 0, done.output
    title, numbers, *_ = done.stdout.splitlines()
    assert title.startswith("site 1: layers.1 at ")
    assert title.endswith("models_of_a_user.py:11: 4 heads of width 8, 1 x 5 hidden units, relu")
    assert numbers.startswith("numbers agree: ")
    assert times(done.stdout) == ["forward", "forward + backward"]
    assert "  0-2   " in explain("Tower", "--rewrite", "always").stdout


@pytest.mark.parametrize(
    ("model", "site", "message"),
    [
        ("Tower", "3", "there is no site 3: they are numbered 0 to 2"),
        ("Tower", "-1", "there is no site -1: they are numbered 0 to 2"),
        ("Heads", "1", "there is no site 1: the only one is 0"),
        ("Clamped", "0", "0 MH-FFNs rewritten, 1 declined, in 1 graph: nothing to compare"),
    ],
)
def test_a_site_that_is_not_there_is_one_line(model: str, site: str, message: str):
    done = bench(model, "--site", site)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {message}")


def test_no_times_where_the_numbers_disagree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "takes", lambda q, activation: False)
    monkeypatch.setitem(ACTIVATIONS, "relu", ACTIVATIONS["silu"])
    done = bench("Heads", "--site", "0", "--no-grad")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: 1 of 1 results are wrong: output 0: error ")
    assert times(done.stdout) == []


def test_bench_needs_something_to_compare():
    done = bench("Clamped")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: 0 MH-FFNs rewritten, 1 declined")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("explain", ("--device", "cuda:h10"), "the nearest is 'cuda:h100'"),
        ("explain", ("--device", "meta", "--autocast", "bf16"), "needs a device that computes"),
        ("bench", ("--device", "cuda:h100"), "on which nothing can be timed"),
    ],
)
def test_what_a_card_that_is_not_there_cannot_do(
    command: str, arguments: Sequence[str], message: str
):
    done = call(command, "models_of_a_user:Heads", "--input", "float32[4,6,8]", *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("arguments", [(), ("--site", "0")])
def test_bench_needs_the_device(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = bench("Heads", "--device", "cuda", *arguments)
    assert done.exit_code == 2
    assert done.stderr == "Error: device 'cuda': torch sees no CUDA device\n"


def test_build_ops_prints_the_path_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def build(source: Path, library: Path) -> Path:
        library.write_text("built")
        return library

    monkeypatch.setattr(compat, "build_cpp", build)
    done = call("build-ops", str(tmp_path / "new"))
    assert done.exit_code == 0
    assert Path(done.stdout.strip()).read_text() == "built"


def test_build_ops_says_in_one_line_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(source: Path, library: Path) -> Path:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(compat, "build_cpp", fail)
    done = call("build-ops", str(tmp_path))
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "no compiler" in line


def test_info_says_what_runs_and_why_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = call("info").stdout
    assert f"torch           {torch.__version__.partition('+')[0]}" in text
    assert "Triton kernels  no: torch sees no CUDA device" in text
    found = json.loads(call("info", "--json").stdout)
    assert found["versions"]["mhf-compiler"] == mhf_compiler.__version__
    assert [kernels["missing"] is None for kernels in found["kernels"]] == [True, False, False]


@pytest.mark.parametrize(
    ("capability", "name", "missing"),
    [
        ((9, 0), "Hopper kernels", None),
        ((8, 0), "Hopper kernels", "the card has compute capability 8.0, not 9.x"),
        ((8, 0), "Triton kernels", None),
    ],
)
def test_kernels_by_card(capability: tuple[int, int], name: str, missing: str | None):
    pytest.importorskip("triton")
    assert mhf_compiler.cli.doctor._missing(name, capability) == missing


def test_doctor_finds_nothing_here():
    done = call("doctor")
    assert done.exit_code == 0, done.stdout
    assert "broken" not in done.stdout


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (None, "no .* on the PATH"),
        ("echo 'fatal error: cc1plus' >&2; exit 1", "does not compile a small program: fatal"),
        ("exit 3", "it exits with 3"),
        ("exit 0", "OSError"),
    ],
    ids=["none", "broken", "silent", "writes nothing"],
)
def test_doctor_runs_the_compiler(
    script: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiler = tmp_path / "c++"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    name = "there is a C++ compiler that works"
    monkeypatch.setattr(
        mhf_compiler.cli.doctor, "_CHECKS", {name: mhf_compiler.cli.doctor._CHECKS[name]}
    )
    (check,) = mhf_compiler.cli.doctor.check_up()
    assert re.search(found, str(check.problem))


def test_doctor_says_what_is_broken(monkeypatch: pytest.MonkeyPatch):
    def fails() -> str | None:
        raise RuntimeError("no\nway")

    checks = {"this works": lambda: None, "this does not": lambda: "why", "this fails": fails}
    monkeypatch.setattr(mhf_compiler.cli.doctor, "_CHECKS", checks)
    assert mhf_compiler.cli.doctor.check_up()[2] == Check("this fails", "RuntimeError: no")
    done = call("doctor")
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "ok      this works",
        "broken  this does not: why",
        "broken  this fails: RuntimeError: no",
    ]


def test_a_version_out_of_range_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mhf_compiler.cli.doctor, "_version", lambda package: "1.0+cpu")
    assert str(mhf_compiler.cli.doctor._in_range("torch")).startswith("torch is 1.0: pip install")


@pytest.mark.parametrize("command", ["explain", "bench", "build-ops", "info", "doctor"])
def test_every_command_has_help(command: str):
    done = call(command, "--help")
    assert done.exit_code == 0
    assert "Usage: " in done.stdout


def test_the_missing_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = builtins.__import__

    def without_click(name: str, *others: Any) -> Any:
        if name == "click":
            raise ModuleNotFoundError("No module named 'click'", name="click")
        return real(name, *others)

    monkeypatch.delitem(sys.modules, "mhf_compiler.cli.commands")
    monkeypatch.setattr(builtins, "__import__", without_click)
    with pytest.raises(SystemExit) as caught:
        mhf_compiler.__main__.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "Error: the command line needs click: pip install click, or in a checkout '.[cli]'\n"
    )


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("float32[2,16,768]", TensorSpec(torch.float32, (2, 16, 768))),
        (" bfloat16[ 2, 3 ] ", TensorSpec(torch.bfloat16, (2, 3))),
        ("mask=bool[4]", TensorSpec(torch.bool, (4,), "mask")),
        ("int64[]", TensorSpec(torch.int64, ())),
    ],
)
def test_tensors_by_dtype_and_shape(text: str, spec: TensorSpec):
    assert parse_tensor(text) == spec
    made = spec.make(torch.device("cpu"))
    assert (made.dtype, tuple(made.shape)) == (spec.dtype, spec.shape)


@pytest.mark.parametrize("text", ["", "float32(2)", "float32[-1]", "[2]", "float32[2.5]"])
def test_malformed_tensors_are_refused(text: str):
    with pytest.raises(GivenError, match=r"must be dtype\[sizes\]"):
        parse_tensor(text)
