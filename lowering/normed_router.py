"""A per-head norm of queries and the weights of their router, by one op over the queries' memory.

In inference the norm, the router's product and what makes weights of its logits each read or write
as much as the queries or a good part of it, and compute almost nothing. This op reads the queries
once, writes the normalised ones in their place, and returns the weights in their final dtype.

Nothing calls it by itself: mhf_compiler/norming.py puts it where a graph has all of this and nobody
else reads what lies in between. It rounds where the graph does: the norm computes in float32 and
rounds to the queries' dtype, before its weight or behind it, and the product reads what was
rounded.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import ArgumentError
from .op import empty_like_in_order
from .overwriting import ours_alone
from .router import check_product, product_on_cpu

__all__ = ["MOST_WIDTH", "ROUTINGS", "trial_run"]

_NAME = "mhf_compiler::norm_and_route"
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)

MOST_WIDTH = 128  # of a head; beyond it the kernel is no faster than the three that it replaces
ROUTINGS = ("none", "sigmoid", "normalised")


class Formula(NamedTuple):
    """The constants of the definition below."""

    norm_eps: float
    rounds_first: bool
    routing: str
    sum_floor: float
    sum_eps: float


# In the terms of the arguments, for tokens t, heads h, columns i and sub-networks e:
#
#     q[t,h,i] = q[t,h,i] * rsqrt(mean over i of q[t,h,i]^2 + norm_eps) * norm_weight[h,i]
#     x[t,h,e] = sum over i of q[t,h,i] * weight[g,i,e]
#     r[t,h,e] = x                                                            "none"
#              = sigmoid(x)                                                   "sigmoid"
#              = sigmoid(x) / (max(sum over e of sigmoid(x), sum_floor) + sum_eps)  "normalised"
#
# all of it in float32, but that q is rounded to its own dtype behind the norm and, if rounds_first,
# before norm_weight as well, and r to r_dtype.
torch.library.define(
    _NAME,
    "(Tensor(a!) q, Tensor? norm_weight, Tensor weight, float norm_eps, bool rounds_first, "
    "str routing, float sum_floor, float sum_eps, ScalarType r_dtype, int[]? out_order=None) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def trial_run(
    q: torch.dtype,
    heads: int,
    norm_weight: tuple[torch.dtype, tuple[int, ...]] | None,
    weight: tuple[torch.dtype, tuple[int, ...]],
    constants: tuple[Any, ...],
    device: torch.device,
) -> None:
    """Compile and run the kernel once; nothing on the CPU.

    The two weights are given by dtype and shape, and ``constants`` are what the op takes behind
    them, up to ``r_dtype``.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """
    if device.type == "cpu":
        return

    def zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    with torch.no_grad():
        torch.ops.mhf_compiler.norm_and_route(
            zeros(q, (1, 1, heads, weight[1][1])),
            None if norm_weight is None else zeros(*norm_weight),
            zeros(*weight),
            *constants,
        )
    torch.cuda.synchronize(device)


def _check(
    q: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    routing: str,
    r_dtype: torch.dtype,
    out_order: Sequence[int] | None,
) -> None:
    check_product(q, weight, out_order)
    if q.shape[3] > MOST_WIDTH:
        raise ArgumentError(f"q has heads of width {q.shape[3]}, must have at most {MOST_WIDTH}")
    if norm_weight is not None:
        allowed = (tuple(q.shape[3:]), tuple(q.shape[2:]))
        if tuple(norm_weight.shape) not in allowed:
            raise ArgumentError(
                f"norm_weight has shape {tuple(norm_weight.shape)}, must have shape (d) or (H, d), "
                f"here {allowed[0]} or {allowed[1]}"
            )
        if norm_weight.dtype not in _WEIGHTS:
            raise ArgumentError(
                f"norm_weight is {norm_weight.dtype}, must be float32, bfloat16 or float16"
            )
        if norm_weight.device != q.device:
            raise ArgumentError(
                f"norm_weight is on {norm_weight.device}, must be on {q.device} as q"
            )
    if routing not in ROUTINGS:
        raise ArgumentError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    if r_dtype not in _WEIGHTS:
        raise ArgumentError(f"r_dtype must be float32, bfloat16 or float16, got {r_dtype}")


def _operator(compute: Callable[..., None] | None) -> Callable[..., Tensor]:
    """The operator on one device, whose arithmetic is ``compute`` (none: shapes only).

    ``compute`` writes to queries that lie alone, and to the weights of their router.
    """

    def norm_and_route_on_device(
        q: Tensor,
        norm_weight: Tensor | None,
        weight: Tensor,
        norm_eps: float,
        rounds_first: bool,
        routing: str,
        sum_floor: float,
        sum_eps: float,
        r_dtype: torch.dtype,
        out_order: Sequence[int] | None = None,
    ) -> Tensor:
        _check(q, norm_weight, weight, routing, r_dtype, out_order)
        r = empty_like_in_order(q, (*q.shape[:3], weight.shape[2]), out_order, r_dtype)
        if compute is None:
            return r
        safe = ours_alone(q, (norm_weight, weight))
        # A tensor of its own in either case: launches are repeated by which tensor goes where.
        normed = q.detach() if safe else q.clone()
        formula = Formula(norm_eps, rounds_first, routing, sum_floor, sum_eps)
        compute(normed, norm_weight, weight, r, formula)
        if not safe:
            q.copy_(normed)
        return r

    return norm_and_route_on_device


@torch.autocast("cpu", enabled=False)
def _compute_on_cpu(
    q: Tensor, norm_weight: Tensor | None, weight: Tensor, r: Tensor, formula: Formula
) -> None:
    x = q.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + formula.norm_eps)
    if norm_weight is not None:
        x = (x.to(q.dtype) if formula.rounds_first else x).float() * norm_weight.float()
    q.copy_(x)
    weights = product_on_cpu(q, weight)
    if formula.routing != "none":
        weights = weights.sigmoid()
    if formula.routing == "normalised":
        total = weights.sum(-1, keepdim=True).clamp_min(formula.sum_floor)
        weights = weights / (total + formula.sum_eps)
    r.copy_(weights)


def _compute_on_cuda(
    q: Tensor, norm_weight: Tensor | None, weight: Tensor, r: Tensor, formula: Formula
) -> None:
    # Triton's kernels, imported by the first call.
    from .kernels.normed_router import norm_and_route

    norm_and_route(q, norm_weight, weight, r, formula)


torch.library.impl(_NAME, "cpu", _operator(_compute_on_cpu))
torch.library.impl(_NAME, "cuda", _operator(_compute_on_cuda))
torch.library.register_fake(_NAME, _operator(None))
