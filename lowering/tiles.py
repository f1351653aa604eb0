"""Tile sizes: a pure function of the problem and of the GPU's compute capability.

A launch never tunes: it may happen inside a CUDA graph's capture, and two runs must add in the same
order. What was tuned while a model was compiled (tuning.py) stands in for a row of the tables. They
hold, per kernel and padded head width, the largest tiles whose accumulators stay in registers and
whose pipeline fits the shared memory: 227 KiB per block on sm_90 and sm_100, 163 on sm_80, 99 on
the others. `choose` then shrinks them to the problem.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

Kernel = Literal["forward", "query", "down", "up"]

_SMALLEST = 16  # the least extent of a matrix instruction's operand
_ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of a large GPU


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    tokens: int
    hidden: int
    warps: int
    stages: int
    descriptors: bool
    parts: int = 1  # programs that share a tile's hidden units
    columns: int = _SMALLEST  # that narrower heads are padded to

    def padded_width(self, width: int) -> int:
        """The block extent of the head width."""
        return max(self.columns, padded_width(width))


@dataclass(frozen=True)
class PipelinedTile:
    """How Hopper's own forward kernel (hopper_forward.py) cuts its work."""

    consumers: int  # warp groups, of 64 tokens each
    hidden: int
    stages: int
    registers: int  # of each thread of a consumer
    q_in_registers: bool
    trailing: bool  # V's product runs during the next tile's activation


@dataclass(frozen=True)
class StreamedTile:
    """How Hopper's own backward kernels (hopper_backward.py) cut their work."""

    streamed: int  # hidden units that pass by 128 tokens in the query kernel, else the reverse
    stages: int  # of them in shared memory

    def sizes(self, kernel: Kernel) -> tuple[int, int]:
        """Tokens and hidden units that a program has at hand."""
        return (128, self.streamed) if kernel == "query" else (self.streamed, 128)


Row = tuple[int, int, int, int]  # tokens, hidden, warps, stages
_Table = dict[int, dict[Kernel, Row]]

_HOPPER: _Table = {
    64: {
        "forward": (128, 64, 8, 4),
        "query": (128, 64, 8, 3),
        "down": (128, 128, 8, 3),
        "up": (64, 128, 8, 3),
    },
    128: {
        "forward": (128, 64, 8, 4),
        "query": (128, 64, 8, 3),
        "down": (64, 128, 8, 3),
        "up": (32, 64, 4, 3),
    },
    256: {
        "forward": (128, 32, 8, 3),
        "query": (128, 32, 8, 2),
        "down": (32, 64, 4, 3),
        "up": (32, 64, 4, 3),
    },
}
_BLACKWELL: _Table = _HOPPER | {
    128: _HOPPER[128] | {"down": (64, 128, 8, 2)},  # a third stage spills with Triton 3.6
    256: {
        "forward": (128, 32, 8, 3),
        "query": (64, 32, 4, 2),
        "down": (32, 128, 8, 2),
        "up": (32, 64, 8, 2),
    },
}
_AMPERE: _Table = {
    64: {
        "forward": (128, 64, 8, 3),
        "query": (64, 64, 4, 3),
        "down": (64, 128, 8, 3),
        "up": (64, 64, 4, 2),
    },
    128: {
        "forward": (128, 64, 8, 2),
        "query": (64, 32, 4, 2),
        "down": (64, 128, 8, 2),
        "up": (64, 64, 8, 2),
    },
    256: {
        "forward": (64, 32, 4, 2),
        "query": (64, 32, 8, 2),
        "down": (32, 64, 8, 2),
        "up": (16, 64, 8, 2),
    },
}
_SMALL_AMPERE: _Table = {
    64: {
        "forward": (128, 32, 4, 3),
        "query": (64, 32, 4, 3),
        "down": (64, 64, 4, 3),
        "up": (64, 64, 8, 2),
    },
    128: {
        "forward": (64, 32, 4, 3),
        "query": (64, 32, 8, 2),
        "down": (64, 64, 8, 2),
        "up": (32, 64, 8, 2),
    },
    256: {
        "forward": (64, 16, 4, 2),
        "query": (32, 16, 4, 2),
        "down": (16, 32, 4, 2),
        "up": (16, 32, 4, 2),
    },
}
_FLOAT32: _Table = {  # no matrix units unless TF32 is allowed: products unroll into registers
    64: {
        "forward": (32, 32, 8, 2),
        "query": (32, 32, 8, 2),
        "down": (32, 32, 8, 2),
        "up": (32, 32, 8, 2),
    },
    128: {
        "forward": (32, 16, 8, 2),
        "query": (32, 16, 8, 2),
        "down": (16, 32, 8, 2),
        "up": (16, 32, 8, 2),
    },
    256: {
        "forward": (32, 16, 8, 2),
        "query": (16, 16, 8, 2),
        "down": (16, 16, 8, 2),
        "up": (16, 16, 8, 2),
    },
}

# The accumulator and a gate and up tile fill a consumer's registers: what is left decides whether Q
# goes there too, and how many consumers share the 64 K registers.
_PIPELINED = {  # by padded head width; one that is not here goes to plain Triton
    **dict.fromkeys((16, 32, 64), PipelinedTile(3, 64, 6, 160, False, False)),
    128: PipelinedTile(2, 64, 3, 240, True, True),
    256: PipelinedTile(2, 32, 3, 240, False, True),
}
_PIPELINED_TOKENS = 256  # fewer are faster as small tiles that many programs share


