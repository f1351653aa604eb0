"""What hidden units compute: every activation in each of its spellings, and what is none."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from support.values import a_value
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler import SiteReport
from mhf_compiler.compat import counters
from mhf_compiler.patterns import Kind
from mhf_compiler.patterns.canonical import INPUT
from mhf_compiler.patterns.meaning import (
    ACTIVATIONS,
    POINTWISE,
    Clamped,
    Hidden,
    Line,
    Unsimplified,
    _adds_up,
    _as_line,
    _candidate_arguments,
    _is_positive,
    _over,
    _unsigned,
    plus,
    read_hidden,
    times,
)
from mhf_compiler.patterns.reasons import Declined

Function = Callable[[Tensor], Tensor]


class Ffn(nn.Module):
    """``hidden`` of the gate and the up projection of four heads."""

    def __init__(self, hidden: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = hidden
        shapes = (4, 8, 5), (4, 8, 5), (4, 5, 8)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(s) / 4) for s in shapes)

    def forward(self, q: Tensor) -> Tensor:
        return self.hidden(q @ self.gate, q @ self.up) @ self.down


def explained(hidden: Callable[[Tensor, Tensor], Tensor]) -> SiteReport:
    """The one site or near-miss; a site also computes what the original does."""
    model, q = Ffn(hidden), torch.randn(4, 6, 8)
    options = {"rewrite": "always", "fallback": "eager", "strict": True}
    report = mhf_compiler.explain(model, options=options)(q)
    (site,) = report.rewritten + report.declined
    if site.reason is None:
        compiled = torch.compile(model, backend="flashmhf", options=options)
        torch.testing.assert_close(compiled(q), model(q), rtol=1e-4, atol=1e-5)
    return site


def reason(hidden: Callable[[Tensor, Tensor], Tensor]) -> Kind | None:
    site = explained(hidden)
    return None if site.reason is None else site.reason.kind


def softened(x: Tensor) -> Tensor:
    """GELU as GPT-2 spelled it, its constant shortened."""
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3))))


SPELLINGS: dict[str, tuple[str, Function]] = {
    "F.silu": ("silu", F.silu),
    "x * sigmoid(x)": ("silu", lambda x: x * torch.sigmoid(x)),
    "sigmoid(x) * x": ("silu", lambda x: x.sigmoid() * x),
    "x / (1 + exp(-x))": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "x * (1 + exp(-x))^-1": ("silu", lambda x: x * (1 + torch.exp(-x)).reciprocal()),
    "x / 2 * (1 + tanh(x / 2))": ("silu", lambda x: x / 2 * (1 + torch.tanh(x / 2))),
    "silu in place": ("silu", lambda x: F.silu(x, inplace=True)),
    "F.gelu": ("gelu", F.gelu),
    "x / 2 * (1 + erf(x / sqrt 2))": (
        "gelu",
        lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    ),
    "erf with a constant": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x * 0.70710678))),
    # 0.5 x (1 + erf(0.7 x)) is gelu of a scaled x, divided by the scale: the op has both factors
    "erf of another slope": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(0.7 * x))),
    "F.gelu(approximate)": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "gelu of GPT-2": ("gelu_tanh", softened),
    "gelu with x * x * x": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    ),
    "gelu factored": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    ),
    "F.relu": ("relu", F.relu),
    "relu_": ("relu", lambda x: x.relu_()),
    "relu ** 2": ("relu2", lambda x: F.relu(x) ** 2),
    "square of relu": ("relu2", lambda x: F.relu(x).square()),
    "relu * relu": ("relu2", lambda x: F.relu(x) * F.relu(x)),
    "clamp(min=0) ** 2": ("relu2", lambda x: x.clamp(min=0) ** 2),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "1 / (1 + exp(-x))": ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    "(1 + tanh(x / 2)) / 2": ("sigmoid", lambda x: (1 + torch.tanh(x / 2)) / 2),
    "tanh": ("tanh", torch.tanh),
}
spellings = pytest.mark.parametrize(("name", "act"), SPELLINGS.values(), ids=SPELLINGS)


@spellings
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_every_spelling_is_recognised(name: str, act: Function, gated: bool):
    site = explained((lambda gate, up: act(gate) * up) if gated else (lambda gate, up: act(gate)))
    assert (site.reason, site.activation, site.gated) == (None, name, gated)


@spellings
def test_slopes_at_zero_are_the_same(name: str, act: Function):
    """Where gates start from zero, or tokens are padding, every pre-activation is zero."""
    model, q = Ffn(lambda gate, up: act(gate) * up), torch.randn(4, 6, 8, requires_grad=True)
    nn.init.zeros_(model.gate)
    options = {"rewrite": "always", "fallback": "eager", "strict": True}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    for ours, eager in zip(gradients(compiled, q), gradients(model, q), strict=True):
        torch.testing.assert_close(ours, eager)
    assert counters["flashmhf"]["sites_rewritten"] == 1


def gradients(model: Function, q: Tensor) -> list[Tensor]:
    network = getattr(model, "_orig_mod", model)
    return [*torch.autograd.grad(model(q).sum(), [q, *network.parameters()])]


CLAMPED: dict[str, Function] = {
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "clamp_min(0)": lambda x: x.clamp_min(0),
}


@pytest.mark.parametrize("act", CLAMPED.values(), ids=CLAMPED)
def test_a_clamp_is_relu_where_no_gradients_are_recorded(act: Function):
    """At 0 its slope is 1, relu's 0."""
    assert reason(lambda gate, up: act(gate) * up) is Kind.UNKNOWN_ACTIVATION
    with torch.no_grad():
        site = explained(lambda gate, up: act(gate) * up)
    assert (site.reason, site.activation) == (None, "relu")


