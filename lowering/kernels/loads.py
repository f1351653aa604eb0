"""Tiles in and out of global memory: the operands on the host, the loads inside the kernels.

Every tensor reaches a kernel as an `Operand`: an argument, the strides that go with it, and the
layout by which the kernel reads it.

    "pointer"  any strides: 64-bit offsets and masks
    "rows"     a tensor descriptor whose last axis is the head width
    "columns"  a tensor descriptor over weights stored (.., d, f): the tile arrives transposed

Descriptors (TMA from sm_90 on) fill what lies outside the tensor with zeros and drop what is stored
there, so ragged lengths, hidden sizes and head widths need no mask. They ask for 16-byte alignment;
what does not have it goes through pointers, which reach the same result with masks. The layouts are
constants of a compiled kernel: a tensor's other paths are not in its code.

Token tensors are described with the head before the token, (B, H, L, d), whatever their strides:
only unit axes in *front* of a tile are free for the compiler to drop.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tiles import Tile

_WORTH_A_COPY = 1024  # tokens
_SMALLEST_TRANSFER = 128  # bytes: tiles lie one behind the other in shared memory, so aligned

DESCRIPTOR_ALIGNMENT = 16  # bytes, of the base address and of every stride but the last


class Operand(NamedTuple):
    """A tensor as a kernel takes it."""

    argument: Tensor | TensorDescriptor | None
    strides: tuple[int, ...] | None
    layout: str | None  # None where a kernel reads this tensor in one way only


class TokenAxes(NamedTuple):
    """The batch and token extents that a launch walks.

    When every token tensor steps evenly from one sequence to the next, all sequences are one: short
    sequences then share tiles, down to the length 1 of a decoding step.
    """

    batch: int
    length: int
    merged: bool

    def strides(self, x: Tensor) -> tuple[int, int, int, int]:
        """The strides of `x` (B, L, H, *) over these axes."""
        b, l, h, c = x.stride()
        if not self.merged:
            return b, l, h, c
        return 0, (l if x.shape[1] > 1 else b), h, c


def token_axes(*tensors: Tensor | None) -> TokenAxes:
    """The axes shared by token tensors (B, L, H, *); None stands for an absent one."""
    present = [x for x in tensors if x is not None]
    batch, length = present[0].shape[:2]
    if all(1 in (batch, length) or x.stride(0) == length * x.stride(1) for x in present):
        return TokenAxes(1, batch * length, True)
    return TokenAxes(batch, length, False)


def token_operand(x: Tensor | None, axes: TokenAxes, tile: Tile) -> Operand:
    """`x` (B, L, H, d) in tiles of one head's tokens."""
    if x is None:
        return Operand(None, None, "pointer")
    b, l, h, c = axes.strides(x)
    heads, width = x.shape[2:]
    if tile.descriptors:
        shape = [axes.batch, heads, axes.length, width]
        block = [1, 1, tile.tokens, tile.padded_width(width)]
        descriptor = _describe(x, shape, [b, h, l, c], block)
        if descriptor is not None:
            return Operand(descriptor, None, "rows")
    return Operand(x, (b, l, h, c), "pointer")


def weight_operand(x: Tensor | None, tile: Tile) -> Operand:
    """`x` (G, E, f, d) in tiles of one sub-network's hidden units."""
    if x is None:
        return Operand(None, None, "pointer")
    g, e, f, c = x.stride()
    groups, networks, hidden, width = x.shape
    if tile.descriptors:
        bd = tile.padded_width(width)
        shape = [groups, networks, hidden, width]
        descriptor = _describe(x, shape, [g, e, f, c], [1, 1, tile.hidden, bd])
        if descriptor is not None:
            return Operand(descriptor, None, "rows")
        shape = [groups, networks, width, hidden]
        descriptor = _describe(x, shape, [g, e, c, f], [1, 1, bd, tile.hidden])
        if descriptor is not None:
            return Operand(descriptor, None, "columns")
    return Operand(x, (g, e, f, c), "pointer")


