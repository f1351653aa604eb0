"""The cost model: the relations that it states, and its choices where they were measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.workloads import changed

from benchmarks import grid, results
from mhf_compiler.lowering.cost import Estimate, estimate
from mhf_compiler.lowering.device import find_card
from mhf_compiler.lowering.tiles import Sizes
from mhf_compiler.lowering.workload import Workload, trial_run, unsupported

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
CPU = Workload(
    sizes=Sizes(
        tokens=4 * 512,
        heads=4,
        groups=4,
        head_dim=64,
        sub_networks=4,
        hidden=192,
        gated=True,
        routed=True,
        biased=(False, False, False),
        dtype=torch.float32,
    ),
    activation="silu",
    out_dtype=torch.float32,
    device=torch.device("cpu"),
    training=True,
)
#: on a card with a number of its own, so that nothing is remembered of a real one
GPU = changed(CPU, dtype=torch.bfloat16, out_dtype=torch.bfloat16, device=torch.device("cuda", 63))


@pytest.fixture(autouse=True)
def _h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver of an H200 reports."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)


everywhere = pytest.mark.parametrize("workload", [CPU, GPU], ids=["cpu", "gpu"])
both_ways = pytest.mark.parametrize("way", ["rewritten", "original"])


def seconds(workload: Workload, way: str, **changes: Any) -> float:
    return float(getattr(estimate(changed(workload, **changes)), way))


# Relations.


@everywhere
@pytest.mark.parametrize("training", [False, True])
def test_estimates_are_times(workload: Workload, training: bool):
    found = estimate(changed(workload, training=training))
    assert 0 < found.rewritten < math.inf
    assert 0 < found.original < math.inf


@everywhere
@both_ways
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("size", "values"),
    [
        ("tokens", [4 * length for length in (1, 64, 512, 4096, 65536)]),
        ("heads", [4, 8, 16, 64]),
        ("sub_networks", [1, 2, 4, 16]),
        ("hidden", [64, 128, 1024, 8192]),
        ("head_dim", [64, 128, 256]),  # narrower heads go to other kernels on a GPU
    ],
)
def test_more_work_never_takes_less_time(
    workload: Workload, way: str, training: bool, size: str, values: list[int]
):
    graph = changed(workload, captured=True)  # where the host is no limit
    times = [seconds(graph, way, training=training, **{size: value}) for value in values]
    assert all(less <= more for less, more in pairwise(times))
    assert times[0] < times[-1]


@everywhere
@both_ways
def test_training_takes_longer_than_inference(workload: Workload, way: str):
    assert seconds(workload, way, training=False) < seconds(workload, way, training=True)


@everywhere
@both_ways
def test_an_up_projection_takes_time(workload: Workload, way: str):
    graph = changed(workload, captured=True)
    assert seconds(graph, way, gated=False) < seconds(graph, way, gated=True)


@everywhere
@both_ways
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_weights_in_separate_modules_cost_both_ways_more(
    workload: Workload, way: str, training: bool, captured: bool
):
    """The original runs a kernel for each; for the op they are copied together."""
    large = changed(workload, training=training, captured=captured, tokens=4 * 65536)
    apart = [(1, 1, 1), (1, 1, 4), (1, 4, 4), (4, 4, 4)]
    times = [seconds(large, way, pieces=pieces) for pieces in apart]
    assert all(less < more for less, more in pairwise(times))


@everywhere
@pytest.mark.parametrize("training", [False, True])
def test_a_loop_costs_the_original_more_and_the_op_nothing(workload: Workload, training: bool):
    batched = changed(workload, training=training)
    looped = changed(batched, written=3 * workload.sizes.sub_networks)
    assert estimate(batched).original < estimate(looped).original
    assert estimate(batched).rewritten == estimate(looped).rewritten


@pytest.mark.parametrize("tokens", [512, 1024, 4096])
@pytest.mark.parametrize(("heads", "head_dim", "sub_networks"), [(16, 128, 22), (8, 96, 16)])
def test_small_training_steps_of_loops_are_rewritten(
    tokens: int, heads: int, head_dim: int, sub_networks: int
):
    """Where an H200 took 1.2 to 2.5 times as long for the original."""
    sizes = {"heads": heads, "groups": heads, "head_dim": head_dim, "sub_networks": sub_networks}
    looped = changed(GPU, tokens=tokens, hidden=256, written=3 * sub_networks, **sizes)
    assert estimate(looped).pays
    assert not estimate(changed(looped, written=3, tokens=512)).pays


@everywhere
@pytest.mark.parametrize("training", [False, True])
def test_more_modules_cost_the_original_more_and_the_op_nothing(workload: Workload, training: bool):
    apart = changed(workload, training=training, captured=True)
    few, many = (changed(apart, pieces=(count, count, count)) for count in (4, 16))
    assert estimate(few).original < estimate(many).original
    assert estimate(few).rewritten == estimate(many).rewritten


def test_more_modules_have_more_gradients_for_the_host_to_keep():
    small = changed(GPU, tokens=64)
    few, many = (changed(small, pieces=(count, count, count)) for count in (4, 16))
    assert estimate(few).rewritten < estimate(many).rewritten


@both_ways
def test_an_up_projection_that_is_not_there_lies_in_no_pieces(way: str):
    plain = changed(GPU, gated=False, pieces=(4, 1, 4))
    assert seconds(plain, way) == seconds(plain, way, pieces=(4, 4, 4))


# Verdicts.


def test_large_problems_pay_on_a_gpu():
    """The original writes the hidden units to memory and reads them again."""
    for training in (False, True):
        assert estimate(changed(GPU, tokens=4 * 65536, training=training)).pays


def test_a_small_training_step_with_wide_heads_does_not_pay():
    """Few programs, long loops: the latency of the loop is all there is."""
    small = changed(GPU, tokens=64, heads=2, groups=2, head_dim=256, hidden=4096)
    assert not estimate(small).pays


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [1, 1024, 16384])
def test_networks_in_separate_modules_pay_on_a_gpu(tokens: int, training: bool):
    """Small or large: the host launches dozens of kernels, or hundreds, where the op has a few."""
    apart = changed(GPU, heads=8, groups=8, sub_networks=1, pieces=(8, 8, 8))
    assert estimate(changed(apart, tokens=tokens, training=training)).pays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_step_of_decoding_does_not_pay_on_a_cpu(dtype: torch.dtype, training: bool):
    few = changed(CPU, tokens=1, dtype=dtype, out_dtype=dtype, training=training)
    assert not estimate(few).pays


def test_converting_weights_costs_half_precision_more():
    few = changed(CPU, tokens=1, training=False)
    half = changed(few, dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    assert estimate(half).rewritten > estimate(few).rewritten


def test_half_precision_does_not_pay_on_a_cpu_that_has_products_for_it():
    """The op computes in float32."""
    many = changed(CPU, tokens=64 * 512, training=False)
    assert estimate(many).pays
    assert not estimate(changed(many, dtype=torch.bfloat16, out_dtype=torch.bfloat16)).pays


def points(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The op at each point of a grid, followed by the original in every spelling."""
    starts = [i for i, row in enumerate(rows) if row["contender"] == "op"]
    for start, end in pairwise([*starts, len(rows)]):
        yield rows[start:end]


