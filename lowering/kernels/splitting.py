"""Work that is cut along the hidden units: the parts of each program, and their sum.

The sum over hidden units has no softmax in it, so several programs may each add a part of it for
the same tile of tokens. Each writes its partial sum, in float32, to a workspace; a second kernel
adds the parts of a tile in a fixed order. The cut depends on shapes and the GPU alone and nothing
is added atomically: equal inputs give equal bits.

Two callers cut for two reasons. Few tokens make too few tiles to keep a GPU's memory busy, so every
tile is cut (`Split(0, parts)`). Many tokens leave a last round in which most multiprocessors would
idle, so the tiles of that round are cut (`Split(whole, parts)`).

The fewer heads there are, the more parts share a tile, up to 128 of one head. Adding them one after
the other took twice as long as computing them, because each waits for the cache. So a program of
the second kernel loads all parts at once, of the fewer elements of a tile the more parts there are.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Tile
from .launch import early_launch, launch
from .loads import token_pointers
from .operands import Operand, TokenAxes

_MOST_TOGETHER = 128  # parts that a program of the second kernel loads at once; more take turns
SUM_TILE = Tile(1, 1, 1, 1, False)  # one warp
_LOADED = 32 * 32  # values that its one warp loads: of more for each thread, some wait for others


class Split(NamedTuple):
    """The first `whole` tiles are one piece of work each; every later one is `parts` pieces."""

    whole: int
    parts: int

    def pieces(self, tiles: int) -> int:
        """The number of parts; they are numbered tile by tile."""
        return self.whole + (tiles - self.whole) * self.parts

    def workspace(self, tiles: int, tokens: int, like: Tensor) -> Tensor | None:
        """A buffer for the partial sums of tiles of `tokens` tokens; None where nothing is cut."""
        cut = self.pieces(tiles) - self.whole
        if cut == 0:
            return None
        return torch.empty((cut, tokens, like.shape[-1]), dtype=torch.float32, device=like.device)


def split_last_round(tiles: int, iterations: int, programs: int) -> Split:
    """Cut the tiles that do not fill a round of `programs`, if each can have several programs."""
    rest = tiles % programs
    parts = min(programs // rest, iterations) if rest else 1
    return Split(tiles, 1) if parts == 1 else Split(tiles - rest, parts)


def share_of_sum(parts: int, tokens: int, head_dim: int, length: int) -> tuple[int, int]:
    """The parts that a program of the second kernel loads at once, and of how many elements.

    They are that many adjacent elements of a tile [tokens, head_dim], whatever its width.
    What a tile holds beyond the `length` of a sequence, which may be one token, is not read.
    """
    together = min(_MOST_TOGETHER, triton.next_power_of_2(parts))
    present = triton.next_power_of_2(min(tokens, length) * head_dim)
    return together, math.gcd(tokens * head_dim, min(_LOADED // together, present))


def add_parts(
    partial: Tensor, out: Tensor, axes: TokenAxes, split: Split, tiles: int, scale: float
) -> None:
    """Write `scale` times the sums of the parts to their tokens of `out` (B, L, H, d)."""
    programs, operands, scalars = work_of_sum(partial, out, axes, split, tiles, scale)
    scalars |= early_launch(out.device)
    launch(mhf_add_parts_kernel, programs, SUM_TILE, out.device, operands, scalars)


def work_of_sum(
    partial: Tensor, out: Tensor, axes: TokenAxes, split: Split, tiles: int, scale: float
) -> tuple[int, dict[str, Operand], dict[str, Any]]:
    """The number of programs of that kernel, its operands, and its other parameters."""
    _, tokens, head_dim = partial.shape
    together, elements = share_of_sum(split.parts, tokens, head_dim, axes.length)
    operands = {
        "Part": Operand(partial, None, None),
        "Out": Operand(out, axes.strides(out), None),
    }
    scalars = {
        "FIRST_TILE": split.whole,
        "PARTS": split.parts,
        "B": axes.batch,
        "L": axes.length,
        "D": head_dim,
        "SCALE": scale,
        "BM": tokens,
        "TOGETHER": together,
        "ELEMENTS": elements,
    }
    shares = triton.cdiv(min(tokens, axes.length) * head_dim, elements)
    return (tiles - split.whole) * shares, operands, scalars


@triton.jit(do_not_specialize=["FIRST_TILE", "PARTS"])
def mhf_add_parts_kernel(
    Part, Out, Part_strides, Out_strides,
    FIRST_TILE, PARTS, B, L,
    D: tl.constexpr, SCALE: tl.constexpr, BM: tl.constexpr,
    TOGETHER: tl.constexpr, ELEMENTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Part holds, for each cut tile, the sums of its parts one after the other: [BM, D] each."""
    shares = tl.cdiv(tl.minimum(BM, L) * D, ELEMENTS)  # of a tile
    cut = tl.program_id(0) // shares
    tile = FIRST_TILE + cut
    token_tiles = tl.cdiv(L, BM)
    l0 = (tile % token_tiles) * BM
    b = tile // token_tiles % B
    h = tile // token_tiles // B

    here = tl.program_id(0) % shares * ELEMENTS + tl.arange(0, ELEMENTS)
    l = l0 + here // D
    pointers = token_pointers(Out, Out_strides, b, l, h, here % D)
    Part += cut.to(tl.int64) * PARTS * (BM * D)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((ELEMENTS,), tl.float32)
    for first in tl.range(0, PARTS, TOGETHER):
        part = first + tl.arange(0, TOGETHER)
        # In place of parts beyond the last, the last again: loads with masks wait for each other.
        there = tl.minimum(part, PARTS - 1) * (BM * D)
        values = tl.load(Part + there[:, None] + here[None, :])  # [TOGETHER, ELEMENTS]
        total += tl.sum(tl.where((part < PARTS)[:, None], values, 0.0), 0)
    tl.store(pointers, (total * SCALE).to(Out.dtype.element_ty), mask=l < L)
