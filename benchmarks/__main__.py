"""``python -m benchmarks``: lists benchmarks, runs them, draws what they found."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from . import blocks, compile_time, cpu_path, ffn, grid, kernels, per_token, results, warm_start
from .harness import Benchmark, Settings

BENCHMARKS: dict[str, Benchmark] = {
    "kernels": kernels.BENCHMARK,
    "kernels-widths": kernels.WIDTHS_BENCHMARK,
    "kernels-tokens": kernels.TOKENS_BENCHMARK,
    "kernels-sweep": kernels.SWEEP_BENCHMARK,
    "ffn": ffn.BENCHMARK,
    "ffn-lengths": ffn.LENGTHS_BENCHMARK,
    "ffn-tokens": ffn.TOKENS_BENCHMARK,
    "ffn-steps": ffn.STEPS_BENCHMARK,
    "blocks": blocks.INFERENCE_BENCHMARK,
    "blocks-training": blocks.TRAINING_BENCHMARK,
    "per-token": per_token.BENCHMARK,
    "per-token-precisions": per_token.PRECISIONS_BENCHMARK,
    "per-token-graphs": per_token.GRAPHS_BENCHMARK,
    "per-token-grid": per_token.GRID_BENCHMARK,
    "per-token-full-grid": per_token.FULL_GRID_BENCHMARK,
    "grid": grid.BENCHMARK,
    "cpu-path": cpu_path.BENCHMARK,
    "compile-time": compile_time.BENCHMARK,
    "warm-start": warm_start.BENCHMARK,
}


class Shape(click.ParamType):
    """Sizes, such as 8,4096,16,128,22,256: a benchmark says how many, and of what."""

    name = "sizes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            shape = tuple(int(size) for size in str(value).split(","))
        except ValueError:
            shape = ()
        if min(shape, default=0) < 1:
            self.fail(f"want positive numbers, got {value!r}", param, ctx)
        return shape


@click.group()
def main() -> None:
    """Measure mhf_compiler. Every figure is a median of interleaved repeats; what computes wrong
    numbers gets none, and the exit status is 1."""


@main.command("list")
def list_them() -> None:
    """The benchmarks, and where they run."""
    for name, benchmark in BENCHMARKS.items():
        click.echo(f"{name:20} {'/'.join(benchmark.devices):9} {benchmark.about}")


@main.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(BENCHMARKS)))
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="default: a GPU if there is one")
@click.option("--repeats", type=click.IntRange(1), help="at least; default: the benchmark's own")
@click.option("--shape", "shapes", multiple=True, type=Shape(), help="in place of its own")
@click.option("--only", multiple=True, help="cases with this in a column: training, or T=16")
@click.option("--without", multiple=True, help="no contenders that have this in their names")
@click.option("--quick", is_flag=True, help="tiny sizes, to try the benchmark itself out")
@click.option("--out", type=click.Path(path_type=Path), help="folder for JSON, CSV and pictures")
def run(
    names: Sequence[str],
    device: str | None,
    repeats: int | None,
    shapes: tuple[tuple[int, ...], ...],
    only: tuple[str, ...],
    without: tuple[str, ...],
    quick: bool,
    out: Path | None,
) -> None:
    """Run benchmarks one after the other."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells of each start and stop
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("there is no CUDA device")
    for name in names:
        if device not in BENCHMARKS[name].devices:
            raise click.UsageError(f"{name} runs on {' and '.join(BENCHMARKS[name].devices)} only")
        sizes = BENCHMARKS[name].shape_names
        if any(len(shape) != len(sizes) for shape in shapes):
            raise click.UsageError(
                f"{name} wants {len(sizes)} numbers as a shape, {','.join(sizes)}"
            )
    red = []
    for name in names:
        least = repeats or BENCHMARKS[name].repeats
        settings = Settings(device, least, quick, shapes, only, without)
        if not run_one(name, settings, out):
            red.append(name)
    if red:
        click.echo(f"red: {', '.join(red)}", err=True)
        sys.exit(1)


def command(name: str, settings: Settings) -> str:
    """What measures the same again, on the same kind of device."""
    words = ["python -m benchmarks run", name, f"--repeats {settings.repeats}"]
    words += [f"--device {settings.device}"] if settings.device == "cpu" else []
    words += [f"--shape {','.join(map(str, shape))}" for shape in settings.shapes]
    words += [f"--only {shlex.quote(value)}" for value in settings.only]
    words += [f"--without {shlex.quote(value)}" for value in settings.without]
    return " ".join([*words, *(["--quick"] if settings.quick else [])])


def run_one(name: str, settings: Settings, out: Path | None) -> bool:
    """Run, print and write one benchmark; false where something computes wrong numbers."""
    benchmark = BENCHMARKS[name]
    about = results.machine(settings.device) | {"repeats": settings.repeats}
    about["command"] = command(name, settings)
    start = time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    rows, interrupted = [], False
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        try:
            for row in benchmark.run(settings, progress):
                rows.append(row)
        except KeyboardInterrupt:  # hours may have gone into what is there
            interrupted = about["interrupted"] = True
    about["seconds"] = round(time.perf_counter() - start)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(results.table(f"{name}: {about['device']}, torch {about['torch']}", rows))
    for line in benchmark.summary(rows):
        console.print(line, highlight=False)
    if out is not None:
        path = out / f"{name}.json"
        results.write(path, about, rows)
        draw([path])
    if interrupted:
        raise click.ClickException(f"interrupted: {name} is incomplete")
    return not any(str(row.get("fault", "")).startswith("RED") for row in rows)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def plot(files: Sequence[Path]) -> None:
    """Draw what FILES (JSON of `run`) hold, as PNG next to them."""
    draw(files)


def draw(files: Sequence[Path]) -> None:
    for file in files:
        benchmark = BENCHMARKS.get(file.stem)
        if benchmark is None:
            raise click.UsageError(f"{file} is not named after a benchmark")
        if not benchmark.plots:
            continue
        from . import plots  # matplotlib takes its time

        about, rows = results.read(file)
        for each in benchmark.plots:
            for path in plots.draw(each, rows, about, file):
                click.echo(f"drawn: {path}", err=True)


if __name__ == "__main__":
    main()
