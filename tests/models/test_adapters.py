"""LoRA adapters, as PEFT makes them: harmless around networks, a reason inside, gone if merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler.patterns import Kind
from models.harness import OPTIONS, assert_same_steps, tally

B, L, H, d, f = 2, 5, 3, 4, 6


class Head(nn.Module):
    """One head's SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, f), nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, q: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(q)) * self.up(q))


class Heads(nn.Module):
    """A module for each head, between two projections: (B, L, H * d) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(H * d, H * d), nn.Linear(H * d, H * d)
        self.heads = nn.ModuleList(Head() for _ in range(H))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(x).chunk(H, -1)
        return self.outputs(torch.cat([h(q) for h, q in zip(self.heads, parts, strict=True)], -1))


class Adapted(nn.Module):
    """A frozen linear layer beside the product of two narrow matrices."""

    def __init__(self, base: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.dropout(x))) * 0.5

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.base)
        with torch.no_grad():
            merged.weight += 0.5 * self.b.weight @ self.a.weight
        return merged


class AdaptedWeight(nn.Module):
    """The same, but the matrices are multiplied with each other and added to the weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        rows, columns = base.weight.shape
        self.a, self.b = (
            nn.Parameter(torch.randn(s, dtype=base.weight.dtype)) for s in ((2, columns), (rows, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)


def change(model: nn.Module, names: tuple[str, ...], into: Any) -> nn.Module:
    """A copy whose modules of these names are changed."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names:
                setattr(parent, name, into(child))
    return model


def tokens() -> Tensor:
    return torch.randn(B, L, H * d, dtype=torch.float64)


def test_adapters_around_the_networks():
    model = change(Heads().double(), ("inputs", "outputs"), lambda m: Adapted(m, 0.0))
    assert_same_steps(model, tokens())
    assert (tally().sites, tally().declined) == (1, 0)


INSIDE = [("gate",), ("up",), ("down",), ("gate", "up", "down")]


@pytest.mark.parametrize("names", INSIDE, ids=" ".join)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_inside_the_networks(names: tuple[str, ...], dropout: float):
    """The reason says what to do; after that, all is rewritten."""
    model = change(Heads().double(), names, lambda m: Adapted(m, dropout))
    report = mhf_compiler.explain(model, options=OPTIONS)(tokens())
    assert {miss.reason.kind for miss in report.declined} == {Kind.ADDED_PROJECTIONS}
    assert not report.rewritten
    if not dropout:  # of which nothing is left when they are merged
        assert_same_steps(model, tokens())
        assert tally().sites == 0
        merged = change(model, names, Adapted.merged)
        assert_same_steps(merged, tokens())
        assert tally().sites == 1


def test_adapters_of_weights():
    """What is added to the weights themselves is one more weight: it is trained by the op."""
    model = change(Heads().double(), ("gate", "up", "down"), AdaptedWeight)
    assert_same_steps(model, tokens())
    assert tally().sites == 1


@pytest.mark.parametrize("names", [("inputs", "outputs"), *INSIDE], ids=" ".join)
def test_adapters_of_peft(names: tuple[str, ...]):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=False)
    adapted = peft.get_peft_model(Heads().double(), config).double()
    around = names[0] == "inputs"
    assert_same_steps(adapted, tokens())
    assert tally().sites == around
    report = mhf_compiler.explain(adapted, options=OPTIONS)(tokens())
    assert {miss.reason.kind for miss in report.declined} <= {Kind.ADDED_PROJECTIONS}
    assert bool(report.declined) != around

    x = tokens()
    expected = adapted.eval()(x)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    mhf_compiler.assert_rewritten(merged, (x,), sites=1, options=OPTIONS)
