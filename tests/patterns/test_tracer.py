"""Nodes that do not run on fake tensors, and those that are about DTensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import graph_of
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mhf_compiler.compat import (
    ExportedInput,
    FakeTensorMode,
    functorch_depth,
    leave_functorch_levels,
    set_exported_input,
)
from mhf_compiler.patterns import tracer
from mhf_compiler.patterns.canonical import INPUT, OPAQUE, CanonicalCopy, UntraceableGraph
from mhf_compiler.patterns.reasons import Unreadable
from mhf_compiler.patterns.recorder import Recorder
from mhf_compiler.patterns.tracer import (
    _asks_for_sizes,
    _is_about_shards,
    _known_result,
    _makes_new_sizes,
    _may_write,
    _Tracer,
    trace,
)


def x() -> Tensor:
    return torch.randn(4, 6)


def with_function(
    function: Callable[..., Any], *, known: Any = None, unary: bool = True
) -> fx.GraphModule:
    """A graph that calls a function of one tensor, or of the same tensor twice."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = FakeTensorMode().from_tensor(x())
    called = graph.call_function(function, (node,) if unary else (node, node))
    if known is not None:
        called.meta["val"] = known
    graph.output(called)
    return fx.GraphModule({}, graph)


# What does not run.


def failing(*message: str) -> Callable[[Tensor], Tensor]:
    def function(tensor: Tensor) -> Tensor:
        raise ValueError(*message)

    return function


@pytest.mark.parametrize(
    ("message", "detail"), [(("a\nb",), "a"), ((), "ValueError")], ids=["said", "nothing said"]
)
def test_a_node_that_does_not_run_is_told_with_the_first_line(
    message: tuple[str, ...], detail: str
):
    with pytest.raises(UntraceableGraph) as caught:
        trace(with_function(failing(*message)))
    assert caught.value.reason.kind is Unreadable.NOT_ON_FAKES
    assert caught.value.reason.detail == detail


def test_a_node_that_does_not_run_has_the_result_that_is_known():
    copy = trace(with_function(failing("it"), known=x()))
    assert copy.values[-1].op == OPAQUE


def test_a_failure_of_the_recorder_itself_is_none_of_the_node(monkeypatch: pytest.MonkeyPatch):
    def broken(recorder: Recorder, call: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Recorder, "record", broken)
    with pytest.raises(ZeroDivisionError):
        trace(with_function(torch.sin, known=x()))


