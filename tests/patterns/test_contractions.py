"""Sums of products: every operator that spells one is read as the same thing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from support.values import a_value
from torch import Tensor, fx

from mhf_compiler.compat import FakeTensorMode
from mhf_compiler.patterns.axes import Axis, axis_form
from mhf_compiler.patterns.canonical import INPUT, Value
from mhf_compiler.patterns.contractions import Contraction, Operand, as_contraction
from mhf_compiler.patterns.tracer import trace
from mhf_compiler.patterns.views import through_views


def canonical(function: Callable[..., Any], *examples: Tensor) -> Value:
    """The value that a function returns, through views."""
    graph, mode = fx.Graph(), FakeTensorMode()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    inputs = [graph.placeholder(f"input_{number}") for number in range(len(examples))]
    for node, example in zip(inputs, examples, strict=True):
        node.meta["val"] = mode.from_tensor(example)
    output = graph.output(function(*(fx.Proxy(node, tracer) for node in inputs)).node)
    (value,) = trace(fx.GraphModule({}, graph)).reads[output].values()
    return value


def read(value: Value) -> tuple[tuple[Axis, ...], Contraction | None]:
    """The axes of a value, and the contraction that it is."""
    axes = tuple(Axis(size) for size in value.shape)
    return axes, as_contraction(*through_views(value, tuple(axis_form(axis) for axis in axes)))


def evaluated(function: Callable[..., Any], *inputs: Tensor) -> Tensor:
    """``function`` computed from its contraction alone, element by element."""
    value = canonical(function, *inputs)
    axes, contraction = read(value)
    assert contraction is not None
    tensors = dict(zip(_inputs_of(contraction), inputs, strict=False))

    def at(operand: Operand, setting: dict[Axis, int]) -> float:
        source, index = through_views(operand.value, operand.index)
        where = (
            form.offset + sum(setting[axis] * step for axis, step in form.resolved().terms)
            for form in index
        )
        return tensors[source][tuple(where)]

    out = []
    for position in itertools.product(*(range(axis.size) for axis in axes)):
        fixed: dict[Axis, int] = {}
        for axis, number in zip(axes, position, strict=True):
            fixed |= _parts(axis, number)
        total = torch.tensor(0.0)
        for inner in itertools.product(*(range(axis.size) for axis in contraction.summed)):
            setting = dict(fixed)
            for axis, number in zip(contraction.summed, inner, strict=True):
                setting |= _parts(axis, number)
            total += at(contraction.left, setting) * at(contraction.right, setting)
        total = total * contraction.scale
        if contraction.bias is not None:
            total = total + contraction.bias_scale * at(contraction.bias, fixed)
        out.append(total)
    return torch.stack(out).reshape(value.shape)


def _parts(axis: Axis, number: int) -> dict[Axis, int]:
    if axis.parts is None:
        return {axis: number}
    outer, inner = axis.parts
    high, low = divmod(number, inner.size)
    return _parts(outer, high) | _parts(inner, low)


def _inputs_of(contraction: Contraction) -> list[Value]:
    """The graph's inputs, in order."""
    operands = [contraction.left, contraction.right]
    operands += [] if contraction.bias is None else [contraction.bias]
    found = {through_views(operand.value, operand.index)[0] for operand in operands}
    assert all(value.op == INPUT for value in found)
    return sorted(found, key=lambda value: value.step)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


SPELLINGS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "mm": (torch.mm, [randn(3, 4), randn(4, 2)]),
    "mm of a transposed": (lambda a, b: a @ b.t(), [randn(3, 4), randn(2, 4)]),
    "bmm": (torch.bmm, [randn(2, 3, 4), randn(2, 4, 5)]),
    "matmul with a batch": (torch.matmul, [randn(2, 3, 4), randn(4, 5)]),
    "matmul with broadcasting": (torch.matmul, [randn(2, 1, 3, 4), randn(3, 4, 2)]),
    "einsum": (lambda a, b: torch.einsum("bhd,hdf->bhf", a, b), [randn(2, 3, 4), randn(3, 4, 2)]),
    "einsum of two sums": (
        lambda a, b: torch.einsum("bij,ijf->bf", a, b),
        [randn(2, 3, 4), randn(3, 4, 2)],
    ),
    "linear": (F.linear, [randn(2, 3, 4), randn(5, 4)]),
    "linear with a bias": (F.linear, [randn(3, 4), randn(5, 4), randn(5)]),
    "addmm": (
        lambda a, b, c: torch.addmm(c, a, b, alpha=2, beta=3),
        [randn(3, 4), randn(4, 5), randn(5)],
    ),
    "baddbmm": (
        lambda a, b, c: torch.baddbmm(c, a, b, alpha=0.5),
        [randn(2, 3, 4), randn(2, 4, 5), randn(2, 1, 5)],
    ),
    "addbmm": (torch.addbmm, [randn(3, 5), randn(2, 3, 4), randn(2, 4, 5)]),
    "addmv": (torch.addmv, [randn(3), randn(3, 4), randn(4)]),
    "mv": (torch.mv, [randn(3, 4), randn(4)]),
    "dot": (torch.dot, [randn(4), randn(4)]),
    "a sum over all of a product": (
        lambda a, b: torch.sum(a * b, dim=()),
        [randn(3, 4), randn(3, 4)],
    ),
    "the same, of no dimensions in particular": (
        lambda a, b: torch.ops.aten.sum.dim_IntList(a * b, None),
        [randn(3, 4), randn(3, 4)],
    ),
    "a sum over a product": (lambda a, b: (a[:, :, None] * b).sum(1), [randn(3, 4), randn(4, 5)]),
    "a sum that keeps its dimension": (
        lambda a, b: (a[..., None] * b).sum(1, keepdim=True),
        [randn(3, 4), randn(4, 5)],
    ),
    "a sum over two dimensions": (
        lambda a, b: (a[..., None] * b).sum((1, 2)),
        [randn(2, 3, 4), randn(3, 4, 5)],
    ),
    "a grouped convolution": (
        lambda a, b: F.conv1d(a, b, groups=2),
        [randn(2, 6, 5), randn(4, 3, 1)],
    ),
    "a convolution with a bias": (F.conv1d, [randn(2, 3, 5), randn(4, 3, 1), randn(4)]),
    "a convolution in two dimensions": (
        lambda a, b: F.conv2d(a, b, groups=3),
        [randn(1, 6, 2, 3), randn(6, 2, 1, 1)],
    ),
}


