"""Every private PyTorch name that the project uses, in one place.

The rest of the code imports these from here, so that a new PyTorch release is one file to check.
Tested on the oldest and the newest supported release.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary
from types import CodeType
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing, counters
from torch._guards import TracingContext, tracing
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.fx.node import map_arg
from torch.fx.traceback import NodeSource
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.functions import FloorDiv, Max

__all__ = [
    "BUCKET",
    "BucketCut",
    "Collectives",
    "ExportedInput",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "HigherOrderOperator",
    "Interruption",
    "OpOverload",
    "RestartAnalysis",
    "StorageWeakRef",
    "TorchDispatchMode",
    "arguments_by_name",
    "auto_functionalized",
    "bucket_cut",
    "build_cpp",
    "cache_folder",
    "compile_graph",
    "compiled_in_place_set_aside",
    "computes_gradients",
    "copy_dynamo_metadata",
    "counters",
    "device_mesh",
    "disables_added_passes",
    "dtensor_of",
    "example_of",
    "exported_input",
    "fake_view",
    "functorch_depth",
    "grad_levels",
    "has_examples_of_dynamo",
    "has_symbols",
    "inductor_modes",
    "inductor_options",
    "interruptions",
    "is_graph_of_dynamo",
    "is_minifying",
    "is_part_of_buckets",
    "is_traceable_wrapper_subclass",
    "is_tracing",
    "is_wrapped",
    "least_without_floors",
    "leave_functorch_levels",
    "load_cpp",
    "local_tensor",
    "looks_up_rewritten_graph",
    "make_fx",
    "named_arguments",
    "named_source",
    "names_of_self",
    "new_fake",
    "no_fake_mode",
    "no_new_guards",
    "no_python_dispatcher",
    "no_saved_tensor_hooks",
    "no_tracing_context",
    "place_numbers",
    "placed_alike",
    "placements",
    "realize_to_strides",
    "realize_while_tracing",
    "reason_of_graph_break",
    "redistributed",
    "register_shardings",
    "reset_cuda_graphs",
    "reset_with_dynamo",
    "run_afresh",
    "run_pass",
    "runs_pass_after_autograd",
    "set_example",
    "set_exported_input",
    "setting_of_inductor",
    "shape_env_of",
    "size_hint",
    "source_name",
    "statically_known_true",
    "storage_identity",
    "storage_of",
    "symbolic_size",
    "tell_inductor_of",
    "trace_artifact",
    "tracing_context",
    "tracks_provenance",
    "tree_leaves",
    "unbacked_symbols",
    "unwrap_for_grad",
    "with_added_passes",
    "with_pass",
    "without_added_passes",
]

#: in a node's ``meta``: its bucket, see ``mhf_compiler/buckets.py``
BUCKET = "flashmhf_bucket"

no_fake_mode = unset_fake_temporarily
# To set other hooks, or none, would be an error next to a transform of torch.func.
no_saved_tensor_hooks = _disable_saved_tensors_hooks_during_tracing
unwrap_for_grad = torch._C._functorch._unwrap_for_grad
auto_functionalized = torch.ops.higher_order.auto_functionalized


def symbolic_size(size: int | torch.SymInt | torch.SymFloat) -> int | sympy.Expr:
    """A number as an int, or as the sympy expression of a symbolic one.

    Quotients that leave no remainder are divided, and positive integers are at least 1: of equal
    batch and length, which have one symbol under ``dynamic=True``, a reshape makes ``s**2 // s``
    and a stride ``Max(1, s**2 // s)``.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.has(FloorDiv, Max):
        expression = expression.replace(FloorDiv, _divided).replace(Max, _largest)
    return int(expression) if expression.is_Integer else expression


def _divided(dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    numerator, denominator = sympy.cancel(dividend / divisor).as_numer_denom()
    return numerator if denominator == 1 else FloorDiv(dividend, divisor)


def least_without_floors(expression: sympy.Expr) -> sympy.Expr:
    """A number that has the sign of the least that a sum of integers can be, without ``//``.

    ``q * (p // q)`` is ``p`` less a remainder from 0 to ``q - 1``. Where a quotient is not divided
    by a positive number, or enters in another way than times a number, it stays.
    """
    while True:
        floors = sorted(expression.atoms(FloorDiv), key=sympy.count_ops, reverse=True)
        for floor in floors:  # those that contain others come first
            factor, (dividend, divisor) = expression.coeff(floor), floor.args
            rest = sympy.expand(expression - factor * floor)
            known = factor.is_Integer and divisor.is_Integer and divisor > 0 and not rest.has(floor)
            if known:
                remainder = divisor - 1 if factor > 0 else 0
                expression = sympy.expand(divisor * rest + factor * (dividend - remainder))
                break
        else:
            return expression


def _largest(*numbers: sympy.Expr) -> sympy.Expr:
    others = [number for number in numbers if number != 1]
    one = len(others) == 1 < len(numbers) and others[0].is_integer and others[0].is_positive
    return others[0] if one else Max(*numbers)


def example_of(node: torch.fx.Node) -> Any | None:
    """What the result of a node looks like: fake tensors, sizes, or sequences of them.

    Dynamo writes it down as ``example_value``, AOTAutograd as ``val``. None where neither did.
    """
    return node.meta.get("example_value", node.meta.get("val"))


def has_examples_of_dynamo(node: torch.fx.Node) -> bool:
    """Whether a node's example shows gradients and shared memory, too, as Dynamo's do.

    Those of exported programs are detached, and in memory of their own once they were loaded.
    """
    return "example_value" in node.meta


def has_symbols(example: Any) -> bool:
    """Whether a node's example is symbolic, or has a symbolic size or stride."""
    return any(True for _ in _symbols(example))


def shape_env_of(example: Any) -> Any | None:
    """The shape environment of a node's example; None if nothing in it is symbolic."""
    return next((symbol.node.shape_env for symbol in _symbols(example)), None)


def _symbols(example: Any) -> Iterator[torch.SymInt | torch.SymFloat | torch.SymBool]:
    if isinstance(example, torch.Tensor):
        if type(example) is FakeTensor and not example._has_symbolic_sizes_strides:
            return
        yield from _symbols((*example.shape, *example.stride(), example.storage_offset()))
    elif isinstance(example, (list, tuple)):
        for part in example:
            yield from _symbols(part)
    elif isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        yield example


def unbacked_symbols(example: Any) -> set[sympy.Symbol]:
    """The symbols in a node's example that stand for sizes or numbers which depend on data."""
    if isinstance(example, (list, tuple)):
        return set().union(*map(unbacked_symbols, example))
    if isinstance(example, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(free_unbacked_symbols(example))
    return set()


def size_hint(size: Any) -> Any:
    """A number; for a symbolic one, its value in the example."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size.node.hint
    return size


def new_fake(
    like: FakeTensor,
    shape: Sequence[Any],
    strides: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
) -> FakeTensor:
    """A fake tensor in memory of its own, in the mode of another.

    ``torch.empty_strided`` returns the same, and asks every mode for it.
    """
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return FakeTensor(like.fake_mode, meta, device)


def fake_view(
    base: FakeTensor, shape: Sequence[Any], strides: Sequence[Any], offset: int
) -> FakeTensor:
    """A fake tensor in the memory of another."""
    with in_kernel_invocation_manager(base.fake_mode), torch.no_grad():
        meta = torch.as_strided(base, shape, strides, offset)
    return FakeTensor(base.fake_mode, meta, base.fake_device)


def is_tracing() -> bool:
    """Whether Dynamo is compiling; what runs then runs on fake tensors."""
    return TracingContext.try_get() is not None


@contextmanager
def no_new_guards(shape_env: Any | None) -> Iterator[None]:
    """Run an analysis that must not change the user's dynamic shapes.

    Guards made inside are dropped, and so are sizes that depend on data. Operations go through
    their Python decompositions, which are the ones that take symbolic sizes.
    """
    with ExitStack() as stack:
        if shape_env is not None:
            stack.enter_context(shape_env.suppress_guards())
            stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(enable_python_dispatcher())
        yield


def computes_gradients(node: torch.fx.Node) -> bool:
    """Whether a node of Dynamo's graph is the backward pass of a ``torch.func.grad``."""
    return getattr(node.target, "__name__", "") == "_autograd_grad"


def functorch_depth() -> int:
    """How many levels of ``vmap`` and ``grad`` are entered."""
    return int(torch._C._functorch.get_dynamic_layer_stack_depth())


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for another one in a level of ``vmap`` or ``grad``."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def grad_levels() -> tuple[int, ...] | None:
    """The levels of ``torch.func.grad`` that are entered, outermost first.

    Levels of ``vmap`` alone count as none; None where other levels are among them.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    kinds = {interpreter.key() for interpreter in stack}
    if kinds <= {torch._C._functorch.TransformType.Vmap}:
        return ()
    if kinds != {torch._C._functorch.TransformType.Grad}:
        return None
    return tuple(interpreter.level() for interpreter in stack)


def leave_functorch_levels(depth: int) -> None:
    """Leave the levels above ``depth``, which an exception has left open."""
    while functorch_depth() > depth:  # PyTorch 2.11's own way to do so leaves all of them
        torch._C._functorch.pop_dynamic_layer_stack()


def copy_dynamo_metadata(old: torch.fx.Node, new: torch.fx.Node) -> None:
    """Copy what Dynamo attaches to a node besides ``meta``, such as the source of an input."""
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, value)


@dataclass(frozen=True)
class ExportedInput:
    """What an exported program says of an input, which Dynamo's examples show.

    Attributes:
        name: what the model calls it.
        memory: equal for inputs that may share memory.
        is_parameter: whether it is a parameter of the model.
    """

    name: str
    memory: Hashable
    is_parameter: bool


_EXPORTED_INPUT = "flashmhf_exported_input"


def exported_input(node: torch.fx.Node) -> ExportedInput | None:
    """What is known of a node that is an input of an exported program; None for other nodes."""
    return node.meta.get(_EXPORTED_INPUT)


def set_exported_input(node: torch.fx.Node, known: ExportedInput | None) -> None:
    """Attach to an input what is known of it; None takes it away again."""
    node.meta.pop(_EXPORTED_INPUT, None)
    if known is not None:
        node.meta[_EXPORTED_INPUT] = known


def source_name(node: torch.fx.Node) -> str | None:
    """Where Dynamo found an input, such as ``L['self']._parameters['gate']``.

    For an input of an exported program, its name alone.
    """
    exported = exported_input(node)
    if exported is not None:
        return exported.name
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    return str(source.name() if callable(source.name) else source.name)


def names_of_self() -> tuple[str, ...]:
    """What the frame that Dynamo is compiling calls the module that it is a method of.

    Code of torch's own modules is compiled through a function that calls them ``fn``.
    """
    from torch._dynamo.symbolic_convert import tls

    frame = getattr(tls, "current_tx", None)
    if frame is None:
        return ("self", "fn")
    found = {"self", "fn"}
    for name, value in frame.f_locals.items():
        if isinstance(value, torch.nn.Module) and name not in found:
            code = getattr(type(value).forward, "__code__", None)
            if code is not None and code.co_varnames[:1] == (name,):
                found.add(name)
    return tuple(sorted(found))


def reason_of_graph_break(gm: torch.fx.GraphModule) -> tuple[str, FrameSummary | None] | None:
    """Why Dynamo ended a graph before the end of the code, and in which frame."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    return reason.reason, reason.user_stack[-1] if reason.user_stack else None


def is_part_of_buckets(gm: torch.fx.GraphModule) -> bool:
    """Whether a graph is one of those into which DDP's buckets have cut one of Dynamo's."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and reason.reason.startswith("DDPOptimizer")


@dataclass(frozen=True, eq=False)
class BucketCut:
    """How Dynamo's ``DDPOptimizer`` has cut the graph that is being compiled.

    Attributes:
        owner: the optimizer; there is one for each frame that Dynamo compiles.
        gm: the whole graph.
        buckets: the nodes of each part, other than inputs and output; the last part comes first in
            the backward pass.
    """

    owner: Any
    gm: torch.fx.GraphModule
    buckets: Sequence[Sequence[torch.fx.Node]]


def bucket_cut() -> BucketCut | None:
    """The cut of the graph that is being compiled, if ``DDPOptimizer`` has cut it.

    Imports are late, since they need ``torch.distributed``.
    """
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.symbolic_convert import InstructionTranslator

    optimizer = getattr(InstructionTranslator.current_tx().output.compiler_fn, "__self__", None)
    if not isinstance(optimizer, DDPOptimizer) or len(optimizer.buckets) < 2:
        return None
    buckets = [bucket.nodes for bucket in optimizer.buckets]
    gm = buckets[0][0].graph.owning_module
    return None if gm is None else BucketCut(optimizer, gm, buckets)


@contextmanager
def compiled_in_place_set_aside(model: Any) -> Iterator[None]:
    """Within, modules of ``model`` on which ``compile`` was called run as they did before it."""
    modules = [*model.modules()] if isinstance(model, torch.nn.Module) else []
    compiled = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


def run_afresh(
    model: Callable[..., Any],
    backend: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: bool | None = None,
) -> Any:
    """Run a model of which a back end is given every graph, and leave nothing of that in Dynamo.

    What other back ends have compiled stays valid: they are other entries of the same caches. Code
    that Dynamo has given up on before is tried again, and sizes that it has seen are forgotten.

    Before torch 2.13 each call counts as one compilation towards Dynamo's limit for code that
    something else has compiled.
    """
    from torch._dynamo import config, pgo

    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    unlimited = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    sizes, pgo._CODE_STATE = pgo._CODE_STATE, defaultdict(pgo.CodeState)
    _forget_code_without_entries()
    try:
        with config.patch(unlimited):
            how: dict[str, Any] = {"dynamic": dynamic}
            if apart:
                how["isolate_recompiles"] = True
            compiled: Any = torch.compile(model, backend=backend, **how)
            return compiled(*args, **kwargs)
    finally:
        pgo._CODE_STATE = sizes
        _invalidate_entries_of(backend)
        _forget_code_without_entries()


def _traced_code() -> list[tuple[CodeType, list[Any]]]:
    """All code that Dynamo has seen, and what is compiled of each."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    codes = [code for known in [*input_codes.seen] if (code := known()) is not None]
    return [
        (
            code,
            [
                entry
                for entry in _debug_get_cache_entry_list(code)
                if not isinstance(entry.guard_manager, DeletedGuardManagerWrapper)
            ],
        )
        for code in codes
    ]


def _forget_code_without_entries() -> None:
    """Let Dynamo try code again that it skips, and drop what is invalid."""
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        for code, entries in _traced_code():
            if not entries:
                reset_code(code)


def _invalidate_entries_of(backend: Callable[..., Any]) -> None:
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    gone = DeletedGuardManagerWrapper("it was traced to be explained")
    with compile_lock:
        for _, entries in _traced_code():
            for entry in entries:
                if backend in (entry.backend, getattr(entry.backend, "compiler_fn", None)):
                    entry.guard_manager.extra_state.invalidate(entry, gone)


@dataclass(frozen=True)
class Interruption:
    """A place where Dynamo could not trace on.

    Attributes:
        reason: its own words.
        file: of the source.
        line: of the source.
        function: the function that contains it; it may be one that Dynamo has made of the rest.
        skipped: the name of the function that is left to Python as a whole; None if it is cut.
    """

    reason: str
    file: str
    line: int
    function: str
    skipped: str | None = None


@contextmanager
def interruptions() -> Iterator[list[Interruption]]:
    """What Dynamo notes of graph breaks and of functions it gives up, in a list filled at the end.

    Graphs know why they end. A break before the first operation has no graph, and one in a loop is
    seen in what PyTorch measures of each compilation alone.
    """
    from torch._dynamo.utils import get_compilation_metrics, graph_break_reasons

    found: list[Interruption] = []
    breaks, before = len(graph_break_reasons), {id(one) for one in get_compilation_metrics()}
    yield found
    for one in get_compilation_metrics():
        line = one.fail_user_frame_lineno
        if id(one) not in before and one.fail_reason is not None and line is not None:
            file, name = str(one.fail_user_frame_filename), str(one.co_name)
            found.append(Interruption(one.fail_reason, file, line, name, name))
    for reason in graph_break_reasons[breaks:]:
        if reason.user_stack:
            frame = reason.user_stack[-1]
            place = frame.filename, frame.lineno or 0, frame.name
            found.append(Interruption(reason.reason, *place))


def is_minifying() -> bool:
    """Whether PyTorch writes programs that reproduce what does not compile."""
    import torch._dynamo.config as config

    return config.repro_after is not None


def run_pass(
    gm: torch.fx.GraphModule,
    name: str,
    run: Callable[[torch.fx.GraphModule], None],
    *,
    after_autograd: bool = False,
) -> bool:
    """Run a pass as Inductor runs its own, and return whether it was run.

    It is timed, and left out if it is disabled by name or by a bisection. The import is late, as
    it brings Inductor's settings.
    """
    from torch.fx.passes.graph_transform_observer import GraphTransformObserver

    def ran(gm: torch.fx.GraphModule) -> bool:
        run(gm)
        return True

    stage = "post_grad_passes" if after_autograd else "pre_grad_passes"
    return bool(GraphTransformObserver(gm, name, stage).apply_gm_pass(ran))


class _Pass(CustomGraphPass):
    """A pass over Inductor's graphs; ``key`` stands for what it does, None if nothing can."""

    def __init__(self, run: Callable[[torch.fx.Graph], None], key: tuple[str, ...] | None) -> None:
        self.run = run
        self.key = key

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.run(graph)

    def uuid(self) -> Any | None:
        """The pass in the keys of PyTorch's caches; None, to cache nothing."""
        return self.key


class _AddedPass(_Pass):
    """A pass that the user has added to Inductor's options, for all graphs.

    Options that differ in the object alone would make Dynamo compile again: ``key`` decides
    whether two passes are equal. What stands for one in caches depends on the moment, too: modes,
    and sources that may have changed.
    """

    def __init__(
        self,
        run: Callable[[torch.fx.Graph], None],
        key: tuple[str, ...],
        key_now: Callable[[], tuple[str, ...] | None],
    ) -> None:
        super().__init__(run, key)
        self.key_now = key_now

    def uuid(self) -> Any | None:
        """What stands for the pass at this moment; None, to cache nothing."""
        now = self.key_now()
        return None if now is None or self.key is None else (*self.key, *now)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AddedPass) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class _Passes(CustomGraphPass):
    """Several passes, for a setting that takes one."""

    passes: tuple[Any, ...]

    def __call__(self, graph: torch.fx.Graph) -> None:
        module = graph.owning_module
        for one in self.passes:
            one(graph if module is None else module.graph)  # a pass may set another graph

    def uuid(self) -> Any | None:
        """Those of the passes; None, to cache nothing, if one of them is a mere function."""
        keys = [x.uuid() if isinstance(x, CustomGraphPass) else None for x in self.passes]
        return None if None in keys else tuple(keys)


_TIMING = "pre_grad_pass_timing"  # from torch 2.13 on; before, it was always early
_PRE_GRAD, _POST_GRAD = "pre_grad_custom_pass", "post_grad_custom_post_pass"


def named_source(name: str) -> Any:
    """What a node's ``from_node`` may begin with, so that Inductor's comments call it ``name``."""
    source = NodeSource(None)
    source.node_info = NodeSource.NodeInfo(name, name, -1)
    return source


def tracks_provenance() -> bool:
    """Whether Inductor keeps what each node was made from, for its own debugging."""
    import torch._inductor.config

    return bool(torch._inductor.config.trace.provenance_tracking_level)


def disables_added_passes() -> bool:
    """Whether the user has disabled every pass that is added to Inductor's after autograd."""
    import torch._inductor.config

    return _POST_GRAD.upper() in torch._inductor.config.disabled_passes.upper()


def with_pass(
    config: dict[str, Any], run: Callable[[torch.fx.Graph], None], key: tuple[str, ...] | None
) -> dict[str, Any]:
    """Inductor's settings with a pass over graphs after autograd, which ``key`` stands for.

    Without a key nothing is cached of what the pass has worked on.

    It runs just before Inductor decides what to write in place. Passes of the user's own, from
    these settings or from the global ones, run first.
    """
    return config | {_POST_GRAD: _setting([*_users_passes(config, _POST_GRAD), _Pass(run, key)])}


def with_added_passes(
    config: dict[str, Any],
    before_autograd: Callable[[torch.fx.Graph], None],
    after_autograd: Callable[[torch.fx.Graph], None],
    key: tuple[str, ...],
    key_now: Callable[[], tuple[str, ...] | None],
) -> dict[str, Any]:
    """Inductor's settings with two passes, for graphs that our back end does not compile.

    Passes of the user's own, from these settings or from the global ones, run after the first of
    ours and before the second, as they do under our back end. Passes that were added before are
    replaced. Those before autograd run before Inductor looks for the graph in its cache, unless the
    user has decided on that: what they find is counted each time.

    Args:
        config: the settings.
        before_autograd: is called with Dynamo's graphs and those inside of them.
        after_autograd: is called just before Inductor decides what to write in place.
        key: stands for both. They are pickled where PyTorch has no other key for them.
        key_now: returns what stands for them besides, at the moment when a graph is looked up in
            PyTorch's caches; None, to cache nothing of it.
    """
    import torch._inductor.config

    first = _AddedPass(before_autograd, (*key, "before"), key_now)
    last = _AddedPass(after_autograd, (*key, "after"), key_now)
    added = {
        _PRE_GRAD: _setting([first, *_users_passes(config, _PRE_GRAD)]),
        _POST_GRAD: _setting([*_users_passes(config, _POST_GRAD), last]),
    }
    if config.get(_TIMING, getattr(torch._inductor.config, _TIMING, None)) == "default":
        added[_TIMING] = "early"
    return config | added


def looks_up_rewritten_graph() -> bool:
    """Whether graphs go through the pass before autograd before they are looked up in a cache."""
    import torch._inductor.config

    return bool(getattr(torch._inductor.config, _TIMING, "early") == "early")


def runs_pass_after_autograd() -> bool:
    """Whether Inductor's settings have the pass of ``with_added_passes`` at this moment."""
    return any(isinstance(one, _AddedPass) for one in _passes({}, _POST_GRAD))


def without_added_passes(config: dict[str, Any]) -> dict[str, Any]:
    """Inductor's settings where our back end does what the passes of ``with_added_passes`` do."""
    for name in (_PRE_GRAD, _POST_GRAD):
        rest = _users_passes(config, name)
        if len(rest) < len(_passes(config, name)):
            config = config | {name: _setting(rest)}
    return config


def _users_passes(config: dict[str, Any], name: str) -> list[Any]:
    """The passes in one of Inductor's settings, without those that ``with_added_passes`` added."""
    return [one for one in _passes(config, name) if not isinstance(one, _AddedPass)]


def _passes(config: dict[str, Any], name: str) -> Sequence[Any]:
    """The passes in one of Inductor's settings: in ``config``, or the global one."""
    import torch._inductor.config

    given = config.get(name, getattr(torch._inductor.config, name)) or ()
    if isinstance(given, _Passes):
        return given.passes
    return given if isinstance(given, (list, tuple)) else (given,)


def _setting(passes: list[Any]) -> Any:
    """Several passes as one of Inductor's settings, which before torch 2.13 are one pass each."""
    if hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return passes
    return _Passes(tuple(passes)) if len(passes) > 1 else next(iter(passes), None)


def setting_of_inductor(name: str) -> Any:
    """One of Inductor's settings at this moment."""
    import torch._inductor.config

    return getattr(torch._inductor.config, name)


def tracing_context() -> Any | None:
    """What Dynamo keeps for the graph that is being compiled, its backward pass included."""
    return TracingContext.try_get()


def is_graph_of_dynamo(gm: torch.fx.GraphModule) -> bool:
    """Whether Dynamo made this graph for a back end; those inside of it are not meant."""
    return hasattr(gm, "compile_subgraph_reason")


def storage_identity(tensor: torch.Tensor) -> int:
    """A number that two tensors have in common if they share a storage, while both exist.

    The memory of a DTensor is that of its shard on this device.
    """
    return int(local_tensor(tensor).untyped_storage()._cdata)


def weak_storage(tensor: torch.Tensor) -> StorageWeakRef:
    """The storage of a tensor, of a DTensor that of its shard here, without keeping its memory."""
    return StorageWeakRef(local_tensor(tensor).untyped_storage())


# DTensors. They need torch.distributed.tensor, and exist only if somebody has imported it.


def device_mesh(tensor: Any) -> Any | None:
    """The mesh of a DTensor; None for any other tensor, also for one of a class made from it."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or type(tensor) is not module.DTensor:
        return None
    return tensor.device_mesh


def placements(tensor: Any) -> tuple[Any, ...]:
    """The placements of a DTensor; none for any other tensor."""
    return () if device_mesh(tensor) is None else tuple(tensor.placements)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor on this device; any other tensor itself."""
    if device_mesh(tensor) is None:
        return tensor
    return tensor._local_tensor  # type: ignore[attr-defined]


def dtensor_of(
    local: torch.Tensor,
    like: torch.Tensor,
    number: Callable[[Any], Any] = lambda sizes: sizes,
) -> torch.Tensor:
    """A DTensor with the shape, strides and placements of another, and this shard.

    ``number`` gives the sizes of what has symbolic ones.
    """
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,  # type: ignore[attr-defined]
        placements(like),
        run_check=False,
        shape=number(tuple(like.shape)),
        stride=number(like.stride()),
    )


def place_numbers(tensor: Any) -> tuple[int | str | None, ...] | None:
    """The placements of a DTensor as constants of a graph; None if there is one of another kind.

    An int is a dimension along which it is cut, None a whole tensor, "sum" a part of a sum.
    """
    found = [_place_number(place) for place in placements(tensor)]
    return None if "?" in found else tuple(found)


def _place_number(place: Any) -> int | str | None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if type(place) is Partial:
        return str(place.reduce_op) if place.reduce_op == "sum" else "?"
    if type(place) is Replicate:
        return None
    return int(place.dim) if type(place) is Shard else "?"


def _place(number: int | str | None) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if isinstance(number, int):
        return Shard(number)
    return Replicate() if number is None else Partial(number)


def redistributed(tensor: Any, places: Sequence[int | str | None]) -> Any:
    """A DTensor with other placements, as ``place_numbers`` has them; a plain tensor as it is."""
    if device_mesh(tensor) is None:
        return tensor
    return tensor.redistribute(placements=[*map(_place, places)])


def placed_alike(tensor: Any) -> Any:
    """The same DTensor, whose gradient will be placed as it is; a plain tensor as it is."""
    if device_mesh(tensor) is None:
        return tensor
    return tensor.redistribute(placements=tensor.placements)


class Collectives(TorchDispatchMode):
    """Counts the collectives that operations inside, on DTensors, need.

    That of ``torch.distributed.tensor.debug`` does not run under ``torch.autograd.grad``.

    Attributes:
        counts: by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(one, sys.modules["torch.distributed.tensor"].DTensor) for one in types):
            return NotImplemented  # what it does with shards is seen here, too
        name = str(func)
        if func.namespace in _COLLECTIVES and "wait_tensor" not in name:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


#: the namespaces of the ops that send tensors between devices
_COLLECTIVES = frozenset({"_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor"})


def no_tracing_context() -> Any:
    """A context in which Dynamo is not compiling; DTensor insists that there is one fake mode."""
    return tracing(None)


def storage_of(node: torch.fx.Node) -> int | None:
    """An identifier of the storage of a node's tensor, if it is one tensor with a storage."""
    from torch._inductor.fx_utils import get_node_storage

    return get_node_storage(node)


def realize_to_strides(node: torch.fx.Node) -> None:
    """Make Inductor write a node's tensor to memory, with the strides of its fake tensor."""
    node.meta["inductor_realize_to_strides"] = True


def realize_while_tracing(x: torch.Tensor) -> None:
    """The same for what a functional tensor is a view of, in the graph that is being traced."""
    mode = get_proxy_mode()
    if mode is None:  # AOTAutograd runs a program once before it traces it
        return
    torch._sync(x)  # type: ignore[attr-defined]
    traced = get_proxy_slot(torch._from_functional_tensor(x.elem), mode.tracer, None)  # type: ignore[attr-defined]
    if traced is None:
        return
    owner = traced.proxy.node
    storage = storage_of(owner)
    while found := [node for node in owner.all_input_nodes if storage_of(node) == storage]:
        owner = found[0]
    if storage is not None and owner.op == "call_function":
        realize_to_strides(owner)


def packages_ahead_of_time() -> bool:
    """Whether Inductor is making a package that runs without this process, as AOTInductor does."""
    from torch._inductor.virtualized import V

    return bool(V.aot_compilation)


def named_arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of a node that calls an op by name, defaults included."""
    return arguments_by_name(node.target, node.args, node.kwargs)


def arguments_by_name(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an op by name, defaults included."""
    parameters = op._schema.arguments
    given = dict(zip((p.name for p in parameters), args, strict=False)) | dict(kwargs)
    return {p.name: given.get(p.name, p.default_value) for p in parameters}


def set_example(node: torch.fx.Node) -> None:
    """Compute the fake tensors of a new node of Inductor's graph."""

    def example(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument

    args, kwargs = map_arg((node.args, node.kwargs), example)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, FakeTensor)]
    with tensors[0].fake_mode:
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Write an artifact to ``TORCH_TRACE``, if it is on; tlparse shows it with Dynamo's."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def compile_graph(
    name: str, gm: torch.fx.GraphModule, example_inputs: list[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a graph with one of Dynamo's back ends, as ``torch.compile`` would.

    ``config`` holds Inductor's settings; the other back ends have none. Imports are late, because
    Inductor is heavy. These names are documented.
    """
    if name == "inductor":
        import torch._inductor

        return torch._inductor.compile(gm, example_inputs, config)
    import torch._dynamo

    return torch._dynamo.lookup_backend(name)(gm, example_inputs)


def tell_inductor_of(ops: Sequence[Any], mutating: Sequence[Any]) -> None:
    """Make Inductor treat custom ops, packets of our two overloads each, as they need to be.

    Those that are ``mutating`` write to their first argument. For the rest of this process.

    Raises:
        ImportError: a name is missing that this, or a pass after autograd, needs: better now than
            when Inductor is running.
    """
    from torch._inductor.fx_utils import get_node_storage  # noqa: F401  (for storage_of)

    _import_ops_in_repros()
    _compute_arguments_once(ops)
    _overwrite_without_a_copy(mutating)


def _import_ops_in_repros() -> None:
    """Programs that PyTorch writes, to reproduce a failure or for debugging, need the ops as well.

    They import nothing but torch otherwise.
    """
    from torch._dynamo.repro import after_aot

    names = vars(after_aot)
    line = "import mhf_compiler.lowering  # defines torch.ops.mhf_compiler.multi_head_ffn"
    if line not in names["extra_imports"]:
        names["extra_imports"] += f"\n{line}\n"


def _compute_arguments_once(ops: Sequence[Any]) -> None:
    """Make Inductor compute what two of our ops read, such as the queries, once for both.

    Inductor learns that a fallback op needs realized inputs only when it lowers the first call, and
    by then it has inlined that call's queries into every reader.
    """
    from torch._inductor.lowering import add_needs_realized_inputs

    add_needs_realized_inputs([*ops])


def _overwrite_without_a_copy(ops: Sequence[Any]) -> None:
    """Make Inductor pass ops that mutate an argument its own memory, not that of a copy.

    Without this it copies a view of a buffer that is not realized yet to get its strides, and
    copies the result back.
    """
    from torch._inductor.lowering import constrain_to_fx_strides, make_fallback

    def in_memory(node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
        overwritten = args[0] if args else next(iter(kwargs.values()))
        overwritten.realize()
        return constrain_to_fx_strides(node, *args, **kwargs)

    for op in ops:
        for overload in (op.default, op.compiled):
            make_fallback(overload, layout_constraint=in_memory, warn=False)


def register_shardings(op: OpOverload, shardings: Callable[..., Iterator[Any]]) -> None:
    """Tell DTensor on which shards an op computes. ``torch.distributed.tensor`` must be importable.

    ``torch.distributed.tensor.experimental.register_sharding`` would do, but for what it remembers
    results by: with its key, calls with different flags or absent tensors would be the same.

    Args:
        op: what takes DTensors by position, and returns one or a list of them.
        shardings: is given the arguments, in which tensors have a ``shape``, and the shape of the
            mesh. It yields possible placements: of each tensor that is given, and of each result.
            There is one for each dimension of the mesh: an int is a dimension of the tensor along
            which it is cut, None is a whole tensor, "sum" a part of a sum. If no costs are known,
            the first is taken.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSpec, OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import generate_redistribute_costs

    def strategy(schema: Any) -> Any:
        mesh = schema.get_mesh_from_args()
        given = schema.args_strategy
        arguments = [x.tensor_meta if isinstance(x, OpStrategy) else x for x in schema.args_schema]
        found = []
        for inputs, outputs in shardings(arguments, tuple(mesh.shape)):
            results = [DTensorSpec(mesh, tuple(map(_place, places))) for places in outputs]
            specs = [
                DTensorSpec(mesh, tuple(map(_place, places)), tensor_meta=x.tensor_meta)
                for places, x in zip(inputs, given, strict=True)
            ]
            costs = [generate_redistribute_costs(*pair) for pair in zip(given, specs, strict=True)]
            found.append(OpSpec(tuple(results) if is_list else results[0], specs, costs))
        return OpStrategy(found)

    is_list = isinstance(op._schema.returns[0].type, torch.ListType)
    # Every argument from here on belongs to the key under which the result is remembered.
    key = RuntimeSchemaInfo(static_argnum=0)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, strategy, key)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Inductor's modes, with the settings that each stands for."""
    import torch._inductor

    return torch._inductor.list_mode_options()


