"""Models that have multi-head FFNs: one spelling each, all to be found and rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cases import TOKENS, B, Corpus, E, H, L, PerHead, SubNetworks, d, f, split_heads, weight

POSITIVE = Corpus()
mhf = POSITIVE.mhf


# The paper's layer: a loop over sub-networks.


@mhf("heads first", sub_networks=E)
@mhf("heads last", sub_networks=E, arguments={"heads_first": False})
@mhf("heads share weights by repeat", sub_networks=E, groups=2, arguments={"share": "repeat"})
@mhf("heads share weights by expand", sub_networks=E, groups=2, arguments={"share": "expand"})
@mhf("scaled", sub_networks=E, arguments={"scales": (0.5, 1.5, 0.7)})
@mhf("bfloat16", sub_networks=E, dtype=torch.bfloat16)
@mhf("float16", sub_networks=E, dtype=torch.float16)
class Published(nn.Module):
    """Flat weights, norm per head, float32 router, a loop that adds up in a float32 buffer."""

    def __init__(
        self,
        heads_first: bool = True,
        share: str = "",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.heads_first, self.share, self.scales = heads_first, share, scales
        self.groups = 2 if share else H
        self.project, self.merge = nn.Linear(H * d, H * d), nn.Linear(H * d, H * d)
        self.norm = nn.RMSNorm(d)
        self.route = weight(H, d, E)
        self.k, self.u, self.v = (weight(self.groups * E * f, d) for _ in range(3))

    def heads(self, flat: Tensor) -> Tensor:
        w = flat.view(self.groups, E, f, d)
        if self.share == "repeat":
            return w.repeat_interleave(H // self.groups, dim=0)
        if self.share == "expand":
            return w[:, None].expand(-1, H // self.groups, -1, -1, -1).reshape(H, E, f, d)
        return w

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.project(x).view(*x.shape[:2], H, d)).transpose(1, 2).contiguous()
        r = torch.sigmoid(q.float() @ self.route.float())
        r = r / r.sum(-1, keepdim=True).clamp_min(1e-20)
        k, u, v = self.heads(self.k), self.heads(self.u), self.heads(self.v)
        s_gate, s_up, s_out = self.scales
        if not self.heads_first:
            q, r = q.transpose(1, 2).contiguous(), r.transpose(1, 2).contiguous()
        out = torch.zeros(q.shape, dtype=torch.float32)
        for e in range(E):
            if self.heads_first:
                hidden = F.silu(q @ k[:, e].mT * s_gate) * (q @ u[:, e].mT * s_up)
                out += hidden @ v[:, e] * s_out * r[..., e : e + 1]
            else:
                gate = torch.einsum("blhd,hfd->blhf", q, k[:, e]) * s_gate
                up = torch.einsum("blhd,hfd->blhf", q, u[:, e]) * s_up
                y = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, v[:, e])
                out += y * s_out * r[..., e : e + 1]
        out = out.to(q.dtype)
        if self.heads_first:
            out = out.transpose(1, 2)
        return self.merge(out.reshape(*x.shape[:2], H * d))


# The same without a loop: where the router is applied, and by what.


@mhf(sub_networks=E)
class RouterOnHidden(SubNetworks):
    """The weights of the sub-networks multiply their hidden units."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        hidden = F.silu(gate) * up * self.router(q)[..., None]
        return torch.einsum("blhef,hefd->blhd", hidden, self.down).flatten(2)


@mhf(sub_networks=E)
class RouterInsideLastEinsum(SubNetworks):
    """One einsum of three operands applies the router, projects down and sums."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        hidden = F.silu(gate) * up
        out = torch.einsum("blhef,hefd,blhe->blhd", hidden, self.down, self.router(q))
        return out.flatten(2)


@mhf(sub_networks=E)
class RouterByEinsum(SubNetworks):
    """The weighted sum over sub-networks is an einsum, hence a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return torch.einsum("blhe,blhed->blhd", self.router(q), y).flatten(2)


@mhf(sub_networks=E)
class SumOfStack(SubNetworks):
    """Outputs of sub-networks in a list, stacked and summed."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        r = self.router(split_heads(x)).transpose(1, 2)
        parts = []
        for e in range(E):
            hidden = F.silu(q @ self.gate[:, e]) * (q @ self.up[:, e])
            parts.append(r[..., e, None] * (hidden @ self.down[:, e]))
        return torch.stack(parts).sum(0).transpose(1, 2).flatten(2)


@mhf(sub_networks=E)
class LoopOverUnbound(SubNetworks):
    """The sub-networks by ``unbind`` and ``zip``, added up out of place."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = torch.zeros_like(q)
        networks = zip(self.gate.unbind(1), self.up.unbind(1), self.down.unbind(1), strict=True)
        for r, (gate, up, down) in zip(self.router(q).unbind(-1), networks, strict=True):
            hidden = F.silu(torch.einsum("blhd,hdf->blhf", q, gate))
            hidden = hidden * torch.einsum("blhd,hdf->blhf", q, up)
            out = out + r.unsqueeze(-1) * torch.einsum("blhf,hfd->blhd", hidden, down)
        return out.flatten(2)


@mhf(sub_networks=E, routed=False)
class UnweightedSubNetworks(SubNetworks):
    """Sub-networks without a router: mathematically one wide network a head."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return y.sum(3).flatten(2)


# One SwiGLU a head, all heads at once.


@mhf()
@mhf("24 wide", shapes=[(B, L, H * 24)], head_dim=24, hidden=37, arguments={"sizes": (24, 37)})
@mhf("bfloat16", dtype=torch.bfloat16)
@mhf("float64", dtype=torch.float64)
class Einsum(PerHead):
    """Einsums over heads."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hdf->blhf", q, self.gate)
        up = torch.einsum("blhd,hdf->blhf", q, self.up)
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down).flatten(2)


@mhf()
class EinsumLettersAndSpaces(PerHead):
    """Other letters, an ellipsis, spaces, the weight first, the output transposed."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("n x y, ... n x -> ... y n", self.gate, q)
        up = torch.einsum("...nx,nxy->...yn", q, self.up)
        out = torch.einsum("n y x, b s y n -> s n b x", self.down, gate.sigmoid() * gate * up)
        return out.permute(2, 0, 1, 3).reshape(x.shape)


@mhf(shapes=[(B, H, L, d)])
class Matmul(PerHead):
    """``@`` with broadcasting over the batch; heads come first and stay apart."""

    def forward(self, q: Tensor) -> Tensor:
        return (F.silu(q @ self.gate) * (q @ self.up)) @ self.down


@mhf()
class Bmm(PerHead):
    """One batched matrix product for all heads."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).permute(2, 0, 1, 3).reshape(H, -1, d)
        hidden = F.silu(torch.bmm(q, self.gate)) * torch.bmm(q, self.up)
        return torch.bmm(hidden, self.down).view(H, *x.shape[:2], d).permute(1, 2, 0, 3).flatten(2)


