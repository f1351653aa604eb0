"""The canonical copy: what a Dynamo graph computes, as pure values.

The graph that Dynamo hands to a backend is spelled as its author spelled it: ``@``, ``einsum`` and
``linear`` for the same product, buffers filled in place, ``vmap`` with its level counters. The
recogniser reads a copy instead. ``trace`` runs the graph once over fake tensors and writes down
every ATen operation as a ``Value``:

- composite operations arrive decomposed, ``vmap`` arrives batched;
- in-place updates become new values: a tensor is a view chain on a storage, a storage has a current
  value, a write gives it a new one (``SCATTER`` when only a part is written, and then a part that
  is read again is what was written there last);
- equal computations become one value, so that two readings of one query are one object.

Provenance goes both ways. ``Value.origin`` is the Dynamo node that a value was computed in.
``CanonicalCopy.reads`` says which value a node saw in each of its arguments *when it ran*, which is
the only meaning a node has in a graph with mutation. The graph itself is not changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from mhf_compiler.compat import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    TorchDispatchMode,
    functorch_depth,
    grad_levels,
    is_traceable_wrapper_subclass,
    no_new_guards,
    unbacked_symbols,
)

from .axes import Size, multiply
from .modes import Switches, switches_modes
from .parts import Range, ViewStep, plain, shown_range
from .reasons import Reason, Unreadable
from .repeats import (
    Call,
    Like,
    Program,
    autocast_dtype,
    frozen,
    key_of,
    map_tensors,
    program,
    tensors_in,
)

INPUT = "input"  # a graph input or attribute
COPY = "copy"  # args: (what was copied into a tensor,); broadcast and cast to its shape and dtype
OPAQUE = "opaque"  # a result that the copy does not look into
SCATTER = "scatter"  # args: (old value of the base, new value of the part); chain says which part


#: functions and methods that change a tensor where no operation shows it
_UNSEEN = frozenset({"detach_", "requires_grad_"})

#: what a function does to its argument besides returning it: nobody has to read the result
_MARKS = frozenset({"_set_tensor_requires_grad"})

#: ``a + value * b * c`` -> the sum of ``a`` and the product
_PRODUCTS_ADDED = {
    torch.ops.aten.addcmul.default: torch.ops.aten.add.Tensor,
    torch.ops.aten.addcmul_.default: torch.ops.aten.add_.Tensor,
}

#: operators that change their first argument
_UPDATES = frozenset(
    {
        *("setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv"),
        *("imod", "ipow", "ilshift", "irshift", "iand", "ior", "ixor", "iconcat"),
    }
)

#: views in place whose functional form has another overload's name
_OTHERWISE_NAMED = {torch.ops.aten.transpose_.default: torch.ops.aten.transpose.int}

#: what gives a tensor other memory
_SWAPS = frozenset(
    getattr(packet, name)
    for packet in (torch.ops.aten.set_, torch.ops.aten.resize_)
    for name in packet.overloads()
)

#: views through which a write reaches the whole of what they show
_WHOLE = frozenset({torch.ops.aten.alias.default})


@dataclass(frozen=True, slots=True)
class _Unfollowed:
    """In place of a tensor that is not followed, such as one of a subclass."""

    why: str


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
    requires_grad: bool = False  # of an input: whether a gradient is wanted
    subclass: str = ""  # of an opaque value: the name of a tensor subclass that it was made of
    readers: list[Value] = field(default_factory=list)
    operands: tuple[Value, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = (*_values_in(self.args), *_values_in(self.kwargs.values()))

    @property
    def source(self) -> Value:
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

    def argument(self, position: int, name: str, default: Any) -> Any:
        """An argument of the operator, given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def memory_order(self) -> tuple[int, ...] | None:
        """The dimensions from outermost to innermost in memory; None where there are gaps."""
        inner_first = sorted(range(len(self.shape)), key=self._ascending)
        step: Size = 1
        for dim in inner_first:
            if self.shape[dim] != 1 and self.strides[dim] != step:
                return None
            step = multiply(step, self.shape[dim])
        return tuple(inner_first[::-1])

    def _ascending(self, dim: int) -> tuple[int, int, int]:
        """Sort key: small strides first, symbolic ones last, dimensions of one outside of all."""
        if self.shape[dim] == 1:
            return (2, 0, 0)
        stride = self.strides[dim]
        if isinstance(stride, int):
            return (0, 0, stride)
        coefficient, symbols = stride.as_coeff_Mul()
        return (1, len(sympy.Mul.make_args(symbols)), int(coefficient))

    def __repr__(self) -> str:
        return f"%{self.step}: {self.op}{list(self.shape)}"


