"""The specification of the op: the mathematics in plain, differentiable PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .arguments import check_arguments
from .problem import Problem

__all__ = ["multi_head_ffn_reference"]


def multi_head_ffn_reference(
    q: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    r: Tensor | None = None,
    *,
    k_bias: Tensor | None = None,
    u_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    activation: str = "silu",
    k_scale: float = 1.0,
    u_scale: float = 1.0,
    out_scale: float = 1.0,
    out_order: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What ``mhf_compiler.multi_head_ffn`` computes, with the same arguments.

    Slow, and with every intermediate in memory, but on any device and dtype. Half precision is
    computed in float32 and rounded once, as on the CPU path.
    """
    problem = Problem(
        q, k, u, v, r, k_bias, u_bias, v_bias, activation, k_scale, u_scale, out_scale
    )
    check_arguments(problem, out_order=out_order, out_dtype=out_dtype)
    out_dtype = out_dtype or q.dtype
    compute = torch.promote_types(q.dtype, torch.float32)
    share = q.shape[2] // k.shape[0]  # heads that share one group of weights

    def per_head(weight: Tensor) -> Tensor:  # [G, ...] -> [H, ...]
        return weight.to(compute).repeat_interleave(share, dim=0)

    q = q.to(compute)
    hidden = k_scale * torch.einsum("blhd,hefd->blhef", q, per_head(k))
    if k_bias is not None:
        hidden = hidden + per_head(k_bias)
    hidden = ACTIVATIONS[activation].function(hidden)
    if u is not None:
        up = u_scale * torch.einsum("blhd,hefd->blhef", q, per_head(u))
        hidden = hidden * (up if u_bias is None else up + per_head(u_bias))
    out = torch.einsum("blhef,hefd->blhed", hidden, per_head(v))
    if v_bias is not None:
        out = out + per_head(v_bias)
    if r is not None:
        out = out * r.to(compute).unsqueeze(-1)
    out = (out_scale * out.sum(dim=3)).to(out_dtype)  # [B, L, H, d]
    order = tuple(out_order or (0, 1, 2, 3))
    inverse = [order.index(dim) for dim in range(4)]
    return out.permute(order).contiguous().permute(inverse)