PRODUCTS = {
    "up first": lambda gate, up: up * F.silu(gate),
    "up scaled": lambda gate, up: F.silu(gate) * (3 * up),
    "gate scaled": lambda gate, up: F.silu(gate * 0.25) * up,
    "gate divided": lambda gate, up: F.silu(gate / 3) * up,
    "gate negated": lambda gate, up: F.silu(-gate) * up,
    "up negated": lambda gate, up: F.silu(gate) * -up,
    "divided by a negative number": lambda gate, up: F.silu(gate) * up / -3,
    "all scaled": lambda gate, up: 2 * (F.silu(gate) * up) / 5,
    "halved twice": lambda gate, up: F.silu(gate) * up * 0.5 * 0.5,
    "the other one": lambda gate, up: gate * F.silu(up),
}


@pytest.mark.parametrize("hidden", PRODUCTS.values(), ids=PRODUCTS)
def test_numbers_may_stand_anywhere(hidden: Callable[[Tensor, Tensor], Tensor]):
    site = explained(hidden)
    assert (site.reason, site.activation, site.gated) == (None, "silu", True)


@pytest.mark.parametrize("name", ["silu", "relu2"])
@pytest.mark.parametrize("scale", [0.125, -0.125, 4.0])
def test_a_scale_inside_computes_the_same(name: str, scale: float):
    p, q, b = sympy.symbols("p q b")
    hidden = Hidden(name, Line(p, 2.0, None, 1.0), Line(q, 0.5, b, -3.0), (), scale)
    for some in (hidden, dataclasses.replace(hidden, up=None)):
        difference = value(some) - value(some.scaled_inside())
        assert difference.subs({p: 0.7, q: -1.3, b: 0.4}) == pytest.approx(0, abs=1e-12)
    assert hidden.scaled_inside().scale == (4.0 if scale == 4 else 1.0)


def value(hidden: Hidden) -> sympy.Expr:
    def line(of: Line) -> sympy.Expr:
        return of.scale * of.projection + of.bias_scale * (of.bias or 0)

    gate = ACTIVATIONS[hidden.activation][0](line(hidden.gate))
    return hidden.scale * gate * (1 if hidden.up is None else line(hidden.up))


UNKNOWN: dict[str, Function] = {
    "sigmoid of another slope": lambda x: x * torch.sigmoid(1.702 * x),
    "nearly silu": lambda x: x * torch.sigmoid(1.001 * x),
    "slope in the denominator": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "gelu with another constant": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "gelu with another cubic": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3)))
    ),
    "shifted": lambda x: F.silu(x + 1),
    "shifted afterwards": lambda x: F.silu(x) + 1,
    "shifted factor": lambda x: (x + 1) * torch.sigmoid(x),
    "clamped": lambda x: F.silu(x).clamp(max=7),
    "clamped before": lambda x: F.silu(x.clamp(-7, 7)),
    "relu6": F.relu6,
    "relu6 as a clamp": lambda x: x.clamp(0, 6),
    "silu divided by zero": lambda x: F.silu(x) / 0.0,
    "relu from one on": lambda x: x.clamp(min=1),
    "relu cubed": lambda x: F.relu(x) ** 3,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "selu": F.selu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "exp": torch.exp,
    "sin": torch.sin,
    "square": torch.square,
    "abs": torch.abs,
    "tanh of tanh": lambda x: torch.tanh(torch.tanh(x)),
    "silu of relu": lambda x: F.silu(F.relu(x)),
    "silu * tanh": lambda x: F.silu(x) * torch.tanh(x),
    "silu squared": lambda x: F.silu(x) ** 2,
    "negative relu": lambda x: x.clamp(max=0),
    "rounded": torch.round,
}