@mhf()
class Baddbmm(PerHead):
    """Batched matrix products with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_bias, self.up_bias = weight(H, 1, f), weight(H, 1, f)
        self.down_bias = weight(H, 1, d)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).flatten(0, 1).transpose(0, 1)
        hidden = F.silu(torch.baddbmm(self.gate_bias, q, self.gate))
        hidden = hidden * torch.baddbmm(self.up_bias, q, self.up)
        return torch.baddbmm(self.down_bias, hidden, self.down).transpose(0, 1).reshape(x.shape)


@mhf()
class BiasesAdded(PerHead):
    """Einsums, and biases that are added to their results."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_bias, self.up_bias, self.down_bias = weight(H, f), weight(H, f), weight(H, d)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hdf->blhf", q, self.gate) + self.gate_bias
        up = torch.einsum("blhd,hdf->blhf", q, self.up) + self.up_bias
        out = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down) + self.down_bias
        return out.flatten(2)


@mhf()
class OutIn(nn.Module):
    """Weights stored (out, in), as ``nn.Linear`` stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(H, f, d), weight(H, f, d), weight(H, d, f)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        hidden = F.silu(q @ self.gate.mT) * (q @ self.up.mT)
        return (hidden @ self.down.mT).transpose(1, 2).flatten(2)


@mhf("gate first")
@mhf("up first", arguments={"gate_first": False})
class Packed(nn.Module):
    """Gate and up projection in one weight."""

    def __init__(self, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_first = gate_first
        self.gate_up, self.down = weight(H, d, 2 * f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.einsum("blhd,hdf->blhf", split_heads(x), self.gate_up).chunk(2, dim=-1)
        hidden = F.silu(a) * b if self.gate_first else a * F.silu(b)
        return torch.einsum("blhf,hfd->blhd", hidden, self.down).flatten(2)


@mhf()
class PackedInterleaved(nn.Module):
    """Gate and up projection in one weight, unit by unit in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = weight(H, d, 2 * f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.einsum("blhd,hdf->blhf", split_heads(x), self.gate_up)
        hidden = F.silu(both[..., ::2]) * both[..., 1::2]
        return torch.einsum("blhf,hfd->blhd", hidden, self.down).flatten(2)


@mhf()
class InPlaceActivation(PerHead):
    """The activation and the product overwrite the gate projection."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(torch.einsum("blhd,hdf->blhf", q, self.gate), inplace=True)
        hidden.mul_(torch.einsum("blhd,hdf->blhf", q, self.up))
        return torch.einsum("blhf,hfd->blhd", hidden, self.down).flatten(2)


@mhf(shapes=[(B, H * d, L)])
class GroupedConvolution(nn.Module):
    """Channels first, heads are the groups of a convolution one element wide."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv1d(H * d, H * f, 1, groups=H)
        self.up = nn.Conv1d(H * d, H * f, 1, groups=H)
        self.down = nn.Conv1d(H * f, H * d, 1, groups=H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@mhf()
class VmapOverHeads(PerHead):
    """One head's network, mapped over heads."""

    def forward(self, x: Tensor) -> Tensor:
        def head(q: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return (F.silu(q @ gate) * (q @ up)) @ down

        over_heads = torch.vmap(head, in_dims=(2, 0, 0, 0), out_dims=2)
        return over_heads(split_heads(x), self.gate, self.up, self.down).flatten(2)


@mhf(activation="gelu", gated=False)
class StackedModuleState(nn.Module):
    """Equal modules under ``vmap``, their parameters stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.in_weight, self.in_bias = weight(H, f, d), weight(H, f)
        self.out_weight, self.out_bias = weight(H, d, f), weight(H, d)
        self.template = [nn.Sequential(nn.Linear(d, f), nn.GELU(), nn.Linear(f, d)).to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        state = {
            "0.weight": self.in_weight,
            "0.bias": self.in_bias,
            "2.weight": self.out_weight,
            "2.bias": self.out_bias,
        }

        def head(state: dict[str, Tensor], q: Tensor) -> Tensor:
            return torch.func.functional_call(self.template[0], state, (q,))

        return torch.vmap(head, in_dims=(0, 2), out_dims=2)(state, split_heads(x)).flatten(2)


@mhf(shapes=[TOKENS, (H, d, f), (H, d, f), (H, f, d)])
class WeightsAreInputs(nn.Module):
    """The weights are arguments, as a hypernetwork or functional code passes them."""

    def forward(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu(torch.einsum("blhd,hdf->blhf", q, gate))
        hidden = hidden * torch.einsum("blhd,hdf->blhf", q, up)
        return torch.einsum("blhf,hfd->blhd", hidden, down).flatten(2)


# Layouts.


@mhf(shapes=[(B, H, d)])
class NoSequence(PerHead):
    """A recommender's field by field network: no sequence dimension."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.einsum("bhd,hdf->bhf", x, self.gate)
        up = torch.einsum("bhd,hdf->bhf", x, self.up)
        return torch.einsum("bhf,hfd->bhd", F.silu(gate) * up, self.down)


@mhf(shapes=[(B * L, H, d)])
class FlatTokens(PerHead):
    """(tokens, H, d), by broadcast vector times matrix."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unsqueeze(-2)
        return ((F.silu(q @ self.gate) * (q @ self.up)) @ self.down).squeeze(-2)


@mhf(shapes=[(H, B * L, d)])
class HeadsOutermost(PerHead):
    """(H, tokens, d) from end to end."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(F.silu(torch.bmm(x, self.gate)) * torch.bmm(x, self.up), self.down)


@mhf(shapes=[(H, B, L, d)])
class HeadsBeforeBatch(PerHead):
    """(H, B, L, d), the weights with a dimension of one for the batch."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (w.unsqueeze(1) for w in (self.gate, self.up, self.down))
        return (F.silu(x @ gate) * (x @ up)) @ down


@mhf()
class HeadsNeverMerged(PerHead):
    """The result stays (B, L, H, d) and goes on into a norm."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
        out = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down)
        return F.layer_norm(out, (d,))


@mhf()
class MergedInAnotherOrder(PerHead):
    """Features of the heads interleaved in the result: another view of the same output."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
        return torch.einsum("blhf,hfd->bldh", F.silu(gate) * up, self.down).flatten(2)


@mhf()
class FeaturesInterleaved(PerHead):
    """Head ``h`` is made of every H-th feature."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (d, H))
        gate, up = (torch.einsum("bldh,hdf->blhf", q, w) for w in (self.gate, self.up))
        return torch.einsum("blhf,hfd->bldh", F.silu(gate) * up, self.down).flatten(2)


# Loops over heads.


@mhf("cat")
@mhf("stack", arguments={"merge": "stack"})
@mhf("biases", arguments={"bias": True})
class ListOfHeads(nn.Module):
    """A module for each head, with parameters of its own."""

    class Head(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(d, f, bias), nn.Linear(d, f, bias)
            self.down = nn.Linear(f, d, bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    def __init__(self, merge: str = "cat", bias: bool = False) -> None:
        super().__init__()
        self.merge = merge
        self.heads = nn.ModuleList(self.Head(bias) for _ in range(H))

    def forward(self, x: Tensor) -> Tensor:
        if self.merge == "cat":
            parts = [head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
            return torch.cat(parts, dim=-1)
        parts = [head(q) for head, q in zip(self.heads, split_heads(x).unbind(2), strict=True)]
        return torch.stack(parts, dim=2).flatten(2)


@mhf("returned")
@mhf("one of them", arguments={"kept": 1})
@mhf("compared", arguments={"compare": True})
@mhf("stacked", arguments={"merge": "stack"})
class HeadsReadElsewhere(ListOfHeads):
    """The outputs of heads are results, in addition to what they are merged into."""

    def __init__(self, merge: str = "cat", kept: int = H, compare: bool = False) -> None:
        super().__init__(merge)
        self.kept, self.compare = kept, compare

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = [head(q) for head, q in zip(self.heads, split_heads(x).unbind(2), strict=True)]
        if self.merge == "stack":
            return torch.stack(outs, dim=2), *outs
        merged = torch.cat(outs, dim=-1)
        if self.compare:
            return merged, torch.stack([a.sub(b).square().mean() for a, b in pairwise(outs)])
        return merged, *outs[: self.kept]


@mhf()
class MatricesOfLinears(nn.Module):
    """The weights of Linear modules, stacked in forward and used as matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.ups = (
            nn.ModuleList(nn.Linear(d, f, bias=False) for _ in range(H)) for _ in range(2)
        )
        self.downs = nn.ModuleList(nn.Linear(f, d, bias=False) for _ in range(H))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (
            torch.stack([linear.weight for linear in linears])
            for linears in (self.gates, self.ups, self.downs)
        )
        q = split_heads(x)
        hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate))
        hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up)
        return torch.einsum("blhf,hdf->blhd", hidden, down).flatten(2)


@mhf()
class BufferFilledByHead(PerHead):
    """A loop over heads writes slices of a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for h in range(H):
            q = x[..., h * d : (h + 1) * d]
            hidden = F.silu(q @ self.gate[h]) * (q @ self.up[h])
            out[..., h * d : (h + 1) * d] = hidden @ self.down[h]
        return out


@mhf()
class BeginsWithNothing(PerHead):
    """The list of heads begins with a tensor without a dimension to be concatenated along."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(0)
        for h, q in enumerate(x.chunk(H, -1)):
            hidden = F.silu(q @ self.gate[h]) * (q @ self.up[h])
            out = torch.cat([out, hidden @ self.down[h]], dim=-1)
        return out


@mhf()
class BufferFilledByIndex(PerHead):
    """A loop over heads writes along the dimension of heads."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = torch.zeros_like(q)
        for h in range(H):
            hidden = F.silu(q[:, :, h] @ self.gate[h]) * (q[:, :, h] @ self.up[h])
            out[:, :, h] = hidden @ self.down[h]
        return out.flatten(2)


@mhf("list", sub_networks=E)
@mhf("in place", sub_networks=E, arguments={"in_place": True})
class LoopOverHeadsAndSubNetworks(SubNetworks):
    """Two loops, one in the other."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        r, out, outs = self.router(q), torch.zeros_like(q), []
        for h in range(H):
            total = torch.zeros_like(q[:, :, h])
            for e in range(E):
                hidden = F.silu(q[:, :, h] @ self.gate[h, e]) * (q[:, :, h] @ self.up[h, e])
                y = r[:, :, h, e, None] * (hidden @ self.down[h, e])
                if self.in_place:
                    out[:, :, h] += y
                else:
                    total = total + y
            outs.append(total)
        return out.flatten(2) if self.in_place else torch.cat(outs, dim=-1)


@mhf(sub_networks=E)
class LoopOverSubNetworksAndHeads(SubNetworks):
    """The loop over heads inside of the other: each part of the buffer is visited many times."""

    def forward(self, x: Tensor) -> Tensor:
        r, out = self.router(split_heads(x)), torch.zeros_like(x)
        for e in range(E):
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                q = x[..., part]
                hidden = F.silu(q @ self.gate[h, e]) * (q @ self.up[h, e])
                out[..., part] += r[:, :, h, e, None] * (hidden @ self.down[h, e])
        return out


@mhf("cat")
@mhf("stack", arguments={"merge": "stack"})
@mhf("norm", arguments={"norm": True})
@mhf("scaled", arguments={"scale": 0.5})
class ResidualInHeadLoop(ListOfHeads):
    """Each head adds its own residual before the heads are merged."""

    def __init__(self, merge: str = "cat", norm: bool = False, scale: float = 1.0) -> None:
        super().__init__(merge)
        self.norm, self.scale = norm, scale

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for head, part in zip(self.heads, x.chunk(H, -1), strict=True):
            q = F.rms_norm(part, (d,)) if self.norm else part
            outs.append(self.scale * (part + head(q)))
        if self.merge == "cat":
            return torch.cat(outs, dim=-1)
        return torch.stack(outs, dim=2).flatten(2)


@mhf()
class ResidualInBuffer(PerHead):
    """A buffer starts as a copy of the input, and each head adds to its part."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            hidden = F.silu(x[..., part] @ self.gate[h]) * (x[..., part] @ self.up[h])
            out[..., part] += hidden @ self.down[h]
        return out


@mhf(sub_networks=E)
class SumBeginsWithResidual(SubNetworks):
    """The loop over sub-networks adds to the residual."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        r, out = self.router(q), q
        for e in range(E):
            gate, up = (torch.einsum("blhd,hdf->blhf", q, w[:, e]) for w in (self.gate, self.up))
            down = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down[:, e])
            out = out + r[..., e, None] * down
        return out.flatten(2)


@mhf("down")
@mhf("gate", arguments={"own": "gate"})
class HeadsShareSomeWeights(PerHead):
    """Only one of the three projections differs between the heads."""

    def __init__(self, own: str = "down") -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (
            getattr(self, name)[:] if name == self.own else getattr(self, name)[:1]
            for name in ("gate", "up", "down")
        )
        q = split_heads(x).transpose(1, 2)
        return ((F.silu(q @ gate) * (q @ up)) @ down).transpose(1, 2).flatten(2)


# Without a gate, and other activations.


class Ungated(PerHead):
    """An activation between two projections."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = self.act(torch.einsum("blhd,hdf->blhf", q, self.gate))
        return torch.einsum("blhf,hfd->blhd", hidden, self.down).flatten(2)


SPELLINGS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": {
        "silu": F.silu,
        "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
        "x / (1 + exp(-x))": lambda x: x / (1 + torch.exp(-x)),
        "x / 2 * (1 + tanh(x / 2))": lambda x: x / 2 * (1 + torch.tanh(x / 2)),
    },
    "gelu": {
        "gelu": F.gelu,
        "x / 2 * (1 + erf(x / sqrt(2)))": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    },
    "gelu_tanh": {
        "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu tanh by hand": lambda x: (
            0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))
        ),
    },
    "relu": {"relu": F.relu},
    "relu2": {
        "relu(x) ** 2": lambda x: F.relu(x) ** 2,
        "square": lambda x: F.relu(x).square(),
        "clamp(min=0) ** 2": lambda x: x.clamp(min=0) ** 2,
    },
    "sigmoid": {"sigmoid": torch.sigmoid, "1 / (1 + exp(-x))": lambda x: 1 / (1 + torch.exp(-x))},
    "tanh": {"tanh": torch.tanh},
}
for activation, spellings in SPELLINGS.items():
    for spelling, function in spellings.items():
        add = mhf(spelling, activation=activation, gated=False, arguments={"act": function})
        add(Ungated)


# Precision, gradients, regions.


@mhf("einsum", precision=torch.bfloat16)
class Autocast(nn.Module):
    """float32 parameters, computed in bfloat16."""

    def __init__(self, inner: type[nn.Module] = Einsum) -> None:
        super().__init__()
        self.inner = inner()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


@mhf(count=2)
class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Einsum() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


@mhf(count=3)
class Transformer(nn.Module):
    """Pre-norm residual blocks around the multi-head FFN, with attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(H * d) for _ in range(6))
        self.qkv = nn.ModuleList(nn.Linear(H * d, 3 * H * d) for _ in range(3))
        self.ffn = nn.ModuleList(Einsum() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(3):
            heads = self.qkv[layer](self.norms[2 * layer](x)).chunk(3, -1)
            q, k, v = (split_heads(part).transpose(1, 2) for part in heads)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.ffn[layer](self.norms[2 * layer + 1](x))
        return x


@mhf("float32", count=2)
class OneFfnInTwoLayers(nn.Module):
    """Layers that share their weights: the second one's query depends on the weights too."""

    def __init__(self, autocast: bool = False) -> None:
        super().__init__()
        self.ffn, self.autocast = Einsum(), autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            x = x + self.ffn(F.layer_norm(x, (H * d,)))
            return x + self.ffn(F.layer_norm(x, (H * d,)))


@mhf(count=2)
class OneIntoTheNext(nn.Module):
    """Two multi-head FFNs with nothing in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Einsum(), Einsum()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@mhf(count=2)
class SideBySide(nn.Module):
    """Two multi-head FFNs of one input, added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Einsum(), Bmm()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 0.5 * self.second(x) + x


@mhf()
class LayerScale(PerHead):
    """A learned scale for every output feature stays outside of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = weight(H * d)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * Einsum.forward(self, x)


@mhf()
class ScaledByLength(PerHead):
    """A scale that is a size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return Einsum.forward(self, x) / x.shape[1]


@mhf()
class FrozenWeights(PerHead):
    """The weights need no gradients, the input does."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    forward = Einsum.forward


@mhf()
class DropoutAfterwards(PerHead):
    """Dropout of the output, in evaluation mode of no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(Einsum.forward(self, x), 0.5, training=False)


@mhf(sub_networks=E)
@mhf("in place", sub_networks=E, arguments={"how": "in place"})
@mhf("scaled", sub_networks=E, arguments={"value": 0.5})
@mhf("scaled in place", sub_networks=E, arguments={"how": "in place", "value": 0.5})
@mhf("bfloat16", sub_networks=E, dtype=torch.bfloat16)
class AccumulatedByAddcmul(SubNetworks):
    """Router times output is added to the sum in one operation."""

    def __init__(self, how: str = "", value: float = 1.0) -> None:
        super().__init__()
        self.how, self.value = how, value

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        r, out = self.router(q), torch.zeros_like(q)
        for e in range(E):
            gate, up = (torch.einsum("blhd,hdf->blhf", q, w[:, e]) for w in (self.gate, self.up))
            y = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down[:, e])
            add = out.addcmul_ if self.how else out.addcmul
            out = add(r[..., e, None], y, value=self.value)
        return out


