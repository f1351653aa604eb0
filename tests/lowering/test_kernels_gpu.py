"""The kernels on a GPU: errors, determinism, memory, addresses beyond 32 bits.

An error is relative to float64, and may be twice that of the plain spelling in the same dtype.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import problems
from support.families import without_products
from support.problems import (
    BIASES,
    NAMES,
    Shape,
    Tensors,
    present,
    relative_error,
    spelled,
    step,
    stored_as,
)
from torch import Tensor

from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.lowering.problem import Problem

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)
SCALES = {"k_scale": 1.0, "u_scale": 1.0, "out_scale": 1.0}

SHAPE = Shape(B=2, L=333, H=4, d=128, G=4, E=8, f=256)


def make(
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    absent: Sequence[str] = BIASES,
    router_dtype: torch.dtype = torch.float32,
) -> Tensors:
    return problems.make(
        shape, dtype, absent, router_dtype=router_dtype, scaled=True, device="cuda"
    )


def fused(
    tensors: Tensors,
    grad_out: Tensor,
    activation: str = "silu",
    scales: dict[str, float] = SCALES,
    out: Tensor | None = None,
) -> list[Tensor]:
    from mhf_compiler.lowering.kernels import dispatch
    from mhf_compiler.lowering.ops import network

    problem = Problem(*(tensors[name] for name in NAMES), activation, **scales)
    if out is None:
        out = torch.empty_like(problem.q)
    network.compute_forward(dispatch.forward, problem, out.fill_(float("nan")))
    gradients = problem.new_gradients([x is not None for x in problem.tensors])
    network.compute_backward(dispatch.backward, problem, grad_out, gradients)
    return [out, *gradients.wanted]


def check(
    tensors: Tensors,
    grad_out: Tensor | None = None,
    activation: str = "silu",
    scales: dict[str, float] = SCALES,
    out: Tensor | None = None,
) -> None:
    q = tensors["q"]
    assert q is not None
    if grad_out is None:
        grad_out = torch.randn(q.shape, device="cuda").to(q.dtype)
    options = {"activation": activation, **scales}
    exact = step(spelled, tensors, grad_out, torch.float64, **options)
    usual = step(spelled, tensors, grad_out, **options)
    values = fused(tensors, grad_out, activation, scales, out)
    problems.assert_as_exact(["out", *present(tensors)], values, usual, exact)


@pytest.fixture(autouse=True, scope="module")
def tiles_only() -> Iterator[None]:
    """PyTorch's products, which take some of these problems, are tested in test_batched_gpu.py."""
    with without_products():
        yield


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel does not write is noticed."""
    empty_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(float("nan"))
    )


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """Starts from exact float32 products, and puts the switch back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", [8, 16, 32, 64, 96, 128, 256])
def test_widths(d: int, dtype: torch.dtype) -> None:
    check(make(SHAPE._replace(d=d), dtype))


@pytest.mark.parametrize("d", [8, 64, 96, 128, 256])
def test_float32(d: int) -> None:
    check(make(SHAPE._replace(d=d, H=2, G=2, f=171), torch.float32))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("f", "E"), [(171, 8), (341, 22), (256, 22), (2752, 1), (16, 3)])
def test_hidden_sizes(f: int, E: int, dtype: torch.dtype) -> None:
    check(make(SHAPE._replace(d=64, H=2, G=2, f=f, E=E), dtype))


@pytest.mark.parametrize("L", [1, 7, 64, 129, 1000])
@pytest.mark.parametrize("B", [1, 3])
def test_lengths(B: int, L: int) -> None:
    check(make(SHAPE._replace(B=B, L=L, d=64)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(make(SHAPE._replace(d=64, H=2, G=2, E=3, f=171), dtype), activation=activation)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "tanh", "sigmoid"])
@pytest.mark.parametrize("size", [0.05, 8.0])
def test_approximation_of_small_and_large_arguments(activation: str, size: float) -> None:
    tensors = make(SHAPE._replace(d=64, H=2, G=2, E=3, f=171))
    assert tensors["k"] is not None
    tensors["k"] *= size
    check(tensors, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "absent",
    [(), ("r",), ("u", "u_bias"), ("r", *BIASES), ("u", *BIASES), ("u", "r", *BIASES)],
    ids=lambda absent: "without " + " ".join(absent) if absent else "complete",
)
def test_optional_inputs(absent: tuple[str, ...], dtype: torch.dtype) -> None:
    scales = {"k_scale": 1.3, "u_scale": 0.7, "out_scale": 0.9}
    check(make(SHAPE._replace(d=64, E=3), dtype, absent), scales=scales)


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_weights(groups: int) -> None:
    check(make(SHAPE._replace(d=64, G=groups, E=3)))


def test_router_in_the_working_precision() -> None:
    check(make(SHAPE, router_dtype=torch.bfloat16))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("f", [256, 171])
