"""The activations between the K and U projections, each with its slope.

One table for every kernel, with the names of `mhf_compiler.lowering.activations`: `activate` serves
those that need the value only, `activate_with_slope` those that differentiate. Both take the name
as a constant, so a compiled kernel contains one formula and no branch.

`APPROXIMATE` allows the hardware's single-instruction tanh. It is worth a lot, because sigmoid by
exp and reciprocal spends two special-function operations on every hidden unit, and those, not the
matrix units, would bound the kernels at narrow heads. Its relative error of 2^-11 is below the
rounding of a 16-bit operand but far above that of a 32-bit one. Gelu goes the same way, by a
polynomial for atanh(erf(x / sqrt 2)): the error function takes three times as many instructions.
The interpreter, which has no such instruction, computes the same formulas with an exact tanh.
"""

import triton
import triton.language as tl

from ..device import interpreted

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _tanh_approx(x):
    if _INTERPRETED:
        return _tanh(x, False)
    else:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return _tanh_approx(x)
    # Away from zero through exp(-2|x|), which cannot overflow. Near zero 1 - exp(-2|x|) cancels, so
    # the odd series takes over: at 1/4 its first dropped term is below float32 resolution.
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    far = tl.where(x < 0, -magnitude, magnitude)
    s = x * x
    series = -17.0 / 315.0 + s * (62.0 / 2835.0)
    series = -1.0 / 3.0 + s * (2.0 / 15.0 + s * series)
    return tl.where(s < 0.0625, x + x * s * series, far)


@triton.jit
def _sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return 0.5 * _tanh_approx(0.5 * x) + 0.5
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


# atanh(erf(x / sqrt 2)) = x (c0 + c1 s + c2 s^2) at s = x^2, such that x (1 + tanh) / 2 errs least:
# by 2.6e-5 at most. From |x| = 6 on tanh is 1, and s stays what it is there: c2 is negative.
_GELU_C0 = tl.constexpr(0.7975052754)
_GELU_C1 = tl.constexpr(0.0370080200)
_GELU_C2 = tl.constexpr(-0.000351902394)
_GELU_S = tl.constexpr(36.0)


@triton.jit
def _gelu_argument(x):
    """The argument of gelu's tanh, and the square that it is a polynomial of."""
    s = tl.minimum(x * x, _GELU_S)
    return x * (_GELU_C0 + s * (_GELU_C1 + s * _GELU_C2)), s


@triton.jit
def _gelu_tanh_gate(x, APPROXIMATE: tl.constexpr):
    # 0.5 * (1 + tanh(y)) is sigmoid(2y), which loses no digits where tanh nears -1.
    # Here y = sqrt(2 / pi) * (x + 0.044715 x^3).
    return _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), APPROXIMATE)


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # keeps NaN, as a maximum would not


@triton.jit
def activate(x, NAME: tl.constexpr, APPROXIMATE: tl.constexpr):
    """act(x), elementwise in float32."""
    if NAME == "silu":
        if APPROXIMATE:
            half = 0.5 * x
            return half * _tanh_approx(half) + half
        return x * _sigmoid(x, False)
    elif NAME == "gelu":
        if APPROXIMATE:
            half = 0.5 * x
            argument, _ = _gelu_argument(x)
            return half * _tanh_approx(argument) + half
        return x * _normal_cdf(x)
    elif NAME == "gelu_tanh":
        return x * _gelu_tanh_gate(x, APPROXIMATE)
    elif NAME == "relu":
        return _relu(x)
    elif NAME == "relu2":
        y = _relu(x)
        return y * y
    elif NAME == "sigmoid":
        return _sigmoid(x, APPROXIMATE)
    else:
        tl.static_assert(NAME == "tanh", "unknown activation")
        return _tanh(x, APPROXIMATE)


@triton.jit
def activate_twice(x, NAME: tl.constexpr, APPROXIMATE: tl.constexpr):
    """act(2x) of the activations that begin by halving their argument."""
    if NAME == "silu":
        argument = x
    else:
        tl.static_assert(NAME == "gelu", "does not begin by halving")
        s = tl.minimum(x * x, _GELU_S / 4.0)
        argument = x * (2.0 * _GELU_C0 + s * (8.0 * _GELU_C1 + s * (32.0 * _GELU_C2)))
    return x * _tanh(argument, APPROXIMATE) + x


@triton.jit
def activate_with_slope(x, NAME: tl.constexpr, APPROXIMATE: tl.constexpr):
    """act(x) and its derivative at x, elementwise in float32."""
    if NAME == "silu":
        s = _sigmoid(x, APPROXIMATE)
        y = x * s
        return y, s + y * (1.0 - s)
    elif NAME == "gelu":
        if APPROXIMATE:
            argument, s = _gelu_argument(x)
            cdf = 0.5 * _tanh_approx(argument) + 0.5
            inner = _GELU_C0 + s * (3.0 * _GELU_C1 + s * (5.0 * _GELU_C2))  # the argument's slope
            y = x * cdf
            return y, cdf + 2.0 * y * (1.0 - cdf) * inner
        cdf = _normal_cdf(x)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
        return x * cdf, cdf + x * density
    elif NAME == "gelu_tanh":
        s = _gelu_tanh_gate(x, APPROXIMATE)
        y = x * s
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)  # the slope of the gate's argument
        return y, s + y * (1.0 - s) * inner
    elif NAME == "relu":
        return _relu(x), tl.where(x <= 0, 0.0, 1.0)
    elif NAME == "relu2":
        y = _relu(x)
        return y * y, 2.0 * y
    elif NAME == "sigmoid":
        s = _sigmoid(x, APPROXIMATE)
        return s, s * (1.0 - s)
    else:
        tl.static_assert(NAME == "tanh", "unknown activation")
        y = _tanh(x, APPROXIMATE)
        return y, 1.0 - y * y
