"""The networks and models that are measured, in plain PyTorch, and inputs for them."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE_NAMES = ("B", "L", "H", "d", "E", "f")
PAPER = (8, 4096, 16, 128, 22, 256)  # the 1.3B model
SWIGLU_HIDDEN = 5504  # of the SwiGLU model that the paper compares it with

# Sub-networks: q (B, L, H, d), weights (H, E, f, d), r (B, L, H, E), result (B, L, H, d).

SubNetworks = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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


def make_inputs(
    shape: Sequence[int], dtype: torch.dtype, device: str, router: torch.dtype | None = None
) -> list[Tensor]:
    """Random q, k, u, v and r whose output has about the size of q."""
    b, length, h, d, e, f = shape
    q = torch.randn(b, length, h, d, device=device)
    k, u = (torch.randn(h, e, f, d, device=device) / d**0.5 for _ in range(2))
    v = torch.randn(h, e, f, d, device=device) / f**0.5
    r = torch.softmax(torch.randn(b, length, h, e, device=device), dim=-1)
    return [*(x.to(dtype) for x in (q, k, u, v)), r.to(router or dtype)]


# Feed-forward networks: x (B, L, model) to the same.


class MultiHeadFFN(nn.Module):
    """FlashMHF's: per head a norm, a router and sub-networks, between two projections."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        sub_networks: int,
        hidden: int,
        networks: SubNetworks = loop,
    ) -> None:
        super().__init__()
        self.networks, self.heads, model = networks, heads, heads * head_dim
        self.inputs, self.outputs = (nn.Linear(model, model, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(head_dim)
        self.router = nn.Parameter(torch.randn(heads, head_dim, sub_networks) / head_dim**0.5)
        shape = heads, sub_networks, hidden, head_dim
        self.gate, self.up = (nn.Parameter(torch.randn(shape) / head_dim**0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(shape) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.inputs(x).unflatten(-1, (self.heads, -1)))  # (B, L, H, d)
        r = torch.einsum("blhd,hde->blhe", q.float(), self.router.float()).sigmoid()
        r = r / r.sum(-1, keepdim=True).clamp_min(1e-20)
        return self.outputs(self.networks(q, self.gate, self.up, self.down, r).flatten(2))


class SwiGLU(nn.Module):
    """The ordinary feed-forward network of a Llama."""

    def __init__(self, model: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(model, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# Whole models.


def rotary(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for heads of this width, each (L, head_dim / 2)."""
    steps = torch.arange(0, head_dim, 2, device=x.device) / head_dim
    angle = torch.outer(torch.arange(x.shape[1], device=x.device), 10_000.0**-steps)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(model, model, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Pre-norm blocks of attention and a feed-forward network; takes and returns (B, L, model)."""

    def __init__(self, model: int, heads: int, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.head_dim = model // heads
        self.attention = nn.ModuleList(Attention(model, heads) for _ in networks)
        self.networks = nn.ModuleList(networks)
        self.norms = nn.ModuleList(nn.RMSNorm(model) for _ in range(2 * len(networks)))

    def forward(self, x: Tensor) -> Tensor:
        norms = iter(self.norms)
        positions = rotary(x, self.head_dim)
        for attention, network in zip(self.attention, self.networks, strict=True):
            x = x + attention(next(norms)(x), *positions)
            x = x + network(next(norms)(x))
        return x


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.shortcut(x))


# Narrow models: what a compiler takes its time over is the number of operations.


def llama_like(layers: int = 12, model: int = 64) -> tuple[nn.Module, Tensor]:
    """A Llama without embeddings, and an input."""
    networks = [SwiGLU(model, 3 * model) for _ in range(layers)]
    return Transformer(model, 4, networks), torch.randn(2, 32, model)


def resnet_like() -> tuple[nn.Module, Tensor]:
    """The eight blocks of a ResNet-18, and a batch of images."""
    widths = [16, 16, 16, 32, 32, 64, 64, 128, 128]
    blocks = [Residual(a, b) for a, b in itertools.pairwise(widths)]
    stem = nn.Conv2d(3, widths[0], 7, stride=2, padding=3)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return nn.Sequential(stem, nn.MaxPool2d(2), *blocks, head), torch.randn(2, 3, 64, 64)


def flashmhf_like(layers: int = 20, sub_networks: int = 22) -> tuple[nn.Module, Tensor]:
    """The paper's 1.3B model by its layers and sub-networks, and an input."""
    networks = [MultiHeadFFN(4, 16, sub_networks, hidden=32) for _ in range(layers)]
    return Transformer(64, 4, networks), torch.randn(2, 32, 64)
