"""The ops on DTensors: on which shards they compute, in one process and in several."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.ranks import run_ranks

from mhf_compiler.lowering.ops.sharding import shardings

TENSORS = ("q", "k", "u", "v", "r", "k_bias", "u_bias", "v_bias")


def call(H: int = 4, G: int = 4, E: int = 4, f: int = 8, absent: str = "", B: int = 4) -> list:
    """The tensors of a call, of which only shapes are looked at."""
    weight, bias = (G, E, f, 16), (G, E, f)
    shapes = (
        (B, 6, H, 16),
        *(weight, weight, weight),
        (B, 6, H, E),
        *(bias, bias, (G, E, 16)),
    )
    return [
        None if name in absent.split() else SimpleNamespace(shape=shape)
        for name, shape in zip(TENSORS, shapes, strict=True)
    ]


def forward(mesh: tuple[int, ...], **sizes) -> list:
    return list(shardings("multi_head_ffn", call(**sizes), mesh))


def cut(found: list, **places: int) -> list:
    """The results of those shardings that cut these tensors so, over a mesh of one dimension."""
    wanted = {TENSORS.index(name): place for name, place in places.items()}
    return [
        [place for (place,) in results]
        for tensors, results in found
        if all(tensors[at] == [place] for at, place in wanted.items())
    ]


WEIGHTS = dict.fromkeys(("k", "u", "v", "k_bias", "u_bias"), 0)


def test_the_first_sharding_needs_whole_tensors():
    tensors, results = forward((2, 3))[0]
    assert tensors == [[None, None]] * 8
    assert results == [[None, None]]


@pytest.mark.parametrize(
    ("places", "result"),
    [
        ({"q": 0, "r": 0}, 0),
        ({"q": 1, "r": 1}, 1),
        ({"q": 2, "r": 2} | WEIGHTS, 2),
        ({"r": 3} | dict.fromkeys(WEIGHTS, 1), "sum"),
    ],
    ids=["batch", "length", "heads", "sub-networks"],
)
def test_what_is_cut(places: dict, result: int | str):
    assert cut(forward((2,)), **places) == [[result]]


def test_hidden_units_are_cut_unless_a_bias_would_be_added_more_than_once():
    places = dict.fromkeys(("k", "u", "v"), 2)
    assert cut(forward((2,), absent="v_bias"), **places) == [["sum"]]
    assert cut(forward((2,)), **places) == []


def test_nothing_cuts_the_width_of_a_head():
    assert all(3 not in tensors[0] for tensors, _ in forward((2,)))


@pytest.mark.parametrize(
    ("sizes", "devices", "possible"),
    [
        ({"H": 8, "G": 4}, 2, True),
        ({"H": 8, "G": 4}, 4, True),
        ({"H": 8, "G": 4}, 8, False),  # a device has half of the heads of a group
        ({"H": 6, "G": 3}, 2, False),  # 3 heads and 2 groups here, 3 heads and 1 group there
        ({"H": 3, "G": 3}, 2, False),
    ],
)
def test_heads_are_cut_with_their_groups(sizes: dict, devices: int, possible: bool):
    assert bool(cut(forward((devices,), **sizes), q=2)) is possible


def test_weights_that_all_heads_share_stay_whole():
    assert cut(forward((4,), H=8, G=1), q=2, k=None) == [[2]]
    assert cut(forward((4,), H=8, G=2), q=2, k=None) == []
    assert cut(forward((4,), H=6, G=1), q=2) == []


@pytest.mark.parametrize(
    ("sub_networks", "mesh", "possible"),
    [(22, (4,), True), (5, (4,), False), (3, (4,), False), (22, (2, 2), False), (24, (2, 2), True)],
)
def test_no_device_is_without_sub_networks(
    sub_networks: int, mesh: tuple[int, ...], possible: bool
):
    """5 over 4 devices are 2, 2, 1 and none, for which there is no op."""
    found = [tensors[1] for tensors, _ in forward(mesh, E=sub_networks)]
    assert ([1] * len(mesh) in found) is possible


def test_no_device_is_without_tokens():
    assert cut(forward((2,), B=1), q=0) == []
    assert cut(forward((2,), B=3), q=0) == [[0]]


def test_the_dimensions_of_a_mesh_are_cut_independently():
    found = {(*tensors[0], *results[0]) for tensors, results in forward((2, 2))}
    assert {(0, 2, 0, 2), (2, 2, 2, 2), (None, 2, "sum", 2), (0, 1, 0, 1)} <= found


@pytest.mark.parametrize(
    ("place", "gradients"),
    [
        ({"grad_out": 0}, [0, *["sum"] * 3, 0, *["sum"] * 3]),
        ({"grad_out": 2, "k": 0}, [2, 0, 0, 0, 2, 0, 0, 0]),
        ({"k": 1}, ["sum", 1, 1, 1, 3, 1, 1, 1]),
    ],
    ids=["tokens", "heads", "sub-networks"],
)
def test_gradients(place: dict, gradients: list):
    arguments = call()
    arguments = [arguments[0], *arguments, "silu", 1.0, 1.0, 1.0, [True] * 8]
    names = ("grad_out", *TENSORS)
    for tensors, results in shardings("multi_head_ffn_backward", arguments, (2,)):
        if all(tensors[names.index(name)] == [at] for name, at in place.items()):
            assert results == [[at] for at in gradients]
            return
    pytest.fail("there is no such sharding")


def test_only_the_gradients_that_are_needed():
    arguments = call(absent="r v_bias")
    needs = [name in ("k", "u_bias") for name in TENSORS]
    arguments = [arguments[0], *arguments, "silu", 1.0, 1.0, 1.0, needs]
    found = list(shardings("multi_head_ffn_backward", arguments, (2,)))
    assert {(len(tensors), len(results)) for tensors, results in found} == {(7, 2)}
    assert [["sum"], ["sum"]] in [results for _, results in found]


# With processes.


@pytest.mark.parametrize("world", [2, 4])
def test_processes(world: int, tmp_path: Path):
    """Four are a mesh of two by two."""
    run_ranks(Path(__file__).parent / "sharded.py", world, tmp_path)


def python(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


ONE_PROCESS = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
q = distribute_tensor(torch.randn(2, 3, 4, 8), mesh, [Shard(2)]).requires_grad_()
w = distribute_tensor(torch.randn(4, 2, 5, 8), mesh, [Shard(0)]).requires_grad_()
"""


