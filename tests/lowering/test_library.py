"""The ops in C++: what a process computes that has the library, and not the package."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.library import ops_library
from support.problems import BIASES, NAMES, Shape, make
from torch import Tensor

import mhf_compiler
from mhf_compiler import compat, multi_head_ffn
from mhf_compiler.lowering import multi_head_ffn_reference, router_product
from mhf_compiler.lowering.activations import ACTIVATIONS

__all__ = ["ops_library"]

pytestmark = pytest.mark.filterwarnings("ignore:.*TypedStorage")

SHAPE = Shape(B=2, L=21, H=4, d=5, G=2, E=3, f=7)
SCALES = {"k_scale": 0.7, "u_scale": 1.3, "out_scale": 0.4}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: computes all that is asked in one process, since PyTorch takes seconds to load
SCRIPT = """
import sys
import torch

library, folder = sys.argv[1:]
torch.ops.load_library(library)
torch.set_num_threads(2)
answers = {}
for name, (op, arguments) in torch.load(f"{folder}/calls.pt").items():
    try:
        answers[name] = getattr(torch.ops.mhf_compiler, op)(*arguments)
    except (RuntimeError, ValueError) as error:
        answers[name] = str(error)
assert not any(name.startswith("mhf_compiler") for name in sys.modules)
try:
    import mhf_compiler
except ImportError as error:
    answers["import"] = str(error)
torch.save(answers, f"{folder}/answers.pt")
"""


def network(shape: Shape = SHAPE, dtype: torch.dtype = torch.float32, **changes: Any) -> dict:
    """The op's arguments: random tensors and scales, with some replaced."""
    given = {**make(shape, dtype, scaled=True), "activation": "silu", **SCALES}
    return given | {"out_order": None, "out_dtype": None} | changes


def strided() -> dict[str, Tensor]:
    """Tensors of which none lies in memory as its axes are written."""
    tensors = {name: x for name, x in make(SHAPE, scaled=True).items() if x is not None}
    return {
        name: torch.stack([x.movedim(-1, 0)] * 2, -1)[..., 0].movedim(0, -1)
        for name, x in tensors.items()
    }


NETWORKS = {
    **{f"{str(dtype)[6:]}": network(dtype=dtype) for dtype in DTYPES},
    **{name: network(activation=name) for name in ACTIVATIONS},
    "strided": network(**strided()),
    "no gate": network(u=None, u_bias=None),
    "no router, no biases": network(**dict.fromkeys(("r", *BIASES))),
    "router in float32": network(
        dtype=torch.bfloat16, r=make(SHAPE, scaled=True)["r"], out_dtype=torch.float32
    ),
    "another order": network(out_order=[2, 0, 3, 1]),
    "one token": network(SHAPE._replace(B=1, L=1)),
    "several threads": network(SHAPE._replace(L=150, d=32, f=70)),
    "no tokens": network(SHAPE._replace(L=0)),
}


def routed(dtype: torch.dtype, weights: torch.dtype, groups: int = 4, length: int = 21) -> tuple:
    torch.manual_seed(0)
    q, weight = torch.randn(2, 4, length, 5), torch.randn(groups, 5, 3)
    return q.to(dtype).transpose(1, 2), weight.to(weights)


NARROW = (torch.bfloat16, torch.float16)
ROUTERS = {
    **{
        f"{str(dtype)[6:]} times {str(weights)[6:]}": (*routed(dtype, weights), None)
        for dtype, weights in itertools.product(NARROW, (torch.float32, torch.bfloat16))
    },
    "shared weights": (*routed(torch.bfloat16, torch.float32, groups=2), None),
    "router in another order": (*routed(torch.bfloat16, torch.float32), [2, 3, 0, 1]),
    "more tokens than a block": (*routed(torch.bfloat16, torch.float32, length=500), None),
    "router of no tokens": (*routed(torch.bfloat16, torch.float32, length=0), None),
}

