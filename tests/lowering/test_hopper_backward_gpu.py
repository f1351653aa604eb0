"""The Gluon backward kernels on a Hopper GPU, where the plain kernels would hide their faults.

Every gradient is checked against float64: its error may be twice that of the plain spelling in the
same dtype. Each test also checks which kernels ran.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import problems
from support.problems import (
    BIASES,
    NAMES,
    Shape,
    beside_nan,
    present,
    spelled_at_once,
    step,
    stored_as,
)
from torch import Tensor

from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.lowering.problem import Gradients, Problem

pytestmark = pytest.mark.gpu

SHAPE = Shape(B=2, L=640, H=4, d=128, G=4, E=3, f=256)
Runs = dict[str, bool]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel does not write is noticed."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(float("nan"))
    )
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda x, *size, **options: new_empty(x, *size, **options).fill_(float("nan")),
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """For each of the kernels that was offered its work: whether it took it."""
    from mhf_compiler.lowering.kernels import hopper, replay

    replay.forget_repeats()
    taken: Runs = {}

    def watch(name: str) -> None:
        run = getattr(hopper, name)

        def watched(*args: Any) -> bool:
            taken[name] = run(*args)
            return taken[name]

        monkeypatch.setattr(hopper, name, watched)

    for name in ("run_dq", "run_dv", "run_dk_du", "run_dk_dv"):
        watch(name)
    return iter([taken])


ALL = {"run_dq": True, "run_dv": True, "run_dk_du": True}
UNGATED = {"run_dq": True, "run_dk_dv": True}
NARROW_UNGATED = {"run_dk_dv": True}  # dQ is plain Triton's


def ungated(d: int) -> dict[str, bool]:
    return UNGATED if d > 64 else NARROW_UNGATED


def make(
    dtype: torch.dtype = torch.bfloat16,
    routed: bool = True,
    router_dtype: torch.dtype = torch.float32,
    gated: bool = True,
    biases: Sequence[str] = (),
    **sizes: int,
) -> tuple[list[Tensor | None], Tensor]:
    """The tensors of a problem, with biases if there are any, and the gradient of its result."""
    absent = [name for name in BIASES if name not in biases]
    absent += [name for name, there in (("r", routed), ("u", gated)) if not there]
    tensors = problems.make(
        SHAPE._replace(**sizes),
        dtype,
        absent,
        router_dtype=router_dtype,
        scaled=True,
        device="cuda",
    )
    q, *others = (tensors[name] for name in (NAMES if biases else NAMES[:5]))
    assert q is not None
    return [q, *others], torch.randn_like(q)


def fused(
    inputs: Any, grad_out: Tensor, activation: str = "silu", scales: Any = None
) -> list[Tensor]:
    from mhf_compiler.lowering.kernels import dispatch

    problem = Problem(*inputs, activation=activation, **(scales or {}))
    gradients = problem.new_gradients([x is not None for x in problem.tensors])
    dispatch.backward(problem, grad_out, gradients)
    return gradients.wanted


def check(inputs: Any, grad_out: Tensor, activation: str = "silu", **given: float) -> None:
    scales = {"k_scale": 1.0, "u_scale": 1.0, "out_scale": 1.0} | given
    tensors = dict(zip(NAMES, inputs, strict=False))
    options = {"activation": activation, **scales}
    _, *exact = step(spelled_at_once, tensors, grad_out, torch.float64, **options)
    _, *usual = step(spelled_at_once, tensors, grad_out, **options)
    values = fused(inputs, grad_out, activation, scales)
    problems.assert_as_exact(present(tensors), values, usual, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [8, 16, 24, 32, 64, 96, 128])
def test_widths(d: int, dtype: torch.dtype, runs: Iterator[Runs]) -> None:
    check(*make(d=d, dtype=dtype))
    assert next(runs) == ALL


@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize(("f", "E"), [(16, 3), (64, 1), (171, 3), (341, 5), (2752, 1)])
def test_ragged_hidden_units(f: int, E: int, d: int, runs: Iterator[Runs]) -> None:
    check(*make(H=2, G=2, f=f, E=E, d=d))
    assert next(runs) == ALL


@pytest.mark.parametrize(("B", "L"), [(1, 1024), (1, 1031), (3, 1000), (1100, 1)])
def test_ragged_tokens(B: int, L: int, runs: Iterator[Runs]) -> None:
    check(*make(B=B, L=L, H=2, G=2))
    assert next(runs) == ALL


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, runs: Iterator[Runs]) -> None:
    check(*make(H=2, G=2, f=171), activation)
    assert next(runs) == ALL


def test_scales(runs: Iterator[Runs]) -> None:
    check(*make(), k_scale=1.3, u_scale=0.7, out_scale=0.9)
    assert next(runs) == ALL


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("L", [640, 700])
def test_shared_weights(groups: int, L: int, runs: Iterator[Runs]) -> None:
    """Odd numbers of tiles as well: a pair of tiles never mixes two groups."""
    check(*make(G=groups, f=171, L=L))
    assert next(runs) == ALL


def test_without_router(runs: Iterator[Runs]) -> None:
    check(*make(routed=False))
    assert next(runs) == ALL


def test_router_in_the_working_precision(runs: Iterator[Runs]) -> None:
    check(*make(router_dtype=torch.bfloat16))
    assert next(runs) == ALL


@pytest.mark.parametrize("which", ["k", "u", "v", "kuv"])
@pytest.mark.parametrize("d", [24, 32, 128])
def test_weights_stored_by_columns(d: int, which: str, runs: Iterator[Runs]) -> None:
    inputs, grad_out = make(d=d)
    for i, name in enumerate("kuv", 1):
        if name in which:
            inputs[i] = stored_as(inputs[i], (0, 1, 3, 2))
    check(inputs, grad_out)
    assert next(runs) == ALL


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize("L", [600, 601])
def test_token_layouts(order: tuple[int, ...], L: int, runs: Iterator[Runs]) -> None:
    """Sequences that cannot be one, and heads outside of tokens."""
    (q, *others, r), grad_out = make(L=L)
    check([stored_as(q, order), *others, r], stored_as(grad_out, order))
    assert next(runs) == ALL


@pytest.mark.parametrize("d", [8, 24, 32])
def test_what_lies_beside_narrow_heads(d: int, runs: Iterator[Runs]) -> None:
    """Their tiles are wider than they are: what that takes in is not read."""
    (*tensors, r), grad_out = make(d=d)
    check([*map(beside_nan, tensors), r], beside_nan(grad_out))
    assert next(runs) == ALL


@pytest.mark.parametrize("d", [8, 24, 32])
def test_nothing_is_written_beside_narrow_gradients(d: int) -> None:
    """As above, of gradients that lie in the memory of wider ones."""
    from mhf_compiler.lowering.kernels.dispatch import specialised_backward
    from mhf_compiler.lowering.kernels.operands import tokens_innermost

    (q, k, u, v, r), grad_out = make(d=d)
    assert r is not None
    problem = Problem(q, k, u, v, tokens_innermost(r, merged=True))
    grads = [beside_nan(x) for x in (q, k, u, v)]
    gradients = Gradients(*grads, torch.empty_like(r))
    for kernel in ("dq", "dv", "dk_du"):
        assert specialised_backward(kernel, problem, grad_out, gradients)
    expected = fused([q, k, u, v, r], grad_out)
    for grad, x in zip(grads, expected, strict=False):
        assert grad.equal(x)
        assert grad.as_strided((*grad.shape[:3], 64), grad.stride())[..., d:].isnan().all()


K_AND_V = ("k_bias", "v_bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("d", [8, 16, 24, 32, 64, 96, 128])
def test_widths_without_a_gate(
    d: int, routed: bool, dtype: torch.dtype, runs: Iterator[Runs]
) -> None:
    check(*make(d=d, dtype=dtype, gated=False, routed=routed, biases=K_AND_V), "gelu")
    assert next(runs) == ungated(d)


@pytest.mark.parametrize("biases", [(), ("k_bias",), ("v_bias",), K_AND_V])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_without_a_gate(
    activation: str, biases: Sequence[str], runs: Iterator[Runs]
) -> None:
    check(*make(H=2, G=2, f=171, gated=False, biases=biases), activation)
    assert next(runs) == UNGATED


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("d", [16, 64, 128])
@pytest.mark.parametrize(("f", "E"), [(16, 3), (64, 1), (128, 1), (171, 3), (341, 5), (2752, 1)])
def test_ragged_hidden_units_without_a_gate(
    f: int, E: int, d: int, routed: bool, runs: Iterator[Runs]
) -> None:
    options = {"H": 2, "G": 2, "f": f, "E": E, "d": d}
    check(*make(gated=False, routed=routed, biases=K_AND_V, **options), "relu")
    assert next(runs) == ungated(d)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("B", "L"), [(1, 1024), (1, 1031), (3, 1000), (1100, 1)])
def test_ragged_tokens_with_biases(B: int, L: int, gated: bool, runs: Iterator[Runs]) -> None:
    biases = BIASES if gated else K_AND_V
    check(*make(B=B, L=L, H=2, G=2, gated=gated, biases=biases))
    assert next(runs) == (ALL if gated else UNGATED)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_shared_weights_and_biases(gated: bool, groups: int, runs: Iterator[Runs]) -> None:
    biases = BIASES if gated else K_AND_V
    check(*make(G=groups, f=171, L=700, gated=gated, biases=biases), "gelu_tanh")
    assert next(runs) == (ALL if gated else UNGATED)


@pytest.mark.parametrize("biases", [*((name,) for name in BIASES), BIASES])
@pytest.mark.parametrize("d", [16, 64, 128])
def test_biases_of_gated_networks(d: int, biases: Sequence[str], runs: Iterator[Runs]) -> None:
    check(*make(d=d, f=171, biases=biases))
    assert next(runs) == ALL


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_scales_with_biases(routed: bool, gated: bool, runs: Iterator[Runs]) -> None:
    biases = BIASES if gated else K_AND_V
    scales = {"k_scale": 1.3, "u_scale": 0.7 if gated else 1.0, "out_scale": 0.9}
    check(*make(gated=gated, routed=routed, biases=biases), **scales)
    assert next(runs) == (ALL if gated else UNGATED)


@pytest.mark.parametrize("which", ["k", "v", "kv"])
@pytest.mark.parametrize("d", [24, 32, 128])
def test_weights_stored_by_columns_without_a_gate(d: int, which: str, runs: Iterator[Runs]) -> None:
    inputs, grad_out = make(d=d, gated=False, biases=K_AND_V)
    for i, name in ((1, "k"), (3, "v")):
        if name in which:
            inputs[i] = stored_as(inputs[i], (0, 1, 3, 2))
    check(inputs, grad_out)
    assert next(runs) == ungated(d)


@pytest.mark.parametrize("d", [32, 128])
@pytest.mark.parametrize("L", [600, 601])
def test_token_layouts_without_a_gate(L: int, d: int, runs: Iterator[Runs]) -> None:
    """Heads outside of tokens; and biases that are parts of something larger."""
    (q, k, u, v, r, k_bias, u_bias, v_bias), grad_out = make(L=L, d=d, gated=False, biases=K_AND_V)
    assert k_bias is not None
    assert v_bias is not None
    k_bias, v_bias = (torch.stack([x, x * float("nan")], 3)[..., 0] for x in (k_bias, v_bias))
    order = (0, 2, 1, 3)
    check([stored_as(q, order), k, u, v, r, k_bias, u_bias, v_bias], stored_as(grad_out, order))
    assert next(runs) == ungated(d)


@pytest.mark.parametrize("d", [8, 24, 32])
def test_what_lies_beside_narrow_heads_without_a_gate(d: int, runs: Iterator[Runs]) -> None:
    (q, k, u, v, *others), grad_out = make(d=d, gated=False, biases=K_AND_V)
    q, k, v = map(beside_nan, (q, k, v))
    check([q, k, u, v, *others], beside_nan(grad_out))
    assert next(runs) == NARROW_UNGATED


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"H": 16, "G": 16, "E": 22, "f": 64},  # of the last wave
        {"H": 16, "G": 16, "E": 1, "f": 128},  # of the only one
        {"H": 2, "G": 1, "E": 1, "f": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [24, 128])
def test_parts_of_tokens_with_biases(
    d: int, sizes: dict[str, int], gated: bool, runs: Iterator[Runs]
) -> None:
    biases = BIASES if gated else K_AND_V
    check(*make(B=1, L=2048, d=d, gated=gated, biases=biases, **sizes))
    assert next(runs) == (ALL if gated else ungated(d))


def test_other_gradients_without_a_gate(runs: Iterator[Runs]) -> None:
    """Where dK or dV is not wanted, the one kernel of both is not asked."""
    from mhf_compiler.lowering.kernels import dispatch

    inputs, grad_out = make(gated=False, biases=K_AND_V)
    every = dict(zip([n for n, x in zip(NAMES, inputs, strict=True) if x is not None],
                     fused(inputs, grad_out), strict=True))  # fmt: skip
    taken = next(runs)
    taken.clear()
    problem = Problem(*inputs)
    for name, expected in every.items():
        gradients = problem.new_gradients([name == field for field in NAMES])
        dispatch.backward(problem, grad_out, gradients)
        (grad,) = gradients.wanted
        error = (grad.double() - expected.double()).norm() / expected.double().norm()
        assert error < 5e-3, name
    assert set(taken) == {"run_dq"}


def test_same_bits_each_time_without_a_gate() -> None:
    inputs, grad_out = make(B=4, L=1000, G=2, E=22, gated=False, biases=K_AND_V)
    first = fused(inputs, grad_out, "gelu")
    for _ in range(4):
        for x, y in zip(first, fused(inputs, grad_out, "gelu"), strict=True):
            assert x.isfinite().all()
            assert x.equal(y)


def test_repeated_launches_without_a_gate() -> None:
    from mhf_compiler.lowering.kernels import replay

    inputs, grad_out = make(L=1000, E=1, gated=False, biases=K_AND_V)
    others = [x if x is None else torch.randn_like(x) for x in inputs]
    replay.forget_repeats()
    first = fused(inputs, grad_out)
    repeated = fused(others, grad_out)
    replay.forget_repeats()
    for x, y in zip(repeated, fused(others, grad_out), strict=True):
        assert x.equal(y)
    for x, y in zip(first, fused(inputs, grad_out), strict=True):
        assert x.equal(y)


@pytest.mark.parametrize("d", [16, 128])
def test_the_querys_gradient_over_that_of_the_result_without_a_gate(
    d: int, runs: Iterator[Runs]
) -> None:
    inputs, grad_out = make(d=d, gated=False, biases=K_AND_V)
    expected = fused(inputs, grad_out)
    needs = [x is not None for x in inputs]
    for _ in range(3):
        place = grad_out.clone()
        found = torch.ops.mhf_compiler.multi_head_ffn_backward_over_gradient(
            place, *inputs, "silu", 1.0, 1.0, 1.0, needs
        )
        for x, right in zip((place, *(x for x in found if x.numel())), expected, strict=True):
            assert x.equal(right)
    assert next(runs) == ungated(d)


def test_layouts_for_the_plain_kernels(runs: Iterator[Runs]) -> None:
    (q, *others), grad_out = make()
    check([stored_as(q, (0, 2, 3, 1)), *others], grad_out)
    assert not any(next(runs).values())


@pytest.mark.parametrize("d", [24, 32, 64])
def test_parts_of_tokens(d: int, runs: Iterator[Runs]) -> None:
    """More tiles than multiprocessors: the last wave is cut into parts."""
    check(*make(B=1, L=2048, H=16, G=16, E=22, f=64, d=d))
    assert next(runs) == ALL


def test_same_bits_each_time() -> None:
    inputs, grad_out = make(B=4, L=1000, G=2, E=22)
    first = fused(inputs, grad_out)
    for _ in range(4):
        for x, y in zip(first, fused(inputs, grad_out), strict=True):
            assert x.isfinite().all()
            assert x.equal(y)


def test_repeated_launches() -> None:
    """A second call repeats the launches of the first, on tensors of its own."""
    from mhf_compiler.lowering.kernels import replay

    inputs, grad_out = make(L=1000)
    others = [x if x is None else x.clone() for x in inputs]
    others[0] = torch.randn_like(inputs[0])
    replay.forget_repeats()
    first = fused(inputs, grad_out)
    repeated = fused(others, grad_out)
    replay.forget_repeats()
    for x, y in zip(repeated, fused(others, grad_out), strict=True):
        assert x.equal(y)
    for x, y in zip(first, fused(inputs, grad_out), strict=True):
        assert x.equal(y)
    # Two arguments that are one tensor, where before there were two.
    inputs[2] = inputs[1]
    check(inputs, grad_out)


def test_only_some_gradients() -> None:
    from mhf_compiler.lowering.kernels import dispatch

    inputs, grad_out = make()
    every = fused(inputs, grad_out)
    for i in range(5):
        problem = Problem(*inputs)
        gradients = problem.new_gradients([i == j for j in range(8)])
        dispatch.backward(problem, grad_out, gradients)
        (grad,) = gradients.wanted
        error = (grad.double() - every[i].double()).norm() / every[i].double().norm()
        assert error < 5e-3, NAMES[i]


@pytest.mark.parametrize("d", [16, 64, 96, 128])
@pytest.mark.parametrize(("B", "L"), [(2, 640), (1, 1031), (3, 1000)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_the_querys_gradient_over_that_of_the_result(
    order: tuple[int, ...], B: int, L: int, d: int, runs: Iterator[Runs]
) -> None:
    """The other kernels have read it before; and so they have when launches are repeated."""
    (q, *others), grad_out = make(B=B, L=L, d=d)
    inputs = [stored_as(q, order), *others]
    grad_out = stored_as(grad_out, order)
    expected = fused(inputs, grad_out)
    needs = [*(x is not None for x in inputs), False, False, False]
    for _ in range(3):
        place = grad_out.clone()
        found = torch.ops.mhf_compiler.multi_head_ffn_backward_over_gradient(
            place, *inputs, None, None, None, "silu", 1.0, 1.0, 1.0, needs
        )
        for x, right in zip((place, *found[:4]), expected, strict=True):
            assert x.equal(right)
    assert next(runs) == ALL
