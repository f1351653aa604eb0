"""Graph reports as text: a headline, a table of the rewritten sites, a paragraph for each site."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ..passes.outcome import Fusion
from .escape import visible, visible_lines
from .groups import Group, coverages, grouped
from .paths import compressed
from .totals import declined_totals, networks, totals
from .values import (
    Argument,
    GraphBreak,
    GraphReport,
    Operation,
    SiteReport,
    UnreadGraph,
    Work,
    all_declined,
    all_notes,
    all_ordinary,
    all_rewritten,
    all_unread,
)

_WIDTH = 100
_MOST_PRODUCTS = 12
_NOT_RUN = "no pass has run; when Inductor compiles the model, counters and logs say what was fused"
_WHOLE = ("why", "operation", "what to do")  # never wrapped, so that they can be searched for

Graphs = Sequence[GraphReport]


def printed(graphs: Graphs, breaks: Sequence[GraphBreak] = ()) -> str:
    """All that is known of the graphs, and of what Dynamo noted besides."""
    rewritten, declined, notes = all_rewritten(graphs), all_declined(graphs), all_notes(graphs)
    parts = ["\n".join([headline(graphs), *(f"  {line}" for line in summary_lines(graphs))])]
    unread = Counter(all_unread(graphs))
    if unread:
        listed = "\n".join(_unread(one, count) for one, count in unread.items())
        parts.append(f"Not analysed\n{listed}")
    if rewritten:
        groups = grouped(rewritten)
        parts.append("Rewritten\n" + _table(groups))
        parts += [_details(group) for group in groups]
    if declined:
        paragraphs = "\n\n".join(_details(group) for group in grouped(declined))
        parts.append(f"Declined\n{paragraphs}")
    if is_empty(graphs):
        parts.append(why_nothing(graphs))
    if rewritten:
        parts.append("After autograd\n" + "\n".join(f"  {line}" for line in fusion_lines(graphs)))
    if len(graphs) > 1:
        parts.append("Graphs\n" + "\n".join(_graph_lines(graphs)))
    ends = list(graph_break_lines(graphs, breaks))
    if ends:
        parts.append("Graph breaks\n" + "\n".join(ends))
    return visible_lines("\n\n".join([*parts, *map(visible, notes)]))


def headline(graphs: Graphs) -> str:
    """The counts, in one line."""
    found = networks(graph.rewritten for graph in graphs)
    declined = networks(graph.declined for graph in graphs)
    return (
        f"{_count(found, 'MH-FFN')} rewritten, {declined} declined, "
        f"in {_count(len(graphs), 'graph')}"
    )


def summary_lines(graphs: Graphs) -> list[str]:
    """What is said below the headline, of all networks together."""
    lines = (coverage_lines, totals_lines, declined_lines, ordinary_lines)
    return [line for each in lines for line in each(graphs)]


def coverage_lines(graphs: Graphs) -> list[str]:
    """Where the rewritten networks are, and of how many layers; a line for each kind."""
    return list(dict.fromkeys(visible(one) for one in coverages(graphs)))


def totals_lines(graphs: Graphs) -> list[str]:
    """What all rewritten networks need together, in one line; none if nothing is known of it."""
    found = totals(graphs)
    parts = []
    if found.hidden_bytes:
        parts.append(f"{scaled(found.hidden_bytes, 'B')} of hidden units not stored")
    if found.kept_bytes:
        parts.append(f"{scaled(found.kept_bytes, 'B')} not kept for the backward pass")
    if found.rewritten is not None and found.original is not None and found.calls:
        parts.append(f"an estimated {_estimate(found.rewritten, found.original)}")
    if found.copied_bytes:
        parts.append(f"{scaled(found.copied_bytes, 'B')} of weights copied")
    large = " (a large number of tokens where it is dynamic)" if found.dynamic else ""
    return [f"in all{large}: {', '.join(parts)}"] if parts else []


def declined_lines(graphs: Graphs) -> list[str]:
    """What the declined networks take as they are, in one line; none if nothing is known of it."""
    found = declined_totals(graphs)
    if not found.calls or found.rewritten is None or found.original is None:
        return []
    every = networks(graph.declined for graph in graphs)
    some = f" ({found.networks} of {every})" if found.networks < every else ""
    return [
        f"declined{some}: an estimated {found.original * 1e3:.3g} ms as they are, "
        f"{found.rewritten * 1e3:.3g} ms as ops"
    ]


def ordinary_lines(graphs: Graphs) -> list[str]:
    """How many ordinary feed-forward networks there are and where, in one line; none if none."""
    found = all_ordinary(graphs)
    if not found:
        return []
    number = _count(networks(graph.ordinary for graph in graphs), "ordinary FFN")
    where = compressed(path for site in found for path in site.modules if path is not None)
    return [visible(f"{number}, left to Inductor{f': {where}' if where else ''}")]


def is_empty(graphs: Graphs) -> bool:
    """Whether nothing in the graphs is worth a word."""
    return not any(g.rewritten or g.declined or g.ordinary or g.notes or g.unread for g in graphs)


def why_nothing(graphs: Graphs) -> str:
    """What was examined, if there is neither a site nor a near-miss."""
    if not graphs:
        return "No graph was compiled: nothing in the call was captured by torch.compile."
    operations = sum(graph.operations for graph in graphs)
    text = (
        f"None of the {operations} operations is the down projection of a feed-forward "
        "network: a matrix product (or a sum of products) of activated hidden units. An MH-FFN "
        "is down(act(gate(q)) * up(q)) or down(act(gate(q))), head by head."
    )
    products = [product for graph in graphs for product in graph.products]
    if not products:
        return text
    lines = [_operation(product) for product in products[:_MOST_PRODUCTS]]
    if len(products) > _MOST_PRODUCTS:
        lines.append(f"and {len(products) - _MOST_PRODUCTS} more")
    listed = "\n".join(f"  {line}" for line in lines)
    return f"{text}\n\nLooked at, as the matrix products that there are\n{listed}"


def fusion_lines(graphs: Graphs) -> list[str]:
    """What the passes after autograd did and declined; equal lines once, with their number."""
    ran = [graph.fusions for graph in graphs if graph.fusions is not None]
    if not ran:
        return [_NOT_RUN]
    found = Counter(line_for_fusion(fusion) for fusions in ran for fusion in fusions)
    return [line if count == 1 else f"{line} ({count} times)" for line, count in found.items()]


def line_for_fusion(fusion: Fusion) -> str:
    """A fusion in one line."""
    return visible(f"{'fused' if fusion.obstacle is None else 'not fused'}: {fusion}")


def line_for(site: SiteReport) -> str:
    """A site in one line, for logs."""
    where = f"{site.location or 'unknown source'}{f' in {site.module}' if site.module else ''}"
    if site.reason is None:
        return visible(f"rewritten: {where}: {site.sizes}")
    return visible(f"declined: {where}: {site.reason.kind.name}: {site.reason}")


def details(site: SiteReport) -> str:
    """A site's paragraph."""
    return _details(Group(site, (site.module,)))


