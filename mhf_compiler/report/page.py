"""A report as one HTML file: without network or server, in dark and light, by keyboard alone.

First the map of the model (``map.py``), the totals and the context, then a card for each group of
equal networks, then the code. ``page.html`` is the template, which escapes all that it is given,
``page.css`` the style, and ``map.css`` that of the map, which notebooks have too. The page works
without its script, ``page.js``, which searches, moves through the map and the changes of code by
keys, and shows pictures in full size. Pictures come from Graphviz if it is installed; otherwise
the operations are listed. Code is coloured if pygments is installed. Jinja2 comes with PyTorch,
which requires it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from .context import Context
from .difference import colours_of_code, difference
from .dot import COLOURS, MISSING, DrawingError, Frame, can_draw, dot_source, frames, render
from .escape import visible, visible_lines
from .groups import Group, grouped
from .map import Block, Row, map_of
from .text import (
    cells,
    coverage_lines,
    fusion_lines,
    graph_break_lines,
    headline,
    is_empty,
    ordinary_lines,
    printed,
    rows,
    scaled,
    summary_lines,
    why_nothing,
)
from .totals import declined_totals, totals
from .values import GraphBreak, GraphReport, all_declined, all_notes, all_rewritten, all_unread

_FOLDER = Path(__file__).parent
_PACKAGES = re.compile(r"(?<![\w.])/[^\s:'\"<>]*/(?:site|dist)-packages/")
_REASONS = ("why", "what to do")  # shown above the other rows
_FOLDED = ("modules",)  # rows that are folded
_FORMULA = "formula"  # with the arguments' rows, next to the pictures

Graphs = Sequence[GraphReport]


def page(graphs: Graphs, breaks: Sequence[GraphBreak] = (), context: Context | None = None) -> str:
    """The whole page."""
    rewritten, declined = grouped(all_rewritten(graphs)), grouped(all_declined(graphs))
    made = _template().page(
        headline=headline(graphs),
        coverage=coverage_lines(graphs),
        style=_trusted(_style("map.css", "page.css") + colours_of_code()),
        script=_trusted((_FOLDER / "page.js").read_text()),
        map=_map(graphs, linked=True),
        totals=_totals(graphs),
        context=_context(context),
        unread=list(dict.fromkeys(map(str, all_unread(graphs)))),
        without_pictures=MISSING if (rewritten or declined) and not can_draw() else "",
        rewritten=[_site(group, f"site-{number}") for number, group in enumerate(rewritten)],
        declined=[_site(group, f"declined-{number}") for number, group in enumerate(declined)],
        nothing=why_nothing(graphs) if is_empty(graphs) else "",
        fusions=fusion_lines(graphs) if rewritten else [],
        breaks=[*graph_break_lines([], breaks)],
        notes=[*ordinary_lines(graphs), *all_notes(graphs)],
        graphs=[
            {
                "report": graph,
                "changed": graph.before != graph.after,
                "difference": _trusted(difference(nearby(graph.before), nearby(graph.after))),
            }
            for graph in graphs
        ],
    )
    return str(made)


def notebook(graphs: Graphs, breaks: Sequence[GraphBreak] = ()) -> str:
    """The map and the overview as the output of a notebook's cell, which expands to all of it."""
    shown = _template().notebook(
        headline=headline(graphs),
        summary=summary_lines(graphs),
        style=_trusted(_style("map.css")),
        map=_map(graphs, linked=False),
        tables=_tables(graphs),
        text=printed(graphs, breaks),
    )
    return str(shown)


def overview(graphs: Graphs) -> str:
    """What became of each network, in two tables."""
    return str(_template().overview(_tables(graphs))).strip()


def nearby(text: str) -> str:
    """A text with paths of files below the working directory, or of packages, as from there."""
    here = os.path.join(os.getcwd(), "")
    text = text if here == os.sep else re.sub(rf"(?<![\w./]){re.escape(here)}", "", text)
    return _PACKAGES.sub("", text)


