"""What torch.compile offers beside a call: regions that share a graph, stances, threads, files."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inductor import NO_CPP
from torch import Tensor, nn

from models.harness import assert_same_steps, flashmhf, graphs_compiled, tally
from models.networks import LoopFFN, Tower, tokens

LAYERS = 3


class Regions(nn.Module):
    """Layers that are alike, each in a region that is compiled once for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoopFFN() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + _region(layer, x)
        return x


@torch.compiler.nested_compile_region
def _region(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


def test_regions_that_are_compiled_once():
    """One site stands for all layers, and counts for each of them."""
    model = Regions().double()
    assert_same_steps(model, tokens())
    assert tally().failures == 0
    assert tally().sites == len(model.layers)


def test_stances():
    """``force_eager`` compiles nothing, ``fail_on_recompile`` is content with what there is."""
    model, x = Tower(1, ("loop", "packed")).double(), tokens()
    compiled = flashmhf(model)
    with torch.no_grad():
        expected = model(x)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
        assert graphs_compiled() == 0
        torch.testing.assert_close(compiled(x), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x), expected)
    assert tally().sites == 2


def test_threads_that_call_one_model():
    """In training, each with inputs of its own, after a first call."""
    model = LoopFFN().double()
    inputs = [tokens().requires_grad_() for _ in range(4)]
    compiled: Any = flashmhf(copy.deepcopy(model))
    compiled(inputs[0]).sum().backward()
    inputs[0].grad = None

    def gradient(call: Any, x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(call(x).square().sum(), x)
        return found

    expected = [gradient(model, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: gradient(compiled, x), inputs * 3))
    for gradients in (found[:4], found[4:8], found[8:]):
        torch.testing.assert_close(gradients, expected)
    assert tally().sites == 1


def test_compiled_ahead_of_time(tmp_path: Path):
    """``aot_compile`` gives a function that can be saved, and is loaded without a compilation."""
    model, x = LoopFFN().eval(), tokens().float()
    options: Any = {"fallback": "inductor", **NO_CPP}
    forward: Any = flashmhf(model.forward, fullgraph=True, options=options)
    if not hasattr(forward, "aot_compile") or not hasattr(torch.compiler, "load_compiled_function"):
        pytest.skip("this PyTorch has no aot_compile")
    with torch.no_grad():
        compiled = forward.aot_compile(((x,), {}))
        assert tally().sites == 1
        torch.testing.assert_close(compiled(model, x), model(x))
        compiled.save_compiled_function(str(tmp_path / "model"))
        with open(tmp_path / "model", "rb") as file:
            loaded = torch.compiler.load_compiled_function(file)
        torch.testing.assert_close(loaded(model, x), model(x))
    assert tally().sites == 1
