"""What is equal only for numbers that are finite, wide enough or not rounded in between.

Every program is compiled and compared with itself, NaN and infinities included: rewritten where
``sites`` is 1, declined for the given reason where it is a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.cases import E, H, d, f
from corpus.harness import reported
from models.harness import OPTIONS
from torch import Tensor

from mhf_compiler.compat import counters
from mhf_compiler.patterns import Kind
from mhf_compiler.patterns.operations import holds

Program = Callable[..., Tensor]
Expected = Kind | int

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
B, L = 2, 6


def weights(dtype: torch.dtype = f32) -> list[Tensor]:
    torch.default_generator.manual_seed(1)
    return [(torch.randn(H, E, f, d) * d**-0.5).to(dtype) for _ in range(3)]


def queries(dtype: torch.dtype = f32) -> Tensor:
    torch.default_generator.manual_seed(2)
    return torch.randn(B, L, H, d).to(dtype)


def projected(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("blhd,hefd->blhef", x, w)


def hidden(x: Tensor, k: Tensor, u: Tensor) -> Tensor:
    return F.silu(projected(x, k)) * projected(x, u)


def down(units: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("blhef,hefd->blhed", units, v)


def network(x: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(B, L, H, E, d): a result for each sub-network."""
    return down(hidden(x, k, u), v)


def check(program: Program, arguments: list[Any], expected: Expected, bound: float = 1e-5) -> None:
    """The compiled program computes what the program does, and is rewritten or not as expected.

    One that is declined stays as it is: it is trained, and AOTAutograd is left out.
    """
    declined = isinstance(expected, Kind)
    options = OPTIONS | {"fallback": "eager"} if declined else OPTIONS
    results = []
    for training in [True] if declined else [False, True]:
        given = [
            [x.clone().requires_grad_(training and x.is_floating_point()) for x in arguments]
            for _ in range(2)
        ]
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(program, backend="flashmhf", options=options)
        with reported() as report:
            plain, found = program(*given[0]), compiled(*given[1])
        assert counters["flashmhf"]["sites_rewritten"] == (0 if declined else expected)
        if declined:
            assert expected in {site.reason.kind for site in report.declined if site.reason}
        results.append((plain, found))
        if training:
            torch.default_generator.manual_seed(3)
            direction = torch.randn(plain.shape).to(plain.dtype)
            for y in (plain, found):
                y.backward(direction)
            results += [(a.grad, b.grad) for a, b in zip(*given, strict=True)]
    for plain, found in results:
        assert (plain is None) == (found is None)
        if plain is not None:
            assert found.dtype == plain.dtype
            assert torch.equal(found.isfinite(), plain.isfinite())
            finite = plain.isfinite()
            largest = float(plain[finite].abs().max()) if finite.any() else 0.0
            torch.testing.assert_close(
                found, plain, rtol=0, atol=bound * largest + 1e-30, equal_nan=True
            )


# Dtypes between the parts.