@mhf(sub_networks=E, routed=False)
@mhf("in place", sub_networks=E, routed=False, arguments={"how": "in place"})
@mhf("residual", sub_networks=E, routed=False, arguments={"how": "residual"})
@mhf("scaled", sub_networks=E, routed=False, arguments={"alpha": 0.5})
class AccumulatedByBaddbmm(SubNetworks):
    """Each down projection is added to the sum of those before it, by one operation."""

    def __init__(self, how: str = "", alpha: float = 1.0) -> None:
        super().__init__()
        self.how, self.alpha = how, alpha

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).permute(2, 0, 1, 3).reshape(H, -1, d)
        out = q if self.how == "residual" else torch.zeros_like(q)
        for e in range(E):
            hidden = F.silu(q @ self.gate[:, e]) * (q @ self.up[:, e])
            add = out.baddbmm_ if self.how == "in place" else out.baddbmm
            out = add(hidden, self.down[:, e], alpha=self.alpha)
        return out


@mhf("one token", heads=1, sub_networks=E, shapes=[(1, d)])
@mhf("tokens", heads=1, sub_networks=E, shapes=[(L, d)])
@mhf("batched", sub_networks=E, shapes=[(H, 1, d)], arguments={"batched": True})
class BiasOfTheProduct(SubNetworks):
    """The down projection adds its bias in one operation, which is no residual of one token."""

    def __init__(self, batched: bool = False) -> None:
        super().__init__()
        self.batched = batched
        self.bias = weight(H, E, d)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            place = (slice(None), e) if self.batched else (0, e)
            hidden = F.silu(x @ self.gate[place]) * (x @ self.up[place])
            if self.batched:
                y = torch.baddbmm(self.bias[:, e, None], hidden, self.down[place])
            else:
                y = torch.addmm(self.bias[place], hidden, self.down[place])
            out = out + y * torch.sigmoid((x * self.route[place].unsqueeze(-2)).sum(-1, True))
        return out


