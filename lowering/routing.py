"""What a norm of the queries and the router behind it compute, of which two ops are made.

For tokens t, heads h, columns i and sub-networks e:

    q[t,h,i] = q[t,h,i] * rsqrt(mean over i of q[t,h,i]^2 + norm_eps) * norm_weight[h,i]
    x[t,h,e] = sum over i of q[t,h,i] * weight[g,i,e],  g = h // (H / G)
    r[t,h,e] = x                                                            "none"
             = sigmoid(x)                                                   "sigmoid"
             = sigmoid(x) / (max(sum over e of sigmoid(x), sum_floor) + sum_eps)  "normalised"

All of it is computed in float32, but that q is rounded to its own dtype behind the norm and, if
rounds_first, before norm_weight as well, and r to r_dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import ArgumentError
from .router import check_product

__all__ = ["MOST_WIDTH", "ROUTINGS", "Formula", "NormedRouter"]

MOST_WIDTH = 128  # of a head; beyond it one kernel is no faster than the three that it replaces
ROUTINGS = ("none", "sigmoid", "normalised")

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


class Formula(NamedTuple):
    """The constants of the definition above."""

    norm_eps: float
    rounds_first: bool
    routing: str
    sum_floor: float
    sum_eps: float
    r_dtype: torch.dtype


class NormedRouter(NamedTuple):
    """All that the definition reads beside the queries, (B, L, H, d)."""

    norm_weight: Tensor | None  # (d) or (H, d)
    weight: Tensor  # (G, d, E)
    formula: Formula

    def check(self, q: Tensor) -> None:
        """Raise ArgumentError where the ops do not take this beside such queries."""
        norm_weight, weight, formula = self
        check_product(q, weight)
        if q.shape[3] > MOST_WIDTH:
            raise ArgumentError(
                f"q has heads of width {q.shape[3]}, must have at most {MOST_WIDTH}"
            )
        if norm_weight is not None:
            allowed = (tuple(q.shape[3:]), tuple(q.shape[2:]))
            if tuple(norm_weight.shape) not in allowed:
                raise ArgumentError(
                    f"norm_weight has shape {tuple(norm_weight.shape)}, must have shape (d) or "
                    f"(H, d), here {allowed[0]} or {allowed[1]}"
                )
            if norm_weight.dtype not in _WEIGHTS:
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
        if formula.r_dtype not in _WEIGHTS:
            raise ArgumentError(
                f"r_dtype must be float32, bfloat16 or float16, got {formula.r_dtype}"
            )
