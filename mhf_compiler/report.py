"""Reports: what was rewritten, what was not and why, in a form to print and to test against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .patterns import Location, NearMiss, Reason, Site


@dataclass(frozen=True)
class SiteReport:
    """One MH-FFN, or one near-miss. Sizes of a near-miss are None where they are not known.

    Attributes:
        heads: H.
        kuv_heads: heads that have weights of their own; the others share (G).
        head_dim: width of a head (d).
        experts: sub-networks per head (E).
        expert_dim: hidden units of a sub-network (f).
        activation: its name.
        gated: whether the hidden units are act(gate) * up.
        has_gate: whether sub-networks are weighted per token.
        location: the line of the model's source that it comes from.
        reason: why it was declined; None when it was rewritten.
    """

    heads: int | None = None
    kuv_heads: int | None = None
    head_dim: int | None = None
    experts: int | None = None
    expert_dim: int | None = None
    activation: str | None = None
    gated: bool | None = None
    has_gate: bool | None = None
    location: Location | None = None
    reason: Reason | None = None

    def __str__(self) -> str:
        sizes = "sizes unknown"
        if self.heads is not None:
            shared = f" ({self.kuv_heads} with weights)" if self.kuv_heads != self.heads else ""
            sizes = (
                f"{self.heads} heads{shared} of width {self.head_dim}, "
                f"{self.experts} x {self.expert_dim} hidden units, {self.activation}"
            )
        return f"{self.location or 'unknown source'}: {sizes}"


@dataclass
class GraphReport:
    """What happened to one graph."""

    before: str
    after: str
    operations: int = 0
    looked_at: int = 0  # contractions of something activated
    rewritten: list[SiteReport] = field(default_factory=list)
    declined: list[SiteReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What the back end does with a model: one entry a graph, in the order of compilation."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def rewritten(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph.rewritten]

    @property
    def declined(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph.declined]

    @property
    def graph_before(self) -> str:
        """The graphs as Dynamo gave them, as readable code."""
        return "\n\n".join(graph.before for graph in self.graphs)

    @property
    def graph_after(self) -> str:
        """The graphs as they go on to the compiler, as readable code."""
        return "\n\n".join(graph.after for graph in self.graphs)

    def __str__(self) -> str:
        counts = (
            f"{_count(self.rewritten, 'MH-FFN')} rewritten, {len(self.declined)} declined, "
            f"in {_count(self.graphs, 'graph')}"
        )
        parts = [counts]
        if self.rewritten:
            parts.append("Rewritten\n" + _table(self.rewritten, _SITE_COLUMNS))
        if self.declined:
            parts.append("Declined\n" + _table(self.declined, _DECLINED_COLUMNS))
        notes = [note for graph in self.graphs for note in graph.notes]
        if not self.rewritten and not self.declined:
            notes.append(self._why_nothing())
        return "\n\n".join([*parts, *notes])

    def _why_nothing(self) -> str:
        if not self.graphs:
            return "No graph was compiled: nothing in the call was captured by torch.compile."
        operations = sum(graph.operations for graph in self.graphs)
        return (
            f"None of the {operations} operations is the down projection of a feed-forward "
            "network: a matrix product (or a sum of products) of activated hidden units. An MH-FFN "
            "is down(act(gate(q)) * up(q)) or down(act(gate(q))), head by head."
        )


def site_report(site: Site, reason: Reason | None = None) -> SiteReport:
    return SiteReport(
        heads=site.heads,
        kuv_heads=site.kuv_heads,
        head_dim=site.head_dim,
        experts=site.experts,
        expert_dim=site.expert_dim,
        activation=site.activation,
        gated=site.gated,
        has_gate=site.has_gate,
        location=site.location,
        reason=reason,
    )


def near_miss_report(miss: NearMiss) -> SiteReport:
    return SiteReport(location=miss.location, reason=miss.reason)


_Columns = dict[str, Callable[[SiteReport], object]]

_SITE_COLUMNS: _Columns = {
    "source": lambda site: site.location or "unknown",
    "heads": lambda site: (
        site.heads if site.heads == site.kuv_heads else f"{site.heads} ({site.kuv_heads} kuv)"
    ),
    "width": lambda site: site.head_dim,
    "sub-networks": lambda site: f"{site.experts} x {site.expert_dim}",
    "hidden units": lambda site: f"{site.activation}(gate) * up" if site.gated else site.activation,
    "router": lambda site: "yes" if site.has_gate else "no",
}
_DECLINED_COLUMNS: _Columns = {
    "source": lambda site: site.location or "unknown",
    "why": lambda site: site.reason,
    "what to do": lambda site: "" if site.reason is None else site.reason.kind.remedy,
}


def _table(sites: Sequence[SiteReport], columns: _Columns) -> str:
    rows = [list(columns), *([str(cell(site)) for cell in columns.values()] for site in sites)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
