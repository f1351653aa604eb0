"""The tracer: runs a Dynamo graph once over fake tensors and makes its canonical copy.

For each node it lets the recorder write down the ATen operations, and notes itself what belongs to
the node: which values it saw, which one it returned, under which modes it ran. A node that equals
an earlier one is not run (``repeats.py``); one that cannot run on fake tensors has the result that
Dynamo knows for it, as an opaque value.

A DTensor has the meaning of the whole tensor, and so have operations on DTensors. They are run over
whole fake tensors, wherever on a mesh the shards are. What turns plain tensors into DTensors or the
other way round, places one otherwise or overwrites one has an opaque value.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mhf_compiler.compat import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    device_mesh,
    example_of,
    exported_input,
    fake_view,
    functorch_depth,
    grad_levels,
    has_examples_of_dynamo,
    is_traceable_wrapper_subclass,
    is_wrapped,
    local_tensor,
    new_fake,
    no_new_guards,
    storage_identity,
    tree_leaves,
    unbacked_symbols,
)

from .canonical import INPUT, OPAQUE, CanonicalCopy, UntraceableGraph, Value
from .memory import Memory
from .modes import Switches, switches_modes
from .numbering import ValueNumbering
from .products import is_product_call
from .reasons import Unreadable
from .recorder import Recorder
from .repeats import Program, autocast_dtype, key_of, map_tensors, program, tensors_in

#: functions and methods that change a tensor where no operation shows it
_UNSEEN = frozenset({"detach_", "requires_grad_"})

#: what a function does to its argument apart from returning it: the result may have no reader
_MARKS = frozenset({"_set_tensor_requires_grad"})

#: operators that change their first argument
_UPDATES = frozenset(
    {
        *("setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv"),
        *("imod", "ipow", "ilshift", "irshift", "iand", "ior", "ixor", "iconcat"),
    }
)
#: of these, those that compute elements in the place of the first argument's
_SUMS_UP = frozenset({"iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_"})


#: higher-order operations that do to their arguments what the graphs that they are given do, and no
#: more: a hook, for one, changes a gradient
_CALL_GRAPHS = frozenset(
    {
        *("cond", "while_loop", "scan", "map_impl", "associative_scan", "invoke_subgraph"),
        *("tag_activation_checkpoint", "wrap_activation_checkpoint", "autograd_function_apply"),
        *("wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "flex_attention"),
    }
)

#: the one that returns the tensor that it was given
_HOOK = "register_hook"


@dataclass(frozen=True, slots=True)
class _Unfollowed:
    """In place of a tensor that is not followed, such as one of a subclass."""

    why: str


def trace(gm: fx.GraphModule, shape_env: Any | None = None) -> CanonicalCopy:
    """Write down what ``gm`` computes.

    Args:
        gm: a Dynamo graph; its placeholders carry fake tensors as ``example_value`` or ``val``.
        shape_env: the shape environment of their symbolic sizes.

    Raises:
        UntraceableGraph: the graph changes tensors in ways that are not followed, or an operation
            without a known result does not run on fake tensors.
    """
    tracer = _Tracer(gm)
    mode = FakeTensorMode(shape_env=shape_env)
    with no_new_guards(shape_env), mode, tracer.switches:
        return tracer.trace()


class _Tracer(fx.Interpreter):
    """Runs the graph node by node, and notes what belongs to each node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.switches = Switches()
        self._nodes = gm.graph.nodes
        self._copy = CanonicalCopy()
        self._values = ValueNumbering(self._copy)
        self._memory = Memory(self._copy, self._values)
        self._recorder = Recorder(self._values, self._memory)
        self._inference = torch.is_inference_mode_enabled()  # from the beginning
        self._attributes: dict[str, Any] = {}
        self._programs: dict[Hashable, Program] = {}
        self._overwriting: dict[fx.GraphModule, bool] = {}  # of the graphs inside of this one

    def trace(self) -> CanonicalCopy:
        """Run the whole graph. Fake tensors must be on, and guards off."""
        for position, node in enumerate(self._nodes):
            self._begin(node, position)
            self.env[node] = result = self.run_node(node)
            if node.op != "output":
                self._end(node, result)
        self._memory.finish()
        self._copy.finish()
        return self._copy

    # Before and after each node.

    def _begin(self, node: fx.Node, position: int) -> None:
        """Note what the node sees in its arguments."""
        self._values.node = self._memory.node = node
        self._recorder.begin_node()
        copy = self._copy
        copy.positions[node] = position
        seen: dict[fx.Node, Value] = {}
        for argument in node.all_input_nodes:
            result = self.env[argument]
            if isinstance(result, FakeTensor):
                seen[argument] = value = self._memory.read(result)
                copy.add_read(node, argument, value, self._memory.alias(result).storage)
            if node.op == "output":
                tensors = tensors_in(result)
                copy.escaping.update(map(self._memory.read, tensors))
                copy.returned += [(argument, id(self._memory.alias(t).storage)) for t in tensors]
        copy.reads[node] = seen

    def _end(self, node: fx.Node, result: Any) -> None:
        """Note what the node returned, and under which modes it ran."""
        copy = self._copy
        copy.autocast[node] = {
            kind: dtype for kind in ("cpu", "cuda") if (dtype := autocast_dtype(kind)) is not None
        }
        if self.switches.inference and not self._inference:
            copy.inference.add(node)
        if functorch_depth():
            copy.levels[node] = grad_levels()
        if not self._has_effects(node) and (tensors_in(result) or _asks_for_sizes(node)):
            copy.pure.add(node)
        shared = _shared_memory(node) if isinstance(result, FakeTensor) else None
        self._memory.end_node(result, shared)

    def _has_effects(self, node: fx.Node) -> bool:
        marks = getattr(node.target, "__name__", None) in _MARKS
        return node.op == "placeholder" or marks or self._recorder.has_effects

    # Running a node.

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or find out in another way what it returns."""
        if n.op == "placeholder":
            return self._placeholder(n)
        if n.op == "get_attr":
            return self._attribute(str(n.target))
        if getattr(n.target, "__name__", n.target) in _UNSEEN:
            raise UntraceableGraph(Unreadable.SWITCHED_GRADIENT, str(n.target), n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "output":
            return args[0]
        if switches_modes(n):
            return self.switches.run(n, args)
        if getattr(n.target, "__name__", None) in _MARKS:
            for tensor in tensors_in(args):
                self._memory.read(tensor).requires_grad = True
        if isinstance(n.target, HigherOrderOperator):
            return self._opaque_call(n, (args, kwargs))
        return self._call(n, args, kwargs)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A function, method or module: repeated, unknown, or run under the recorder."""
        if self._depends_on_shards(node):
            return self._unknown_call(node, (args, kwargs))
        key = key_of(node, args, kwargs)
        if key in self._programs and not functorch_depth():
            return self._repeat(self._programs[key], (args, kwargs))
        if _is_unfollowed((args, kwargs)) or _makes_new_sizes(node, self.env):
            return self._unknown_call(node, (args, kwargs))
        try:
            with self._recorder:
                result = getattr(self, node.op)(node.target, args, kwargs)
        except Exception as error:
            # What depends on data does not run on fake tensors: a number of a tensor, a branch.
            if self._recorder.is_broken:
                raise
            if functorch_depth() or not _has_example(node):
                first, *_ = str(error).splitlines() or [type(error).__name__]
                raise UntraceableGraph(Unreadable.NOT_ON_FAKES, first, node) from error
            return self._unknown_call(node, (args, kwargs))
        if key is not None:
            done = program(self._recorder.calls, (args, kwargs), result)
            if done is not None:
                self._programs[key] = done
        return result

    def _repeat(self, done: Program, arguments: Any) -> torch.Tensor:
        """What an equal node has done, over other arguments."""
        like, inputs = done.result, tensors_in(arguments)
        if done.offset is not None:
            result = fake_view(inputs[0], like.shape, like.strides, done.offset)
        else:
            result = new_fake(inputs[0], like.shape, like.strides, like.dtype, like.device)
        for call in done.over(inputs, result):
            self._recorder.record(call)
        return result

    def _placeholder(self, node: fx.Node) -> Any:
        fake = self._input(_known_result(node))
        known = exported_input(node)
        if known is not None and isinstance(fake, torch.Tensor):
            value = self._memory.alias(fake).storage.current
            value.is_parameter = known.is_parameter
            value.requires_grad = fake.is_floating_point()  # it may be, when the program runs
        return fake

    def _attribute(self, target: str) -> Any:
        if target not in self._attributes:
            self._attributes[target] = self._input(self.fetch_attr(target))
        return self._attributes[target]

    def _input(self, example: Any) -> Any:
        """A fake tensor of our own mode for a graph input or attribute."""
        if not isinstance(example, torch.Tensor):
            return example
        fake = self._new(example, INPUT)
        if isinstance(fake, torch.Tensor):
            storage = self._memory.alias(fake).storage
            storage.is_input = True
            storage.current.is_parameter = isinstance(example, torch.nn.Parameter)
            storage.current.requires_grad = example.requires_grad
        return fake

    def _new(self, example: torch.Tensor, op: str, operands: tuple[Value, ...] = ()) -> Any:
        """A fake tensor like the example, in memory of its own, made of operands somehow."""
        if is_traceable_wrapper_subclass(example):
            shard = local_tensor(example)
            if is_traceable_wrapper_subclass(shard):
                return _Unfollowed(type(example).__name__)
        fake = torch.empty_strided(
            example.shape, example.stride(), dtype=example.dtype, device=example.device
        )
        self._memory.allocate(fake, self._values.unknown(op, fake, operands))
        return fake

    def _depends_on_shards(self, node: fx.Node) -> bool:
        """Whether a node does with DTensors what it would not do with the whole tensors."""
        known = [self._example(one) for one in (*node.all_input_nodes, node)]
        meshes = {device_mesh(x) for x in tensors_in(known)}  # None for that of a plain tensor
        if meshes <= {None}:
            return False
        return (
            len(meshes) > 1
            or (_may_write(node) and not self._overwrites_its_own(node))
            or _is_about_shards(node)
            or functorch_depth() > 0
        )

    def _overwrites_its_own(self, node: fx.Node) -> bool:
        """Whether a node overwrites a tensor that nothing else reads, and no part of another.

        A view of a DTensor may be a copy, of which a write would not be seen in the tensor.
        """
        target = node.args[0] if node.args else None
        name = str(getattr(node.target, "__name__", node.target))
        if not isinstance(target, fx.Node) or name not in _SUMS_UP:
            return False
        alias = self._memory.alias(self.env[target])
        nodes = {target, *alias.storage.nodes}
        return (
            not alias.chain
            and not alias.storage.is_outside
            and all(len(one.users) == 1 for one in nodes)
        )

    def _example(self, node: fx.Node) -> Any:
        return self.fetch_attr(str(node.target)) if node.op == "get_attr" else example_of(node)

    def _opaque_call(self, node: fx.Node, arguments: Any) -> Any:
        """A higher-order operation: its results are opaque, and it may overwrite its arguments."""
        self._recorder.has_effects = True  # it may also draw random numbers, or register a hook
        graphs = [one for one in tree_leaves(arguments) if isinstance(one, fx.GraphModule)]
        known = str(node.target) in _CALL_GRAPHS
        writes = not known or any(map(self._overwrites_inputs, graphs))
        is_hook = str(node.target) == _HOOK
        before = self._memory.read(arguments[0][0]) if is_hook else None
        values = self._overwrite(arguments) if writes else self._read(arguments)
        self._copy.escaping.update(values)
        if before is not None:
            results = arguments[0][0]
            self._copy.hooked[before] = self._memory.read(results)
        else:
            results = map_tensors(lambda x: self._new(x, OPAQUE), _known_result(node))
        for tensor in tensors_in(results):
            self._copy.made_from[self._memory.read(tensor)] = values
        if not has_examples_of_dynamo(node):
            self._memory.may_share(tensors_in((arguments, results)))
        return results

    def _unknown_call(self, node: fx.Node, arguments: Any) -> Any:
        """An operation that cannot be run here: its results are opaque."""
        writes = _may_write(node)
        values = self._overwrite(arguments) if writes else self._read(arguments)
        results = map_tensors(lambda x: self._new(x, OPAQUE, values), _known_result(node))
        known = tensors_in(results)
        for name in _unfollowed(results):
            if is_product_call(node):
                self._copy.unfollowed.setdefault(name, []).append(node)
        if writes or _is_unfollowed(results) or not known:
            self._copy.escaping.update(values)  # their other readers are not seen
        why = next(iter(_unfollowed(arguments)), "")
        for tensor in known:
            value = self._memory.read(tensor)
            self._copy.made_from[value] = values
            value.subclass = why
        return results

    def _overwrites_inputs(self, graph: fx.GraphModule) -> bool:
        """Whether a graph inside of this one writes to what it is given, or may do so."""
        known = self._overwriting.get(graph)
        if known is None:
            inner = _Tracer(graph)
            try:
                with inner.switches:
                    known = bool(inner.trace().written_outside)
            except UntraceableGraph:
                known = True
            self._overwriting[graph] = known
        return known

    def _read(self, arguments: Any) -> tuple[Value, ...]:
        """The values of all that a node is given."""
        return tuple(map(self._memory.read, tensors_in(arguments)))

    def _overwrite(self, arguments: Any) -> tuple[Value, ...]:
        """Give all that a node is given unknown new values; returns what was there before."""
        self._recorder.has_effects = True
        values = self._read(arguments)
        for tensor in tensors_in(arguments):
            self._memory.write_unknown(tensor)
        return values


