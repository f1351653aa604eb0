"""The environment: versions, card, which kernels run and why others do not, what is broken."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from .inputs import one_line

_REQUIRED = {  # kernel family -> module that it needs besides a CUDA device
    "Triton kernels": "triton",
    "Hopper kernels": "triton.experimental.gluon",
}


@dataclass(frozen=True)
class Kernels:
    """One family of kernels; ``missing`` says why it does not run here."""

    name: str
    missing: str | None


@dataclass(frozen=True)
class Environment:
    """What ``mhf-compiler info`` prints."""

    versions: dict[str, str]
    card: str | None
    capability: str | None
    architectures: list[str]
    kernels: list[Kernels]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """One thing that has to work; ``problem`` says what is wrong and what to do, if it does not."""

    name: str
    problem: str | None


def look_around() -> Environment:
    """Versions, the first card, and which kernels run on it."""
    seen = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if seen else None
    return Environment(
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in ("mhf-compiler", "torch", "triton", "sympy")},
            "cuda": str(torch.version.cuda),
        },
        card=torch.cuda.get_device_name() if seen else None,
        capability=None if capability is None else ".".join(map(str, capability)),
        architectures=torch.cuda.get_arch_list() if seen else [],
        kernels=[
            Kernels("CPU path", None),
            *(Kernels(name, _missing(name, capability)) for name in _REQUIRED),
        ],
    )


def _missing(name: str, capability: tuple[int, int] | None) -> str | None:
    if capability is None:
        return "torch sees no CUDA device"
    if name == "Hopper kernels" and capability[0] != 9:
        return f"the card has compute capability {capability[0]}.{capability[1]}, not 9.x"
    try:
        importlib.import_module(_REQUIRED[name])
    except Exception as error:
        return one_line(error)
    return None


def check_up() -> list[Check]:
    """Try everything that a compilation needs."""
    return [Check(name, _problem(check)) for name, check in _CHECKS.items()]


def _problem(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:
        return one_line(error)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _in_range(package: str) -> str | None:
    """Compare the installed version with the range that this package declares."""
    declared = metadata.requires("mhf-compiler") or []
    (line,) = (text for text in declared if re.match(rf"{package}\b", text))
    bounds = re.findall(r"([<>]=?)([\d.]+)", line.split(";")[0])
    installed = TorchVersion(_version(package).split("+")[0])
    fits = {
        ">=": lambda limit: installed >= limit,
        "<": lambda limit: installed < limit,
        ">": lambda limit: installed > limit,
        "<=": lambda limit: installed <= limit,
    }
    if all(fits[sign](limit) for sign, limit in bounds):
        return None
    wanted = ",".join(sign + limit for sign, limit in bounds)
    return f"{package} is {installed}: pip install '{package}{wanted}'"


def _triton() -> str | None:
    return _in_range("triton") if platform.system() == "Linux" else None


def _entry_point() -> str | None:
    found = [e.value for e in metadata.entry_points(group="torch_dynamo_backends", name="flashmhf")]
    if found == ["mhf_compiler.backend:flashmhf"]:
        return None
    if not found:
        return "torch does not find it by name: pip install the package, do not only copy it"
    return f"several packages offer it: {', '.join(found)}"


def _imports() -> str | None:
    for package in ("patterns", "lowering"):
        importlib.import_module(f"mhf_compiler.{package}")
    return None


_PROGRAM = """
#include <cmath>
extern "C" double root(double x) { return std::sqrt(x); }
"""


def _compiler() -> str | None:
    """Build and call a small library, as Inductor does: a compiler that is found may be broken."""
    wanted = os.environ.get("CXX") or "g++"
    if shutil.which(wanted) is None:
        return f"no {wanted} on the PATH: Inductor's CPU code needs a C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "root.cpp"), Path(folder, "root.so")
        source.write_text(_PROGRAM)
        command = [wanted, "-shared", "-fPIC", "-fopenmp", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            (why, *_) = done.stderr.strip().splitlines() or [f"it exits with {done.returncode}"]
            return f"{wanted} does not compile a small program: {why}"
        root = ctypes.CDLL(str(library)).root
        root.restype, root.argtypes = ctypes.c_double, [ctypes.c_double]
        return None if root(4.0) == 2.0 else f"{wanted} compiles a small program wrongly"


def _cpu_library() -> str | None:
    from ..lowering.cpu import compiled

    return compiled.problem()


class _Heads(nn.Module):
    """A small MH-FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *s)) for s in ((64, 32), (32, 64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.up).relu() @ self.down


def _compiles(device: str) -> str | None:
    from ..compat import counters

    model, x = _Heads().to(device), torch.randn(4, 16, 64, device=device)
    options: dict[str, Any] = {"rewrite": "always", "fallback": "eager", "strict": True}
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        difference = torch.compile(model, backend="flashmhf", options=options)(x) - model(x)
    torch.compiler.reset()
    if counters["flashmhf"]["sites_rewritten"] != 1:
        return "a small network was not rewritten: TORCH_LOGS=mhf_compiler says why"
    error = difference.abs().max().item()
    return None if error < 0.1 else f"a small network differs by {error:.2g} from eager"


def _compiles_on_the_card() -> str | None:
    return _compiles("cuda") if torch.cuda.is_available() else None


_CHECKS: dict[str, Callable[[], str | None]] = {
    "torch is in the supported range": lambda: _in_range("torch"),
    "triton is in the supported range": _triton,
    "the back end is registered": _entry_point,
    "recogniser and op can be imported": _imports,
    "there is a C++ compiler that works": _compiler,
    "the op's C++ for the CPU can be built": _cpu_library,
    "a network is rewritten and right on the CPU": lambda: _compiles("cpu"),
    "a network is rewritten and right on the GPU, if there is one": _compiles_on_the_card,
}
