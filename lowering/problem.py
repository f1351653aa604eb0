"""The ops' arguments as values: one problem, its gradients, and the norm and router before it.

For tokens t, heads h, columns i and sub-networks e, a norm of the queries and their router compute

    q[t,h,i] = q[t,h,i] * rsqrt(mean over i of q[t,h,i]^2 + norm_eps) * norm_weight[h,i]
    x[t,h,e] = sum over i of q[t,h,i] * weight[g,i,e],  g = h // (H / G)
    r[t,h,e] = x                                                            "none"
             = sigmoid(x)                                                   "sigmoid"
             = sigmoid(x) / (max(sum over e of sigmoid(x), sum_floor) + sum_eps)  "normalised"

in float32. q is rounded to its own dtype after the norm and, if rounds_first, before norm_weight as
well; r is rounded to r_dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .device import capability, interpreted
from .tiles import Sizes

__all__ = ["ROUTINGS", "Formula", "Gradients", "NormedRouter", "Problem"]

_TENSORS = 8

ROUTINGS = ("none", "sigmoid", "normalised")


class Problem(NamedTuple):
    """The op's arguments up to `out_scale`, in the order and under the names of its schema."""

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (G, E, f, d)
    u: Tensor | None  # (G, E, f, d)
    v: Tensor  # (G, E, f, d)
    r: Tensor | None = None  # (B, L, H, E)
    k_bias: Tensor | None = None  # (G, E, f)
    u_bias: Tensor | None = None  # (G, E, f)
    v_bias: Tensor | None = None  # (G, E, d)
    activation: str = "silu"
    k_scale: float = 1.0
    u_scale: float = 1.0
    out_scale: float = 1.0

    @classmethod
    def split(cls, arguments: Sequence[Any]) -> tuple[Problem, Sequence[Any]]:
        """The problem that an op's arguments begin with, and the arguments after it."""
        return cls(*arguments[: len(cls._fields)]), arguments[len(cls._fields) :]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensor arguments in the order of the schema, from ``q`` on; None for absent ones."""
        return cast("tuple[Tensor | None, ...]", self[:_TENSORS])

    @property
    def constants(self) -> tuple[str, float, float, float]:
        """Activation, ``k_scale``, ``u_scale`` and ``out_scale``."""
        return cast("tuple[str, float, float, float]", self[_TENSORS:])

    @property
    def named_tensors(self) -> dict[str, Tensor | None]:
        """The tensor arguments by name."""
        return dict(zip(self._fields, self.tensors, strict=False))

    @property
    def sizes(self) -> Sizes:
        """The sizes that select a kernel."""
        batch, length, heads, head_dim = self.q.shape
        groups, sub_networks, hidden, _ = self.k.shape
        return Sizes(
            tokens=batch * length,
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            sub_networks=sub_networks,
            hidden=hidden,
            gated=self.u is not None,
            routed=self.r is not None,
            biased=(self.k_bias is not None, self.u_bias is not None, self.v_bias is not None),
            dtype=self.q.dtype,
            capability=capability(self.q.device),
            interpreted=interpreted(),
        )

    def new_gradients(self, needs: Sequence[bool], q: Tensor | None = None) -> Gradients:
        """New memory for the gradients of the flagged tensors; that of `q` may be given."""
        places = [
            torch.empty_like(x) if needed and x is not None else None
            for x, needed in zip(self.tensors[1:], needs[1:], strict=True)
        ]
        if needs[0] and q is None:
            q = torch.empty_like(self.q)
        return Gradients(q, *places)


class Gradients(NamedTuple):
    """Where the gradients of a problem's tensors go; None for one that is not wanted."""

    q: Tensor | None = None
    k: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    r: Tensor | None = None
    k_bias: Tensor | None = None
    u_bias: Tensor | None = None
    v_bias: Tensor | None = None

    @property
    def wanted(self) -> list[Tensor]:
        """The gradients that are computed, in the order of the fields."""
        return [x for x in self if x is not None]


class Formula(NamedTuple):
    """The constants of a norm and a router, as defined at the top of this file."""

    norm_eps: float
    rounds_first: bool
    routing: str
    sum_floor: float
    sum_eps: float
    r_dtype: torch.dtype


class NormedRouter(NamedTuple):
    """All that a norm and a router read in addition to the queries, (B, L, H, d)."""

    norm_weight: Tensor | None  # (d) or (H, d)
    weight: Tensor  # (G, d, E)
    formula: Formula
