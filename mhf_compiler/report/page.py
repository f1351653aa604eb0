"""A report as one HTML file: without network or server, in dark and light, by keyboard alone.

``page.html`` is the template, which escapes all that it is given, ``page.css`` the style. Sections
fold (``details``), so that the page works without its script, ``page.js``, which only searches.
Pictures come from Graphviz if it is installed; otherwise the operations are listed. Code is
coloured if pygments is installed. Jinja2 comes with PyTorch, which requires it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from .dot import COLOURS, DrawingError, Frame, dot_source, frames, render
from .escape import visible, visible_lines
from .groups import Group, grouped
from .text import (
    cells,
    fusion_lines,
    graph_break_lines,
    headline,
    is_empty,
    ordinary_lines,
    printed,
    rows,
    why_nothing,
)
from .values import GraphBreak, GraphReport, all_declined, all_notes, all_rewritten, all_unread

_FOLDER = Path(__file__).parent


def page(graphs: Sequence[GraphReport], breaks: Sequence[GraphBreak] = ()) -> str:
    """The whole page."""
    rewritten, declined, notes = all_rewritten(graphs), all_declined(graphs), all_notes(graphs)
    unread = all_unread(graphs)
    made = _template().page(
        headline=headline(graphs),
        style=_trusted((_FOLDER / "page.css").read_text() + _colours_of_code()),
        script=_trusted((_FOLDER / "page.js").read_text()),
        tables=_tables(graphs),
        unread=list(dict.fromkeys(map(str, unread))),
        rewritten=[_site(group) for group in grouped(rewritten)],
        declined=[_site(group) for group in grouped(declined)],
        nothing=why_nothing(graphs) if is_empty(graphs) else "",
        fusions=fusion_lines(graphs) if rewritten else [],
        breaks=[*graph_break_lines([], breaks)],
        notes=[*ordinary_lines(graphs), *map(visible, notes)],
        graphs=[
            {
                "report": graph,
                "changed": graph.before != graph.after,
                "difference": _trusted(difference(graph.before, graph.after)),
            }
            for graph in graphs
        ],
    )
    return str(made)


def notebook(graphs: Sequence[GraphReport], breaks: Sequence[GraphBreak] = ()) -> str:
    """The overview, as the output of a notebook's cell, which expands to the full report."""
    return str(_template().notebook(headline(graphs), _tables(graphs), printed(graphs, breaks)))


def overview(graphs: Sequence[GraphReport]) -> str:
    """What became of each network, in two tables."""
    return str(_template().overview(_tables(graphs))).strip()


@cache
def _template() -> Any:
    """The macros of the template. The import is late: most compilations write no page."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "visible_lines": visible_lines}
    return environment.get_template("page.html").module


def _trusted(html: str) -> Any:
    """HTML that the template is not to escape."""
    from markupsafe import Markup

    return Markup(html)


Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def _tables(graphs: Sequence[GraphReport]) -> list[Table]:
    tables: list[Table] = []
    rewritten, declined = all_rewritten(graphs), all_declined(graphs)
    if rewritten:
        header, *listed = cells(grouped(rewritten))
        tables.append(("Rewritten", header, listed))
    if declined:
        listed = [
            [
                visible(text)
                for text in (
                    group.first.location or "unknown",
                    group.where,
                    group.first.reason,
                )
            ]
            for group in grouped(declined)
        ]
        tables.append(("Declined", ["source", "module", "why"], listed))
    return tables


def _site(group: Group) -> dict[str, Any]:
    """What the template shows of the sites of a group."""
    site = group.first
    offends = any(node.role == "offends" for node in site.region)
    shown = "Before and after, arguments coloured by their roles"
    if site.reason is not None:
        shown = "The offending operation and those around it" if offends else "What was matched"
    return {
        "title": f"Site {group.numbered}: " if site.reason is None else "",
        "place": visible(site.location or "unknown source"),
        "module": visible(group.where),
        "code": visible(site.location.code) if site.location else "",
        "rows": [
            (name, COLOURS.get(name.rstrip("0123456789")), text) for name, text in rows(group)
        ],
        "shown": shown,
        "pictures": [_picture(frame) for frame in frames(group)],
        "too_large": site.reason is None and not site.region,
    }


def _picture(frame: Frame) -> dict[str, Any]:
    """A picture with its title; without Graphviz, the operations one by one."""
    title = frame.title.rpartition(": ")[2]
    try:
        drawn = render(dot_source([Frame(title, frame.nodes)]), "svg").decode()
    except DrawingError:
        listed = (f"{node.role or '':>7}  {' '.join(node.call.split())}" for node in frame.nodes)
        return {"title": title, "calls": "\n".join(map(visible, listed))}
    drawn = re.sub(r' id="[^"]*"', "", drawn[drawn.index("<svg") :])  # unique in one picture only
    named = f'<svg role="img" aria-label="{escape(visible(frame.title))}"'
    return {"svg": _trusted(drawn.replace("<svg", named, 1))}


def difference(before: str, after: str) -> str:
    """Two codes as one, as HTML, with removed and added lines marked."""
    before, after = visible_lines(before), visible_lines(after)
    old, new = before.splitlines(), after.splitlines()
    old_shown, new_shown = _coloured(before, len(old)), _coloured(after, len(new))
    lines: list[str] = []
    # autojunk is wanted: lines that repeat, such as releases of variables, are bad anchors.
    for what, a, b, c, d in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if what == "equal":
            lines += [f"  {line}\n" for line in new_shown[c:d]]
        else:
            lines += [f'<span class="del">- {line}</span>' for line in old_shown[a:b]]
            lines += [f'<span class="add">+ {line}</span>' for line in new_shown[c:d]]
    return "".join(lines)


def _coloured(code: str, count: int) -> Sequence[str]:
    """The lines of a code, as HTML."""
    try:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
    except ModuleNotFoundError:
        return [escape(line) for line in code.splitlines()]
    shown = highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
    # Colouring is dropped if a token spans several lines, since it would be cut.
    return shown if len(shown) == count else [escape(line) for line in code.splitlines()]


def _colours_of_code() -> str:
    try:
        from pygments.formatters import HtmlFormatter
    except ModuleNotFoundError:
        return ""
    light, dark = (
        re.sub(r"background: #\w+;?|/\*.*?\*/", "", HtmlFormatter(style=s).get_style_defs(".code"))
        for s in ("default", "github-dark")
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"
