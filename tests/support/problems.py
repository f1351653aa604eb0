"""Problems of the op for tests: sizes, random tensors, the usual spelling, and errors.

Axes have one letter each: batch B, length L, heads H, width of a head d, groups of weights G,
sub-networks E, hidden units f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhf_compiler.lowering.activations import ACTIVATIONS

NAMES = ("q", "k", "u", "v", "r", "k_bias", "u_bias", "v_bias")  # in the order of the op
BIASES = NAMES[5:]

Tensors = dict[str, Tensor | None]


class Shape(NamedTuple):
    """The sizes of a problem. A test states one, and others by ``_replace``."""

    B: int
    L: int
    H: int
    d: int
    G: int
    E: int
    f: int

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Those of each tensor, by its name."""
        B, L, H, d, G, E, f = self
        weight, bias = (G, E, f, d), (G, E, f)
        return dict(
            zip(
                NAMES,
                ((B, L, H, d), weight, weight, weight, (B, L, H, E), bias, bias, (G, E, d)),
                strict=True,
            )
        )


def make(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    absent: Sequence[str] = (),
    *,
    router_dtype: torch.dtype | None = None,
    scaled: bool = False,
    by_columns: bool = False,
    device: str = "cpu",
) -> Tensors:
    """Random tensors, always the same ones, as is what a test draws next.

    Args:
        shape: their sizes.
        dtype: of all but the router's weights.
        absent: names of tensors that are None. The others are what they are without it.
        router_dtype: of the router's weights; as the others' where it is None.
        scaled: as a model has them: weights that keep hidden units and results about as large as
            queries, and router's weights between 0 and 1. Otherwise all are normal.
        by_columns: store each weight with its hidden units innermost.
        device: where they lie.
    """
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    width = shape.d**-0.5
    factors = {"k": width, "u": width, "v": shape.f**-0.5} if scaled else {}
    tensors: Tensors = {}
    for name, size in shape.sizes().items():
        x = torch.randn(size, dtype=drawn, device=device)
        x *= factors.get(name, 1.0)
        if name == "r":
            x = x.sigmoid() if scaled else x
        if by_columns and name in ("k", "u", "v"):
            x = stored_as(x, (0, 1, 3, 2))
        kept = router_dtype if name == "r" and router_dtype else dtype
        tensors[name] = None if name in absent else x.to(kept)
    return tensors


def leaves(tensors: Mapping[str, Tensor | None], dtype: torch.dtype | None = None) -> Tensors:
    """The same numbers, perhaps in another dtype, whose gradients are recorded."""
    return {
        name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in tensors.items()
    }


def step(
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor | None],
    grad_out: Tensor,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Tensor]:
    """The output, and the gradient of every tensor that is there, perhaps in another dtype."""
    given = leaves(tensors, dtype)
    out = function(**given, **options)
    present = [x for x in given.values() if x is not None]
    return [out.detach(), *torch.autograd.grad(out, present, grad_out.to(out.dtype))]


def spelled(
    q: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    r: Tensor | None = None,
    k_bias: Tensor | None = None,
    u_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    activation: str = "silu",
    k_scale: float = 1.0,
    u_scale: float = 1.0,
    out_scale: float = 1.0,
) -> Tensor:
    """The usual spelling, one sub-network after the other, in the dtype of its inputs."""
    share = q.shape[2] // k.shape[0]

    def of_heads(weights: Tensor, e: int) -> Tensor:
        return weights[:, e].repeat_interleave(share, 0)

    def projected(weights: Tensor, bias: Tensor | None, scale: float, e: int) -> Tensor:
        y = scale * torch.einsum("blhd,hfd->blhf", q, of_heads(weights, e))
        return y if bias is None else y + of_heads(bias, e)

    out = torch.zeros_like(q)
    for e in range(k.shape[1]):
        hidden = ACTIVATIONS[activation].function(projected(k, k_bias, k_scale, e))
        if u is not None:
            hidden = hidden * projected(u, u_bias, u_scale, e)
        down = torch.einsum("blhf,hfd->blhd", hidden, of_heads(v, e))
        down = down if v_bias is None else down + of_heads(v_bias, e)
        out = out + (down if r is None else (r[..., e].unsqueeze(-1) * down).to(out.dtype))
    return out_scale * out


def spelled_at_once(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    r: Tensor | None = None,
    k_bias: Tensor | None = None,
    u_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    activation: str = "silu",
    k_scale: float = 1.0,
    u_scale: float = 1.0,
    out_scale: float = 1.0,
) -> Tensor:
    """All sub-networks in one product each, which sums, and rounds, fewer times."""
    share = q.shape[2] // k.shape[0]
    k, u, v, k_bias, u_bias, v_bias = (
        None if x is None else x.repeat_interleave(share, 0)
        for x in (k, u, v, k_bias, u_bias, v_bias)
    )

    def projected(weights: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        y = scale * torch.einsum("blhd,hefd->blhef", q, weights)
        return y if bias is None else y + bias

    hidden = ACTIVATIONS[activation].function(projected(k, k_bias, k_scale))
    if u is not None:
        hidden = hidden * projected(u, u_bias, u_scale)
    down = torch.einsum("blhef,hefd->blhed", hidden, v)
    down = down if v_bias is None else down + v_bias
    down = down if r is None else down * r.unsqueeze(-1)
    return (out_scale * down.sum(3)).to(q.dtype)


def normed(q: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Queries by their RMS norm in float64, before they are rounded.

    Args:
        q: queries, (B, L, H, d).
        weight: of the norm, (d,) or (H, d).
        eps: added to the mean of the squares.
    """
    x = q.double()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.double()


def routed(
    q: Tensor, weight: Tensor, routing: str, sum_floor: float = 0.0, sum_eps: float = 0.0
) -> Tensor:
    """The router's weights, (B, L, H, E), of queries as they are, in float64.

    Args:
        q: queries, (B, L, H, d).
        weight: the router's, (G, d, E).
        routing: "none", "sigmoid" or "normalised".
        sum_floor: what the sum that normalises is at least.
        sum_eps: what is then added to it.
    """
    wide = weight.double().repeat_interleave(q.shape[2] // weight.shape[0], 0)
    r = torch.einsum("blhd,hde->blhe", q.double(), wide)
    if routing != "none":
        r = r.sigmoid()
    if routing == "normalised":
        r = r / (r.sum(-1, keepdim=True).clamp_min(sum_floor) + sum_eps)
    return r


def stored_as(x: Tensor | None, order: Sequence[int]) -> Tensor:
    """Equal to ``x``, with its axes lying in memory in this order."""
    assert x is not None
    inverse = [order.index(axis) for axis in range(len(order))]
    return x.permute(*order).contiguous().permute(inverse)


def beside_nan(x: Tensor) -> Tensor:
    """Equal to ``x``, whose last axis lies in rows of 64 of which the rest is not a number."""
    memory = x.new_full((*x.shape[:-1], 64), float("nan"))
    return memory[..., : x.shape[-1]].copy_(x)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def assert_as_exact(
    names: Iterable[str], found: Iterable[Tensor], usual: Iterable[Tensor], exact: Iterable[Tensor]
) -> None:
    """Each of ``found`` errs at most twice as much as the usual spelling in the same dtype."""
    for name, x, y, z in zip(names, found, usual, exact, strict=True):
        error, allowed = relative_error(x, z), 2 * relative_error(y, z)
        assert error <= allowed, f"{name}: {error:.2e} against {allowed:.2e}"


def present(tensors: Mapping[str, Tensor | None]) -> list[str]:
    return [name for name, x in tensors.items() if x is not None]
