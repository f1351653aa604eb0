"""Reports as text: a headline, a table of what was rewritten, and a paragraph for each site.

Sites that come from one line and differ in their modules only, as the layers of a tower do, share a
row and a paragraph.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .report import Operation, Report, SiteReport, Work

_WIDTH = 100
_MOST_PRODUCTS = 12
_MOST_NUMBERS = 4
_WHOLE = ("why", "operation", "what to do")  # never wrapped, to be searched for
_ACTIVATIONS = ("Q", "R", "X")  # their names are numbered by the graph


def printed(report: Report) -> str:
    """The whole report."""
    parts = [headline(report)]
    if report.rewritten:
        groups = grouped(report.rewritten)
        parts.append("Rewritten\n" + _table(groups))
        parts += [_details(group) for group in groups]
    if report.declined:
        declined = "\n\n".join(_details(group) for group in grouped(report.declined))
        parts.append(f"Declined\n{declined}")
    notes = [note for graph in report.graphs for note in graph.notes]
    if not report.rewritten and not report.declined and not notes:
        parts.append(why_nothing(report))
    if report.graph_breaks:
        parts.append("Graph breaks\n" + "\n".join(_graph_breaks(report)))
    return "\n\n".join([*parts, *notes])


def headline(report: Report) -> str:
    return (
        f"{_count(report.rewritten, 'MH-FFN')} rewritten, {len(report.declined)} declined, "
        f"in {_count(report.graphs, 'graph')}"
    )


def why_nothing(report: Report) -> str:
    """What was looked at, where there is neither a site nor a near-miss."""
    if not report.graphs:
        return "No graph was compiled: nothing in the call was captured by torch.compile."
    operations = sum(graph.operations for graph in report.graphs)
    text = (
        f"None of the {operations} operations is the down projection of a feed-forward "
        "network: a matrix product (or a sum of products) of activated hidden units. An MH-FFN "
        "is down(act(gate(q)) * up(q)) or down(act(gate(q))), head by head."
    )
    products = [product for graph in report.graphs for product in graph.products]
    if not products:
        return text
    lines = [_operation(product) for product in products[:_MOST_PRODUCTS]]
    if len(products) > _MOST_PRODUCTS:
        lines.append(f"and {len(products) - _MOST_PRODUCTS} more")
    listed = "\n".join(f"  {line}" for line in lines)
    return f"{text}\n\nLooked at, as the matrix products that there are\n{listed}"


def line_for(site: SiteReport) -> str:
    """A site in one line, for logs."""
    where = f"{site.location or 'unknown source'}{f' in {site.module}' if site.module else ''}"
    if site.reason is None:
        return f"rewritten: {where}: {site.sizes}"
    return f"declined: {where}: {site.reason.kind.name}: {site.reason}"


def details(site: SiteReport) -> str:
    """A site's paragraph."""
    return _details(Group(site, (site.module,)))


# Groups of sites.


@dataclass(frozen=True)
class Group:
    """Sites that are equal but for the module that they belong to."""

    first: SiteReport
    modules: tuple[str | None, ...]
    numbers: tuple[int, ...] = ()  # in the list that they were grouped from

    @property
    def numbered(self) -> str:
        """Their numbers; many in a row as a range."""
        first, last = self.numbers[0], self.numbers[-1]
        if last - first + 1 == len(self.numbers) > 2:
            return f"{first}-{last}"
        shown = ", ".join(map(str, self.numbers[:_MOST_NUMBERS]))
        more = len(self.numbers) - _MOST_NUMBERS
        return f"{shown} and {more} more" if more > 0 else shown

    @property
    def where(self) -> str:
        """The modules, as many as are worth reading."""
        others = len(self.modules) - 1
        if self.first.module is None:
            return f"{others + 1} times" if others else ""
        return f"{self.first.module} and {others} more" if others else self.first.module


def grouped(sites: Sequence[SiteReport]) -> list[Group]:
    """Equal sites together, in the order in which they were found."""
    found: dict[object, list[int]] = {}
    for number, site in enumerate(sites):
        found.setdefault(_without_module(site), []).append(number)
    return [
        Group(sites[same[0]], tuple(sites[number].module for number in same), tuple(same))
        for same in found.values()
    ]