def test_a_node_in_vmap_that_does_not_run_is_refused():
    """What is known of its result is not batched as the result would be."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(torch.vmap(lambda a: a.sin() + 1), backend=keep, fullgraph=True)(x())
    (node,) = graphs[0].graph.find_nodes(op="call_method", target="sin")
    node.op, node.target = "call_function", failing("in vmap")
    with pytest.raises(UntraceableGraph) as caught:
        trace(graphs[0])
    assert caught.value.reason.detail == "in vmap"
    assert functorch_depth() == 0


def test_levels_around_a_graph_stay_where_it_leaves_its_own():
    """On PyTorch 2.11 as well, which has a function for it that leaves them all."""

    def failing_inside(a: Tensor) -> Tensor:
        torch._C._functorch._vmap_increment_nesting(3, "error")
        leave_functorch_levels(1)
        assert functorch_depth() == 1
        return a.sin()

    tensor = x()
    assert torch.vmap(failing_inside)(tensor).equal(tensor.sin())


def test_a_number_that_is_an_input_of_an_exported_program_is_one():
    gm = fx.symbolic_trace(lambda a, n: a * n)
    tensor, number = gm.graph.find_nodes(op="placeholder")
    tensor.meta["val"], number.meta["val"] = FakeTensorMode().from_tensor(x()), 3
    set_exported_input(number, ExportedInput("n", None, is_parameter=False))
    assert trace(gm).values[-1].args[1] == 3


@pytest.mark.parametrize("memories", [("m", "m"), ("m", "n")], ids=["one", "two"])
def test_inputs_of_an_exported_program_share_memory_if_it_says_so(memories: tuple[str, str]):
    """Their examples do not show it: what is written to one of them may be read from the other."""
    gm = graph_of(lambda a, b: (a.sin(), b.add_(1), a.cos()), x(), x())
    inputs = gm.graph.find_nodes(op="placeholder")
    for one, memory in zip(inputs, memories, strict=True):
        set_exported_input(one, ExportedInput(one.name, memory, is_parameter=False))
    copy = trace(gm)
    before, _, after = (value for value in copy.value_of.values() if value.op != INPUT)
    assert (after.source is before.source) is (memories[0] != memories[1])


def test_two_tensors_of_a_subclass_are_not_compared_as_python_would():
    gm = with_function(operator.eq, known=x() > 0, unary=False)
    (node,) = gm.graph.find_nodes(op="placeholder")
    node.meta["val"] = a_subclass()
    assert [value.op for value in trace(gm).values] == [OPAQUE]


def test_a_graph_under_inference_mode_enters_no_region_itself():
    with torch.inference_mode():
        copy = trace(graph_of(lambda a: a.sin(), x()))
    assert copy.inference == set()


def test_a_mark_is_an_effect():
    """Dynamo writes down ``requires_grad_`` so; no operation runs for it."""

    def _set_tensor_requires_grad(tensor: Tensor) -> Tensor:
        return tensor

    gm = with_function(_set_tensor_requires_grad)
    (node,) = gm.graph.find_nodes(op="call_function", target=_set_tensor_requires_grad)
    copy = trace(gm)
    assert node not in copy.pure
    assert copy.value_of[node].requires_grad


def a_subclass() -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(x(), x())


@pytest.mark.parametrize(
    ("target", "result", "escapes"),
    [
        ("writes_", x, True),
        ("reads", x, False),
        ("reads", lambda: None, True),
        ("reads", lambda: (x(), a_subclass()), True),
    ],
    ids=["written", "read", "nothing returned", "a subclass returned"],
)
def test_what_an_unknown_operation_may_keep_escapes(
    target: str, result: Callable[[], Any], escapes: bool
):
    """It may write to what it reads, or have results that are not followed."""
    gm = graph_of(lambda a: a.sin(), x())
    sine = next(node for node in gm.graph.nodes if node.name == "sin")
    with gm.graph.inserting_after(sine):
        called = gm.graph.call_method(target, (sine,))
    called.meta["val"] = result()
    gm.graph.output_node().args = (called,)
    copy = trace(gm)
    assert (copy.value_of[sine] in copy.escaping) is escapes


# Nodes by themselves.


def node(op: str, target: Any, **kwargs: Any) -> fx.Node:
    return fx.Graph().create_node(op, target, (), kwargs)


def theirs(tensor: Tensor) -> None:
    """A function that PyTorch does not define."""


def function_of(module: str) -> Callable[[], None]:
    def function() -> None:
        pass

    function.__module__ = module
    return function


@pytest.mark.parametrize(
    ("called", "writes"),
    [
        (node("call_method", "add_"), True),
        (node("call_method", "add"), False),
        (node("call_method", "__or__"), False),
        (node("call_method", "__setitem__"), True),
        (node("call_function", operator.iadd), True),
        (node("call_function", operator.setitem), True),
        (node("call_function", operator.add), False),
        (node("call_function", torch.sin), False),
        (node("call_function", torch.sin, out=1), True),
        (node("call_function", Tensor.add_), True),  # of no module
        (node("call_function", Tensor.add), False),
        (node("call_function", torch.ops.aten.add_.Tensor), True),
        (node("call_function", torch.ops.aten.add.Tensor), False),
        (node("call_function", theirs), True),
    ],
    ids=lambda given: given.name if isinstance(given, fx.Node) else None,
)
def test_a_function_may_write_by_its_name(called: fx.Node, writes: bool):
    assert _may_write(called) is writes


@pytest.mark.parametrize(
    ("called", "about"),
    [
        (node("call_method", "redistribute"), True),
        (node("call_method", "sin"), False),
        (node("call_function", torch.sin), False),
        (node("call_function", operator.add), False),
        (node("call_function", Tensor.sin), False),  # of no module
        (node("call_function", function_of("torch.distributed.tensor")), True),
        (node("call_function", function_of("model")), True),
    ],
    ids=lambda given: str(given.target)[:40] if isinstance(given, fx.Node) else None,
)
def test_a_function_is_about_shards_by_where_it_is_defined(called: fx.Node, about: bool):
    assert _is_about_shards(called) is about


@pytest.mark.parametrize(
    ("called", "asks"),
    [
        (node("call_method", "size"), True),
        (node("call_method", "sin"), False),
        (node("call_function", getattr), True),
        (node("call_function", operator.mul), True),
        (node("call_function", print), False),
    ],
    ids=lambda given: given.name if isinstance(given, fx.Node) else None,
)
def test_what_asks_for_sizes_has_no_effect(called: fx.Node, asks: bool):
    assert _asks_for_sizes(called) is asks


def test_what_computes_a_tensor_or_asks_for_a_size_may_go():
    copy = trace(graph_of(lambda a: a.view(a.size(0), -1), x()))
    assert {one.name for one in copy.pure} == {"size", "view"}


def test_what_returns_no_tensor_may_have_an_effect():
    def told(tensor: Tensor) -> None:
        """Somebody else may learn of the tensor."""

    assert trace(with_function(told)).pure == set()


def test_a_size_of_data_in_a_transform_is_that_of_the_batched_result(
    monkeypatch: pytest.MonkeyPatch,
):
    """There, what is known of a result is not what the result would be."""
    selected = node("call_method", "nonzero")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        selected.meta["val"] = mode.from_tensor(x()).nonzero()
    assert _makes_new_sizes(selected, {})
    monkeypatch.setattr(tracer, "functorch_depth", lambda: 1)
    assert not _makes_new_sizes(selected, {})


def test_the_result_of_a_node_is_not_known_without_an_example():
    with pytest.raises(UntraceableGraph) as caught:
        _known_result(node("call_method", "sin"))
    assert caught.value.reason.kind is Unreadable.UNKNOWN_RESULT
    assert _known_result(node("placeholder", "x")) is None


# DTensors: here, tensors that are said to be some.


class Sharded:
    """A graph of inputs, the first of which is said to be a DTensor; and its tracer."""

    def __init__(
        self, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, inputs: int = 1
    ) -> None:
        self.gm = graph_of(function, *(x() for _ in range(inputs)))
        mode = FakeTensorMode()
        for one in self.gm.graph.nodes:
            one.meta.setdefault("val", mode.from_tensor(x()))
        plain = [n.meta["val"] for n in self.gm.graph.find_nodes(op="placeholder")[1:]]
        meshes = lambda t: None if any(t is one for one in plain) else "mesh"  # noqa: E731
        monkeypatch.setattr(tracer, "device_mesh", meshes)
        self.tracer = _Tracer(self.gm)
        with FakeTensorMode(), self.tracer.switches:
            self.copy: CanonicalCopy = self.tracer.trace()

    def depends(self, name: str) -> bool:
        """Whether a node does with DTensors what it would not do with whole tensors."""
        return self.tracer._depends_on_shards(
            next(node for node in self.gm.graph.nodes if node.name == name)
        )


def test_an_operation_on_one_mesh_is_that_on_whole_tensors(monkeypatch: pytest.MonkeyPatch):
    graph = Sharded(lambda a, b: (a.sin(), a + b), monkeypatch, 2)
    assert not graph.depends("sin")
    assert graph.depends("add")


def test_an_operation_is_about_shards_by_its_function(monkeypatch: pytest.MonkeyPatch):
    graph = Sharded(lambda a: a.sin(), monkeypatch)
    (sine,) = graph.gm.graph.find_nodes(op="call_method", target="sin")
    sine.target = "redistribute"
    assert graph.depends("sin")


def test_a_plain_tensor_next_to_dtensors_may_be_overwritten(monkeypatch: pytest.MonkeyPatch):
    graph = Sharded(lambda a, b: (a.sin(), b.add_(1)), monkeypatch, 2)
    _, plain = graph.gm.graph.find_nodes(op="placeholder")
    (called,) = graph.gm.graph.find_nodes(op="call_method", target="add_")
    called.meta["val"] = plain.meta["val"]
    assert not graph.depends("add_")


def test_an_operation_in_vmap_depends_on_shards(monkeypatch: pytest.MonkeyPatch):
    graph = Sharded(lambda a: a.sin(), monkeypatch)
    monkeypatch.setattr(tracer, "functorch_depth", lambda: 1)
    assert graph.depends("sin")


def twice(tensor: Tensor) -> Tensor:
    y = tensor.sin()
    return y.add_(1) + y


def viewed(tensor: Tensor) -> Tensor:
    return (tensor * 2).view(24).add_(1)


OVERWRITING: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "what nothing else reads": (lambda a: a.sin().add_(1), False),
    "what is read twice": (twice, True),
    "an input": (lambda a: a.add_(1), True),
    "a view": (viewed, True),
    "in another way": (lambda a: a.sin().pow_(2), True),
}


@pytest.mark.parametrize(("function", "depends"), OVERWRITING.values(), ids=OVERWRITING)
def test_a_dtensor_may_be_overwritten_by_its_only_reader(
    function: Callable[[Tensor], Any], depends: bool, monkeypatch: pytest.MonkeyPatch
):
    graph = Sharded(function, monkeypatch)
    name = next(n.name for n in graph.gm.graph.nodes if n.name in ("add_", "pow_"))
    assert graph.depends(name) is depends


def test_a_number_that_a_tensor_is_added_to_is_not_overwritten(monkeypatch: pytest.MonkeyPatch):
    graph = Sharded(lambda a: a.sin().add_(1), monkeypatch)
    (called,) = graph.gm.graph.find_nodes(op="call_method", target="add_")
    called.args = (1, called.args[0])
    assert graph.depends("add_")
