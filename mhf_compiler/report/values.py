"""What a report holds, as plain values.

    GraphReport          one graph: its code before and after, its sites
      Module             a module whose operations are in it
      Fusion             what a pass after autograd did at one place, or why not (passes/outcome.py)
      SiteReport         one MH-FFN that was rewritten, or one near-miss
        Argument         a tensor of the formula, by the model's own name for it
        Operation        the operation that decided a near-miss
        RegionNode       one operation of a picture
        Work             arithmetic, bytes and estimated times
      UnreadGraph        why it was not analysed
  GraphBreak           why Dynamo ended a graph, or left a function to Python

No value refers to a graph, so a report can be kept, compared and written to a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..passes.outcome import Fusion
from ..patterns import Location, Reason

#: role of a node that stands for the rounds of a loop between the first and the last
ALIKE = "alike"


@dataclass(frozen=True)
class Argument:
    """One tensor of a formula.

    Attributes:
        role: its letter in the formula: Q, K, U, V, R, a bias or the residual.
        name: what the model calls it; a computed value by the name of its variable.
        shape: shape of the op's argument; a dynamic size is the name of its symbol.
        dtype: of the tensor in the model, such as ``"float32"``.
        location: where it is computed; None for parameters and inputs.
        tensors: the names of the tensors that it is read from; several if it is stacked.
        part: which part of its tensor it is, as Python writes slices, such as ``"[:, 0:64]"``;
            empty for all of it, and where it is no slice.
        copied_bytes: of the weights that each call copies to stack them; 0 for what is one tensor.
    """

    role: str
    name: str
    shape: tuple[int | str, ...]
    dtype: str
    location: Location | None = None
    tensors: tuple[str, ...] = ()
    part: str = ""
    copied_bytes: float = 0.0


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
        role: its letter in the formula (several of a packed weight, with commas between them),
            ``"out"``, ``"offends"`` for the operation that decided a near-miss, ``"alike"`` for
            rounds of a loop that are not shown one by one, or None for an operation in between.
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
        dynamic: whether that number is dynamic; then ``tokens`` is a large example.
        flops: of the products of the forward pass, without padding.
        bytes: of the op's arguments and result, each counted once.
        hidden_bytes: of the hidden units, which the op does not store.
        kept_bytes: of what the original keeps of them for the backward pass, gate and up before
            the activation; 0 where no gradients are recorded.
        rewritten: estimated seconds as one op, including the backward pass if gradients are
            recorded; None for an unknown device.
        original: estimated seconds in the original spelling.
    """

    tokens: int
    dynamic: bool
    flops: float
    bytes: float
    hidden_bytes: float
    kept_bytes: float = 0.0
    rewritten: float | None = None
    original: float | None = None


