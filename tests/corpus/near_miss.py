"""Models that look like multi-head FFNs and are none, or must be left alone: one trap each.

A trap that may be rewritten by a cleverer proof is marked ``either``; there only results count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhf_compiler.patterns import Kind

from .cases import TOKENS, B, Corpus, E, H, L, PerHead, SubNetworks, d, f, split_heads, weight

NEAR_MISSES = Corpus()
declined, either = NEAR_MISSES.declined, NEAR_MISSES.either


def project(q: Tensor, w: Tensor) -> Tensor:
    """Each head by its own matrix."""
    return torch.einsum("blhi,hio->blho", q, w)


def swiglu(q: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return project(F.silu(project(q, gate)) * project(q, up), down)


@declined(Kind.ADDED_PROJECTIONS)
class LoraBesideTheGate(PerHead):
    """A product of two narrow matrices is added to the gate, and not to its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = weight(H, d, 2), weight(H, 2, f)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = project(q, self.gate) + project(project(q, self.narrow), self.wide)
        return project(F.silu(gate) * project(q, self.up), self.down)


@declined(Kind.ADDED_PROJECTIONS)
class LoraBesideTheDownProjection(PerHead):
    """The hidden units are multiplied by two narrow matrices as well, and both results added."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = weight(H, f, 2), weight(H, 2, d)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(hidden, self.down) + project(project(hidden, self.narrow), self.wide) / 2


@declined(Kind.ADDED_PROJECTIONS)
class LoraInALoop(PerHead):
    """The same for each head by itself, scaled before it is added, with the adapter first."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = weight(H, f, 2), weight(H, 2, d)

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for h, q in enumerate(split_heads(x).unbind(2)):
            hidden = F.silu(q @ self.gate[h]) * (q @ self.up[h])
            heads.append(0.5 * (hidden @ self.narrow[h] @ self.wide[h]) + hidden @ self.down[h])
        return torch.cat(heads, -1)


@declined(Kind.UNSUPPORTED_PROBLEM, shapes=((B, 0, H * d),))
class NoTokens(PerHead):
    """A sequence of no tokens: nothing is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(split_heads(x), self.gate, self.up, self.down)


@declined(Kind.UNEQUAL_HEADS)
class UnequalLengths(PerHead):
    """Each head has another number of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        heads = [q[:, : h + 1, h] for h in range(H)]
        weights = zip(heads, self.gate, self.up, self.down, strict=True)
        return torch.cat([(F.silu(q @ g) * (q @ u)) @ v for q, g, u, v in weights], dim=1)


# Sums of sub-networks.


@declined(Kind.PLAIN_FFN, Kind.ESCAPING_INTERMEDIATE)
class SumBeforeTheLastIsReturned(SubNetworks):
    """One head; each product is added to the sum, and one of the sums is read elsewhere, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = x[..., :d].flatten(0, 1)
        hidden = [F.silu(q @ self.gate[0, e]) * (q @ self.up[0, e]) for e in range(2)]
        first = torch.mm(hidden[0], self.down[0, 0])
        return first, torch.addmm(first, hidden[1], self.down[0, 1])


@declined(Kind.ROUNDING_CAST, dtype=torch.float16)
class BiasThatAddcmulMultiplies(PerHead):
    """The bias of the gate is a product that only their sum rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = weight(H, f), weight(H, f)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.addcmul(project(q, self.gate), self.one, self.other)
        return project(F.silu(gate) * project(q, self.up), self.down)