# Paragraphs.


def _details(group: Group) -> str:
    site = group.first
    where = site.location
    lines = [f"  {visible(where or 'unknown source')}"]
    if where is not None and where.code:
        lines.append(f"      {visible(where.code)}")
    listed = rows(group)
    wide = max((len(name) for name, _ in listed), default=0)
    for name, text in listed:
        whole = name in _WHOLE
        width = _WIDTH - wide - 8
        first, *others = [text] if whole else textwrap.wrap(text, width, break_on_hyphens=False)
        lines.append(f"    {name.ljust(wide)}  {first}".rstrip())
        lines += [f"    {' ' * wide}  {other}" for other in others]
    return "\n".join(lines)


def rows(group: Group) -> list[tuple[str, str]]:
    """All that is known of the sites of a group, as pairs of a name and a text."""
    site = group.first
    described = _rows(site, each=len(group.modules) > 1)
    found = described if site.reason is None else [*_why(site), *described]
    if group.where:
        kind = f" ({site.module_class})" if site.module_class else ""
        found = [("module", f"{group.where}{kind}"), *found]
    if len(group.paths) > 1:
        found.append(("modules", ", ".join(group.paths)))
    return [(name, visible(text)) for name, text in found]


def _why(site: SiteReport) -> list[tuple[str, str]]:
    assert site.reason is not None
    rows = [("why", str(site.reason))]
    if site.operation is not None:
        rows.append(("operation", _operation(site.operation)))
    return [*rows, ("what to do", site.reason.kind.remedy)]


def _rows(site: SiteReport, each: bool) -> list[tuple[str, str]]:
    """What is known of a site; figures are for ``each`` of several."""
    rows = [] if site.formula is None else [("formula", site.formula)]
    for argument in site.arguments:
        shape = ", ".join(map(str, argument.shape))
        rows.append((argument.role, f"{argument.name}{argument.part}  ({shape}) {argument.dtype}"))
    if site.lowered:
        rows.append(("lowered to", "; ".join(site.lowered)))
    one = "each " if each else ""
    if site.work is not None:
        left = site.reason is not None
        rows.append(("work", f"{one}{_work(site.work, left)}"))
        if site.work.original is not None and site.work.rewritten is not None:
            estimate = _estimate(site.work.rewritten, site.work.original)
            rows.append(("estimate", f"{one}{'would take ' if left else ''}{estimate}"))
    copied = [argument for argument in site.arguments if argument.copied_bytes]
    if copied:
        rows.append(("copied", f"{one}{_copied(copied)}"))
    return rows