def _shared_memory(node: fx.Node) -> Hashable | None:
    """A name for the memory of a node's result that all results have which may share it."""
    known = exported_input(node)
    if known is not None:
        return known.memory
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or is_wrapped(example):
        return None
    return storage_identity(example)


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
    if functorch_depth():
        return False
    return any(
        all(symbol not in unbacked_symbols(env[argument]) for argument in node.all_input_nodes)
        for symbol in unbacked_symbols(example_of(node))
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
    updates = name in _UPDATES or name == "__setitem__"
    return in_place or updates or "out" in node.kwargs


def _is_about_shards(node: fx.Node) -> bool:
    """Whether a function exists for DTensors alone, and is about how they are placed."""
    if node.op == "call_method":
        return not hasattr(torch.Tensor, str(node.target))
    module = getattr(node.target, "__module__", None) or "torch"
    return module.partition(".")[0] not in ("torch", "_operator") or "distributed" in module


def _known_result(node: fx.Node) -> Any:
    """What Dynamo knows of a node's result: fake tensors, with numbers and symbols among them.

    Raises:
        UntraceableGraph: it knows nothing, and the node is no input.
    """
    if not _has_example(node) and node.op != "placeholder":
        raise UntraceableGraph(Unreadable.UNKNOWN_RESULT, str(node.target), node)
    return example_of(node)
