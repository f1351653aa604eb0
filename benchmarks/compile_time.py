"""What recognition costs, and what it saves: compile times, each in a process of its own.

``overhead``: models without an MH-FFN. The time that the back end spends on its own part, against
the time that Inductor takes for the same graphs: with the C++ compiler that it starts, and without.
Dynamo's time counts for neither.
``saving``: the paper's model of 20 layers with 22 sub-networks in a loop. The whole first call
under ``flashmhf`` against that under ``inductor``, in turn.
``growth``: the time to recognise and rewrite the same model at several depths, and the exponent of
a power law through these times; 1 is linear.

Times are CPU seconds, of the process and of the compilers that it starts one after the other, so
that other work on the machine counts as little as can be; figures are the least of the repeats.
Every process starts with empty compiler caches and has compiled a small model before, so that
imports do not count, nor what Inductor finds out about the machine's C++ compiler when it first
needs it (8 seconds on two cores).
"""

import argparse
import gc
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import mhf_compiler.backend
import mhf_compiler.compat
import mhf_compiler.substitution.graph
from mhf_compiler.compat import counters

from .harness import Benchmark, Row, Settings
from .models import flashmhf_like, llama_like, resnet_like
from .processes import Seconds, in_process

MODELS = {"llama": llama_like, "resnet": resnet_like, "flashmhf": flashmhf_like}
TIMES = ("rewriting", "fallback", "fallback_python", "whole", "elapsed")
DEPTHS = (1, 2, 4, 8, 16, 20)
PHASES = ("inference", "training")
OVERHEAD_BAR, SAVING_BAR, GROWTH_BAR = 0.05, 1 / 3, 1.15


# One measurement: what a process of its own does.


def compile_once(model: str, backend: str, phase: str, device: str) -> dict[str, float]:
    """Seconds of a first call, and of the parts of it that are the back end's."""
    small = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    first_call(small, torch.randn(2, 4), backend, phase, device)
    torch.compiler.reset()  # or else the sizes of the next input count as dynamic
    network, x = MODELS[model]()
    rewriting: list[Seconds] = []
    fallback: list[Seconds] = []
    begin, start = time.perf_counter(), Seconds.now()
    with (
        timed(mhf_compiler.substitution.graph, "rewrite_graph", rewriting),
        timed(mhf_compiler.compat, "compile_graph", fallback),
    ):
        loss = first_call(network, x, backend, phase, device)
        if phase == "training":  # the backward graph is compiled when it is first needed
            before = Seconds.now()
            loss.backward()
            fallback.append(Seconds.now().since(before))
    counted = counters["flashmhf"]
    return {
        "rewriting": sum(seconds.all for seconds in rewriting),
        "fallback": sum(seconds.all for seconds in fallback),
        "fallback_python": sum(seconds.own for seconds in fallback),
        "whole": Seconds.now().since(start).all,
        "elapsed": time.perf_counter() - begin,
        "sites_rewritten": counted["sites_rewritten"],
        "failures": counted["failures"],
    }


def first_call(model: nn.Module, x: Tensor, backend: str, phase: str, device: str) -> Tensor:
    """A scalar of the model's first results."""
    model, x = model.to(device).train(phase == "training"), x.to(device)
    # The subject is the time to rewrite, whatever the widths are said to pay for.
    options = {"rewrite": "always"} if backend == "flashmhf" else None
    compiled = torch.compile(model, backend=backend, options=options)
    with torch.set_grad_enabled(model.training):
        return compiled(x).square().mean()


@contextmanager
def timed(module: ModuleType, name: str, spent: list[Seconds]) -> Iterator[None]:
    """Writes down how long each call of a module's function takes."""
    original = getattr(module, name)

    def call(*args: Any) -> Any:
        start = Seconds.now()
        try:
            return original(*args)
        finally:
            spent.append(Seconds.now().since(start))

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, original)