def test_dtensors_may_be_loaded_later():
    python(
        "import sys, mhf_compiler\n"
        "from mhf_compiler import multi_head_ffn\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        f"{ONE_PROCESS}\n"
        "assert multi_head_ffn(q, w, w, w).placements == (Shard(2),)\n"
    )


def test_a_compiled_model_that_calls_the_op():
    """Dynamo traces the function, and no other call has told DTensor of the op before."""
    python(
        "from mhf_compiler import multi_head_ffn\n"
        f"{ONE_PROCESS}\n"
        "call = lambda q, w: multi_head_ffn(q, w, w, w)\n"
        "out = torch.compile(call, backend='aot_eager', fullgraph=True)(q, w)\n"
        "assert out.placements == (Shard(2),)\n"
        "out.full_tensor().sum().backward()\n"
        "assert w.grad.placements == (Shard(0),)\n"
    )


def test_without_torch_distributed():
    """Where PyTorch was built without it, its modules cannot be imported."""
    python(
        "import sys, torch\n"
        "loaded = [name for name in sys.modules if name.startswith('torch.distributed')]\n"
        "sys.modules.update(dict.fromkeys([*loaded, 'torch.distributed.tensor']))\n"
        "del sys.modules['torch.distributed.tensor']\n"
        "import mhf_compiler\n"
        "q, w = torch.empty(2, 3, 4, 8, device='meta'), torch.empty(4, 2, 5, 8, device='meta')\n"
        "assert mhf_compiler.multi_head_ffn(q, w, w, w).shape == q.shape\n"
    )
