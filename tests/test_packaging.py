"""The package as others meet it: its entry point, its cost of import, and its wheel."""

import itertools
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.forks import run_code
from support.inductor import NO_CPP_AT_ALL

import mhf_compiler

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def fresh(code: str) -> str:
    """What a new interpreter prints, started where no folder of the checkout can be imported."""
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def forked(code: str) -> str:
    """What a process prints that has imported PyTorch and its compilers, and nothing of ours."""
    done = run_code(code, settings=NO_CPP_AT_ALL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str, run: Callable[[str], str] = fresh) -> set[str]:
    report = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(run(f"{code}\n{report}").splitlines()[-1]))


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] == "mhf_compiler"}


def test_the_backend_is_listed_without_being_imported() -> None:
    modules = modules_after(
        "import torch._dynamo; assert 'flashmhf' in torch._dynamo.list_backends()", forked
    )
    assert not ours(modules)


HEAVY = {"triton", "sympy", "torch._dynamo", "torch._inductor", "mhf_compiler.patterns"}


def test_importing_the_package_defines_the_ops_and_is_light() -> None:
    """As a saved program needs it: with torch, and little more, no kernel and no compiler."""
    modules = modules_after(
        "import torch, mhf_compiler; torch.ops.mhf_compiler.multi_head_ffn.default"
    )
    assert not HEAVY & modules
    assert not any(name.startswith("mhf_compiler.lowering.kernels") for name in modules)


def test_loading_the_entry_point_is_as_light() -> None:
    """Dynamo loads it when a model names the back end; the rest waits for a graph."""
    modules = modules_after(
        "from importlib.metadata import entry_points\n"
        "(found,) = entry_points(group='torch_dynamo_backends', name='flashmhf')\n"
        "assert callable(found.load())"
    )
    assert not HEAVY & modules


THREADS = """
import threading, torch, mhf_compiler

start, failed = threading.Barrier(16), []

def compile():
    start.wait()
    try:
        torch.compile(torch.nn.Linear(2, 2), backend=BACKEND)
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=compile) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
"""


@pytest.mark.parametrize("backend", ["mhf_compiler.flashmhf", "'flashmhf'"])
def test_threads_may_be_the_first_to_compile(backend: str) -> None:
    """Dynamo looks a name up without a lock, see docs/compatibility.md."""
    fresh(THREADS.replace("BACKEND", backend))


NO_SITE = """
import torch
from torch import nn

class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

for model, rewrite, fallback in (
    (nn.Linear(8, 8), "auto", "inductor"),
    (SwiGLU(), "always", "aot_eager"),
    (SwiGLU(), "never", "eager"),
):
    options = {"rewrite": rewrite, "fallback": fallback, "strict": True}
    compiled = torch.compile(model, backend="flashmhf", options=options, fullgraph=True)
    x = torch.randn(2, 8)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
"""


def test_a_process_that_never_meets_a_site() -> None:
    """It needs the op's definition, as any that imports the package, and no kernels."""
    modules = modules_after(NO_SITE, forked)
    assert not any(name.startswith("mhf_compiler.lowering.kernels") for name in modules)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, since setuptools would take stale files from a `build` folder."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    hidden = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=hidden)
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_source(wheel: zipfile.ZipFile) -> None:
    installed = {"mhf_compiler": "mhf_compiler"}
    installed |= {folder: f"mhf_compiler/{folder}" for folder in ("patterns", "lowering")}
    expected = {
        f"{target}/{source.relative_to(ROOT / folder).as_posix()}"
        for folder, target in installed.items()
        for source in (ROOT / folder).rglob("*")
        if source.suffix in (".py", ".cpp", ".h", ".html", ".css", ".js")
    }
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == expected | {"mhf_compiler/py.typed"}


def test_the_wheel_names_the_entry_point_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    declared = wheel.read(entry_points).decode()
    assert "[torch_dynamo_backends]\nflashmhf = mhf_compiler.backend:flashmhf" in declared
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_versions_agree() -> None:
    version = Version(mhf_compiler.__version__)
    assert metadata.version(PROJECT["name"]) == str(version)
    assert f"\n## [{version.base_version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "version" in PROJECT["dynamic"]


def test_the_classifiers_name_the_pythons_that_are_allowed() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    named = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text}
    assert named == {f"3.{minor}" for minor in range(40) if f"3.{minor}" in allowed}


def test_the_core_needs_three_packages() -> None:
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {"torch", "triton", "sympy"}


def test_the_pinned_versions_lie_within_the_declared_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in map(Requirement, itertools.chain(*groups)):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
