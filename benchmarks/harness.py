"""Contenders side by side: each is checked before any is timed, and all are timed in turn.

A benchmark is a list of cases. A case is one job of one size, with its contenders; what they
compute is compared with a result in higher precision, and allowed is twice the error that plain
PyTorch makes in the same dtype. A contender that errs more, or does not run, has no figures.
"""

import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mhf_compiler.compat import counters

from .models import SHAPE_NAMES

Row = dict[str, Any]

_FLOOR = 1e-6  # of relative errors: float32 against itself
_WARM_UPS = 2
# A few repeats of less than a millisecond say more of the host's mood than of the contenders.
_ENOUGH_SECONDS = 0.25  # of measuring a case, after which the asked repeats suffice
_BUSY = 4_000_000  # cycles of a card, 2 ms: meanwhile the host launches what is timed after them
_MOST = 50  # times the asked repeats, where a case is still shorter
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # in a trace, what occupies a GPU


@dataclass(frozen=True)
class Settings:
    """What the command line chooses."""

    device: str
    repeats: int  # at least; a short case repeats more often
    quick: bool = False  # sizes at which the benchmark itself can be tried out on any machine
    shapes: tuple[tuple[int, ...], ...] = ()  # in place of the benchmark's own
    only: tuple[str, ...] = ()  # cases that have each of these as a column's value
    without: tuple[str, ...] = ()  # contenders with one of these in their names stay away

    def takes_case(self, about: Row) -> bool:
        """``only`` holds values, such as ``training``, or columns with them, such as ``L=16``."""
        found = {text for name, value in about.items() for text in (f"{value}", f"{name}={value}")}
        return found.issuperset(self.only)

    def takes_contender(self, name: str) -> bool:
        return not any(part in name for part in self.without)


@dataclass(frozen=True)
class Expected:
    """A result in higher precision, and the relative error that plain PyTorch makes."""

    exact: Tensor
    plain_error: float

    @classmethod
    def of(cls, exact: Tensor, plain: Tensor) -> "Expected":
        return cls(exact, relative_error(plain, exact))


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a case.

    ``step`` does the job once and is what is timed. ``values`` runs it too and returns what is to
    be compared, by name; a yardstick, which does another job, has none. ``flops`` and ``bytes`` are
    what one step counts as; ``jobs`` is how often a step does the job. ``clear`` frees what a step
    leaves in tensors, such as gradients. ``rewrites`` if our back end compiles it: then a row says
    how many networks it has replaced.
    """

    name: str
    step: Callable[[], object]
    values: Callable[[], Mapping[str, Tensor]] | None = None
    flops: float | None = None
    bytes: float | None = None
    jobs: int = 1
    clear: Callable[[], object] = lambda: None
    about: Row = field(default_factory=dict)
    rewrites: bool = False


@dataclass(frozen=True)
class Job:
    """Contenders, what they should compute, and the one that the others' rates are a share of."""

    contenders: Sequence[Contender]
    expected: Mapping[str, Expected] = field(default_factory=dict)
    yardstick: str | None = None


@dataclass(frozen=True)
class Case:
    """One job of one size. ``build`` makes its tensors, so that cases do not pile up in memory."""

    about: Row  # its sizes, the first columns of a row
    build: Callable[[], Job]
    busy: bool = False  # timed as inside a model: the device is at work when the job is launched
    profiled: bool = False  # also how long kernels run on a GPU, whatever the host takes


@dataclass(frozen=True)
class Plot:
    """Lines over one column, for each value of ``per``; one picture for each value of ``each``."""

    name: str
    x: str
    y: str
    per: str = "contender"
    each: str | None = None
    log: str = "xy"  # which axes are logarithmic
    without: Sequence[str] = ("matrix product",)  # values of ``per`` that are no lines


@dataclass(frozen=True)
class Benchmark:
    """What is measured, how its rows are drawn, and what the rows say together."""

    about: str
    run: Callable[[Settings, Progress], Iterator[Row]]
    plots: Sequence[Plot] = ()
    summary: Callable[[list[Row]], list[str]] = lambda rows: []
    devices: Sequence[str] = ("cuda",)
    repeats: int = 15
    shape_names: Sequence[str] = SHAPE_NAMES  # what ``Settings.shapes`` are


def of_cases(
    cases: Callable[[Settings], Iterable[Case]],
) -> Callable[[Settings, Progress], Iterator[Row]]:
    """A benchmark's ``run`` that measures case after case."""

    def run(settings: Settings, progress: Progress) -> Iterator[Row]:
        listed = [case for case in cases(settings) if settings.takes_case(case.about)]
        for case in progress.track(listed, description="cases"):
            yield from measure(case, settings, progress)

    return run


def measure(case: Case, settings: Settings, progress: Progress) -> Iterator[Row]:
    """A row for each contender of a case."""
    torch.manual_seed(0)
    torch.compiler.reset()
    job = case.build()
    taken = [each for each in job.contenders if settings.takes_contender(each.name)]
    rows = {contender.name: examine(contender, job, case, settings) for contender in taken}
    able = [contender for contender in taken if "fault" not in rows[contender.name]]
    for name, figures in time_in_turn(able, case, settings, progress).items():
        rows[name] |= figures
    yardstick = rows.get(job.yardstick or "", {}).get("tflops") or math.nan
    for contender in taken:
        row = rows[contender.name]
        if "tflops" in row and not math.isnan(yardstick):
            row["share"] = row["tflops"] / yardstick
        yield case.about | {"contender": contender.name} | contender.about | row
    del job, taken, able
    release(settings.device)