def summed(dtype: torch.dtype | None) -> Program:
    """Broadcast products that are summed in a dtype of their own."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
        def product(w: Tensor) -> Tensor:
            return (x[:, :, :, None, None] * w).sum(-1, dtype=dtype)

        units = F.silu(product(k)) * product(u)
        return (units[..., None] * v).sum((3, 4))

    return program


@pytest.mark.parametrize(
    ("of_query", "of_weights", "sums", "expected"),
    [
        (f32, f32, None, 1),
        (f32, f32, f32, 1),
        (bf16, bf16, None, 1),
        (bf16, bf16, f32, Kind.MIXED_PRECISION),
        (f32, f32, f64, Kind.MIXED_PRECISION),
        (bf16, f32, None, Kind.MIXED_PRECISION),
        (f32, bf16, None, Kind.MIXED_PRECISION),
        (f16, bf16, None, Kind.MIXED_PRECISION),
        (torch.int64, f32, None, Kind.UNSUPPORTED_DTYPE),
        (torch.bool, f32, None, Kind.UNSUPPORTED_DTYPE),
    ],
    ids=str,
)
def test_products_of_other_dtypes(
    of_query: torch.dtype, of_weights: torch.dtype, sums: torch.dtype | None, expected: Expected
):
    low = bf16 in (of_query, of_weights) or f16 in (of_query, of_weights)
    arguments = [(queries() * 2).to(of_query), *weights(of_weights)]
    check(summed(sums), arguments, expected, bound=5e-2 if low else 1e-5)


@pytest.mark.parametrize("place", ["gate", "up", "down"])
@pytest.mark.parametrize(
    ("of_bias", "of_network", "expected"),
    [
        (f32, f32, 1),
        (f16, f16, 1),
        (bf16, f32, 1),
        (f16, f32, 1),
        (f32, f16, 1),
        (f32, bf16, 1),
        (f16, bf16, 1),
        (bf16, f16, 1),
        (f64, f32, Kind.MIXED_PRECISION),
        (f64, bf16, Kind.MIXED_PRECISION),
        (torch.int64, f32, Kind.MIXED_PRECISION),
    ],
    ids=str,
)
def test_biases_of_other_dtypes(
    place: str, of_bias: torch.dtype, of_network: torch.dtype, expected: Expected
):
    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor, b: Tensor) -> Tensor:
        gate, up = projected(x, k), projected(x, u)
        gate = gate + b if place == "gate" else gate
        up = up + b if place == "up" else up
        units = F.silu(gate) * up
        # Widened, where it has been, for a product of one dtype.
        y = down(units.to(v.dtype), v)
        return (y + b if place == "down" else y).sum(3)

    torch.default_generator.manual_seed(4)
    bias = (torch.randn(H, E, d if place == "down" else f) * 3).to(of_bias)
    low = of_network is not f32
    check(
        program, [queries(of_network), *weights(of_network), bias], expected, 3e-2 if low else 1e-5
    )


def test_a_large_bias_in_float32_does_not_overflow():
    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return (network(x, k, u, v) + b).sum(3)

    arguments = [queries(f16), *weights(f16), torch.full((H, E, d), 1e5)]
    check(program, arguments, 1, 1e-2)


@pytest.mark.parametrize("wide", [f32, f64], ids=str)
def test_wide_routers(wide: torch.dtype):
    """One in float32 is applied as such; one in float64 could leave the range of float32."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return (network(x, k, u, v) * r[..., None]).sum(3)

    router = torch.rand(B, L, H, E, dtype=wide) * (1.0 if wide is f32 else 1e60)
    check(program, [queries(), *weights(), router], 1 if wide is f32 else Kind.MIXED_PRECISION)


# Identities.


