"""One process of two that compile models with DTensor parameters; `test_shards.py` starts it.

python sharded.py RANK WORLD FOLDER
"""

import copy
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import mhf_compiler
from mhf_compiler.compat import counters

H, E, f, d = 4, 2, 24, 16
OPTIONS = {"rewrite": "always", "strict": True}


class Network(nn.Module):
    """Projections around a routed network of all heads and sub-networks at once."""

    def __init__(self, routed: bool = True) -> None:
        super().__init__()
        self.into, self.out = (nn.Linear(H * d, H * d, bias=False) for _ in range(2))
        for name in ("gate", "up", "down"):
            setattr(self, name, nn.Parameter(0.2 * torch.randn(H, E, f, d)))
        self.router = nn.Parameter(torch.randn(H, d, E)) if routed else None

    def hidden(self, q: Tensor) -> Tensor:
        gate = torch.einsum("blhd,hefd->blhef", q, self.gate)
        return F.silu(gate) * torch.einsum("blhd,hefd->blhef", q, self.up)

    def forward(self, x: Tensor) -> Tensor:
        q = self.into(x).unflatten(-1, (H, d))
        hidden = self.hidden(q)
        if self.router is not None:
            weights = torch.einsum("blhd,hde->blhe", q, self.router).sigmoid()
            hidden = hidden * weights[..., None]
        return self.out(torch.einsum("blhef,hefd->blhd", hidden, self.down).flatten(2))


class Looped(Network):
    """A loop over sub-networks."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.into(x).unflatten(-1, (H, d))
        out = torch.zeros_like(q)
        for e in range(E):
            gate = torch.einsum("blhd,hfd->blhf", q, self.gate[:, e])
            hidden = F.silu(gate) * torch.einsum("blhd,hfd->blhf", q, self.up[:, e])
            out = self.add(out, torch.einsum("blhf,hfd->blhd", hidden, self.down[:, e]))
        return self.out(out.flatten(2))

    def add(self, out: Tensor, part: Tensor) -> Tensor:
        return out + part


class LoopedInPlace(Looped):
    """The same, which adds up in place."""

    def add(self, out: Tensor, part: Tensor) -> Tensor:
        out += part
        return out


class Moved(Network):
    """Hidden units are placed otherwise before they are projected down."""

    def hidden(self, q: Tensor) -> Tensor:
        hidden = super().hidden(q)
        assert isinstance(hidden, DTensor)
        return hidden.redistribute(placements=[Replicate()] * hidden.device_mesh.ndim)


class Overwritten(Network):
    """Hidden units are overwritten in place; through a view, which may be a copy for DTensors."""

    def hidden(self, q: Tensor) -> Tensor:
        return super().hidden(q).mul_(2.0)


class OverwrittenView(Network):
    def hidden(self, q: Tensor) -> Tensor:
        hidden = super().hidden(q)
        hidden.view(hidden.shape).mul_(2.0)
        return hidden


class FromPlain(Network):
    """Takes and returns plain tensors, as a layer under ``parallelize_module`` does."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(DTensor.from_local(x, self.mesh, [Replicate()]))
        assert isinstance(out, DTensor)
        return out.redistribute(placements=[Replicate()]).to_local()


