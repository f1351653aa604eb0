"""The harness of the benchmarks: wrong numbers have no speed, files and pictures hold the rows."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.progress import Progress
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import compile_time, cpu_path, ffn, grid, harness, per_token, results, warm_start
from benchmarks.harness import (
    Benchmark,
    Case,
    Contender,
    Expected,
    Job,
    Plot,
    Row,
    Settings,
    compared,
    measure,
    of_cases,
    training,
)

EXACT = torch.linspace(1, 2, 64, dtype=torch.float64)
ROUNDED = EXACT.to(torch.bfloat16)
SETTINGS = Settings("cpu", repeats=3)


def contender(name: str, result: Tensor, **others: Any) -> Contender:
    return Contender(name, lambda: result.clone(), lambda: {"out": result}, **others)


def case(*contenders: Contender, size: int = 1) -> Case:
    expected = {"out": Expected.of(EXACT, ROUNDED)}
    return Case({"size": size}, lambda: Job(contenders, expected, "yardstick"))


def rows_of(*contenders: Contender) -> dict[str, Row]:
    rows = measure(case(*contenders), SETTINGS, Progress(disable=True))
    return {row["contender"]: row for row in rows}


# What is right is timed.


def test_figures() -> None:
    yardstick = Contender("yardstick", lambda: EXACT @ EXACT, flops=128.0)
    found = rows_of(contender("right", ROUNDED, flops=64.0, bytes=128.0, jobs=2), yardstick)
    right, other = found["right"], found["yardstick"]
    assert right["error"] == pytest.approx(1)
    assert 0 < right["ms_min"] <= right["ms"]
    assert right["tflops"] == pytest.approx(64 / right["ms"] / 1e9)
    assert right["gb_per_s"] == pytest.approx(128 / right["ms"] / 1e6)
    assert right["share"] == pytest.approx(right["tflops"] / other["tflops"])
    assert "error" not in other
    assert other["share"] == 1


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    contenders = [Contender(name, lambda name=name: turns.append(name)) for name in "ab"]
    rows_of(*contenders)
    assert "".join(turns).endswith("ab" * 5)  # two to warm up, three that count


@pytest.mark.parametrize(
    ("settings", "seconds", "times"),
    [
        (SETTINGS, 0.0, 150),  # as often as is allowed
        (SETTINGS, 0.04, 7),  # until there is enough
        (SETTINGS, 1.0, 3),
        (dataclasses.replace(SETTINGS, quick=True), 0.0, 3),
    ],
)
def test_short_cases_repeat_more_often(
    settings: Settings, seconds: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    turns: list[bool] = []

    def milliseconds(*_: object) -> tuple[float, float]:
        now[0] += seconds
        turns.append(True)
        return 1e3 * seconds, 1e3 * seconds

    monkeypatch.setattr(harness, "milliseconds", milliseconds)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    step = Contender("step", lambda: None)
    harness.time_in_turn([step], case(step), settings, Progress(disable=True))
    assert len(turns) == times + 2  # to warm up


def test_the_memory_of_a_step() -> None:
    found = rows_of(Contender("large", lambda: torch.zeros(2**20)))
    assert found["large"]["peak_mib"] == pytest.approx(4, rel=0.01)


def test_a_card_is_busy_while_anything_runs() -> None:
    spans = [(4.0, 6.0), (0.0, 3.0), (1.0, 2.0), (5.0, 9.0)]
    assert harness.covered(spans) == 3 + 5


def test_what_a_step_leaves_behind_is_cleared_each_time() -> None:
    kept: list[int] = []
    most: list[int] = []

    def step() -> None:
        kept.append(1)
        most.append(len(kept))

    rows_of(Contender("keeps", step, clear=kept.clear))
    assert max(most) == 1


def test_training_steps_return_gradients() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    trained = training(Contender("square", lambda: x.square()), [x], torch.ones(2))
    out, gradient = trained.step()  # type: ignore[misc]
    assert (out.tolist(), gradient.tolist()) == ([1, 4], [2, 4])


# What is wrong is not.


@pytest.mark.parametrize(
    "result", [ROUNDED * 1.01, torch.full((64,), float("nan"))], ids=["inexact", "nan"]
)
def test_wrong_numbers_have_no_speed(result: Tensor) -> None:
    found = rows_of(contender("right", ROUNDED), contender("wrong", result))
    assert found["wrong"]["fault"].startswith("RED: out errs")
    assert "ms" not in found["wrong"]
    assert "ms" in found["right"]


def test_values_that_nobody_expects_are_no_values() -> None:
    values: list[Mapping[str, Tensor]] = [{}, {"other": ROUNDED}]
    for found in values:
        wrong = Contender("wrong", lambda: None, lambda found=found: found)
        assert "ValueError" in rows_of(wrong)["wrong"]["fault"]


def test_what_does_not_run_is_reported() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    def exhaust() -> None:
        raise torch.OutOfMemoryError

    found = rows_of(Contender("fails", fail), Contender("large", exhaust))
    assert found["fails"]["fault"] == "RuntimeError: no such kernel"
    assert found["large"]["fault"] == "out of memory"


# The command.


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Benchmark]:
    """One benchmark that is right and one that is wrong, in place of the real ones."""

    def benchmark(result: Tensor) -> Benchmark:
        def cases(settings: Settings) -> Iterator[Case]:
            for size in (1, 2):
                yield case(contender("a", ROUNDED), contender("b", result), size=size)

        plots = (Plot("time", "size", "ms"), Plot("memory", "size", "peak_mib", each="contender"))
        summary = lambda rows: [f"{len(rows)} rows"]  # noqa: E731
        return Benchmark("for tests", of_cases(cases), plots, summary, devices=("cpu",), repeats=2)

    found = {"right": benchmark(ROUNDED), "wrong": benchmark(2 * ROUNDED)}
    monkeypatch.setattr(command, "BENCHMARKS", found)
    choice = command.run.params[0]
    monkeypatch.setattr(choice.type, "choices", list(found))
    return found


@pytest.mark.usefixtures("listed")
def test_a_run_prints_and_writes(tmp_path: Path) -> None:
    done = CliRunner().invoke(command.main, ["run", "right", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "4 rows" in done.output
    about, rows = results.read(tmp_path / "right.json")
    assert about["repeats"] == 2
    order = [(row["size"], row["contender"]) for row in rows]
    assert order == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    with (tmp_path / "right.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == ["a", "b", "a", "b"]
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"right-time.png", "right-memory-a.png", "right-memory-b.png"}


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--only", "size=2"], [(2, "a"), (2, "b")]),
        (["--only", "1", "--without", "b"], [(1, "a")]),
        (["--only", "1", "--only", "2"], []),
    ],
)
def test_a_run_of_a_part(
    options: list[str], expected: list[tuple[int, str]], tmp_path: Path
) -> None:
    done = CliRunner().invoke(command.main, ["run", "right", "--out", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    about, rows = results.read(tmp_path / "right.json")
    assert [(row["size"], row["contender"]) for row in rows] == expected
    again = "python -m benchmarks run right --repeats 2"
    same = f"{again} --device cpu {' '.join(options)}"
    assert (about["command"], about["seconds"]) == (same, pytest.approx(0, abs=60))


@pytest.mark.usefixtures("listed")
def test_wrong_numbers_fail_a_run() -> None:
    done = CliRunner().invoke(command.main, ["run", "wrong", "right"])
    assert done.exit_code == 1
    assert "red: wrong" in done.output


def test_an_interrupted_run_keeps_what_it_has(
    listed: dict[str, Benchmark], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(settings: Settings, progress: Progress) -> Iterator[Row]:
        yield {"size": 1, "contender": "a", "ms": 1.0, "peak_mib": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(listed, "right", dataclasses.replace(listed["right"], run=run))
    done = CliRunner().invoke(command.main, ["run", "right", "wrong", "--out", str(tmp_path)])
    assert (done.exit_code, "interrupted: right is incomplete" in done.output) == (1, True)
    about, rows = results.read(tmp_path / "right.json")
    assert about["interrupted"]
    assert [row["contender"] for row in rows] == ["a"]
    assert not (tmp_path / "wrong.json").exists()


def test_a_table_may_be_empty() -> None:
    assert results.table("interrupted at once", []).row_count == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "other"], "'other' is not one of"),
        (["run", "kernels", "--device", "cpu"], "kernels runs on cuda only"),
        (["run", "grid", "--shape", "1,2"], "grid wants 6 numbers as a shape, B,L,H,d,E,f"),
        (["run", "per-token", "--shape", "1,2,3"], "per-token wants 4 numbers as a shape, T,d,f,B"),
        (["run", "grid", "--shape", "1,2,3,4,5,0"], "want positive numbers"),
        (["run", "grid", "--shape", "1,2,x"], "want positive numbers"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(command.main, arguments)
    assert (done.exit_code, message in done.output) == (2, True), done.output


def test_the_list_names_all() -> None:
    done = CliRunner().invoke(command.main, ["list"])
    assert [line.split()[0] for line in done.output.splitlines()] == list(command.BENCHMARKS)


# The benchmarks.


def test_every_ffn_computes_the_same() -> None:
    """Eager contenders only: the compiled ones take their time."""
    (first, second) = ffn.cases(Settings("cpu", 1, quick=True))
    for some in (first, second):
        job = some.build()
        eager = job.contenders[0]
        assert eager.values is not None
        values = eager.values()
        assert values.keys() == job.expected.keys()
        assert (eager.name, "x.grad" in values) == ("eager, loop", some is second)


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilations without Inductor, which takes its time."""

    def compile_eagerly(network: Any, *, backend: str, **options: Any) -> Any:
        if backend == "inductor":
            return real(network, backend="aot_eager")
        own = {"rewrite": options["options"]["rewrite"], "fallback": "aot_eager"}
        return real(network, backend=backend, options=own)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("precision", ["bfloat16", "autocast", "tf32"])
