"""A report as one HTML file: without network or server, in dark and light, by keyboard alone.

Sections fold (``details``), so that the page works without its script, which only searches. The
pictures come from Graphviz where it is installed; elsewhere the operations are listed. Code is
coloured where pygments is installed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from html import escape

from .dot import COLOURS, DrawingError, Frame, dot_source, frames, render
from .groups import Group, grouped
from .text import cells, headline, printed, rows, why_nothing
from .values import GraphReport, all_declined, all_notes, all_rewritten

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --add: #2da44e2e; --del: #cf222e26; --soft: #8881 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
code, pre, td.value { font-family: ui-monospace, monospace; font-size: 13px }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem }
summary { cursor: pointer; overflow-wrap: anywhere }
summary:focus-visible, input:focus-visible { outline: 2px solid Highlight; outline-offset: 2px }
table { border-collapse: collapse; margin: .5rem 0 }
th { white-space: nowrap } caption { text-align: left; font-style: italic }
th { text-align: left; font-weight: 600; vertical-align: top; padding: .15rem 1rem .15rem 0 }
td { padding: .15rem 0; overflow-wrap: anywhere } .overview td { padding-right: 1rem }
pre { overflow-x: auto; background: var(--soft); border-radius: 6px; padding: .6rem }
pre span.add, pre span.del { display: block } .add { background: var(--add) }
.del { background: var(--del) } .picture { overflow: auto; max-height: 40rem }
.role { display: inline-block; min-width: 2em; text-align: center; border-radius: 4px; color: #000 }
input { font: inherit; width: 100%; box-sizing: border-box; padding: .4rem }
[hidden] { display: none }
"""
_SCRIPT = """
const box = document.querySelector("input"), count = document.querySelector("output");
const sections = [...document.querySelectorAll("[data-entry]")];
function search() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const section of sections) {
    const text = section.textContent.toLowerCase();
    section.hidden = !words.every(word => text.includes(word));
    shown += !section.hidden;
  }
  count.textContent = words.length ? `${shown} of ${sections.length} shown` : "";
}
box.addEventListener("input", search);
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
  if (event.key === "Escape") { box.value = ""; search(); }
});
"""


def page(graphs: Sequence[GraphReport]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(headline(graphs))}</title><style>{_STYLE}{_colours_of_code()}</style>"
        f"</head>\n<body>\n<h1>{escape(headline(graphs))}</h1>\n"
        '<label>Search (press /): <input type="search"></label> <output></output>\n'
        + "\n".join(_sections(graphs))
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def notebook(graphs: Sequence[GraphReport]) -> str:
    """The overview, as the output of a notebook's cell; the rest unfolds."""
    return (
        f"<p><strong>{escape(headline(graphs))}</strong></p>{overview(graphs)}"
        f"<details><summary>in full</summary><pre>{escape(printed(graphs))}</pre></details>"
    )


def overview(graphs: Sequence[GraphReport]) -> str:
    """What became of each network, in two tables."""
    tables = []
    rewritten, declined = all_rewritten(graphs), all_declined(graphs)
    if rewritten:
        tables.append(("Rewritten", cells(grouped(rewritten))))
    if declined:
        listed = [
            [str(group.first.location or "unknown"), group.where, str(group.first.reason)]
            for group in grouped(declined)
        ]
        tables.append(("Declined", [["source", "module", "why"], *listed]))
    return "".join(_table(title, *cells) for title, cells in tables)


