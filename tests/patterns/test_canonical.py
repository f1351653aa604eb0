"""The canonical copy: pure values, equal ones merged, and which node saw which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from support.graphs import records_gradients
from support.values import a_value
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from mhf_compiler.compat import FakeTensorMode, example_of, shape_env_of
from mhf_compiler.patterns.canonical import (
    COPY,
    INPUT,
    OPAQUE,
    SCATTER,
    CanonicalCopy,
    Storage,
    UntraceableGraph,
    Value,
)
from mhf_compiler.patterns.memory import Memory, _is_read_from
from mhf_compiler.patterns.numbering import ValueNumbering
from mhf_compiler.patterns.reasons import Unreadable
from mhf_compiler.patterns.tracer import trace
from mhf_compiler.patterns.views import all_pieces, pieces_of

aten = torch.ops.aten


class Copied:
    """The canonical copy of a function; nodes by name."""

    def __init__(self, function: Callable[..., Any], *examples: Tensor) -> None:
        self.gm = fx.symbolic_trace(function)
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        mode = FakeTensorMode()
        for node, example in zip(placeholders, examples, strict=True):
            node.meta["val"] = mode.from_tensor(example)
        self.copy: CanonicalCopy = trace(self.gm)
        self.nodes = {node.name: node for node in self.gm.graph.nodes}

    @property
    def results(self) -> list[Value]:
        """What the function returns."""
        return list(self.copy.reads[self.gm.graph.output_node()].values())

    @property
    def result(self) -> Value:
        (value,) = self.results
        return value

    def operations(self) -> list[Any]:
        return [value.op for value in self.copy.values if value.op != INPUT]


def x() -> Tensor:
    return torch.randn(4, 6)


# Decomposition and merging.


def test_a_tensor_that_grows_is_read_piece_by_piece():
    def grown(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty(0)  # without a dimension to be concatenated along
        for piece in (a, b, a):
            out = torch.cat([out, piece], dim=-1)
        return out

    result = Copied(grown, x(), x()).result
    assert result.op is aten.cat.default
    assert [piece.op for piece in pieces_of(result)] == [INPUT] * 3
    a, b, _ = pieces_of(result)
    assert [all_pieces(result)[piece] for piece in (a, b)] == [0, 6]


@pytest.mark.parametrize(
    "grown",
    [
        lambda a, b: torch.cat([torch.cat([a, b], 0), torch.cat([b, a], 0)], 1),
        lambda a, b: torch.cat([torch.cat([a, b], 1).double(), a], 1),
        lambda a, b: torch.cat([torch.cat([a, b.double()], 1), a], 1),
    ],
    ids=["other dimension", "cast in between", "another dtype inside"],
)
def test_a_cat_of_something_else_stays_two(grown: Callable[..., Tensor]):
    first = pieces_of(Copied(grown, x(), x()).result)[0]
    assert first.op is not INPUT


def test_nothing_decides_about_the_dtype():
    grown = lambda a: torch.cat([a.new_empty(0, dtype=torch.float64), a], 1)  # noqa: E731
    result = Copied(grown, x()).result
    assert result.dtype is torch.float64
    assert len(result.args[0]) == 2


def test_composite_operations_arrive_decomposed():
    copied = Copied(lambda a, b: torch.einsum("ij,jk->ik", a, b), torch.randn(3, 4), x())
    assert aten.bmm.default in copied.operations()
    assert not any("einsum" in str(op) for op in copied.operations())


def test_vmap_arrives_batched():
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.vmap(torch.mm)(a, b)

    graphs: list[fx.GraphModule] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=collect)(torch.randn(3, 4, 5), torch.randn(3, 5, 6))
    operations = [value.op for value in trace(graphs[0]).values]
    assert aten.bmm.default in operations
    assert aten.mm.default not in operations


EQUAL = {
    "the same call": lambda a: (a.sin(), a.sin()),
    "operators and methods": lambda a: (a + a, torch.add(a, a)),
    "chains": lambda a: (a.view(24).cos(), a.view(24).cos()),
    "inputs of an operator": lambda a: (a.t() @ a, a.t() @ a),
}
UNEQUAL = {
    "other numbers": lambda a: (a * 2, a * 3),
    "int and float": lambda a: (a * 2, a * 2.0),
    "random numbers": lambda a: (torch.rand_like(a), torch.rand_like(a)),
    "other halves": lambda a: (a.chunk(2)[0], a.chunk(2)[1]),
    "other dtypes": lambda a: (a.to(torch.float64), a.to(torch.float16)),
}


@pytest.mark.parametrize("function", EQUAL.values(), ids=EQUAL)
def test_equal_computations_are_one_value(function: Callable[[Tensor], Any]):
    copied = Copied(function, x())
    left, right = (copied.copy.value_of[node] for node in copied.gm.graph.output_node().args[0])
    assert left is right


@pytest.mark.parametrize("function", UNEQUAL.values(), ids=UNEQUAL)
def test_others_are_not(function: Callable[[Tensor], Any]):
    copied = Copied(function, x())
    left, right = (copied.copy.value_of[node] for node in copied.gm.graph.output_node().args[0])
    assert left is not right


def test_values_know_who_reads_them():
    copied = Copied(lambda a: (a.sin().cos(), a.sin().exp()), x())
    sine = copied.copy.value_of[copied.nodes["sin"]]
    assert [reader.op for reader in sine.readers] == [aten.cos.default, aten.exp.default]
    assert [reader.source for reader in sine.readers] == [sine, sine]


def test_values_know_where_they_come_from():
    copied = Copied(lambda a: a.sin().cos(), x())
    assert copied.result.origin is copied.nodes["cos"]
    assert copied.copy.made_by(copied.result) is copied.nodes["cos"]
    steps = [value.step for value in copied.copy.values]
    assert steps == sorted(steps)


def test_values_know_whether_gradients_were_recorded():
    with torch.enable_grad():
        graph = fx.Graph()
        a = graph.placeholder("a")
        a.meta["val"] = FakeTensorMode().from_tensor(x())
        graph.call_function(torch._C._set_grad_enabled, (False,))
        without = graph.call_function(torch.sin, (a,))
        graph.call_function(torch._C._set_grad_enabled, (True,))
        again = graph.call_function(torch.sin, (a,))
        graph.output((without, again))
        copy = trace(fx.GraphModule({}, graph))
        assert torch.is_grad_enabled()
    assert copy.value_of[without] is not copy.value_of[again]
    assert not copy.value_of[without].requires_grad_mode
    assert copy.value_of[again].requires_grad_mode


# Mutation.


def test_an_update_in_place_is_a_new_value():
    copied = Copied(lambda a: a.sin().add_(1), x())
    assert copied.result.op is aten.add.Tensor
    assert copied.result.source.op is aten.sin.default


def test_what_was_read_before_an_update_stays_the_old_value():
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        b = a.sin()
        before = b.cos()
        b.mul_(2)
        return before, b.exp()

    before, after = Copied(function, x()).results
    assert before.source.op is aten.sin.default
    assert after.source.op is aten.mul.Tensor


def test_a_view_sees_what_is_written_to_its_base():
    def function(a: Tensor) -> Tensor:
        b = a.sin()
        view = b.t()
        b.add_(1)
        return view.cos()

    seen = Copied(function, x()).result.source
    assert seen.op is aten.t.default
    assert seen.source.op is aten.add.Tensor


def test_a_base_sees_what_is_written_through_a_view():
    def function(a: Tensor) -> Tensor:
        b = a.sin()
        b[1].mul_(2)
        return b.cos()

    scatter = Copied(function, x()).result.source
    assert scatter.op == SCATTER
    old, part = scatter.args
    assert (old.op, part.op) == (aten.sin.default, aten.mul.Tensor)
    assert [step.op for step in scatter.chain] == [aten.select.int]
    assert scatter.shape == (4, 6)


def test_two_views_of_one_base():
    def function(a: Tensor) -> Tensor:
        b = a.sin()
        left, right = b.view(24), b.t()
        left.zero_()
        return right.cos()

    seen = Copied(function, x()).result.source
    assert seen.op is aten.t.default
    assert seen.source.op == SCATTER


def test_a_copy_is_cast_and_broadcast():
    def function(a: Tensor, b: Tensor) -> Tensor:
        buffer = a.new_empty(4, 6, dtype=torch.float64)
        buffer.copy_(b)
        return buffer

    value = Copied(function, x(), torch.randn(6)).result
    assert value.op == COPY
    assert (value.shape, value.dtype) == ((4, 6), torch.float64)
    assert (value.source.op, value.source.shape) == (INPUT, (6,))


@pytest.mark.parametrize(
    ("view", "dtype"),
    [
        (lambda x: torch.view_as_complex(x), torch.complex64),
        (lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), torch.float32),
        (lambda x: torch.fft.fft(x).conj().imag, torch.float32),
        (lambda x: x.view(torch.int32)[0], torch.int32),
    ],
)
def test_a_view_has_the_dtype_that_it_gives_the_numbers(
    view: Callable[[Tensor], Tensor], dtype: torch.dtype
):
    """A number that is read with other bits is not the same number, and so is a copy of it."""

    def copied(x: Tensor) -> tuple[Tensor, Tensor]:
        shown = view(x)
        return shown, torch.zeros_like(shown).copy_(shown)

    shown, copy = Copied(copied, torch.randn(4, 2)).results
    assert shown.dtype is copy.dtype is dtype


def test_what_is_written_to_out_is_what_would_be_returned():
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out = a.sin()
        before = out.view(-1)
        torch.add(a, b, out=out)
        return out, before

    added, view = Copied(function, x(), x()).results
    assert added.op is aten.add.Tensor
    assert [operand.op for operand in added.operands] == [INPUT, INPUT]
    assert view.source is added


@pytest.mark.parametrize(
    "out",
    [
        lambda a: a.double(),
        lambda a: a.new_empty(0),
        lambda a: a,
    ],
    ids=["another dtype", "another size", "an operand"],
)
def test_an_operation_that_writes_what_is_not_known_gives_an_opaque_value(
    out: Callable[[Tensor], Tensor],
):
    def function(a: Tensor, b: Tensor) -> Tensor:
        read = a.sin()
        written = out(read)
        torch.add(read, b, out=written)
        return written

    assert Copied(function, x(), x()).result.op == OPAQUE


# Provenance.


def overwritten(a: Tensor) -> Tensor:
    before = a.sin()
    view = before.t()
    first = before.cos()
    before.add_(1)
    return first + before + view.t()


def test_reads_say_what_each_node_saw_when_it_ran():
    copied = Copied(overwritten, x())
    sin, cos, add = (copied.nodes[name] for name in ("sin", "cos", "add"))
    assert copied.copy.reads[cos][sin].op is aten.sin.default
    assert copied.copy.reads[add][sin].op is aten.add.Tensor


def test_changed_reads_are_those_after_a_write():
    copied = Copied(overwritten, x())
    value = copied.copy.value_of[copied.nodes["sin"]]
    changed = {reader.name for reader, _ in copied.copy.changed_reads(value)}
    assert "cos" not in changed
    assert "t_1" in changed


def test_a_node_holds_a_value_until_its_memory_is_written():
    copied = Copied(overwritten, x())
    copy, nodes = copied.copy, copied.nodes
    value = copy.value_of[nodes["sin"]]
    assert copy.holder_at(value, copy.positions[nodes["cos"]]) is nodes["sin"]
    assert copy.holder_at(value, copy.positions[nodes["add_"]]) is None
    assert copy.is_overwritten(value)
    updated = copy.value_of[nodes["add_"]]
    assert copy.made_by(updated) is nodes["add_"]
    assert copy.holder_at(updated, copy.positions[nodes["add_"]]) is not None


def test_a_value_is_held_from_its_node_on():
    copied = Copied(lambda a: a.sin().cos(), x())
    copy = copied.copy
    assert copy.holder_at(copied.result, copy.positions[copied.nodes["sin"]]) is None
    assert copy.holder_at(copied.result, copy.positions[copied.nodes["cos"]]) is copied.nodes["cos"]


def test_what_is_returned_or_left_in_an_input_escapes():
    def function(a: Tensor) -> Tensor:
        a.mul_(2)
        dead = a.exp()
        dead.add_(1)
        return a.sin()

    copied = Copied(function, x())
    escaping = {value.op for value in copied.copy.escaping}
    assert escaping == {aten.mul.Tensor, aten.sin.default}
    exponential = copied.copy.value_of[copied.nodes["exp"]]
    assert not copied.copy.is_live(exponential)
    assert copied.copy.is_live(copied.result)


def test_pure_nodes_do_nothing_but_compute():
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        buffer = a.new_zeros(4, 6)
        buffer.add_(a)
        return buffer.sin(), torch.rand_like(a)

    copied = Copied(function, x())
    pure = {node.name for node in copied.copy.pure}
    assert "sin" in pure
    assert not {"add_", "rand_like"} & pure
    assert list(copied.copy.written) == [copied.nodes["add_"]]


# What is not looked into.


def dynamo_graph(function: Callable[..., Any], *inputs: Tensor, **how: Any) -> Any:
    """The copy of a Dynamo graph, made inside of the compilation."""
    found: list[Any] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        envs = [shape_env_of(example_of(node)) for node in gm.graph.nodes]
        env = next(filter(None, envs), None)
        before = [] if env is None else list(env.guards)
        found.append((gm, trace(gm, env)))
        assert env is None or list(env.guards) == before
        return gm.forward

    torch.compile(function, backend=collect, fullgraph=True, **how)(*inputs)
    return found[0]


def test_higher_order_operations_are_opaque():
    def function(a: Tensor) -> Tensor:
        return checkpoint(torch.sin, a.exp(), use_reentrant=False).cos()

    _, copy = dynamo_graph(function, x().requires_grad_())
    operations = [value.op for value in copy.values]
    assert aten.sin.default not in operations
    cosine = next(value for value in copy.values if value.op is aten.cos.default)
    assert cosine.source.op == OPAQUE
    exponential = next(value for value in copy.values if value.op is aten.exp.default)
    assert exponential in copy.escaping


def update(t: Tensor) -> Tensor:
    return t.add_(1)


BODIES = {
    "reads it": (torch.sin, False),
    "writes to what it made": (lambda t: update(t * 2), False),
    "returns a view of it": (lambda t: t.view_as(t), False),
    "writes to it": (update, True),
    "writes to a view of it": (lambda t: (update(t.view(-1)[1:]), t.sin())[1], True),
    "writes to it, as an option": (lambda t: F.relu(t, inplace=True), True),
    "in a graph inside of that": (
        lambda t: checkpoint(update, t.view_as(t), use_reentrant=False),
        True,
    ),
}


@pytest.mark.parametrize(("body", "is_written"), BODIES.values(), ids=BODIES)
def test_what_a_higher_order_operation_overwrites(
    body: Callable[[Tensor], Tensor], is_written: bool
):
    """That which the graph that it is given writes to."""

    def function(a: Tensor) -> Tensor:
        b = a.exp()
        return checkpoint(body, b, use_reentrant=False) + b

    _, copy = dynamo_graph(function, x())
    exponential = next(value for value in copy.values if value.op is aten.exp.default)
    assert copy.is_overwritten(exponential) == is_written


def test_where_a_result_may_take_the_place_of_a_node():
    """Where what is done to its memory later goes through it, and only if something is."""

    def function(a: Tensor, given: Tensor) -> Any:
        rows = a.size(0)
        whole = a.exp()
        older = whole[0]
        flat = whole.view(-1)
        older.zero_()
        halves = a.sin().chunk(2)
        first, kept = halves[0], a[2:].cos()
        first.add_(kept)
        twice, again = a.tan(), a.tan()
        twice.zero_()
        written = a.tanh()
        view = written[1:]
        view.mul_(2)
        read = a.erf()
        fresh = read.sigmoid()
        seen = read.view(-1)
        seen.zero_()
        given.zero_()
        turned = a.log()
        turned.t_()
        turned.zero_()
        results = flat, first, halves, twice, again, written, fresh, seen, turned
        return *results, torch.ones(rows)

    gm, copy = dynamo_graph(function, x(), x(), dynamic=True)
    may = {
        str(node): copy.takes_place_of_node(copy.value_of[node])
        for node in gm.graph.nodes
        if node in copy.value_of
    }
    replaced = {name for name, replaced in may.items() if replaced}
    assert replaced == {"whole", "sin", "written", "read", "seen"}


@pytest.mark.parametrize("begin", [False, True])
def test_what_has_no_gradients_takes_the_place_of_a_node_where_none_begin(begin: bool):
    """PyTorch refuses to let them begin in a view."""

    def function(a: Tensor) -> Tensor:
        records_gradients(a, False)
        y = a.exp()
        records_gradients(a, begin)
        return y.add_(a)

    copied = Copied(function, x())
    value = copied.copy.value_of[copied.nodes["exp"]]
    assert copied.copy.takes_place_of_node(value) is not begin


def set_to_two(t: Tensor) -> None:
    t[1:] = 2


@pytest.mark.parametrize("write", [set_to_two, lambda t: t[1:].mul_(2)], ids=["set", "multiplied"])
def test_what_was_written_in_part_takes_no_place(write: Callable[[Tensor], Any]):
    """The node that wrote the part does not hold the whole."""

    def function(a: Tensor) -> Tensor:
        buffer = a.exp()
        write(buffer)
        read = buffer.sin()
        buffer.zero_()
        return read

    gm, copy = dynamo_graph(function, x())
    (sine,) = [node for node in gm.graph.nodes if node.target == "sin"]
    (seen,) = copy.reads[sine].values()
    assert copy.is_overwritten(seen)
    assert not copy.takes_place_of_node(seen)


def test_tensor_subclasses_are_not_followed():
    """Only what is computed with them is unknown, and all of that keeps what it reads alive."""
    from torch.testing._internal.two_tensor import TwoTensor

    gm = fx.symbolic_trace(lambda a, b: (a.sin(), b.cos(), a.mul(b.exp())))
    sine, cosine, exponential, product = (
        next(node for node in gm.graph.nodes if node.target == name)
        for name in ("sin", "cos", "exp", "mul")
    )
    first, second = gm.graph.find_nodes(op="placeholder")
    for node in (first, sine):
        node.meta["val"] = TwoTensor(x(), x())
    for node in (second, cosine, exponential, product):
        node.meta["val"] = x()
    copy = trace(gm)
    assert sine not in copy.value_of
    assert copy.value_of[cosine].op is torch.ops.aten.cos.default
    unknown = copy.value_of[product]
    assert unknown.op == OPAQUE
    assert unknown.subclass == "TwoTensor"
    assert unknown.operands == (copy.value_of[exponential],)


def test_a_graph_that_does_not_run_is_refused():
    with pytest.raises(UntraceableGraph) as caught:
        Copied(lambda a: a @ a, x())
    assert caught.value.reason.kind is Unreadable.NOT_ON_FAKES


def test_the_graph_is_not_changed():
    gm = fx.symbolic_trace(overwritten)
    (node,) = gm.graph.find_nodes(op="placeholder")
    node.meta["val"] = FakeTensorMode().from_tensor(x())
    before = gm.code, [dict(node.meta) for node in gm.graph.nodes]
    trace(gm)
    assert (gm.code, [dict(node.meta) for node in gm.graph.nodes]) == before


# Dynamic shapes.


def test_symbolic_sizes_are_expressions_and_no_guard_is_added():
    """Even of operations that would specialise on a size."""

    def function(a: Tensor) -> Tensor:
        return a.view(a.shape[0], 2, 3).transpose(0, 1).reshape(2, -1)

    _, copy = dynamo_graph(function, torch.randn(5, 6), dynamic=True)
    shapes = [value.shape for value in copy.values]
    (rows, _) = shapes[0]
    assert isinstance(rows, sympy.Symbol)
    assert (rows, 2, 3) in shapes
    assert (2, 3 * rows) in shapes


# Results in one memory.


def test_a_result_that_is_a_view_inside_its_own_operation_has_memory_of_its_own():
    """An ``einsum`` views its product. What else is returned of that is a view of the result."""

    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.einsum("ij,kj->ik", a, a)
        return y, y[:1]

    copied = Copied(function, x())
    whole, part = copied.results
    assert copied.copy.returned_as_part(whole) is None
    assert copied.copy.returned_as_part(part) is not None


def test_a_part_of_an_older_tensor_is_returned_in_its_memory():
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        y = a * 2
        return y[:2], y[2:]

    copied = Copied(function, x())
    assert all(copied.copy.returned_as_part(part) is not None for part in copied.results)


def test_a_part_of_an_input_is_returned_in_its_memory():
    copied = Copied(lambda a: (a[:2], a[2:]), x())
    assert all(copied.copy.returned_as_part(part) is not None for part in copied.results)


def test_a_part_that_the_graph_reads_itself_is_not_returned():
    def function(a: Tensor) -> tuple[Tensor, ...]:
        y = a * 2
        part = y[0]
        return y, y[1:], part.sin()

    copied = Copied(function, x())
    _, _, sine = copied.results
    assert copied.copy.returned_as_part(sine.source) is None


def test_the_whole_of_a_tensor_that_was_overwritten_is_not_returned_as_a_part():
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        y = (a * 2).add_(1)
        return y, y[1:]

    copied = Copied(function, x())
    whole, part = copied.results
    assert copied.copy.returned_as_part(whole) is None
    assert copied.copy.returned_as_part(part) is not None


# What the copy is asked, of values by themselves.


def test_a_gradient_may_be_wanted_of_what_is_not_known():
    assert a_value(aten.sin.default, a_value(OPAQUE)).may_need_gradient()
    assert a_value(aten.sin.default, a_value(INPUT, requires_grad=True)).may_need_gradient()
    assert not a_value(aten.sin.default, a_value(INPUT)).may_need_gradient()


def held(copy: CanonicalCopy, value: Value, storage: Storage, **given: Any) -> fx.Node:
    """A node that returns a value, the next one of the copy."""
    node = fx.Graph().placeholder("x")
    copy.positions[node] = len(copy.positions)
    strides = given.get("strides", value.strides)
    copy.add_result(node, value, storage, strides, is_part=given.get("is_part", False))
    return node


def test_memory_is_outside_if_an_input_or_another_tensor_lies_there():
    own, inside = Storage(a_value(INPUT)), Storage(a_value(INPUT), is_input=True)
    assert not own.is_outside
    assert inside.is_outside
    own.same = [own, inside]
    assert own.is_outside
    copy = CanonicalCopy()
    assert copy.is_outside(held(copy, own.current, own))
    assert not copy.is_outside(fx.Graph().placeholder("a number"))


def test_sizes_are_known_of_inputs_and_of_unknown_results_so_far():
    copy = CanonicalCopy()
    values = [a_value(op) for op in (INPUT, OPAQUE, aten.sin.default, OPAQUE)]
    nodes = [held(copy, value, Storage(value)) for value in values]
    assert list(copy.sized_at(1)) == [(values[0], nodes[0]), (values[1], nodes[1])]
    assert list(copy.sized_at(3)) == [(values[n], nodes[n]) for n in (0, 1, 3)]


def test_a_value_that_is_returned_with_other_strides_is_in_other_memory():
    copy, value = CanonicalCopy(), a_value(aten.sin.default)
    node = held(copy, value, Storage(value), strides=(1, 4))
    same = held(copy, value, Storage(value))
    output = fx.Graph().output(())
    copy.readers_of[value] = [(output, same)]
    assert copy.returned_as_part(value) is None
    copy.readers_of[value] = [(output, node)]
    assert copy.returned_as_part(value) is node


def test_what_lies_in_an_inputs_memory_is_returned_as_a_part_of_it():
    """Even if no node of the graph is that input."""
    copy, value = CanonicalCopy(), a_value(aten.sin.default)
    storage = Storage(value, is_input=True)
    node = held(copy, value, storage, is_part=True)
    other = held(copy, value, storage, is_part=True)
    copy.returned = [(node, id(storage)), (other, id(storage))]
    copy.readers_of[value] = [(fx.Graph().output(()), node)]
    assert copy.returned_as_part(value) is node
    storage.is_input = False
    assert copy.returned_as_part(value) is None


# Memory.


def test_what_is_read_of_a_buffer_that_was_partly_written_there_is_not_the_old():
    def function(a: Tensor, b: Tensor) -> Tensor:
        out = a.clone()
        out[1:3].copy_(b[1:3])
        return out[:2]

    assert Copied(function, x(), x()).result.source.op is SCATTER


def test_parts_that_are_no_ranges_are_not_taken_for_the_same_part():
    def function(a: Tensor, b: Tensor) -> Tensor:
        out = a.clone()
        out[::2].copy_(b[::2])
        out[::3].copy_(b[::3])
        return out

    later = Copied(function, x(), x()).result
    assert later.op is later.source.op is SCATTER


def test_a_node_that_finds_what_was_written_to_a_part_looks_into_the_whole():
    def function(a: Tensor) -> Tensor:
        out = a.clone()
        out[0].copy_(a[1].sin())
        return out[0].cos()

    copied = Copied(function, x())
    found_in = copied.copy.looked_into[copied.nodes["cos"]]
    assert {value.op for value in found_in} == {SCATTER}


def test_a_fake_tensor_from_outside_is_not_known_and_another_class_is_not_followed():
    copy = CanonicalCopy()
    values = ValueNumbering(copy)
    memory = Memory(copy, values)
    values.node = memory.node = fx.Graph().placeholder("x")
    fake = FakeTensorMode().from_tensor(x())
    assert memory.alias(fake).value.op == OPAQUE
    assert memory.alias(x()).value.op == OPAQUE
    with pytest.raises(UntraceableGraph):
        memory.alias(torch.nn.Parameter(x()))


def test_what_is_made_of_nothing_is_read_from_nothing():
    assert not _is_read_from(a_value(OPAQUE), a_value(INPUT))


def test_a_whole_that_is_read_in_part_takes_no_place():
    def function(a: Tensor) -> Tensor:
        return a.exp()[1:].mul_(2).zero_()

    _, copy = dynamo_graph(function, x())
    whole = next(value for value in copy.values if value.op == SCATTER)
    assert copy.is_overwritten(whole)
    assert not copy.takes_place_of_node(whole)


def test_a_result_takes_no_place_of_what_another_tensor_may_share():
    class Branches(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            ours = a.exp()
            seen = torch.cond(a.sum() > 0, torch.sin, torch.cos, (ours,))
            ours.add_(1)
            read = ours.tanh()
            seen.zero_()
            return read

    gm = torch.export.export(Branches(), (x(),)).graph_module
    copy = trace(gm)
    (added,) = [value for value in copy.values if value.op is aten.add.Tensor]
    assert copy.is_overwritten(added)
    assert not copy.takes_place_of_node(added)
