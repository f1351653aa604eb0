"""One process of several that divide the heads of a model; `test_parallel.py` starts it.

    python parallelized.py RANK WORLD FOLDER

Two processes have half of the heads each, or under FSDP a part of each parameter. They write a
checkpoint that four read: two by two, with FSDP over one dimension of the mesh and heads over the
other.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from mhf_compiler.compat import counters
from mhf_compiler.parallel import HeadParallelError, head_parallel_plan, parallelize_heads

H, E, f, d = 4, 2, 24, 16
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


class Shared(nn.Module):
    """Eight heads with weights and biases in four groups; a norm, and gains, that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8 * d, 8 * d)
        self.norm = nn.LayerNorm(d)
        self.gains = nn.Parameter(torch.rand(E))
        for name in ("gate", "up", "down"):
            setattr(self, name, nn.Parameter(0.2 * torch.randn(4, E, f, d)))
        self.bias = nn.Parameter(torch.randn(4, E, f))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        q = self.norm(self.into(x).unflatten(-1, (8, d))).unflatten(2, (4, 2))
        gate = torch.einsum("blgnd,gefd->blgnef", q, self.gate) + self.bias[:, None]
        hidden = F.silu(gate) * torch.einsum("blgnd,gefd->blgnef", q, self.up)
        hidden = hidden * self.gains[:, None]
        out = torch.einsum("blgnef,gefd->blgnd", hidden, self.down).flatten(2) * self.scale
        return out * mask[..., None], out.mean()


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


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def example() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(50, (4, 6))


def made(checkpointed: bool = False) -> Model:
    torch.manual_seed(0)  # the same numbers in every process
    return Model(checkpointed)