@dataclass(eq=False, slots=True)
class _Storage:
    """Memory that several tensors may share."""

    current: Value
    version: int = 0
    is_input: bool = False
    writers: list[fx.Node] = field(default_factory=list)  # the Dynamo nodes that wrote
    #: all that are known to lie in the same memory, this one among them, or none
    same: list[_Storage] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)  # whose tensor is the whole of it

    @property
    def is_outside(self) -> bool:
        """Whether somebody sees it who is not seen here."""
        return self.is_input or len(self.same) > 1


@dataclass(eq=False, slots=True)
class _Alias:
    """One tensor: a chain of views on a storage, and its value as of ``version``."""

    tensor: torch.Tensor | Like  # kept alive, so that its id stays its own
    storage: _Storage
    chain: tuple[ViewStep, ...]
    value: Value
    version: int
    made_by: fx.Node
    looked_into: Value | None = None  # the SCATTER in which the value was found as a written part


@dataclass(frozen=True, slots=True)
class _Holding:
    """The tensor of ``node`` is some value from the moment that ``since`` has run."""

    node: fx.Node
    since: fx.Node

    def starts(self, copy: CanonicalCopy) -> int:
        return copy.positions[self.since]


def _written_part(value: Value) -> Value:
    """What a write has put into memory, without the rest of that memory."""
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
    #: what stands in a region of ``torch.inference_mode`` that the graph enters itself
    inference: set[fx.Node] = field(default_factory=set)
    _holdings: dict[Value, list[_Holding]] = field(default_factory=dict)
    _storage_of: dict[fx.Node, _Storage] = field(default_factory=dict)
    #: by memory: nodes that saw an argument overwritten since it was made, and what they saw
    _changed: dict[int, list[tuple[fx.Node, Value]]] = field(default_factory=dict)
    _parts: set[fx.Node] = field(default_factory=set)  # whose tensor is a view of its memory
    _strides: dict[fx.Node, tuple[Size, ...]] = field(default_factory=dict)
    _live: set[Value] = field(default_factory=set)

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
        """What has sizes that may be new in the graph, with nodes up to a position that have them.

        Those are inputs, and then results whose sizes depend on data.
        """
        yield from self.inputs()
        for value, holdings in self._holdings.items():
            if value.op == OPAQUE and holdings[0].starts(self) <= position:
                yield value, holdings[0].node

    def needed_without(
        self, replaced: dict[Value, list[Value]], wanted: Iterable[Value] | None = None
    ) -> set[Value]:
        """What is still needed when each replaced value is computed from these values instead.

        Needed for ``wanted``: if not given, for what outlives the graph.
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
        """Nodes that saw an argument overwritten since it was made, and what they saw.

        Of those arguments that share the memory of a node that holds the value.
        """
        for memory in {id(self._storage_of[holding.node]) for holding in self._holdings[of]}:
            yield from self._changed.get(memory, ())

    def is_overwritten(self, value: Value, but_by: AbstractSet[Value] = frozenset()) -> bool:
        """Whether the memory of a node that holds the value is written later on.

        But by nodes that write one of some values.
        """
        return any(True for _ in self._overwriters(value, but_by))

    def _overwriters(self, value: Value, but_by: AbstractSet[Value]) -> Iterator[fx.Node]:
        for holding in self._holdings.get(value, ()):
            for writer in self._ends(holding, len(self.positions)):
                if but_by.isdisjoint(map(_written_part, self.written[writer])):
                    yield writer

    def overwriter_of(self, value: Value, but_by: AbstractSet[Value]) -> fx.Node | None:
        """The first node that overwrites the memory of one that holds the value, as above."""
        return next(self._overwriters(value, but_by), None)

    def memory_of(self, node: fx.Node) -> int | None:
        """A number for the memory that a node's tensor lies in."""
        storage = self._storage_of.get(node)
        return None if storage is None else id(storage)

    def returned_as_part(self, value: Value) -> fx.Node | None:
        """A node that is returned as this value, but lies elsewhere than the value was made.

        It views memory of which more is returned, or has other strides.
        """
        for reader, argument in self.readers_of.get(value, ()):
            if reader.op != "output":
                continue
            memory = self.memory_of(argument)
            several = len({node for node, where in self.returned if where == memory}) > 1
            if (argument in self._parts and several) or self._strides[argument] != value.strides:
                return argument
        return None

    def shares_what_is_returned(self, value: Value) -> bool:
        """Whether a node holds the value in memory of which more than one view is returned."""
        memories = {self.memory_of(holding.node) for holding in self._holdings.get(value, ())}
        return any(
            len({node for node, where in self.returned if where == memory}) > 1
            for memory in memories
        )

    def is_outside(self, node: fx.Node) -> bool:
        """Whether a node's tensor lies in memory that others see."""
        storage = self._storage_of.get(node)
        return storage is not None and storage.is_outside

    def _ends(self, holding: _Holding, upto: int) -> list[fx.Node]:
        """The nodes that write the memory between the start of a holding and a position."""
        writers = self._storage_of[holding.node].writers
        start = holding.starts(self)
        return [writer for writer in writers if start < self.positions[writer] <= upto]