@pytest.mark.parametrize("act", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_other_activations_are_not_guessed_at(act: Function, gated: bool):
    found = reason((lambda gate, up: act(gate) * up) if gated else (lambda gate, up: act(gate)))
    assert found in (Kind.UNKNOWN_ACTIVATION, Kind.NOT_A_PRODUCT)


@pytest.mark.parametrize(
    "hidden",
    [
        lambda gate, up: F.silu(gate) * up * math.inf,
        lambda gate, up: F.silu(gate * math.nan) * up,
        lambda gate, up: F.silu(torch.add(gate, gate, alpha=-math.inf)) * up,
    ],
    ids=["an infinity", "not a number", "a multiple"],
)
def test_a_number_that_is_none_is_no_variable(hidden: Function):
    assert reason(hidden) is Kind.UNKNOWN_OPERATION


NO_PRODUCTS = {
    "both activated": lambda gate, up: F.silu(gate) * F.silu(up),
    "two sorts": lambda gate, up: F.silu(gate) * torch.tanh(up),
    "a sum": lambda gate, up: F.silu(gate) + up,
    "activated afterwards": lambda gate, up: F.silu(gate * up),
    "up squared": lambda gate, up: F.silu(gate) * up**2,
    "up shifted": lambda gate, up: F.silu(gate) * (up + 1),
    "a residual": lambda gate, up: F.silu(gate) * up + gate,
    "a quotient": lambda gate, up: F.silu(gate) / up,
}


@pytest.mark.parametrize("hidden", NO_PRODUCTS.values(), ids=NO_PRODUCTS)
def test_what_is_no_product_of_an_activation_and_a_projection(
    hidden: Callable[[Tensor, Tensor], Tensor],
):
    assert reason(hidden) in (Kind.NOT_A_PRODUCT, Kind.UNKNOWN_ACTIVATION)


@pytest.mark.parametrize(
    "hidden",
    [
        lambda gate, up: F.silu(gate + up),
        lambda gate, up: F.silu(gate) * (gate + 2 * up),
    ],
)
def test_projections_that_are_added(hidden: Callable[[Tensor, Tensor], Tensor]):
    assert reason(hidden) is Kind.ADDED_PROJECTIONS


@pytest.mark.parametrize(
    "hidden",
    [lambda gate, up: gate * up, lambda gate, up: gate * up * 2, lambda gate, up: gate * gate],
    ids=["bilinear", "scaled", "squared"],
)
def test_bilinear_units_are_never_rewritten(hidden: Callable[[Tensor, Tensor], Tensor]):
    report = mhf_compiler.explain(Ffn(hidden), options={"rewrite": "always"})(torch.randn(4, 6, 8))
    assert report.rewritten == []


# Expressions by themselves.

P0, P1, L0, L1 = sympy.symbols("p0 p1 l0 l1")


@pytest.mark.parametrize(
    ("activation", "gate_scale"), [("silu", 1.0), ("relu", 1.0), ("relu2", 0.5)]
)
def test_without_an_up_projection_only_the_square_of_relu_takes_a_scale_inside(
    activation: str, gate_scale: float
):
    hidden = Hidden(activation, Line(P0, 1.0, None, 1.0), None, (), 0.25)
    inside = hidden.scaled_inside()
    assert inside.gate.scale == gate_scale
    assert inside.scale == (1.0 if activation == "relu2" else 0.25)


@pytest.mark.parametrize(
    ("expression", "positive"),
    [
        (sympy.exp(L0), True),
        (1 + sympy.exp(L0), True),
        (2 * sympy.exp(L0) * sympy.exp(L1), True),
        (L0, False),
        (1 + L0, False),
        (-sympy.exp(L0), False),
        (sympy.tanh(sympy.exp(L0)), False),
    ],
    ids=str,
)
def test_only_what_is_seen_to_be_positive_is(expression: sympy.Expr, positive: bool):
    assert _is_positive(expression) is positive


def test_a_division_by_zero_is_not_simplified():
    assert _over(P0, sympy.Integer(0)).has(Unsimplified)
    assert not _over(P0, sympy.Integer(2)).has(Unsimplified)


@pytest.mark.parametrize(
    "arguments", [(0.1, None), (0, 6), (None, 6), (-1, None)], ids=["above", "6", "below", "wider"]
)
def test_only_a_clamp_at_zero_is_relu(arguments: tuple[float | None, ...]):
    clamp = torch.ops.aten.clamp.default
    x = a_value(INPUT)
    assert POINTWISE[clamp](a_value(clamp, x, 0, requires_grad_mode=False), P0) == sympy.Max(0, P0)
    with pytest.raises(Declined) as declined:
        POINTWISE[clamp](a_value(clamp, x, *arguments), P0)
    assert declined.value.reason.kind is Kind.UNKNOWN_ACTIVATION


def test_a_clamp_whose_slope_differs_from_that_of_relu_is_told():
    with pytest.raises(Declined) as declined:
        read_hidden(Clamped(P0))
    assert "slope is 1" in declined.value.reason.detail


GATE = sympy.Max(0, P0)


def test_powers_of_a_factor_are_factors():
    assert read_hidden(GATE * L0**2 * L1).factors == (L0, L0, L1)


@pytest.mark.parametrize(
    "factor",
    [(L0 + 1) ** 2, sympy.sqrt(L0), 1 / L0, sympy.tanh(L0)],
    ids=["of a sum", "a root", "divided by", "activated"],
)
def test_other_factors_are_none(factor: sympy.Expr):
    with pytest.raises(Declined) as declined:
        read_hidden(GATE * factor)
    assert declined.value.reason.kind is Kind.NOT_A_PRODUCT


@pytest.mark.parametrize(
    ("factor", "adds"),
    [
        (sympy.tanh(P0 + P1), True),
        (sympy.tanh(P0 + 2 * P1 + 1), True),
        (sympy.tanh((P0 + 1) * P1), False),
        (sympy.tanh(P0 + P0 * P1), False),
    ],
    ids=str,
)
def test_projections_are_added_where_a_sum_has_two_of_them(factor: sympy.Expr, adds: bool):
    assert _adds_up(factor) is adds


def test_a_line_has_one_bias():
    line = _as_line(2 * P0 + 3 * L0, P0)
    assert line == Line(P0, 2.0, L0, 3.0)
    assert _as_line(P0 + L0 + L1, P0) is None
    assert _as_line(P0 + L0 * L1, P0) is None
    assert _as_line(P0**2, P0) is None
    assert _as_line(L0, P0) is None


@pytest.mark.parametrize(
    ("inner", "scale"), [(sympy.sqrt(0.5) * 3 * P0, 3), (L0 * P0, None), (P0**2, None)], ids=str
)
def test_the_slope_inside_a_gelu_is_a_number(inner: sympy.Expr, scale: float | None):
    found = list(_candidate_arguments(sympy.erf(inner), P0, 6))
    of_slopes = [x / P0 for x in found if x.coeff(P0) == x / P0 and (x / P0).is_number]
    assert 0 not in of_slopes
    assert scale is None or any(abs(float(slope) - scale) < 1e-5 for slope in of_slopes)
    assert not any(candidate.has(L0) for candidate in found if scale is not None)


def test_a_product_is_simplified_where_nothing_cancels():
    assert times(P0 / 2, L0 / 2) == P0 * L0 / 4
    assert times(P0, P0) == P0**2
    assert times(P0, 1 / P0).has(Unsimplified)
    assert times(sympy.exp(P0), sympy.exp(-P0)).has(Unsimplified)


def test_what_rounds_is_told_as_such():
    """Not as an activation that nobody knows: ``x + 1000 - 1000`` is what was meant."""
    with pytest.raises(Declined) as declined:
        read_hidden(sympy.Max(0, plus(P0 + 1000, sympy.Integer(-1000))))
    assert "which rounds" in declined.value.reason.detail


def test_a_sum_below_a_division_keeps_its_signs():
    assert _unsigned(-P0) == P0
    assert _unsigned((1 - P0) ** 2) == (1 + P0) ** 2
    assert _unsigned(1 / (1 - P0)) == 1 / (1 - P0)
