"""Models without an MH-FFN: what recognition costs them, in steps instead of seconds.

``benchmarks/compile_time.py`` has the seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhf_compiler.patterns.recognise as recognise
from models.harness import Tally, flashmhf, graphs_compiled, tally
from models.networks import WIDTH, Attention, tokens


class Calls:
    """Counts the calls of a function that is otherwise left as it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.results: list[Any] = []
        original = getattr(recognise, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.results.append(original(*args, **kwargs))
            return self.results[-1]

        monkeypatch.setattr(recognise, name, counted)


class Pointwise(nn.Module):
    """Norms, an embedding and one product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.norm(x).sigmoid()) + x.cumsum(1)


class Swiglu(nn.Module):
    """An ordinary feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Convolutions(nn.Module):
    """A residual block of a convolutional network, over tokens as an image of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x.mT)).relu()).mT


class Residual(nn.Module):
    """Parts one after the other, each with a residual."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in parts)

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return x


def llama_like(layers: int) -> nn.Module:
    return Residual(*(part() for _ in range(layers) for part in (Attention, Swiglu))).double()


def resnet_like(layers: int) -> nn.Module:
    return Residual(*(Convolutions() for _ in range(layers))).double()


def test_without_two_products_there_is_nothing_to_read(monkeypatch: pytest.MonkeyPatch):
    copies = Calls(monkeypatch, "trace")
    flashmhf(Pointwise().double())(tokens())
    assert copies.results == []
    assert tally() == Tally()


@pytest.mark.parametrize("model", [llama_like, resnet_like])
def test_a_graph_is_read_once(model: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch):
    copies = Calls(monkeypatch, "trace")
    flashmhf(model(2))(tokens())
    assert len(copies.results) == graphs_compiled() == 1
    assert tally().sites == tally().failures == 0


@pytest.mark.parametrize("model", [llama_like, resnet_like])
def test_each_further_layer_costs_the_same(
    model: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch
):
    """As many values to read and candidates to try as the layer before it, and few of these."""
    costs = []
    for layers in (1, 2, 3, 4):
        torch.compiler.reset()
        with monkeypatch.context() as patch:
            copies, tried = Calls(patch, "trace"), Calls(patch, "_try")
            flashmhf(model(layers))(tokens())
        costs.append((len(copies.results[0].values), len(tried.results)))
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(costs)]
    assert steps[1:] == steps[:-1]
    values, candidates = steps[0]
    assert candidates <= values / 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_only_symbolic_sizes_need_an_environment(dynamic: bool, monkeypatch: pytest.MonkeyPatch):
    """Without one the copy is made a quarter faster; a symbol cannot be without."""
    environments: list[Any] = []
    original = recognise.trace

    def trace(gm: torch.fx.GraphModule, shape_env: Any) -> Any:
        environments.append(shape_env)
        return original(gm, shape_env)

    monkeypatch.setattr(recognise, "trace", trace)
    flashmhf(llama_like(1), dynamic=dynamic)(tokens())
    assert {env is not None for env in environments} == {dynamic}
