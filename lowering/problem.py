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

__all__ = ["ROUTINGS", "Formula", "NormedRouter"]

ROUTINGS = ("none", "sigmoid", "normalised")


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