@pytest.mark.parametrize(("function", "inputs"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_a_sum_of_products(function: Callable[..., Any], inputs: list[Tensor]):
    torch.testing.assert_close(
        evaluated(function, *inputs), function(*inputs), rtol=1e-4, atol=1e-5
    )


NONE: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "a product": (torch.mul, [randn(3, 4), randn(3, 4)]),
    "a plain sum": (lambda a: a.sum(1), [randn(3, 4)]),
    "a sum over a sum": (lambda a, b: (a + b).sum(1), [randn(3, 4), randn(3, 4)]),
    "a wide convolution": (F.conv1d, [randn(2, 3, 5), randn(4, 3, 3)]),
    "a convolution that skips": (
        lambda a, b: F.conv1d(a, b, stride=2),
        [randn(2, 3, 5), randn(4, 3, 1)],
    ),
    "a convolution with padding": (
        lambda a, b: F.conv1d(a, b, padding=1),
        [randn(2, 3, 5), randn(4, 3, 1)],
    ),
    "a transposed convolution": (F.conv_transpose1d, [randn(2, 3, 5), randn(3, 4, 1)]),
    "channels of two groups of a convolution": (
        lambda a, b: F.conv1d(a, b, groups=2)[:, 1:3],
        [randn(2, 6, 5), randn(4, 3, 1)],
    ),
    "a mean": (lambda a, b: (a * b).mean(1), [randn(3, 4), randn(3, 4)]),
    "a convolution that is transposed": (
        F.conv_transpose1d,
        [randn(2, 4, 6), randn(4, 4, 1)],
    ),
    **{
        f"a product with {name}={factor}": (
            partial(torch.addmm, **{name: factor}),
            [randn(3, 5), randn(3, 4), randn(4, 5)],
        )
        for name, factor in (("alpha", 0), ("alpha", math.inf), ("beta", math.nan))
    },
}


@pytest.mark.parametrize(("function", "inputs"), NONE.values(), ids=NONE)
def test_others_are_not(function: Callable[..., Any], inputs: list[Tensor]):
    assert read(canonical(function, *inputs))[1] is None


def test_a_convolution_has_as_many_channels_in_each_group():
    """PyTorch has made sure of it; of a symbolic number of channels it is not known here."""
    channels = sympy.Symbol("channels", integer=True, positive=True)
    options = [1], [0], [1], False, [0]
    for count, known in ((channels, False), (2 * channels, True)):
        weight = a_value(INPUT, shape=(count, 3, 1))
        operands = a_value(INPUT, shape=(2, 6, 5)), weight, None
        convolution = a_value(
            torch.ops.aten.convolution.default, *operands, *options, 2, shape=(2, count, 5)
        )
        assert (read(convolution)[1] is not None) is known


def test_a_matmul_that_sums_nothing_is_a_product():
    """einsum spells outer products so."""
    _, outer = read(canonical(torch.mm, randn(3, 1), randn(1, 4)))
    _, inner = read(canonical(torch.mm, randn(3, 2), randn(2, 4)))
    assert outer is not None
    assert inner is not None
    assert outer.is_product
    assert not inner.is_product


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("derived", [False, True])
def test_what_beta_leaves_unread_is_no_bias_unless_it_gets_a_gradient(
    wanted: bool, recorded: bool, derived: bool
):
    """That gradient is zeros, and would be None."""

    def product(bias: Tensor, a: Tensor, b: Tensor) -> Any:
        return torch.addmm(bias.unsqueeze(0).cos() if derived else bias, a, b, beta=0)

    inputs = [randn(5).requires_grad_(wanted), randn(3, 4), randn(4, 5)]
    with torch.set_grad_enabled(recorded):
        _, contraction = read(canonical(product, *inputs))
    assert (contraction is None) is (wanted and recorded)
    assert contraction is None or contraction.bias is None
