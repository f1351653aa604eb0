"""The quick tests, the canary and the compiled kernels, with every pair of PyTorch and Triton.

    python -m tests.matrix              every pair, one after the other
    python -m tests.matrix 2.11 2.15    these

Each pair gets an environment in build/matrix, some 6 GB, which is deleted after its run unless
--keep is given. Prints a table, and exits with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "build" / "matrix"
#: PyTorch's releases and the Triton that each of them requires
PAIRS = {
    "2.11.0": "3.6.0",
    "2.12.1": "3.7.1",
    "2.13.0": "3.7.1",
    "2.14.1": "3.8.0",
    "2.15.0": "3.9.0",
}
TRACED_AND_COMPILED = ["tests/test_canary.py", "tests/lowering/test_kernels_compiled.py"]


@dataclass
class Run:
    """What the tests of one pair gave."""

    torch: str
    triton: str
    quick: str
    kernels: str
    minutes: float

    @property
    def good(self) -> bool:
        """Whether tests ran and none failed."""
        return all(
            re.fullmatch(r"\d+ passed(, \d+ skipped)?", x) for x in (self.quick, self.kernels)
        )


def environment(torch: str, triton: str) -> Path:
    """The interpreter of an environment with this pair, the package and what its tests need."""
    folder = ENVIRONMENTS / f"torch-{torch}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*extras["test"], *extras["bench"], *extras["cli"], *extras["demo"]]
    ruff = [name for name in extras["dev"] if name.startswith("ruff")]
    subprocess.run(
        [*install, f"torch=={torch}", f"triton=={triton}", *needed, *ruff, "wheel"], check=True
    )
    editable = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    subprocess.run([*install, *editable], check=True)
    return python


def tests(python: Path, arguments: list[str]) -> str:
    """Run tests, and return pytest's counts."""
    command = [str(python), "-m", "pytest", "-m", "not gpu", "-q", "-n", "2", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    counts = re.findall(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s", done.stdout, re.MULTILINE)
    return counts[-1] if counts else f"pytest ended with {done.returncode}"


def quick_tests() -> list[str]:
    """The list that `make quick` runs."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(r"^QUICK := (.*)$", text, re.MULTILINE)
    assert found is not None
    return found[1].split()


def run(torch: str, triton: str, keep: bool) -> Run:
    """Make the environment of a pair, run its tests, and delete it again."""
    started = time.perf_counter()
    python = environment(torch, triton)
    counts = tests(python, quick_tests()), tests(python, TRACED_AND_COMPILED)
    if not keep:
        shutil.rmtree(python.parent.parent)
    return Run(torch, triton, *counts, (time.perf_counter() - started) / 60)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("torch", nargs="*", help="releases, such as 2.11; none: all")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    wanted = {
        torch: triton
        for torch, triton in PAIRS.items()
        if not options.torch or any(f"{torch}.".startswith(f"{x}.") for x in options.torch)
    }
    runs = [run(torch, triton, options.keep) for torch, triton in wanted.items()]
    print("| torch | Triton | quick tests | canary and kernels | minutes |")
    print("|---|---|---|---|---|")
    for x in runs:
        print(f"| {x.torch} | {x.triton} | {x.quick} | {x.kernels} | {x.minutes:.1f} |")
    return not all(x.good for x in runs)


if __name__ == "__main__":
    sys.exit(main())
