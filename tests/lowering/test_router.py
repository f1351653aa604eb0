"""The product of 16-bit queries with a router in float32: the operator, and its CPU path."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

from mhf_compiler.lowering import ArgumentError, router_product
from mhf_compiler.lowering.ops import router

OP = torch.ops.mhf_compiler.router_product.default
BACKWARD = torch.ops.mhf_compiler.router_product_backward.default
NARROW = (torch.bfloat16, torch.float16)
B, L, H, d, E = 2, 5, 4, 8, 3


def make(
    dtype: torch.dtype = torch.bfloat16, weights: torch.dtype = torch.float32, groups: int = H
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, L, H, d).to(dtype), torch.randn(groups, d, E).to(weights)


def plain(q: Tensor, weight: Tensor) -> Tensor:
    """As an author writes it."""
    weight = weight.float().repeat_interleave(q.shape[2] // weight.shape[0], 0)
    return torch.einsum("blhd,hde->blhe", q.float(), weight)


@pytest.mark.parametrize("groups", [H, 2, 1])
@pytest.mark.parametrize("weights", [torch.float32, *NARROW])
@pytest.mark.parametrize("dtype", NARROW)
def test_is_the_product_of_widened_tensors(dtype: torch.dtype, weights: torch.dtype, groups: int):
    leaves = [x.requires_grad_() for x in make(dtype, weights, groups)]
    out, expected = router_product(*leaves), plain(*leaves)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    for gradient, other, leaf in zip(found, wanted, leaves, strict=True):
        assert gradient.dtype is leaf.dtype
        torch.testing.assert_close(gradient, other)


SAMPLES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another order": {"out_order": [2, 0, 1, 3]},
    "strided": {"q": torch.randn(B, H, L, d).bfloat16().transpose(1, 2)},
    "weights by columns": {"weight": torch.randn(H, E, d).transpose(1, 2)},
    "no tokens": {"q": torch.randn(B, 0, H, d).bfloat16()},
}


@pytest.mark.parametrize("replaced", SAMPLES.values(), ids=SAMPLES)
def test_opcheck(replaced: dict[str, Any]):
    q, weight = make()
    given = {"q": q, "weight": weight, "out_order": None} | replaced
    tensors = [given[name].detach().requires_grad_() for name in ("q", "weight")]
    opcheck(OP, (*tensors, given["out_order"]))


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]], ids=str)
def test_opcheck_backward(needs: list[bool]):
    opcheck(BACKWARD, (torch.randn(B, L, H, E), *make(), needs))


@pytest.mark.parametrize("order", [None, (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
def test_out_order_chooses_the_strides_only(order: tuple[int, ...] | None):
    out = router_product(*make(), order)
    assert out.permute(order or (0, 1, 2, 3)).is_contiguous()
    torch.testing.assert_close(out, plain(*make()))


def test_blocks_of_tokens_cover_them_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router, "_TOKENS", 2)
    test_is_the_product_of_widened_tensors(torch.bfloat16, torch.float32, 2)


def test_autocast_leaves_it_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        out = router_product(*make())
    assert torch.equal(out, router_product(*make()))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"q": torch.randn(B, L, H, d)}, "q is torch.float32, must be bfloat16 or float16"),
        ({"weight": torch.randn(H, d, 33)}, "at most 32 sub-networks"),
        ({"weight": torch.randn(H, d + 1, E)}, r"must have shape \(G, d, E\)"),
        ({"weight": torch.randn(3, d, E)}, "a divisor of q's 4 heads"),
        ({"out_order": [0, 1, 2, 2]}, "must be a permutation"),
    ],
)
def test_errors_say_what_is_allowed(replaced: dict[str, Any], message: str):
    q, weight = make()
    with pytest.raises(ArgumentError, match=message):
        router_product(**({"q": q, "weight": weight} | replaced))


def test_second_derivatives_are_refused():
    q, weight = (x.requires_grad_() for x in make())
    out = router_product(q, weight)
    (gradient,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    q, weight = make()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            router_product(q, dual)
