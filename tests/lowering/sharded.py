"""One process of several that call the ops with DTensors; `test_sharding.py` starts it.

    python sharded.py RANK WORLD FOLDER

Results and gradients are compared with those of plain tensors, for every placement of the arguments
that the ops compute on without communication, and for others, which are redistributed.
"""

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode

from mhf_compiler.lowering import multi_head_ffn, router_product

Tensors = dict[str, Tensor]
Places = dict[str, Sequence[Placement]]

WEIGHTS = ("k", "u", "v", "k_bias", "u_bias", "v_bias")
#: the dimension along which each tensor is cut; others are whole
CUTS: dict[str, dict[str, int]] = {
    "nothing": {},
    "batch": {"q": 0, "r": 0},
    "length": {"q": 1, "r": 1},
    "heads": {"q": 2, "r": 2} | dict.fromkeys(WEIGHTS, 0),
    "queries' heads": {"q": 2, "r": 2},
    "sub-networks": {"r": 3} | dict.fromkeys(WEIGHTS, 1),
    "hidden units": dict.fromkeys(("k", "u", "v", "k_bias", "u_bias"), 2),
}
RESULTS = {
    "nothing": Replicate(),
    "batch": Shard(0),
    "length": Shard(1),
    "heads": Shard(2),
    "queries' heads": Shard(2),
    "sub-networks": Partial(),
    "hidden units": Partial(),
}


def problem(H: int, G: int, E: int, *absent: str) -> Tensors:
    torch.manual_seed(0)
    B, L, d, f = 4, 5, 8, 12
    weight, bias = (G, E, f, d), (G, E, f)
    shapes = {
        "q": (B, L, H, d),
        "k": weight,
        "u": weight,
        "v": weight,
        "r": (B, L, H, E),
        "k_bias": bias,
        "u_bias": bias,
        "v_bias": (G, E, d),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items() if name not in absent}


PROBLEMS = {
    "a head each": problem(4, 4, 4),
    "shared by all": problem(4, 1, 4, "v_bias"),
    "shared by two": problem(8, 4, 4, "k_bias", "v_bias"),
    "un-routed": problem(4, 4, 4, "r", "v_bias"),
    "un-gated": problem(4, 4, 4, "u", "u_bias"),
    "uneven": problem(6, 3, 7, "v_bias"),  # 7 sub-networks go, 3 groups do not
}


def network(tensors: Tensors) -> Tensor:
    return multi_head_ffn(**({"u": None} | tensors), activation="gelu", out_scale=0.5)  # type: ignore[arg-type]


def router(tensors: Tensors) -> Tensor:
    return router_product(tensors["q"].bfloat16(), tensors["weight"])


def distributed(x: Tensor, mesh: DeviceMesh, places: Sequence[Placement]) -> Tensor:
    """A leaf that is placed so; of a part of a sum, each device has an equal share."""
    cut = [Replicate() if place.is_partial() else place for place in places]
    local = distribute_tensor(x, mesh, cut).to_local()
    for place, devices in zip(places, mesh.shape, strict=True):
        local = local / devices if place.is_partial() else local
    stride = x.stride()
    made = DTensor.from_local(local, mesh, places, run_check=False, shape=x.shape, stride=stride)
    return made.detach().requires_grad_()


def compare(
    op: Callable[[Tensors], Tensor], tensors: Tensors, mesh: DeviceMesh, places: Places
) -> tuple[Sequence[Placement], int]:
    """Compare with plain tensors; how the result is placed, and how much was communicated."""
    plain = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    cut = {name: distributed(x, mesh, places[name]) for name, x in tensors.items()}
    expected = op(plain)
    with CommDebugMode() as communication:
        found = op(cut)
    torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    found.backward(distribute_tensor(grad, mesh, [Replicate()] * mesh.ndim))
    for name, x in plain.items():
        gradient = cut[name].grad.full_tensor()  # type: ignore[union-attr]
        tolerance = 1e-4 if x.dtype is torch.float32 else 1e-2
        torch.testing.assert_close(gradient, x.grad, rtol=tolerance, atol=tolerance)
    return found.placements, communication.get_total_counts()