_STREAMED: dict[Kernel, dict[int, StreamedTile]] = {  # by padded head width, as above
    "query": {
        **dict.fromkeys((16, 32, 64), StreamedTile(64, 5)),
        128: StreamedTile(64, 3),
    },
    # Never as many tokens as columns of the head: the assembler then lets two operands of the
    # products, of equal shape, share registers, though one of them lives on.
    "down": {
        **dict.fromkeys((16, 32, 64), StreamedTile(128, 4)),
        128: StreamedTile(64, 4),
    },
    "up": {
        **dict.fromkeys((16, 32, 64), StreamedTile(64, 3)),
        128: StreamedTile(64, 3),
    },
}
_STREAMED_TOKENS = 1024  # fewer leave most of a card idle anyway


@lru_cache
def choose(
    kernel: Kernel,
    *,
    tokens: int,
    heads: int,
    hidden: int,
    width: int,
    itemsize: int,
    capability: tuple[int, int],
    row: Row | None = None,
) -> Tile:
    """The tile for `tokens` tokens of `heads` heads of `width`, over `hidden` hidden units each.

    `row` stands in for the table's.
    """
    if row is None:
        row = _row(_table(itemsize, capability), kernel, width)
    bm, bf, warps, stages = row
    bf = _shrink(bf, hidden)
    parts = 1
    if kernel in ("down", "up"):
        bm = _shrink(bm, tokens)
        # These own hidden units: a padded row costs as much as a real one.
        if bf > 64 and -(-hidden // bf) * bf > 1.2 * hidden:
            bf, warps = bf // 2, max(4, warps // 2)
    elif kernel == "forward":
        full, bm = bm, _shrink(bm, tokens)
        # Not smaller tiles, which would each read all weights again: more programs to a tile.
        parts = -(-_ENOUGH_PROGRAMS // (-(-tokens // bm) * heads))
        if parts > 1:
            stages = min(stages, 3)  # a fourth only delays the first product
        if itemsize <= 2:
            warps = max(4, warps * bm // full)
    else:
        full, bm = bm, _shrink(bm, tokens)
        while bm > _SMALLEST and -(-tokens // bm) * heads < _ENOUGH_PROGRAMS:
            bm //= 2
        if itemsize <= 2:
            warps = max(4, warps * bm // full)
    # Without matrix units the compiler reads products out of the plain layout of a pointer load.
    descriptors = itemsize <= 2 and capability[0] in (9, 10)
    return Tile(bm, bf, warps, stages, descriptors, parts)


@lru_cache
def choose_pipelined(
    *, tokens: int, hidden: int, width: int, itemsize: int, capability: tuple[int, int]
) -> PipelinedTile | None:
    """The tile for Hopper's own forward kernel, or None where plain Triton is to run."""
    if capability[0] != 9 or itemsize != 2 or tokens < _PIPELINED_TOKENS:
        return None
    tile = _PIPELINED.get(padded_width(width))
    return tile and replace(tile, hidden=max(32, _shrink(tile.hidden, hidden)))


@lru_cache
def choose_routing(
    *,
    tokens: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    gated: bool,
) -> PipelinedTile | None:
    """The same where that kernel is to normalise and route its queries, too.

    The router's parts are in bfloat16, and take the place of a K and a U tile of 64 hidden units.
    Heads up to 32 wide are computed in 64 columns, and normalised faster by a kernel of its own.
    """
    if dtype is not torch.bfloat16 or not gated or padded_width(width) not in (64, 128):
        return None
    tile = choose_pipelined(
        tokens=tokens, hidden=hidden, width=width, itemsize=2, capability=capability
    )
    return tile if tile is not None and tile.hidden == 64 else None


@lru_cache
def choose_streamed(
    kernel: Kernel,
    *,
    tokens: int,
    width: int,
    itemsize: int,
    capability: tuple[int, int],
    gated: bool,
    routed: bool,
    biased: tuple[bool, bool, bool],
) -> StreamedTile | None:
    """The tile for one of Hopper's own backward kernels, or None where plain Triton is to run.

    `routed` asks whether R has a gradient, `biased` whether K, U and V have biases.
    """
    if capability != (9, 0) or itemsize != 2 or tokens < _STREAMED_TOKENS:
        return None
    if not gated or biased[0] or biased[1] or (kernel == "query" and routed and biased[2]):
        return None
    return _STREAMED[kernel].get(padded_width(width))


def shipped_rows(
    kernel: Kernel, *, width: int, itemsize: int, capability: tuple[int, int]
) -> list[Row]:
    """The card's own row for such heads, and behind it those of the other cards."""
    tables = [_table(itemsize, capability)]
    if itemsize <= 2:
        tables += [_HOPPER, _BLACKWELL, _AMPERE, _SMALL_AMPERE]
    return [_row(table, kernel, width) for table in tables]


def padded_width(width: int) -> int:
    """The block extent of the head width: a power of two that a matrix instruction takes."""
    return max(_SMALLEST, 1 << (width - 1).bit_length())


def _row(table: _Table, kernel: Kernel, width: int) -> Row:
    return table[max(64, padded_width(width))][kernel]


def _table(itemsize: int, capability: tuple[int, int]) -> _Table:
    if itemsize > 2:
        return _FLOAT32
    if capability[0] in (9, 10):
        return _HOPPER if capability[0] == 9 else _BLACKWELL
    return _AMPERE if capability == (8, 0) else _SMALL_AMPERE


def _shrink(block: int, extent: int) -> int:
    """The smallest power of two that covers `extent`, at most `block`."""
    return min(block, max(_SMALLEST, 1 << (extent - 1).bit_length()))
