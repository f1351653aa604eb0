"""The canonical copy: what a Dynamo graph computes, as pure values.

The graph that Dynamo hands to a backend is spelled as its author spelled it: ``@``, ``einsum`` and
``linear`` for the same product, buffers filled in place, ``vmap`` with its level counters. The
recogniser reads a copy instead, which ``tracer.py`` makes:

- each ATen operation is a ``Value``: composite operations arrive decomposed, ``vmap`` batched;
- equal computations are one value, so that two readings of one query are one object;
- in-place updates are new values, so that a value never changes.

Provenance goes both ways. ``Value.origin`` is the Dynamo node that computed a value.
``CanonicalCopy.reads`` says which value a node saw in each of its arguments *when it ran*, which is
the only meaning a node has in a graph with mutation. The graph itself is not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .axes import Size, multiply, stride_in_sizes, stride_order
from .parts import Range, ViewStep, shown_range
from .reasons import Reason, Unreadable

INPUT = "input"  # a graph input or attribute
COPY = "copy"  # args: (the copied tensor,); broadcast and cast to its shape and dtype
OPAQUE = "opaque"  # a result that the copy does not look into
SCATTER = "scatter"  # args: (old value of the base, new value of the part); chain says which part


class UntraceableGraph(Exception):
    """The graph cannot be copied; the reason says why, in words for the model's author."""

    def __init__(self, kind: Unreadable, detail: str, node: fx.Node) -> None:
        self.reason = Reason(kind, detail, node)
        super().__init__(str(self.reason))