def cuts_of(tensors: Tensors, devices: int) -> Iterator[str]:
    """The cuts that such a problem can be computed along without communication."""
    groups, heads = tensors["k"].shape[0], tensors["q"].shape[2]
    yield from ("nothing", "batch", "length", "sub-networks")
    if groups % devices == 0:
        yield "heads"
    if heads % devices == 0 and (groups % devices == 0 or groups == 1):
        yield "queries' heads"
    if "v_bias" not in tensors:
        yield "hidden units"


def placed(tensors: Tensors, cuts: Sequence[str]) -> Places:
    return {
        name: [Shard(CUTS[cut][name]) if name in CUTS[cut] else Replicate() for cut in cuts]
        for name in tensors
    }


def check_without_communication(mesh: DeviceMesh) -> None:
    problems = [*PROBLEMS.values()][:: mesh.ndim]
    for number, tensors in enumerate(problems):
        pairs = itertools.product(cuts_of(tensors, mesh.size()), repeat=mesh.ndim)
        for cuts in itertools.islice(pairs, number, None, 1 if mesh.ndim == 1 else 7):
            if {"heads", "queries' heads"} <= {*cuts}:
                continue  # the weights of a device's heads are elsewhere
            result, communicated = compare(network, tensors, mesh, placed(tensors, cuts))
            assert communicated == 0, cuts
            assert list(result) == [RESULTS[cut] for cut in cuts], (cuts, result)


def check_any_placement(mesh: DeviceMesh) -> None:
    """Whatever does not fit is redistributed."""
    choice = random.Random(0)
    for tensors in PROBLEMS.values():
        for _ in range(3 - mesh.ndim):
            places = {
                name: [
                    choice.choice([Replicate(), Partial(), *map(Shard, range(x.dim()))])
                    for _ in mesh.shape
                ]
                for name, x in tensors.items()
            }
            compare(network, tensors, mesh, places)


def check_what_dtensor_remembers(mesh: DeviceMesh) -> None:
    """Calls that differ in nothing but which tensors are absent or need a gradient."""
    tensors = problem(4, 4, 4)
    places: Places = {name: [Replicate()] * mesh.ndim for name in tensors}
    places |= dict.fromkeys(("q", "r"), [Shard(0)] * mesh.ndim)
    places |= dict.fromkeys(("k_bias", "u_bias"), [Shard(2)] * mesh.ndim)
    for absent in ("k_bias", "u_bias"):
        rest = {name: x for name, x in tensors.items() if name != absent}
        compare(network, rest, mesh, places)
    for needed in ("k", "r"):
        leaves = {
            name: distributed(x, mesh, places[name]).detach().requires_grad_(name == needed)
            for name, x in tensors.items()
        }
        network(leaves).sum().backward()
        plain = {name: x.detach().requires_grad_(name == needed) for name, x in tensors.items()}
        network(plain).sum().backward()
        gradient = leaves[needed].grad.full_tensor()  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, plain[needed].grad, rtol=1e-4, atol=1e-4)


def check_router(mesh: DeviceMesh) -> None:
    tensors = {"q": torch.randn(4, 5, 4, 8), "weight": torch.randn(4, 8, 3)}
    whole = [Replicate()] * mesh.ndim
    for q, weight, result in [
        (Replicate(), Replicate(), Replicate()),
        (Shard(0), Replicate(), Shard(0)),
        (Shard(2), Shard(0), Shard(2)),
        (Shard(3), Shard(1), Partial()),
    ][:: mesh.ndim]:
        places = {"q": [q, *whole[1:]], "weight": [weight, *whole[1:]]}
        found, communicated = compare(router, tensors, mesh, places)
        assert (found[0], communicated) == (result, 0)


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (2,) * (world.bit_length() - 1))
    check_without_communication(mesh)
    check_any_placement(mesh)
    check_what_dtensor_remembers(mesh)
    check_router(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