def step(
    model: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """The result and the gradients of a training step."""
    out = call(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | gradients


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(whole(found[name]), x, rtol=1e-4, atol=1e-5, msg=name)


def compiled(model: nn.Module) -> Callable[..., Any]:
    counters.clear()
    options = ALWAYS | {"fallback": "aot_eager"}
    return torch.compile(model, backend="flashmhf", options=options)


# Two processes.


def check_model(mesh: DeviceMesh, *, compile: bool, checkpointed: bool) -> None:
    """Values and gradients are those of one process, names those of the plain model."""
    plain, x = made(), example()
    expected = step(plain, plain, x)
    model = made(checkpointed)
    assert parallelize_heads(model, mesh, x) is model
    assert [*model.state_dict()] == [*plain.state_dict()]
    ffn = model.blocks[1].ffn
    assert ffn.up.placements == ffn.router.placements == ffn.into.bias.placements == (Shard(0),)
    assert ffn.out.weight.placements == (Shard(1),)
    assert ffn.out.bias.placements == (Replicate(),)
    compare(step(model, compiled(model) if compile else model, x), expected)
    assert counters["flashmhf"]["sites_rewritten"] == (LAYERS if compile else 0)
    for p in model.parameters():
        assert not isinstance(p, DTensor) or p.grad.placements == p.placements


def check_what_heads_share(mesh: DeviceMesh) -> None:
    """Weights in groups; arguments by name, several results; gradients of shared parameters."""
    torch.manual_seed(0)
    model, x, mask = Shared(), torch.randn(4, 6, 8 * d), torch.rand(4, 6)
    expected = step(model, model, x, mask=mask)
    model.zero_grad()
    parallelize_heads(model, mesh, x, mask=mask)
    assert model.gate.placements == model.bias.placements == (Shard(0),)
    compare(step(model, model, x, mask=mask), expected)
    assert model.norm.weight.grad.placements == (Replicate(),)
    model.zero_grad()
    compare(step(model, compiled(model), x, mask=mask), expected)
    assert counters["flashmhf"]["sites_rewritten"] == 1


def check_sequences(mesh: DeviceMesh) -> None:
    """A norm on shards of sequences before the network, as PyTorch's own style has it."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(norm=nn.LayerNorm(H * d), ffn=Network()))
    x = torch.randn(4, 6, H * d, requires_grad=True)
    out = model(x)
    out.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    plan = head_parallel_plan(model, x, sequence_parallel=True)
    parallelize_module(model, mesh, plan | {"norm": SequenceParallel()})
    mine = x.detach().chunk(2, dim=1)[mesh.get_local_rank()].requires_grad_()
    found = compiled(model)(mine)
    assert counters["flashmhf"]["sites_rewritten"] == 1
    torch.testing.assert_close(found, out.chunk(2, dim=1)[mesh.get_local_rank()])
    found.square().sum().backward()
    compare({name: p.grad for name, p in model.named_parameters()}, expected)
    gradient = x.grad.chunk(2, dim=1)[mesh.get_local_rank()]
    torch.testing.assert_close(mine.grad, gradient, rtol=1e-4, atol=1e-5)


def check_fsdp(mesh: DeviceMesh, *, by_blocks: bool) -> None:
    """Each process has a part of every parameter, and of the tokens."""
    plain, x = made(), example()
    expected = step(plain, plain, x)
    model = made()
    call: Callable[..., Any] = model
    if by_blocks:
        counters.clear()
    for block in model.blocks:
        if by_blocks:
            block.compile(backend="flashmhf", options=ALWAYS | {"fallback": "aot_eager"})
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not by_blocks:
        call = compiled(model)
    mine = mesh.get_local_rank()
    expected["out"] = expected["out"].chunk(2)[mine]
    compare(step(model, call, x.chunk(2)[mine]), expected)
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS


def check_communication(mesh: DeviceMesh) -> None:
    """A sum of the output, and one of the input's gradient."""
    model, x = Network(), torch.randn(4, 6, H * d, requires_grad=True)
    parallelize_heads(model, mesh, x)
    with CommDebugMode() as communication:
        model(x).sum().backward()
    assert {str(op): n for op, n in communication.get_comm_counts().items()} == {
        "c10d_functional.all_reduce": 2
    }


def check_heads_that_two_devices_do_not_divide(mesh: DeviceMesh) -> None:
    model = made()
    plan = head_parallel_plan(model, example())
    for style in plan.values():
        style.heads = 3
    with pytest.raises(HeadParallelError, match=r"blocks\.0\.ffn: .*gate.* 3 .*2 devices.* 1, 3$"):
        parallelize_module(model, mesh, plan)


def two(mesh: DeviceMesh, folder: Path) -> None:
    check_model(mesh, compile=False, checkpointed=False)
    check_model(mesh, compile=True, checkpointed=True)
    check_what_heads_share(mesh)
    check_sequences(mesh)
    check_fsdp(mesh, by_blocks=True)
    check_fsdp(mesh, by_blocks=False)
    check_communication(mesh)
    check_heads_that_two_devices_do_not_divide(mesh)
    model = parallelize_heads(made(), mesh, example())
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "checkpoint")


# Four processes.


def four(mesh: DeviceMesh, folder: Path) -> None:
    """FSDP over one dimension of the mesh, heads over the other, from a checkpoint of two."""
    plain, x = made(), example()
    expected = step(plain, plain, x)
    torch.manual_seed(2)
    model = Model()
    parallelize_heads(model, mesh["tp"], x)
    counters.clear()
    for block in model.blocks:
        block.compile(backend="flashmhf", options=ALWAYS | {"fallback": "aot_eager"})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    assert isinstance(model.blocks[0].ffn.gate, DTensor)
    assert model.blocks[0].ffn.gate.device_mesh == mesh
    state = {"model": model.state_dict()}
    assert [*state["model"]] == [*plain.state_dict()]
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state["model"])
    half = mesh["dp"].get_local_rank()
    expected["out"] = expected["out"].chunk(2)[half]
    compare(step(model, model, x.chunk(2)[half]), expected)
    # The blocks are compiled to one graph, which they share, and which counts for each.
    assert counters["flashmhf"]["graphs"] == LAYERS
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    if world == 2:
        two(init_device_mesh("cpu", (2,)), folder)
    else:
        four(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
