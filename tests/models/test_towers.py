"""The number of sites as a function of layers, and the modes that a model runs in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import mhf_compiler
from models.harness import (
    OPTIONS,
    Tally,
    assert_close,
    assert_same_steps,
    flashmhf,
    step,
    tally,
)
from models.networks import FFNS, Tower, tokens

SCRIPT = Path(__file__).parents[2] / "examples" / "byte_lm.py"

TRIPLE = ("einsum", "loop", "packed")


# The number of layers is counted in one spelling.
@pytest.mark.parametrize(("name", "layers"), [*((name, 1) for name in FFNS), ("loop", 3)])
def test_one_network_a_layer(name: str, layers: int):
    assert_same_steps(Tower(layers, [name]).double(), tokens())
    assert tally() == Tally(sites=layers)


def test_several_networks_a_layer():
    assert_same_steps(Tower(1, TRIPLE).double(), tokens())
    assert tally() == Tally(sites=3)


def test_all_spellings_in_one_model():
    report = mhf_compiler.explain(Tower(1, list(FFNS)).double(), options=OPTIONS)(tokens())
    assert len(report.rewritten) == len(FFNS)
    assert report.declined == []


@pytest.fixture(scope="module")
def byte_lm() -> ModuleType:
    """The example, whose model is the paper's."""
    for package in ("matplotlib", "psutil", "rich", "tqdm"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("byte_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["byte_lm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("layers", "training"), [(1, False), (2, True)])
def test_a_language_model_as_the_authors_write_it(byte_lm: ModuleType, layers: int, training: bool):
    """Its norms, router and sums are float32, whatever the rest is."""
    size = replace(
        byte_lm.SIZES["demo"], d_model=32, layers=layers, attention_heads=2, ffn_heads=2, length=16
    )
    model = byte_lm.ByteLM(size).train(training)
    assert_same_steps(model, torch.randint(256, (2, 16)))
    assert tally() == Tally(sites=layers)


# Modes.


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inference(context: Callable[[], torch.autograd.grad_mode.no_grad]):
    model = Tower(1, TRIPLE).double().eval()
    x = tokens()
    with context():
        found = flashmhf(model)(x)
        torch.testing.assert_close(found, model(x))
    assert tally() == Tally(sites=3)


def test_training_and_inference_in_turn():
    """Evaluation between steps of training: each has a graph of its own."""
    model, x = Tower(2).double(), tokens()
    call = flashmhf(model)
    for training in (True, False, True, False):
        model.train(training)
        assert_close(step(call, model, [x]), step(model, model, [x]))
    assert tally() == Tally(sites=2 * 2)


def _all_but_networks(model: Tower) -> list[nn.Parameter]:
    networks = {id(p) for block in model.blocks for p in block.parts[1:].parameters()}
    return [p for p in model.parameters() if id(p) not in networks]


def _networks(model: Tower) -> list[nn.Parameter]:
    return [p for block in model.blocks for p in block.parts[1:].parameters()]


def _first_block(model: Tower) -> list[nn.Parameter]:
    return list(model.blocks[0].parameters())


def _down_projections(model: Tower) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("down")]


@pytest.mark.parametrize(
    "frozen",
    [_all_but_networks, _networks, _first_block, _down_projections],
    ids=["all but networks", "networks", "first block", "down projections"],
)
def test_frozen_parameters(frozen: Callable[[Tower], list[nn.Parameter]]):
    """What is frozen gets no gradient, all the rest gets the right one."""
    model = Tower(2, ["einsum", "loop"]).double()
    for parameter in frozen(model):
        parameter.requires_grad_(False)
    assert_same_steps(model, tokens())
    assert tally() == Tally(sites=4)


# Autocast.


@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "in the model"])
def test_autocast(inside: bool):
    """float32 parameters, products in bfloat16. Allowed is what the model itself is off by."""
    model = (_UnderAutocast if inside else Tower)(1, TRIPLE)
    exact = Tower(1, TRIPLE).double()
    exact.load_state_dict(model.state_dict())
    x = tokens()
    reference = step(exact, exact, [x])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        plain = step(model, model, [x.float()])
        found = step(flashmhf(model), model, [x.float()])
    assert tally() == Tally(sites=3)
    assert list(found) == list(plain) == list(reference)
    for name, right in reference.items():
        assert found[name].dtype == plain[name].dtype, name
        rounding = torch.finfo(torch.bfloat16).eps * float(right.abs().max())
        assert _distance(found[name], right) <= 4 * max(_distance(plain[name], right), rounding)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.to(b.dtype) - b).abs().max())


class _UnderAutocast(Tower):
    """Each block switches autocast on by itself."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(x)
