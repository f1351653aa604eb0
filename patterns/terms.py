"""Terms: what the grammar reads an output as, and how numbers, sums and biases change one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .axes import Axis, real_axes
from .canonical import Value
from .contractions import Operand
from .reasons import Declined, Kind


@dataclass(frozen=True, slots=True)
class Projection:
    """``scale * sum over contracted of query * weight + bias_scale * bias``."""

    query: Operand
    weight: Operand
    contracted: tuple[Axis, ...]
    scale: float
    bias: Operand | None
    bias_scale: float
    value: Value  # the contraction, for its dtype and source line


@dataclass(frozen=True, slots=True)
class Residual:
    """``scale * operand``, added to a finished output inside a loop over heads."""

    operand: Operand
    scale: float


@dataclass(frozen=True, slots=True)
class Term:
    """An MH-FFN as a formula over operands.

    scale * sum over hidden and sub_networks of routers * (act(gate) * up * down + bias)
        + residual
    """

    activation: str
    gate: Projection
    up: Projection | None
    down: Operand
    bias: Operand | None
    bias_scale: float
    routers: tuple[Operand, ...]
    hidden: tuple[Axis, ...]  # summed by the down projection
    sub_networks: tuple[Axis, ...]  # summed outside of it
    scale: float
    value: Value  # the down projection
    residual: Residual | None = None

    def operands(self) -> dict[str, Operand]:
        """Every tensor that the term reads, by role."""
        roles = {"query": self.gate.query, "gate": self.gate.weight, "down": self.down}
        optional = {"gate_bias": self.gate.bias, "down_bias": self.bias}
        if self.up is not None:
            roles |= {"up_query": self.up.query, "up": self.up.weight}
            optional["up_bias"] = self.up.bias
        if self.residual is not None:
            roles["residual"] = self.residual.operand
        roles |= {role: operand for role, operand in optional.items() if operand is not None}
        return roles | {f"router{i}": router for i, router in enumerate(self.routers)}

    def mapped(self, change: Callable[[str, Operand], Operand]) -> Term:
        """The same term with other operands; ``change`` receives the role of each."""

        def projection(p: Projection, query: str, role: str) -> Projection:
            return replace(
                p,
                query=change(query, p.query),
                weight=change(role, p.weight),
                bias=None if p.bias is None else change(f"{role}_bias", p.bias),
            )

        residual = self.residual
        if residual is not None:
            residual = replace(residual, operand=change("residual", residual.operand))
        return replace(
            self,
            residual=residual,
            gate=projection(self.gate, "query", "gate"),
            up=None if self.up is None else projection(self.up, "up_query", "up"),
            down=change("down", self.down),
            bias=None if self.bias is None else change("down_bias", self.bias),
            routers=tuple(change(f"router{i}", r) for i, r in enumerate(self.routers)),
        )


def multiplied_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a network's factors are multiplied."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def scaled(term: Term, factor: float) -> Term:
    """A number times the term.

    Raises:
        Declined: the dtype that the op multiplies in cannot hold the product of all factors.
    """
    residual = term.residual
    if residual is not None:
        residual = replace(residual, scale=residual.scale * factor)
    scale = term.scale * factor
    held = torch.finfo(multiplied_in(term.value.dtype))
    if not held.tiny <= abs(scale) <= held.max:  # it is rounded to zero or to infinity
        raise Declined(Kind.UNKNOWN_OPERATION, f"scaled by {scale}", term.value.origin)
    return replace(term, scale=scale, residual=residual)


def without_residual(term: Term, at: Value) -> Term:
    """A residual is added last: no router scales it, no sum goes over it, no cast follows it."""
    if term.residual is not None:
        detail = "a residual is part of what is scaled, summed or cast"
        raise Declined(Kind.UNKNOWN_OPERATION, detail, at.origin)
    return term


def summed(term: Term, axes: tuple[Axis, ...]) -> Term:
    """The sum of the term over these axes, which become sub-networks.

    Raises:
        Declined: the sum goes over a residual, or over a bias that is the same for all of them.
    """
    term = without_residual(term, term.value)
    bias = None if term.bias is None else real_axes(term.bias.index)
    if bias is not None and any(a.size != 1 and bias.isdisjoint(a.leaves()) for a in axes):
        routed = bias.union(*(real_axes(router.index) for router in term.routers))
        if not all(routed.issuperset(axis.leaves()) for axis in axes):
            raise Declined(Kind.UNSUPPORTED_LAYOUT, "a bias is summed", term.value.origin)
    return replace(term, sub_networks=(*term.sub_networks, *axes))


def adds_tokens(term: Term, added: Operand) -> bool:
    """Whether what is added is no bias but made of tokens."""
    weights = real_axes(term.gate.weight.index) | real_axes(term.down.index)
    return bool(real_axes(added.index) & real_axes(term.gate.query.index) - weights)


def may_be_bias(term: Term, added: Operand) -> bool:
    """Whether what is added moves with the weights alone, and before routers and sums."""
    weights = real_axes(term.gate.weight.index) | real_axes(term.down.index)
    first = term.bias is None and not term.routers and not term.sub_networks
    return first and real_axes(added.index) <= weights


def with_bias(term: Term, bias: Operand, scale: float, at: Value) -> Term:
    """Add a bias; it must be inside of everything that routers and sums have done to the term."""
    if not may_be_bias(term, bias):
        biased = may_be_bias(replace(term, bias=None), bias)
        added = "a second bias" if biased else "a tensor"
        raise Declined(Kind.UNKNOWN_OPERATION, f"{added} is added to the output", at.origin)
    return replace(term, bias=bias, bias_scale=scale / term.scale)