def inductor_options() -> set[str]:
    """The names of Inductor's settings."""
    import torch._inductor

    return set(torch._inductor.list_options())


def cache_folder() -> Path | None:
    """Our folder in Inductor's cache folder; None if there are no caches, or it cannot be made."""
    import torch._inductor.config as config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if config.force_disable_caches:
        return None
    try:
        return Path(cache_dir()) / "flashmhf"
    except OSError:
        return None


def reset_with_dynamo(backend: Callable[..., Any]) -> None:
    """Have the next ``torch.compiler.reset`` call ``backend.reset``.

    Dynamo notes back ends where ``torch.compile`` is called, forgets them at a reset, and does not
    note them again where code is compiled anew.
    """
    from torch._dynamo.eval_frame import cached_backends

    known = cached_backends.values()
    if all(getattr(one, "compiler_fn", one) is not backend for one in known):
        cached_backends[id(backend)] = backend


def reset_cuda_graphs() -> None:
    """Reset Inductor's CUDA graph trees, if they are in use."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


class DamagedLibrary(OSError):
    """A library in the cache is not what was built."""


def build_cpp(source: Path, library: Path) -> Path:
    """Build a C++ library of PyTorch operators for this machine, by Inductor's toolchain.

    It is linked as a model that AOTInductor packages: to nothing of Python.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    # A program that links the library looks for it by this name, not by its path.
    named = f"-Wl,-soname,{library.name}"
    options = CppTorchOptions(vec_isa=pick_vec_isa(), aot_mode=True, extra_flags=[named])
    builder = CppBuilder(
        name=library.stem,
        sources=str(source),
        BuildOption=options,
        output_dir=str(library.parent),
    )
    builder.build()
    return Path(builder.get_target_file_path())