@cache
def _template() -> Any:
    """The macros of the template. The import is late: most compilations write no page."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "shown": lambda text: visible(nearby(str(text))),
        "shown_lines": lambda text: visible_lines(nearby(str(text))),
    }
    return environment.get_template("page.html").module


def _style(*names: str) -> str:
    return "".join((_FOLDER / name).read_text() for name in names)


def _trusted(html: str) -> Any:
    """HTML that the template is not to escape."""
    from markupsafe import Markup

    return Markup(html)


# The map, the totals and the context.


def _map(graphs: Graphs, linked: bool) -> dict[str, Any] | None:
    """What the template shows of the map; ``linked`` to the cards of the networks."""
    found = map_of(graphs)
    if not found:
        return None
    cards = _cards(graphs) if linked else {}
    longest = max((row.original or 0, row.rewritten or 0) for row in found)
    scale = max(longest) or 1.0
    kinds = [block.kind for row in found for block in row.blocks]
    return {
        "rows": [_row(row, cards, scale) for row in found],
        "timed": longest > (0, 0),
        "kinds": [
            (kind, name)
            for kind, name in (
                ("rewritten", "MH-FFN, rewritten"),
                ("declined", "declined"),
                ("ordinary", "ordinary FFN, left to Inductor"),
                ("other", "everything else"),
            )
            if kind in kinds
        ],
    }


def _row(row: Row, cards: dict[int, str], scale: float) -> dict[str, Any]:
    before, after = row.original, row.rewritten
    return {
        "path": row.path,
        "blocks": [
            {
                "name": f"{block.name} ({block.times} times)" if block.times > 1 else block.name,
                "kind": block.kind,
                "card": cards.get(id(block.site)),
                "about": [*_about(block)],
            }
            for block in row.blocks
        ],
        "before": None if before is None else f"{100 * before / scale:.1f}%",
        "after": None if after is None else f"{100 * after / scale:.1f}%",
        "time": None if before is None or after is None else f"{_ms(before)} → {_ms(after)} ms",
        "memory": None if row.hidden_bytes is None else scaled(row.hidden_bytes, "B"),
    }


def _about(block: Block) -> Iterable[str]:
    """What is said of a block when it is pointed at, in lines."""
    kind = f" ({block.module_class})" if block.module_class else ""
    yield f"{block.path or 'the model'}{kind}"
    site = block.site
    if site is None:
        return
    if site.reason is not None:
        yield f"{'ordinary FFN' if block.kind == 'ordinary' else 'declined'}: {site.reason}"
        work = site.work
        if work is not None and work.original is not None and work.rewritten is not None:
            yield f"estimated: {_ms(work.original)} ms, as an op {_ms(work.rewritten)} ms"
        return
    yield f"rewritten: {site.sizes}"
    if site.work is not None:
        yield f"{scaled(site.work.hidden_bytes, 'B')} of hidden units are not stored"


def _cards(graphs: Graphs) -> dict[int, str]:
    """By identity of a site, the anchor of its card."""
    found: dict[int, str] = {}
    for sites, name in ((all_rewritten(graphs), "site"), (all_declined(graphs), "declined")):
        for number, group in enumerate(grouped(sites)):
            found |= {id(sites[at]): f"{name}-{number}" for at in group.numbers}
    return found


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _totals(graphs: Graphs) -> list[tuple[str, str]]:
    """Large figures, each with a line that says what it is."""
    found = totals(graphs)
    shown = []
    if found.rewritten is not None and found.original is not None:
        share = found.rewritten / found.original - 1
        change = f"{abs(share):.0%} {'less' if share <= 0 else 'more'}"
        figure = f"{_ms(found.original)} → {_ms(found.rewritten)} ms"
        shown.append((figure, f"estimated for the rewritten networks together, {change}"))
    if found.hidden_bytes:
        shown.append((scaled(found.hidden_bytes, "B"), "of hidden units are not stored"))
    if found.kept_bytes:
        shown.append((scaled(found.kept_bytes, "B"), "are not kept for the backward pass"))
    if found.copied_bytes:
        shown.append((scaled(found.copied_bytes, "B"), "of weights are copied at each call"))
    left = declined_totals(graphs)
    if left.original is not None and left.rewritten is not None:
        which = "the declined networks together" if left.networks > 1 else "the declined network"
        figure = f"{_ms(left.original)} ms"
        shown.append((figure, f"estimated for {which}, as ops {_ms(left.rewritten)} ms"))
    return shown


def _context(context: Context | None) -> list[tuple[str, list[str]]]:
    """The rows of what a report is of."""
    if context is None:
        return []
    mode = {None: [], True: ["training"], False: ["evaluation"]}[context.training]
    gradients = "gradients recorded" if context.gradients else "no gradients"
    listed = {
        "model": [context.model] if context.model else [],
        "inputs": [*context.inputs],
        "mode": [", ".join([*mode, gradients])] if context.model else [],
        "options": [f"{name}={value}" for name, value in context.options.items()]
        or (["the defaults"] if context.model else []),
        "device": [context.device] if context.device else [],
        "versions": [f"{name} {number}" for name, number in context.versions.items()],
        "date": [context.date] if context.date else [],
    }
    return [
        (name, [visible(nearby(line)) for line in lines]) for name, lines in listed.items() if lines
    ]


# The cards.

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def _tables(graphs: Graphs) -> list[Table]:
    tables: list[Table] = []
    rewritten, declined = all_rewritten(graphs), all_declined(graphs)
    if rewritten:
        header, *listed = cells(grouped(rewritten))
        shown = [[nearby(cell) for cell in cells] for cells in listed]
        tables.append(("Rewritten", header, shown))
    if declined:
        listed = [
            [
                visible(nearby(str(text)))
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


def _site(group: Group, anchor: str) -> dict[str, Any]:
    """What the template shows of the sites of a group."""
    site = group.first
    listed = [
        (name, COLOURS.get(name.rstrip("0123456789")), nearby(text)) for name, text in rows(group)
    ]
    return {
        "anchor": anchor,
        "kind": "rewritten" if site.reason is None else "declined",
        "number": group.numbered if site.reason is None else "",
        "many": len(group.numbers) > 1,
        "place": site.location or "unknown source",
        "module": group.where,
        "sizes": site.sizes if site.heads is not None else "",
        "code": site.location.code if site.location else "",
        "reasons": [(name, text) for name, _, text in listed if name in _REASONS],
        "formula": [row for row in listed if row[0] == _FORMULA or row[1]],
        "rows": [
            row for row in listed if not row[1] and row[0] not in (*_REASONS, *_FOLDED, _FORMULA)
        ],
        "folded": [(name, text) for name, _, text in listed if name in _FOLDED],
        "pictures": [_picture(frame) for frame in frames(group)],
        "too_large": site.reason is None and not site.region,
    }


def _picture(frame: Frame) -> dict[str, Any]:
    """A picture with its title; without Graphviz, the operations one by one."""
    title = frame.title.rpartition(": ")[2]
    offends = any(node.role == "offends" for node in frame.nodes)
    title = {"before": "Before", "after": "After"}.get(title, "What was matched")
    title = "What decided it, and what is around" if offends else title
    try:
        drawn = render(dot_source([Frame("", frame.nodes)]), "svg").decode()
    except DrawingError:
        listed = (f"{node.role or '':>7}  {' '.join(node.call.split())}" for node in frame.nodes)
        return {"title": title, "calls": "\n".join(map(visible, listed))}
    drawn = re.sub(r' id="[^"]*"', "", drawn[drawn.index("<svg") :])  # unique in one picture only
    width = re.search(r'width="(\d+)', drawn)
    named = f'<svg role="img" aria-label="{escape(visible(nearby(frame.title)))}"'
    return {
        "title": title,
        "svg": _trusted(drawn.replace("<svg", named, 1)),
        "width": int(width[1]) if width else 1,
    }
