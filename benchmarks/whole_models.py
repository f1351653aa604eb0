"""Whole models to compile, written as plain PyTorch: without an MH-FFN, and the paper's own.

Widths are small: what a compiler takes its time over is the number of operations.
"""

import itertools

import torch
import torch.nn.functional as F
from networks import loop
from torch import Tensor, nn


def rotary(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for heads of this width, each (L, width / 2)."""
    steps = torch.arange(0, width, 2, device=x.device) / width
    angle = torch.outer(torch.arange(x.shape[1], device=x.device), 10_000.0**-steps)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The ordinary feed-forward network of a Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LoopFFN(nn.Module):
    """The paper's network: per head a norm, a router, and a loop over sub-networks."""

    def __init__(self, width: int, heads: int, sub_networks: int, hidden: int) -> None:
        super().__init__()
        self.heads, head_width = heads, width // heads
        self.inputs, self.outputs = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(head_width)
        self.router = nn.Parameter(torch.randn(heads, head_width, sub_networks) / width**0.5)
        shape = heads, sub_networks, hidden, head_width
        self.k, self.u, self.v = (nn.Parameter(torch.randn(shape) / width**0.5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.inputs(x).unflatten(-1, (self.heads, -1)))  # (B, L, H, d)
        r = torch.einsum("blhd,hde->blhe", q.float(), self.router.float()).sigmoid()
        r = r / r.sum(-1, keepdim=True)
        return self.outputs(loop(q, self.k, self.u, self.v, r).flatten(2))


class Transformer(nn.Module):
    """Pre-norm blocks of attention and a feed-forward network; takes and returns (B, L, width)."""

    def __init__(self, width: int, networks: list[nn.Module]) -> None:
        super().__init__()
        self.head_width = width // 4
        self.attention = nn.ModuleList(Attention(width, heads=4) for _ in networks)
        self.networks = nn.ModuleList(networks)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * len(networks)))

    def forward(self, x: Tensor) -> Tensor:
        norms = iter(self.norms)
        positions = rotary(x, self.head_width)
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


def llama_like(layers: int = 12, width: int = 64) -> tuple[nn.Module, Tensor]:
    """A Llama without embeddings, and an input."""
    return Transformer(width, [SwiGLU(width) for _ in range(layers)]), torch.randn(2, 32, width)


def resnet_like() -> tuple[nn.Module, Tensor]:
    """The eight blocks of a ResNet-18, narrow, and a batch of images."""
    widths = [16, 16, 16, 32, 32, 64, 64, 128, 128]
    blocks = [Residual(a, b) for a, b in itertools.pairwise(widths)]
    stem = nn.Conv2d(3, widths[0], 7, stride=2, padding=3)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return nn.Sequential(stem, nn.MaxPool2d(2), *blocks, head), torch.randn(2, 3, 64, 64)


def flashmhf_like(layers: int = 20, sub_networks: int = 22) -> tuple[nn.Module, Tensor]:
    """The paper's 1.3B model by its layers and sub-networks, narrow, and an input."""
    networks = [LoopFFN(64, 4, sub_networks, hidden=32) for _ in range(layers)]
    return Transformer(64, list(networks)), torch.randn(2, 32, 64)
