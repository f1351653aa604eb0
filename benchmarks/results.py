"""Rows of figures, as files and as tables."""

import csv
import datetime
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich import box
from rich.table import Table

from .harness import Row

_MARKS = {"share": "{:.0%}", "error": "{:.2f}"}


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": _commit(),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def _commit() -> str | None:
    """The commit that is measured; a + says that files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def write(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """``path`` as JSON, and the rows as CSV next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    content = json.loads(path.read_text())
    return content["about"], content["rows"]


def columns(rows: Sequence[Row]) -> list[str]:
    """All columns, in the order in which rows bring them up; faults last."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    return sorted(found, key=lambda name: name == "fault")


def table(title: str, rows: Sequence[Row]) -> Table:
    """The rows for reading, a rule wherever the case changes."""
    drawn = Table(title=title, box=box.SIMPLE, title_justify="left")
    names = columns(rows)
    for name in names:
        text = any(isinstance(row.get(name), str) for row in rows)
        drawn.add_column(name, justify="left" if text else "right", no_wrap=name != "fault")
    for row, following in itertools.zip_longest(rows, rows[1:]):
        ends = following is not None and _case(row) != _case(following)
        drawn.add_row(*(_cell(name, row.get(name)) for name in names), end_section=ends)
    return drawn


def _case(row: Row) -> list[Any]:
    """What a row has to the left of its contender."""
    names = list(row)
    return [row[name] for name in names[: names.index("contender")]] if "contender" in row else []


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in _MARKS:
        return _MARKS[name].format(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