@mhf(heads=1, sub_networks=E, routed=False, shapes=[(L, d)])
class AccumulatedByAddmm(SubNetworks):
    """The same with one head."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            hidden = F.silu(x @ self.gate[0, e]) * (x @ self.up[0, e])
            out = torch.addmm(out, hidden, self.down[0, e])
        return out


@mhf(sub_networks=1, count=E)
@mhf("each sum scaled", count=E, arguments={"beta": 0.5})
class LayersByBaddbmm(SubNetworks):
    """Each layer's product is added to what it reads: residuals, and no sum over sub-networks."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).permute(2, 0, 1, 3).reshape(H, -1, d)
        for e in range(E):
            hidden = F.silu(q @ self.gate[:, e]) * (q @ self.up[:, e])
            q = torch.baddbmm(q, hidden, self.down[:, e], beta=self.beta)
        return q


@mhf("sums", sub_networks=E)
@mhf("buffer", sub_networks=E, arguments={"how": "buffer"})
@mhf("zeros of another", sub_networks=E, arguments={"how": "new_zeros"})
class SumsBehindAllNetworks(SubNetworks):
    """All networks are computed first, then added up in tensors that are made like one of them."""

    def __init__(self, how: str = "zeros_like") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        r = self.router(q)

        def network(h: int, e: int) -> Tensor:
            one = q[:, :, h]
            hidden = F.silu(one @ self.gate[h, e]) * (one @ self.up[h, e])
            return r[:, :, h, e, None] * (hidden @ self.down[h, e])

        ys = [[network(h, e) for h in range(H)] for e in range(E)]
        sums = []
        for h in range(H):
            y = ys[0][h]
            total = y.new_zeros(y.shape) if self.how == "new_zeros" else torch.zeros_like(y)
            for heads in ys:
                total += heads[h]
            sums.append(total)
        if self.how != "buffer":
            return torch.stack(sums, 2)
        out = torch.empty_like(sums[0].unsqueeze(2).repeat(1, 1, H, 1))
        for h in range(H):
            out[:, :, h] = sums[h]
        return out


@mhf(random=True)
class OutputTimesRandomNumbers(PerHead):
    """The factors have the output's sizes: they stay outside, so that it is not computed twice."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
        y = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down)
        return y * torch.rand_like(y)[..., :1]


@mhf()
@mhf("bfloat16", dtype=torch.bfloat16)
class EverythingScaledByABuffer(PerHead):
    """One buffer scales all weights and the queries: that makes no weight of tokens."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(d, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q = F.rms_norm(split_heads(x) * self.scale[:, 0], (d,))
        gate, up, down = self.gate * self.scale, self.up * self.scale, self.down * self.scale.T
        hidden = F.silu(torch.einsum("blhd,hdf->blhf", q, gate))
        hidden = hidden * torch.einsum("blhd,hdf->blhf", q, up)
        return torch.einsum("blhf,hfd->blhd", hidden, down)


