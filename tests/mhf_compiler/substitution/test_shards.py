"""Models with DTensor parameters: what is rewritten and what is not, in one process or two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mhf_compiler
from mhf_compiler import DeclineKind
from mhf_compiler.compat import counters

OPTIONS = {"rewrite": "always", "strict": True}
PLACES_ALIKE = torch.__version__ >= (2, 13)


def test_two_processes(tmp_path: Path):
    run_ranks(Path(__file__).parent / "sharded.py", 2, tmp_path)


# One process: what a graph of DTensors is read as.


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Network(nn.Module):
    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        for name in ("gate", "down"):
            weight = torch.randn(4, 24, 16)
            cut = weight if mesh is None else distribute_tensor(weight, mesh, [Shard(0)])
            setattr(self, name, nn.Parameter(cut))

    def project(self, q: Tensor) -> Tensor:
        return torch.einsum("blhd,hfd->blhf", q, self.gate).relu()

    def forward(self, q: Tensor) -> Tensor:
        return torch.einsum("blhf,hfd->blhd", self.project(q), self.down)


class Detoured(Network):
    """Hidden units leave the mesh and come back."""

    def project(self, q: Tensor) -> Tensor:
        hidden = super().project(q)
        assert isinstance(hidden, DTensor)
        return DTensor.from_local(hidden.to_local(), hidden.device_mesh, [Shard(2)])


class Entering(Network):
    """Plain queries and weights are put on a mesh, and the result is taken off it."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(None)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        q, gate, down = (
            DTensor.from_local(t, self.mesh, [Replicate()]) for t in (x, self.gate, self.down)
        )
        hidden = torch.einsum("blhd,hfd->blhf", q, gate).relu()
        return torch.einsum("blhf,hfd->blhd", hidden, down).to_local()


class EnteringBefore(Network):
    """Queries have been on a mesh: nothing is known of where they come from."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(None)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(DTensor.from_local(x, self.mesh, [Replicate()]).to_local())


class Autocast(Network):
    """Views of queries and weights are cast for each product."""

    def forward(self, q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(q)


class Both(nn.Module):
    """A network of DTensors and one of plain tensors."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.cut, self.plain = Network(mesh), Network(None)

    def forward(self, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut(q), self.plain(x)


def queries(mesh: DeviceMesh) -> Tensor:
    return distribute_tensor(torch.randn(2, 5, 4, 16), mesh, [Replicate()])


@pytest.mark.parametrize("training", [True, False])
def test_networks_of_dtensors_and_of_plain_tensors(mesh: DeviceMesh, training: bool):
    model, q, x = Both(mesh), queries(mesh), torch.randn(2, 5, 4, 16)
    with torch.set_grad_enabled(training):
        report = mhf_compiler.explain(model, options=OPTIONS)(q, x)
    assert len(report.rewritten) == 2


@pytest.mark.skipif(PLACES_ALIKE, reason="from torch 2.13 on DTensor places gradients alike")
def test_weights_that_are_not_cut(mesh: DeviceMesh):
    model = Network(mesh)
    for name, weight in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(weight.redistribute(placements=[Replicate()])))
    report = mhf_compiler.explain(model, options=OPTIONS)(queries(mesh))
    assert [site.reason.kind for site in report.declined] == [DeclineKind.NOT_ON_SHARDS]


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"verify": True}], ids=["", "verified"])
def test_the_result_is_placed_as_it_was(mesh: DeviceMesh, options: dict):
    model, q = Network(mesh), queries(mesh)
    compiled = torch.compile(model, backend="flashmhf", options=options | {"fallback": "aot_eager"})
    found, expected = compiled(q), model(q)
    assert found.placements == expected.placements == (Shard(2),)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found.full_tensor(), expected.full_tensor())


def test_autocast(mesh: DeviceMesh):
    report = mhf_compiler.explain(Autocast(mesh), options=OPTIONS)(queries(mesh))
    assert len(report.rewritten) == 1, report


def test_hidden_units_that_leave_the_mesh(mesh: DeviceMesh):
    report = mhf_compiler.explain(Detoured(mesh), options=OPTIONS)(queries(mesh))
    assert not report.rewritten
    assert [one.reason.kind for one in report.declined] == [DeclineKind.UNKNOWN_OPERATION]


@pytest.mark.parametrize("network", [Entering, EnteringBefore])
def test_dtensors_that_the_graph_makes_itself(network: Any, mesh: DeviceMesh):
    model, x = network(mesh), torch.randn(2, 5, 4, 16)
    report = mhf_compiler.explain(model, options=OPTIONS)(x)
    assert len(report.rewritten) == 1, report
    options = OPTIONS | {"fallback": "aot_eager"}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    torch.testing.assert_close(compiled(x), model(x))


class OverBatch(Network):
    def forward(self, q: Tensor) -> Tensor:
        return torch.vmap(lambda one: Network.forward(self, one[None])[0])(q)


def test_in_vmap_operations_on_dtensors_are_not_followed(mesh: DeviceMesh):
    report = mhf_compiler.explain(OverBatch(mesh), options=OPTIONS)(queries(mesh))
    assert not report.rewritten
    (declined,) = report.declined
    assert (declined.reason.kind, declined.reason.detail) == (
        DeclineKind.UNKNOWN_OPERATION,
        "einsum",
    )


@pytest.mark.parametrize("training", [False, True])
def test_dynamic_sizes(mesh: DeviceMesh, training: bool):
    """In training, too, where PyTorch's own back ends fail."""
    model = Network(mesh)
    options = OPTIONS | {"fallback": "aot_eager"}
    compiled = torch.compile(model, backend="flashmhf", dynamic=True, options=options)
    for length in (5, 9):
        q = distribute_tensor(torch.randn(2, length, 4, 16), mesh, [Replicate()])
        with torch.set_grad_enabled(training):
            found, expected = compiled(q), model(q)
        assert found.placements == expected.placements
        torch.testing.assert_close(found.full_tensor(), expected.full_tensor())
        if training:
            weights = [model.gate, model.down]
            of_found, of_expected = (
                [grad.full_tensor() for grad in torch.autograd.grad(y.sum(), weights)]
                for y in (found, expected)
            )
            torch.testing.assert_close(of_found, of_expected)
    assert counters["flashmhf"]["sites_rewritten"] == 1
