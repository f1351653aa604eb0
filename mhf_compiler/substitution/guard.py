"""The guard after an edit: of what is left of a graph, nothing but numbers may have changed.

Recognition proves what a site computes, and the editor keeps what else can be seen of its result.
The guard is for the faults of either that nobody has thought of. It runs what was inserted over
fake tensors, in the modes of its place, and compares what leaves it with what Dynamo knows of the
tensor that was there before: dtype, shape, strides, device, whether a gradient is recorded, and
which memory it shares. Views and other nodes that pass a difference on are run as well, up to the
outputs of the graph; all others compute what they did. So an edit costs its own few nodes, and not
the graph.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeGuard

import torch
from torch import fx

from ..compat import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    device_mesh,
    dtensor_of,
    example_of,
    has_examples_of_dynamo,
    local_tensor,
    no_new_guards,
    no_tracing_context,
    placements,
    statically_known_true,
    storage_identity,
    symbolic_size,
    tree_leaves,
)
from ..patterns import CanonicalCopy, Kind, Modes, RouterProduct, Site, Size, Value, stride_in_sizes
from .edit import Edit
from .emit import EditError


def check(edit: Edit, copy: CanonicalCopy, shape_env: Any | None = None) -> None:
    """Compare an edited graph with the given one.

    Args:
        edit: the edit. Nodes of the given graph carry fake tensors as ``example_value`` or ``val``;
            what has none is not compared, and of ``val`` not whether a gradient is recorded.
        copy: what the given graph computes.
        shape_env: the shape environment of its symbolic sizes, if it has any.

    Raises:
        EditError: something has changed; its ``site`` is the first that is to blame.
    """
    sharded = any(device_mesh(example_of(node)) is not None for node in edit.nodes)
    with ExitStack() as stack:
        if sharded:
            stack.enter_context(no_tracing_context())
        stack.enter_context(no_new_guards(shape_env))
        stack.enter_context(FakeTensorMode(shape_env=shape_env))
        _Guard(edit, copy, sharded).check()


@dataclass(frozen=True)
class _Change(Exception):
    """A tensor is not what it was."""

    what: str
    kind: Kind = Kind.CHANGED_RESULT


@dataclass(frozen=True)
class _Look:
    """What can be seen of a tensor, except for its numbers and its memory."""

    example: torch.Tensor = field(compare=False, repr=False)
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    sizes: tuple[tuple[Size, ...], tuple[Size, ...]]  # shape and strides
    shard: tuple[Hashable, ...]  # of a DTensor: mesh, placements, shape and strides of the shard
    unresolved: tuple[bool, bool]  # whether its numbers are yet to be conjugated, and negated

    def make(self) -> torch.Tensor:
        """A tensor that looks so, in memory of its own."""
        local = local_tensor(self.example)
        made = torch.empty_strided(
            local.shape, local.stride(), dtype=self.dtype, device=self.device
        )
        conjugated, negated = self.unresolved
        made = made.conj() if conjugated else made
        made = torch.ops.aten._neg_view.default(made) if negated else made
        if self.shard:
            made = dtensor_of(made, self.example)
        return made.requires_grad_() if self.requires_grad else made


@dataclass(frozen=True)
class _Number:
    """In place of a node."""

    count: int


@dataclass(frozen=True)
class _Run:
    """What the nodes of one site read and left.

    Attributes:
        memories: the memory of each input.
        results: position, look and memory of each node that others read.
    """

    memories: list[Hashable]
    results: list[tuple[int, _Look, Hashable]]


class _Guard:
    """Knows the tensors that the edited graph computes otherwise than the given one."""

    def __init__(self, edit: Edit, copy: CanonicalCopy, sharded: bool = False) -> None:
        self.edit, self.copy, self.sharded = edit, copy, sharded
        self.old_of = {new: old for old, new in edit.nodes.items()}
        self.found: dict[fx.Node, Any] = {}  # what was run
        self.blamed: dict[fx.Node, Site | RouterProduct] = {}  # the same nodes
        self.given: dict[fx.Node, torch.Tensor] = {}  # copies of what is as before
        self.known: dict[Hashable, _Run] = {}
        self.memory: dict[int, Hashable] = {}  # storage of ours -> the memory that it stands for

    def check(self) -> None:
        nodes = list(self.edit.graph.nodes)  # whose iterator would start again at the end
        for site, group in groupby(nodes, self.edit.inserted.get):
            if site is None:
                for node in group:
                    self._check_kept(node)
            else:
                self._check_inserted(site, list(group))
        self._check_gradients()

    # Nodes that were inserted.

    def _check_inserted(self, site: Site | RouterProduct, nodes: list[fx.Node]) -> None:
        """Run what computes a site; or take over what was found for an equal one.

        A tower has the same site in every layer.
        """
        modes = self._modes(site.output_node, site.output)
        inputs = [one for one in dict.fromkeys(_arguments(nodes)) if one not in nodes]
        memories = [self._memory_of(one) for one in inputs]
        key = (
            modes,
            _spelling(nodes, inputs),
            tuple(_look(self._seen(one)) for one in inputs),
            tuple(map(memories.index, memories)),
        )
        if key in self.known:
            self._take_over(self.known[key], site, nodes, memories)
            return
        with modes.entered():
            for node in nodes:
                self._run_for(site, node)
        left = [node for node in nodes if not all(user in nodes for user in node.users)]
        if all(_is_fake(self.found[node]) for node in left):
            places = [
                (nodes.index(node), _look(self.found[node]), self._memory_of(node)) for node in left
            ]
            self.known[key] = _Run(memories, places)

    def _take_over(
        self,
        run: _Run,
        site: Site | RouterProduct,
        nodes: list[fx.Node],
        memories: list[Hashable],
    ) -> None:
        for place, look, memory in run.results:
            node = nodes[place]
            self.found[node] = made = look.make()
            self.blamed[node] = site
            shared = memory in run.memories
            new = memories[run.memories.index(memory)] if shared else (nodes[0], memory)
            self.memory[storage_identity(made)] = new

    def _run_for(self, site: Site | RouterProduct, node: fx.Node) -> None:
        try:
            self.found[node] = self._run(node)
        except Exception as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            message = f"{getattr(node.target, '__name__', node.target)} does not run: {first}"
            kind = Kind.NOT_ON_SHARDS if self.sharded else Kind.CHANGED_RESULT
            raise EditError(message, kind, site) from error
        self.blamed[node] = site

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _argument(self, node: fx.Node) -> Any:
        """The tensor that a node is given; one of our own, since Dynamo's must stay as they are."""
        if node not in self.found and node not in self.given:
            look = _look(self._seen(node))
            if not isinstance(look, _Look):
                return self._seen(node)
            self.given[node] = made = look.make()
            self.memory[storage_identity(made)] = self._memory_of(node)
        return self.found[node] if node in self.found else self.given[node]

    def _seen(self, node: fx.Node) -> Any:
        return self.found[node] if node in self.found else example_of(self.old_of[node])

    def _memory_of(self, node: fx.Node) -> Hashable:
        """A name for the memory of a node of the edited graph; None where it is not known."""
        if node not in self.found:
            return _memory(example_of(self.old_of[node]))
        found = self.found[node]
        if not _is_fake(found):
            return None
        return self.memory.get(storage_identity(found), ("new", storage_identity(found)))

    def _modes(self, node: fx.Node, value: Value) -> Modes:
        """The modes at a node of the given graph, which computes a value."""
        return Modes.of(value.requires_grad_mode, self.copy.autocast[node])

    # Nodes that were there before.

    def _check_kept(self, node: fx.Node) -> None:
        """Compare what a node reads; run it if it passes a difference on."""
        old = self.old_of[node]
        passes_on = None
        for argument, place in self._rerouted(old):
            site = self.blamed[place]
            try:
                strides_differ = self._compare(old, argument, self.found[place])
                if strides_differ and _shows_strides(old):
                    raise _Change(f"the strides of {argument}, which {old} reads")
                if strides_differ or self._takes_over(old, argument, place):
                    passes_on = site
            except _Change as change:
                raise EditError(change.what, change.kind, site) from change
        if node.op == "output":
            self._check_memory(old)
        elif passes_on is not None:
            # Of a node that returns several tensors, those who take one of them know the modes.
            values = (self.copy.value_of.get(one) for one in (old, *old.users))
            value = next(filter(None, values), None)
            if value is not None:
                with self._modes(old, value).entered():
                    self._run_for(passes_on, node)

    def _rerouted(self, old: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The arguments of a node that are not as before, with what it now reads instead."""
        for argument in old.all_input_nodes:
            place = self._place(old, argument)
            if place in self.found:
                yield argument, place

    def _place(self, reader: fx.Node, argument: fx.Node) -> fx.Node:
        return self.edit.redirected.get((reader, argument), self.edit.nodes[argument])

    def _compare(self, reader: fx.Node, argument: fx.Node, found: Any) -> bool:
        """Whether strides differ from those that the reader saw before; nothing else may."""
        before = example_of(argument)
        if not _is_fake(before) or not isinstance(found, torch.Tensor):
            return False
        moved = before._version != 0  # its example is what it became at last
        seen = self.copy.reads[reader].get(argument)
        if moved and (seen is None or len(seen.shape) != before.dim()):
            return False
        recorded = ("requires_grad",) if has_examples_of_dynamo(argument) else ()
        for name in ("dtype", "device", *recorded):
            was, now = getattr(before, name), getattr(found, name)
            if was != now and not (moved and name == "requires_grad"):
                raise _Change(f"{name} of {argument} was {was}, would be {now}")
        if not _equal(before.shape, found.shape):
            raise _Change(f"shape of {argument} was {before.shape}, would be {found.shape}")
        if (device_mesh(before), placements(before)) != (device_mesh(found), placements(found)):
            was, now = placements(before) or "none", placements(found) or "none"
            what = f"the placements of {argument} were {was}, would be {now}"
            raise _Change(what, Kind.NOT_ON_SHARDS)
        return _strides_differ(before, found) or _strides_differ(
            local_tensor(before), local_tensor(found)
        )

    def _takes_over(self, old: fx.Node, argument: fx.Node, place: fx.Node) -> bool:
        """Whether a node returns memory of an argument, or one of several tensors."""
        if not isinstance(self.found[place], torch.Tensor):
            return True
        memory = _memory(example_of(argument))
        return memory is not None and memory in map(_memory, tree_leaves(example_of(old)))

    # Outputs.

    def _check_memory(self, output: fx.Node) -> None:
        """Outputs share memory with inputs, and with each other, where they did before."""
        inputs = [node for node in output.graph.nodes if node.op in ("placeholder", "get_attr")]
        now_of: dict[Hashable, Hashable] = {}
        was_of: dict[Hashable, Hashable] = {}
        for argument in [*inputs, *output.all_input_nodes]:
            was = _memory(example_of(argument))
            place = argument if argument in inputs else self._place(output, argument)
            now = was if argument in inputs else self._memory_of(place)
            if was is None or now is None:
                continue
            if now_of.setdefault(was, now) != now or was_of.setdefault(now, was) != was:
                site = self.blamed.get(place) or next(iter(self.edit.inserted.values()))
                message = f"{argument} would share memory with others than before"
                raise EditError(message, Kind.CHANGED_RESULT, site)

    def _check_gradients(self) -> None:
        """No input has lost its gradient, not even one of zeros: an optimizer tells it from none.

        What is overwritten as a whole has a gradient of zeros. A site whose output is written there
        leaves that to the original.
        """
        sites = [*dict.fromkeys(self.edit.inserted.values())]
        if not any(site.output.requires_grad_mode for site in sites):
            return
        nodes, writers = self.edit.nodes, self.copy.written.keys()
        output = next(reversed(nodes))
        before = _made_of(output, writers)
        after = _made_of(nodes[output], {nodes[one] for one in writers})
        for old, new in nodes.items():
            is_input = old.op in ("placeholder", "get_attr")
            if is_input and old in before and new not in after and _needs_gradient(old):
                written = {value for values in self.copy.written.values() for value in values}
                to_blame = next((site for site in sites if site.output in written), sites[0])
                raise EditError(f"the gradient of {old}", Kind.GRADIENTS_CUT, to_blame)


def _strides_differ(before: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether they do where the tensors have elements, in a dimension of more than one."""
    pairs = zip(before.shape, before.stride(), found.stride(), strict=True)
    return not all(
        _equal((size,), (1,)) or _same_stride(was, now, before.shape) for size, was, now in pairs
    )


def _same_stride(was: Any, now: Any, shape: Iterable[Any]) -> bool:
    if _equal((was,), (now,)):
        return True
    sizes = [*map(symbolic_size, shape)]
    mine, other = (stride_in_sizes(symbolic_size(stride), sizes) for stride in (was, now))
    return mine == other


def _shows_strides(node: fx.Node) -> bool:
    """Whether strides can be seen in a node itself: an output, or what is not looked into."""
    return node.op == "output" or isinstance(node.target, HigherOrderOperator)


def _look(seen: Any) -> Any:
    """What can be seen of a tensor; a number or another argument as it is."""
    if isinstance(seen, torch.Tensor):
        shard: tuple[Hashable, ...] = ()
        if device_mesh(seen) is not None:
            shard = (device_mesh(seen), placements(seen), *_sizes(local_tensor(seen)))
        unresolved = seen.is_conj(), seen.is_neg()
        sizes = _sizes(seen)
        return _Look(seen, seen.dtype, seen.device, seen.requires_grad, sizes, shard, unresolved)
    return repr(seen)


def _sizes(tensor: torch.Tensor) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    return tuple(map(symbolic_size, tensor.shape)), tuple(map(symbolic_size, tensor.stride()))


def _made_of(output: fx.Node, writers: Container[fx.Node]) -> set[fx.Node]:
    """What a node is made of, with what is written to any of that."""
    found: set[fx.Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
            todo += [user for user in node.users if user in writers]
    return found


def _needs_gradient(node: fx.Node) -> bool:
    return bool(getattr(example_of(node), "requires_grad", False))


def _is_fake(x: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a fake tensor, or a DTensor whose shard is one."""
    return isinstance(x, torch.Tensor) and isinstance(local_tensor(x), FakeTensor)


def _arguments(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    for node in nodes:
        yield from node.all_input_nodes


def _spelling(nodes: list[fx.Node], inputs: list[fx.Node]) -> tuple[Hashable, ...]:
    """What nodes compute of inputs, whatever they are called."""
    number = {node: _Number(count) for count, node in enumerate([*inputs, *nodes])}

    def numbered(node: fx.Node) -> Any:
        return number[node]

    return tuple(
        (node.target, repr(fx.node.map_arg((node.args, node.kwargs), numbered))) for node in nodes
    )


def _memory(example: Any) -> int | None:
    """A number for the memory of an example, where it is known."""
    return storage_identity(example) if _is_fake(example) else None


def _equal(sizes: Iterable[Any], others: Iterable[Any]) -> bool:
    pairs = list(zip(sizes, others, strict=False))
    return all(statically_known_true(one == other) for one, other in pairs)