def router_operand(x: Tensor | None, axes: TokenAxes, tile: Tile) -> Operand:
    """R (B, L, H, E), of which a kernel reads one column of a token tile at a time."""
    if x is None:
        return Operand(None, None, "pointer")
    b, l, h, e = axes.strides(x)
    if tile.descriptors and tile.tokens * x.element_size() >= _SMALLEST_TRANSFER:
        shape = [axes.batch, x.shape[2], x.shape[3], axes.length]
        descriptor = _describe(x, shape, [b, h, e, l], [1, 1, 1, tile.tokens])
        if descriptor is not None:
            return Operand(descriptor, None, "columns")
    return Operand(x, (b, l, h, e), "pointer")


def tokens_innermost(x: Tensor, merged: bool) -> Tensor:
    """R (B, L, H, E) with its tokens side by side and aligned, so that a descriptor can read them.

    Three backward kernels read R column by column; the copy, small beside q, pays for itself when
    there are enough tokens. Fewer are left as they are. `merged` tells whether the other token
    tensors let all sequences be one; if not, each sequence is aligned on its own.
    """
    batch, length, heads, networks = x.shape
    if batch * length < _WORTH_A_COPY or x.stride(1) == 1:
        return x
    if merged:
        columns = _aligned_rows(x, (heads, networks), batch * length).unflatten(2, (batch, length))
    else:
        columns = _aligned_rows(x, (heads, networks, batch), length)
    return columns.permute(2, 3, 0, 1).copy_(x)  # (B, L, H, E)


