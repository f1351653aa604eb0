"""What lies where in a differentiated graph, and calls of ops that write to an argument.

This is what the passes share that run just before Inductor decides what is written in place:
norming.py, reusing.py and joining.py. They put such calls in the functional form that PyTorch has
for them: where Inductor finds another reader in the graph, it copies.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from .compat import (
    auto_functionalized,
    named_arguments,
    no_fake_mode,
    set_example,
    statically_known_true,
    storage_of,
)
from .patterns import locate
from .rewriting import warn_of_failure

# What writes its result at once: ops of which Inductor knows nothing. Anything else may be computed
# where it is read, in one kernel with its reader, and would then read the memory behind the op. So
# may matrix products: of a narrow one Inductor makes multiplications and sums.
_AT_ONCE = ("multi_head_ffn", "router_product")


def is_call_of(node: fx.Node, *names: str) -> bool:
    """Whether a node calls one of our ops, which are defined when the first site is found."""
    found = (getattr(torch.ops.mhf_compiler, name, None) for name in names)
    return any(node.target in (op, op.default) for op in found if op is not None)


def calls_our_op(node: fx.Node) -> bool:
    """Whether a node calls one of our ops, be it in the functional form of those that write."""
    functional = node.target is auto_functionalized
    return getattr(node.args[0] if functional else node.target, "namespace", "") == "mhf_compiler"


def _writes(node: fx.Node) -> bool:
    """Whether a node calls an op that writes to an argument."""
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


class Memory:
    """Where the nodes of a graph stand, and which of them lie in the same memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: place for place, node in enumerate(graph.nodes)}
        self.sharing: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            storage = storage_of(node)
            if storage is not None:
                self.sharing[storage].append(node)

    def is_dead_behind(self, old: fx.Node, node: fx.Node) -> bool:
        """Whether only this graph knows the memory of ``old``, and ``node`` is its last reader."""
        storage = storage_of(old)
        if storage is None:
            return False
        sharing = self.sharing[storage]
        if any(other.op in ("placeholder", "get_attr") for other in sharing):
            return False
        arguments = [x for x in named_arguments(node).values() if isinstance(x, fx.Node)]
        if [x for x in arguments if x in sharing] != [old]:
            return False
        readers = {reader for other in sharing for reader in other.users} - {node}
        return not self._read_behind(readers, node)

    def readers_of(self, old: fx.Node) -> set[fx.Node] | None:
        """Who reads the memory of a tensor, beside views; None if not this graph alone knows it."""
        storage = storage_of(old)
        if storage is None:
            return None
        sharing = self.sharing[storage]
        if any(other.op in ("placeholder", "get_attr") or _writes(other) for other in sharing):
            return None
        return {reader for other in sharing for reader in other.users} - set(sharing)

    def _read_behind(self, readers: set[fx.Node], node: fx.Node) -> bool:
        """Whether some of the readers come behind a node, or may be computed only there."""
        rest = list(readers)
        seen = readers | {node}
        while rest:
            reader = rest.pop()
            if self.position[reader] > self.position[node]:
                return True
            if not is_call_of(reader, *_AT_ONCE):
                new = set(reader.users) - seen
                seen |= new
                rest += new
        return False


def unit_view_of(view: fx.Node) -> fx.Node | None:
    """What a node is a view of with the same numbers in the same places, in the same order.

    Dimensions of one come and go in such a view, as they do for a single sequence.
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
    """The chain of such views, of which a node is the last."""
    chain: list[fx.Node] = []
    source: fx.Node | None = node
    while source is not None and (above := unit_view_of(source)) is not None:
        chain.insert(0, source)
        source = above
    return chain


def _places(x: torch.Tensor) -> list[Any]:
    """What tells where numbers lie: sizes and strides beside those of one, and where they begin.

    The innermost size is among them in any case, for what is summed over it.
    """
    dimensions = zip(x.shape, x.stride(), strict=True)
    long = [pair for pair in dimensions if not statically_known_true(pair[0] == 1)]
    return [x.storage_offset(), x.shape[-1], *(number for pair in long for number in pair)]


def takes_the_same_memory(node: fx.Node, new: Any) -> bool:
    """Whether two tensors are alike, and the first is all that there is in its memory."""
    old = node.meta.get("val")
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return False
    if old.dtype is not new.dtype or old.device != new.device or old.dim() != new.dim():
        return False
    size = old.untyped_storage().nbytes()
    equal = zip((*old.shape, *old.stride()), (*new.shape, *new.stride()), strict=True)
    return (
        all(statically_known_true(one == other) for one, other in equal)
        and statically_known_true(old.storage_offset() == 0)
        and statically_known_true(size == old.numel() * old.element_size())
    )


def runs(what: str, node: fx.Node, trial_run: Callable[..., None], *arguments: Any) -> bool:
    """Whether a kernel runs on this machine, by trying it; if it does not, with a warning.

    What a call failed for is kept, so that it is tried once for all layers that are alike.
    """
    error = _error_of(trial_run, *arguments)
    if error is not None:
        warn_of_failure(what, locate(node), error)
    return error is None


@cache
def _error_of(trial_run: Callable[..., None], *arguments: Any) -> str | None:
    try:
        with no_fake_mode():
            trial_run(*arguments)
    except Exception as error:
        return str(error)
    return None


def call_over(graph: fx.Graph, old: fx.Node, op: Any, arguments: dict[str, Any]) -> fx.Node:
    """The functional form of a call of an op that writes to an argument."""
    call = graph.call_function(auto_functionalized, (op,), arguments)
    _copy_origin(old, call)
    set_example(call)
    return call


def replace_by_item(old: fx.Node, call: fx.Node, index: int) -> fx.Node:
    """Read an item of what a call returns in place of a node."""
    item = item_of(old, call, index)
    item.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(item)
    return item


def item_of(old: fx.Node, call: fx.Node, index: int) -> fx.Node:
    """An item of what a call returns, which comes from where a node does."""
    item = old.graph.call_function(operator.getitem, (call, index))
    _copy_origin(old, item)
    item.meta["val"] = call.meta["val"][index]
    return item


def replace_with_views(old: fx.Node, new: fx.Node) -> None:
    """Read another node in place of one, and note that its views lie in other memory now."""
    views, seen = [], [old]
    while seen:
        node = seen.pop(0)
        found = [reader for reader in node.users if unit_view_of(reader) is node]
        views += found
        seen += found
    old.replace_all_uses_with(new)
    for view in views:
        set_example(view)


def viewed(node: fx.Node, views: Sequence[fx.Node]) -> fx.Node:
    """The same views of a node as a chain of them makes of another."""
    for view in views:
        new = node.graph.call_function(view.target, (node, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
        _copy_origin(view, new)
        set_example(new)
        node = new
    return node


def _copy_origin(old: fx.Node, new: fx.Node) -> None:
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
