"""Reports: what was rewritten, what was not and why, as plain values.

    Report                 all graphs of one call of the model
      GraphReport          one graph: its code before and after, its sites
        SiteReport         one MH-FFN that was rewritten, or one near-miss
          Argument         a tensor of the formula, by the model's own name for it
          Operation        the operation that decided a near-miss
          RegionNode       one operation of what is drawn
          Work             arithmetic, bytes and estimated times
        GraphBreak         why Dynamo ended the graph

``describing.py`` makes these values from a graph, ``printing.py`` shows them as text, ``page.py``
as HTML, ``drawing.py`` as pictures. No value here refers to a graph, so a report may be kept,
compared and written to a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from .patterns import Location, Reason

SCHEMA = 1  # of to_dict: raised when a key goes or changes its meaning


@dataclass(frozen=True)
class Argument:
    """One tensor of a formula.

    Attributes:
        role: its letter in the formula: Q, K, U, V, R, a bias or the residual.
        name: what the model calls it; a computed value by the name of its variable.
        shape: of the op's argument; dynamic sizes by the names of their symbols.
        dtype: of the tensor in the model, such as ``"float32"``.
        location: where it is computed; None for parameters and inputs.
    """

    role: str
    name: str
    shape: tuple[int | str, ...]
    dtype: str
    location: Location | None = None


@dataclass(frozen=True)
class Operation:
    """One operation of a graph.

    Attributes:
        name: of the node.
        call: the operation with its arguments.
        location: its source line.
        module: path of the innermost module around it.
    """

    name: str
    call: str
    location: Location | None = None
    module: str | None = None


@dataclass(frozen=True)
class RegionNode:
    """One operation, or one argument, of a region.

    Attributes:
        name: of the node.
        call: the operation; of an argument, what the model calls it.
        role: its letter in the formula, ``"out"``, ``"offends"`` for what decided a near-miss, or
            None for what lies between.
        inputs: names of the nodes that it reads.
    """

    name: str
    call: str
    role: str | None
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What one call costs.

    Attributes:
        tokens: the number that the figures are for.
        dynamic: whether the model leaves that number open; then ``tokens`` is a large one.
        flops: of the products of the forward pass, padding not counted.
        bytes: of the op's arguments and result, each counted once.
        hidden_bytes: of the hidden units, which the op does not keep in memory.
        rewritten: estimated seconds as one op, with the backward pass if gradients are recorded;
            None where the device is unknown.
        original: estimated seconds in the original spelling.
    """

    tokens: int
    dynamic: bool
    flops: float
    bytes: float
    hidden_bytes: float
    rewritten: float | None = None
    original: float | None = None


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph before the end of the model.

    Attributes:
        reason: Dynamo's own words.
        location: the source line.
    """

    reason: str
    location: Location | None = None


@dataclass(frozen=True)
class SiteReport:
    """One MH-FFN, or one near-miss. What is not known of a near-miss is None, or empty.

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
        module: path of the innermost module that holds all of it, such as ``"layers.0.ffn"``.
        module_class: the name of that module's class.
        formula: what was matched, over the roles of ``arguments``.
        arguments: the tensors of the formula.
        lowered: what runs instead, a sentence each.
        work: arithmetic, bytes and estimated times.
        operation: what decided that it was declined.
        region: the graph that the op takes the place of, empty where it is too large to be read;
            of a near-miss, what is around the operation that decided it.
        scales: of the gate, the up projection and the output.
        device: that it runs on.
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
    module: str | None = None
    module_class: str | None = None
    formula: str | None = None
    arguments: tuple[Argument, ...] = ()
    lowered: tuple[str, ...] = ()
    work: Work | None = None
    operation: Operation | None = None
    region: tuple[RegionNode, ...] = ()
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    device: str | None = None

    @property
    def place(self) -> str:
        """Its name: the module, and the line of the source."""
        return f"{self.module or 'the model'} at {self.location or 'unknown source'}"

    @property
    def sizes(self) -> str:
        """Its heads and sub-networks in a few words."""
        if self.heads is None:
            return "sizes unknown"
        shared = f" ({self.kuv_heads} with weights)" if self.kuv_heads != self.heads else ""
        return (
            f"{self.heads} heads{shared} of width {self.head_dim}, "
            f"{self.experts} x {self.expert_dim} hidden units, {self.activation}"
        )

    def __str__(self) -> str:
        return f"{self.location or 'unknown source'}: {self.sizes}"


@dataclass
class GraphReport:
    """What happened to one graph.

    Attributes:
        before: the graph as Dynamo gave it, as readable code.
        after: the graph as it goes on to the compiler.
        operations: how many nodes it had.
        looked_at: possible down projections: matrix products of something activated.
        rewritten: the MH-FFNs that were replaced.
        declined: the near-misses, each with its reason.
        notes: what else there is to say, a sentence each.
        products: all its matrix products, if none of them belongs to a site or a near-miss.
        graph_break: why it ended, unless it ends with the model.
    """

    before: str
    after: str
    operations: int = 0
    looked_at: int = 0
    rewritten: list[SiteReport] = field(default_factory=list)
    declined: list[SiteReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    products: list[Operation] = field(default_factory=list)
    graph_break: GraphBreak | None = None


@dataclass
class Report:
    """What the back end does with a model. Printed, it is a text to be read.

    Attributes:
        graphs: one entry for each graph, in the order of compilation.
    """

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def rewritten(self) -> list[SiteReport]:
        """The MH-FFNs that are replaced, of all graphs."""
        return [site for graph in self.graphs for site in graph.rewritten]

    @property
    def declined(self) -> list[SiteReport]:
        """The near-misses of all graphs, each with its reason."""
        return [site for graph in self.graphs for site in graph.declined]

    @property
    def graph_breaks(self) -> list[GraphBreak]:
        """Where a graph ended before the end of the model."""
        return [graph.graph_break for graph in self.graphs if graph.graph_break is not None]

    @property
    def graph_before(self) -> str:
        """The graphs as Dynamo gave them, as readable code."""
        return "\n\n".join(graph.before for graph in self.graphs)

    @property
    def graph_after(self) -> str:
        """The graphs as they go on to the compiler, as readable code."""
        return "\n\n".join(graph.after for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, numbers and strings; docs/report.md lists the keys."""
        return {"schema": SCHEMA, **_plain(self)}

    def to_json(self, path: str | PathLike[str] | None = None, *, indent: int | None = 2) -> str:
        """``to_dict`` as JSON; also written to ``path`` if that is given."""
        text = json.dumps(self.to_dict(), indent=indent)
        if path is not None:
            Path(path).write_text(f"{text}\n")
        return text

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one page that needs neither network nor server."""
        from .page import page

        Path(path).write_text(page(self))

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw sites before and after, and near-misses: ``.svg``, ``.png``, ``.pdf`` or ``.dot``.

        Raises:
            DrawingError: another format, nothing to draw, or no ``dot`` program.
        """
        from .drawing import draw

        draw(self, Path(path))

    def __str__(self) -> str:
        from .printing import printed

        return printed(self)

    def __repr__(self) -> str:
        from .printing import headline

        return f"<Report: {headline(self)}>"

    def _repr_html_(self) -> str:
        from .page import notebook

        return notebook(self)


def _plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses by field, reasons in words."""
    if isinstance(value, Reason):
        kind = value.kind
        words = {"sentence": kind.sentence, "detail": value.detail, "remedy": kind.remedy}
        return {"kind": kind.name, **words}
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value.name if isinstance(value, Enum) else value
