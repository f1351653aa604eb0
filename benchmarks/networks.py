"""The sub-networks of an MH-FFN in plain PyTorch, and inputs for them: what the others measure.

Shapes: q (B, L, H, d); k, u, v (H, E, f, d); r (B, L, H, E).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPE_NAMES = "B,L,H,d,E,f"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    shape: list[int], dtype: torch.dtype, device: str, router_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Random q, k, u, v and r whose output has about the size of q."""
    b, length, h, d, e, f = shape
    q = torch.randn(b, length, h, d, device=device)
    k, u = (torch.randn(h, e, f, d, device=device) / d**0.5 for _ in range(2))
    v = torch.randn(h, e, f, d, device=device) / f**0.5
    r = torch.softmax(torch.randn(b, length, h, e, device=device), dim=-1)
    return [*(x.to(dtype) for x in (q, k, u, v)), r.to(router_dtype or dtype)]


def parse_shape(text: str) -> list[int]:
    shape = [int(part) for part in text.split(",")]
    if len(shape) != 6 or min(shape) < 1:
        raise ValueError(f"want six positive numbers {SHAPE_NAMES}, got {text!r}")
    return shape


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.to(exact.dtype) - exact).norm() / exact.norm())
