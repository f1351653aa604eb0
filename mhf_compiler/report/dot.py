"""Pictures, drawn by Graphviz.

A site is drawn twice: as the model spells it, with arguments in the colours of their roles, and as
the op that replaces it. A near-miss is drawn once: the operation that decided it and those around.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .escape import dot_string
from .groups import Group, grouped
from .values import (
    Argument,
    GraphReport,
    RegionNode,
    SiteReport,
    all_declined,
    all_rewritten,
)

#: role -> colour, readable with black text on light and on dark pages
COLOURS = {
    "Q": "#8ecae6",
    "K": "#ffb703",
    "U": "#fb8500",
    "V": "#90be6d",
    "R": "#cdb4db",
    "out": "#f28482",
    "X": "#e9c46a",
    "offends": "#ffd6d6",
}
#: of the offending operation; the thick frame is for readers who do not see the colour
_MARK = 'color="#d00000" penwidth=4'
_OTHER = "#e5e5e5"
_FORMATS = ("svg", "png", "pdf", "dot")
_MISSING = "drawing needs Graphviz's program dot, which is not on the PATH (apt install graphviz)"


class DrawingError(RuntimeError):
    """A picture cannot be made; the message says why."""


@dataclass(frozen=True)
class Frame:
    """One picture.

    Attributes:
        title: what it shows.
        nodes: operations and arguments, each before its readers.
    """

    title: str
    nodes: tuple[RegionNode, ...]


def draw(graphs: Sequence[GraphReport], path: Path) -> None:
    """Draw the sites and near-misses of graphs, in the format of the path's suffix.

    Sites that differ in their modules only are drawn once.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in _FORMATS:
        raise DrawingError(f"path is {str(path)!r}, must end in .{', .'.join(_FORMATS)}")
    groups = [*grouped(all_rewritten(graphs)), *grouped(all_declined(graphs))]
    pictures = [frame for group in groups for frame in frames(group)]
    if not pictures:
        raise DrawingError("there is nothing to draw: no site and no near-miss, or all too large")
    source = dot_source(pictures)
    path.write_bytes(source.encode() if kind == "dot" else render(source, kind))


def frames(group: Group) -> list[Frame]:
    """A site before and after; of a declined one, what was matched or what offends."""
    site = group.first
    place = f"{group.where or 'the model'} at {site.location or 'unknown source'}"
    if site.reason is not None:
        kind = site.reason.kind.name
        return [Frame(f"{place}: declined, {kind}", site.region)] if site.region else []
    before = [Frame(f"{place}: before", site.region)] if site.region else []
    return [*before, Frame(f"{place}: after", tuple(_after(site)))]


def _after(site: SiteReport) -> Iterator[RegionNode]:
    """The op with its arguments, and the residual that is added to its result."""
    for argument in site.arguments:
        yield RegionNode(argument.role, _shown(argument), argument.role, ())
    k_scale, u_scale, out_scale = site.scales
    scales = {"k_scale": k_scale, "u_scale": u_scale, "out_scale": out_scale}
    constants = [f"{name}={scale:g}" for name, scale in scales.items() if scale != 1.0]
    call = f"multi_head_ffn({', '.join([str(site.activation), *constants])})"
    roles = [argument.role for argument in site.arguments]
    read = tuple(role for role in roles if role != "X")
    if "X" not in roles:
        yield RegionNode("op", call, "out", read)
    else:
        yield RegionNode("op", call, None, read)
        yield RegionNode("out", "add", "out", ("op", "X"))


def _shown(argument: Argument) -> str:
    return f"{argument.name}{argument.part}\n({', '.join(map(str, argument.shape))})"


def render(source: str, kind: str) -> bytes:
    """Run Graphviz on a program in its language."""
    program = shutil.which("dot")
    if program is None:
        raise DrawingError(_MISSING)
    done = subprocess.run(
        [program, f"-T{kind}"], input=source.encode(), capture_output=True, check=False
    )
    if done.returncode != 0:
        raise DrawingError(f"dot failed: {done.stderr.decode().strip()}")
    return done.stdout


def dot_source(pictures: Sequence[Frame]) -> str:
    """The frames in Graphviz's language."""
    lines = [
        "digraph sites {",
        '  graph [bgcolor="transparent" fontname="sans-serif" fontcolor="#808080"]',
        '  node [shape=box style="filled,rounded" fontname="monospace" fontsize=10]',
        '  edge [color="#808080"]',
    ]
    for number, frame in enumerate(pictures):
        lines += [f"  subgraph cluster_{number} {{"]
        lines += [f'    label={dot_string(frame.title)} color="#808080"']
        lines += [f"    {line}" for line in _statements(frame.nodes, f"s{number}_")]
        lines.append("  }")
        if number > 0:
            lines += _below(number, pictures[number - 1].nodes, frame.nodes)
    return "\n".join([*lines, "}"])


def _below(number: int, above: Sequence[RegionNode], below: Sequence[RegionNode]) -> Iterator[str]:
    """Invisible edges that put one frame under the other: from sinks above to sources below."""
    read = {source for node in above for source in node.inputs}
    ends = [dot_string(f"s{number - 1}_{node.name}") for node in above if node.name not in read]
    inside = {node.name for node in below}
    begins = [
        dot_string(f"s{number}_{node.name}") for node in below if inside.isdisjoint(node.inputs)
    ]
    yield f"  {{{' '.join(ends)}}} -> {{{' '.join(begins)}}} [style=invis]"


def _statements(nodes: Sequence[RegionNode], prefix: str) -> Iterator[str]:
    inside = {node.name for node in nodes}
    for node in nodes:
        colour = COLOURS.get(_first_role(node), _OTHER)
        mark = f" {_MARK}" if node.role == "offends" else ""
        name, text = dot_string(prefix + node.name), _short(_labelled(node))
        yield f'{name} [label={dot_string(text)} fillcolor="{colour}" ordering=in{mark}]'
        for source in node.inputs:
            if source in inside:
                yield f"{dot_string(prefix + source)} -> {name}"


def _first_role(node: RegionNode) -> str:
    """Its role; of a packed weight, which has several, the first."""
    return (node.role or "").partition(", ")[0].rstrip("0123456789")


def _labelled(node: RegionNode) -> str:
    """What is written on a node."""
    return f"{node.role}: {node.call}" if node.role else node.call


def _short(text: str, most: int = 64) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