@mhf()
@mhf("indexed", arguments={"embeds": False})
class TokensAndWeightsOfACodebook(nn.Module):
    """Tokens are rows of a codebook; the weights are computed from all of it."""

    codes: Tensor

    def __init__(self, embeds: bool = True) -> None:
        super().__init__()
        self.embeds = embeds
        self.register_buffer("codes", torch.randn(f, H * d))
        self.gate, self.up, self.down = weight(f, f), weight(f, f), weight(f, f)

    def forward(self, x: Tensor) -> Tensor:
        places = x[..., :f].argmax(-1)
        rows = F.embedding(places, self.codes) if self.embeds else self.codes[places]
        q, heads = rows.unflatten(-1, (H, d)), self.codes.unflatten(-1, (H, d))
        gate, up, down = (torch.einsum("chd,cf->hfd", heads, w) for w in self.parameters())
        hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate))
        hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up)
        return torch.einsum("blhf,hfd->blhd", hidden, down)


@mhf(shapes=[TOKENS, (3 * H * d * f + H * d * H * d,)])
class AllWeightsInOneInput(nn.Module):
    """One vector that is given holds every weight, of the projection before the heads as well."""

    def forward(self, x: Tensor, flat: Tensor) -> Tensor:
        sizes = [H * d * H * d, *[H * d * f] * 3]
        project, *heads = (flat * 0.1).split(sizes)
        q = split_heads(x @ project.view(H * d, H * d))
        gate, up, down = (w.view(H, f, d) for w in heads)
        hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate))
        hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up)
        return torch.einsum("blhf,hfd->blhd", hidden, down)