def _aligned_rows(x: Tensor, shape: tuple[int, ...], length: int) -> Tensor:
    """Fresh memory like that of `x`, in rows that start at aligned addresses."""
    step = DESCRIPTOR_ALIGNMENT // x.element_size()
    return x.new_empty((*shape, -(-length // step) * step))[..., :length]


def router_gradient(x: Tensor | None, axes: TokenAxes) -> Operand:
    """The gradient of R (B, L, H, E), stored through pointers because only some stores happen."""
    return Operand(x, None if x is None else axes.strides(x), None)


def bias_operand(x: Tensor | None) -> Operand:
    """A bias (G, E, f) or (G, E, d)."""
    return Operand(x, None if x is None else x.stride(), None)


def norm_operand(x: Tensor | None) -> Operand:
    """The weight of a norm (H, d), or one (d) that all heads share."""
    strides = None if x is None else (0,) * (2 - x.dim()) + x.stride()
    return Operand(x, strides, None)


def _describe(
    x: Tensor, shape: list[int], strides: list[int], block: list[int]
) -> TensorDescriptor | None:
    """A descriptor of `x`'s memory, or None where its strides or address rule one out."""
    size = x.element_size()
    if x.data_ptr() % DESCRIPTOR_ALIGNMENT:
        return None
    for axis in range(len(shape) - 1):
        if shape[axis] == 1:
            strides[axis] = DESCRIPTOR_ALIGNMENT  # never stepped over
        elif strides[axis] <= 0 or strides[axis] * size % DESCRIPTOR_ALIGNMENT:
            return None
    if shape[-1] == 1:
        strides[-1] = 1
    elif strides[-1] != 1:
        return None
    return TensorDescriptor(x, shape, strides, block)


@triton.jit
def load_tokens(X, strides, b, l0, h, L, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
                LAYOUT: tl.constexpr):  # fmt: skip
    """Tokens l0.. of one head, zero beyond the sequence and the head width: [BM, BD]."""
    if LAYOUT == "rows":
        return X.load([b, h, l0, 0]).reshape(BM, BD)
    else:
        l = l0 + tl.arange(0, BM)
        c = tl.arange(0, BD)
        pointers = token_pointers(X, strides, b, l[:, None], h, c[None, :])
        return tl.load(pointers, mask=(l < L)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def store_tokens(X, value, strides, b, l0, h, L, D: tl.constexpr, BM: tl.constexpr,
                 BD: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """The counterpart of `load_tokens`; rounds `value` [BM, BD] once, to the dtype of X."""
    if LAYOUT == "rows":
        X.store([b, h, l0, 0], value.to(X.dtype).reshape(1, 1, BM, BD))
    else:
        l = l0 + tl.arange(0, BM)
        c = tl.arange(0, BD)
        pointers = token_pointers(X, strides, b, l[:, None], h, c[None, :])
        value = value.to(X.dtype.element_ty)
        tl.store(pointers, value, mask=(l < L)[:, None] & (c < D)[None, :])


@triton.jit
def load_router(R, strides, b, l0, h, e, L, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """R for tokens l0.. of one head and sub-network, zero beyond the sequence: float32 [BM]."""
    if LAYOUT == "columns":
        return R.load([b, h, e, l0]).reshape([BM]).to(tl.float32)
    else:
        l = l0 + tl.arange(0, BM)
        pointers = _router_pointers(R, strides, b, l, h, e)
        return tl.load(pointers, mask=l < L, other=0.0).to(tl.float32)


@triton.jit
def store_router(R, value, strides, b, l0, h, e, L, when, BM: tl.constexpr):
    """The counterpart of `load_router`, done only `when` told."""
    l = l0 + tl.arange(0, BM)
    pointers = _router_pointers(R, strides, b, l, h, e)
    tl.store(pointers, value.to(R.dtype.element_ty), mask=(l < L) & when)


@triton.jit
def load_weights(W, strides, g, e, f0, F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr,
                 BD: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """Hidden units f0.. of one sub-network, zero beyond F and the head width: [BF, BD]."""
    if LAYOUT == "rows":
        return W.load([g, e, f0, 0]).reshape(BF, BD)
    elif LAYOUT == "columns":
        return W.load([g, e, 0, f0]).reshape(BD, BF).T
    else:
        f = f0 + tl.arange(0, BF)
        c = tl.arange(0, BD)
        pointers = _weight_pointers(W, strides, g, e, f, c)
        return tl.load(pointers, mask=(f < F)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def store_weights(W, value, strides, g, e, f0, F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr,
                  BD: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """The counterpart of `load_weights`; rounds `value` [BF, BD] once, to the dtype of W."""
    if LAYOUT == "rows":
        W.store([g, e, f0, 0], value.to(W.dtype).reshape(1, 1, BF, BD))
    elif LAYOUT == "columns":
        W.store([g, e, 0, f0], value.to(W.dtype).T.reshape(1, 1, BD, BF))
    else:
        f = f0 + tl.arange(0, BF)
        c = tl.arange(0, BD)
        pointers = _weight_pointers(W, strides, g, e, f, c)
        value = value.to(W.dtype.element_ty)
        tl.store(pointers, value, mask=(f < F)[:, None] & (c < D)[None, :])


@triton.jit
def load_bias(B, strides, g, e, f0, F: tl.constexpr, BF: tl.constexpr):
    """Entries f0.. of a bias (G, E, F), zero beyond F: float32 [BF]."""
    f = f0 + tl.arange(0, BF)
    return tl.load(_bias_pointers(B, strides, g, e, f), mask=f < F, other=0.0).to(tl.float32)


@triton.jit
def store_bias(B, value, strides, g, e, f0, F: tl.constexpr, BF: tl.constexpr):
    """The counterpart of `load_bias`."""
    f = f0 + tl.arange(0, BF)
    tl.store(_bias_pointers(B, strides, g, e, f), value.to(B.dtype.element_ty), mask=f < F)


@triton.jit
def token_pointers(X, strides, b, l, h, c):
    """To columns `c` of tokens `l` of one head, which broadcast."""
    X += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    return X + l.to(tl.int64) * strides[1] + c.to(tl.int64) * strides[3]


@triton.jit
def _router_pointers(R, strides, b, l, h, e):
    R += (
        tl.cast(b, tl.int64) * strides[0]
        + tl.cast(h, tl.int64) * strides[2]
        + tl.cast(e, tl.int64) * strides[3]
    )
    return R + l.to(tl.int64) * strides[1]


@triton.jit
def _weight_pointers(W, strides, g, e, f, c):
    W += tl.cast(g, tl.int64) * strides[0] + tl.cast(e, tl.int64) * strides[1]
    return W + f.to(tl.int64)[:, None] * strides[2] + c.to(tl.int64)[None, :] * strides[3]


@triton.jit
def _bias_pointers(B, strides, g, e, f):
    B += tl.cast(g, tl.int64) * strides[0] + tl.cast(e, tl.int64) * strides[1]
    return B + f.to(tl.int64) * strides[2]