WRONG = {
    "k must have the dimensions": network(k=torch.randn(2, 3, 7)),
    "u of shape": network(u=torch.randn(2, 3, 8, 5)),
    "v is BFloat16, must be Float as q": network(v=make(SHAPE, torch.bfloat16)["v"]),
    "q is Long": network(q=torch.zeros(2, 21, 4, 5, dtype=torch.long)),
    "multiple of the G=": network(
        **{name: make(SHAPE._replace(G=3))[name] for name in NAMES if name not in ("q", "r")}
    ),
    "u_bias is given but u is None": network(u=None),
    "activation must be one of": network(activation="swish"),
    "out_order must be a permutation": network(out_order=[0, 1, 2, 2]),
    "out_dtype is Int": network(out_dtype=torch.int32),
    "at least 1": network(
        **{name: make(SHAPE._replace(f=0))[name] for name in ("k", "u", "v", "k_bias", "u_bias")}
    ),
}


@pytest.fixture(scope="module")
def answers(ops_library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("answers")
    calls = {
        name: ("multi_head_ffn", tuple(given.values()))
        for name, given in (NETWORKS | WRONG).items()
    }
    calls |= {name: ("router_product", given) for name, given in ROUTERS.items()}
    calls["q is Float"] = ("router_product", routed(torch.float32, torch.float32))
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-c", SCRIPT, str(ops_library), str(folder)]
    subprocess.run(command, check=True, cwd=folder)
    found: dict[str, Any] = torch.load(folder / "answers.pt")
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network(answers: dict[str, Any], name: str):
    given, found = NETWORKS[name], answers[name]
    assert isinstance(found, Tensor), found
    tensors = {key: x if x is None else x.double() for key, x in given.items() if key in NAMES}
    constants = {key: given[key] for key in ("activation", *SCALES)}
    expected = multi_head_ffn_reference(**tensors, **constants)
    torch.testing.assert_close(found, expected.to(found.dtype))
    python = multi_head_ffn(**given)
    assert (found.dtype, found.stride()) == (python.dtype, python.stride())


@pytest.mark.parametrize("name", ROUTERS)
def test_the_product_of_a_router(answers: dict[str, Any], name: str):
    q, weight, order = ROUTERS[name]
    expected = router_product(q, weight, order)
    torch.testing.assert_close(answers[name], expected)
    assert answers[name].stride() == expected.stride()


@pytest.mark.parametrize("why", [*WRONG, "q is Float"])
def test_wrong_arguments(answers: dict[str, Any], why: str):
    """Whatever Python refuses is refused, in fewer words."""
    assert isinstance(answers[why], str), "accepted"
    assert why in answers[why]
    if why in WRONG:
        with pytest.raises(mhf_compiler.ArgumentError):
            multi_head_ffn(**WRONG[why])


def test_the_package_is_not_imported_after_the_library(answers: dict[str, Any]):
    assert "import mhf_compiler before" in answers["import"]


def test_the_library_is_loaded_after_the_package(ops_library: Path):
    """It changes nothing: gradients are still those of the package."""
    torch.ops.load_library(str(ops_library))
    q = torch.randn(1, 2, 1, 3, requires_grad=True)
    weight = torch.randn(1, 1, 4, 3)
    multi_head_ffn(q, weight, weight, weight).sum().backward()
    assert q.grad is not None


def test_it_needs_nothing_of_python(ops_library: Path):
    needed = subprocess.run(
        ["readelf", "--dynamic", str(ops_library)], check=True, capture_output=True, text=True
    ).stdout
    assert "libtorch_cpu" in needed
    assert "python" not in needed


def test_a_failure_leaves_the_old_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(source: Path, library: Path) -> Path:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compat, "build_cpp", fail)
    library = tmp_path / "lib" / "libmhf_compiler_ops.so"
    library.parent.mkdir()
    library.write_text("old")
    with pytest.raises(RuntimeError, match="no compiler"):
        mhf_compiler.build_ops(tmp_path)
    assert [path.read_text() for path in library.parent.glob("*.so")] == ["old"]
    assert [path.name for path in library.parent.glob("tmp*")] == []
