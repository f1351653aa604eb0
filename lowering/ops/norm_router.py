"""A per-head norm of queries and the weights of their router, by one op over the queries' memory.

In inference the norm, the router's product and the activation of its logits each read or write
as much as the queries or a good part of it, and compute almost nothing. This op reads the queries
once, writes the normalised ones in their place, and returns the weights in their final dtype
(problem.py has the formula).

Models do not call it: mhf_compiler/passes/norm_router.py inserts it where a graph has all of this
and nothing else reads the values in between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import ArgumentError
from ..problem import ROUTINGS, Formula, NormedRouter
from .common import empty_like_in_order, kernels, overwrite, register, trial
from .router import WEIGHT_DTYPES, check_product, product_on_cpu

__all__ = ["MOST_HEAD_DIM", "check_normed_router", "norm_and_route_on_cpu", "trial_run"]

MOST_HEAD_DIM = 128  # of a head; beyond it the kernel is no faster than the three that it replaces


def trial_run(
    q: torch.dtype,
    heads: int,
    norm_weight: tuple[torch.dtype, tuple[int, ...]] | None,
    weight: tuple[torch.dtype, tuple[int, ...]],
    constants: tuple[Any, ...],
    device: torch.device,
) -> None:
    """Compile and run the kernel once; nothing on the CPU.

    The two weights are given by dtype and shape, and ``constants`` are what the op takes after
    them, up to ``r_dtype``.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """

    def zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def run() -> None:
        torch.ops.mhf_compiler.norm_and_route(
            zeros(q, (1, 1, heads, weight[1][1])),
            None if norm_weight is None else zeros(*norm_weight),
            zeros(*weight),
            *constants,
        )

    trial(device, run)


def check_normed_router(q: Tensor, router: NormedRouter) -> None:
    """Raise ArgumentError where the ops do not take a norm and a router of such queries."""
    norm_weight, weight, formula = router
    check_product(q, weight)
    if q.shape[3] > MOST_HEAD_DIM:
        raise ArgumentError(f"q has heads of width {q.shape[3]}, must have at most {MOST_HEAD_DIM}")
    if norm_weight is not None:
        allowed = (tuple(q.shape[3:]), tuple(q.shape[2:]))
        if tuple(norm_weight.shape) not in allowed:
            raise ArgumentError(
                f"norm_weight has shape {tuple(norm_weight.shape)}, must have shape (d) or (H, d), "
                f"here {allowed[0]} or {allowed[1]}"
            )
        if norm_weight.dtype not in WEIGHT_DTYPES:
            raise ArgumentError(
                f"norm_weight is {norm_weight.dtype}, must be float32, bfloat16 or float16"
            )
        if norm_weight.device != q.device:
            raise ArgumentError(
                f"norm_weight is on {norm_weight.device}, must be on {q.device} as q"
            )
    if formula.routing not in ROUTINGS:
        raise ArgumentError(
            f"routing must be one of {', '.join(ROUTINGS)}, got {formula.routing!r}"
        )
    if formula.r_dtype not in WEIGHT_DTYPES:
        raise ArgumentError(f"r_dtype must be float32, bfloat16 or float16, got {formula.r_dtype}")


def _check(q: Tensor, norm_weight: Tensor | None, weight: Tensor, *others: Any) -> None:
    formula, out_order = _formula(*others)
    check_normed_router(q, NormedRouter(norm_weight, weight, formula))
    check_product(q, weight, out_order)


def _norm_and_route(
    compute: Callable[[Tensor, NormedRouter, Tensor], None] | None,
    q: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    *others: Any,
) -> Tensor:
    formula, out_order = _formula(*others)
    router = NormedRouter(norm_weight, weight, formula)
    r = empty_like_in_order(q, (*q.shape[:3], weight.shape[2]), out_order, formula.r_dtype)
    if compute is not None:
        overwrite(q, (norm_weight, weight), lambda normed: compute(normed, router, r), reads=True)
    return r


def _formula(*constants: Any) -> tuple[Formula, Sequence[int] | None]:
    """The op's constants; its last argument may be missing."""
    count = len(Formula._fields)
    return Formula(*constants[:count]), next(iter(constants[count:]), None)


@torch.autocast("cpu", enabled=False)
def norm_and_route_on_cpu(q: Tensor, router: NormedRouter, r: Tensor) -> None:
    """Normalise ``q`` (B, L, H, d) where it lies, and write the weights to ``r`` (B, L, H, E)."""
    norm_weight, weight, formula = router
    x = q.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + formula.norm_eps)
    if norm_weight is not None:
        x = (x.to(q.dtype) if formula.rounds_first else x).float() * norm_weight.float()
    q.copy_(x)
    weights = q.new_empty(r.shape, dtype=torch.float32)
    product_on_cpu(q, weight, weights)
    if formula.routing != "none":
        weights = weights.sigmoid()
    if formula.routing == "normalised":
        total = weights.sum(-1, keepdim=True).clamp_min(formula.sum_floor)
        weights = weights / (total + formula.sum_eps)
    r.copy_(weights)


register(
    "norm_and_route",
    "(Tensor(a!) q, Tensor? norm_weight, Tensor weight, float norm_eps, bool rounds_first, "
    "str routing, float sum_floor, float sum_eps, ScalarType r_dtype, int[]? out_order=None) "
    "-> Tensor",
    _norm_and_route,
    check=_check,
    cpu=norm_and_route_on_cpu,
    cuda=kernels("plain.norm_router.norm_and_route"),
)