def _table(title: str, header: list[str], *listed: list[str]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in listed
    )
    return (
        f'<table class="overview"><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _sections(graphs: Sequence[GraphReport]) -> Iterator[str]:
    rewritten, declined, notes = all_rewritten(graphs), all_declined(graphs), all_notes(graphs)
    if rewritten or declined:
        yield f"<h2>Overview</h2>{overview(graphs)}"
    if rewritten:
        yield "<h2>Rewritten</h2>"
        yield from (_site(group) for group in grouped(rewritten))
    if declined:
        yield "<h2>Declined</h2>"
        yield from (_site(group) for group in grouped(declined))
    if not rewritten and not declined and not notes:
        yield f"<pre>{escape(why_nothing(graphs))}</pre>"
    yield from (f"<p>{escape(note)}</p>" for note in notes)
    if graphs:
        yield "<h2>Graphs</h2>"
        yield from (_graph(number, graph) for number, graph in enumerate(graphs))


def _site(group: Group) -> str:
    site = group.first
    where = f"{site.location or 'unknown source'}"
    code = f"<pre>{escape(site.location.code)}</pre>" if site.location else ""
    table = "".join(
        f'<tr><th>{_role(name)}</th><td class="value">{escape(text)}</td></tr>'
        for name, text in rows(group)
    )
    module = f" in {escape(group.where)}" if group.where else ""
    number = f"Site {group.numbered}: " if site.reason is None else ""
    return (
        f"<details data-entry open><summary>{number}<code>{escape(where)}</code>{module}</summary>"
        f"{code}<table>{table}</table>{_pictures(group)}</details>"
    )


def _role(name: str) -> str:
    colour = COLOURS.get(name.rstrip("0123456789"))
    text = escape(name)
    return (
        text if colour is None else f'<span class="role" style="background:{colour}">{text}</span>'
    )


def _pictures(group: Group) -> str:
    site, pictures = group.first, frames(group)
    if not pictures:
        return ""
    shown = "".join(_picture(frame) for frame in pictures)
    if site.reason is None and not site.region:
        shown = f"<p>Before, there were too many operations for a picture.</p>{shown}"
    offends = any(node.role == "offends" for node in site.region)
    title = "Before and after, arguments coloured by their roles"
    if site.reason is not None:
        title = "What offends, and what is around it" if offends else "What was matched"
    return f"<details open><summary>{title}</summary>{shown}</details>"


def _picture(frame: Frame) -> str:
    """A picture with its title; without Graphviz, the operations one by one."""
    what = frame.title.rpartition(": ")[2]
    try:
        drawn = render(dot_source([Frame(what, frame.nodes)]), "svg").decode()
    except DrawingError:
        rows = (f"{node.role or '':>7}  {' '.join(node.call.split())}" for node in frame.nodes)
        calls = "\n".join(rows)
        return f"<p>{escape(what)}</p><pre>{escape(calls)}</pre>"
    drawn = re.sub(r' id="[^"]*"', "", drawn[drawn.index("<svg") :])  # each page has them once
    named = f'<svg role="img" aria-label="{escape(frame.title)}"'
    return f'<div class="picture" tabindex="0">{drawn.replace("<svg", named, 1)}</div>'


def _graph(number: int, graph: GraphReport) -> str:
    ends = ""
    if graph.graph_break is not None:
        where = graph.graph_break.location or "unknown source"
        ends = f"<p>Ends with a graph break at <code>{escape(str(where))}</code></p>"
        ends += f"<pre>{escape(graph.graph_break.reason)}</pre>"
    counts = f"{len(graph.rewritten)} rewritten, {len(graph.declined)} declined"
    changed = graph.before != graph.after
    title = "code before and after" if changed else "code, unchanged"
    return (
        f"<details data-entry><summary>Graph {number}: {graph.operations} nodes, {counts}</summary>"
        f"{ends}<details><summary>{title}</summary><pre class=code>"
        f"{difference(graph.before, graph.after)}</pre></details></details>"
    )


def difference(before: str, after: str) -> str:
    """Two texts as one, with what went and what came marked."""
    old, new = before.splitlines(), after.splitlines()
    old_shown, new_shown = _coloured(before, len(old)), _coloured(after, len(new))
    lines: list[str] = []
    # Lines that repeat, such as releases of variables, are no good anchors: autojunk is right.
    for what, a, b, c, d in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if what == "equal":
            lines += [f"  {line}\n" for line in new_shown[c:d]]
        else:
            lines += [f'<span class="del">- {line}</span>' for line in old_shown[a:b]]
            lines += [f'<span class="add">+ {line}</span>' for line in new_shown[c:d]]
    return "".join(lines)


def _coloured(code: str, count: int) -> Sequence[str]:
    """The lines of a code as HTML."""
    try:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
    except ModuleNotFoundError:
        return [escape(line) for line in code.splitlines()]
    shown = highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
    # A token over several lines would be cut: then without colours.
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