@dataclass(frozen=True)
class Module:
    """A module of the model whose operations are in a graph.

    Attributes:
        path: its path in the model, such as ``"layers.0.ffn"``.
        module_class: its class name.
    """

    path: str
    module_class: str


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph before the end of the model.

    Attributes:
        reason: Dynamo's own words.
        location: the source line.
        skipped: the function that Dynamo leaves to Python as a whole, as it does where a loop is
            cut: what it calls is compiled call by call. None if the code is cut at this line.
    """

    reason: str
    location: Location | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class SiteReport:
    """One MH-FFN, or one near-miss, whose unknown attributes are None or empty.

    Attributes:
        heads: number of heads (H).
        groups: number of groups of heads that share weights (G); H where none are shared.
        head_dim: width of a head (d).
        sub_networks: sub-networks per head (E).
        hidden: hidden units of a sub-network (f).
        activation: name of the activation.
        gated: whether the hidden units are act(gate) * up.
        routed: whether sub-networks are weighted per token.
        location: source line in the model.
        reason: why it was declined; None if it was rewritten.
        module: path of the innermost module that contains all of it, such as ``"layers.0.ffn"``.
        module_class: class name of that module.
        runs: that module at each call of the graph, which several modules of one class may share;
            empty if the calls were not followed.
        networks: of a compilation, the number of the network of each of ``runs``: the same in all
            graphs that were called with its parameters. Empty where they were not followed.
        formula: what was matched, over the roles of ``arguments``.
        arguments: the tensors of the formula.
        lowered: what runs instead, one sentence each.
        work: arithmetic, bytes and estimated times.
        operation: the operation for which it was declined.
        region: the operations that the op replaces, empty if they are too many to read; of a
            near-miss, the operations around the one that decided it.
        scales: scales of the gate, the up projection and the output.
        device: device that it runs on.
    """

    heads: int | None = None
    groups: int | None = None
    head_dim: int | None = None
    sub_networks: int | None = None
    hidden: int | None = None
    activation: str | None = None
    gated: bool | None = None
    routed: bool | None = None
    location: Location | None = None
    reason: Reason | None = None
    module: str | None = None
    module_class: str | None = None
    runs: tuple[str | None, ...] = ()
    networks: tuple[int, ...] = ()
    formula: str | None = None
    arguments: tuple[Argument, ...] = ()
    lowered: tuple[str, ...] = ()
    work: Work | None = None
    operation: Operation | None = None
    region: tuple[RegionNode, ...] = ()
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    device: str | None = None

    @property
    def modules(self) -> tuple[str | None, ...]:
        """The module at each call of the graph; one if the calls were not followed."""
        return self.runs or (self.module,)

    @property
    def called(self) -> list[tuple[str | None, int | None]]:
        """The module at each call of the graph, and the number of its network if it is known."""
        numbers = self.networks or (None,) * len(self.modules)
        return [*zip(self.modules, numbers, strict=True)]

    @property
    def place(self) -> str:
        """Its name: the module, and the line of the source."""
        return f"{self.module or 'the model'} at {self.location or 'unknown source'}"

    @property
    def sizes(self) -> str:
        """Its heads and sub-networks in a few words."""
        if self.heads is None:
            return "sizes unknown"
        shared = f" in {self.groups} groups" if self.groups != self.heads else ""
        return (
            f"{self.heads} heads{shared} of width {self.head_dim}, "
            f"{self.sub_networks} x {self.hidden} hidden units, {self.activation}"
        )

    def __str__(self) -> str:
        return f"{self.location or 'unknown source'}: {self.sizes}"


@dataclass(frozen=True)
class UnreadGraph:
    """A graph, or a graph inside of another, that was not analysed.

    Attributes:
        reason: why not.
        location: the source line that is to blame, where one is.
    """

    reason: Reason
    location: Location | None = None

    def __str__(self) -> str:
        where = "" if self.location is None else f" at {self.location}"
        return f"a graph was not analysed{where}: {self.reason.kind.name}: {self.reason}"


@dataclass
class GraphReport:
    """What happened to one graph.

    Attributes:
        before: the graph as Dynamo gave it, as readable code.
        after: the graph as it goes on to the compiler.
        operations: how many nodes it had.
        looked_at: number of possible down projections: matrix products of activated values.
        rewritten: the MH-FFNs that were replaced.
        declined: the near-misses, each with its reason.
        ordinary: feed-forward networks of one head and one sub-network, which are left to Inductor.
        unread: why it, or graphs inside of it, were not analysed; empty if all were.
        notes: further remarks, one sentence each.
        modules: those whose operations it has, in their order, also such as have no network.
        absent: modules of the model in no graph, next to those of the networks: in the same lists,
            and of the same class. Only ``explain`` knows them.
        products: all its matrix products, if none belongs to a site or a near-miss.
        graph_break: why it ended before the end of the model, if it did.
        calls: how often it was called; 0 if that was not followed, as in a compilation.
        fusions: what the passes after autograd did and declined; None if they did not run, because
            Inductor was not asked to compile the graph, or found it in its cache.
    """

    before: str
    after: str
    operations: int = 0
    looked_at: int = 0
    rewritten: list[SiteReport] = field(default_factory=list)
    declined: list[SiteReport] = field(default_factory=list)
    ordinary: list[SiteReport] = field(default_factory=list)
    unread: list[UnreadGraph] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: list[Module] = field(default_factory=list)
    absent: list[Module] = field(default_factory=list)
    products: list[Operation] = field(default_factory=list)
    graph_break: GraphBreak | None = None
    calls: int = 0
    fusions: list[Fusion] | None = None


def all_rewritten(graphs: Iterable[GraphReport]) -> list[SiteReport]:
    """The MH-FFNs that were replaced in any of the graphs."""
    return [site for graph in graphs for site in graph.rewritten]


def all_declined(graphs: Iterable[GraphReport]) -> list[SiteReport]:
    """The near-misses of all graphs, each with its reason."""
    return [site for graph in graphs for site in graph.declined]


def all_ordinary(graphs: Iterable[GraphReport]) -> list[SiteReport]:
    """The feed-forward networks of one head and one sub-network in all graphs."""
    return [site for graph in graphs for site in graph.ordinary]


def all_unread(graphs: Iterable[GraphReport]) -> list[UnreadGraph]:
    """What was not analysed of any of the graphs."""
    return [unread for graph in graphs for unread in graph.unread]


def all_notes(graphs: Iterable[GraphReport]) -> list[str]:
    """The remarks of all graphs."""
    return [note for graph in graphs for note in graph.notes]