def trace(gm: fx.GraphModule, shape_env: Any | None = None) -> CanonicalCopy:
    """Write down what ``gm`` computes.

    Args:
        gm: a Dynamo graph; its placeholders carry fake tensors as ``example_value`` or ``val``.
        shape_env: the shape environment of their symbolic sizes.

    Raises:
        UntraceableGraph: the graph changes tensors in ways that are not followed, or an operation
            without a known result does not run on fake tensors.
    """
    recorder = _Recorder()
    runner = _Runner(gm, recorder)
    mode = FakeTensorMode(shape_env=shape_env)
    with no_new_guards(shape_env), mode, runner.switches:
        runner.trace()
    return recorder.finish()


class _Runner(fx.Interpreter):
    """Runs the graph node by node and tells the recorder which node is at work."""

    def __init__(self, gm: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.nodes = gm.graph.nodes
        self.recorder = recorder
        self.attributes: dict[str, Any] = {}
        self.programs: dict[Hashable, Program] = {}
        self.switches = Switches()

    def trace(self) -> None:
        for position, node in enumerate(self.nodes):
            self.recorder.begin(node, position, self.env)
            self.env[node] = result = self.run_node(node)
            self.recorder.end(node, result)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self.recorder.leaf(_example(n))
        if n.op == "get_attr":
            return self._attribute(str(n.target))
        if getattr(n.target, "__name__", n.target) in _UNSEEN:
            raise UntraceableGraph(Unreadable.SWITCHED_GRADIENT, str(n.target), n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "output":
            return args[0]
        if switches_modes(n):
            return self.switches.run(n, args)
        if isinstance(n.target, HigherOrderOperator):
            return self.recorder.opaque_call(_example(n), (args, kwargs))
        key = key_of(n, args, kwargs)
        if key in self.programs:
            return self.recorder.repeat(self.programs[key], (args, kwargs))
        if _is_unfollowed((args, kwargs)) or _makes_new_sizes(n, self.env):
            return self.recorder.unknown_call(n, (args, kwargs))
        try:
            with self.recorder:
                result = getattr(self, n.op)(n.target, args, kwargs)
        except Exception as error:
            # What depends on data does not run on fake tensors: a number of a tensor, a branch.
            if self.recorder.is_broken or isinstance(error, UntraceableGraph):
                raise
            if functorch_depth() or not _has_example(n):
                first, *_ = str(error).splitlines() or [type(error).__name__]
                raise UntraceableGraph(Unreadable.NOT_ON_FAKES, first, n) from error
            return self.recorder.unknown_call(n, (args, kwargs))
        if key is not None:
            done = program(self.recorder.calls, (args, kwargs), result)
            if done is not None:
                self.programs[key] = done
        return result

    def _attribute(self, target: str) -> Any:
        if target not in self.attributes:
            self.attributes[target] = self.recorder.leaf(self.fetch_attr(target))
        return self.attributes[target]


class _Recorder(TorchDispatchMode):
    """Sees every ATen operation below autograd and functorch, and writes down a value for it."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = CanonicalCopy()
        self.node: fx.Node
        self.position = 0
        self.calls: list[Call] = []  # of the node at work
        self.is_broken = False  # whether it was the recorder itself that failed
        self._effects = False  # of the node at work
        self._inference = torch.is_inference_mode_enabled()  # from the beginning
        self._just_written: list[_Storage] = []  # by the node at work
        self._aliases: dict[int, _Alias] = {}
        self._known: dict[Any, Value] = {}
        self._writers: dict[Value, fx.Node] = {}
        self._by_memory: dict[int, list[_Storage]] = {}
        self._placed: list[tuple[fx.Node, _Storage, Value]] = []  # what was written, and where

    # The Dynamo side.

    def begin(self, node: fx.Node, position: int, env: dict[fx.Node, Any]) -> None:
        self.node, self.position = node, position
        self.calls.clear()
        marks = getattr(node.target, "__name__", None) in _MARKS
        self._effects = node.op == "placeholder" or marks
        self.copy.positions[node] = position
        seen: dict[fx.Node, Value] = {}
        for argument in node.all_input_nodes:
            result = env[argument]
            if isinstance(result, FakeTensor):
                seen[argument] = value = self._read(result)
                self.copy.readers_of.setdefault(value, []).append((node, argument))
                if value is not self.copy.value_of[argument]:
                    memory = id(self._alias(result).storage)
                    self.copy._changed.setdefault(memory, []).append((node, value))
            if node.op == "output":
                self.copy.escaping.update(self._read(t) for t in tensors_in(result))
                self.copy.returned += [
                    (argument, id(self._alias(t).storage)) for t in tensors_in(result)
                ]
        self.copy.reads[node] = seen

    def end(self, node: fx.Node, result: Any) -> None:
        if node.op == "output":
            return
        self.copy.autocast[node] = {
            kind: dtype for kind in ("cpu", "cuda") if (dtype := autocast_dtype(kind)) is not None
        }
        if torch.is_inference_mode_enabled() and not self._inference:
            self.copy.inference.add(node)
        if functorch_depth():
            self.copy.levels[node] = grad_levels()
        for storage in self._just_written:
            for holder in storage.nodes:
                self._hold(storage.current, holder)
        self._just_written.clear()
        if not self._effects and (tensors_in(result) or _asks_for_sizes(node)):
            self.copy.pure.add(node)
        if isinstance(result, FakeTensor):
            alias = self._alias(result)
            value = self._read(result)
            self.copy.value_of[node] = value
            self._hold(value, node)
            self.copy._storage_of[node] = alias.storage
            self.copy._strides[node] = _sizes(result)[1]
            if all(step.op in _WHOLE for step in alias.chain):
                alias.storage.nodes.append(node)
            else:
                self.copy._parts.add(node)
            self._note_memory(alias.storage, node)

    def _note_memory(self, storage: _Storage, node: fx.Node) -> None:
        """Find the storages in whose memory a node's tensor lies by what Dynamo knows of it.

        Inputs may be views of each other, and so may the results of higher-order operations.
        """
        example = node.meta.get("example_value")
        if isinstance(example, torch.Tensor):
            same = self._by_memory.setdefault(example.untyped_storage()._cdata, [])
            if storage not in same:
                same.append(storage)
                storage.same = same

    def _hold(self, value: Value, node: fx.Node) -> None:
        self.copy._holdings.setdefault(value, []).append(_Holding(node, self.node))

    def leaf(self, example: Any) -> Any:
        """A fake tensor of our own mode for a graph input or attribute."""
        if not isinstance(example, torch.Tensor):
            return example
        if is_traceable_wrapper_subclass(example):
            return _Unfollowed(type(example).__name__)
        fake = torch.empty_strided(
            example.shape, example.stride(), dtype=example.dtype, device=example.device
        )
        storage = self._new_storage(fake, INPUT)
        storage.is_input = True
        storage.current.is_parameter = isinstance(example, torch.nn.Parameter)
        storage.current.requires_grad = example.requires_grad
        return fake

    def opaque_call(self, example: Any, arguments: Any) -> Any:
        """A higher-order operation: not looked into, and taken to overwrite what it is given."""
        self._effects = True
        given = tensors_in(arguments)
        values = tuple(self._read(tensor) for tensor in given)
        self.copy.escaping.update(values)
        for tensor in given:
            self._write(self._alias(tensor), self._opaque(tensor))
        results = map_tensors(self._fresh, example)
        for tensor in tensors_in(results):
            self.copy.made_from[self._read(tensor)] = values
        return results

    def unknown_call(self, node: fx.Node, arguments: Any) -> Any:
        """An operation that cannot be run here: its results are values that are not looked into."""
        given = tensors_in(arguments)
        values = tuple(self._read(tensor) for tensor in given)
        writes = _may_write(node)
        if writes:
            self._effects = True
            for tensor in given:
                self._write(self._alias(tensor), self._opaque(tensor))
        results = map_tensors(self._fresh_of(values), _example(node))
        known = tensors_in(results)
        if writes or _is_unfollowed(results) or not known:
            self.copy.escaping.update(values)  # whoever reads on is not seen
        why = next(iter(_unfollowed(arguments)), "")
        for tensor in known:
            self.copy.made_from[self._read(tensor)] = values
            self._read(tensor).subclass = why
        return results

    def _fresh_of(self, values: tuple[Value, ...]) -> Any:
        """What makes, by its example, a tensor that was computed from values."""

        def fresh(example: torch.Tensor) -> Any:
            if is_traceable_wrapper_subclass(example):
                return _Unfollowed(type(example).__name__)
            fake = torch.empty_strided(
                example.shape, example.stride(), dtype=example.dtype, device=example.device
            )
            value = self._value(OPAQUE, (len(self.copy.values), *values), {}, fake)
            self._add_alias(fake, _Storage(value), (), value)
            return fake

        return fresh

    def repeat(self, done: Program, arguments: Any) -> torch.Tensor:
        """What an equal node has done, over other arguments."""
        like = done.result
        result = torch.empty_strided(like.shape, like.strides, dtype=like.dtype, device=like.device)
        for call in done.over(tensors_in(arguments), result):
            self._record(call)
        return result

    def finish(self) -> CanonicalCopy:
        for alias in self._aliases.values():
            if alias.storage.is_input and alias.storage.writers:
                self.copy.escaping.add(alias.storage.current)
        for node, storage, value in self._placed:
            if storage.is_outside:
                self.copy.written_outside.setdefault(node, []).append(value)
        self.copy._live = self.copy.needed_without({})
        return self.copy

    # The ATen side.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked for more often than anything is computed
            return args[0].device
        result = func(*args, **kwargs)
        if func.namespace != "prim":  # other questions about a tensor
            for call in _taken_apart(Call(func, args, kwargs, result)):
                self.calls.append(call)
                self.is_broken = True
                self._record(call)
                self.is_broken = False
        return result

    def _record(self, call: Call) -> None:
        schema = call.func._schema
        unsaid = call.unsaid_writes()
        if schema.is_mutable or unsaid or torch.Tag.nondeterministic_seeded in call.func.tags:
            self._effects = True
        if torch.Tag.inplace_view in call.func.tags or call.func in _SWAPS:
            self._record_view_in_place(call)
        elif schema.is_mutable:
            self._record_write(call.func, call.args, call.kwargs, call.result)
        elif any(r.alias_info is not None for r in schema.returns):
            self._record_view(call.func, call.args, call.kwargs, call.result)
        else:
            self._record_pure(call.func, call.args, call.kwargs, call.result)
        for target in unsaid:
            read = call.args, tuple(call.kwargs.values())
            self._write(self._alias(target), self._opaque(target, read))

    def _record_pure(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        args, kwargs = map_tensors(self._read, args), map_tensors(self._read, kwargs)
        results = [result] if isinstance(result, (torch.Tensor, Like)) else result
        if not isinstance(results, (list, tuple)):
            return
        for item, tensor in enumerate(results):
            if isinstance(tensor, (torch.Tensor, Like)) and id(tensor) not in self._aliases:
                which = None if tensor is result else item
                value = self._value(func, args, kwargs, tensor, item=which)
                self._add_alias(tensor, _Storage(value), (), value)

    def _record_view(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        base = self._alias(args[0])
        source = self._read(args[0])
        rest = map_tensors(self._read, args[1:])
        artefact = base.made_by is self.node and _is_new(source)
        if func is torch.ops.aten.detach.default and artefact:
            # The factories of a fake mode return a detached view; nobody else sees what it views.
            self._add_alias(result, base.storage, base.chain, source)
            return
        results = [result] if isinstance(result, (torch.Tensor, Like)) else result
        for item, tensor in enumerate(results):
            if id(tensor) in self._aliases:
                continue
            which = None if tensor is result else item
            step = ViewStep(func, rest, kwargs, which, *_sizes(tensor))
            value = self._view(source, step)
            self._add_alias(tensor, base.storage, (*base.chain, step), value)
            if not _is_read_from(value, source):
                self._aliases[id(tensor)].looked_into = source

    def _record_view_in_place(self, call: Call) -> None:
        """A tensor becomes another view of what it is; who held it holds something else now."""
        target = call.args[0]
        alias = self._alias(target)
        functional = _functional_form(call.func) or _OTHERWISE_NAMED.get(call.func)
        if functional is None or call.func in _SWAPS or alias.storage.is_outside:
            name = call.func._schema.name.split("::")[1]
            raise UntraceableGraph(Unreadable.REPLACED_TENSOR, name, self.node)
        rest = map_tensors(self._read, call.args[1:])
        step = ViewStep(functional, rest, call.kwargs, None, *_sizes(target))
        alias.value = self._view(self._read(target), step)
        alias.chain = (*alias.chain, step)
        alias.storage.writers.append(self.node)
        alias.storage.nodes.clear()
        self._note_write(self.node, alias.value)

    def _record_write(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An in-place or ``out=`` operation gives the written tensors new values."""
        written: list[torch.Tensor] = []
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors_in(given)
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None:
                written += tensors_in(kwargs[argument.name])
        functional = _functional_form(func)
        if torch.Tag.nondeterministic_seeded in func.tags and len(written) == 1:
            # Dropout: never equal to another.
            others = [x for x in (*args, *kwargs.values()) if x is not written[0]]
            read = map_tensors(self._read, others)
            value = self._value(func, tuple(_values_in(read)), {}, written[0])
            self._write(self._alias(written[0]), value)
        elif func is torch.ops.aten.copy_.default:
            value = self._value(COPY, (self._read(args[1]),), {}, args[0])
            self._write(self._alias(args[0]), value)
        elif functional is not None and len(written) == 1 and args and written[0] is args[0]:
            target = written[0]
            inputs = map_tensors(self._read, args), map_tensors(self._read, kwargs)
            self._write(self._alias(target), self._value(functional, *inputs, target))
        else:
            # Before any of it is written.
            read = map_tensors(self._read, (args, tuple(kwargs.values())))
            for target in written:
                self._write(self._alias(target), self._opaque(target, read))
            for tensor in tensors_in(result):
                if id(tensor) not in self._aliases:
                    value = self._opaque(tensor, read)
                    self._add_alias(tensor, _Storage(value), (), value)

    # Values, aliases and storages.

    def _value(
        self, op: Any, args: Any, kwargs: Any, like: Any, item: int | None = None, chain: Any = ()
    ) -> Value:
        """The value of this computation: a known one if it was computed before."""
        shape, strides = _sizes(like)
        grad_mode = torch.is_grad_enabled()
        key = None
        if not isinstance(op, str) and torch.Tag.nondeterministic_seeded not in op.tags:
            key = (op, frozen(args), frozen(kwargs), item, shape, like.dtype, grad_mode)
            if key in self._known:
                return self._known[key]
        value = Value(
            op=op,
            args=plain(args),
            kwargs=plain(kwargs),
            shape=shape,
            dtype=like.dtype,
            device=like.device,
            origin=self.node,
            step=len(self.copy.values),
            requires_grad_mode=grad_mode,
            item=item,
            chain=chain,
            strides=strides,
        )
        self.copy.values.append(value)
        for operand in dict.fromkeys(value.operands):
            operand.readers.append(value)
        if key is not None:
            self._known[key] = value
        return value

    def _opaque(self, like: Any, *read: Any) -> Value:
        """A new value, made of those that are read in a way that is not looked into."""
        operands = map_tensors(self._read, read)
        return self._value(OPAQUE, (len(self.copy.values), *_values_in(operands)), {}, like)

    def _fresh(self, example: torch.Tensor) -> Any:
        if is_traceable_wrapper_subclass(example):
            return _Unfollowed(type(example).__name__)
        fake = torch.empty_strided(
            example.shape, example.stride(), dtype=example.dtype, device=example.device
        )
        self._new_storage(fake, OPAQUE)
        return fake

    def _new_storage(self, tensor: torch.Tensor, op: str) -> _Storage:
        value = self._value(op, (len(self.copy.values),), {}, tensor)
        storage = _Storage(value)
        self._add_alias(tensor, storage, (), value)
        return storage

    def _add_alias(
        self,
        tensor: torch.Tensor | Like,
        storage: _Storage,
        chain: tuple[ViewStep, ...],
        value: Value,
    ) -> None:
        self._aliases[id(tensor)] = _Alias(
            tensor, storage, chain, value, storage.version, self.node
        )

    def _alias(self, tensor: torch.Tensor) -> _Alias:
        alias = self._aliases.get(id(tensor))
        if alias is None:
            if not isinstance(tensor, FakeTensor) and type(tensor) is not torch.Tensor:
                name = type(tensor).__name__
                raise UntraceableGraph(Unreadable.FOREIGN_TENSOR, name, self.node)
            self._new_storage(tensor, OPAQUE)
            alias = self._aliases[id(tensor)]
        return alias

    def _read(self, tensor: torch.Tensor) -> Value:
        """The tensor's value now; after a write its view chain is applied to the new storage."""
        alias = self._alias(tensor)
        storage = alias.storage
        if alias.version != storage.version:
            value, looked_into = storage.current, None
            for step in alias.chain:
                before, value = value, self._view(value, step)
                if not _is_read_from(value, before):
                    looked_into = storage.current
            alias.value, alias.version = value, storage.version
            alias.looked_into = looked_into
        if alias.looked_into is not None:
            self.copy.looked_into.setdefault(self.node, []).append(alias.looked_into)
        return alias.value

    def _view(self, value: Value, step: ViewStep) -> Value:
        """A view of the value; of a part that was written, what was written."""
        wanted = shown_range((step,), value.shape)
        while wanted is not None and value.op is SCATTER:
            written = written_range(value)
            if written == wanted:
                part = value.args[1]
                assert isinstance(part, Value)
                return part
            if written is None or not written.is_beside(wanted):
                break
            value = value.source
        like = Like(step.shape, value.dtype, value.device, step.strides)
        return self._value(step.op, (value, *step.args), step.kwargs, like, step.item)

    def _scatter(self, base: Value, part: Value, chain: tuple[ViewStep, ...]) -> Value:
        """``base`` with a part of it written. What was written there before is dropped."""
        written = shown_range(chain, base.shape)
        later: list[Value] = []  # writes to other parts since
        old = base
        while written is not None and old.op is SCATTER:
            before = written_range(old)
            if before is None:
                break
            if before == written:
                base = old.source
                for value in reversed(later):  # written anew, but by the nodes that wrote them
                    base = self._scattered(base, value.args[1], value.chain)
                    self._note_write(self._writers[value], base)
                break
            later.append(old)
            old = old.source
        return self._scattered(base, part, chain)

    def _note_write(self, node: fx.Node, value: Value) -> None:
        self.copy.written.setdefault(node, []).append(value)
        self._writers[value] = node

    def _scattered(self, base: Value, part: Value, chain: tuple[ViewStep, ...]) -> Value:
        like = Like(base.shape, base.dtype, base.device, base.strides)
        return self._value(SCATTER, (base, part), {}, like, chain=chain)

    def _write(self, alias: _Alias, value: Value) -> None:
        storage = alias.storage
        chain = tuple(step for step in alias.chain if step.op not in _WHOLE)
        if chain:
            alias.value = value
            value = alias.looked_into = self._scatter(storage.current, value, chain)
        else:
            alias.value = value
        storage.current = value
        storage.version += 1
        storage.writers.append(self.node)
        self._note_write(self.node, value)
        self._placed.append((self.node, storage, value))
        if storage not in self._just_written:
            self._just_written.append(storage)
        alias.version = storage.version
        for other in storage.same:
            if other is not storage:
                self._overwrite(other, value)

    def _overwrite(self, storage: _Storage, by: Value) -> None:
        """A write to other memory that turns out to be the same."""
        now = storage.current
        like = Like(now.shape, now.dtype, now.device, now.strides)
        storage.current = self._opaque(like, now, by)
        storage.version += 1
        storage.writers.append(self.node)
        self._note_write(self.node, storage.current)
        self._placed.append((self.node, storage, storage.current))
        if storage not in self._just_written:
            self._just_written.append(storage)


def written_range(scatter: Value) -> Range | None:
    """The part that a ``SCATTER`` writes; None where it is no part of one dimension."""
    return shown_range(scatter.chain, scatter.source.shape)


def _sizes(like: torch.Tensor | Like) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Shape and strides as ints or sympy expressions."""
    if isinstance(like, Like):
        return like.shape, like.strides
    return plain(tuple(like.shape)), plain(tuple(like.stride()))


def _is_read_from(view: Value, source: Value) -> bool:
    return bool(view.args) and view.args[0] is source


def _is_new(value: Value) -> bool:
    """Whether a factory made the value: there is no gradient that a ``detach`` could cut."""
    if isinstance(value.op, str):
        return False
    name = value.op._schema.name.removeprefix("aten::").removesuffix("_like").removeprefix("new_")
    return name in {"empty", "zeros", "ones", "full", "empty_strided", "scalar_tensor", "arange"}


def _functional_form(func: Any) -> Any | None:
    """``aten.add_.Tensor`` -> ``aten.add.Tensor``; None when there is no such operator."""
    name = func._schema.name.split("::")[1]
    if not name.endswith("_") or name.startswith("__"):
        return None
    packet = getattr(getattr(torch.ops, func.namespace), name[:-1], None)
    return getattr(packet, func._overloadname, None)


def _taken_apart(call: Call) -> list[Call]:
    """``a + value * b * c`` as a product and a sum, which have rules of their own.

    But not where a product by itself would have fewer digits than the sum.
    """
    addition: Any
    weight: Any
    if call.func.namespace == "prims" and str(call.func) == "prims.fma.default":
        # Dynamo writes some of them as ``a * b + c``, by an operator that it defines then.
        left, right, target = call.args
        addition, weight = torch.ops.aten.add.Tensor, 1
        if not isinstance(right, torch.Tensor):
            return [Call(addition, (target, left), {"alpha": right}, call.result)]
    elif call.func in _PRODUCTS_ADDED and len(call.args) == 3:
        target, left, right = call.args
        addition, weight = _PRODUCTS_ADDED[call.func], call.kwargs.get("value", 1)
    else:
        return [call]
    product = torch.ops.aten.mul.Tensor(left, right)
    if not product.dtype.is_floating_point or product.dtype is not call.result.dtype:
        return [call]
    return [
        Call(torch.ops.aten.mul.Tensor, (left, right), {}, product),
        Call(addition, (target, product), {"alpha": weight}, call.result),
    ]


def _asks_for_sizes(node: fx.Node) -> bool:
    """Whether a node without tensor results is known to have no effect."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    return node.target is getattr or getattr(node.target, "__module__", "") == "_operator"


def _unfollowed(tree: Any) -> Iterator[str]:
    if isinstance(tree, _Unfollowed):
        yield tree.why
    elif isinstance(tree, (list, tuple, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _unfollowed(part)


def _is_unfollowed(tree: Any) -> bool:
    return any(True for _ in _unfollowed(tree))


def _has_example(node: fx.Node) -> bool:
    return "example_value" in node.meta or "val" in node.meta


def _makes_new_sizes(node: fx.Node, env: dict[fx.Node, Any]) -> bool:
    """Whether a size of the result depends on the data in the arguments.

    It would get another symbol here than it has in the graph.
    """
    if functorch_depth() or not _has_example(node):
        return False
    new = unbacked_symbols(_example(node))
    return bool(new) and not new <= set().union(
        *(unbacked_symbols(env[argument]) for argument in node.all_input_nodes)
    )


def _may_write(node: fx.Node) -> bool:
    """Whether a function may change its arguments, by its name."""
    target = node.target
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    module = "torch" if isinstance(target, str) else getattr(target, "__module__", None) or "torch"
    if module.partition(".")[0] not in ("torch", "_operator"):
        return True
    in_place = name.endswith("_") and not name.endswith("__")
    updates = module == "_operator" and name in _UPDATES
    return in_place or updates or name == "__setitem__" or "out" in node.kwargs


def _example(node: fx.Node) -> Any:
    example = node.meta.get("example_value", node.meta.get("val"))
    if not _has_example(node) and node.op != "placeholder":
        raise UntraceableGraph(Unreadable.UNKNOWN_RESULT, str(node.target), node)
    return example


def _values_in(tree: Any) -> Iterator[Value]:
    for part in tree:
        if isinstance(part, Value):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from _values_in(part)
