"""The product of 16-bit queries with a router in float32, on a GPU.

An error is relative to float64; the result's may be twice that of float32's own product, and a
gradient's that of the plain spelling.
"""

import pytest
import torch
from torch import Tensor

from mhf_compiler.lowering import router_product

pytestmark = pytest.mark.gpu

NARROW = (torch.bfloat16, torch.float16)


def make(
    shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype, groups: int
) -> list[Tensor]:
    b, length, heads, width, networks = shape
    torch.manual_seed(0)
    q = torch.randn(b, length, heads, width, device="cuda").to(dtype)
    weight = torch.randn(groups, width, networks, device="cuda") / width**0.5
    return [q, weight.to(weights)]


def spell(q: Tensor, weight: Tensor, compute: torch.dtype) -> Tensor:
    weight = weight.to(compute).repeat_interleave(q.shape[2] // weight.shape[0], 0)
    return torch.einsum("blhd,hde->blhe", q.to(compute), weight)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 333, 4, 128, 22), 4),
        ((2, 333, 4, 128, 22), 1),
        ((8, 1, 16, 96, 8), 16),
        ((1, 4097, 2, 256, 32), 2),
        ((3, 70, 6, 24, 1), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [torch.float32, *NARROW])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("by_heads", [False, True])
def test_matches(
    shape: tuple[int, ...], groups: int, weights: torch.dtype, dtype: torch.dtype, by_heads: bool
):
    leaves = [x.requires_grad_() for x in make(shape, dtype, weights, groups)]
    order = (2, 0, 1, 3) if by_heads else None
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.random.fork_rng(["cuda"]):
        grad = torch.randn(*shape[:3], shape[4], device="cuda")
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        out = router_product(*leaves, order)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    finally:
        torch.use_deterministic_algorithms(False)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = spell(*wide, torch.float64)
    exacts = [exact.detach(), *torch.autograd.grad(exact, wide, grad.double())]
    own = spell(*leaves, torch.float32)
    owns = [own.detach(), *torch.autograd.grad(own, leaves, grad)]
    for name, x, reference, other in zip(("out", "dq", "dw"), found, exacts, owns, strict=True):
        assert x.dtype is other.dtype
        assert error(x, reference) <= 2 * error(other, reference) + 1e-7, name


@pytest.mark.parametrize("shape", [(2, 333, 4, 128, 22), (1, 4097, 2, 256, 32), (3, 70, 6, 24, 1)])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_gradient_is_added_to_what_is_there(shape: tuple[int, ...], dtype: torch.dtype):
    q, weight = make(shape, dtype, torch.float32, shape[2])
    grad, there = torch.randn(*shape[:3], shape[4], device="cuda"), torch.randn_like(q)
    onto = there.clone()
    op = torch.ops.mhf_compiler.router_product_backward_onto
    dw = op(onto, grad, q, weight, True)
    wide = [x.double().requires_grad_() for x in (q, weight)]
    part, exact_dw = torch.autograd.grad(spell(*wide, torch.float64), wide, grad.double())
    exact = there.double() + part
    assert error(onto, exact) <= 1.1 * error(exact.to(dtype), exact) + 1e-7
    (own_dw,) = torch.ops.mhf_compiler.router_product_backward(grad, q, weight, [False, True])
    assert dw.equal(own_dw)
    assert error(dw, exact_dw) <= 1e-5


def test_the_same_bits_each_time():
    leaves = [x.requires_grad_() for x in make((4, 2000, 4, 128, 22), *NARROW[:1] * 2, 4)]
    results = []
    for _ in range(3):
        out = router_product(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("trains", [False, True])
def test_no_float32_copy_of_the_queries(trains: bool):
    leaves = make((8, 4096, 4, 128, 8), torch.bfloat16, torch.float32, 4)
    q = leaves[0]
    for _ in range(2):  # the first loads the kernels
        given = [x.detach().requires_grad_(trains) for x in leaves]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = router_product(*given)
        if trains:
            out.backward(torch.ones_like(out))
        used = torch.cuda.max_memory_allocated() - before
    logits = out.nbytes * (2 if trains else 1)
    assert used < logits + (q.nbytes if trains else 0) + q.nbytes / 2
