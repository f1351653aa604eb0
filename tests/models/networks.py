"""Whole models: pre-norm residual towers of attention and of multi-head FFNs in several spellings.

The networks are those of the corpus, and the paper's own layer; ``FFNS`` names them. All take and
return (B, L, WIDTH). A ``Tower`` of n layers with m networks a layer has n * m sites.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from corpus.cases import E, H, d, f, weight
from corpus.positive import POSITIVE
from torch import Tensor, nn

WIDTH = H * d
BATCH, LENGTH = 2, 5
LAYERS = 2  # where their number is not the point, see test_towers.py


class LoopFFN(nn.Module):
    """The paper's layer as its authors write it: projections around a loop over sub-networks."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.RMSNorm(d)
        self.router = weight(H, d, E)
        self.gate, self.up, self.down = (weight(H * E * f, d) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.in_proj(x).unflatten(-1, (H, d)))  # (B, L, H, d)
        r = torch.einsum("blhd,hde->blhe", q, self.router).sigmoid()
        r = r / r.sum(-1, keepdim=True)
        gate, up, down = (w.view(H, E, f, d) for w in (self.gate, self.up, self.down))
        out = torch.zeros_like(q)
        for e in range(E):
            hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate[:, e]))
            hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up[:, e])
            out += r[..., e, None] * torch.einsum("blhf,hfd->blhd", hidden, down[:, e])
        return self.out_proj(out.flatten(2))


class ChannelsFirst(nn.Module):
    """A network that wants its features before the tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.mT).mT


def ffn(name: str) -> nn.Module:
    """A network by its name in ``FFNS``."""
    if name == "loop":
        return LoopFFN()
    case = POSITIVE[FFNS[name]]
    network = case.model(**case.arguments)
    return ChannelsFirst(network) if name == "grouped conv" else network


#: names of networks, and what the corpus calls them
FFNS = {
    "loop": "",
    "einsum": "Einsum",
    "bmm": "Bmm",
    "packed": "Packed-gate first",
    "module list": "ListOfHeads-cat",
    "grouped conv": "GroupedConvolution",
    "vmap": "VmapOverHeads",
    "router after": "RouterAfterDown",
}


class Attention(nn.Module):
    """Causal self-attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outputs(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and one or more networks, each after a norm and with a residual."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        parts = [Attention(), *(ffn(name) for name in names)]
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in parts)

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return x


class Tower(nn.Module):
    """Blocks on top of each other. ``self.run`` calls one of them; sub-classes say how."""

    def __init__(self, layers: int, names: Sequence[str] = ("loop",)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(names) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


def tokens(batch: int = BATCH, length: int = LENGTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=dtype)