def _copied(arguments: Sequence[Argument]) -> str:
    """What is copied at each call, and how to avoid it."""
    parts = [
        f"{one.role} from {len(one.tensors)} tensors ({scaled(one.copied_bytes, 'B')})"
        for one in arguments
    ]
    shape = ", ".join(map(str, arguments[0].shape))
    return (
        f"{', '.join(parts)}, at every call; to avoid it, keep them in one parameter, such as of "
        f"shape ({shape})"
    )


def _operation(operation: Operation) -> str:
    where = f"{operation.location}: " if operation.location is not None else ""
    return visible(f"{where}{operation.call}")


def _work(work: Work, left: bool) -> str:
    """What a network computes; ``left`` as it is, what the op would not store."""
    tokens = f"for {work.tokens} tokens (dynamic)" if work.dynamic else f"for {work.tokens} tokens"
    kept = f", {scaled(work.kept_bytes, 'B')} not kept for the backward pass"
    kept = kept if work.kept_bytes else ""
    stored = "would not be stored" if left else "are not stored"
    return (
        f"{scaled(work.flops, 'FLOP')} and {scaled(work.bytes, 'B')} forward {tokens}; "
        f"{scaled(work.hidden_bytes, 'B')} of hidden units {stored}{kept}"
    )


def _estimate(rewritten: float, original: float) -> str:
    saving = 1 - rewritten / original
    change = f"{saving:.0%} less" if saving >= 0 else f"{-saving:.0%} more"
    return f"{rewritten * 1e3:.3g} ms instead of {original * 1e3:.3g} ms ({change})"


def scaled(number: float, unit: str) -> str:
    """A number with a prefix: ``scaled(1.5e9, "FLOP")`` is ``"1.5 GFLOP"``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"


def _unread(unread: UnreadGraph, count: int) -> str:
    where = f"{unread.location or 'unknown source'}{f' ({count} times)' if count > 1 else ''}"
    why, remedy = str(unread.reason), unread.reason.kind.remedy
    return f"  {where}\n    why         {why}\n    what to do  {remedy}"


def _graph_lines(graphs: Graphs) -> Iterator[str]:
    """Which networks each graph has, and how often it is called."""
    for position, graph in enumerate(graphs):
        kinds = ((graph.rewritten, "rewritten"), (graph.declined, "declined"))
        parts = [f"{_networks_of(sites)} {what}" for sites, what in kinds if sites]
        often = "once" if graph.calls == 1 else f"{graph.calls} times"
        often = f", called {often}" if graph.calls else ""
        yield visible(f"  graph {position}: {'; '.join(parts) or 'no network'}{often}")


def _networks_of(sites: Sequence[SiteReport]) -> str:
    """The modules of some networks, and their number where the names do not show it."""
    number = _count(networks([sites]), "MH-FFN")
    named = [path for site in sites for path in site.modules if path]
    if not named:
        return number
    hidden = any(len({*site.networks}) > len({*site.modules}) for site in sites)
    return f"{compressed(named)} ({number})" if hidden else compressed(named)


def graph_break_lines(graphs: Graphs, breaks: Sequence[GraphBreak]) -> Iterator[str]:
    """Where and why graphs end, and what Dynamo leaves to Python."""
    for one in breaks:
        start = f"{one.skipped} is left to Python" if one.skipped else "before the first operation"
        yield from _graph_break(start, one)
        if one.skipped:
            yield "      What it calls is compiled call by call, as a graph cannot end in a loop."
    for position, graph in enumerate(graphs):
        if graph.graph_break is not None:
            yield from _graph_break(f"after graph {position}", graph.graph_break)


def _graph_break(start: str, one: GraphBreak) -> Iterator[str]:
    first, *others = one.reason.splitlines() or [""]
    yield f"  {start}, at {visible(one.location or 'unknown source')}: {first}"
    yield from (f"      {line.strip()}" for line in others)


# The table.

_COLUMNS: dict[str, Callable[[Group], object]] = {
    "site": lambda group: group.numbered,
    "source": lambda group: group.first.location or "unknown",
    "module": lambda group: group.where,
    "heads": lambda group: _heads(group.first),
    "head dim": lambda group: group.first.head_dim,
    "sub-networks": lambda group: f"{group.first.sub_networks} x {group.first.hidden}",
    "hidden units": lambda group: _hidden_units(group.first),
    "router": lambda group: "yes" if group.first.routed else "no",
}


def _heads(site: SiteReport) -> str:
    return str(site.heads) if site.heads == site.groups else f"{site.heads} ({site.groups} groups)"


def _hidden_units(site: SiteReport) -> str:
    return f"{site.activation}(gate) * up" if site.gated else str(site.activation)


def cells(groups: Sequence[Group]) -> list[list[str]]:
    """The rewritten sites as the rows of a table, header first."""
    header = [*_COLUMNS]
    return [header, *([visible(cell(group)) for cell in _COLUMNS.values()] for group in groups)]


def _table(groups: Sequence[Group]) -> str:
    rows = cells(groups)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
