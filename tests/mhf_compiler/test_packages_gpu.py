"""Packages of AOTInductor's for a GPU, in Python processes that know nothing of this package.

pytest --require-gpu -m gpu tests/mhf_compiler/test_packages_gpu.py tests/examples/test_cpp_gpu.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import Heads
from support.problems import BIASES, NAMES, Shape, make, relative_error
from torch import Tensor, nn
from torch.export import Dim, export

import mhf_compiler
from mhf_compiler.lowering import multi_head_ffn_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_python_loads_packages")]

RUN = """
import sys, torch
for folder in sys.argv[1:]:
    model = torch._inductor.aoti_load_package(folder + "/model.pt2")
    results = [model(*x) for x in torch.load(folder + "/given.pt")]
    torch.cuda.synchronize()
    torch.save(results, folder + "/results.pt")
assert "mhf_compiler" not in sys.modules
"""
ROUNDED = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


class Network(nn.Module):
    """The op with weights of its own; queries and router's weights are given, or queries alone."""

    def __init__(self, shape: Shape, dtype: torch.dtype, absent: tuple[str, ...], **options: Any):
        super().__init__()
        tensors = make(shape, dtype, absent, scaled=True, router_dtype=torch.float32, device="cuda")
        self.weights = nn.ParameterDict({n: tensors[n] for n in NAMES if n not in ("q", "r")})
        self.given = [x for x in (tensors["q"], tensors["r"]) if x is not None]
        self.options = options

    def arguments(self, q: Tensor, r: Tensor | None = None) -> dict[str, Any]:
        return {"q": q, "r": r, **dict(self.weights.items()), **self.options}

    def forward(self, q: Tensor, r: Tensor | None = None) -> Tensor:
        return mhf_compiler.multi_head_ffn(**self.arguments(q, r))

    def exact(self, q: Tensor, r: Tensor | None = None) -> Tensor:
        wide = {
            name: x.double() if isinstance(x, Tensor) else x
            for name, x in self.arguments(q, r).items()
        }
        return multi_head_ffn_reference(**wide)


def packaged(program: Any, folder: Path, given: list[tuple[Tensor, ...]]) -> None:
    folder.mkdir()
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.save(given, folder / "given.pt")


def run(*folders: Path) -> list[list[Tensor]]:
    """What the packages return in a process of their own."""
    command = [sys.executable, "-c", RUN, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / "results.pt") for folder in folders]


@pytest.fixture(scope="module")
def _python_loads_packages(tmp_path_factory: pytest.TempPathFactory) -> None:
    """PyTorch 2.11 has crashed in Python while it loaded a package of one linear layer, too."""
    folder, x = tmp_path_factory.mktemp("packages") / "linear", torch.randn(2, 8, device="cuda")
    packaged(export(nn.Linear(8, 8).cuda(), (x,)), folder, [(x,)])
    command = [sys.executable, "-c", RUN, str(folder)]
    if subprocess.run(command, capture_output=True).returncode < 0:
        pytest.skip("PyTorch cannot load a package for a GPU here; test_cpp_gpu.py runs one")


PAPERS = Shape(B=2, L=777, H=4, d=128, G=4, E=5, f=96)
CASES = {
    "many tokens": (PAPERS, torch.bfloat16, BIASES, {}),
    "shared weights": (PAPERS._replace(G=2, d=64, f=40), torch.float16, (), {}),
    "ungated": (PAPERS._replace(d=80), torch.bfloat16, ("u", "u_bias", "r"), {}),
    "another order": (PAPERS, torch.bfloat16, BIASES, {"out_order": (2, 0, 1, 3)}),
    "few tokens, in parts": (PAPERS._replace(B=1, L=1), torch.bfloat16, ("v_bias",), {}),
    "wide heads, by products": (PAPERS._replace(d=320), torch.bfloat16, (), {}),
    "float32, by products": (PAPERS, torch.float32, (), {}),
    "float32, few tokens": (PAPERS._replace(B=1, L=9), torch.float32, (), {}),
}


def test_kernels(tmp_path: Path) -> None:
    """Each way in which a network is packaged, on the numbers that the op itself is tested with."""
    models = {}
    for number, (name, (shape, dtype, absent, options)) in enumerate(CASES.items()):
        model = Network(shape, dtype, absent, **options)
        models[name] = model, tmp_path / str(number)
        program = export(model, tuple(model.given))
        packaged(program, models[name][1], [tuple(model.given)])
    results = run(*(folder for _, folder in models.values()))
    for (name, (model, _)), (found,) in zip(models.items(), results, strict=True):
        expected = model.exact(*model.given)
        assert relative_error(found, expected) < ROUNDED[found.dtype], name
        assert found.stride() == model(*model.given).stride(), name


def test_dynamic_sizes(tmp_path: Path) -> None:
    """One package for any batch and length."""
    model = Network(PAPERS, torch.bfloat16, BIASES)
    q, r = model.given
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=4096)}
    program = export(model, (q, r), dynamic_shapes=(sizes, sizes))
    given = [
        tuple(torch.randn(*size, *x.shape[2:], device="cuda").to(x.dtype) for x in (q, r))
        for size in ((1, 1), (2, 77), (3, 1), (1, 2000))
    ]
    packaged(program, tmp_path / "dynamic", given)
    (results,) = run(tmp_path / "dynamic")
    for found, arguments in zip(results, given, strict=True):
        assert relative_error(found, model.exact(*arguments)) < ROUNDED[torch.bfloat16]


def test_a_rewritten_program(tmp_path: Path) -> None:
    """With a router's product and norms around it, and the report says what the package has."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = Heads(), nn.RMSNorm(32), Heads()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.norm(x + self.first(x)))

    model = Model().cuda().bfloat16().eval()
    x = torch.randn(4, 513, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        report, options = mhf_compiler.Report(), {"rewrite": "always", "strict": True}
        program = mhf_compiler.rewrite(
            export(model, (x,)), options=options, report=report, package=True
        )
        expected = model(x)
    assert len(report.rewritten) == 2
    for site in report.rewritten:
        assert site.lowered[1].startswith("in a package of AOTInductor's: plain Triton's kernel")
    packaged(program, tmp_path / "model", [(x,)])
    ((found,),) = run(tmp_path / "model")
    assert relative_error(found, expected.double()) < 2e-2