def test_per_token_networks(precision: str) -> None:
    """In training, which includes inference: each contender does the same job, to the gradients."""
    settings = Settings("cpu", repeats=1, quick=True, only=("training", precision))
    everything = per_token.measured(per_token.SHAPES, [precision])
    rows = {row["contender"]: row for row in everything(settings, Progress(disable=True))}
    assert [name for name, row in rows.items() if row.get("fault") or "ms" not in row] == []
    compared = {name for name, row in rows.items() if "error" in row}
    assert compared == rows.keys() - {per_token.YARDSTICK}
    assert rows["flashmhf always"]["rewritten"] == 1
    assert "rewritten" not in rows["Inductor"]
    assert rows[per_token.YARDSTICK]["share"] == 1
    assert torch.get_float32_matmul_precision() == "highest"
    (line,) = per_token.summary(list(rows.values()))
    assert line.startswith(f"3,16,32,8 {precision} training: flashmhf always")


def test_a_per_token_step_compares_all_gradients() -> None:
    job = per_token.build((3, 16, 32, 8), "bfloat16", True, False, "cpu")
    names = {"out", "x.grad", "k.grad", "v.grad", "k_bias.grad", "v_bias.grad"}
    assert job.expected.keys() == names
    assert len(set(per_token.GRID) & set(per_token.FULL_GRID)) == len(per_token.GRID) == 20


