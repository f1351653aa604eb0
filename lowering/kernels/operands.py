"""The operands of kernels: tensors as a launch passes them, and how a kernel is to read them.

Every tensor reaches a kernel as an `Operand`: an argument, the strides that go with it, and the
layout by which the kernel reads it.

    "pointer"  any strides: 64-bit offsets and masks
    "rows"     a tensor descriptor whose last axis is the head width
    "columns"  a tensor descriptor over weights stored (.., d, f): the tile arrives transposed
    "column pointers"  the same without a descriptor, which only some cards have

Descriptors (TMA from sm_90 on) fill what lies outside the tensor with zeros and drop what is stored
there, so ragged lengths, hidden sizes and head widths need no mask. They ask for 16-byte alignment;
what does not have it goes through pointers, which reach the same result with masks. The layouts are
constants of a compiled kernel: a tensor's other paths are not in its code.

Token tensors are described with the head before the token, (B, H, L, d), whatever their strides:
only unit axes in *front* of a tile are free for the compiler to drop.
"""

from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mhf_compiler.compat import statically_known_true

from ..tiles import Tile

_WORTH_A_COPY = 1024  # tokens
_SMALLEST_TRANSFER = 128  # bytes: tiles follow each other in shared memory, so aligned

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
        return 0, (b if statically_known_true(x.shape[1] == 1) else l), h, c


def token_axes(*tensors: Tensor | None) -> TokenAxes:
    """The axes shared by token tensors (B, L, H, *); None stands for an absent one."""
    present = [x for x in tensors if x is not None]
    batch, length = present[0].shape[:2]
    known = statically_known_true  # sizes of a package may be symbolic
    if (
        known(batch == 1)
        or known(length == 1)
        or all(known(x.stride(0) == length * x.stride(1)) for x in present)
    ):
        return TokenAxes(1, batch * length, True)
    return TokenAxes(batch, length, False)


def token_operand(x: Tensor | None, axes: TokenAxes, tile: Tile) -> Operand:
    """`x` (B, L, H, d) in tiles of one head's tokens."""
    if x is None:
        return Operand(None, None, "pointer")
    b, l, h, c = axes.strides(x)
    heads, head_dim = x.shape[2:]
    if tile.descriptors:
        shape = [axes.batch, heads, axes.length, head_dim]
        block = [1, 1, tile.tokens, tile.padded_width(head_dim)]
        descriptor = _describe(x, shape, [b, h, l, c], block)
        if descriptor is not None:
            return Operand(descriptor, None, "rows")
    return Operand(x, (b, l, h, c), "pointer")


def weight_operand(x: Tensor | None, tile: Tile) -> Operand:
    """`x` (G, E, f, d) in tiles of one sub-network's hidden units."""
    if x is None:
        return Operand(None, None, "pointer")
    g, e, f, c = x.stride()
    groups, sub_networks, hidden, head_dim = x.shape
    if tile.descriptors:
        bd = tile.padded_width(head_dim)
        shape = [groups, sub_networks, hidden, head_dim]
        descriptor = _describe(x, shape, [g, e, f, c], [1, 1, tile.hidden, bd])
        if descriptor is not None:
            return Operand(descriptor, None, "rows")
        shape = [groups, sub_networks, head_dim, hidden]
        descriptor = _describe(x, shape, [g, e, c, f], [1, 1, bd, tile.hidden])
        if descriptor is not None:
            return Operand(descriptor, None, "columns")
    elif f == 1 and c != 1 and x.element_size() == 2:
        return Operand(x, (g, e, f, c), "column pointers")
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
    """R (B, L, H, E) with tokens contiguous and 16-byte aligned, so that a descriptor can read it.

    Three backward kernels read R column by column. The copy is small compared with q and pays for
    itself when there are enough tokens. Fewer are left as they are. `merged` tells whether the
    other token tensors let all sequences be one; if not, each sequence is aligned on its own.
    """
    batch, length, heads, sub_networks = x.shape
    if batch * length < _WORTH_A_COPY or x.stride(1) == 1:
        return x
    if merged:
        columns = _aligned_rows(x, (heads, sub_networks), batch * length).unflatten(
            2, (batch, length)
        )
    else:
        columns = _aligned_rows(x, (heads, sub_networks, batch), length)
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
            strides[axis] = DESCRIPTOR_ALIGNMENT  # its stride is never used
        elif strides[axis] <= 0 or strides[axis] * size % DESCRIPTOR_ALIGNMENT:
            return None
    if shape[-1] == 1:
        strides[-1] = 1
    elif strides[-1] != 1:
        return None
    return TensorDescriptor(x, shape, strides, block)