@mhf("own", shapes=[(H, B * L, d)], arguments={"where": 0})
@mhf("own by head last", shapes=[(B * L, H, d)], arguments={"where": 1})
@mhf("shared", shapes=[(B * L, d)])
@mhf("scaled", shapes=[(B * L, d)], arguments={"scale": 0.5})
class ResidualInsideVmap(PerHead):
    """What a head reads is added inside ``vmap``: its own queries, or those that all share."""

    def __init__(self, where: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.where, self.scale = where, scale

    def forward(self, x: Tensor) -> Tensor:
        def head(q: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return self.scale * q + (F.silu(q @ gate) * (q @ up)) @ down

        weights = self.gate, self.up, self.down
        return torch.vmap(head, (self.where, 0, 0, 0))(x, *weights)


@mhf("rows", shapes=[(H * L, d)])
@mhf("batches of rows", shapes=[(B, H * L, d)])
@mhf("fewer rows than batches", shapes=[(7, H * B, d)])
class DispatchedTokens(PerHead):
    """What was dispatched to each head lies row by row after it: those are tokens, not heads."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-2, (H, -1))
        return ((F.silu(q @ self.gate) * (q @ self.up)) @ self.down).flatten(-3, -2)


@mhf("einsum", shapes=[(B * L, d)])
@mhf("repeat", shapes=[(B * L, d)], arguments={"how": "repeat"})
@mhf("index", shapes=[(B * L, d)], arguments={"how": "index"})
class DispatchedByRouter(PerHead):
    """Slots that are mixed from all tokens, all tokens for each head, or the tokens that it chose.

    Each head has L slots, and gives back what it made of them.
    """

    def __init__(self, how: str = "einsum") -> None:
        super().__init__()
        self.how, self.route = how, weight(d, H * L)

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ self.route).softmax(0)
        if self.how == "repeat":
            slots = x.repeat(H, 1) * torch.sigmoid(x @ self.route[:, :H]).T.reshape(-1, 1)
        elif self.how == "index":
            slots = x[(x @ self.route[:, :H]).topk(L, dim=0).indices.T.reshape(-1)]
        else:
            slots = torch.einsum("ts,td->sd", weights, x)
        q = slots.view(H, -1, d)
        y = torch.bmm(F.silu(torch.bmm(q, self.gate)) * torch.bmm(q, self.up), self.down)
        y = y.reshape(-1, d)
        return weights @ y if self.how == "einsum" else y


@mhf(groups=2)
class GroupsOfHeadsBesideTokens(nn.Module):
    """Heads in a dimension of their own share weights in twos: with two dimensions of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(2, d, f), weight(2, d, f), weight(2, f, d)

    def forward(self, x: Tensor) -> Tensor:
        q = F.rms_norm(split_heads(x), (d,)).unflatten(2, (2, H // 2))
        hidden = F.silu(torch.einsum("blgsd,gdf->blgsf", q, self.gate))
        hidden = hidden * torch.einsum("blgsd,gdf->blgsf", q, self.up)
        return torch.einsum("blgsf,gfd->blgsd", hidden, self.down)


@mhf(groups=1, activation="gelu", gated=False)
class HeadsShareOneNetwork(nn.Module):
    """The heads are cut out of the features and all go through the same network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(x.unflatten(-1, (H, d)).transpose(1, 2).contiguous())))


@mhf()
class TiedDown(PerHead):
    """The down projection is the transposed up projection."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
        return torch.einsum("blhf,hdf->blhd", F.silu(gate) * up, self.up).flatten(2)


@mhf(sub_networks=E)
class NormalisedAfterwards(SubNetworks):
    """The sum over sub-networks is divided by the sum of the router weights."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        r = torch.sigmoid(torch.einsum("blhd,hed->blhe", q, self.route))
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        hidden = F.silu(gate) * up * r[..., None]
        out = torch.einsum("blhef,hefd->blhd", hidden, self.down)
        return (out / r.sum(-1, keepdim=True)).flatten(2)


@mhf(random=True)
class DropoutInTraining(PerHead):
    """Dropout of the query and of the output."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(Einsum.forward(self, F.dropout(x, 0.5)), 0.5)


# More spellings.


@mhf(sub_networks=E)
class RouterAfterDown(SubNetworks):
    """Every sub-network's output, weighted and summed."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return (y * self.router(q).unsqueeze(-1)).sum(dim=3).flatten(2)


@mhf(sub_networks=E)
class SumOfList(SubNetworks):
    """Outputs of sub-networks in a list, added up by ``sum``, which begins with a zero."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        r = self.router(split_heads(x)).transpose(1, 2)
        parts = []
        for e in range(E):
            hidden = F.silu(q @ self.gate[:, e]) * (q @ self.up[:, e])
            parts.append(r[..., e, None] * (hidden @ self.down[:, e]))
        return sum(parts).transpose(1, 2).flatten(2)


@mhf(sub_networks=E)
class ListOfSubNetworks(nn.Module):
    """Each sub-network is a module with parameters of its own, all heads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(EinsumLettersAndSpaces() for _ in range(E))
        self.route = weight(H, E, d)

    def forward(self, x: Tensor) -> Tensor:
        r = torch.softmax(torch.einsum("blhd,hed->blhe", split_heads(x), self.route), -1)
        out = 0.0
        for e, network in enumerate(self.networks):
            out = out + split_heads(network(x)) * r[..., e : e + 1]
        return out.flatten(2)


@mhf(sub_networks=E)
class SoftmaxRouter(SubNetworks):
    """A softmax over sub-networks."""

    def router(self, q: Tensor) -> Tensor:
        return torch.einsum("blhd,hed->blhe", q, self.route).softmax(-1)

    forward = RouterAfterDown.forward


@mhf(sub_networks=E)
class LogSpaceRouter(SubNetworks):
    """Sigmoids normalised in log space."""

    def router(self, q: Tensor) -> Tensor:
        log = F.logsigmoid(torch.einsum("blhd,hed->blhe", q, self.route))
        return (log - log.logsumexp(-1, keepdim=True)).exp()

    forward = RouterAfterDown.forward


@mhf(sub_networks=E)
class TopTwoRouter(SubNetworks):
    """The two best sub-networks of each token, scattered into zeros."""

    def router(self, q: Tensor) -> Tensor:
        best = torch.einsum("blhd,hed->blhe", q, self.route).topk(2, dim=-1)
        zeros = torch.zeros(*q.shape[:-1], E, dtype=q.dtype)
        return zeros.scatter(-1, best.indices, best.values.softmax(-1))

    forward = RouterAfterDown.forward


@mhf(sub_networks=E)
class StaticRouter(SubNetworks):
    """A learned weight for each head's sub-networks, the same for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.route = weight(H, E)

    def router(self, q: Tensor) -> Tensor:
        return self.route.sigmoid()

    forward = RouterAfterDown.forward


@mhf(sub_networks=E, routed=False)
class MeanOfSubNetworks(SubNetworks):
    """A mean is a sum with a scale."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return y.mean(3).flatten(2)


@mhf()
class MultiplyAndSum(PerHead):
    """No contraction at all: broadcast, multiply, sum."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate = (q.unsqueeze(-1) * self.gate).sum(-2)
        up = (q.unsqueeze(-1) * self.up).sum(-2)
        hidden = F.silu(gate) * up
        return (hidden.unsqueeze(-1) * self.down).sum(-2).flatten(2)


@mhf(activation="sigmoid")
class Glu(nn.Module):
    """``F.glu``: the classic gated linear unit, value first, sigmoid of the second half."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = weight(H, d, 2 * f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.glu(torch.einsum("blhd,hdf->blhf", split_heads(x), self.both), dim=-1)
        return torch.einsum("blhf,hfd->blhd", hidden, self.down).flatten(2)


@mhf()
class EinopsLayers(nn.Module):
    """Rearranged and multiplied by einops."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(H, d, f), weight(H, d, f), weight(H, f, d)

    def forward(self, x: Tensor) -> Tensor:
        q = einops.rearrange(x, "b l (h d) -> b h l d", h=H)
        gate = einops.einsum(q, self.gate, "b h l d, h d f -> b h l f")
        up = einops.einsum(q, self.up, "b h l d, h d f -> b h l f")
        out = einops.einsum(F.silu(gate) * up, self.down, "b h l f, h f d -> b h l d")
        return einops.rearrange(out, "b h l d -> b l (h d)")


@mhf(sub_networks=E, dtype=torch.bfloat16)
class Float32Router(SubNetworks):
    """Everything in bfloat16, only the router and the weighted sum in float32."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        r = torch.softmax(torch.einsum("blhd,hed->blhe", q.float(), self.route.float()), -1)
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return (y.float() * r.unsqueeze(-1)).sum(3).to(x.dtype).flatten(2)


@mhf(sub_networks=E)
class ResidualInsideHeads(SubNetworks):
    """A norm before and a residual after the heads, which are not merged in between."""

    def forward(self, x: Tensor) -> Tensor:
        heads = split_heads(x)
        q = F.rms_norm(heads, (d,))
        gate = torch.einsum("blhd,hedf->blhef", q, self.gate)
        up = torch.einsum("blhd,hedf->blhef", q, self.up)
        y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return (heads + (y * self.router(q).unsqueeze(-1)).sum(3)).flatten(2)


@mhf()
class ActivatedQuery(PerHead):
    """The query comes out of an activation itself."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(H * d, H * d)

    def forward(self, x: Tensor) -> Tensor:
        return Einsum.forward(self, F.silu(self.before(x)))


@mhf()
class NormInHeadLoop(nn.Module):
    """A loop over heads that normalises each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ListOfHeads.Head(bias=True) for _ in range(H))
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(H))

    def forward(self, x: Tensor) -> Tensor:
        triples = zip(self.heads, self.norms, x.chunk(H, -1), strict=True)
        return torch.cat([head(norm(q)) for head, norm, q in triples], dim=-1)


@mhf()
class ConstantsWritten(PerHead):
    """Somewhere else in the graph a constant is written in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0.0
        return Einsum.forward(self, x)


@mhf()
class BufferReadInBetween(PerHead):
    """Elsewhere a part of a buffer is written, read and written again."""

    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.zeros(2, *x.shape, dtype=x.dtype)
        buffer[0], buffer[1] = x, 2 * x
        tripled = buffer[0] * 3
        buffer[0] = 5 * x
        return Einsum.forward(self, x + tripled) + buffer[0] + buffer[1] * tripled


@mhf()
class ResidualInPlace(PerHead):
    """The residual is added to the output in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = Einsum.forward(self, x)
        out += x
        return out


mhf("per head", precision=torch.bfloat16, arguments={"inner": ListOfHeads})(Autocast)


mhf("autocast", count=2, arguments={"autocast": True}, precision=torch.bfloat16)(OneFfnInTwoLayers)


@mhf("in place", arguments={"in_place": True})
@mhf("a part", arguments={"in_place": False})
class OutputOverwritten(PerHead):
    """What the network returned is overwritten afterwards, by way of its own name."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        out = Einsum.forward(self, x)
        doubled = out * 2
        if self.in_place:
            out.relu_()
        else:
            out[:, 0] = 0.0
        return out + doubled


@mhf(count=2)
class AddedIntoBuffer(PerHead):
    """Two networks add to parts of one buffer."""

    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.zeros(2, *x.shape, dtype=x.dtype)
        buffer[0] += Einsum.forward(self, x)
        buffer[1] += x
        buffer[0] += Einsum.forward(self, x * 2)
        return buffer.sum(0) + buffer[0]


@mhf()
class AddedToLaterTokens(PerHead):
    """Only a part of the output is used."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[:, 1:] += Einsum.forward(self, x)[:, 1:]
        return out


@mhf(sub_networks=E, count=2)
class Tower(SubNetworks):
    """Layers whose routers read, after a norm, what the layer before has returned."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q = split_heads(F.layer_norm(x, (H * d,)))
            r = torch.einsum("blhd,hed->blhe", q, self.route).softmax(-1)
            gate, up = (torch.einsum("blhd,hedf->blhef", q, w) for w in (self.gate, self.up))
            y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
            x = x + (y * r.unsqueeze(-1)).sum(3).flatten(2)
        return x


@mhf()
class RunTimeState(nn.Module):
    """The weights are neither parameters nor buffers, but tensors that somebody has set."""

    def __init__(self) -> None:
        super().__init__()
        self.state = [torch.randn(shape) / 3 for shape in ((H, d, f), (H, d, f), (H, f, d))]

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        gate, up, down = (weights.to(x.dtype) for weights in self.state)
        return ((F.silu(q @ gate) * (q @ up)) @ down).transpose(1, 2).flatten(2)


@mhf()
class WeightsTimesColumns(PerHead):
    """Tokens are columns: the transposed weights stand on the left of every product."""

    def forward(self, x: Tensor) -> Tensor:
        columns = split_heads(x).permute(0, 2, 3, 1)  # (B, H, d, L)
        hidden = F.silu(self.gate.mT @ columns) * (self.up.mT @ columns)
        return (self.down.mT @ hidden).permute(0, 3, 1, 2).flatten(2)


@mhf(sub_networks=E)
class RouterWithoutGradients(SubNetworks):
    """The router is not trained through the weighted sum."""

    def router(self, q: Tensor) -> Tensor:
        return super().router(q).detach()

    forward = RouterAfterDown.forward


@mhf(groups=1)
class OneNetworkByTensordot(nn.Module):
    """All heads share one network, applied by ``tensordot``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(d, f), weight(d, f), weight(f, d)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.tensordot(q, w, dims=1) for w in (self.gate, self.up))
        return torch.tensordot(F.silu(gate) * up, self.down, dims=1).flatten(2)


@mhf()
class HeadsAsBatch(PerHead):
    """Heads and batch are one dimension, and the weights are repeated for it."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2).flatten(0, 1)  # (B * H, L, d)
        gate, up, down = (w.repeat(x.shape[0], 1, 1) for w in (self.gate, self.up, self.down))
        y = torch.bmm(F.silu(torch.bmm(q, gate)) * torch.bmm(q, up), down)
        return y.unflatten(0, (-1, H)).transpose(1, 2).flatten(2)


@mhf(sub_networks=E)
class RouterByBroadcastProduct(SubNetworks):
    """Weighted hidden units of all sub-networks side by side, then one product a head."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hedf->blhef", q, w) for w in (self.gate, self.up))
        hidden = (F.silu(gate) * up * self.router(q).unsqueeze(-1)).flatten(-2)
        return torch.einsum("blhx,hxd->blhd", hidden, self.down.flatten(1, 2)).flatten(2)


@mhf()
@mhf("chunk", arguments={"how": "chunk"})
@mhf("stack", arguments={"how": "stack"})
class MergedProjections(PerHead):
    """Gate and up are concatenated and taken apart by the activation."""

    def __init__(self, how: str = "glu") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
        if self.how == "stack":
            gate, up = torch.stack([gate, up], -1).unbind(-1)
        elif self.how == "chunk":
            gate, up = torch.cat([gate, up], -1).chunk(2, -1)
        else:  # gate * sigmoid(gate) is silu
            hidden = F.glu(torch.cat([gate * up, gate], -1))
            return torch.einsum("blhf,hfd->blhd", hidden, self.down)
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down)


@mhf(activation="sigmoid")
class GluOfMergedProjections(PerHead):
    """``F.glu`` of up and gate, merged."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
        hidden = F.glu(torch.cat([up, gate], -1))
        return torch.einsum("blhf,hfd->blhd", hidden, self.down)


# Heads that share weights in groups, and outputs that grow piece by piece.


@mhf("in one tensor", groups=2)
@mhf("in tensors of their own", groups=2, arguments={"apart": True})
class LoopOverGroupedHeads(PerHead):
    """Two heads in a row read the same weights."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        weights = self.gate, self.up, self.down
        del self.gate, self.up, self.down
        self.gate, self.up, self.down = (
            nn.ParameterList(nn.Parameter(part.data) for part in w[:2])
            if apart
            else nn.Parameter(w.data[:2])
            for w in weights
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for h, q in enumerate(x.chunk(H, -1)):
            at = h // 2
            heads.append((F.silu(q @ self.gate[at]) * (q @ self.up[at])) @ self.down[at])
        return torch.cat(heads, -1)


class _Growing(PerHead):
    """The output of each head is appended to those before."""

    def stages(self, x: Tensor, weights: tuple[Tensor, ...]) -> list[Tensor]:
        stages: list[Tensor] = []
        for q, gate, up, down in zip(x.chunk(H, -1), *weights, strict=True):
            y = (F.silu(q @ gate) * (q @ up)) @ down
            stages.append(torch.cat([stages[-1], y], -1) if stages else y)
        return stages


@mhf()
class GrowingOfWhichTheMiddleIsReturned(_Growing):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *_, middle, _, last = self.stages(x, (self.gate, self.up, self.down))
        return last, middle


@mhf()
class GrowingFromNothing(_Growing):
    def forward(self, x: Tensor) -> Tensor:
        nothing = x[..., :0]
        last = self.stages(x, (self.gate, self.up, self.down))[-1]
        return torch.cat([nothing, torch.cat([nothing, last], -1)], -1)


@mhf()
class GrownAndConcatenatedWithItsInput(_Growing):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.stages(x, (self.gate, self.up, self.down))[-1], x], -1)


@mhf(count=2)
class TwoGrownNetworks(_Growing):
    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate, self.up, self.down
        first = self.stages(x, weights)[-1]
        return torch.cat([first, self.stages(x, tuple(w.flip(0) for w in weights))[-1]], -1)


# Queries that are repeated before the network, or computed out of complex numbers.

#: what is done to queries (B, L, H, d)
REPETITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda q: q.repeat(1, 2, 1, 1),
    "batch": lambda q: q.repeat(3, 1, 1, 1),
    "interleaved tokens": lambda q: q.repeat_interleave(2, 1),
    "beams": lambda q: q[:, None].expand(-1, 3, -1, -1, -1).flatten(0, 1),
    "one token": lambda q: q[:, :1].expand(q.shape),
    "heads": lambda q: q[:, :, : H // 2].repeat(1, 1, 2, 1),
    "interleaved heads": lambda q: q[:, :, : H // 2].repeat_interleave(2, 2),
    "expanded heads": lambda q: q[:, :, : H // 2, None].expand(-1, -1, -1, 2, -1).flatten(2, 3),
    "parts that are merged again": lambda q: torch.cat([q[:, :, :2], q[:, :, :2]], 2),
    "heads and tokens": lambda q: q[:, :, : H // 2].repeat(1, 2, 2, 1),
    "features": lambda q: q[..., : d // 2].repeat(1, 1, 1, 2),
}


def _repeated(model: type[nn.Module]) -> type[nn.Module]:
    for what in REPETITIONS:
        model = mhf(what, sub_networks=E, arguments={"what": what})(model)
    return model


@_repeated
class RepeatedQueries(SubNetworks):
    """The network computes on the repeated queries, of which some may be equal."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.repeated = REPETITIONS[what]

    def forward(self, x: Tensor) -> Tensor:
        q = self.repeated(split_heads(x))
        r, out = self.router(q), torch.zeros_like(q)
        for e in range(E):
            gate = torch.einsum("blhd,hdf->blhf", q, self.gate[:, e])
            up = torch.einsum("blhd,hdf->blhf", q, self.up[:, e])
            y = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down[:, e])
            out = out + r[..., e, None] * y
        return out


@mhf("heads", arguments={"what": "heads"})
@mhf("interleaved heads", arguments={"what": "interleaved heads"})
class LoopOverRepeatedHeads(PerHead):
    """Each head of a loop reads its place in the repeated queries."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.repeated = REPETITIONS[what]

    def forward(self, x: Tensor) -> Tensor:
        q = self.repeated(split_heads(x))
        heads = zip(q.unbind(2), self.gate, self.up, self.down, strict=True)
        return torch.stack([(F.silu(y @ k) * (y @ u)) @ v for y, k, u, v in heads], 2)


@mhf()
class RepeatedUnderVmap(PerHead):
    """No node holds the repeated queries: they are repeated again."""

    def forward(self, x: Tensor) -> Tensor:
        def head(q: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            q = q.repeat_interleave(2, 1)
            return (F.silu(q @ gate) * (q @ up)) @ down

        heads = torch.vmap(head, in_dims=(2, 0, 0, 0), out_dims=2)
        return heads(split_heads(x), self.gate, self.up, self.down)


@mhf()
class RepeatedInTwoSpellings(PerHead):
    """Both branches read the same elements, of two tensors."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        same = q[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)
        gate = torch.einsum("blhd,hdf->blhf", q.repeat(1, 2, 1, 1), self.gate)
        up = torch.einsum("blhd,hdf->blhf", same, self.up)
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down)


@mhf()
class RepeatedAndOverwritten(PerHead):
    """What was repeated is gone when the network runs; the result is repeated as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        q = split_heads(x).repeat(1, 2, 1, 1)
        x.zero_()
        gate = torch.einsum("blhd,hdf->blhf", q, self.gate)
        up = torch.einsum("blhd,hdf->blhf", q, self.up)
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down).repeat(1, 2, 1, 1)


def rotated(q: Tensor, angle: Tensor) -> Tensor:
    """Pairs of the last dimension, as complex numbers, turned by an angle."""
    turned = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


#: what is done to a tensor and angles that fit its last dimension
OUT_OF_COMPLEX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rotated": rotated,
    "real part": lambda x, angle: torch.fft.fft(x).real,
    "imaginary part": lambda x, angle: torch.fft.fft2(x, dim=(1, -1)).imag,
    "of the conjugate": lambda x, angle: torch.fft.fft(x).conj().imag,
}


def _of_complex_numbers(model: type[nn.Module]) -> type[nn.Module]:
    for how in OUT_OF_COMPLEX:
        for what in ("query", "weights", "router"):
            label, given = f"{what} {how}", {"what": what, "how": how}
            model = mhf(label, arguments=given, routed=what == "router")(model)
    return model


@_of_complex_numbers
class OutOfComplexNumbers(PerHead):
    """Real numbers again, where the network reads them."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__()
        self.what, self.real = what, OUT_OF_COMPLEX[how]
        self.angle = weight(d // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, down = split_heads(x), self.down
        q = self.real(q, self.angle) if self.what == "query" else q
        gate_up = self.gate, self.up
        if self.what == "weights":
            gate_up = self.real(self.gate.mT, self.angle).mT, self.up
            down = self.real(down, self.angle)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in gate_up)
        y = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, down)
        return y * self.real(q, self.angle)[..., :1] if self.what == "router" else y


@mhf()
class WrittenThroughComplexNumbers(PerHead):
    """A part of complex numbers is overwritten before their real parts are read."""

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.fft.fft(split_heads(x))
        torch.view_as_real(numbers)[..., 0].mul_(3.0)
        q = numbers.real
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down)


