"""What is written down of operations that few graphs have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.graphs import graph_of
from torch import Tensor, fx

from mhf_compiler.compat import FakeTensorMode
from mhf_compiler.patterns.canonical import INPUT, OPAQUE, CanonicalCopy, UntraceableGraph
from mhf_compiler.patterns.memory import Memory
from mhf_compiler.patterns.numbering import ValueNumbering
from mhf_compiler.patterns.reasons import Unreadable
from mhf_compiler.patterns.recorder import (
    Recorder,
    _functional_form,
    _taken_apart,
    _without_out,
    _written_by,
)
from mhf_compiler.patterns.repeats import Call
from mhf_compiler.patterns.tracer import trace

aten = torch.ops.aten


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    """Operations of somebody's own, in all the forms that ATen's do not have."""
    library = torch.library.Library("test_recorder", "DEF")
    library.define("turned_(Tensor(a!) x) -> Tensor(a!)", tags=torch.Tag.inplace_view)
    library.define("alone_(Tensor(a!) x) -> Tensor(a!)")
    library.define("second(Tensor x, Tensor y) -> Tensor")
    library.define("second_(Tensor x, Tensor(a!) y) -> Tensor(a!)")
    library.define("alone.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
    library.define("into(Tensor x) -> Tensor")
    library.define("into.there(Tensor x, *, Tensor(a!) there) -> Tensor(a!)")
    library.define("two(Tensor x) -> (Tensor, Tensor)")
    library.define("two.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
    library.define("shown(Tensor(a) x, Tensor(b!) y) -> Tensor(a)")
    library.impl("two", lambda x: (x.clone(), x.clone()), "CompositeExplicitAutograd")
    library.impl("into", lambda x: x.clone(), "CompositeExplicitAutograd")
    yield torch.ops.test_recorder
    library._destroy()


class Recording:
    """A recorder, and fake tensors that it knows as inputs."""

    def __init__(self) -> None:
        copy = CanonicalCopy()
        self.values = ValueNumbering(copy)
        self.memory = Memory(copy, self.values)
        self.values.node = self.memory.node = fx.Graph().placeholder("x")
        self.recorder = Recorder(self.values, self.memory)
        self.mode = FakeTensorMode()

    def tensor(self, *shape: int) -> Tensor:
        fake = self.mode.from_tensor(torch.randn(*shape))
        self.memory.allocate(fake, self.values.unknown(INPUT, fake))
        return fake

    def made(self, func: Any, *args: Any) -> Tensor:
        """What an operation returns."""
        with self.mode:
            result = func(*args)
        self.recorder.record(Call(func, args, {}, result))
        return result

    def after(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """The operation by which the written tensor has its value now."""
        return self.after_call(Call(func, args, kwargs, None))

    def after_call(self, call: Call) -> Any:
        self.recorder.record(call)
        (target,) = _written_by(call)
        return self.memory.read(target).op


def test_an_operation_may_be_called_without_options():
    recording = Recording()
    x = recording.tensor(4)
    result = recording.recorder.__torch_dispatch__(aten.sin.default, (), (x,))
    assert recording.memory.read(result).op is aten.sin.default


def test_only_what_a_factory_returns_is_detached_without_a_meaning():
    """Those of a fake mode return a detached view. Otherwise, it cuts gradients off."""
    recording = Recording()

    def made(func: Any, *args: Any) -> Any:
        return recording.memory.read(recording.made(func, *args)).op

    zeros = recording.made(aten.zeros.default, [4])
    assert made(aten.detach.default, zeros) is aten.zeros.default
    assert made(aten.view.default, zeros, [2, 2]) is aten.view.default
    sine = recording.made(aten.sin.default, recording.tensor(4))
    assert made(aten.detach.default, sine) is aten.detach.default
    recording.memory.node = fx.Graph().placeholder("later")
    assert made(aten.detach.default, zeros) is aten.detach.default


# Views in place.


def resized(x: Tensor) -> Tensor:
    y = x * 1
    y.resize_(2, 12)
    return y


@pytest.mark.parametrize(
    "function", [lambda x: x.t_(), resized], ids=["of an input", "other memory"]
)
def test_some_views_in_place_are_not_followed(function: Callable[[Tensor], Tensor]):
    with pytest.raises(UntraceableGraph) as caught:
        trace(graph_of(function, torch.randn(4, 6)))
    assert caught.value.reason.kind is Unreadable.REPLACED_TENSOR


def test_a_view_in_place_without_another_form_is_not_followed(own: Any):
    recording = Recording()
    with pytest.raises(UntraceableGraph) as caught:
        recording.recorder.record(Call(own.turned_.default, (recording.tensor(4),), {}, None))
    assert caught.value.reason.kind is Unreadable.REPLACED_TENSOR


def test_a_view_in_place_of_what_the_graph_made_is_followed():
    gm = graph_of(lambda x: (x * 1).t_(), torch.randn(4, 6))
    copy = trace(gm)
    (result,) = copy.reads[gm.graph.output_node()].values()
    assert result.shape == (6, 4)


# Writes.


def test_what_is_written_is_the_first_argument_or_unknown(own: Any):
    recording = Recording()
    x, y = recording.tensor(4), recording.tensor(4)
    assert recording.after(aten.add_.Tensor, x, y) is aten.add.Tensor
    named = Call(aten.add_.Tensor, (), {"self": x, "other": y}, None)
    assert recording.after_call(named) == OPAQUE
    assert recording.after(own.alone_.default, x) == OPAQUE
    assert recording.after(own.second_.default, x, y) == OPAQUE


def test_what_is_written_out_is_the_result_or_unknown(own: Any):
    recording = Recording()
    x, y, wide = (recording.tensor(n) for n in (4, 4, 6))
    assert recording.after(aten.sin.out, x, out=y) is aten.sin.default
    assert recording.after(aten.sin.out, x, out=wide) == OPAQUE
    assert recording.after(aten.sin.out, x, out=x) == OPAQUE
    assert recording.after(own.alone.out, x, out=y) == OPAQUE
    assert recording.after(own.into.there, x, there=y) == OPAQUE
    assert recording.after(own.two.out, x, out=y) == OPAQUE


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.topk(x, 6, out=(y, y.long())),
        lambda x, y: aten.rrelu_with_noise_.default(x * 1, y, 0.1, 0.3, True),
    ],
    ids=["out", "in place, at random"],
)
def test_what_is_written_to_two_tensors_is_unknown(function: Callable[[Tensor, Tensor], Any]):
    with torch.no_grad():
        copy = trace(graph_of(function, torch.randn(4, 6), torch.randn(4, 6)))
    assert sum(value.op == OPAQUE for value in copy.values) >= 2


@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_are_updated_are_an_effect(training: bool):
    """The schema of a batch norm does not say so."""
    recording = Recording()
    x, mean, variance = (recording.tensor(*shape) for shape in ((4, 6), (6,), (6,)))
    args = x, None, None, mean, variance, training, 0.1, 1e-5
    with recording.mode:
        recording.recorder.record(Call(aten.native_batch_norm.default, args, {}, (x.sin(),)))
    assert recording.recorder.has_effects is training
    assert (recording.memory.read(mean).op == OPAQUE) is training


def test_only_what_is_written_is(own: Any):
    x, y = torch.randn(4), torch.randn(4)
    assert _written_by(Call(own.shown.default, (x, y), {}, x)) == [y]


# Forms that write nothing.


def test_operations_in_place_and_out_have_forms_that_are_neither():
    assert _functional_form(aten.add_.Tensor) is aten.add.Tensor
    assert _functional_form(aten.relu_.default) is aten.relu.default
    assert _functional_form(aten.sinh.out) is None
    assert _without_out(aten.mm.out) is aten.mm.default
    assert _without_out(aten.sum.IntList_out) is aten.sum.dim_IntList
    assert _without_out(aten._native_batch_norm_legit.out) is None


def of_three(func: Any, *args: Any, result: Tensor, **kwargs: Any) -> int:
    """How many operations one is taken apart into."""
    return len(_taken_apart(Call(func, args, kwargs, result)))


def test_a_product_that_is_added_is_taken_apart_where_that_rounds_nothing_else():
    x, whole = torch.randn(4), torch.ones(4, dtype=torch.int64)
    narrow = x.bfloat16()
    assert of_three(aten.addcmul.default, x, x, x, result=x) == 2
    assert of_three(aten.addcmul.default, x, tensor1=x, tensor2=x, result=x) == 1
    assert of_three(aten.addcmul.default, whole, whole, whole, result=whole) == 1
    assert of_three(aten.addcmul.default, x, narrow, narrow, result=x) == 1
    assert of_three(torch.ops.prims.where.default, x > 0, x, x, result=x) == 1


class Fma:
    """In place of the operator, which Dynamo defines when it needs it, where a release has it."""

    def name(self) -> str:
        return "prims::fma"


def test_a_multiple_that_dynamo_adds_is_a_sum_with_a_number():
    """``x * 2 + y`` is no product of two tensors."""
    x, y = torch.randn(4), torch.randn(4)
    assert of_three(Fma(), x, x, y, result=x) == 2
    (added,) = _taken_apart(Call(Fma(), (x, 2.0, y), {}, x))
    assert (added.func, added.kwargs) == (aten.add.Tensor, {"alpha": 2.0})
    assert added.args[0] is y
    assert added.args[1] is x