def test_layouts(order: tuple[int, ...], f: int) -> None:
    """Tokens and R with other axes contiguous, weights stored by columns, tokens odd in number."""
    tensors = make(SHAPE._replace(f=f))
    for name in ("q", "r"):
        tensors[name] = stored_as(tensors[name], order)
    for name in ("k", "u", "v"):
        tensors[name] = stored_as(tensors[name], (0, 1, 3, 2))
    grad_out = stored_as(torch.randn_like(tensors["q"]), order)
    check(tensors, grad_out, out=torch.empty_like(grad_out))


@pytest.mark.parametrize("length", [320, 333])
def test_router_with_contiguous_tokens(length: int) -> None:
    tensors = make(SHAPE._replace(L=length))
    tensors["r"] = stored_as(tensors["r"], (2, 3, 0, 1))
    check(tensors)


def test_expanded_inputs() -> None:
    tensors = make(SHAPE._replace(d=64, E=3))
    tensors["r"] = torch.rand(4, 3, device="cuda").expand(2, 333, 4, 3)
    check(tensors, grad_out=torch.ones((), device="cuda").bfloat16().expand(2, 333, 4, 64))


def test_wider_output() -> None:
    # In strides that no descriptor takes: plain Triton's for either output, so equal bits.
    tensors = make(SHAPE._replace(d=36, E=3))
    out = torch.empty(2, 333, 4, 36, device="cuda")
    grad_out = torch.randn(2, 333, 4, 36, device="cuda")
    check(tensors, grad_out, out=out)
    narrow = torch.empty_like(out, dtype=torch.bfloat16)
    assert fused(tensors, grad_out, out=narrow)[0].equal(out.bfloat16())


@pytest.mark.parametrize("absent", [(), ("u", "u_bias", "r")], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_biases_in_float32(d: int, absent: tuple[str, ...]) -> None:
    """That of the output has the sum of the gradient as it arrives, which is in float32 too."""
    tensors = make(SHAPE._replace(d=d, E=1 if absent else 3), absent=absent)
    tensors |= {name: x if x is None else x.float() for name, x in tensors.items() if "_" in name}
    q = tensors["q"]
    assert q is not None
    grad_out = torch.randn(q.shape, device="cuda")
    options = {"activation": "gelu", **SCALES}
    exact = step(spelled, tensors, grad_out, torch.float64, **options)
    found = fused(tensors, grad_out, "gelu", out=torch.empty_like(grad_out))
    for name, x, y in zip(["out", *present(tensors)], found, exact, strict=True):
        assert relative_error(x, y) < (1e-5 if name == "v_bias" else 1e-2), name


def test_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    check(make(SHAPE._replace(d=64, E=3), torch.float32))


def test_same_bits_each_time() -> None:
    tensors = make(SHAPE._replace(B=4, L=1000, G=2))
    grad_out = torch.randn(4, 1000, 4, 128, device="cuda").bfloat16()
    first, second = (fused(tensors, grad_out) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert x.isfinite().all()
        assert x.equal(y)


@pytest.mark.parametrize("head_dim", [64, 60], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(head_dim: int) -> None:
    """The two sequences of q, of the output's gradient and of the output lie 4 GiB apart."""
    tensors = make(SHAPE._replace(B=2, L=130, H=2, G=2, E=2, d=head_dim, f=64))
    q = tensors["q"]
    assert q is not None
    stride = 2**31 + 64
    memory = torch.empty(stride + q.numel(), device="cuda", dtype=torch.bfloat16)

    def far_apart(x: Tensor) -> Tensor:
        return memory.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)

    small = torch.randn_like(q)
    expected = fused(tensors, small)
    value = fused(tensors | {"q": far_apart(q)}, small)
    for x, y in zip(value, expected, strict=True):
        assert relative_error(x, y.double()) < 1e-3
    value = fused(tensors, far_apart(small))
    for x, y in zip(value, expected, strict=True):
        assert relative_error(x, y.double()) < 1e-3
    out = far_apart(small)
    assert relative_error(fused(tensors, small, out=out)[0], expected[0].double()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_hidden_activations_in_memory(dtype: torch.dtype) -> None:
    from mhf_compiler.lowering.kernels import dispatch

    shape = SHAPE._replace(B=1, L=131072, H=2, d=32, G=2, E=8, f=256)
    tensors = make(shape, dtype)
    problem = Problem(*(tensors[name] for name in NAMES))
    grad_out = torch.randn_like(problem.q)
    out = torch.empty_like(grad_out)

    def step() -> list[Tensor]:
        dispatch.forward(problem, out)
        gradients = problem.new_gradients([x is not None for x in problem.tensors])
        dispatch.backward(problem, grad_out, gradients)
        return gradients.wanted

    results = step()  # loads the kernels
    gradients = sum(x.numel() * x.element_size() for x in results)
    del results
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    scratch = torch.cuda.max_memory_allocated() - before - gradients
    one_network = shape.L * shape.H * shape.f * dtype.itemsize  # its hidden activations
    assert scratch < one_network / 4


def test_gradients_are_allocated_once() -> None:
    """Nothing of the size of the query except its gradient, not even for a moment."""
    tensors = make(SHAPE._replace(B=1, L=65536, H=4, d=128, E=2, f=64))
    q, k, u, v, r = (x.requires_grad_() for name in NAMES[:5] if (x := tensors[name]) is not None)
    leaves = [q, k, u, v, r]
    grad_out = torch.randn_like(q)

    def gradients() -> tuple[Tensor, ...]:
        out = torch.ops.mhf_compiler.multi_head_ffn(*leaves)
        torch.cuda.reset_peak_memory_stats()
        return torch.autograd.grad(out, leaves, grad_out)

    results = gradients()  # loads the kernels
    own = sum(x.numel() * x.element_size() for x in results)
    del results
    before = torch.cuda.memory_allocated() + q.numel() * q.element_size()  # and the output
    gradients()
    scratch = torch.cuda.max_memory_allocated() - before - own
    assert scratch < q.numel() * q.element_size() / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("absent", [BIASES, ("u", "u_bias"), ()], ids=str)
@pytest.mark.parametrize("d", [20, 64, 96, 128, 256])
def test_results_over_what_they_are_computed_from(
    d: int, absent: tuple[str, ...], dtype: torch.dtype
) -> None:
    check_overwriting(make(SHAPE._replace(d=d, E=3), dtype, absent))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_few_tokens_over_themselves(tokens: int, d: int) -> None:
    """Several programs share a tile of tokens, and a second kernel writes it."""
    check_overwriting(make(SHAPE._replace(B=1, L=tokens, d=d)))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 2, 3, 1)])