torch.manual_seed(0)  # the same numbers in every process
WEIGHTS = ("gate", "up", "down")
HEADS = dict.fromkeys(WEIGHTS, 0)
#: the model, where each parameter and the input are cut, and how many sites are rewritten
CASES: dict[str, tuple[nn.Module, dict[str, int], int]] = {
    "heads": (Network(), HEADS | {"router": 0, "into": 0, "out": 1}, 1),
    "heads of the network alone": (Network(), HEADS, 1),
    "sub-networks": (Network(), dict.fromkeys(WEIGHTS, 1) | {"router": 2}, 1),
    "hidden units": (Network(), dict.fromkeys(WEIGHTS, 2), 1),
    "tokens": (Network(routed=False), {"x": 0}, 1),
    "a loop": (Looped(routed=False), HEADS, 1),
    "a loop in place": (LoopedInPlace(routed=False), HEADS | {"into": 0}, 1),
    "overwritten": (Overwritten(), HEADS, 1),
    "plain outside": (FromPlain(), HEADS, 1),
    # must not match
    "sequences": (Network(), {"x": 1}, 0),  # whose projection PyTorch cuts in a way of its own
    "tokens and heads": (Network(), HEADS | {"x": 0}, 0),  # one of them is sent around
    # the loop takes a sub-network from each device, the op would need them all at once
    "a loop over what is cut otherwise": (Looped(routed=False), HEADS | {"up": 1}, 0),
    # the sum starts whole and stays so
    "a loop in place of the whole": (LoopedInPlace(routed=False), HEADS, 0),
    "moved": (Moved(), HEADS, 0),
    "a view is overwritten": (OverwrittenView(), HEADS, 0),
}

#: where DTensor places gradients in ways of its own, or does not flatten what is cut, before 2.13
NEWER = ("hidden units", "tokens", "sequences")


def placed(model: nn.Module, cuts: dict[str, int], mesh: DeviceMesh) -> nn.Module:
    model = copy.deepcopy(model)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            place = cut(cuts.get(path or name))
            tensor = distribute_tensor(parameter.detach(), mesh, [place])
            setattr(module, name, nn.Parameter(tensor))
    return model


def cut(dim: int | None) -> Placement:
    return Replicate() if dim is None else Shard(dim)


def step(model: nn.Module, call: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The result and the gradients of a training step."""
    out = call(x)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | gradients


def placements(x: Tensor) -> object:
    return x.placements if isinstance(x, DTensor) else None


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def check(name: str, mesh: DeviceMesh, fallback: str) -> None:
    """Numbers are those of plain tensors, placements those of the original model."""
    model, cuts, sites = CASES[name]
    x = torch.randn(4, 6, H * d)
    single = copy.deepcopy(model)
    if isinstance(model, (Moved, FromPlain)):
        single.__class__ = Network  # which knows no DTensors
    expected = step(single, single, x)
    given = x if name == "plain outside" else distribute_tensor(x, mesh, [cut(cuts.get("x"))])
    eager, model = placed(model, cuts, mesh), placed(model, cuts, mesh)
    for one in (eager, model):
        one.mesh = mesh
    before = step(eager, eager, given)
    counters.clear()
    options = OPTIONS | {"fallback": fallback}
    found = step(model, torch.compile(model, backend="flashmhf", options=options), given)
    assert counters["flashmhf"]["sites_rewritten"] == sites, (name, counters["flashmhf"])
    for key, tensor in expected.items():
        torch.testing.assert_close(whole(found[key]), tensor, rtol=1e-3, atol=1e-3)
        assert placements(found[key]) == placements(before[key]), (name, key)
    if not sites:
        torch.compiler.reset()
        report = mhf_compiler.explain(model, options=OPTIONS)(given)
        assert report.declined, name
    torch.compiler.reset()


def check_dynamic(mesh: DeviceMesh) -> None:
    """One graph for all lengths, without gradients: with them PyTorch's own back ends fail."""
    model, cuts, sites = CASES["heads"]
    compiled = placed(model, cuts, mesh)
    counters.clear()
    call = torch.compile(
        compiled, backend="flashmhf", dynamic=True, options=OPTIONS | {"fallback": "aot_eager"}
    )
    with torch.no_grad():
        for length in (6, 9):
            x = torch.randn(4, length, H * d)
            found = call(distribute_tensor(x, mesh, [Replicate()]))
            torch.testing.assert_close(whole(found), model(x), rtol=1e-3, atol=1e-3)
    assert counters["flashmhf"]["sites_rewritten"] == sites


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for name in CASES:
        if name not in NEWER or torch.__version__ >= (2, 13):
            check(name, mesh, "aot_eager")
    check("heads", mesh, "inductor")
    check_dynamic(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
