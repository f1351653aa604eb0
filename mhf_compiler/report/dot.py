"""Pictures, drawn by Graphviz.

A site is drawn twice: as the model spells it, with arguments in the colours of their roles, and as
the op that replaces it. A near-miss is drawn once: the operation that decided it and those around.
Operations are written without what they read, which the edges show.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .escape import dot_string
from .groups import Group, grouped
from .values import (
    ALIKE,
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
#: of the node that stands for several rounds of a loop
_ALIKE = 'style="filled,rounded,dashed" penwidth=2'
_BEGIN = "digraph sites {"
_FORMATS = ("svg", "png", "pdf", "dot")
MISSING = "drawing needs Graphviz's program dot, which is not on the PATH (apt install graphviz)"


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


def draw(graphs: Sequence[GraphReport], path: Path, site: int | None = None) -> None:
    """Draw the sites and near-misses of graphs, or one site, in the format of the path's suffix.

    Sites that differ in their modules only are drawn once. Without Graphviz the pictures go in its
    language into a file of the same name that ends in ``.dot``, and the error says so.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in _FORMATS:
        raise DrawingError(f"path is {str(path)!r}, must end in .{', .'.join(_FORMATS)}")
    pictures = [frame for group in _drawn(graphs, site) for frame in frames(group)]
    if not pictures:
        raise DrawingError("there is nothing to draw: no site and no near-miss, or all too large")
    source = dot_source(pictures)
    if kind != "dot" and not can_draw():
        raise DrawingError(f"{MISSING}{_kept_for_later(source, path)}")
    path.write_bytes(source.encode() if kind == "dot" else render(source, kind))


def _kept_for_later(source: str, path: Path) -> str:
    """Write a program in Graphviz's language next to the picture that it is of, and say so."""
    other = path.with_suffix(".dot")
    if other.exists() and not other.read_bytes().startswith(_BEGIN.encode()):
        return ""  # of someone else
    other.write_text(source)
    command = f"dot -T{path.suffix.removeprefix('.')} {other} -o {path}"
    return f"; {other} has the pictures, and `{command}` draws them"


def _drawn(graphs: Sequence[GraphReport], site: int | None) -> list[Group]:
    rewritten = all_rewritten(graphs)
    if site is None:
        return [*grouped(rewritten), *grouped(all_declined(graphs))]
    if not rewritten:
        raise DrawingError(f"site is {site}, but no MH-FFN was rewritten")
    if not 0 <= site < len(rewritten):
        raise DrawingError(f"site is {site}, must be in 0 to {len(rewritten) - 1}")
    return [Group(rewritten[site], rewritten[site].modules, (site,))]


def frames(group: Group) -> list[Frame]:
    """A site before and after; of a declined one, what was matched or what offends."""
    site = group.first if len(group.paths) < 2 else _below_module(group.first)
    place = f"{group.where or 'the model'} at {site.location or 'unknown source'}"
    if site.reason is not None:
        kind = site.reason.kind.name
        return [Frame(f"{place}: declined, {kind}", site.region)] if site.region else []
    before = [Frame(f"{place}: before", site.region)] if site.region else []
    return [*before, Frame(f"{place}: after", tuple(_after(site)))]


def _below_module(site: SiteReport) -> SiteReport:
    """The site of one of several modules, with the names that all of them have."""

    def cut(text: str) -> str:
        return re.sub(rf"(?<![\w.]){re.escape(str(site.module))}\.", "", text)

    return replace(
        site,
        region=tuple(replace(node, call=cut(node.call)) for node in site.region),
        arguments=tuple(replace(one, name=cut(one.name)) for one in site.arguments),
    )


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
    name = argument.name.replace(" ... ", " ...\n").replace(" (", "\n(")  # of many tensors
    return f"{name}{argument.part}\n({', '.join(map(str, argument.shape))})"


def can_draw() -> bool:
    """Whether Graphviz is installed."""
    return shutil.which("dot") is not None


def render(source: str, kind: str) -> bytes:
    """Run Graphviz on a program in its language."""
    program = shutil.which("dot")
    if program is None:
        raise DrawingError(MISSING)
    done = subprocess.run(
        [program, f"-T{kind}"], input=source.encode(), capture_output=True, check=False
    )
    if done.returncode != 0:
        raise DrawingError(f"dot failed: {done.stderr.decode().strip()}")
    return done.stdout


def dot_source(pictures: Sequence[Frame]) -> str:
    """The frames in Graphviz's language, each in a box if it has a title."""
    lines = [
        _BEGIN,
        '  graph [bgcolor="transparent" fontname="sans-serif" fontcolor="#808080"]',
        '  node [shape=box style="filled,rounded" fontname="monospace" fontsize=10]',
        '  node [height=0.4 margin="0.12,0.07"]',
        '  edge [color="#808080"]',
    ]
    for number, frame in enumerate(pictures):
        lines += [f"  subgraph {'cluster' if frame.title else 'plain'}_{number} {{"]
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
    inside = {node.name: node for node in nodes}
    for node in nodes:
        colour = COLOURS.get(_first_role(node), _OTHER)
        mark = f" {_MARK}" if node.role == "offends" else ""
        mark = f" {_ALIKE}" if node.role == ALIKE else mark
        sources = [inside[source] for source in node.inputs if source in inside]
        name, text = dot_string(prefix + node.name), _short(_labelled(node, sources))
        yield f'{name} [label={dot_string(text)} fillcolor="{colour}" ordering=in{mark}]'
        for source in sources:
            yield f"{dot_string(prefix + source.name)} -> {name}"


def _first_role(node: RegionNode) -> str:
    """Its role; of a packed weight, which has several, the first."""
    return (node.role or "").partition(", ")[0].rstrip("0123456789")


def _labelled(node: RegionNode, sources: Sequence[RegionNode]) -> str:
    """What is written on a node: the operation without what edges lead from."""
    if node.role == ALIKE:
        return node.call
    text = node.call
    name, equals, call = text.partition(" = ")
    if equals and name == node.name and not node.inputs and node.role:  # computed outside
        text = f"{name} = {_operator(call)}"
    elif equals and name == node.name:
        text = _operation(call, {*node.inputs, *(one.call for one in sources)})
    return f"{node.role}: {text}" if node.role else text


def _operation(call: str, sources: set[str]) -> str:
    """A call without its tensors: ``einsum(bhd,hfd->bhf)``, ``[..., 0]``."""
    _, bracket, rest = call.partition("(")
    name = _operator(call)
    if not bracket or not rest.endswith(")"):
        return call
    arguments = [one for one in _split(rest[:-1]) if one not in sources and one != "None"]
    text = ", ".join(arguments).replace("slice(None, None, None)", ":").replace("Ellipsis", "...")
    if name == "getitem" and text:
        return f"[{text.removeprefix('(').removesuffix(')')}]"
    return f"{name}({text})" if text else name


def _operator(call: str) -> str:
    return call.partition("(")[0].rpartition(".")[2]


def _split(arguments: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth = [""], 0
    for piece in re.split(r"(, |[()\[\]])", arguments):
        depth += (piece in ("(", "[")) - (piece in (")", "]"))
        if piece == ", " and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _short(text: str, most: int = 48) -> str:
    """Each line of a text, without its middle if it is long."""
    half = most // 2 - 1
    lines = text.split("\n")
    return "\n".join(x if len(x) <= most else f"{x[:half]}...{x[-half:]}" for x in lines)