@pytest.mark.parametrize("storage", ["together", "separate"])
def test_the_grid_compiles_the_op(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is in a model that was rewritten; without Inductor, which takes its time."""
    compiled: list[str] = []

    def compile_eagerly(network: Any, **options: Any) -> Any:
        compiled.append(network.__name__)
        return real(network, backend="aot_eager", **options)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    torch.manual_seed(0)
    job = grid.build((1, 5, 4, 16, 1, 8), storage, torch.bfloat16, True, "cpu")
    for contender in job.contenders:
        assert contender.values is not None
        assert compared(contender.values(), job.expected).keys() == {"error"}, contender.name
    assert compiled[0] == ("multi_head_ffn" if storage == "together" else "stacked_op")


def test_grid_judges_the_choice() -> None:
    point = dict(zip("BLHdEf", grid.CPU_POINTS[0], strict=True))
    work = grid.workload(point | {"dtype": "float32", "phase": "forward"}, "cpu")
    op: Row = {"ms": 1.0}
    inductor: Row = {"ms": 2.0}
    grid.judge([op, inductor], work)
    pays = op["estimated_ms"] <= 1.05 * inductor["estimated_ms"]
    assert (op.get("loss"), inductor.get("loss")) == ((1, None) if pays else (None, 2))


def test_growth_is_a_power() -> None:
    rows = [{"operations": n, "seconds": 3 * n**1.5} for n in (10, 100, 1000)]
    assert compile_time.exponent(rows) == pytest.approx(1.5)


def test_warm_starts_are_compared_without_the_cold_one() -> None:
    def starts(*seconds: float, layers: int = 0, hits: int = 1) -> list[dict[str, float]]:
        found = {"elapsed": 1.0, "hits": hits, "misses": 1 - hits, "sites_rewritten": layers}
        return [{"seconds": one, **found} for one in seconds]

    inductor = starts(9, 5, 4)
    row = warm_start.compared({"inductor": inductor, "flashmhf": starts(3, 4.2, 6, layers=2)}, 2)
    assert (row["inductor_cold"], row["inductor_warm"], row["flashmhf_warm"]) == (9, 4, 4.2)
    assert (row["ratio"], row["met"]) == (pytest.approx(1.05), True)
    for others in (
        starts(3, 4.6, layers=2),  # too slow
        starts(3, 4.2, layers=1),  # not all is rewritten
        starts(3, 4.2, layers=2, hits=0),  # compiled again
    ):
        row = warm_start.compared({"inductor": inductor, "flashmhf": others}, 2)
        assert not row["met"]


def test_the_summary_of_the_cpu_path() -> None:
    shared = dict.fromkeys("BLHdEf", 1) | {"phase": "forward"}
    figures = {"op": (2, 1), "Inductor, loop": (3, 4), "Inductor, batched": (4, 8)}
    rows = [
        shared | {"contender": name, "ms": ms, "peak_mib": memory}
        for name, (ms, memory) in figures.items()
    ]
    (line,) = cpu_path.summary(rows)
    assert "1.50 times as fast" in line
    assert "4.0 times less memory" in line


def test_the_summary_of_a_part_says_what_it_can() -> None:
    case = {"B": 1, "L": 8, "phase": "training"}
    rows = [
        case | {"contender": "Inductor, loop", "ms": 3.0, "peak_mib": 4.0},
        case | {"contender": "flashmhf, loop", "ms": 1.5, "peak_mib": 0.0},
    ]
    [line] = ffn.summary(rows)
    assert line.endswith("2.00 times as fast as Inductor's better")
    [line] = ffn.summary([*rows, case | {"contender": "eager, loop", "ms": 9.0, "peak_mib": 8.0}])
    assert "less memory" not in line
