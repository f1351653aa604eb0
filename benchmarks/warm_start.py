"""A first step with empty caches, and with those that an equal process has left.

Six layers of the paper's model, of 22 sub-networks in a loop, each time in a new process. A start
is cold if the folder of caches is empty, and warm after that: then AOTAutograd and Inductor find
all that they need. The first step is taken as a program takes it: imports of Dynamo, Inductor and
the back end count, but not that of PyTorch, and not what the model's parameters take.

Times are CPU seconds, of the process and of the compilers that it starts one after the other. Both
back ends start in turn; figures are the least of the repeats, of which only warm starts have more
than one.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import Progress

from .harness import Benchmark, Row, Settings
from .models import flashmhf_like
from .processes import Seconds, in_process

BACKENDS = ("inductor", "flashmhf")
PHASES = ("inference", "training")
LAYERS = 6
BAR = 1.1


def first_step(backend: str, phase: str, layers: int, device: str) -> dict[str, float]:
    """Seconds of a first step of this process, and what it found in the caches."""
    model, x = flashmhf_like(layers)
    model, x = model.to(device).train(phase == "training"), x.to(device)
    begin, start = time.perf_counter(), Seconds.now()
    options = {"rewrite": "always"} if backend == "flashmhf" else None
    compiled = torch.compile(model, backend=backend, options=options)
    with torch.set_grad_enabled(model.training):
        loss = compiled(x).square().mean()
        if model.training:
            loss.backward()
    seconds = Seconds.now().since(start).all
    from mhf_compiler.compat import counters  # for Inductor it would count as well

    return {
        "seconds": seconds,
        "elapsed": time.perf_counter() - begin,
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "sites_rewritten": counters["flashmhf"]["sites_rewritten"],
    }


def run(settings: Settings, progress: Progress) -> Iterator[Row]:
    layers = 1 if settings.quick else LAYERS
    total = len(PHASES) * len(BACKENDS) * (1 + settings.repeats)
    bar = progress.add_task("processes", total=total)
    for phase in PHASES:
        with tempfile.TemporaryDirectory() as folder:
            runs: dict[str, list[dict[str, float]]] = {backend: [] for backend in BACKENDS}
            for _, backend in itertools.product(range(1 + settings.repeats), BACKENDS):
                caches = Path(folder, backend)
                caches.mkdir(exist_ok=True)
                found = in_process(__name__, caches, backend, phase, layers, settings.device)
                runs[backend].append(found)
                progress.advance(bar)
        yield {"phase": phase, "layers": layers} | compared(runs, layers)


def compared(runs: dict[str, list[dict[str, float]]], layers: int) -> Row:
    """The figures of one phase, of runs of which the first one is cold."""
    row: Row = {}
    for backend, (cold, *warm) in runs.items():
        row[f"{backend}_cold"] = cold["seconds"]
        row[f"{backend}_warm"] = min(one["seconds"] for one in warm)
        row[f"{backend}_warm_elapsed"] = min(one["elapsed"] for one in warm)
    row["ratio"] = row["flashmhf_warm"] / row["inductor_warm"]
    starts = [one for found in runs.values() for one in found[1:]]
    found = all((one["hits"], one["misses"]) == (1, 0) for one in starts)
    right = all(one["sites_rewritten"] == layers for one in runs["flashmhf"])
    return row | {"met": found and right and row["ratio"] <= BAR}


def summary(rows: list[Row]) -> list[str]:
    missed = [row for row in rows if not row["met"]]
    return [f"bar: ratio of warm starts {BAR}, found in the caches; {len(missed)} missed"]


BENCHMARK = Benchmark(
    "a first step with empty caches, and with those of an equal process (CPU seconds)",
    run,
    summary=summary,
    devices=("cpu", "cuda"),
    repeats=3,
)


def main() -> None:
    """One first step, in this process; its figures go to a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("layers", type=int)
    parser.add_argument("device")
    options = parser.parse_args()
    result = first_step(options.backend, options.phase, options.layers, options.device)
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
