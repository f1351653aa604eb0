"""Work that is cut along the hidden units: who computes which part, and the sum of the parts.

The sum over hidden units has no softmax in it, so several programs may each add a part of it for
the same tile of tokens. Each writes its partial sum, in float32, to a workspace; a second kernel
adds the parts of a tile in their order. The cut depends on shapes and the GPU alone and nothing is
added atomically: equal inputs give equal bits.

Two callers cut for two reasons. Few tokens make too few tiles to keep a GPU's memory busy, so every
tile is cut (`Split(0, parts)`). Many tokens leave a last round in which most multiprocessors would
idle, so the tiles of that round are cut (`Split(whole, parts)`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import capability, interpreted, launch
from .loads import Operand, TokenAxes, store_tokens
from .tiles import Tile, padded_width

_ELEMENTS = 1024  # of the output, for one program of the second kernel
_TOGETHER = 8  # parts that it loads at once


class Split(NamedTuple):
    """The first `whole` tiles are one piece of work each; every later one is `parts` pieces."""

    whole: int
    parts: int

    def pieces(self, tiles: int) -> int:
        """How many there are; they are numbered tile by tile."""
        return self.whole + (tiles - self.whole) * self.parts

    def workspace(self, tiles: int, tokens: int, like: Tensor) -> Tensor | None:
        """Room for the partial sums of tiles of `tokens` tokens; None where nothing is cut."""
        cut = self.pieces(tiles) - self.whole
        if cut == 0:
            return None
        return torch.empty((cut, tokens, like.shape[-1]), dtype=torch.float32, device=like.device)


def split_last_round(tiles: int, iterations: int, programs: int) -> Split:
    """Cut the tiles that do not fill a round of `programs`, if each can have several programs."""
    rest = tiles % programs
    parts = min(programs // rest, iterations) if rest else 1
    return Split(tiles, 1) if parts == 1 else Split(tiles - rest, parts)


def add_parts(
    partial: Tensor, out: Tensor, axes: TokenAxes, split: Split, tiles: int, scale: float
) -> None:
    """Write `scale` times the sums of the parts to their tokens of `out` (B, L, H, d)."""
    _, tokens, width = partial.shape
    bd = padded_width(width)
    rows = max(1, min(tokens, _ELEMENTS // bd))
    operands = {
        "Part": Operand(partial, None, None),
        "Out": Operand(out, axes.strides(out), None),
    }
    # Started while the first kernel still runs, it waits for that one's results only.
    early = not interpreted() and capability(out.device)[0] >= 9
    scalars = {
        "FIRST_TILE": split.whole,
        "PARTS": split.parts,
        "B": axes.batch,
        "L": axes.length,
        "D": width,
        "SCALE": scale,
        "TOGETHER": _TOGETHER,
        "BM": tokens,
        "ROWS": rows,
        "BD": bd,
        "EARLY": early,
    }
    if early:
        scalars["launch_pdl"] = True
    programs = (tiles - split.whole) * (tokens // rows)
    launch(add_parts_kernel, programs, Tile(rows, 1, 4, 1, False), out.device, operands, scalars)


@triton.jit(do_not_specialize=["FIRST_TILE", "PARTS"])
def add_parts_kernel(
    Part, Out, Part_strides, Out_strides,
    FIRST_TILE, PARTS, B, L,
    D: tl.constexpr, SCALE: tl.constexpr, TOGETHER: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Part holds, for each cut tile, the sums of its parts one after the other: [BM, D] each."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    cut = program // (BM // ROWS)
    row = program % (BM // ROWS) * ROWS
    tile = FIRST_TILE + cut
    token_tiles = tl.cdiv(L, BM)
    l0 = (tile % token_tiles) * BM + row
    b = tile // token_tiles % B
    h = tile // token_tiles // B

    c = tl.arange(0, BD)
    here = (row + tl.arange(0, ROWS))[:, None] * D + c[None, :]  # [ROWS, BD]
    pointers = Part + cut.to(tl.int64) * PARTS * (BM * D) + here
    inside = (c < D)[None, :]
    total = tl.zeros((ROWS, BD), tl.float32)
    for first in tl.range(0, PARTS, TOGETHER):
        for i in tl.static_range(TOGETHER):  # unrolled: a program waits once for all its loads
            part = first + i
            total += tl.load(pointers + part * (BM * D), mask=inside & (part < PARTS), other=0.0)
    store_tokens(Out, total * SCALE, Out_strides, b, l0, h, L, D, ROWS, BD, "pointer")