def examine(contender: Contender, job: Job, case: Case, settings: Settings) -> Row:
    """Compile, measure the memory of one step, and compare what is computed."""
    row: Row = {}
    try:
        start, before = time.perf_counter(), counters["flashmhf"]["sites_rewritten"]
        contender.step()
        synchronize(settings.device)
        row["first_call_s"] = time.perf_counter() - start
        if contender.rewrites:
            row["rewritten"] = counters["flashmhf"]["sites_rewritten"] - before
        contender.clear()
        row["peak_mib"] = peak_mebibytes(contender.step, settings.device)
        contender.clear()
        if contender.values is not None:
            row |= compared(contender.values(), job.expected)
            contender.clear()
        if case.profiled and settings.device == "cuda":
            row["busy_us"] = busy_microseconds(contender)
    except torch.OutOfMemoryError:
        row["fault"] = "out of memory"
        contender.clear()
        release(settings.device)
    except Exception as error:
        row["fault"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return row


def compared(values: Mapping[str, Tensor], expected: Mapping[str, Expected]) -> Row:
    """The largest error, in times of plain PyTorch's; RED where that is more than two."""
    if not values or not values.keys() <= expected.keys():
        raise ValueError(f"computes {', '.join(values)}, but {', '.join(expected)} are expected")
    times = {}
    for name, value in values.items():
        error = relative_error(value, expected[name].exact)
        times[name] = error / max(expected[name].plain_error, _FLOOR)
    worst = max(times, key=lambda name: math.inf if math.isnan(times[name]) else times[name])
    row: Row = {"error": times[worst]}
    if not times[worst] <= 2:
        row["fault"] = f"RED: {worst} errs {times[worst]:.3g} times as much as plain PyTorch"
    return row


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.to(exact.dtype) - exact).norm() / exact.norm())


def time_in_turn(
    contenders: Sequence[Contender], case: Case, settings: Settings, progress: Progress
) -> dict[str, Row]:
    """Medians. Every contender runs once per repeat, so that a drift of clocks slows all alike.

    A case that is over quickly is repeated until a quarter of a second has been measured.
    """
    times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    bar = progress.add_task("repeats", total=settings.repeats)
    for repeat in _repeats(settings):
        for contender in contenders:
            taken = milliseconds(contender.step, settings.device, case.busy)
            contender.clear()
            if repeat >= 0:
                times[contender.name].append(taken)
        progress.update(bar, completed=min(max(repeat + 1, 0), settings.repeats))
    progress.remove_task(bar)
    return {c.name: _figures(c, times[c.name]) for c in contenders}


def _repeats(settings: Settings) -> Iterator[int]:
    """Counts repeats until there are enough; those below zero warm up."""
    yield from range(-_WARM_UPS, 0)
    most = settings.repeats * (1 if settings.quick else _MOST)
    start = time.perf_counter()
    for repeat in range(most):
        if repeat >= settings.repeats and time.perf_counter() - start > _ENOUGH_SECONDS:
            break
        yield repeat


def _figures(contender: Contender, times: Sequence[tuple[float, float]]) -> Row:
    elapsed = [on_device / contender.jobs for on_device, _ in times]
    median = statistics.median(elapsed)
    row: Row = {"ms": median, "ms_min": min(elapsed)}
    row["host_ms"] = statistics.median(on_host / contender.jobs for _, on_host in times)
    if contender.flops is not None:
        row["tflops"] = contender.flops / median / 1e9
    if contender.bytes is not None:
        row["gb_per_s"] = contender.bytes / median / 1e6
    return row


# Devices.


def milliseconds(step: Callable[[], object], device: str, busy: bool) -> tuple[float, float]:
    """How long a step takes the device, and how long until its call returns."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        elapsed = 1e3 * (time.perf_counter() - start)
        return elapsed, elapsed
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if busy:
        torch.cuda._sleep(_BUSY)
    first.record()
    start = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - start)
    last.record()
    last.synchronize()
    return first.elapsed_time(last), host


def peak_mebibytes(step: Callable[[], object], device: str) -> float:
    """The most memory that one step holds at once, above what lies there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = step()
    del kept
    events = _events(profiled)
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def busy_microseconds(contender: Contender, steps: int = 5) -> float:
    """How long a step keeps a GPU at work: the time in which a kernel runs, or a copy."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            contender.step()
            contender.clear()
        torch.cuda.synchronize()
    work = [event for event in _events(profiled) if event.get("cat") in _WORK]
    return covered((e["ts"], e["ts"] + e["dur"]) for e in work) / steps / contender.jobs


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what the spans cover; what several cover counts once."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return length


def _events(profiled: profile) -> list[dict[str, Any]]:
    """All that a profiler has recorded, as its traces have it."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back the memory of a case."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# Contenders of the usual kinds.


def training(contender: Contender, inputs: Sequence[Tensor], gradient: Tensor) -> Contender:
    """A contender whose step returns one tensor, with the backward pass to the inputs."""
    forward = contender.step

    def step() -> Sequence[Tensor]:
        out = forward()
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    return replace(contender, step=step)


def matrix_product(device: str, size: tuple[int, int, int], dtype: torch.dtype) -> Contender:
    """The yardstick of rates: a product by the vendor's library, cuBLAS on a GPU."""
    m, k, n = size
    left = torch.randn(m, k, device=device, dtype=dtype)
    right = torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    flops = 2.0 * m * k * n
    return Contender("matrix product", lambda: torch.mm(left, right, out=out), flops=flops)