@dataclass(eq=False, slots=True)
class Value:
    """One tensor that the graph computes. Compared by identity: equal computations are merged."""

    op: Any  # an OpOverload, or one of INPUT, OPAQUE, COPY, SCATTER
    args: tuple[Any, ...]  # tensors appear as Values
    kwargs: dict[str, Any]
    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    origin: fx.Node  # the Dynamo node that computed it first
    step: int  # position in execution order
    requires_grad_mode: bool  # whether gradients were recorded when it was computed
    strides: tuple[Size, ...]
    item: int | None = None  # which result, for operators that return several
    chain: tuple[ViewStep, ...] = ()
    is_parameter: bool = False
    requires_grad: bool = False  # of an input, or of what is marked: whether a gradient is wanted
    subclass: str = ""  # of an opaque value: the name of a tensor subclass that it was made of
    readers: list[Value] = field(default_factory=list)
    operands: tuple[Value, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = (*values_in(self.args), *values_in(self.kwargs.values()))

    @property
    def source(self) -> Value:
        """The first argument: what a view shows, a cast reads, a scatter changes."""
        source = self.args[0]
        assert isinstance(source, Value)
        return source

    def ancestors(self) -> set[Value]:
        """All that it is computed from, itself included."""
        seen: set[Value] = set()
        todo = [self]
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo += current.operands
        return seen

    def inputs(self) -> set[Value]:
        """What it is computed from that is computed from nothing and is no parameter."""
        return {v for v in self.ancestors() if v.op in (INPUT, OPAQUE) and not v.is_parameter}

    def may_need_gradient(self) -> bool:
        """Whether it is computed from something that wants a gradient, whatever the modes."""
        return any(v.requires_grad or v.op == OPAQUE for v in self.ancestors())

    def argument(self, position: int, name: str, default: Any) -> Any:
        """An argument of the operator, given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def memory_order(self) -> tuple[int, ...] | None:
        """The dimensions from outermost to innermost in memory; None where there are gaps."""
        strides = [stride_in_sizes(stride, self.shape) for stride in self.strides]
        inner_first = sorted(
            range(len(self.shape)),
            # Dimensions of size one are placed outside of all others.
            key=lambda dim: (self.shape[dim] == 1, stride_order(strides[dim])),
        )
        step: Size = 1
        for dim in inner_first:
            if self.shape[dim] != 1 and strides[dim] != step:
                return None
            step = multiply(step, self.shape[dim])
        return tuple(inner_first[::-1])

    def __repr__(self) -> str:
        return f"%{self.step}: {self.op}{list(self.shape)}"


@dataclass(eq=False, slots=True)
class Storage:
    """Memory that several tensors may share."""

    current: Value
    version: int = 0
    is_input: bool = False
    writers: list[fx.Node] = field(default_factory=list)  # the Dynamo nodes that wrote
    #: all that are known to lie in the same memory, this one among them, or none
    same: list[Storage] = field(default_factory=list)
    #: all that may lie in the same memory, this one among them, or none
    may_be: tuple[Storage, ...] = ()
    nodes: list[fx.Node] = field(default_factory=list)  # whose tensor is the whole of it
    reshaped: bool = False  # whether a tensor in it has become another view in place

    @property
    def is_outside(self) -> bool:
        """Whether code or tensors outside of the copy can observe it."""
        return self.is_input or len(self.same) > 1


@dataclass(frozen=True, slots=True)
class _Holding:
    """Once ``since`` has run, the tensor of ``node`` has some value."""

    node: fx.Node
    since: fx.Node

    def starts(self, copy: CanonicalCopy) -> int:
        return copy.positions[self.since]


def _written_part(value: Value) -> Value:
    """The value that a write puts into memory, without the rest of that memory."""
    part = value.args[1] if value.op is SCATTER else value
    assert isinstance(part, Value)
    return part


@dataclass(slots=True)
class CanonicalCopy:
    """The values of a graph in execution order, and how they belong to its nodes."""

    values: list[Value] = field(default_factory=list)
    #: the value of each node that returns one tensor, right after it ran
    value_of: dict[fx.Node, Value] = field(default_factory=dict)
    #: reader -> argument node -> the value it saw
    reads: dict[fx.Node, dict[fx.Node, Value]] = field(default_factory=dict)
    #: the same by value: its readers, and as which argument they saw it
    readers_of: dict[Value, list[tuple[fx.Node, fx.Node]]] = field(default_factory=dict)
    #: values that live on after the graph: returned, or left in an input
    escaping: set[Value] = field(default_factory=set)
    #: what the graph returns: the node, and the memory that its tensor lies in
    returned: list[tuple[fx.Node, int]] = field(default_factory=list)
    #: what a higher-order operation was given, by each of its results
    made_from: dict[Value, tuple[Value, ...]] = field(default_factory=dict)
    positions: dict[fx.Node, int] = field(default_factory=dict)
    #: what each node writes into memory that existed before it
    written: dict[fx.Node, list[Value]] = field(default_factory=dict)
    #: the same, into memory that others see, too: an input's, or one that several tensors share
    written_outside: dict[fx.Node, list[Value]] = field(default_factory=dict)
    #: the states of memory in which a node found what had been written into a part of it
    looked_into: dict[fx.Node, list[Value]] = field(default_factory=dict)
    #: nodes that do nothing but compute their result
    pure: set[fx.Node] = field(default_factory=set)
    #: for what is inserted after a node: the dtype that autocast casts to, by device type
    autocast: dict[fx.Node, dict[str, torch.dtype]] = field(default_factory=dict)
    #: the same: the levels of ``torch.func.grad`` it stands in; None where it cannot stand there
    levels: dict[fx.Node, tuple[int, ...] | None] = field(default_factory=dict)
    #: values whose gradients a hook may change, each with what is read in its place from then on
    hooked: dict[Value, Value] = field(default_factory=dict)
    #: what stands in a region of ``torch.inference_mode`` that the graph enters itself
    inference: set[fx.Node] = field(default_factory=set)
    #: class that defines its own operations -> the matrix products whose results are of it
    unfollowed: dict[str, list[fx.Node]] = field(default_factory=dict)
    _holdings: dict[Value, list[_Holding]] = field(default_factory=dict)
    _storage_of: dict[fx.Node, Storage] = field(default_factory=dict)
    #: by memory: nodes that saw an argument overwritten since it was made, and what they saw
    _changed: dict[int, list[tuple[fx.Node, Value]]] = field(default_factory=dict)
    _parts: set[fx.Node] = field(default_factory=set)  # whose tensor is a view of its memory
    _strides: dict[fx.Node, tuple[Size, ...]] = field(default_factory=dict)
    _live: set[Value] = field(default_factory=set)

    # What the tracer tells the copy, node by node.

    def add_read(self, reader: fx.Node, argument: fx.Node, seen: Value, storage: Storage) -> None:
        """``reader`` runs and sees this value in ``argument``, which lies in ``storage``."""
        self.readers_of.setdefault(seen, []).append((reader, argument))
        if seen is not self.value_of[argument]:
            self._changed.setdefault(id(storage), []).append((reader, seen))

    def add_result(
        self,
        node: fx.Node,
        value: Value,
        storage: Storage,
        strides: tuple[Size, ...],
        is_part: bool,
    ) -> None:
        """``node`` has run and returned one tensor: a view of ``storage``, or the whole of it."""
        self.value_of[node] = value
        self.add_holding(value, node, since=node)
        self._storage_of[node] = storage
        self._strides[node] = strides
        if is_part:
            self._parts.add(node)
        else:
            storage.nodes.append(node)

    def add_holding(self, value: Value, node: fx.Node, since: fx.Node) -> None:
        """Once ``since`` has run, the tensor of ``node`` has this value."""
        self._holdings.setdefault(value, []).append(_Holding(node, since))

    def finish(self) -> None:
        """The last node has run: find out which values anything that outlives the graph needs."""
        self._live = self.needed_without({})

    # What readers ask.

    def made_by(self, value: Value) -> fx.Node | None:
        """The node after which some node's tensor is this value, or None if that never happens."""
        holdings = self._holdings.get(value)
        return None if holdings is None else holdings[0].since

    def is_live(self, value: Value) -> bool:
        """Whether anything that outlives the graph depends on the value."""
        return value in self._live

    def inputs(self) -> Iterator[tuple[Value, fx.Node]]:
        """The tensors that come from outside, with the nodes that hold them."""
        for value, holdings in self._holdings.items():
            if value.op == INPUT:
                yield value, holdings[0].node

    def sized_at(self, position: int) -> Iterator[tuple[Value, fx.Node]]:
        """Values that may introduce symbolic sizes, with their nodes, up to a position.

        These are inputs, followed by results whose sizes depend on data.
        """
        yield from self.inputs()
        for value, holdings in self._holdings.items():
            if value.op == OPAQUE and holdings[0].starts(self) <= position:
                yield value, holdings[0].node

    def needed_without(
        self, replaced: dict[Value, list[Value]], wanted: Iterable[Value] | None = None
    ) -> set[Value]:
        """The values that are needed if each replaced value is computed from these values instead.

        They are needed for ``wanted``; by default, for all that outlives the graph.
        """
        needed: set[Value] = set()
        todo = list(self.escaping if wanted is None else wanted)
        while todo:
            value = todo.pop()
            if value not in needed:
                needed.add(value)
                todo += replaced.get(value, value.operands)
        return needed

    def holder_at(self, value: Value, position: int) -> fx.Node | None:
        """A node whose tensor still is this value after the node at ``position`` has run."""
        for holding in self._holdings.get(value, ()):
            if holding.starts(self) <= position and not self._ends(holding, position):
                return holding.node
        return None

    def changed_reads(self, of: Value) -> Iterator[tuple[fx.Node, Value]]:
        """Nodes that read an argument after a write to it, and the value that they read.

        Only arguments that alias a node which holds the value are considered.
        """
        for memory in {id(self._storage_of[holding.node]) for holding in self._holdings[of]}:
            yield from self._changed.get(memory, ())

    def is_overwritten(self, value: Value, but_by: AbstractSet[Value] = frozenset()) -> bool:
        """Whether a later node writes to the memory of a node that holds the value.

        Writers of a value in ``but_by`` do not count.
        """
        return any(True for _ in self._overwriters(value, but_by))

    def _overwriters(
        self, value: Value, but_by: AbstractSet[Value] = frozenset()
    ) -> Iterator[fx.Node]:
        for holding in self._holdings.get(value, ()):
            for writer in self._ends(holding, len(self.positions)):
                if but_by.isdisjoint(map(_written_part, self.written[writer])):
                    yield writer

    def overwriter_of(
        self, value: Value, but_by: AbstractSet[Value] = frozenset()
    ) -> fx.Node | None:
        """The first node that overwrites the memory of one that holds the value, as above."""
        return next(self._overwriters(value, but_by), None)

    def takes_place_of_node(self, value: Value) -> bool:
        """Whether what computes a value anew must take the place of a node, and may do so.

        It must where the node's memory is overwritten later: what then reads it reads another
        value. It may where nothing else holds the value, and where whatever reads or writes that
        memory from then on goes through the node.

        What is computed anew may be a view where the node's tensor is none. Of a view that is
        overwritten, PyTorch forgets hooks, and it lets no gradients begin in one without.
        """
        written = [one for writer in self._overwriters(value) for one in self.written[writer]]
        if not written or self._is_overwritten_after_a_hook(value):
            return False
        if not value.requires_grad_mode and any(one.requires_grad_mode for one in written):
            return False
        node = self.made_by(value)
        assert node is not None, "what no node holds is not overwritten"
        storage = self._storage_of.get(node)
        holders = [holding.node for holding in self._holdings[value]]
        if storage is None or storage.is_outside or storage.may_be or storage.reshaped:
            return False
        if node not in holders or any(self._storage_of[one] is not storage for one in holders):
            return False
        return self._is_gone_through(node, storage)

    def _is_overwritten_after_a_hook(self, value: Value) -> bool:
        """Whether a value has a hook, and more than hooks then changes what is in its memory."""
        has_hook = value in self.hooked
        while value in self.hooked:
            value = self.hooked[value]
        return has_hook and self.is_overwritten(value)

    def _is_gone_through(self, node: fx.Node, storage: Storage) -> bool:
        """Whether all later nodes that read or write a storage go through a node that lies in it.

        What an earlier node made of a tensor in it, and is no tensor itself, may hold views.
        """
        holding: set[fx.Node] = set()  # tensors in it from before, and what may hold some
        for one, position in self.positions.items():
            given = one.all_input_nodes
            where = self._storage_of.get(one)
            if one is node:
                continue
            if position < self.positions[node]:
                if where is storage or (where is None and not holding.isdisjoint(given)):
                    holding.add(one)
            elif not holding.isdisjoint(given):
                return False
        return True

    def memory_of(self, node: fx.Node) -> int | None:
        """A number for the memory that a node's tensor lies in."""
        storage = self._storage_of.get(node)
        return None if storage is None else id(storage)

    def returned_as_part(self, value: Value) -> fx.Node | None:
        """A node that is returned as this value, but in other memory than it was computed in.

        It views memory of which more is returned, or has other strides. Memory in which no earlier
        node's tensor lies is its own: all else that is returned of it are views of this node's.
        """
        for reader, argument in self.readers_of.get(value, ()):
            if reader.op != "output":
                continue
            memory = self.memory_of(argument)
            several = len({node for node, where in self.returned if where == memory}) > 1
            part = argument in self._parts and several and self._is_in_older_memory(argument)
            if part or self._strides[argument] != value.strides:
                return argument
        return None

    def _is_in_older_memory(self, node: fx.Node) -> bool:
        """Whether a node's tensor lies in memory in which an earlier one's does."""
        memory, position = self.memory_of(node), self.positions[node]
        return self.is_outside(node) or any(
            self.memory_of(one) == memory and self.positions[one] < position
            for one in self._storage_of
        )

    def shares_what_is_returned(self, value: Value) -> bool:
        """Whether a node holds the value in memory of which more than one view is returned."""
        memories = {self.memory_of(holding.node) for holding in self._holdings.get(value, ())}
        return any(
            len({node for node, where in self.returned if where == memory}) > 1
            for memory in memories
        )

    def is_outside(self, node: fx.Node) -> bool:
        """Whether a node's tensor aliases an input, or tensors outside of the copy."""
        storage = self._storage_of.get(node)
        return storage is not None and storage.is_outside

    def _ends(self, holding: _Holding, upto: int) -> list[fx.Node]:
        """The nodes that write the memory between the start of a holding and a position."""
        writers = self._storage_of[holding.node].writers
        start = holding.starts(self)
        return [writer for writer in writers if start < self.positions[writer] <= upto]


def written_range(scatter: Value) -> Range | None:
    """The part that a ``SCATTER`` writes; None where it is no part of one dimension."""
    return shown_range(scatter.chain, scatter.source.shape)


def values_in(tree: Any) -> Iterator[Value]:
    """The values in nested sequences of arguments, in order."""
    for part in tree:
        if isinstance(part, Value):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from values_in(part)
