"""Nodes that do the same are run once; the copy is what it is when each of them is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mhf_compiler.compat import FakeTensorMode
from mhf_compiler.patterns import tracer
from mhf_compiler.patterns.canonical import INPUT, CanonicalCopy, Value
from mhf_compiler.patterns.repeats import (
    Call,
    Program,
    _fills_its_memory,
    _shows_elements,
    frozen,
    key_of,
    map_tensors,
)
from mhf_compiler.patterns.tracer import trace


def graph_of(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """What Dynamo captures."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*examples)
    (gm,) = graphs
    return gm


class Runs:
    """How often nodes were run, and how often what they did was taken over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken_over = 0
        over = Program.over

        def counting(program: Program, *arguments: Any) -> Any:
            self.taken_over += 1
            return over(program, *arguments)

        monkeypatch.setattr(Program, "over", counting)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def described(copy: CanonicalCopy) -> list[Any]:
    """All of a copy that is not an object of its own."""
    place = {value: number for number, value in enumerate(copy.values)}

    def plain(tree: Any) -> Any:
        if isinstance(tree, Value):
            return f"%{place[tree]}"
        if isinstance(tree, (list, tuple)):
            return [plain(part) for part in tree]
        return str(tree)

    def names(found: Any) -> list[Any]:
        return [(node.name, plain(value)) for node, value in found.items()]

    values = [
        {
            "op": value.op,
            "arguments": plain([value.args, *value.kwargs.items()]),
            "look": (value.shape, value.strides, value.dtype, value.item),
            "made": (value.origin.name, value.requires_grad_mode),
            "readers": plain(value.readers),
        }
        for value in copy.values
    ]
    reads = [(reader.name, names(seen)) for reader, seen in copy.reads.items()]
    pure = sorted(node.name for node in copy.pure)
    written = [(node.name, plain(found)) for node, found in copy.written.items()]
    memories = [memory for _, memory in copy.returned]
    returned = [(node.name, memories.index(memory)) for node, memory in copy.returned]
    escaping = sorted(plain([*copy.escaping]))
    return [values, reads, pure, written, names(copy.value_of), escaping, returned]


def tower(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.einsum("bi,ij->bj", x, w).relu() + x
    return x


def one_and_two(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bi,bi->b", x, x) + torch.einsum("bi,bi->b", x, y)


def transposed(x: Tensor, w: Tensor) -> Tensor:
    left, right = torch.einsum("bi,ij->jb", x, w).T, torch.einsum("bi,ij->jb", x.cos(), w).T
    return left.reshape(-1) * right.sum()


def filled(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for row in range(4):
        out[row] = torch.einsum("i,ij->j", x[row], w)
    return out * torch.einsum("i,ij->j", out[0], w)


def updated(x: Tensor, w: Tensor) -> Tensor:
    y = torch.einsum("bi,ij->bj", x, w)
    x.mul_(2)
    z = torch.einsum("bi,ij->bj", x, w)
    y += z
    return y, torch.einsum("bi,ij->bj", y, w)


def sliced(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(2):
        left, right = x[:, :3], x[:, 3:]
        x = torch.matmul(left, w[:3].unsqueeze(0)) + torch.matmul(right, w[3:].unsqueeze(0))
        x = x[0]
    return x


def shown(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Views of several tensors, some of which are then written, through a view or beside it."""
    left, right = x.unflatten(0, (2, 3)), w.unflatten(0, (2, 3))
    y, z = x.clone().unflatten(0, (2, 3)), w.clone().unflatten(0, (2, 3))
    y[0].mul_(2)
    z[0].add_(y[0])
    first, second = z[0], z[1]
    second.copy_(left[0])
    return left[1], right[1], first.T.sin() + second.T, y[1], z[1].T, z[0]


