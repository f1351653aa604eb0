"""Networks in DistributedDataParallel, whose buckets cut Dynamo's graph: they are kept whole.

The weights of every network here are larger than a bucket, so that without care each is cut.
"""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mhf_compiler
import mhf_compiler.buckets
import mhf_compiler.compat
from mhf_compiler import DeclineKind, MhfCompilerWarning
from mhf_compiler.compat import counters

ALWAYS = {"rewrite": "always", "fallback": "aot_eager", "strict": True}
LAYERS = 3


class Layer(nn.Module):
    """A linear layer and a SwiGLU for each of four heads: a weight is larger than a bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)
        self.gate, self.up = (nn.Parameter(torch.randn(4, 2100, 32) / 6) for _ in range(2))
        self.down = nn.Parameter(torch.randn(4, 2100, 32) / 50)

    def network(self, x: Tensor) -> Tensor:
        q = self.linear(x).unflatten(-1, (4, 32))
        gate, up = (torch.einsum("blhd,hfd->blhf", q, w) for w in (self.gate, self.up))
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.network(x)


class Tower(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class AllStates(Tower):
    """Every layer's result is returned, as Transformers do with output_hidden_states."""

    def forward(self, x: Tensor) -> Any:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class Checkpointed(Tower):
    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Autocast(Tower):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = super().forward(x)
        return x.float()


class Routed(Layer):
    """Three sub-networks, one after the other, which are weighted by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 3)
        self.gates, self.ups, self.downs = (
            nn.ParameterList(torch.randn(4, 2100, 32) / 6 for _ in range(3)) for _ in range(3)
        )

    def network(self, x: Tensor) -> Tensor:
        q = self.linear(x).unflatten(-1, (4, 32))
        weights = self.router(q).sigmoid()
        out = torch.zeros_like(q)
        for e, (gate, up, down) in enumerate(zip(self.gates, self.ups, self.downs, strict=True)):
            hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate))
            hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up)
            out = out + weights[..., e, None] * torch.einsum("blhf,hfd->blhd", hidden, down)
        return out.flatten(2)


class Buffered(Layer):
    """Counts its calls in a buffer, in place, in the middle of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.network(x) * self.calls


class WithoutNetworks(Layer):
    def network(self, x: Tensor) -> Tensor:
        q = self.linear(x).unflatten(-1, (4, 32))
        return torch.einsum("blhf,hfd->blhd", torch.einsum("blhd,hfd->blhf", q, self.gate), self.down).flatten(2)


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def step(model: Callable[..., Any], parameters: nn.Module, x: Tensor) -> list[Tensor]:
    """Results and gradients of a training step."""
    parameters.zero_grad(set_to_none=True)
    out = tensors(model(x))
    sum(y.square().mean() for y in out).backward()
    return [*(y.detach() for y in out), *(p.grad for p in parameters.parameters() if p.grad is not None)]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of operations in every part that is compiled."""
    seen: list[int] = []
    compile_graph = mhf_compiler.compat.compile_graph

    def spy(name: str, gm: torch.fx.GraphModule, *others: Any) -> Any:
        seen.append(len(gm.graph.nodes))
        return compile_graph(name, gm, *others)

    monkeypatch.setattr(mhf_compiler.compat, "compile_graph", spy)
    return seen


@pytest.mark.parametrize("fallback", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "model",
    [
        Tower,
        AllStates,
        Checkpointed,
        Autocast,
        lambda: Tower(Routed),
        lambda: Tower(Buffered),
    ],
    ids=["tower", "all states", "checkpointed", "autocast", "routed", "buffered"],
)
def test_every_network_is_kept_whole(model: Callable[[], nn.Module], fallback: str, parts: list[int]):
    expected, x = model(), torch.randn(2, 5, 128)
    wrapped = DistributedDataParallel(copy.deepcopy(expected), bucket_cap_mb=1)
    compiled = torch.compile(wrapped, backend="flashmhf", options=ALWAYS | {"fallback": fallback})
    for _ in range(2):
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if model is Autocast else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(
            step(compiled, wrapped, x), step(expected, expected, x), **tolerance
        )
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS
    assert counters["flashmhf"]["graphs"] == 1
    assert len(parts) > 1
