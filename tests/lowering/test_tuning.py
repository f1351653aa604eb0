"""Tuning without a GPU: the clock and the kernels that it times are the tests' own."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from mhf_compiler.lowering import kernels
from mhf_compiler.lowering.kernels.launch import Problem
from mhf_compiler.lowering.kernels.tuning import search as tuning
from mhf_compiler.lowering.kernels.tuning import store as tuned
from mhf_compiler.lowering.kernels.tuning.search import candidates, tune
from mhf_compiler.lowering.kernels.tuning.store import Class, class_of, rounded, row_for, row_of
from mhf_compiler.lowering.tiles import Kernel, Row, Tile
from mhf_compiler.lowering.workload import Workload, _plain_runs, _tensors, tile_class


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    tuned.forget()
    yield
    tuned.forget()


def a_class(**changes: Any) -> Class:
    """One network of a model on an A100."""
    cls = Class(
        kernel="forward",
        tokens=8192,
        heads=16,
        groups=16,
        networks=22,
        hidden=256,
        width=128,
        gated=True,
        routed=True,
        biased=(False, False, False),
        activation="silu",
        dtype=torch.bfloat16,
        card="NVIDIA A100",
        capability=(8, 0),
    )
    return cls._replace(**changes)


class Card:
    """Times and results of tiles; what is not listed takes a second and is right."""

    def __init__(self, cls: Class, seconds: dict[Tile, float] | None = None) -> None:
        self.cls = cls
        self.seconds = seconds or {}
        self.broken: dict[Tile, Exception] = {}
        self.wrong: set[Tile] = set()
        self.tile: Tile | None = None
        self.timed: list[Tile] = []
        self.said: list[str] = []
        self.trials = 0

    def run(self, tile: Tile) -> Sequence[Tensor]:
        self.tile = tile
        if tile in self.broken:
            raise self.broken[tile]
        return [torch.full((3,), float("nan") if tile in self.wrong else 1.0)]

    def clock(self, run: Callable[[], None]) -> float:
        run()
        assert self.tile is not None
        self.timed.append(self.tile)
        return self.seconds.get(self.tile, 1.0)

    def tune(self, folder: Path | None = None, plain: bool = True) -> Row | None:
        def trial() -> dict[Kernel, Callable[[Tile], Sequence[Tensor]]]:
            self.trials += 1
            return {self.cls.kernel: self.run} if plain else {}

        tune([self.cls], trial, folder, self.said.append, self.clock)
        return row_of(self.cls)


def tiles(cls: Class) -> list[Tile]:
    return list(candidates(cls))


# What is timed.


@pytest.mark.parametrize("kernel", ["forward", "query", "down", "up"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_shipped_tile_is_the_first_of_a_short_list(
    kernel: Kernel, capability: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    cls = a_class(kernel=kernel, capability=capability, width=width, dtype=dtype)
    found = candidates(cls)
    sizes = {"tokens": 8192, "heads": 16, "hidden": 256, "width": width}
    shipped = kernels.choose(kernel, **sizes, itemsize=dtype.itemsize, capability=capability)
    assert next(iter(found)) == shipped
    assert 4 <= len(found) <= 14
    assert all(min(row) > 0 for row in found.values())


def test_a_row_is_cut_down_to_the_problem() -> None:
    """Rows that give the same tile for few tokens are timed once."""
    few, many = tiles(a_class(tokens=16)), tiles(a_class())
    assert all(tile.tokens == 16 for tile in few)
    assert len(few) < len(many)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192), (1 << 20, 8192), (None, 8192)],
)
def test_numbers_of_tokens_share_a_class(tokens: int | None, expected: int) -> None:
    assert rounded(tokens) == expected


# What is chosen.


def test_the_fastest_wins() -> None:
    cls = a_class()
    found = tiles(cls)
    card = Card(cls, {found[2]: 0.9, found[3]: 0.5})
    assert card.tune() == candidates(cls)[found[3]]
    assert set(card.timed) == set(found)
    assert card.said[0] == f"tuning forward for 16 heads x 128: 1 of {len(found)}"
    assert card.said[-1] == f"tuning forward for 16 heads x 128: {len(found)} of {len(found)}"


@pytest.mark.parametrize("seconds", [1.0, 0.98])
def test_noise_keeps_the_shipped_tile(seconds: float) -> None:
    cls = a_class()
    assert Card(cls, dict.fromkeys(tiles(cls)[1:], seconds)).tune() is None


def test_what_was_fast_once_only_is_not_taken() -> None:
    cls = a_class()
    lucky = tiles(cls)[1]
    card = Card(cls, {lucky: 0.5})
    clock = card.clock

    def warming_up(run: Callable[[], None]) -> float:
        seconds = clock(run)
        card.seconds.pop(lucky, None) if card.tile == lucky else None
        return seconds

    card.clock = warming_up  # type: ignore[method-assign]
    assert card.tune() is None


def test_what_fails_is_left_out() -> None:
    cls = a_class()
    found = tiles(cls)
    card = Card(cls, {found[1]: 0.1, found[2]: 0.2, found[3]: 0.5})
    card.broken = {
        found[1]: triton.OutOfResources(300, 200, "shared memory"),
        found[2]: RuntimeError("PassManager::run failed"),
    }
    assert card.tune() == candidates(cls)[found[3]]


def test_what_computes_something_else_is_left_out() -> None:
    cls = a_class()
    found = tiles(cls)
    card = Card(cls, {found[1]: 0.1})
    card.wrong = {found[1]}
    assert card.tune() is None
    assert found[1] not in card.timed


def test_what_hoppers_own_kernel_runs_is_not_tuned(tmp_path: Path) -> None:
    card = Card(a_class(capability=(9, 0)))
    assert card.tune(tmp_path, plain=False) is None
    assert not card.said
    assert Card(card.cls).tune(tmp_path, plain=False) is None
    assert card.trials == 1


def test_a_shipped_tile_that_fails_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """The trial run that follows says what is wrong."""
    card = Card(a_class())
    card.broken = {tiles(card.cls)[0]: torch.OutOfMemoryError("out of memory")}
    assert card.tune() is None
    assert card.tune() is None
    assert caplog.text.count("tuning failed, the shipped tiles are used: out of memory") == 1


# What is remembered.


def test_a_class_is_timed_once() -> None:
    card = Card(a_class())
    card.tune()
    timed = len(card.timed)
    card.tune()
    assert timed == len(card.timed)
    assert card.trials == 1


@pytest.mark.parametrize("gain", [True, False])
def test_a_later_process_finds_what_was_tuned(tmp_path: Path, gain: bool) -> None:
    """Also that nothing was found."""
    cls = a_class()
    card = Card(cls, {tiles(cls)[1]: 0.5} if gain else {})
    row = card.tune(tmp_path / "made")
    assert (row is not None) == gain
    tuned.forget()
    later = Card(cls)
    assert later.tune(tmp_path / "made") == row
    assert not later.trials
    assert not later.said
    assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"card": "NVIDIA A100-SXM4-80GB"},
        {"kernel": "query"},
        {"width": 64},
        {"hidden": 512},
        {"tokens": 4096},
        {"dtype": torch.float16},
        {"activation": "gelu"},
        {"gated": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_class_is_tuned_for_itself(changes: dict[str, Any], tmp_path: Path) -> None:
    Card(a_class()).tune(tmp_path)
    other = Card(a_class(**changes))
    other.tune(tmp_path)
    assert other.trials == 1


@pytest.mark.parametrize("what", ["triton", "kernels"])
def test_what_other_code_found_is_stale(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(a_class()).tune(tmp_path)
    tuned.forget()
    if what == "triton":
        monkeypatch.setattr(triton, "__version__", "3.99")
    else:
        monkeypatch.setattr(tuned, "_kernels_hash", lambda: "edited")
    card = Card(a_class())
    card.tune(tmp_path)
    assert card.trials == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"row": 3}', '{"row": [1, 2]}', '{"row": [64, 64, 4, -1]}', '{"about": {}}'],
)
def test_a_broken_file_is_timed_again(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cls = a_class()
    seconds = {tiles(cls)[1]: 0.5}
    row = Card(cls, seconds).tune(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    tuned.forget()
    assert Card(cls, seconds).tune(tmp_path) == row
    assert "not readable" in caplog.text
    assert json.loads(path.read_text())["row"] == list(row or ())


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cls = a_class()
    found = tiles(cls)
    assert Card(cls, {found[1]: 0.5}).tune(tmp_path / "file") == candidates(cls)[found[1]]
    assert "not kept on disk" in caplog.text


def test_the_first_of_two_processes_decides_for_both(tmp_path: Path) -> None:
    cls = a_class()
    one, two = tiles(cls)[1:3]
    second = Card(cls, {two: 0.5})
    clock = second.clock

    def meanwhile(run: Callable[[], None]) -> float:
        if not list(tmp_path.iterdir()):
            tuned.keep(cls, candidates(cls)[one], tmp_path)
        return clock(run)

    second.clock = meanwhile  # type: ignore[method-assign]
    assert second.tune(tmp_path) == candidates(cls)[one]


# What runs then.


def a_workload(**changes: Any) -> Workload:
    sizes: dict[str, Any] = {
        "batch": 2,
        "length": 20,
        "heads": 4,
        "kuv_heads": 2,
        "head_dim": 16,
        "experts": 3,
        "expert_dim": 32,
        "gated": True,
        "routed": True,
        "biased": (False, False, False),
        "activation": "silu",
        "dtype": torch.float32,
        "out_dtype": torch.float32,
        "device": torch.device("cpu"),
        "training": True,
    }
    return Workload(**sizes | changes)


def a_problem(workload: Workload) -> Problem:
    def ones(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(shape, dtype=dtype)

    tensors = _tensors(workload, rounded(workload.tokens), ones)
    return Problem(*tensors, workload.activation, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": False, "routed": False},
        {"biased": (True, False, True)},
        {"length": None},
        {"dtype": torch.bfloat16, "activation": "gelu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["forward", "up"])
def test_a_launch_finds_what_was_tuned_for_its_workload(
    kernel: Kernel, changes: dict[str, Any]
) -> None:
    workload = a_workload(**changes)
    assert class_of(kernel, a_problem(workload)) == tile_class(kernel, workload)
    assert row_for(kernel, a_problem(workload)) is None
    tuned.keep(tile_class(kernel, workload), (16, 32, 4, 2), None)
    assert row_for(kernel, a_problem(workload)) == (16, 32, 4, 2)


@pytest.mark.parametrize("fits", [True, False])
def test_a_tuned_tile_runs_unless_it_does_not_fit(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timed over dense tensors, it may need more shared memory for others."""
    problem = a_problem(a_workload())
    ran: list[Tile] = []

    def run_forward(problem: Problem, out: Tensor, tile: Tile) -> None:
        if tile.stages == 3 and not fits:
            raise triton.OutOfResources(300, 200, "shared memory")
        ran.append(tile)

    monkeypatch.setattr(kernels, "run_forward", run_forward)

    def stages_of_the_forward_kernel() -> int:
        out = torch.empty_like(problem.q)
        kernels.forward(*problem[:8], out, activation=problem.activation)
        return ran[-1].stages

    shipped = stages_of_the_forward_kernel()
    tuned.keep(class_of("forward", problem), (32, 32, 8, 3), None)
    assert stages_of_the_forward_kernel() == (3 if fits else shipped)
    tuned.forget()
    assert stages_of_the_forward_kernel() == shipped != 3


@pytest.mark.parametrize("training", [False, True])
def test_the_trial_has_each_kernel_and_draws_no_numbers_of_the_users(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[Kernel] = ["forward", "query", "down", "up"] if training else ["forward"]
    monkeypatch.setattr(tuning, "run_hopper", lambda *arguments: False)
    state = torch.get_rng_state()
    runs = _plain_runs(a_workload(biased=(True, False, True)), names)
    assert torch.get_rng_state().equal(state)
    assert list(runs) == names


def test_new_results_are_used_by_calls_that_were_written_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgotten: list[bool] = []
    monkeypatch.setattr(tuned, "forget_repeats", lambda: forgotten.append(True))
    tuned.keep(a_class(), (32, 32, 4, 2), None)
    assert forgotten


def test_tuning_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    cls = a_class()
    with caplog.at_level(logging.INFO, "mhf_compiler"):
        Card(cls, {tiles(cls)[1]: 0.5}).tune()
    assert "0.5 of its time" in caplog.text
