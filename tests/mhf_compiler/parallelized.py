"""One process of several that divide the heads of a model; `test_parallel.py` starts it.

    python parallelized.py RANK WORLD FOLDER

Two processes have half of the heads each, and write a checkpoint that four read: two by two, with
FSDP over one dimension of the mesh and heads over the other.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import mhf_compiler
from mhf_compiler.compat import counters
from mhf_compiler.parallel import (
    HeadParallel,
    HeadParallelError,
    head_parallel_plan,
    parallelize_heads,
)

H, E, f, d = 4, 3, 24, 16
LAYERS = 2
ALWAYS = {"rewrite": "always", "strict": True}


class Network(nn.Module):
    """A loop over routed sub-networks, between projections and after a norm of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(H * d, H * d), nn.Linear(H * d, H * d)
        self.norm = nn.Parameter(torch.rand(H, d))
        self.router = nn.Parameter(torch.randn(H, d, E))
        for name in ("gate", "up", "down"):
            setattr(self, name, nn.Parameter(0.2 * torch.randn(H * E * f, d)))

    def queries(self, x: Tensor) -> Tensor:
        return F.normalize(self.into(x).unflatten(-1, (H, d)), dim=-1) * self.norm

    def routed(self, q: Tensor) -> Tensor:
        weights = torch.einsum("blhd,hde->blhe", q, self.router).sigmoid()
        return weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries(x)
        r = self.routed(q)
        gate, up, down = (w.view(H, E, f, d) for w in (self.gate, self.up, self.down))
        out = torch.zeros_like(q)
        for e in range(E):
            hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate[:, e]))
            hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up[:, e])
            out = out + r[..., e, None] * torch.einsum("blhf,hfd->blhd", hidden, down[:, e])
        return self.out(out.flatten(2))


class Grouped(nn.Module):
    """Eight heads that share weights in four groups, with biases, in a module with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8 * d, 3 * 8 * d)
        self.up, self.down = (nn.Parameter(0.2 * torch.randn(4, 1, f, d)) for _ in range(2))
        self.up_bias = nn.Parameter(torch.randn(4, 1, f))
        self.shared_norm = nn.LayerNorm(d)
        self.register_buffer("scale", torch.tensor(0.5))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(H * d)
        self.dense = nn.Linear(H * d, H * d)
        self.norm = nn.LayerNorm(H * d)
        self.ffn = Network()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(self.before(x)).relu()
        return x + self.ffn(self.norm(x))


class Model(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, H * d)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def made(checkpointed: bool = False) -> tuple[Model, Tensor]:
    torch.manual_seed(0)  # the same numbers in every process
    return Model(checkpointed), torch.randint(50, (4, 6))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    out = call(x)
    out.square().mean().backward()
    return {"": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(whole(found[name]), x, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def check(mesh: DeviceMesh, fallback: str, checkpointed: bool = False) -> Model:
    model, x = made(checkpointed)
    expected = step(copy.deepcopy(model), model, x) if False else step(model, model, x)
    model.zero_grad()
    keys = [*model.state_dict()]
    parallelize_heads(model, mesh, x)
    assert [*model.state_dict()] == keys
    call = model
    counters.clear()
    if fallback:
        options = ALWAYS | {"fallback": fallback}
        call = torch.compile(model, backend=mhf_compiler.flashmhf, options=options)
    compare(step(model, call, x), expected)
    for name, p in model.named_parameters():
        print(name, getattr(p, "placements", None), getattr(p.grad, "placements", None))
    print(counters["flashmhf"])
    torch.compiler.reset()
    return model

def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    import time
    for a in [("",), ("aot_eager",), ("inductor",),  ("", True), ("aot_eager", True)]:
        t=time.time()
        check(mesh, *a)
        print(a, "ok", time.time()-t, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