@declined(Kind.UNKNOWN_OPERATION, shapes=((B * L, d),))
class NormAfterResidualInsideVmap(PerHead):
    """Inside ``vmap`` each head adds what it reads, and normalises the sum."""

    def forward(self, x: Tensor) -> Tensor:
        def head(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return F.rms_norm(x + (F.silu(x @ gate) * (x @ up)) @ down, (d,))

        return torch.vmap(head)(self.gate, self.up, self.down)


@declined(Kind.UNKNOWN_OPERATION, shapes=((B * L, d),))
class ResidualOfAnotherDtypeInsideVmap(PerHead):
    """The residual has more digits than the outputs that it is added to."""

    def forward(self, x: Tensor) -> Tensor:
        def head(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return x.double() + (F.silu(x @ gate) * (x @ up)) @ down

        return torch.vmap(head)(self.gate, self.up, self.down)


@declined(Kind.UNKNOWN_OPERATION)
@declined(Kind.UNKNOWN_OPERATION, label="where", arguments={"how": "where"})
@declined(Kind.UNKNOWN_OPERATION, label="nansum", arguments={"how": "nansum"})
@declined(Kind.UNKNOWN_OPERATION, label="maximum", arguments={"how": "maximum"})
@declined(Kind.UNKNOWN_OPERATION, label="masked", arguments={"how": "masked"})
@declined(Kind.UNSUPPORTED_DTYPE, label="bool", arguments={"how": "bool"})
class SumThatIsNone(SubNetworks):
    """What is done to the outputs of all sub-networks before, or instead of, their sum."""

    def __init__(self, how: str = "division") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hedf->blhef", q, w) for w in (self.gate, self.up))
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        r = self.router(q)[..., None]
        if self.how == "maximum":
            return y.amax(3)
        if self.how == "nansum":
            return (y * r).nansum(3)
        if self.how == "masked":
            return y.masked_fill(r > 0.5, 0.0).sum(3)
        if self.how == "bool":
            return (y * (r > 0.5)).sum(3)
        if self.how == "where":
            return torch.where(r > 0.5, y, 0.0).sum(3)
        return (y / r).sum(3)


# What no node holds, as inside ``vmap``, is computed again: under the modes it had, or not at all.


class QueryInsideVmap(nn.Module):
    """The queries of a head are projected inside ``vmap``, under modes of their own."""

    modes: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__()
        self.project, self.gate, self.down = weight(H, d, d), weight(H, d, f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        def head(project: Tensor, gate: Tensor, down: Tensor) -> Tensor:
            with type(self).modes():
                q = x @ project
            return F.relu(q @ gate) @ down

        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.vmap(head)(self.project, self.gate, self.down)


@declined(Kind.AUTOCAST_BOUNDARY, shapes=((B * L, d),), precision=torch.bfloat16)
class QueryWithoutAutocastInsideVmap(QueryInsideVmap):
    """In float32 here; where the op stands autocast is on."""

    modes = partial(torch.autocast, "cpu", enabled=False)


@declined(Kind.GRADIENTS_CUT, shapes=((B * L, d),), precision=torch.bfloat16)
class QueryWithoutGradientsInsideVmap(QueryInsideVmap):
    """Their projection is not trained."""

    modes = torch.no_grad


# The query.


@declined(Kind.DIFFERENT_QUERIES)
class DifferentQueries(PerHead):
    """The up projection reads the normalised input, the gate projection the input itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, normalised = split_heads(x), split_heads(F.layer_norm(x, (H * d,)))
        return project(F.silu(project(q, self.gate)) * project(normalised, self.up), self.down)


@declined(Kind.DIFFERENT_QUERIES)
class ShiftedQuery(PerHead):
    """The up projection reads the token before."""

    def forward(self, x: Tensor) -> Tensor:
        q, now, before = split_heads(x), slice(1, None), slice(None, -1)
        hidden = F.silu(project(q[:, now], self.gate)) * project(q[:, before], self.up)
        return project(hidden, self.down)


@declined(Kind.DIFFERENT_QUERIES)
class OtherHeadsQuery(PerHead):
    """The up projection of a head reads the next head's query."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(F.silu(project(q, self.gate)) * project(q.roll(1, 2), self.up), self.down)


@declined(Kind.DIFFERENT_QUERIES, label="tokens", arguments={"dim": 1})
@declined(Kind.DIFFERENT_QUERIES, label="heads", arguments={"dim": 2})
class RepeatedInTwoOrders(PerHead):
    """One branch reads the queries as [0, 1, 0, 1], the other one as [0, 0, 1, 1]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).narrow(self.dim, 0, 2)
        times = [2 if dim == self.dim else 1 for dim in range(4)]
        gate, up = project(q.repeat(times), self.gate), self.up
        return project(F.silu(gate) * project(q.repeat_interleave(2, self.dim), up), self.down)


@declined(Kind.DIFFERENT_QUERIES)
class RepeatedInOneBranch(PerHead):
    """One branch reads the first two heads twice, the other one all heads."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = project(q[:, :, :2].repeat(1, 1, 2, 1), self.gate)
        return project(F.silu(gate) * project(q, self.up), self.down)


@declined(Kind.DIFFERENT_QUERIES)
class RepeatedWithoutGradient(PerHead):
    """No gradient flows back through the up projection, which reads equal queries."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        with torch.no_grad():
            without = q.repeat(1, 2, 1, 1)
        gate = project(q.repeat(1, 2, 1, 1), self.gate)
        return project(F.silu(gate) * project(without, self.up), self.down)


@declined(Kind.NOT_A_PRODUCT)
class RepeatedHiddenUnits(PerHead):
    """The hidden units are repeated between the products: each is computed once."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(hidden.repeat(1, 2, 1, 1), self.down)


@declined(Kind.NOT_A_PRODUCT)
class RepeatedGate(PerHead):
    """The gate is repeated after its projection, the up projection reads repeated queries."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = F.silu(project(q, self.gate)).repeat(1, 2, 1, 1)
        return project(gate * project(q.repeat_interleave(2, 1), self.up), self.down)


@declined(Kind.DIFFERENT_QUERIES, label="parts", arguments={"conjugates": False})
@declined(Kind.DIFFERENT_QUERIES, label="conjugates", arguments={"conjugates": True})
class TwoPartsOfComplexNumbers(PerHead):
    """The gate reads the real or imaginary part of what the up projection reads another part of."""

    def __init__(self, conjugates: bool) -> None:
        super().__init__()
        self.conjugates = conjugates

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.fft.fft(split_heads(x))
        other = numbers.conj().imag if self.conjugates else numbers.real
        gate, up = project(numbers.imag, self.gate), project(other, self.up)
        return project(F.silu(gate) * up, self.down)


@declined(Kind.DIFFERENT_QUERIES, random=True)
class DroppedOutTwice(PerHead):
    """Each branch reads the query through a dropout of its own."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (project(split_heads(F.dropout(x, 0.5)), w) for w in (self.gate, self.up))
        return project(F.silu(gate) * up, self.down)


@declined(Kind.DIFFERENT_QUERIES)
class DetachedUpQuery(PerHead):
    """No gradient flows back through the up projection."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(F.silu(project(q, self.gate)) * project(q.detach(), self.up), self.down)


@declined(Kind.GRADIENTS_CUT)
class GateWithoutGradients(PerHead):
    """The gate projection is computed under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        with torch.no_grad():
            gate = F.silu(project(q, self.gate))
        return project(gate * project(q, self.up), self.down)


@declined(Kind.DIFFERENT_QUERIES, gradients=False)
class QueryOverwrittenBetween(PerHead):
    """The query is overwritten after the gate projection and before the up projection."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).clone()
        gate = project(q, self.gate)
        q.mul_(0.5)
        return project(F.silu(gate) * project(q, self.up), self.down)


@declined(Kind.DIFFERENT_QUERIES, gradients=False)
class QueryOverwrittenThroughView(PerHead):
    """The query is overwritten in between through another view of its memory."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).clone()
        first = q.flatten(2)[..., 0]
        gate = project(q, self.gate)
        first.zero_()
        return project(F.silu(gate) * project(q, self.up), self.down)


@declined(Kind.MUTATION, gradients=False)
class QueryOverwrittenBeforeDown(PerHead):
    """The query is gone by the time the output is computed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(x).sigmoid()
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        q = q.detach()
        q.zero_()
        return project(hidden, self.down), q


@either(gradients=False)
class QueryOverwrittenAfterwards(PerHead):
    """The query is overwritten when everything has been computed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(x).detach().clone()
        out = swiglu(q, self.gate, self.up, self.down)
        result = out * 2.0
        q.zero_()
        return result, q


# The weights.


@declined(Kind.TOKEN_DEPENDENT_WEIGHTS, shapes=(TOKENS, (B, H, d, f), (B, H, d, f), (B, H, f, d)))
class WeightsForEachSequence(nn.Module):
    """Every sequence of the batch has weights of its own."""

    def forward(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        return (F.silu(q @ gate) * (q @ up)) @ down


@declined(Kind.TOKEN_DEPENDENT_WEIGHTS)
class FastWeights(PerHead):
    """The weights have been changed by the tokens, as in test-time training."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = self.gate - 0.1 * torch.einsum("blhd,blhf->hdf", q, project(q, self.gate))
        return swiglu(q, gate, self.up, self.down)


@declined(Kind.TOKEN_DEPENDENT_WEIGHTS)
class AllWeightsOfTokens(PerHead):
    """Every weight is changed by the tokens that the queries are made of, too."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(F.layer_norm(x, (H * d,)))
        change = split_heads(x).mean((0, 1))[..., None]
        gate, up, down = self.gate + change, self.up - change, self.down * change.mT
        return swiglu(q, gate, up, down)


@declined(Kind.MUTATION, gradients=False)
class WeightOverwrittenBeforeDown(nn.Module):
    """A weight is updated between its use and the down projection."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", weight(H, d, f).detach())
        self.up, self.down = weight(H, d, f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        self.gate.mul_(0.5)
        return project(hidden, self.down)


@either()
class UnitsReversed(PerHead):
    """The hidden units of the up projection are multiplied in reverse order."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        up = project(q, self.up).flip(-1)
        return project(F.silu(project(q, self.gate)) * up, self.down)


@declined(Kind.IRREGULAR_WEIGHTS)
class WeightsAtIrregularDistances(nn.Module):
    """The heads' weights lie in one tensor, with a hole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (weight(d, 6 * f), weight(d, 6 * f), weight(6 * f, d))

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for q, at in zip(x.chunk(H, -1), (0, 1, 3, 5), strict=True):
            own = slice(at * f, (at + 1) * f)
            hidden = F.silu(q @ self.gate[:, own]) * (q @ self.up[:, own])
            heads.append(hidden @ self.down[own])
        return torch.cat(heads, -1)


@either(shapes=((B, L, 3 * 4 + d),))
class HeadsOverlap(PerHead):
    """Neighbouring heads read half of each other's features."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x.unfold(-1, d, 4), self.gate, self.up, self.down)


@declined(Kind.UNKNOWN_ACTIVATION)
class GateIsUp(PerHead):
    """Gate and up projection are one."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = project(split_heads(x), self.gate)
        return project(F.silu(hidden) * hidden, self.down)


@declined(Kind.UNKNOWN_OPERATION, shapes=((B, H * d, L),))
class WideConvolution(nn.Module):
    """The gate projection sees the neighbouring tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv1d(H * d, H * f, 3, groups=H, padding=1)
        self.up = nn.Conv1d(H * d, H * f, 1, groups=H)
        self.down = nn.Conv1d(H * f, H * d, 1, groups=H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# The activation and what it is combined with.


class Activation(PerHead):
    """Another activation than the op's, or one of them in disguise."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(self.act(project(q, self.gate)) * project(q, self.up), self.down)


OTHER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu plus one": lambda x: F.silu(x) + 1,
    "shifted silu": lambda x: F.silu(x + 1),
    "relu but for its slope at 0": lambda x: x.clamp(min=0),
    "clamped silu": lambda x: F.silu(x).clamp(max=1.0),
    "silu of clamped": lambda x: F.silu(x.clamp(-7.0, 7.0)),
    "sigmoid with another base": lambda x: x / (1 + torch.exp2(-x)),
    "relu cubed": lambda x: F.relu(x) ** 3,
    "signed square": lambda x: x * x.abs(),
    "threshold": lambda x: torch.where(x > 0.1, x, 0.0),
    "leaky relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "relu6": F.relu6,
}
for name, function in OTHER_ACTIVATIONS.items():
    declined(Kind.UNKNOWN_ACTIVATION, label=name, arguments={"act": function})(Activation)

#: rounding in float32; in float64 a hundred million times that
SHORTENED: dict[str, Callable[[Tensor], Tensor]] = {
    "six digits": lambda x: 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * x**3))),
    "ten digits": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
}
for name, function in SHORTENED.items():
    declined(
        Kind.UNKNOWN_ACTIVATION,
        label=f"constant of {name} in float64",
        arguments={"act": function},
        dtype=torch.float64,
    )(Activation)

EQUAL_TO_SCALED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu with a short constant": lambda x: 0.5 * x * (1 + torch.erf(x * 0.707)),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "twice relu of half": lambda x: 2 * F.relu(x / 2),
    "twice gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
    "negated silu": lambda x: F.silu(-x),
    "relu of negated": lambda x: x - F.relu(x),
    "product with relu": lambda x: x * F.relu(x),
    "nothing": lambda x: 0.0 * F.silu(x),
}
for name, function in EQUAL_TO_SCALED.items():
    either(label=name, arguments={"act": function})(Activation)


@declined(Kind.UNKNOWN_OPERATION)
class RoundedHidden(PerHead):
    """The hidden units are rounded down by a division."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(torch.div(hidden, 0.5, rounding_mode="floor"), self.down)


@declined(Kind.NOT_A_PRODUCT)
class UpActivatedToo(PerHead):
    """Both branches go through an activation."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(F.silu(project(q, self.gate)) * F.relu(project(q, self.up)), self.down)


@declined(Kind.NOT_A_PRODUCT)
class ActivationAfterProduct(PerHead):
    """The product goes through the activation."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(F.silu(project(q, self.gate) * project(q, self.up)), self.down)


@declined(Kind.NOT_A_PRODUCT)
class SumOfBranches(PerHead):
    """The branches are added, not multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(F.silu(project(q, self.gate)) + project(q, self.up), self.down)


@declined(Kind.NOT_A_PRODUCT)
class ThreeBranches(PerHead):
    """A second gate."""

    def __init__(self) -> None:
        super().__init__()
        self.second = weight(H, d, f)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up, second = (project(q, w) for w in (self.gate, self.up, self.second))
        return project(F.silu(gate) * up * second, self.down)


@declined()
class Bilinear(PerHead):
    """A product without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(project(q, self.gate) * project(q, self.up), self.down)


@either(shapes=(TOKENS, (B, L, H, f)))
class FactorForEachUnit(PerHead):
    """A given factor for every hidden unit of every token."""

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(hidden * factor, self.down)


@either()
class LearnedFactorForEachUnit(PerHead):
    """A learned factor for every hidden unit."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = weight(f)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(hidden * self.factor, self.down)


@declined(Kind.UNKNOWN_ACTIVATION)
class FactorInsideActivation(PerHead):
    """A temperature for each head inside the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = weight(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = F.silu(project(q, self.gate) * self.temperature)
        return project(gate * project(q, self.up), self.down)


@declined(Kind.TOKEN_DEPENDENT_WEIGHTS, shapes=(TOKENS, (B, L, 1, f)))
class BiasForEachToken(PerHead):
    """A bias that differs from token to token, as a conditioning vector does."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        q = split_heads(x)
        gate = F.silu(project(q, self.gate) + condition)
        return project(gate * project(q, self.up), self.down)


# Routers.


@either()
class LargestOfSubNetworks(SubNetworks):
    """The largest output of the sub-networks, feature by feature."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        return torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down).amax(3)


@either()
class RouterForEachFeature(SubNetworks):
    """A router weight for every output feature."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return (y * torch.einsum("blhd,hed->blhed", q, self.route).sigmoid()).sum(3)


@either()
class RouterFromOutput(SubNetworks):
    """The outputs themselves say how much each of them counts."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return (y * y.mean(-1, keepdim=True).softmax(3)).sum(3)


@either(label="reversed", arguments={"order": (2, 1, 0)})
@either(label="shuffled", arguments={"order": (1, 2, 0)})
@either(label="one for all", arguments={"order": (1, 1, 1)})
class RouterInAnotherOrder(SubNetworks):
    """Sub-network e is weighted by another one's router weight."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        r, out = self.router(q), torch.zeros_like(q)
        for e, at in enumerate(self.order):
            out += r[..., at, None] * swiglu(q, self.gate[:, e], self.up[:, e], self.down[:, e])
        return out


@either(label="signs", arguments={"signs": (1.0, -1.0, 1.0)})
@either(label="scales", arguments={"signs": (1.0, 0.5, 0.25)})
@either(label="zero", arguments={"signs": (1.0, 0.0, 1.0)})
class UnequalScales(SubNetworks):
    """Sub-networks are added up with different constant weights."""

    def __init__(self, signs: tuple[float, ...]) -> None:
        super().__init__()
        self.signs = signs

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = torch.zeros_like(q)
        for e, sign in enumerate(self.signs):
            out = out + sign * swiglu(q, self.gate[:, e], self.up[:, e], self.down[:, e])
        return out


@either()
class MixedActivations(SubNetworks):
    """Sub-networks with an activation each."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = torch.zeros_like(q)
        for e, act in enumerate((F.silu, F.gelu, torch.tanh)):
            hidden = act(project(q, self.gate[:, e])) * project(q, self.up[:, e])
            out = out + project(hidden, self.down[:, e])
        return out


# Heads.


class _Head(nn.Module):
    def __init__(
        self, inner: int = d, hidden: int = f, act: Callable[..., Tensor] = F.silu
    ) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(inner, hidden), nn.Linear(inner, hidden)
        self.down, self.act = nn.Linear(hidden, inner), act

    def forward(self, q: Tensor) -> Tensor:
        return self.down(self.act(self.gate(q)) * self.up(q))


class UnequalHeads(nn.Module):
    """A list of heads that are not alike."""

    def __init__(self, heads: list[dict[str, Any]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(**head) for head in heads)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([head.gate.in_features for head in self.heads], -1)
        return torch.cat([head(q) for head, q in zip(self.heads, parts, strict=True)], -1)


UNEQUAL_HEADS: dict[str, list[dict[str, Any]]] = {
    "hidden units": [{"hidden": units} for units in (3, 4, 5, 6)],
    "widths": [{"inner": width} for width in (4, 12, 8, 8)],
    "activations": [{"act": act} for act in (F.silu, F.gelu, F.relu, F.silu)],
}
for name, heads in UNEQUAL_HEADS.items():
    declined(Kind.UNEQUAL_HEADS, label=name, arguments={"heads": heads})(UnequalHeads)


@either(label="swapped", arguments={"order": (1, 0, 3, 2)})
@either(label="reversed", arguments={"order": (3, 2, 1, 0)})
@either(label="repeated", arguments={"order": (0, 0, 1, 1)})
class HeadsInAnotherOrder(nn.Module):
    """Heads are merged in another order than they were split in."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order
        self.heads = nn.ModuleList(_Head() for _ in range(H))

    def forward(self, x: Tensor) -> Tensor:
        outs = [head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
        return torch.cat([outs[at] for at in self.order], -1)


@either()
class HeadsMergedByPermute(PerHead):
    """Heads and batch change places in the result."""

    def forward(self, x: Tensor) -> Tensor:
        out = swiglu(split_heads(x), self.gate, self.up, self.down)
        return out.permute(2, 0, 3, 1).reshape(H * B, d * L)


@either()
class OneHeadReadElsewhere(nn.Module):
    """One head's output is also read by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head() for _ in range(H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs = [head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
        return torch.cat(outs, -1), outs[1] * 2


@declined(Kind.UNEQUAL_WIDTHS)
class OutputTwiceAsWide(PerHead):
    """Every head's output is twice as wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.down = weight(H, f, 2 * d)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(split_heads(x), self.gate, self.up, self.down)


@declined(Kind.PLAIN_FFN, label="SwiGLU")
@declined(Kind.PLAIN_FFN, label="biases", arguments={"bias": True})
class PlainFfn(nn.Module):
    """The feed-forward network of most transformers."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(H * d, f, bias) for _ in range(2))
        self.down = nn.Linear(f, H * d, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@declined(Kind.PLAIN_FFN, label="of another width")
@declined(Kind.PLAIN_FFN, label="with dropout", arguments={"dropout": 0.1}, random=True)
class PlainMlp(nn.Module):
    """Two layers, of which the second is as wide as it likes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H * d, f), nn.Linear(f, 3 * d)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.gelu(self.up(x)), self.dropout))


@either()
class WeightsForEachPosition(nn.Module):
    """A network for each position: mathematically the positions are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = weight(L, H * d, f), weight(L, f, H * d)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("bld,ldf->blf", x, self.gate))
        return torch.einsum("blf,lfd->bld", hidden, self.down)


# What is read elsewhere, or written.


@declined(Kind.ESCAPING_INTERMEDIATE)
class HiddenReturned(PerHead):
    """The hidden units are a result, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(hidden, self.down), hidden


@declined(Kind.ESCAPING_INTERMEDIATE)
class GateReturnedDetached(PerHead):
    """The gate is returned for inspection."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(x)
        gate = project(q, self.gate)
        return project(F.silu(gate) * project(q, self.up), self.down), gate.detach()


@declined(Kind.ESCAPING_INTERMEDIATE)
class AuxiliaryLoss(PerHead):
    """A penalty on the hidden units."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(hidden, self.down), hidden.abs().mean()


@declined(Kind.ESCAPING_INTERMEDIATE)
class HiddenCached(PerHead):
    """The hidden units are kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(B, L, H, f))

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        self.cache.copy_(hidden.detach())
        return project(hidden, self.down)


@declined(Kind.MUTATION, label="the query")
@declined(Kind.MUTATION, label="the gate", arguments={"what": "gate"})
@declined(Kind.UNKNOWN_OPERATION, label="the hidden units", arguments={"what": "hidden"})
@declined(Kind.MUTATION, label="the query, afterwards", arguments={"late": True})
@declined(Kind.MUTATION, label="the gate, afterwards", arguments={"what": "gate", "late": True})
@declined(Kind.MUTATION, label="the hidden, afterwards", arguments={"what": "hidden", "late": True})
class OverwrittenBehindAutograd(PerHead):
    """Something is zeroed through ``.data``: the gradients of eager are those of the zeros."""

    def __init__(self, what: str = "query", late: bool = False) -> None:
        super().__init__()
        self.what, self.late = what, late

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2).contiguous()
        gate = q @ self.gate
        hidden = F.silu(gate) * (q @ self.up)
        target = {"query": q, "gate": gate, "hidden": hidden}[self.what]
        if self.late:
            out = hidden @ self.down
            target.data.zero_()
            return out.cos()
        target.data.zero_() if self.what != "hidden" else target.data[..., 0].zero_()
        return hidden @ self.down


@declined(Kind.MUTATION)
class WeightOverwrittenBehindAutograd(PerHead):
    """A weight is clamped through ``.data`` after its use, before the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = project(F.silu(project(q, self.gate)) * project(q, self.up), self.down)
        self.gate.data.clamp_(min=0)
        return out


@either()
class ResultInBuffer(PerHead):
    """The output is added up in a buffer that outlives the call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(B, L, H, d))

    def forward(self, x: Tensor) -> Tensor:
        out = swiglu(split_heads(x), self.gate, self.up, self.down)
        self.total += out.detach()
        return self.total * 2 + out


@either()
class BufferZeroedAndFilled(SubNetworks):
    """A persistent buffer is zeroed and filled by the loop over sub-networks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.ones(B, L, H, d))

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        self.total.zero_()
        with torch.no_grad():
            for e in range(E):
                self.total += swiglu(q, self.gate[:, e], self.up[:, e], self.down[:, e])
        return self.total * x.unflatten(-1, (H, d))


@either()
class BufferFilledWithoutGradients(PerHead):
    """The buffer is filled under no_grad: its values have no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = torch.zeros_like(q)
        for h in range(H):
            hidden = F.silu(q[:, :, h] @ self.gate[h]) * (q[:, :, h] @ self.up[h])
            with torch.no_grad():
                out[:, :, h] = hidden @ self.down[h]
        return out + q


@either(label="narrow part", arguments={"ranges": ((0, 2), (4, 8))}, shapes=((B, L, 8),))
@either(label="overwritten", arguments={"ranges": ((0, 4), (2, 4))}, shapes=((B, L, 8),))
@either(label="hole", arguments={"ranges": ((0, 2), (6, 8))}, shapes=((B, L, 8),))
@either(label="backwards", arguments={"ranges": ((4, 8), (0, 4))}, shapes=((B, L, 8),))
class BufferFilledUnevenly(nn.Module):
    """Slices of a buffer are written that do not tile it."""

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.ranges = ranges
        self.gate, self.down = weight(2, 4, f), weight(f, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, (start, stop) in enumerate(self.ranges):
            hidden = F.silu(x[..., 4 * i : 4 * i + 4] @ self.gate[i])
            out[..., start:stop] = hidden @ self.down[:, start:stop]
        return out


@declined(Kind.UNEQUAL_HEADS)
class BufferFilledInHalves(PerHead):
    """Of the first head only a half is kept: the buffer has a hole, though every head fits."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        q = split_heads(x)
        for h in range(H):
            hidden = F.silu(q[:, :, h] @ self.gate[h]) * (q[:, :, h] @ self.up[h])
            kept = d // 2 if h == 0 else d
            out[..., h * d : h * d + kept] = (hidden @ self.down[h])[..., :kept]
        return out


@either()
class BufferPartlyOverwritten(PerHead):
    """One head's output is replaced by zeros afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(B, L, H, d)
        q = split_heads(x)
        for h in range(H):
            hidden = F.silu(q[:, :, h] @ self.gate[h]) * (q[:, :, h] @ self.up[h])
            out[:, :, h] = hidden @ self.down[h]
        out[:, :, 1] = 0.0
        return out


# Precision.


@either(precision=torch.bfloat16)
class SumUnderAutocast(SubNetworks):
    """Outputs of float32 networks are added up where autocast is on."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        parts = [swiglu(q, self.gate[:, e], self.up[:, e], self.down[:, e]) for e in range(E)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = parts[0] + parts[1] + parts[2]
            return out.flatten(2) @ out.flatten(2).mT


@declined(Kind.UNSUPPORTED_DTYPE, dtype=torch.complex64)
class Complex(PerHead):
    """Complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return project(torch.tanh(project(split_heads(x), self.gate)), self.down)


@declined(Kind.UNSUPPORTED_DTYPE)
class Integers(nn.Module):
    """Integer arithmetic, as a simulation of quantised weights does it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inner", torch.arange(H * d * f).view(H, d, f) % 7 - 3)
        self.register_buffer("outer", torch.arange(H * d * f).view(H, f, d) % 5 - 2)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads((8 * x).round().long())
        return torch.bmm(torch.bmm(q.flatten(0, 1).transpose(0, 1), self.inner).relu(), self.outer)


# Other layers.


@declined()
class Attention(nn.Module):
    """A softmax between two matrix products is no activation of hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * d, 3 * H * d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return (q @ k.mT / math.sqrt(d)).softmax(-1) @ v


@declined(Kind.TOKEN_DEPENDENT_WEIGHTS)
class LinearAttention(nn.Module):
    """Feature maps by relu: their products have keys and values in place of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * d, H * d) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part(x)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return F.relu(q) @ (F.relu(k).mT @ v)


@declined(Kind.TOKEN_DEPENDENT_WEIGHTS)
class ReluAttention(nn.Module):
    """Attention with relu in place of softmax: keys and values in place of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * d, 3 * H * d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.relu(q @ k.mT / math.sqrt(d)) @ v


# More traps.


@declined(Kind.GRADIENTS_CUT)
class QueryViewedWithoutGradients(PerHead):
    """A view that was made under no_grad passes no gradient on, though its values are the same."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        with torch.no_grad():
            still = split_heads(x)
        return project(F.silu(project(q, self.gate)) * project(still, self.up), self.down)


@declined(Kind.GRADIENTS_CUT)
class WeightViewedWithoutGradients(nn.Module):
    """One weight is transposed under no_grad and so is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(H, f, d), weight(H, d, f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate.mT
        return swiglu(split_heads(x), gate, self.up, self.down)


@declined(Kind.GRADIENTS_CUT)
class AllViewedWithoutGradients(PerHead):
    """The query is viewed under no_grad: the weights are trained, what is below is not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            q = split_heads(x)
        return swiglu(q, self.gate, self.up, self.down)


@declined(Kind.GRADIENTS_CUT)
class DetachedGate(PerHead):
    """The gate is detached from the graph."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = F.silu(project(q, self.gate)).detach()
        return project(gate * project(q, self.up), self.down)


@declined(Kind.UNPAIRED_BRANCHES, shapes=((B, H * d, L),))
class HalvesOfGroupedConvolution(nn.Module):
    """The halves of a grouped projection: gates from the first heads, up from the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Conv1d(H * d, 2 * H * f, 1, groups=H)
        self.down = nn.Conv1d(H * f, H * d, 1, groups=H)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=1)
        return self.down(F.silu(gate) * up)


@declined(Kind.UNPAIRED_BRANCHES)
class HalvesAcrossHeads(nn.Module):
    """A packed projection is flattened before it is cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = weight(H, d, 2 * f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(split_heads(x), self.gate_up).flatten(2).chunk(2, dim=-1)
        return project(split_heads(F.silu(gate) * up), self.down)


@either(shapes=((B, L, 3 * 4 + d),))
class HeadsOverlapInLoop(PerHead):
    """The same, by slices in a loop."""

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for h in range(H):
            q = x[..., h * 4 : h * 4 + d]
            heads.append((F.silu(q @ self.gate[h]) * (q @ self.up[h])) @ self.down[h])
        return torch.cat(heads, -1)


@declined(Kind.UNKNOWN_OPERATION)
class NormOfHidden(PerHead):
    """A layer norm over the hidden units."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(F.layer_norm(hidden, (f,)), self.down)


@declined(Kind.DROPOUT_INSIDE, random=True)
class DropoutOfHidden(PerHead):
    """Dropout between the hidden units and the down projection, in training."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(project(q, self.gate)) * project(q, self.up)
        return project(F.dropout(hidden, 0.5), self.down)


@declined(Kind.DROPOUT_INSIDE, random=True)
class DropoutInALoopOverHeads(PerHead):
    """Each head by itself is an ordinary network with dropout."""

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for h, q in enumerate(x.split(d, dim=-1)):
            hidden = F.silu(q @ self.gate[h]) * (q @ self.up[h])
            heads.append(F.dropout(hidden, 0.5) @ self.down[h])
        return torch.cat(heads, -1)


@declined(Kind.ROUTER_ON_INPUT)
class RouterOnInput(SubNetworks):
    """The router scales what the sub-networks read."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        scaled = q.unsqueeze(3) * self.router(q).unsqueeze(-1)
        gate = torch.einsum("blhed,hedf->blhef", scaled, self.gate)
        up = torch.einsum("blhed,hedf->blhef", scaled, self.up)
        return torch.einsum("blhef,hefd->blhd", F.silu(gate) * up, self.down)


@either()
class OutputAddedInPlace(PerHead):
    """The residual is added to the output in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = swiglu(split_heads(x), self.gate, self.up, self.down).flatten(2)
        out += x
        return out


@either()
class ReadThroughTwoViews(PerHead):
    """The output is read by two views, one of which depends on its strides."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(x).permute(2, 0, 1, 3).reshape(H, B * L, d)
        out = ((F.silu(q @ self.gate) * (q @ self.up)) @ self.down).transpose(0, 1)
        return out.transpose(0, 1).view(H, -1), out.flatten(1).sum(-1)


@declined(Kind.MIXED_PRECISION, precision=torch.bfloat16)
class EinsumOfThreeUnderAutocast(SubNetworks):
    """Autocast casts the product of router and weights, which is computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = []
            for e in range(E):
                r = torch.sigmoid(torch.einsum("blhd,hd->blh", q, self.route[:, e])).float()
                hidden = F.silu(project(q, self.gate[:, e])) * project(q, self.up[:, e])
                down = self.down[:, e].permute(2, 0, 1)
                out.append(torch.einsum("ohf,blh,blhf->blho", down, r, hidden))
            return sum(out)


@declined(Kind.MIXED_PRECISION, precision=torch.bfloat16)
class MixedPrecision(PerHead):
    """The gate projection is computed in bfloat16, the rest in float32."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = project(q.bfloat16(), self.gate.bfloat16()).to(x.dtype)
        return project(F.silu(gate) * project(q, self.up), self.down)


@declined(Kind.MIXED_PRECISION, precision=torch.bfloat16)
class AutocastOfGateOnly(PerHead):
    """Only the gate projection runs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gate = project(q, self.gate)
        return project(F.silu(gate.to(x.dtype)) * project(q, self.up), self.down)


declined(Kind.UNKNOWN_ACTIVATION, label="hardswish", arguments={"act": F.hardswish})(Activation)


# Residuals inside loops.


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head() for _ in range(H))


@declined(Kind.UNEQUAL_HEADS)
class Cascade(_Heads):
    """Each head reads the sum of its part and what the head before has made."""

    def forward(self, x: Tensor) -> Tensor:
        outs: list[Tensor] = []
        for head, part in zip(self.heads, x.chunk(H, -1), strict=True):
            q = part + outs[-1] if outs else part
            outs.append(head(q))
        return torch.cat(outs, dim=-1)


@declined(Kind.UNEQUAL_HEADS, shapes=((B * L, d),))
class HeadsInARow(_Heads):
    """Each head reads what the one before has made; all of it is concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [self.heads[0](x.sin())]
        for head in self.heads[1:]:
            outs.append(head(outs[-1]))
        return torch.cat(outs, dim=-1)


@declined(Kind.ESCAPING_INTERMEDIATE)
class HeadsReadInTheLoop(_Heads):
    """A penalty on what each head has made, while the next one is still to come."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs: list[Tensor] = []
        penalty = x.new_zeros(())
        for head, part in zip(self.heads, x.chunk(H, -1), strict=True):
            outs.append(head(part))
            penalty = penalty + outs[-1].square().mean()
        return torch.cat(outs, dim=-1), penalty


@declined(Kind.MUTATION)
class HeadOverwritten(_Heads):
    """One head's output is overwritten once it has been merged."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs = [head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
        merged = torch.cat(outs, dim=-1)
        return merged, outs[0].mul_(2)


@declined(Kind.ESCAPING_INTERMEDIATE)
class HeadsOfAnotherDtype(_Heads):
    """A float32 copy of one head among those that are merged, which is returned, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs = [head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
        outs[-1] = outs[-1].double()
        return torch.cat(outs, dim=-1), outs[0]


@declined(Kind.UNEQUAL_HEADS)
class ResidualOfSomeHeads(_Heads):
    """Only every other head adds its residual."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
        outs[::2] = [y + q for y, q in zip(outs[::2], x.chunk(H, -1)[::2], strict=True)]
        return torch.cat(outs, dim=-1)


@declined(Kind.OPERATION_IN_LOOP)
class NormAfterResidualInLoop(_Heads):
    """Each head is normalised after its residual, before the heads are merged."""

    def forward(self, x: Tensor) -> Tensor:
        outs = [q + head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
        return torch.cat([F.layer_norm(y, (d,)) for y in outs], dim=-1)


@declined(Kind.OPERATION_IN_LOOP)
class RoutedResidualInLoop(_Heads):
    """The router scales the sum of output and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H * d, H)

    def forward(self, x: Tensor) -> Tensor:
        routed = zip(self.heads, x.chunk(H, -1), self.router(x).split(1, -1), strict=True)
        return torch.cat([r * (q + head(q)) for head, q, r in routed], dim=-1)


@declined(Kind.OPERATION_IN_LOOP, dtype=torch.bfloat16)
class WideResidualInLoop(_Heads):
    """The residual is added in float32, and the sum is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.heads, x.chunk(H, -1), strict=True)
        return torch.cat([(q.float() + head(q)).to(q.dtype) for head, q in parts], dim=-1)


@declined(Kind.OPERATION_IN_LOOP)
class TwoResidualsInLoop(_Heads):
    """Each head adds the input and the position."""

    def __init__(self) -> None:
        super().__init__()
        self.position = weight(L, H * d)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.position.expand_as(x).chunk(H, -1)
        parts = zip(self.heads, x.chunk(H, -1), positions, strict=True)
        return torch.cat([q + head(q) + p.sin() for head, q, p in parts], dim=-1)


# Backward passes of their own.


class _Saving(torch.autograd.Function):
    """silu(gate) * up, with the backward pass of another activation."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return grad * up * gate.sigmoid(), grad * F.silu(gate)


class _Damped(torch.autograd.Function):
    """The same tensor, and half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


OWN_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the product": lambda gate, up: _Saving.apply(gate, up),
    "the hidden units": lambda gate, up: _Damped.apply(F.silu(gate) * up),
}


class OwnBackward(PerHead):
    """An ``autograd.Function`` inside, as of projects that save memory by one."""

    def __init__(self, hidden: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        return project(self.hidden(project(q, self.gate), project(q, self.up)), self.down)


for name, hidden in OWN_BACKWARDS.items():
    declined(Kind.OWN_BACKWARD, label=name, arguments={"hidden": hidden})(OwnBackward)


@declined(Kind.OWN_BACKWARD, label="gate", arguments={"hooked": 0})
@declined(Kind.OWN_BACKWARD, label="hidden units", arguments={"hooked": 1})
class Hooked(PerHead):
    """The gradient of an intermediate is clipped."""

    def __init__(self, hooked: int) -> None:
        super().__init__()
        self.hooked = hooked

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = project(q, self.gate)
        hidden = F.silu(gate) * project(q, self.up) if self.hooked else gate
        hidden.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        if not self.hooked:
            hidden = F.silu(gate) * project(q, self.up)
        return project(hidden, self.down)