@pytest.mark.parametrize(("results_of", "device"), [("cpu", "cpu"), ("h200", "cuda:63")])
def test_the_model_chooses_as_measured(
    results_of: str, device: str, monkeypatch: pytest.MonkeyPatch
):
    """At every point of a stored grid its choice is within five percent of the better."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # as where the CPU's was measured
    _, rows = results.read(RESULTS / f"{results_of}_grid.json")
    losses = []
    for op, *others in points(rows):
        fastest = min(row["ms"] for row in others)
        rewrites = estimate(grid.workload(op, device)).pays
        losses.append((op["ms"] if rewrites else fastest) / min(op["ms"], fastest))
    assert max(losses) <= 1.05


def test_the_host_is_no_limit_inside_a_cuda_graph():
    small = changed(GPU, tokens=64)
    for way in ("rewritten", "original"):
        assert seconds(small, way, captured=True) < seconds(small, way, captured=False)


def test_the_host_is_no_limit_to_inference():
    """It is ahead of the card, or both ways wait for it."""
    small = changed(GPU, tokens=64, training=False)
    for way in ("rewritten", "original"):
        assert seconds(small, way, captured=True) == seconds(small, way, captured=False)


def test_no_tokens_are_no_error():
    assert estimate(changed(GPU, tokens=0)).original > 0


@pytest.mark.parametrize("kind", ["meta", "xpu"])
def test_where_nothing_is_known_rewriting_is_taken_to_pay(kind: str):
    assert estimate(changed(CPU, device=torch.device(kind))).pays


@pytest.mark.parametrize(
    ("rewritten", "original", "pays"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, True)]
)
def test_what_pays(rewritten: float, original: float, pays: bool):
    assert Estimate(rewritten, original).pays is pays


@pytest.mark.parametrize(
    ("seconds", "rewritten_bytes", "pays"),
    [(1.05, 3.0, True), (1.06, 3.0, False), (1.06, 1.9, True), (1.1, 1.9, True), (1.11, 0, False)],
)
def test_a_tie_is_wider_where_memory_is_saved(seconds: float, rewritten_bytes: float, pays: bool):
    assert Estimate(seconds, 1.0, rewritten_bytes, 4.0).pays is pays


def test_an_estimate_names_time_and_memory():
    said = str(Estimate(0.012345, 0.00456, 3 * 2**20, 2**29))
    assert said == "an estimated 12.3 ms and 3 MiB rewritten, 4.56 ms and 512 MiB as it is"


@everywhere
def test_the_original_stores_hidden_units(workload: Workload):
    """In training those of all sub-networks; in inference a loop those of one."""
    units = workload.sizes.tokens * 4 * 4 * 192 * workload.sizes.dtype.itemsize
    result = workload.sizes.tokens * 4 * 64 * workload.sizes.dtype.itemsize
    infer, train = (changed(workload, training=training) for training in (False, True))
    for case, expected in [
        (infer, 2 * units),
        (changed(infer, gated=False), units),
        (changed(infer, written=3 * 4), 2 * units / 4),
        (train, 3 * units),
        (changed(train, written=3 * 4), 3 * units),
    ]:
        found = estimate(case)
        assert (found.rewritten_bytes, found.original_bytes) == (result, result + expected)


#: 32 networks of a recommender model, each of a token of its own
WIDE = changed(
    GPU,
    tokens=2048,
    heads=32,
    groups=32,
    head_dim=512,
    sub_networks=1,
    hidden=2048,
    gated=False,
    routed=False,
    captured=True,
)


@pytest.mark.parametrize("training", [False, True])
def test_products_of_wide_heads_take_the_time_of_products(training: bool):
    """And of a few passes over the hidden units."""
    wide = changed(WIDE, training=training)
    product = 2 * 2048 * 32 * 2048 * 512 / (5.3e12 * 132)
    products = 7 if training else 2
    assert products * product < seconds(wide, "rewritten") < 2 * products * product


def test_products_have_the_hidden_units_of_a_chunk():
    train, infer = (changed(WIDE, training=training) for training in (True, False))
    result = 2048 * 32 * 512 * 2
    for case in (train, infer):
        found = estimate(case)
        assert result < found.rewritten_bytes <= result + 128 * 2**20 < found.original_bytes
    assert estimate(train).saves_memory


# In a package of AOTInductor's.

#: an H100 that need not be there
PYTHON = changed(GPU, training=False, head_dim=128, tokens=4 * 8192, card=find_card("cuda:h100"))


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_package_without_hoppers_kernel_takes_longer(head_dim: int, dtype: torch.dtype):
    python = changed(PYTHON, head_dim=head_dim, dtype=dtype, out_dtype=dtype)
    package = changed(python, packaged=True)
    assert seconds(python, "rewritten") < seconds(package, "rewritten")
    assert estimate(python).original == estimate(package).original


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 128}, {"card": find_card("cuda:a100")}, {"out_dtype": torch.float32}],
    ids=["few tokens", "another card", "a wider result"],
)
def test_a_package_with_the_same_kernel_takes_as_long(changes: dict[str, Any]):
    same = changed(PYTHON, **changes)
    assert estimate(changed(same, packaged=True)) == estimate(same)


@pytest.mark.parametrize("written", [0, 3 * 4])
def test_a_package_has_all_hidden_units_of_products_in_memory(written: int):
    """They are the original's, all sub-networks at once."""
    package = changed(PYTHON, head_dim=512, written=written, packaged=True)
    found, batched = estimate(package), estimate(changed(package, written=0))
    assert found.rewritten == batched.rewritten == batched.original
    assert found.rewritten_bytes == batched.original_bytes
    assert found.original >= batched.original


@everywhere
def test_copies_of_weights_take_memory(workload: Workload):
    weights = 4 * 4 * 192 * 64 * workload.sizes.dtype.itemsize
    apart = changed(workload, training=False, pieces=(4, 1, 4))
    plain = estimate(changed(apart, pieces=(1, 1, 1))).rewritten_bytes
    assert estimate(apart).rewritten_bytes == plain + 2 * weights
    assert estimate(changed(apart, training=True)).rewritten_bytes == plain + 4 * weights


def test_there_is_nothing_to_try_on_a_cpu():
    """Nor is the op called, whatever the sizes."""
    trial_run(changed(CPU, tokens=1 << 40, heads=1 << 10))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"out_dtype": torch.float64}, "out_dtype"),
        ({"device": torch.device("mps")}, "mps"),
    ],
)
def test_what_a_device_does_not_run_is_named(changes: dict[str, Any], named: str):
    message = unsupported(changed(GPU, **changes))
    assert message is not None
    assert named in message


def test_what_a_device_runs_meets_no_objection():
    assert unsupported(GPU) is None
    assert unsupported(changed(GPU, head_dim=1536)) is None