def test_layouts_over_themselves(order: tuple[int, ...]) -> None:
    check_overwriting(make(SHAPE._replace(f=171, E=3)), order)


def check_overwriting(tensors: Tensors, order: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """The ops that overwrite give the bits of those that do not, and again when repeated."""
    from mhf_compiler.lowering.kernels import replay

    replay.forget_repeats()
    ops = torch.ops.mhf_compiler
    tensors["q"] = stored_as(tensors["q"], order)
    inputs: Any = [tensors[name] for name in NAMES]
    grad_out = stored_as(torch.randn_like(inputs[0]), order)
    needs = [x is not None for x in inputs]
    constants = ("silu", 1.0, 1.0, 1.0)
    out = ops.multi_head_ffn(*inputs, *constants, order)
    gradients = ops.multi_head_ffn_backward(grad_out, *inputs, *constants, needs)
    for _ in range(3):  # chosen, written down, repeated
        place = grad_out.clone()
        others = ops.multi_head_ffn_backward_over_gradient(place, *inputs, *constants, needs)
        found = [place, *(x for x, needed in zip(others, needs[1:], strict=True) if needed)]
        for x, right in zip(found, gradients, strict=True):
            assert x.equal(right)
        q = inputs[0].clone()
        assert q.stride() == inputs[0].stride()
        ops.multi_head_ffn_over_query(q, *inputs[1:], *constants)
        assert q.equal(out)


def test_overwriting_allocates_nothing_of_the_querys_size() -> None:
    tensors = make(SHAPE._replace(B=1, L=65536, H=4, d=128, E=2, f=64))
    inputs: Any = [tensors[name] for name in NAMES]
    grad_out = torch.randn_like(inputs[0])
    ops = torch.ops.mhf_compiler
    needs = [True, *[False] * 7]

    def run() -> None:
        constants = ("silu", 1.0, 1.0, 1.0)
        ops.multi_head_ffn_backward_over_gradient(grad_out, *inputs, *constants, needs)
        ops.multi_head_ffn_over_query(*inputs, *constants)

    run()  # loads the kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    size = inputs[0].numel() * inputs[0].element_size()
    assert torch.cuda.max_memory_allocated() - before < size / 2


def test_a_thread_that_has_run_nothing() -> None:
    """As autograd's, when the op's backward pass is the first that runs in it."""
    from mhf_compiler.lowering.kernels import dispatch

    tensors = make(SHAPE._replace(d=32, E=2))
    problem = Problem(*(tensors[name] for name in NAMES))
    grad_out = torch.randn_like(problem.q)

    def backward() -> list[Tensor]:
        gradients = problem.new_gradients([x is not None for x in problem.tensors])
        dispatch.backward(problem, grad_out, gradients)
        return gradients.wanted

    expected = backward()  # loads the kernels; in the thread, that would bring a context
    with ThreadPoolExecutor(max_workers=1) as thread:
        results = thread.submit(backward).result()
    assert all(x.equal(y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    tensors = make(SHAPE._replace(B=shape[0], L=shape[1]))
    results = fused(tensors, torch.empty(*shape, 4, 128, device="cuda").bfloat16())
    assert results[0].numel() == 0
    assert all(x.eq(0).all() for x in results[1:])