def load_cpp(source: str) -> ctypes.CDLL:
    """A C++ library, built for this machine by Inductor's toolchain, or found in its cache.

    Inductor's flags fit PyTorch's vectors (ATen/cpu/vec), and its OpenMP is its own kernels'.

    A library that was cut off, by a full disk or a process that was killed, can end the process
    that loads it. So the checksum of each is kept in a file next to it and compared beforehand. A
    library that is damaged, or older than this call and without a checksum, is built again.
    """
    from torch._inductor.codecache import CppCodeCache

    started = time.time() - 2  # clocks of file systems are coarse

    class Checked(CppCodeCache):
        cache: dict[str, Callable[[], Any]] = {}  # noqa: RUF012  (as in the base)

        @staticmethod
        def _load_library_inner(path: str, key: str) -> ctypes.CDLL:
            library, noted = Path(path), Path(f"{path}.sha256")
            checksum = hashlib.sha256(library.read_bytes()).hexdigest()
            if not noted.exists() and library.stat().st_mtime >= started:
                noted.write_text(checksum)
            if not noted.exists() or noted.read_text() != checksum:
                library.unlink(missing_ok=True)
                noted.unlink(missing_ok=True)
                raise DamagedLibrary(f"{path} is damaged")
            return ctypes.CDLL(path)

    try:
        return Checked.load(source)
    except DamagedLibrary:
        Checked.cache.clear()
        return Checked.load(source)
