"""Aliasing in a graph after autograd: who shares a storage, and who reads it late."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from ..compat import auto_functionalized, named_arguments, statically_known_true, storage_of
from ..lowering.ops import ALL
from .outcome import Declined, Obstacle, require

# Ops that Inductor cannot fuse, so that they write their results when they are called. Any other
# node may be inlined into its readers, and would then read memory after the op has overwritten it.
# That includes matrix products: Inductor turns a narrow one into multiplications and sums.
_NEVER_INLINED = ("multi_head_ffn", "router_product")

_OURS = frozenset({*ALL, *(op.default for op in ALL), *(op.compiled for op in ALL)})


def is_call_of(node: fx.Node, *names: str) -> bool:
    """Whether a node calls one of these ops, which are defined when the first site is found."""
    found = (getattr(torch.ops.mhf_compiler, name, None) for name in names)
    return any(node.target in (op, op.default, op.compiled) for op in found if op is not None)


def calls_our_op(node: fx.Node) -> bool:
    """Whether a node calls one of our ops, directly or in functional form."""
    functional = node.target is auto_functionalized
    return (node.args[0] if functional else node.target) in _OURS


def _writes(node: fx.Node) -> bool:
    """Whether a node calls an op that mutates an argument."""
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


class Memory:
    """The order of a graph's nodes, and which of them share a storage."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: place for place, node in enumerate(graph.nodes)}
        self.sharing: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            storage = storage_of(node)
            if storage is not None:
                self.sharing[storage].append(node)

    def require_dead_after(self, old: fx.Node, node: fx.Node) -> None:
        """Only this graph must know the storage of ``old``, and ``node`` must be its last reader.

        Raises:
            Declined: something may read the storage after the node.
        """
        storage = storage_of(old)
        if storage is None:
            raise Declined(Obstacle.UNKNOWN_MEMORY, old)
        sharing = self.sharing[storage]
        outside = any(other.op in ("placeholder", "get_attr") for other in sharing)
        require(not outside, Obstacle.INPUT)
        arguments = [x for x in named_arguments(node).values() if isinstance(x, fx.Node)]
        require([x for x in arguments if x in sharing] == [old], Obstacle.SHARED_MEMORY)
        readers = {reader for other in sharing for reader in other.users} - {node}
        require(not self._read_after(readers, node), Obstacle.READ_LATER)

    def readers_of(self, old: fx.Node) -> set[fx.Node] | None:
        """Who reads the storage of a tensor, except views; None if others know it, too."""
        storage = storage_of(old)
        if storage is None:
            return None
        sharing = self.sharing[storage]
        if any(other.op in ("placeholder", "get_attr") or _writes(other) for other in sharing):
            return None
        return {reader for other in sharing for reader in other.users} - set(sharing)

    def _read_after(self, readers: set[fx.Node], node: fx.Node) -> bool:
        """Whether some of the readers come after a node, or may be inlined into one that does."""
        rest = list(readers)
        seen = readers | {node}
        while rest:
            reader = rest.pop()
            if self.position[reader] > self.position[node]:
                return True
            if not is_call_of(reader, *_NEVER_INLINED):
                new = set(reader.users) - seen
                seen |= new
                rest += new
        return False


def unit_view_of(view: fx.Node) -> fx.Node | None:
    """The source of a view that only adds or removes dimensions of size one, or None.

    Such views appear for a single sequence.
    """
    source = view.args[0] if view.args else None
    if not isinstance(source, fx.Node) or _writes(view):
        return None
    new, old = view.meta.get("val"), source.meta.get("val")
    if not (isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor)):
        return None
    if new.dtype is not old.dtype or storage_of(view) is None:
        return None
    if storage_of(view) != storage_of(source) or 0 in (new.dim(), old.dim()):
        return None
    ours, theirs = _places(new), _places(old)
    alike = len(ours) == len(theirs) and all(
        statically_known_true(one == other) for one, other in zip(ours, theirs, strict=True)
    )
    return source if alike else None


def views_down_to(node: fx.Node) -> list[fx.Node]:
    """The chain of such views that ends with a node."""
    chain: list[fx.Node] = []
    source: fx.Node | None = node
    while source is not None and (above := unit_view_of(source)) is not None:
        chain.insert(0, source)
        source = above
    return chain


def _places(x: torch.Tensor) -> list[Any]:
    """Offset, sizes and strides, without dimensions of size one.

    The innermost size is always included, since the norm's mean is taken over it.
    """
    dimensions = zip(x.shape, x.stride(), strict=True)
    long = [pair for pair in dimensions if not statically_known_true(pair[0] == 1)]
    return [x.storage_offset(), x.shape[-1], *(number for pair in long for number in pair)]


def strides_are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of equal shapes have equal strides, except in dimensions of size one."""
    return all(
        statically_known_true(size == 1) or statically_known_true(step == step_)
        for size, step, step_ in zip(one.shape, one.stride(), other.stride(), strict=True)
    )


def takes_the_same_memory(node: fx.Node, new: Any) -> bool:
    """Whether two tensors have equal layouts, and the first fills its storage.

    Strides of dimensions of size one do not count.
    """
    old = node.meta.get("val")
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return False
    if old.dtype is not new.dtype or old.device != new.device or old.dim() != new.dim():
        return False
    size = old.untyped_storage().nbytes()
    return (
        all(map(statically_known_true, map(operator.eq, old.shape, new.shape)))
        and strides_are_equal(old, new)
        and statically_known_true(old.storage_offset() == 0)
        and statically_known_true(size == old.numel() * old.element_size())
    )
