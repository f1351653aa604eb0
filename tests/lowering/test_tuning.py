"""Tuning without a GPU: the clock and the kernels that it times are the tests' own."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models.workloads import changed
from torch import Tensor

pytest.importorskip("triton")

import triton

import mhf_compiler.lowering
from mhf_compiler.lowering.kernels import dispatch
from mhf_compiler.lowering.kernels.tuning import search, store
from mhf_compiler.lowering.kernels.tuning.search import candidates, tune
from mhf_compiler.lowering.kernels.tuning.store import TuningKey, rounded, row_for, row_of
from mhf_compiler.lowering.problem import Problem
from mhf_compiler.lowering.tiles import MANY_TOKENS, Kernel, Row, Sizes, Tile, portable
from mhf_compiler.lowering.workload import Workload, _plain_runs, _problem, tuning_key


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    store.forget()
    yield
    store.forget()


def a_key(**changes: Any) -> TuningKey:
    """One network of a model on an A100."""
    sizes = Sizes(
        tokens=8192,
        heads=16,
        groups=16,
        head_dim=128,
        sub_networks=22,
        hidden=256,
        gated=True,
        routed=True,
        biased=(False, False, False),
        dtype=torch.bfloat16,
        capability=(8, 0),
    )
    key = TuningKey("forward", sizes, activation="silu", card="NVIDIA A100")
    own = {name: changes.pop(name) for name in TuningKey._fields if name in changes}
    return key._replace(sizes=sizes._replace(**changes), **own)


class Card:
    """Times and results of tiles; what is not listed takes a second and is right."""

    def __init__(self, key: TuningKey, seconds: dict[Tile, float] | None = None) -> None:
        self.key = key
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
            return {self.key.kernel: self.run} if plain else {}

        tune([self.key], trial, folder, self.said.append, self.clock)
        return row_of(self.key)


def tiles(key: TuningKey) -> list[Tile]:
    return list(candidates(key))


# What is timed.


@pytest.mark.parametrize("kernel", ["forward", "dq", "dv", "dk_du"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_shipped_tile_is_the_first_of_a_short_list(
    kernel: Kernel, capability: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    key = a_key(kernel=kernel, capability=capability, head_dim=width, dtype=dtype)
    found = candidates(key)
    assert next(iter(found)) == portable(kernel, key.sizes)
    assert 4 <= len(found) <= 14
    assert all(min(row) > 0 for row in found.values())


def test_a_row_is_cut_down_to_the_problem() -> None:
    """Rows that give the same tile for few tokens are timed once."""
    few, many = tiles(a_key(tokens=16)), tiles(a_key())
    assert all(tile.tokens == 16 for tile in few)
    assert len(few) < len(many)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192), (1 << 20, 8192)],
)
def test_numbers_of_tokens_share_a_key(tokens: int | None, expected: int) -> None:
    assert rounded(tokens) == expected


# What is chosen.


def test_the_fastest_wins() -> None:
    key = a_key()
    found = tiles(key)
    card = Card(key, {found[2]: 0.9, found[3]: 0.5})
    assert card.tune() == candidates(key)[found[3]]
    assert set(card.timed) == set(found)
    assert card.said[0] == f"tuning forward for 16 heads x 128: 1 of {len(found)}"
    assert card.said[-1] == f"tuning forward for 16 heads x 128: {len(found)} of {len(found)}"


@pytest.mark.parametrize("seconds", [1.0, 0.98])
def test_noise_keeps_the_shipped_tile(seconds: float) -> None:
    key = a_key()
    assert Card(key, dict.fromkeys(tiles(key)[1:], seconds)).tune() is None


def test_what_was_fast_once_only_is_not_taken() -> None:
    key = a_key()
    lucky = tiles(key)[1]
    card = Card(key, {lucky: 0.5})
    clock = card.clock

    def warming_up(run: Callable[[], None]) -> float:
        seconds = clock(run)
        card.seconds.pop(lucky, None) if card.tile == lucky else None
        return seconds

    card.clock = warming_up  # type: ignore[method-assign]
    assert card.tune() is None


def test_what_fails_is_left_out() -> None:
    key = a_key()
    found = tiles(key)
    card = Card(key, {found[1]: 0.1, found[2]: 0.2, found[3]: 0.5})
    card.broken = {
        found[1]: triton.OutOfResources(300, 200, "shared memory"),
        found[2]: RuntimeError("PassManager::run failed"),
    }
    assert card.tune() == candidates(key)[found[3]]


def test_what_computes_something_else_is_left_out() -> None:
    key = a_key()
    found = tiles(key)
    card = Card(key, {found[1]: 0.1})
    card.wrong = {found[1]}
    assert card.tune() is None
    assert found[1] not in card.timed


def test_what_hoppers_own_kernel_runs_is_not_tuned(tmp_path: Path) -> None:
    card = Card(a_key(capability=(9, 0)))
    assert card.tune(tmp_path, plain=False) is None
    assert not card.said
    assert Card(card.key).tune(tmp_path, plain=False) is None
    assert card.trials == 1


def test_a_shipped_tile_that_fails_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """The trial run that follows says what is wrong."""
    card = Card(a_key())
    card.broken = {tiles(card.key)[0]: torch.OutOfMemoryError("out of memory")}
    assert card.tune() is None
    assert card.tune() is None
    assert caplog.text.count("tuning failed, the shipped tiles are used: out of memory") == 1


# What is remembered.


def test_a_class_is_timed_once() -> None:
    card = Card(a_key())
    card.tune()
    timed = len(card.timed)
    card.tune()
    assert timed == len(card.timed)
    assert card.trials == 1


@pytest.mark.parametrize("gain", [True, False])
def test_a_later_process_finds_what_was_tuned(tmp_path: Path, gain: bool) -> None:
    """Also that nothing was found."""
    key = a_key()
    card = Card(key, {tiles(key)[1]: 0.5} if gain else {})
    row = card.tune(tmp_path / "made")
    assert (row is not None) == gain
    store.forget()
    later = Card(key)
    assert later.tune(tmp_path / "made") == row
    assert not later.trials
    assert not later.said
    assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"card": "NVIDIA A100-SXM4-80GB"},
        {"kernel": "dq"},
        {"head_dim": 64},
        {"hidden": 512},
        {"tokens": 4096},
        {"dtype": torch.float16},
        {"activation": "gelu"},
        {"gated": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_class_is_tuned_for_itself(changes: dict[str, Any], tmp_path: Path) -> None:
    Card(a_key()).tune(tmp_path)
    other = Card(a_key(**changes))
    other.tune(tmp_path)
    assert other.trials == 1


@pytest.mark.parametrize("what", ["triton", "kernels"])
def test_what_other_code_found_is_stale(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(a_key()).tune(tmp_path)
    store.forget()
    if what == "triton":
        monkeypatch.setattr(triton, "__version__", "3.99")
    else:
        monkeypatch.setattr(store, "kernels_hash", lambda: "edited")
    card = Card(a_key())
    card.tune(tmp_path)
    assert card.trials == 1


def test_every_source_that_times_depend_on_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or b"")
    store.kernels_hash.__wrapped__()
    lowering = Path(mhf_compiler.lowering.__file__).parent
    assert {*(lowering / "kernels").rglob("*.py"), lowering / "tiles.py"} <= set(read)


ROWS_OF_NO_KERNEL = [
    [64, 64, 4, -1],
    [64, 64, 4, 9],
    [64, 64, 3, 3],
    [64, 1 << 40, 4, 3],
    [8, 64, 4, 3],
    [True, 64, 4, 3],
]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"row": 3}', '{"row": [1, 2]}', '{"about": {}}'),
        *(f'{{"row": {row}}}' for row in ROWS_OF_NO_KERNEL),
        "[" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_a_broken_file_is_timed_again(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = a_key()
    seconds = {tiles(key)[1]: 0.5}
    row = Card(key, seconds).tune(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    store.forget()
    assert Card(key, seconds).tune(tmp_path) == row
    assert "not readable" in caplog.text
    assert json.loads(path.read_text())["row"] == list(row or ())


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    key = a_key()
    found = tiles(key)
    assert Card(key, {found[1]: 0.5}).tune(tmp_path / "file") == candidates(key)[found[1]]
    assert "not kept on disk" in caplog.text


def test_a_folder_that_cannot_be_read_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> Any:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "read_text", refused)
    monkeypatch.setattr(Path, "exists", refused)
    assert not store.recall(a_key(), tmp_path / "folder")
    assert "not yours" in caplog.text


def test_the_first_of_two_processes_decides_for_both(tmp_path: Path) -> None:
    key = a_key()
    one, two = tiles(key)[1:3]
    second = Card(key, {two: 0.5})
    clock = second.clock

    def meanwhile(run: Callable[[], None]) -> float:
        if not list(tmp_path.iterdir()):
            store.keep(key, candidates(key)[one], tmp_path)
        return clock(run)

    second.clock = meanwhile  # type: ignore[method-assign]
    assert second.tune(tmp_path) == candidates(key)[one]


# What runs then.


def a_workload(**changes: Any) -> Workload:
    sizes = Sizes(
        tokens=40,
        heads=4,
        groups=2,
        head_dim=16,
        sub_networks=3,
        hidden=32,
        gated=True,
        routed=True,
        biased=(False, False, False),
        dtype=torch.float32,
    )
    w = Workload(sizes, "silu", torch.float32, torch.device("cpu"), training=True)
    return changed(w, **changes)


def a_problem(workload: Workload) -> Problem:
    def ones(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(shape, dtype=dtype)

    return _problem(workload, workload.sizes.tokens, ones)


def key_of(kernel: Kernel, problem: Problem) -> TuningKey:
    return TuningKey.of(kernel, problem.sizes, problem.activation, problem.q.device)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": False, "routed": False},
        {"biased": (True, False, True)},
        {"tokens": MANY_TOKENS, "dynamic": True},
        {"dtype": torch.bfloat16, "activation": "gelu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["forward", "dk_du"])
def test_a_launch_finds_what_was_tuned_for_its_workload(
    kernel: Kernel, changes: dict[str, Any]
) -> None:
    workload = a_workload(**changes)
    assert key_of(kernel, a_problem(workload)) == tuning_key(kernel, workload)
    assert row_for(kernel, a_problem(workload)) is None
    store.keep(tuning_key(kernel, workload), (16, 32, 4, 2), None)
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

    monkeypatch.setattr(dispatch, "run_forward", run_forward)

    def stages_of_the_forward_kernel() -> int:
        dispatch.forward(problem, torch.empty_like(problem.q))
        return ran[-1].stages

    shipped = stages_of_the_forward_kernel()
    store.keep(key_of("forward", problem), (32, 32, 8, 3), None)
    assert stages_of_the_forward_kernel() == (3 if fits else shipped)
    store.forget()
    assert stages_of_the_forward_kernel() == shipped != 3


@pytest.mark.parametrize("training", [False, True])
def test_the_trial_has_each_kernel_and_draws_no_numbers_of_the_users(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[Kernel] = ["forward", "dq", "dv", "dk_du"] if training else ["forward"]
    for name in ("specialised_forward", "specialised_backward"):
        monkeypatch.setattr(search, name, lambda *arguments: False)
    state = torch.get_rng_state()
    runs = _plain_runs(a_workload(biased=(True, False, True)), names)
    assert torch.get_rng_state().equal(state)
    assert list(runs) == names


def test_new_results_are_used_by_calls_that_were_written_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgotten: list[bool] = []
    monkeypatch.setattr(store, "forget_repeats", lambda: forgotten.append(True))
    store.keep(a_key(), (32, 32, 4, 2), None)
    assert forgotten


def test_tuning_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    key = a_key()
    with caplog.at_level(logging.INFO, "mhf_compiler"):
        Card(key, {tiles(key)[1]: 0.5}).tune()
    assert "0.5 of its time" in caplog.text
