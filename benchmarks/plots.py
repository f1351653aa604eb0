"""Pictures of rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from .harness import Plot, Row

_LABELS = {
    "ms": "milliseconds",
    "peak_mib": "peak memory, MiB",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "share": "share of the matrix product's rate",
}


def draw(plot: Plot, rows: Sequence[Row], about: dict[str, Any], path: Path) -> list[Path]:
    """A file for each picture of a plot: ``path`` with the plot's name, and a value of ``each``."""
    drawn = [row for row in rows if row.get(plot.per) not in plot.without]
    known = [row for row in drawn if plot.x in row and row.get(plot.y) is not None]
    pictures = list(dict.fromkeys(row.get(plot.each) if plot.each else None for row in known))
    written = []
    for picture in pictures:
        chosen = [row for row in known if plot.each is None or row.get(plot.each) == picture]
        names = [path.stem, plot.name, *([str(picture)] if plot.each else [])]
        target = path.with_name("-".join(names).replace(" ", "_") + ".png")
        _draw_one(plot, chosen, about, picture, target)
        written.append(target)
    return written


def _draw_one(
    plot: Plot, rows: Sequence[Row], about: dict[str, Any], picture: Any, target: Path
) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for line in dict.fromkeys(row[plot.per] for row in rows):
        points = sorted((row[plot.x], row[plot.y]) for row in rows if row[plot.per] == line)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=str(line))
    if "x" in plot.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if "y" in plot.log:
        axes.set_yscale("log")
    axes.set_xlabel(_LABELS.get(plot.x, plot.x))
    axes.set_ylabel(_LABELS.get(plot.y, plot.y))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    what = f"{plot.name}, {picture}" if picture is not None else plot.name
    versions = f"{about['device']}, torch {about['torch']}, {about['date']}"
    axes.set_title(f"{what}\n{versions}", fontsize="medium", loc="left")
    figure.savefig(target, dpi=150)
    plt.close(figure)
