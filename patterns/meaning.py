"""Pointwise meaning: what a tree of pointwise operations computes, in any spelling.

A tree becomes a sympy expression over symbols: ``p0, p1`` for projections, ``l0, l1`` for every
other tensor it reads. ``read_hidden`` then checks whether the expression is

    scale * act(gate_scale * p + bias) * (up_scale * p' + bias') * l * l' ...

Activations are compared as expressions, with coefficients rounded to six digits (to 13 in float64,
where the digits that an author left out are no rounding), so that
``x * sigmoid(x)``, ``x / (1 + exp(-x))`` and ``silu(x)`` are one. An expression that is equal to
none in the table is not guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any, TypeAlias

import sympy
import torch

from .canonical import Value
from .parts import is_number
from .reasons import Declined, Kind

aten = torch.ops.aten

Expression: TypeAlias = sympy.Expr

_DIGITS = 6  # to which coefficients are compared: authors shorten sqrt(2 / pi)
_FLOAT64_DIGITS = 13
_UNSIMPLIFIED = "a number is added and taken away, or multiplied and divided by, which rounds"


@dataclass(frozen=True, slots=True)
class Line:
    """``scale * projection + bias_scale * bias``."""

    projection: sympy.Symbol
    scale: float
    bias: sympy.Symbol | None
    bias_scale: float

    def times(self, factor: float) -> Line:
        """``factor * line``"""
        return replace(self, scale=factor * self.scale, bias_scale=factor * self.bias_scale)


@dataclass(frozen=True, slots=True)
class Hidden:
    """The hidden units: ``scale * activation(gate) * up * factors``."""

    activation: str
    gate: Line
    up: Line | None
    factors: tuple[sympy.Symbol, ...]
    scale: float

    def scaled_inside(self) -> Hidden:
        """The same units, scaled down in a projection instead of afterwards, where possible.

        Hidden units that the model scales down early fit into float16; scaled down late, they might
        not.
        """
        if not 0 < abs(self.scale) < 1:
            return self
        if self.up is not None:
            return replace(self, up=self.up.times(self.scale), scale=1.0)
        if self.activation == "relu2" and self.scale > 0:
            return replace(self, gate=self.gate.times(math.sqrt(self.scale)), scale=1.0)
        return self


def number(value: float) -> sympy.Number:
    """A coefficient: exact where it is a short binary fraction."""
    if float(value * 256).is_integer():
        return sympy.Rational(int(value * 256), 256)
    return sympy.Float(value)


def _sigmoid(y: Expression) -> Expression:
    return 1 / (1 + sympy.exp(-y))


class Clamped(sympy.Function):
    """``clamp(x, min=0)`` while gradients are recorded: its gradient at 0 is 1, that of relu is 0.

    A network whose gates start at zero learns with one and not with the other.
    """

    nargs = 1


class Unsimplified(sympy.Function):
    """An expression that may be simplified only if numbers are finite and not rounded.

    ``x + c - c`` rounds x to the distance of the numbers near c, ``x * y / y`` is NaN where y is 0
    or infinite, ``0 * x`` where x is. Sympy would cancel all of these.
    """


def plus(a: Expression, b: Expression) -> Expression:
    """``a + b``, in which nothing cancels."""
    mine, theirs = (dict(_coefficients(x)) for x in (a, b))
    if any(mine[rest] * theirs[rest] < 0 for rest in mine.keys() & theirs.keys()):
        return Unsimplified(a, b)
    return a + b


def times(a: Expression, b: Expression) -> Expression:
    """``a * b``, in which nothing cancels."""
    if (a == 0 or b == 0) and not (a.is_Number and b.is_Number):
        return Unsimplified(a, b)
    mine, theirs = (dict(f.as_base_exp() for f in sympy.Mul.make_args(x)) for x in (a, b))
    for base in mine.keys() & theirs.keys():
        powers = mine[base], theirs[base]
        if not all(p.is_positive for p in powers):
            return Unsimplified(a, b)
    return a * b


def _over(a: Expression, b: Expression) -> Expression:
    """``a / b``: of what may be zero or infinite, only the name is kept."""
    return times(a, 1 / b if _is_positive(b) or (b.is_number and b != 0) else Unsimplified(b))


def _power(x: Expression, n: Expression) -> Expression:
    if not n.is_Integer or n == 0:
        return Unsimplified(x, n)
    return x**n if n > 0 else _over(sympy.Integer(1), x ** (-n))


def _is_positive(x: Expression) -> bool:
    if x.is_Number or isinstance(x, sympy.exp):
        return bool(x.is_Number is not True or x > 0)
    return bool(x.is_Add or x.is_Mul) and all(map(_is_positive, x.args))


def _coefficients(x: Expression) -> Iterator[tuple[Expression, Expression]]:
    """The terms of a sum and their coefficients, numbers multiplied out."""
    coefficient, rest = x.as_coeff_Mul()
    if rest.is_Add:
        for term in rest.args:
            for inner, factor in _coefficients(term):
                yield inner, coefficient * factor
    else:
        yield rest, coefficient


def _cancels(x: Expression) -> bool:
    """Whether terms of a sum cancel when it is multiplied out."""
    signed, unsigned = (sympy.expand(y).as_coefficients_dict() for y in (x, _unsigned(x)))
    if signed.keys() != unsigned.keys():
        return True
    return any(abs(abs(signed[k]) - unsigned[k]) > 1e-9 * abs(unsigned[k]) for k in signed)


def _unsigned(x: Expression) -> Expression:
    """The same with all coefficients positive."""
    if x.is_Number:
        return abs(x)
    if x.is_Add or x.is_Mul:
        return x.func(*map(_unsigned, x.args))
    if x.is_Pow and x.exp > 0:  # an integer, by _power
        return _unsigned(x.base) ** x.exp
    return x


def _gelu_tanh(y: Expression) -> Expression:
    return y / 2 * (1 + sympy.tanh(number(math.sqrt(2 / math.pi)) * (y + number(0.044715) * y**3)))


#: Activation -> the forms it is met in, as functions of the pre-activation.
ACTIVATIONS: dict[str, tuple[Callable[[Expression], Expression], ...]] = {
    "silu": (lambda y: y * _sigmoid(y), lambda y: y / 2 * (1 + sympy.tanh(y / 2))),
    "gelu": (lambda y: y / 2 * (1 + sympy.erf(number(math.sqrt(0.5)) * y)),),
    "gelu_tanh": (_gelu_tanh,),
    "relu": (lambda y: sympy.Max(0, y),),
    "relu2": (lambda y: sympy.Max(0, y) ** 2, lambda y: Clamped(y) ** 2),
    "sigmoid": (_sigmoid, lambda y: (1 + sympy.tanh(y / 2)) / 2),
    "tanh": (sympy.tanh,),
}


#: what stands before the pre-activation inside each form of gelu
_GELU_SLOPES = {sympy.erf: number(math.sqrt(0.5)), sympy.tanh: number(math.sqrt(2 / math.pi))}


def _gelu(value: Value, x: Expression) -> Expression:
    name = "gelu_tanh" if value.argument(1, "approximate", "none") == "tanh" else "gelu"
    return ACTIVATIONS[name][0](x)


def _clamp(value: Value, x: Expression) -> Expression:
    low, high = value.argument(1, "min", None), value.argument(2, "max", None)
    if low != 0 or high is not None:
        raise Declined(Kind.UNKNOWN_ACTIVATION, "it is clamped", value.origin)
    return Clamped(x) if value.requires_grad_mode else sympy.Max(0, x)


def _added(sign: int) -> Callable[..., Expression]:
    def add(value: Value, a: Expression, b: Expression) -> Expression:
        return plus(a, times(sign * _alpha(value), b))

    return add


def _subtracted_from(value: Value, a: Expression, b: Expression) -> Expression:
    return plus(b, times(-_alpha(value), a))


def _alpha(value: Value) -> Expression:
    alpha = value.argument(2, "alpha", 1)
    if not is_number(alpha):
        raise _unread(alpha, value)
    return number(alpha)


def _divided(value: Value, a: Expression, b: Expression) -> Expression:
    if value.kwargs.get("rounding_mode") is not None:
        raise Declined(Kind.UNKNOWN_OPERATION, "division with rounding", value.origin)
    return _over(a, b)


#: Operator -> its meaning; the rule receives the value and one expression per tensor or number.
POINTWISE: dict[Any, Callable[..., Expression]] = {
    aten.add.Tensor: _added(1),
    aten.add.Scalar: _added(1),
    aten.sub.Tensor: _added(-1),
    aten.sub.Scalar: _added(-1),
    aten.rsub.Scalar: _subtracted_from,
    aten.mul.Tensor: lambda _, a, b: times(a, b),
    aten.mul.Scalar: lambda _, a, b: times(a, b),
    aten.div.Tensor: _divided,
    aten.div.Scalar: _divided,
    aten.div.Tensor_mode: _divided,
    aten.neg.default: lambda _, x: -x,
    aten.reciprocal.default: lambda _, x: _over(sympy.Integer(1), x),
    aten.exp.default: lambda _, x: sympy.exp(x),
    aten.erf.default: lambda _, x: sympy.erf(x),
    aten.tanh.default: lambda _, x: sympy.tanh(x),
    aten.sigmoid.default: lambda _, x: _sigmoid(x),
    aten.silu.default: lambda _, x: x * _sigmoid(x),
    aten.gelu.default: _gelu,
    aten.relu.default: lambda _, x: sympy.Max(0, x),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.square.default: lambda _, x: x**2,
    aten.pow.Tensor_Scalar: lambda _, x, n: _power(x, n),
    aten._to_copy.default: lambda _, x: x,
}

#: Those of them that are linear, and so may stand between a projection and its activation.
LINEAR = frozenset(
    op
    for op in POINTWISE
    if op._schema.name.split("::")[1] in {"add", "sub", "rsub", "mul", "div", "neg", "_to_copy"}
)


def _unread(argument: Any, value: Value) -> Declined:
    """What is said of an argument that is infinite, not a number, or not known."""
    if isinstance(argument, float):
        return Declined(Kind.UNKNOWN_OPERATION, f"the number {argument}", value.origin)
    return Declined(Kind.VARYING_NUMBER, node=value.origin)


def pointwise_arguments(value: Value) -> list[Any]:
    """The tensors and numbers that ``POINTWISE[value.op]`` takes as expressions."""
    takes_options = value.op in (aten.clamp.default, aten.clamp_min.default, aten.gelu.default)
    arguments = list(value.args[: 1 if takes_options else 2])
    for argument in arguments:
        if not is_number(argument) and not isinstance(argument, Value):
            raise _unread(argument, value)
    return arguments


@lru_cache(maxsize=4096)
def read_hidden(expression: Expression, dtype: torch.dtype = torch.float32) -> Hidden:
    """Read the hidden units, which are computed in this dtype, off their expression.

    Raises:
        Declined: they are no product of one activation and at most one more projection.
    """
    digits = _FLOAT64_DIGITS if dtype is torch.float64 else _DIGITS
    scale, product = expression.as_coeff_Mul()
    groups: dict[sympy.Symbol, list[Expression]] = {}
    factors: list[sympy.Symbol] = []
    for factor in sympy.Mul.make_args(product):
        projections = [s for s in factor.free_symbols if s.name.startswith("p")]
        if len(projections) > 1:
            raise Declined(Kind.ADDED_PROJECTIONS if _adds_up(factor) else Kind.NOT_A_PRODUCT)
        if projections:
            groups.setdefault(projections[0], []).append(factor)
        elif isinstance(factor, sympy.Symbol):
            factors.append(factor)
        elif factor.is_Pow and factor.base.is_Symbol and factor.exp.is_Integer and factor.exp > 0:
            factors += [factor.base] * int(factor.exp)
        else:
            raise Declined(Kind.NOT_A_PRODUCT)
    lines: list[Line] = []
    gates: list[tuple[str, Line]] = []
    for projection, parts in sorted(groups.items(), key=lambda item: item[0].name):
        group = reduce(lambda a, b: a * b, parts)
        line = _as_line(group, projection)
        if line is not None:
            lines.append(line)
        else:
            activation, gate, left_over = _as_activation(group, projection, scale, digits)
            gates.append((activation, gate))
            scale = left_over
    if len(gates) != 1 or len(lines) > 1:
        raise Declined(Kind.NOT_A_PRODUCT, _counted(len(gates), len(lines)))
    (activation, gate), up = gates[0], lines[0] if lines else None
    order = sorted(factors, key=lambda symbol: symbol.name)
    return Hidden(activation, gate, up, tuple(order), float(scale))


def _adds_up(factor: Expression) -> bool:
    """Whether a factor depends on several projections because they are added, as LoRA does."""
    for part in sympy.preorder_traversal(factor):
        terms = [x for x in part.args if any(s.name.startswith("p") for s in x.free_symbols)]
        if part.is_Add and len(terms) > 1 and all(x.as_coeff_Mul()[1].is_Symbol for x in terms):
            return True
    return False


def _counted(gates: int, lines: int) -> str:
    return f"{gates} activated and {lines} linear projections"


def _as_line(expression: Expression, projection: sympy.Symbol) -> Line | None:
    terms: dict[Expression, Expression] = {}
    for rest, coefficient in _coefficients(expression):
        if terms.get(rest, 0) * coefficient < 0:
            return None  # they cancel
        terms[rest] = terms.get(rest, 0) + coefficient
    scale = terms.pop(projection, 0)
    if scale == 0 or len(terms) > 1:
        return None
    if not terms:
        return Line(projection, float(scale), None, 1.0)
    ((bias, bias_scale),) = terms.items()
    if not isinstance(bias, sympy.Symbol):
        return None
    return Line(projection, float(scale), bias, float(bias_scale))


def _as_activation(
    group: Expression, projection: sympy.Symbol, scale: Expression, digits: int
) -> tuple[str, Line, Expression]:
    """The activation that ``scale * group`` is, its argument, and the factor that is left over."""
    if group.has(Unsimplified) or _cancels(group):
        raise Declined(Kind.UNKNOWN_ACTIVATION, _UNSIMPLIFIED)
    coefficient, target = _monic(group, digits)
    for argument in _candidate_arguments(group, projection, digits):
        line = _as_line(argument, projection)
        if line is None:
            continue
        for name, forms in ACTIVATIONS.items():
            for form in forms:
                unit, shape = _monic(form(argument), digits)
                if shape == target:
                    left_over = scale * coefficient / unit
                    slope = line.scale != 1 and abs(float(left_over) * line.scale - 1) < 1e-6
                    if slope and name == "silu":
                        continue  # x * sigmoid(1.702 x): another slope, not a scaled silu
                    return name, line, left_over
    if group.has(Clamped):
        detail = "where gradients are recorded, clamp(min=0) is no relu: at 0 its slope is 1, not 0"
        raise Declined(Kind.UNKNOWN_ACTIVATION, detail)
    raise Declined(Kind.UNKNOWN_ACTIVATION, f"it computes {group.subs(projection, 'x')}")


def _monic(expression: Expression, digits: int) -> tuple[Expression, Expression]:
    """The numeric factor of an expression, and the rest in comparable form."""
    coefficient, rest = sympy.factor_terms(expression).as_coeff_Mul()
    return coefficient, _rounded(rest, digits)


def _candidate_arguments(
    group: Expression, projection: sympy.Symbol, digits: int
) -> Iterator[Expression]:
    """What the pre-activation may be: each sub-expression that is linear in the projection.

    It may be a multiple of one: forms contain exp(-y) and tanh(y / 2), and in a form of gelu only
    the linear coefficient inside the erf or tanh says how the pre-activation was scaled.
    """
    lines = [part for part in sympy.preorder_traversal(group) if part.has(projection)]
    lines = [part for part in dict.fromkeys(lines) if _as_line(part, projection) is not None]
    seen: set[Expression] = set()
    for part in lines:
        for candidate in (part, -part, 2 * part):
            if candidate not in seen:
                seen.add(candidate)
                yield candidate
    for function, unit in _GELU_SLOPES.items():
        for inner in group.atoms(function):
            linear = sympy.expand(inner.args[0]).coeff(projection, 1)
            if linear.is_number and linear != 0:
                scale = linear / unit
                short = _shortened(scale, digits)  # what was written, unless it has more digits
                same = abs(float(short / scale) - 1) < 10.0 ** -(digits + 1)
                yield (short if same else scale) * projection


def _rounded(expression: Expression, digits: int) -> Expression:
    expanded = sympy.expand(expression)
    return expanded.xreplace({f: _shortened(f, digits) for f in expanded.atoms(sympy.Float)})


def _shortened(coefficient: Expression, digits: int) -> Expression:
    return sympy.Float(f"{float(coefficient):.{digits}g}")