def _without_module(site: SiteReport) -> SiteReport:
    """The site as all instances of its class see it."""
    prefix = f"{site.module}."
    arguments = tuple(
        replace(argument, name=argument.name.replace(prefix, ""))
        for argument in site.arguments
        if argument.role not in _ACTIVATIONS
    )
    return replace(site, module=None, arguments=arguments, operation=None, region=())


# Paragraphs.


def _details(group: Group) -> str:
    site = group.first
    where = site.location
    lines = [f"  {where or 'unknown source'}"]
    if where is not None and where.code:
        lines.append(f"      {where.code}")
    listed = rows(group)
    wide = max((len(name) for name, _ in listed), default=0)
    for name, text in listed:
        whole = name in _WHOLE
        first, *others = [text] if whole else textwrap.wrap(text, _WIDTH - wide - 8)
        lines.append(f"    {name.ljust(wide)}  {first}".rstrip())
        lines += [f"    {' ' * wide}  {other}" for other in others]
    return "\n".join(lines)


def rows(group: Group) -> list[tuple[str, str]]:
    """All that is known of the sites of a group, a name and a text each."""
    site = group.first
    found = _rows(site) if site.reason is None else [*_why(site), *_rows(site)]
    if group.where:
        named = f"{group.where} ({site.module_class})" if site.module_class else group.where
        found = [("module", named), *found]
    return found


def _why(site: SiteReport) -> list[tuple[str, str]]:
    assert site.reason is not None
    rows = [("why", str(site.reason))]
    if site.operation is not None:
        rows.append(("operation", _operation(site.operation)))
    return [*rows, ("what to do", site.reason.kind.remedy)]


def _rows(site: SiteReport) -> list[tuple[str, str]]:
    rows = [] if site.formula is None else [("formula", site.formula)]
    for argument in site.arguments:
        shape = ", ".join(map(str, argument.shape))
        rows.append((argument.role, f"{argument.name}  ({shape}) {argument.dtype}"))
    if site.lowered:
        rows.append(("lowered to", "; ".join(site.lowered)))
    if site.work is not None:
        rows.append(("work", _work(site.work)))
        if site.work.original is not None and site.work.rewritten is not None:
            rows.append(("estimate", _estimate(site.work.rewritten, site.work.original)))
    return rows


def _operation(operation: Operation) -> str:
    where = f"{operation.location}: " if operation.location is not None else ""
    return f"{where}{operation.call}"


def _work(work: Work) -> str:
    tokens = f"for {work.tokens} tokens (dynamic)" if work.dynamic else f"for {work.tokens} tokens"
    return (
        f"{scaled(work.flops, 'FLOP')} and {scaled(work.bytes, 'B')} forward {tokens}; "
        f"{scaled(work.hidden_bytes, 'B')} of hidden units are not kept in memory"
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


def _graph_breaks(report: Report) -> Iterator[str]:
    for position, graph in enumerate(report.graphs):
        if graph.graph_break is not None:
            where = graph.graph_break.location or "unknown source"
            reason = graph.graph_break.reason.splitlines()
            yield f"  after graph {position}, at {where}: {reason[0]}"
            yield from (f"      {line.strip()}" for line in reason[1:])


# The table.

_COLUMNS: dict[str, Callable[[Group], object]] = {
    "site": lambda group: group.numbered,
    "source": lambda group: group.first.location or "unknown",
    "module": lambda group: group.where,
    "heads": lambda group: _heads(group.first),
    "width": lambda group: group.first.head_dim,
    "sub-networks": lambda group: f"{group.first.experts} x {group.first.expert_dim}",
    "hidden units": lambda group: _hidden_units(group.first),
    "router": lambda group: "yes" if group.first.has_gate else "no",
}


def _heads(site: SiteReport) -> str:
    return (
        str(site.heads) if site.heads == site.kuv_heads else f"{site.heads} ({site.kuv_heads} kuv)"
    )


def _hidden_units(site: SiteReport) -> str:
    return f"{site.activation}(gate) * up" if site.gated else str(site.activation)


def cells(groups: Sequence[Group]) -> list[list[str]]:
    """What was rewritten, as the rows of a table, its header first."""
    header = [*_COLUMNS]
    return [header, *([str(cell(group)) for cell in _COLUMNS.values()] for group in groups)]


def _table(groups: Sequence[Group]) -> str:
    rows = cells(groups)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
