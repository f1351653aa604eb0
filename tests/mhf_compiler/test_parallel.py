"""Heads divided between devices: which parameters are cut and how, in one process or several."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from mhf_compiler.parallel import (
    HeadParallel,
    HeadParallelError,
    head_parallel_plan,
    parallelize_heads,
)

PROGRAM = Path(__file__).parent / "parallelized.py"
MODELS = runpy.run_path(str(PROGRAM))
Network, made, example = (MODELS[name] for name in ("Network", "made", "example"))
H, f, d = 4, 24, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written, after they have checked values and gradients."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(PROGRAM, 2, folder)
    return folder


def test_a_checkpoint_of_two_processes_in_one(folder: Path):
    torch.manual_seed(3)
    expected = made().state_dict()
    model = MODELS["Model"]()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    assert state["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state["model"][name], tensor), name


def test_fsdp_and_heads_in_four_processes(folder: Path):
    run_ranks(PROGRAM, 4, folder)


# One process: the plan.


class Pair(nn.Module):
    """A weight for gate and up of each head, in a module of its own, by the names of Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = (
            nn.Linear(d, H * 2 * f, bias=False),
            nn.Parameter(torch.randn(H, f, d)),
        )

    def forward(self, x: Tensor) -> Tensor:
        both = torch.einsum("blhd,hfd->blhf", x, self.both.weight.view(H, 2 * f, d))
        gate, up = both.chunk(2, dim=-1)
        return torch.einsum("blhf,hfd->blhd", gate.relu() * up, self.down)


QUERIES = torch.randn(2, 3, H, d)


class Weights(nn.Module):
    """A network whose weights are read by a method, which the models below have of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = (nn.Parameter(torch.randn(H, f, d)) for _ in range(2))

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.gate, self.down

    def forward(self, q: Tensor) -> Tensor:
        gate, down = self.weights()
        return torch.einsum("blhf,hfd->blhd", torch.einsum("blhd,hfd->blhf", q, gate).relu(), down)


class Frozen(Weights):
    """Its weights are buffers."""

    def __init__(self) -> None:
        super().__init__()
        down = self.down.detach()
        del self.down
        self.register_buffer("down", down)


class HeadsInside(Weights):
    """Heads alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(f * H, d))

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.gate.view(f, H, d).transpose(0, 1), self.down


class Packed(Weights):
    """The gate weights of all heads, then their down weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(2 * H, f, d))

    def weights(self) -> tuple[Tensor, Tensor]:
        gate, down = self.gate.chunk(2)
        return gate, down


class OneForAll(Weights):
    """All heads share four routed sub-networks."""

    def forward(self, q: Tensor) -> Tensor:
        hidden = torch.einsum("blhd,efd->blhef", q, self.gate).relu() * q[..., :H, None].sigmoid()
        return torch.einsum("blhef,efd->blhd", hidden, self.down)


class Listed(Weights):
    """A parameter for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ParameterList(torch.randn(f, d) for _ in range(H))

    def weights(self) -> tuple[Tensor, Tensor]:
        return torch.stack(list(self.gates)), self.down


class Tied(nn.Module):
    """Two networks with one gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Weights(), Weights()
        self.second.gate = self.first.gate

    def forward(self, q: Tensor) -> Tensor:
        return self.second(self.first(q))


class OtherDimension(nn.Module):
    """Two networks of as many heads as hidden units, which read one weight in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = (nn.Parameter(torch.randn(H, H, d)) for _ in range(2))

    def forward(self, q: Tensor) -> Tensor:
        for gate in (self.gate, self.gate.transpose(0, 1)):
            hidden = torch.einsum("blhd,hfd->blhf", q, gate).relu()
            q = torch.einsum("blhf,hfd->blhd", hidden, self.down)
        return q


def test_the_plan_of_a_model():
    plan = head_parallel_plan(made(), example())
    assert list(plan) == ["blocks.0.ffn", "blocks.1.ffn"]
    for style in plan.values():
        assert style.heads == H
        assert style.dims == dict.fromkeys(
            ("gate", "up", "down", "router", "norm", "into.weight", "into.bias"), 0
        ) | {"out.weight": 1}


def test_a_module_that_is_a_network():
    style = head_parallel_plan(Network(), torch.randn(1, 2, H * d))
    assert isinstance(style, HeadParallel)
    assert repr(style).startswith("HeadParallel({")
    assert style.dims["gate"] == 0


def test_weights_for_gate_and_up_in_a_layer_of_their_own():
    style = head_parallel_plan(nn.Sequential(Pair()), QUERIES)["0"]
    assert style.dims == {"both.weight": 0, "down": 0}


def test_layers_whose_graphs_are_one():
    """Each layer is a graph, and both are the same."""

    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                torch._dynamo.graph_break()
                x = layer(x)
            return x

    plan = head_parallel_plan(Broken(Network(), Network()), torch.randn(1, 2, H * d))
    assert list(plan) == ["0", "1"]
    assert plan["0"].dims == plan["1"].dims
    assert "into.weight" in plan["1"].dims


def test_a_model_on_the_meta_device():
    plan = head_parallel_plan(made().to("meta"), example().to("meta"))
    assert list(plan) == ["blocks.0.ffn", "blocks.1.ffn"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(d, d), "Linear has no multi-head FFN: mhf_compiler.explain"),
        (Frozen(), "the down weights are computed from .*down.*: allowed are parameters"),
        (
            HeadsInside(),
            r"gate, the gate weights in shape \(96, 16\), has no dimension .* 4 blocks",
        ),
        (Packed(), r"gate, the gate weights in shape \(8, 24, 16\), has no dimension"),
        (OneForAll(), "all heads have the same weights"),
        (Listed(), r"gates\.\d has the gate weights of one head, in shape \(24, 16\)"),
        (Tied(), "the gate weights are first.gate and second.gate: allowed are parameters of one"),
        (OtherDimension(), "use gate with heads along its dimension 0 and along 1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_planned(model: nn.Module, message: str):
    before = dict(model.named_parameters())
    with pytest.raises(HeadParallelError, match=message):
        head_parallel_plan(model, QUERIES)
    assert dict(model.named_parameters()) == before


# One process: the style.


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_heads_lie_along_one_dimension_of_a_mesh():
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    with pytest.raises(HeadParallelError, match=r"this one has 2 .*mesh\['tp'\]"):
        parallelize_heads(made(), mesh, example())


def test_heads_are_divided_before_fully_shard():
    mesh, model = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp")), made()
    plan = head_parallel_plan(model, example())
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(
        HeadParallelError, match=r"blocks.0.ffn.* is a DTensor already.*before fully"
    ):
        parallelize_module(model, mesh["tp"], plan)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"gates": 0}, "Weights has no parameter 'gates'; it has gate, down"),
        ({"gate": 3}, r"Weights.gate has shape \(4, 24, 16\): dimension 3 is not a multiple of 4"),
        ({"gate": 0, "down": 1}, None),
    ],
)
def test_a_style_by_hand(dims: dict[str, int], message: str | None):
    mesh, style = init_device_mesh("cpu", (1,)), HeadParallel(dims, heads=H)
    if message is None:
        parallelize_module(Weights(), mesh, style)
    else:
        with pytest.raises(HeadParallelError, match=message):
            parallelize_module(Weights(), mesh, style)
