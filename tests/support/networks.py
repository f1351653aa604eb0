"""Networks that tests compile: small, and spelled as models spell them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Sub-networks: q (B, L, H, d), weights (H, E, f, d), r (B, L, H, E), result (B, L, H, d).

SubNetworks = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

#: source of a module that no test imports, for scripts: (4, L, 8) to the same
HEADS = """
class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *s)) for s in ((8, 5), (5, 8)))

    def forward(self, x):
        return (x @ self.up).relu() @ self.down
"""


def loop(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """One einsum per sub-network and projection, summed as it goes, in the precision of ``r``."""
    out = torch.zeros_like(q, dtype=r.dtype)
    for e in range(k.shape[1]):
        gate = torch.einsum("blhd,hfd->blhf", q, k[:, e])
        up = torch.einsum("blhd,hfd->blhf", q, u[:, e])
        down = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, v[:, e])
        out = out + r[..., e].unsqueeze(-1) * down
    return out.to(q.dtype)


def batched(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """All sub-networks in one einsum per projection."""
    gate = torch.einsum("blhd,hefd->blhef", q, k)
    up = torch.einsum("blhd,hefd->blhef", q, u)
    hidden = F.silu(gate) * up * r.to(q.dtype).unsqueeze(-1)
    return torch.einsum("blhef,hefd->blhd", hidden, v)


class Heads(nn.Module):
    """A SwiGLU for each of four heads: (..., 32) to the same."""

    def __init__(self) -> None:
        super().__init__()
        shapes = (4, 8, 5), (4, 8, 5), (4, 5, 8)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(s) / 4) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        hidden = F.silu(q @ self.gate) * (q @ self.up)
        return (hidden @ self.down).transpose(1, 2).flatten(2)


class MultiHeadFFN(nn.Module):
    """As in the paper: per head a norm, a router and sub-networks, between two projections.

    x (B, L, H * d) to the same; its steps are methods, for tests that put them together otherwise.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        sub_networks: int,
        hidden: int,
        networks: SubNetworks = batched,
    ) -> None:
        super().__init__()
        self.networks, self.heads, model = networks, heads, heads * head_dim
        self.inputs, self.outputs = (nn.Linear(model, model, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(head_dim)
        self.router = nn.Parameter(torch.randn(heads, head_dim, sub_networks) / head_dim**0.5)
        shape = heads, sub_networks, hidden, head_dim
        self.gate, self.up = (nn.Parameter(torch.randn(shape) / head_dim**0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(shape) / hidden**0.5)

    def queries(self, x: Tensor) -> Tensor:
        """(B, L, H, d), before the norm."""
        return self.inputs(x).unflatten(-1, (self.heads, -1))

    def logits(self, q: Tensor) -> Tensor:
        """(B, L, H, E), in float32."""
        return torch.einsum("blhd,hde->blhe", q.float(), self.router.float())

    def route(self, q: Tensor) -> Tensor:
        r = self.logits(q).sigmoid()
        return r / r.sum(-1, keepdim=True).clamp_min(1e-20)

    def network(self, q: Tensor, r: Tensor) -> Tensor:
        return self.networks(q, self.gate, self.up, self.down, r)

    def project(self, out: Tensor) -> Tensor:
        return self.outputs(out.flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.queries(x))
        return self.project(self.network(q, self.route(q)))


class ProjectedHeads(nn.Module):
    """A network of relu without router between two projections: (B, L, H * d) to the same."""

    H, d, f = 4, 8, 16

    def __init__(self) -> None:
        super().__init__()
        H, d, f = self.H, self.d, self.f
        self.inputs, self.outputs = (nn.Linear(H * d, H * d, bias=False) for _ in range(2))
        self.gate, self.down = (nn.Parameter(torch.randn(H, *s) / 4) for s in ((d, f), (f, d)))

    def forward(self, x: Tensor) -> Tensor:
        q = self.inputs(x).unflatten(-1, (self.H, self.d))
        hidden = torch.einsum("blhd,hdf->blhf", q, self.gate).relu()
        return self.outputs(torch.einsum("blhf,hfd->blhd", hidden, self.down).flatten(2))