# Ranking models: a network for each of a few tokens, which are features of one request.

_TOKENS = {"heads": H, "gated": False, "activation": "gelu"}


@mhf("einsum", **_TOKENS)
@mhf("bmm", arguments={"spelling": "bmm"}, **_TOKENS)
@mhf("modules", arguments={"spelling": "modules"}, **_TOKENS)
@mhf("dropout of the result", arguments={"dropout": 0.5}, random=True, **_TOKENS)
@mhf("norm of each token", arguments={"affine": True}, **_TOKENS)
@mhf("autocast", arguments={"autocast": True}, precision=torch.bfloat16, **_TOKENS)
@mhf(
    "bmm under autocast",
    arguments={"spelling": "bmm", "autocast": True},
    precision=torch.bfloat16,
    **_TOKENS,
)
class RankingBlock(nn.Module):
    """Tokens mix by a transpose; then each has a network of its own, in stacked parameters."""

    def __init__(
        self,
        spelling: str = "einsum",
        dropout: float = 0.0,
        affine: bool = False,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.spelling, self.autocast = spelling, autocast
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.affine = nn.Parameter(torch.rand(2, H, d)) if affine else None
        self.dropout = nn.Dropout(dropout)
        if spelling == "modules":
            self.ffn = nn.ModuleList(
                nn.Sequential(nn.Linear(d, f), nn.GELU(), nn.Linear(f, d)) for _ in range(H)
            )
        else:
            self.k, self.v = weight(H, d, f), weight(H, f, d)
            self.k_bias, self.v_bias = weight(H, f), weight(H, d)

    def networks(self, x: Tensor) -> Tensor:  # (batch, H, d)
        if self.spelling == "modules":
            return torch.stack(
                [ffn(token) for ffn, token in zip(self.ffn, x.unbind(1), strict=True)], 1
            )
        if self.spelling == "bmm":
            hidden = F.gelu(torch.bmm(x.transpose(0, 1), self.k) + self.k_bias[:, None])
            return (torch.bmm(hidden, self.v) + self.v_bias[:, None]).transpose(0, 1)
        hidden = F.gelu(torch.einsum("btd,tdf->btf", x, self.k) + self.k_bias)
        return torch.einsum("btf,tfd->btd", hidden, self.v) + self.v_bias

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            x = x.view(-1, H, d)
            mixed = x.view(-1, H, H, d // H).transpose(1, 2).reshape(-1, H, d)
            x = self.norms[0](x + mixed)
            x = self.norms[1](x + self.dropout(self.networks(x)))
            return x if self.affine is None else x * self.affine[0] + self.affine[1]


@mhf("float32", sub_networks=E, **_TOKENS)
@mhf("sum", sub_networks=E, arguments={"loop": False}, **_TOKENS)
@mhf(
    "autocast",
    sub_networks=E,
    arguments={"autocast": True},
    precision=torch.bfloat16,
    **_TOKENS,
)
class RankingExperts(nn.Module):
    """Experts for each token, all computed, whose gates are zero where relu makes them so."""

    def __init__(self, loop: bool = True, autocast: bool = False) -> None:
        super().__init__()
        self.loop, self.autocast = loop, autocast
        self.route = weight(H, d, E)
        self.k, self.v = weight(H, E, d, f), weight(H, E, f, d)
        self.k_bias, self.v_bias = weight(H, E, f), weight(H, E, d)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            x = x.view(-1, H, d)
            gate = F.relu(torch.einsum("btd,tde->bte", x, self.route))
            if not self.loop:
                hidden = F.gelu(torch.einsum("btd,tedf->btef", x, self.k) + self.k_bias)
                y = torch.einsum("btef,tefd->bted", hidden, self.v) + self.v_bias
                return (gate[..., None] * y).sum(2)
            out = torch.zeros_like(x)
            for e in range(E):
                hidden = torch.einsum("btd,tdf->btf", x, self.k[:, e]) + self.k_bias[:, e]
                y = torch.einsum("btf,tfd->btd", F.gelu(hidden), self.v[:, e]) + self.v_bias[:, e]
                out = out + gate[..., e, None] * y
            return out
