"""``Report``: all graphs of one call of a model, and the ways to show them.

It uses the renderers, which take the graphs alone: ``text.py``, ``page.py`` (HTML) and
``dot.py`` (pictures).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from ..passes.outcome import Obstacle
from ..patterns import Reason
from .context import Context
from .dot import draw
from .groups import coverages
from .page import notebook, page
from .paths import Coverage
from .text import headline, printed
from .totals import Totals, totals
from .values import (
    GraphBreak,
    GraphReport,
    SiteReport,
    UnreadGraph,
    all_declined,
    all_ordinary,
    all_rewritten,
    all_unread,
)

SCHEMA = 1  # version of to_dict: raised when a key disappears or changes its meaning


@dataclass
class Report:
    """What the back end does with a model; ``print`` shows it as text.

    Attributes:
        graphs: one entry for each graph, in the order of compilation.
        breaks: what Dynamo noted besides the ends of graphs: functions that it leaves to Python,
            and breaks before the first operation.
        context: the model, its inputs, the machine and the versions; None if nothing is known.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    context: Context | None = None

    @property
    def rewritten(self) -> list[SiteReport]:
        """The MH-FFNs that are replaced, in all graphs."""
        return all_rewritten(self.graphs)

    @property
    def declined(self) -> list[SiteReport]:
        """The near-misses of all graphs, each with its reason."""
        return all_declined(self.graphs)

    @property
    def ordinary(self) -> list[SiteReport]:
        """The feed-forward networks of one head and one sub-network, which are left to Inductor."""
        return all_ordinary(self.graphs)

    @property
    def unread(self) -> list[UnreadGraph]:
        """What was not analysed, each with its reason."""
        return all_unread(self.graphs)

    @property
    def graph_breaks(self) -> list[GraphBreak]:
        """The ends of graphs before the end of the model, and what else Dynamo noted."""
        ends = [graph.graph_break for graph in self.graphs if graph.graph_break is not None]
        return [*self.breaks, *ends]

    @property
    def coverage(self) -> list[Coverage]:
        """Which modules have rewritten networks, and of how many; each prints as one sentence."""
        return coverages(self.graphs)

    @property
    def totals(self) -> Totals:
        """What all rewritten networks need together, in one call of the model."""
        return totals(self.graphs)

    @property
    def graph_before(self) -> str:
        """The graphs as Dynamo gave them, as readable code."""
        return "\n\n".join(graph.before for graph in self.graphs)

    @property
    def graph_after(self) -> str:
        """The graphs as they are passed to the compiler, as readable code."""
        return "\n\n".join(graph.after for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, numbers and strings; docs/report.md lists the keys."""
        return {"schema": SCHEMA, **plain(self)}

    def to_json(self, path: str | PathLike[str] | None = None, *, indent: int | None = 2) -> str:
        """``to_dict`` as JSON, which is also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=indent)
        if path is not None:
            Path(path).write_text(f"{text}\n")
        return text

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML page that needs neither network nor server."""
        Path(path).write_text(page(self.graphs, self.breaks, self.context))

    def draw(self, path: str | PathLike[str], site: int | None = None) -> None:
        """Draw sites before and after, and near-misses.

        Args:
            path: the file, whose name ends in ``.svg``, ``.png``, ``.pdf`` or ``.dot``.
            site: one site alone, by its place in ``rewritten``; all that there is by default.

        Raises:
            DrawingError: another format, no such site, nothing to draw, or no ``dot`` program; what
                that would draw is then in the file of the same name that ends in ``.dot``.
        """
        draw(self.graphs, Path(path), site)

    def __str__(self) -> str:
        return printed(self.graphs, self.breaks)

    def __repr__(self) -> str:
        return f"<Report: {headline(self.graphs)}>"

    def _repr_html_(self) -> str:
        return notebook(self.graphs, self.breaks)


def plain(value: Any) -> Any:
    """A value for JSON: dataclasses as dicts of their fields, reasons in words."""
    if isinstance(value, Obstacle):
        return {"kind": value.name, "sentence": value.sentence}
    if isinstance(value, Reason):
        kind = value.kind
        words = {"sentence": kind.sentence, "detail": value.detail, "remedy": kind.remedy}
        return {"kind": kind.name, **words}
    if is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    return value.name if isinstance(value, Enum) else value
