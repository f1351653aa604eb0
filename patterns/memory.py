"""The memory of a graph while it is traced: which value a tensor has at the moment.

A tensor is a chain of views on a storage. A storage has a current value, and a write gives it a new
one: a ``SCATTER`` when only a part is written. A tensor that is read after a write has its chain
applied to the new value, and a part that is read again is what was written there last.

    buf = torch.zeros(2, 4)      storage s, current value z
    row = buf[0]                 alias: chain (select 0) on s
    row.add_(x)                  s: scatter(z, select(z) + x, chain)
    buf[0]                       the value of the sum; buf: the scatter
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mhf_compiler.compat import FakeTensor

from .canonical import (
    OPAQUE,
    SCATTER,
    CanonicalCopy,
    Storage,
    UntraceableGraph,
    Value,
    written_range,
)
from .numbering import ValueNumbering, like_of, sizes_of
from .parts import ViewStep, shown_range
from .reasons import Unreadable
from .repeats import Like, map_tensors

#: views through which a write reaches the whole of what they show
_WHOLE = frozenset({torch.ops.aten.alias.default})


@dataclass(eq=False, slots=True)
class Alias:
    """One tensor: a chain of views on a storage, and its value as of ``version``."""

    tensor: torch.Tensor | Like  # kept alive, so that its id stays its own
    storage: Storage
    chain: tuple[ViewStep, ...]
    value: Value
    version: int
    made_by: fx.Node
    found_in: Value | None = None  # the SCATTER in which the value was found as a written part


class Memory:
    """The tensors, storages and values of a trace; writes go into the canonical copy.

    Attributes:
        node: the Dynamo node that runs, which every write is attributed to.
    """

    def __init__(self, copy: CanonicalCopy, values: ValueNumbering) -> None:
        self.node: fx.Node
        self._copy = copy
        self._values = values
        self._aliases: dict[int, Alias] = {}  # by the tensor's id
        self._just_written: list[Storage] = []  # by the node that runs
        self._writers: dict[Value, fx.Node] = {}
        self._writes: list[tuple[fx.Node, Storage, Value]] = []
        self._shared: dict[Hashable, list[Storage]] = {}  # by the name of what they share

    # Tensors.

    def __contains__(self, tensor: Any) -> bool:
        """Whether the tensor, or stand-in, is known."""
        return id(tensor) in self._aliases

    def allocate(self, tensor: torch.Tensor | Like, value: Value) -> Storage:
        """Give a tensor with this value a storage of its own."""
        storage = Storage(value)
        self.add_view(tensor, storage, (), value)
        return storage

    def add_view(
        self,
        tensor: torch.Tensor | Like,
        storage: Storage,
        chain: tuple[ViewStep, ...],
        value: Value,
        source: Value | None = None,
    ) -> None:
        """Make a tensor a chain of views on a storage.

        Args:
            tensor: the tensor, or a stand-in for one.
            storage: what it is a view of.
            chain: the views; none for the whole storage.
            value: its value as of now.
            source: the value that the last view was applied to, if there is one.
        """
        found_in = None if _is_read_from(value, source) else source
        alias = Alias(tensor, storage, chain, value, storage.version, self.node, found_in)
        self._aliases[id(tensor)] = alias

    def alias(self, tensor: torch.Tensor) -> Alias:
        """How a tensor lies in memory; one from outside the graph gets an opaque value.

        Raises:
            UntraceableGraph: the tensor is of a class that is not followed.
        """
        alias = self._aliases.get(id(tensor))
        if alias is None:
            if not isinstance(tensor, FakeTensor) and type(tensor) is not torch.Tensor:
                name = type(tensor).__name__
                raise UntraceableGraph(Unreadable.FOREIGN_TENSOR, name, self.node)
            self.allocate(tensor, self._values.unknown(OPAQUE, tensor))
            alias = self._aliases[id(tensor)]
        return alias

    # Reading.

    def read(self, tensor: torch.Tensor) -> Value:
        """The tensor's value now; after a write its view chain is applied to the new storage."""
        alias = self.alias(tensor)
        storage = alias.storage
        if alias.version != storage.version:
            value, found_in = storage.current, None
            for step in alias.chain:
                before, value = value, self._values.view(value, step)
                if not _is_read_from(value, before):
                    found_in = storage.current
            alias.value, alias.version = value, storage.version
            alias.found_in = found_in
        if alias.found_in is not None:
            self._copy.looked_into.setdefault(self.node, []).append(alias.found_in)
        return alias.value

    def opaque(self, like: Any, *read: Any) -> Value:
        """A new opaque value, made of tensors and values."""
        return self._values.unknown(OPAQUE, like, map_tensors(self.read, read))

    # Writing.

    def write(self, tensor: torch.Tensor, value: Value) -> None:
        """Give a tensor, and all that share its storage, a new value."""
        alias = self.alias(tensor)
        storage = alias.storage
        chain = tuple(step for step in alias.chain if step.op not in _WHOLE)
        alias.value = value
        if chain:
            value = alias.found_in = self._scatter(storage.current, value, chain)
        self._set(storage, value)
        alias.version = storage.version
        for other in dict.fromkeys((*storage.same, *storage.may_be)):
            if other is not storage:  # it turned out to be the same memory
                self._set(other, self.opaque(like_of(other.current), other.current, value))

    def write_unknown(self, tensor: torch.Tensor, *read: Any) -> None:
        """Give a tensor a new opaque value that is made of these."""
        self.write(tensor, self.opaque(tensor, *read))

    def view_in_place(self, tensor: torch.Tensor, step: ViewStep) -> None:
        """Turn a tensor into a view of itself; every node that held it holds this view now."""
        alias = self.alias(tensor)
        alias.value = self._values.view(self.read(tensor), step)
        alias.chain = (*alias.chain, step)
        alias.storage.writers.append(self.node)
        alias.storage.nodes.clear()
        alias.storage.reshaped = True
        self._note_write(self.node, alias.value)

    def _set(self, storage: Storage, value: Value) -> None:
        storage.current = value
        storage.version += 1
        storage.writers.append(self.node)
        self._note_write(self.node, value)
        self._writes.append((self.node, storage, value))
        if storage not in self._just_written:
            self._just_written.append(storage)

    def _scatter(self, base: Value, part: Value, chain: tuple[ViewStep, ...]) -> Value:
        """``base`` with a part of it written. What was written there before is dropped."""
        written = shown_range(chain, base.shape)
        later: list[Value] = []  # writes to other parts since
        old = base
        while old.op is SCATTER:
            before = written_range(old)
            if before is None:
                break
            if before == written:
                base = old.source
                for value in reversed(later):  # written again, by the nodes that wrote them
                    kept = value.args[1]
                    assert isinstance(kept, Value)
                    base = self._values.scatter(base, kept, value.chain)
                    self._note_write(self._writers[value], base)
                break
            later.append(old)
            old = old.source
        return self._values.scatter(base, part, chain)

    def _note_write(self, node: fx.Node, value: Value) -> None:
        self._copy.written.setdefault(node, []).append(value)
        self._writers[value] = node

    # Between nodes.

    def end_node(self, result: Any, shared: Hashable | None) -> None:
        """The node has run.

        Args:
            result: what it returned.
            shared: a name for the memory of that, if something is known of it.
        """
        for storage in self._just_written:
            for holder in storage.nodes:
                self._copy.add_holding(storage.current, holder, since=self.node)
        self._just_written.clear()
        if isinstance(result, FakeTensor):
            alias = self.alias(result)
            is_part = not all(step.op in _WHOLE for step in alias.chain)
            strides = sizes_of(result)[1]
            self._copy.add_result(self.node, self.read(result), alias.storage, strides, is_part)
            if shared is not None:
                self._share(alias.storage, shared)

    def _share(self, storage: Storage, shared: Hashable) -> None:
        """Find the storages that are one by what is known from outside of the tensors in them.

        Inputs may be views of each other, and so may the results of higher-order operations.
        """
        same = self._shared.setdefault(shared, [])
        if storage not in same:
            same.append(storage)
            storage.same = same

    def may_share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let a write to any of these tensors change all others: nothing is known of them."""
        together: dict[Storage, None] = {}
        for tensor in tensors:
            storage = self.alias(tensor).storage
            together |= dict.fromkeys((storage, *storage.may_be))
        for storage in together:
            storage.may_be = tuple(together)

    def finish(self) -> None:
        """The last node is done: write down what outlives the graph in memory."""
        for alias in self._aliases.values():
            if alias.storage.is_input and alias.storage.writers:
                self._copy.escaping.add(alias.storage.current)
        for node, storage, value in self._writes:
            if storage.is_outside:
                self._copy.written_outside.setdefault(node, []).append(value)


def _is_read_from(view: Value, source: Value | None) -> bool:
    return bool(view.args) and view.args[0] is source
