"""Pictures of what was matched, drawn by Graphviz: arguments in the colours of their roles.

Each site is a frame: its operations as the model spells them, from the arguments to the output.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from .report import RegionNode, Report, SiteReport

#: of each role: readable with black text on light and on dark pages
COLOURS = {
    "Q": "#8ecae6",
    "K": "#ffb703",
    "U": "#fb8500",
    "V": "#90be6d",
    "R": "#cdb4db",
    "out": "#f28482",
    "X": "#e9c46a",
}
_OTHER = "#e5e5e5"
_FORMATS = ("svg", "png", "pdf", "dot")
_MISSING = "drawing needs Graphviz's program dot, which is not on the PATH (apt install graphviz)"


class DrawingError(RuntimeError):
    """A picture cannot be made; the message says why."""


def draw(report: Report, path: Path) -> None:
    """Write a picture of every rewritten site of a report, in the format that the name asks for."""
    kind = path.suffix.removeprefix(".")
    if kind not in _FORMATS:
        raise DrawingError(f"path is {str(path)!r}, must end in .{', .'.join(_FORMATS)}")
    sites = [site for site in report.rewritten if site.region]
    if not sites:
        raise DrawingError("there is nothing to draw: no site was rewritten, or all are too large")
    source = dot_source(sites)
    path.write_bytes(source.encode() if kind == "dot" else render(source, kind))


def render(source: str, kind: str) -> bytes:
    """A picture of a graph in Graphviz's language."""
    program = shutil.which("dot")
    if program is None:
        raise DrawingError(_MISSING)
    done = subprocess.run(
        [program, f"-T{kind}"], input=source.encode(), capture_output=True, check=False
    )
    if done.returncode != 0:
        raise DrawingError(f"dot failed: {done.stderr.decode().strip()}")
    return done.stdout


def dot_source(sites: Sequence[SiteReport]) -> str:
    """The sites in Graphviz's language, each in its frame."""
    lines = [
        "digraph sites {",
        '  graph [bgcolor="transparent" fontname="sans-serif" fontcolor="#808080"]',
        '  node [shape=box style="filled,rounded" fontname="monospace" fontsize=10]',
        '  edge [color="#808080"]',
    ]
    for number, site in enumerate(sites):
        title = _quoted(site.place)
        lines += [f"  subgraph cluster_{number} {{", f'    label={title} color="#808080"']
        lines += [f"    {line}" for line in _statements(site.region, f"s{number}_")]
        lines.append("  }")
    return "\n".join([*lines, "}"])


def _statements(region: Sequence[RegionNode], prefix: str) -> Iterator[str]:
    inside = {node.name for node in region}
    for node in region:
        text = f"{node.role}: {node.call}" if node.role else node.call
        colour = COLOURS.get((node.role or "").rstrip("0123456789"), _OTHER)
        name = _quoted(prefix + node.name)
        yield f'{name} [label={_quoted(_short(text))} fillcolor="{colour}"]'
        for source in node.inputs:
            if source in inside:
                yield f"{_quoted(prefix + source)} -> {name}"


def _short(text: str, most: int = 64) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