def recognise_once(layers: int, device: str) -> dict[str, float]:
    """Seconds to recognise and rewrite the paper's model, least of three."""
    options = mhf_compiler.Options(rewrite="always")
    model, x = flashmhf_like(layers)
    model, x = model.to(device), x.to(device)
    seconds, reports = [], []

    def rewrite_only(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        gc.collect()
        start = Seconds.now()
        reports.append(mhf_compiler.substitution.graph.rewrite_graph(gm, options))
        seconds.append(Seconds.now().since(start).own)
        return gm.forward

    for _ in range(4):  # the first one imports
        torch.compiler.reset()
        torch.compile(model, backend=rewrite_only)(x)
    return {
        "seconds": min(seconds[1:]),
        "operations": reports[-1].operations,
        "sites_rewritten": len(reports[-1].rewritten),
    }


def measured(*arguments: object) -> dict[str, float]:
    """This script again, with compiler caches of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return in_process(__spec__.name, Path(folder), *arguments)


# The parts.

Measure = Callable[..., dict[str, float]]  # measured, and the progress told


def overhead(settings: Settings, measure: Measure) -> Iterator[Row]:
    for model, phase in itertools.product(("llama", "resnet"), PHASES):
        runs = [
            measure("compile", model, "flashmhf", phase, settings.device)
            for _ in range(settings.repeats)
        ]
        least = {part: min(run[part] for run in runs) for part in TIMES}
        shares = {
            "share": least["rewriting"] / least["fallback"],
            "share_of_python": least["rewriting"] / least["fallback_python"],
        }
        right = all(run["failures"] == run["sites_rewritten"] == 0 for run in runs)
        met = right and shares["share"] <= OVERHEAD_BAR
        yield {"model": model, "phase": phase} | least | shares | {"met": met}


def saving(settings: Settings, measure: Measure) -> Iterator[Row]:
    for phase in PHASES:
        runs: dict[str, list[dict[str, float]]] = {"inductor": [], "flashmhf": []}
        for _, backend in itertools.product(range(settings.repeats), runs):
            runs[backend].append(measure("compile", "flashmhf", backend, phase, settings.device))
        least = {
            f"{name}_{time}": min(run[time] for run in found)
            for name, found in runs.items()
            for time in ("whole", "elapsed")
        }
        least["rewriting"] = min(run["rewriting"] for run in runs["flashmhf"])
        ratio = least["flashmhf_whole"] / least["inductor_whole"]
        right = all(run["sites_rewritten"] == 20 for run in runs["flashmhf"])
        met = right and ratio <= SAVING_BAR
        yield {"model": "flashmhf", "phase": phase} | least | {"ratio": ratio, "met": met}


def growth(settings: Settings, measure: Measure) -> Iterator[Row]:
    rows = []
    for layers in DEPTHS:
        runs = [measure("recognise", layers, settings.device) for _ in range(settings.repeats)]
        row = {"layers": layers} | min(runs, key=lambda run: run["seconds"])
        rows.append(row | {"met": row["sites_rewritten"] == layers})
        yield rows[-1]
    fit = exponent(rows)
    yield {"exponent": fit, "met": fit <= GROWTH_BAR}


def exponent(rows: list[Row]) -> float:
    """The slope of log(seconds) over log(operations), by least squares."""
    points = [(math.log(row["operations"]), math.log(row["seconds"])) for row in rows]
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return covariance / sum((x - mean_x) ** 2 for x, _ in points)


PARTS = {
    overhead: 2 * len(PHASES),
    saving: 2 * len(PHASES),
    growth: len(DEPTHS),
}  # processes per repeat


def run(settings: Settings, progress: Progress) -> Iterator[Row]:
    bar = progress.add_task("processes", total=sum(PARTS.values()) * settings.repeats)

    def measure(*arguments: object) -> dict[str, float]:
        found = measured(*arguments)
        progress.advance(bar)
        return found

    for part in PARTS:
        for row in part(settings, measure):
            yield {"part": part.__name__} | row


def summary(rows: list[Row]) -> list[str]:
    missed = [row for row in rows if not row["met"]]
    bars = f"bars: share {OVERHEAD_BAR}, ratio {SAVING_BAR:.2f}, exponent {GROWTH_BAR}"
    return [f"{bars}; {len(missed)} missed"]


BENCHMARK = Benchmark(
    "what recognition costs a compilation, and what it saves (CPU seconds)",
    run,
    summary=summary,
    devices=("cpu", "cuda"),
    repeats=3,
)


def main() -> None:
    """One measurement, in this process; its figures go to a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("what", choices=["compile", "recognise"])
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    if options.what == "compile":
        result = compile_once(*options.arguments)
    else:
        result = recognise_once(int(options.arguments[0]), options.arguments[1])
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