@pytest.mark.parametrize("worth", [0.0, 7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("beta", [0, 0.0, 0.5])
def test_beta_of_zero_ignores_its_input(beta: float, worth: float):
    """Whatever is in it: also not a number."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
        q = x.flatten(0, 1).transpose(0, 1)  # (H, tokens, d)
        k, u, v = (w[:, 0] for w in (k, u, v))
        ignored = torch.full((H, B * L, f), worth)
        gate = torch.baddbmm(ignored, q, k.mT, beta=beta)
        units = F.silu(gate) * torch.baddbmm(ignored, q, u.mT, beta=beta)
        return torch.baddbmm(torch.full((H, B * L, d), worth), units, v, beta=beta)

    arguments = [queries(), *weights()]
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(program, backend="flashmhf", options=OPTIONS)
    torch.testing.assert_close(compiled(*arguments), program(*arguments), equal_nan=True)
    if beta == 0:
        assert counters["flashmhf"]["sites_rewritten"] == 1


def test_an_ignored_input_has_a_gradient():
    """One of zeros, which the optimizer sees."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor, b: Tensor) -> Tensor:
        q = x.flatten(0, 1).transpose(0, 1)
        units = F.silu(q @ k[:, 0].mT) * (q @ u[:, 0].mT)
        return torch.baddbmm(b, units, v[:, 0], beta=0)

    arguments = [x.requires_grad_() for x in (queries(), *weights(), torch.ones(H, 1, d))]
    compiled = torch.compile(program, backend="flashmhf", options=OPTIONS)
    compiled(*arguments).sum().backward()
    assert arguments[-1].grad is not None


def _two_routers(x: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return (network(x, k, u, v) * 1e-2 * r[..., None] * r.flip(1)[..., None]).sum(3)


def _router_and_scale(x: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return (down(hidden(x, k, u) * r[..., None], v) * r.flip(1)[..., None] * 1e-2).sum(3)


@pytest.mark.parametrize("program", [_two_routers, _router_and_scale])
@pytest.mark.parametrize("dtype", [f16, bf16], ids=str)
def test_two_routers_in_16_bits(program: Program, dtype: torch.dtype):
    """Their product may be larger, or smaller, than what 16 bits hold, where the result is not."""
    compiled = torch.compile(program, backend="flashmhf", options=OPTIONS)
    for size in (1.0, 300.0, 2e-5):
        router = (torch.rand(B, L, H, E) * size).to(dtype)
        given = [queries(dtype) * 0.5, *weights(dtype), router]
        plain = program(*given)
        exact = program(*(x.double() for x in given))
        error = float((compiled(*given).double() - exact).norm())
        assert error <= 2 * float((plain.double() - exact).norm()) + 1e-9, size
    assert counters["flashmhf"]["sites_rewritten"] == 1


def _scaled_after_bias(factor: float) -> Program:
    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return ((network(x, k, u, v) + b) * factor).sum(3)

    return program


@pytest.mark.parametrize(
    ("factor", "dtype", "expected"),
    [(4.0, f16, 1), (0.25, f16, 1), (4.0, f32, 1)],
    ids=str,
)
def test_scaled_sums_of_bias(factor: float, dtype: torch.dtype, expected: Expected):
    """A factor of the whole is one of the whole in the op."""
    bias = torch.full((H, E, d), 3.0).to(dtype)
    check(_scaled_after_bias(factor), [queries(dtype), *weights(dtype), bias], expected, 2e-2)


def test_a_bias_is_not_scaled_out_of_range():
    """The output is scaled down before the bias is added: the op would scale the bias up."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return (network(x, k, u, v) * 1e-3 + b).sum(3)

    bias = torch.full((H, E, d), 300.0)
    check(program, [queries(f16), *weights(f16), bias.half()], Kind.FLOAT16_RANGE, 1e-2)
    check(program, [queries(), *weights(), bias], 1)


UNITS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Expected]] = {
    "plain": (lambda g, u, r: F.silu(g) * u, 1),
    "added and taken away": (lambda g, u, r: (F.silu(g) + 12e6 - 12e6) * u, 0),
    "gate added and taken away": (lambda g, u, r: F.silu(g + 12e6 - 12e6) * u, 0),
    "taken from itself": (lambda g, u, r: F.silu(g) * u + (g - g), 0),
    "a router added and taken away": (lambda g, u, r: F.silu(g) * (u + r - r), 0),
    "a router divided by itself before": (lambda g, u, r: F.silu(g) * u * (r / r), 1),
    "multiplied and divided": (lambda g, u, r: F.silu(g) * u * r / r, 0),
    "divided by the up projection": (lambda g, u, r: F.silu(g) * u * u / u, 0),
    "times zero": (lambda g, u, r: F.silu(g) * u + g * 0, 0),
    "power of zero": (lambda g, u, r: F.silu(g) * u * u**0, 0),
    "root of a square": (lambda g, u, r: F.silu(g) * (u**0.5) ** 2, 0),
    "exponentials that cancel": (lambda g, u, r: F.silu(g) * u * g.exp() * (-g).exp(), 0),
    "denominators that cancel": (
        lambda g, u, r: g / (1 + torch.exp(-g)) * (1 + torch.exp(-g)) * torch.sigmoid(g) * u,
        0,
    ),
    "terms that cancel multiplied out": (
        lambda g, u, r: (F.silu(g) * (1 + g) - g * F.silu(g)) * u,
        0,
    ),
    "inverse of the inverse": (lambda g, u, r: F.silu(g) * u.reciprocal().reciprocal(), 0),
    "alpha of zero": (lambda g, u, r: torch.add(F.silu(g) * u, g, alpha=0), 0),
    "nothing is added": (lambda g, u, r: (F.silu(g + 0.0) + 0.0) * u, 1),
    "twice the same router": (lambda g, u, r: F.silu(g) * u * r * r, 1),
    "added to itself": (lambda g, u, r: (F.silu(g) + F.silu(g)) * u, 1),
}


@pytest.mark.parametrize("name", UNITS)
def test_nothing_cancels(name: str):
    """What is added and taken away is rounded; zeros and infinities are no numbers to divide."""
    units, expected = UNITS[name]

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return down(units(projected(x, k), projected(x, u), r[..., None]), v).sum(3)

    compiled = torch.compile(program, backend="flashmhf", options=OPTIONS)
    for special in (0.0, float("inf"), float("nan"), 1e4):
        router = torch.rand(B, L, H, E)
        router[0, 0] = special
        x = queries()
        x[1, 1] = special
        arguments = [x, *weights(), router]
        found, plain = compiled(*arguments), program(*arguments)
        finite = plain.isfinite()
        assert torch.equal(found.isfinite(), finite), special
        torch.testing.assert_close(found[finite], plain[finite], rtol=1e-4, atol=1e-4)
    assert counters["flashmhf"]["sites_rewritten"] == expected


# Casts.


def _rounded_hidden(dtype: torch.dtype) -> Program:
    return lambda x, k, u, v: down(hidden(x, k, u).to(dtype).to(x.dtype), v).sum(3)


def _rounded_gate(dtype: torch.dtype) -> Program:
    return lambda x, k, u, v: down(
        F.silu(projected(x, k).to(dtype).to(x.dtype)) * projected(x, u), v
    ).sum(3)


def _rounded_networks(dtype: torch.dtype) -> Program:
    return lambda x, k, u, v: network(x, k, u, v).to(dtype).to(x.dtype).sum(3)


def _rounded_in_place(dtype: torch.dtype) -> Program:
    """Added up in a buffer of fewer digits, and widened at the end."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros(B, L, H, d, dtype=dtype)
        for e in range(E):
            out += network(x, *(w[:, e : e + 1] for w in (k, u, v)))[:, :, :, 0]
        return out.to(x.dtype) * 2

    return program


def _scaled_and_rounded(dtype: torch.dtype) -> Program:
    """Simulated quantisation: scaled into the range of the narrow dtype and back."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return down(((hidden(x, k, u) * 8.0).to(dtype).to(x.dtype)) / 8.0, v).sum(3)

    return program


@pytest.mark.parametrize(
    "spelling", [_rounded_hidden, _rounded_gate, _rounded_networks, _scaled_and_rounded]
)
@pytest.mark.parametrize(
    ("of_network", "of_cast", "expected"),
    [
        (f32, torch.float8_e4m3fn, Kind.ROUNDING_CAST),
        (f32, torch.float8_e5m2, Kind.ROUNDING_CAST),
        (bf16, torch.float8_e4m3fn, Kind.ROUNDING_CAST),
        (f32, bf16, Kind.ROUNDING_CAST),
        (f32, f16, Kind.ROUNDING_CAST),
        (f64, f32, Kind.ROUNDING_CAST),
        (bf16, f16, Kind.ROUNDING_CAST),
        (f16, bf16, Kind.ROUNDING_CAST),
        (f16, f32, 1),
        (bf16, f32, 1),
        (f32, f32, 1),
    ],
    ids=str,
)
def test_casts_in_between(
    spelling: Callable[[torch.dtype], Program],
    of_network: torch.dtype,
    of_cast: torch.dtype,
    expected: Expected,
):
    """A cast to fewer digits is part of the program, one to more is not."""
    program = spelling(of_cast)
    arguments = [queries(of_network), *weights(of_network)]
    torch.compiler.reset()
    counters.clear()
    with reported() as report:
        found = torch.compile(program, backend="flashmhf", options=OPTIONS)(*arguments)
    plain = program(*arguments)
    bound = 3e-2 if of_network in (bf16, f16) else 1e-5
    torch.testing.assert_close(found, plain, rtol=0, atol=bound * float(plain.abs().max()))
    assert counters["flashmhf"]["sites_rewritten"] == (expected if isinstance(expected, int) else 0)
    if isinstance(expected, Kind):
        assert expected in {site.reason.kind for site in report.declined if site.reason}


def test_a_narrow_result_is_rounded_once():
    """In float32 with a result in bfloat16: the op's one rounding is nearer than the program's."""

    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return network(x, k, u, v).bfloat16().sum(3)

    arguments = [queries(), *weights()]
    counters.clear()
    found = torch.compile(program, backend="flashmhf", options=OPTIONS)(*arguments)
    assert counters["flashmhf"]["sites_rewritten"] == 1
    exact = network(*(x.double() for x in arguments)).sum(3)
    errors = [float((y.double() - exact).norm()) for y in (found, program(*arguments))]
    assert errors[0] <= errors[1]


def test_the_network_up_to_a_narrow_buffer():
    """What is added up in bfloat16 is the op's result in bfloat16, and widened afterwards."""
    counters.clear()
    program = _rounded_in_place(bf16)
    arguments = [queries(), *weights()]
    found = torch.compile(program, backend="flashmhf", options=OPTIONS)(*arguments)
    assert counters["flashmhf"]["sites_rewritten"] == 1
    plain = program(*arguments)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-2 * float(plain.abs().max()))


def test_a_result_in_float8_is_cast_after_the_op():
    def program(x: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return network(x, k, u, v).sum(3).to(torch.float8_e4m3fn)

    counters.clear()
    arguments = [queries(), *weights()]
    found = torch.compile(program, backend="flashmhf", options=OPTIONS)(*arguments)
    assert counters["flashmhf"]["sites_rewritten"] == 1
    assert found.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        (f32, torch.float16, True),
        (torch.float16, torch.float8_e4m3fn, True),
        (bf16, torch.float16, False),  # digits
        (torch.float16, bf16, False),  # range
        (torch.float16, torch.float8_e5m2fnuz, False),  # small numbers
        (torch.int64, torch.float16, False),
        (f32, torch.int8, False),
        (f32, torch.float4_e2m1fn_x2, False),  # nothing is known of it
    ],
)
def test_a_wider_dtype_holds_every_number_of_a_narrower_one(
    wide: torch.dtype, narrow: torch.dtype, expected: bool
):
    assert holds(wide, narrow) is expected