def shown_as_another(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Views of which two tensors decide: one is looked at, the other tells how."""
    y, z = x[0].view_as(w[1]), w[0].view_as(x[1])
    rows, again = x[0].unflatten(0, (2, 3)), x[0].unflatten(0, (2, 3))
    rows[0].mul_(2)
    return y, z, again[0].sum() + again[1].sum()


def shown_otherwise(x: Tensor, w: Tensor) -> Tensor:
    """Views that shape and strides alone do not tell."""
    y, z = torch.complex(x, w), torch.complex(w, x)
    parts = [one.conj().imag + torch.view_as_real(one).sum(-1) for one in (y, z)]
    return parts[0] + parts[1] + x.view(torch.int32) + w.view(torch.int32)


PROGRAMS = [
    *(tower, one_and_two, transposed, filled, updated, sliced),
    *(shown, shown_as_another, shown_otherwise),
]


@pytest.mark.parametrize("function", PROGRAMS, ids=lambda function: function.__name__)
def test_the_copy_is_the_same(
    function: Callable[..., Any], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = graph_of(function, torch.randn(6, 6), torch.randn(6, 6))
    repeated = described(trace(gm))
    taken_over = runs.taken_over
    monkeypatch.setattr(tracer, "key_of", lambda *arguments: None)
    assert repeated == described(trace(gm))
    assert runs.taken_over == taken_over  # the second copy has run every node
    assert taken_over > 0 or function is one_and_two


def test_a_layer_is_run_once(runs: Runs) -> None:
    trace(graph_of(tower, torch.randn(6, 6), torch.randn(6, 6)))
    assert runs.taken_over == 3 * 3 - 3


# What is not the same.


def taken_over(runs: Runs, function: Callable[..., Any], *examples: Tensor) -> int:
    trace(graph_of(function, *examples))
    return runs.taken_over


def test_one_tensor_twice_is_not_two_tensors(runs: Runs) -> None:
    assert taken_over(runs, one_and_two, torch.randn(6, 6), torch.randn(6, 6)) == 0


def test_other_strides(runs: Runs) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.T
        return x @ x, y @ y

    assert taken_over(runs, function, torch.randn(6, 6)) == 0


def test_other_constants(runs: Runs) -> None:
    assert taken_over(runs, lambda x: (x.clamp(min=1), x.clamp(min=1.0)), torch.randn(6)) == 0


def test_other_modes(runs: Runs) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.relu()
        with torch.no_grad():
            z = x.relu()
        with torch.autocast("cpu", torch.bfloat16):
            return y, z, x.relu()

    assert taken_over(runs, function, torch.randn(6, 6)) == 0


@pytest.mark.parametrize("function", [F.dropout, torch.rand_like])
def test_random_numbers_are_drawn_each_time(
    runs: Runs, function: Callable[[Tensor], Tensor]
) -> None:
    assert taken_over(runs, lambda x: function(x) + function(x), torch.randn(6)) == 0


@pytest.mark.parametrize("function", [Tensor.relu_, torch.vander])
def test_writes_are_made_each_time(runs: Runs, function: Callable[[Tensor], Tensor]) -> None:
    examples = torch.randn(6), torch.randn(6)
    assert taken_over(runs, lambda x, y: (function(x), function(y)), *examples) == 0


def test_views_show_their_own_tensor(runs: Runs) -> None:
    copy = trace(graph_of(lambda x, y: (x.t(), y.t()), torch.randn(6, 6), torch.randn(6, 6)))
    assert runs.taken_over == 1
    views = [value for value in copy.values if value.op is not INPUT]
    assert [value.source.origin.op for value in views] == ["placeholder"] * 2
    assert len({value.source for value in views}) == len({memory for _, memory in copy.returned})


def test_functions_of_others_are_run(runs: Runs) -> None:
    """They may do something else each time."""
    gm = graph_of(lambda x: x.relu() + x.relu(), torch.randn(6))
    calls: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sin() if len(calls) % 2 else x.cos()

    for node in gm.graph.find_nodes(op="call_method", target="relu"):
        node.op, node.target = "call_function", function
    trace(gm)
    assert (runs.taken_over, len(calls)) == (0, 2)


# Keys and programs by themselves.


def a_node(op: str, target: Any) -> fx.Node:
    return fx.Graph().create_node(op, target)


def test_a_key_is_that_of_a_function_or_method_of_pytorch():
    fake = FakeTensorMode().from_tensor(torch.randn(4))
    assert key_of(a_node("call_method", "sin"), (fake,), {}) is not None
    assert key_of(a_node("call_function", torch.sin), (fake,), {}) is not None
    assert key_of(a_node("call_function", Tensor.sin), (fake,), {}) is not None  # of no module
    assert key_of(a_node("call_function", graph_of), (fake,), {}) is None
    assert key_of(a_node("call_module", "sin"), (fake,), {}) is None


def test_a_symbol_among_the_arguments_is_no_key():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    size = mode.from_tensor(torch.randn(4)).shape[0]
    fake = FakeTensorMode().from_tensor(torch.randn(4))
    node = a_node("call_method", "expand")
    assert key_of(node, (fake, 4), {}) is not None
    assert key_of(node, (fake, size), {}) is None
    assert key_of(node, (fake,), {"size": size}) is None


def test_a_view_shows_elements_as_they_are():
    x = torch.randn(4, 2)
    assert _shows_elements(x[1:], [x])
    assert _shows_elements(x[1:], [x, x])
    assert not _shows_elements(x[1:], [x, torch.randn(4)])
    assert not _shows_elements(torch._neg_view(x), [x])
    assert not _shows_elements(x.view(torch.int32), [x])
    assert not _shows_elements(x[1:].requires_grad_(), [x])
    number = torch.randn(4, dtype=torch.complex64)
    assert not _shows_elements(number.conj(), [number])


@pytest.mark.parametrize(
    ("tensor", "fills"),
    [
        (torch.empty(4, 2), True),
        (torch.empty(4, 2).t(), True),
        (torch.empty(4)[:2], False),
        (torch.empty(4).as_strided((2,), (2,), 1), False),
        (torch.empty(0), False),
    ],
    ids=["whole", "transposed", "a part", "from the second on", "nothing"],
)
def test_a_new_tensor_fills_its_memory(tensor: Tensor, fills: bool):
    assert _fills_its_memory(tensor) is fills


def test_arguments_are_frozen():
    assert hash(frozen([1, {"a": {2}}]))
    assert frozen(1) != frozen(1.0) != frozen(True)
    assert frozen([1, None, {"a": [2]}]) == (1, None, (("a", (2,)),))  # most are ints


def test_named_arguments_are_frozen_one_by_one():
    """Two things may look alike in print."""

    class Thing:
        def __repr__(self) -> str:
            return "a thing"

    one, other = Thing(), Thing()
    assert frozen({"a": one}) == frozen({"a": one})
    assert frozen({"a": one}) != frozen({"a": other})


def test_tensors_are_mapped_wherever_they_are_among_arguments():
    x = torch.randn(4)
    tree = [x, {"a": (1, x)}]
    assert map_tensors(id, tree) == [id(x), {"a": (1, id(x))}]


def test_statistics_that_are_updated_are_results_where_an_operation_returns_them():
    """Of the batch norms, some write them although their schema does not say so."""
    mean, variance = torch.zeros(6), torch.ones(6)
    args = torch.randn(4, 6), None, None, mean, variance, True, 0.1, 1e-5
    aten = torch.ops.aten
    written = Call(aten.native_batch_norm.default, args, {}, None).undeclared_writes()
    assert [id(tensor) for tensor in written] == [id(mean), id(variance)]
    functional = Call(aten._native_batch_norm_legit_functional.default, args, {}, None)
    assert functional.undeclared_writes() == []
