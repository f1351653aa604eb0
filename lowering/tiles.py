"""Which kernel runs, and its tile sizes: a pure function of sizes, dtype and compute capability.

`select` is the one answer, for the launch, the report, the cost model and the passes alike. Kernels
written for one architecture, or for some sizes, come first (`specialised`): they are families, one
folder of kernels/ and one entry of `_FAMILIES` each. What no family takes goes to plain Triton
(`portable`), and so does what a family's kernel refuses at the launch, because of a tensor's
strides or address. Heads too wide for plain Triton's tiles (`WIDEST_TILE`) are a family's in any
case.

A launch never tunes: it may happen inside a CUDA graph's capture, and two runs must add in the same
order. What was tuned while a model was compiled (kernels/tuning/) stands in for a row of the tables
of plain Triton. They hold, per kernel and padded head width, the largest tiles whose accumulators
stay in registers and whose pipeline fits the shared memory: 227 KiB per block on sm_90 and sm_100,
163 on sm_80, 99 on the others. `portable` then shrinks them to the problem.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

#: "backward" is a whole backward pass, of which the last four are the parts
Kernel = Literal["forward", "normed_forward", "backward", "dq", "dv", "dk_du", "dk_dv"]

TRIAL_TOKENS = 4096  # beyond this, more tokens select no other kernel
MANY_TOKENS = 8192  # beyond this, more tokens prefer no other tile
ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of a large GPU
WIDEST_TILE = 256  # columns: wider heads fit no tile of plain Triton's
_SMALLEST = 16  # the least extent of a matrix instruction's operand


class Sizes(NamedTuple):
    """All that a kernel is chosen by, except for strides and addresses.

    A workload knows no card: it has the sizes without `capability` and `interpreted`.
    """

    tokens: int
    heads: int
    groups: int  # of heads that share weights
    head_dim: int
    sub_networks: int
    hidden: int  # units of a sub-network
    gated: bool
    routed: bool
    biased: tuple[bool, bool, bool]  # K, U, V
    dtype: torch.dtype  # of all tensors but R
    capability: tuple[int, int] = (0, 0)  # (0, 0) of no card
    interpreted: bool = False
    packaged: bool = False  # by AOTInductor: compiled by Inductor, launched without Python

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """That of K, U and V."""
        return self.groups, self.sub_networks, self.hidden, self.head_dim


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

    def padded_width(self, head_dim: int) -> int:
        """The block extent of the head width."""
        return max(self.columns, padded_width(head_dim))


# When the products of a tile of hidden units are issued. "order": one after the other. "trailing":
# V's product runs during the next tile's activation. "turns": V's product and the next tile's are
# issued together, while the other consumer activates.
Schedule = Literal["order", "trailing", "turns"]


@dataclass(frozen=True)
class HopperForwardTile:
    """How Hopper's forward kernel (hopper/forward.py) cuts its work."""

    consumers: int  # warp groups, of 64 tokens each
    hidden: int
    stages: int
    registers: int  # of each thread of a consumer
    q_in_registers: bool
    schedule: Schedule
    out_columns: int  # of the output that are stored at once

    @property
    def tokens(self) -> int:
        """Tokens in a tile."""
        return 64 * self.consumers


@dataclass(frozen=True)
class HopperBackwardTile:
    """How Hopper's backward kernels (hopper/backward_*.py) cut their work.

    One of the two extents is resident, 128 for both warp groups, and the other one streams past.
    """

    tokens: int
    hidden: int
    stages: int  # streamed tiles in shared memory


@dataclass(frozen=True)
class BatchedTile:
    """How the kernel between PyTorch's batched products (batched/) cuts their results."""

    tokens: int
    hidden: int
    warps: int = 8
    stages: int = 1


class Chunk(NamedTuple):
    """What PyTorch's batched products (batched/) compute at a time."""

    groups: int  # of heads, each a matrix of the batch
    rows: int  # of a matrix: tokens of all heads of a group
    kept: int  # bytes of hidden units


FamilyTile = HopperForwardTile | HopperBackwardTile | BatchedTile


class Choice(NamedTuple):
    """A folder of kernels/, and the tile for the one of its kernels that runs."""

    family: str
    tile: FamilyTile | Tile


Row = tuple[int, int, int, int]  # tokens, hidden, warps, stages
_Table = dict[int, dict[Kernel, Row]]

_HOPPER: _Table = {
    64: {
        "forward": (128, 64, 8, 4),
        "dq": (128, 64, 8, 3),
        "dv": (128, 128, 8, 3),
        "dk_du": (64, 128, 8, 3),
    },
    128: {
        "forward": (128, 64, 8, 4),
        "dq": (128, 64, 8, 3),
        "dv": (64, 128, 8, 3),
        "dk_du": (32, 64, 4, 3),
    },
    256: {
        "forward": (128, 32, 8, 3),
        "dq": (128, 32, 8, 2),
        "dv": (32, 64, 4, 3),
        "dk_du": (32, 64, 4, 3),
    },
}
_BLACKWELL: _Table = _HOPPER | {
    # A third stage spills with Triton 3.6 (dv), and exceeds the shared memory with 3.9 (dq).
    128: _HOPPER[128] | {"dq": (128, 64, 8, 2), "dv": (64, 128, 8, 2)},
    256: {
        "forward": (128, 32, 8, 3),
        "dq": (64, 32, 8, 2),
        "dv": (32, 128, 8, 2),
        "dk_du": (32, 64, 8, 2),
    },
}
_AMPERE: _Table = {
    64: {
        "forward": (128, 64, 8, 3),
        "dq": (64, 32, 4, 3),
        "dv": (64, 128, 8, 3),
        "dk_du": (64, 64, 4, 2),
    },
    128: {
        "forward": (128, 64, 8, 2),
        "dq": (64, 32, 4, 2),
        "dv": (64, 128, 8, 2),
        "dk_du": (64, 64, 8, 2),
    },
    256: {
        "forward": (64, 32, 4, 2),
        "dq": (64, 32, 8, 2),
        "dv": (32, 64, 8, 2),
        "dk_du": (16, 64, 8, 2),
    },
}
_SMALL_AMPERE: _Table = {
    64: {
        "forward": (128, 32, 4, 3),
        "dq": (64, 32, 4, 3),
        "dv": (64, 64, 4, 3),
        "dk_du": (64, 64, 8, 2),
    },
    128: {
        "forward": (64, 32, 4, 3),
        "dq": (64, 32, 8, 2),
        "dv": (64, 64, 8, 2),
        "dk_du": (32, 64, 8, 2),
    },
    256: {
        "forward": (64, 16, 4, 2),
        "dq": (32, 16, 4, 2),
        "dv": (16, 32, 4, 2),
        "dk_du": (16, 32, 4, 2),
    },
}
_SMALL_BLACKWELL: _Table = _SMALL_AMPERE | {
    # 64 tokens spill, and with 8 warps half of them multiply what others do as well.
    64: _SMALL_AMPERE[64] | {"dk_du": (32, 64, 4, 2)},
}
_FLOAT32: _Table = {  # no matrix units unless TF32 is allowed: products unroll into registers
    64: {
        "forward": (32, 32, 8, 2),
        "dq": (32, 32, 8, 2),
        "dv": (32, 32, 8, 2),
        "dk_du": (32, 32, 8, 2),
    },
    128: {
        "forward": (32, 16, 8, 2),
        "dq": (32, 16, 8, 2),
        "dv": (16, 32, 8, 2),
        "dk_du": (16, 32, 8, 2),
    },
    256: {
        "forward": (32, 16, 8, 2),
        "dq": (16, 16, 8, 2),
        "dv": (16, 16, 8, 2),
        "dk_du": (16, 16, 8, 2),
    },
}

# The accumulator and a gate and up tile fill a consumer's registers: what is left decides whether Q
# goes there too, and how many consumers share the 64 K registers.
_HOPPER_FORWARD: dict[int, tuple[HopperForwardTile, ...]] = {
    # By padded head width; one that is not here goes to plain Triton. Of several tiles, the first
    # that pads the hidden units least.
    **dict.fromkeys((16, 32), (HopperForwardTile(3, 64, 6, 160, False, "order", 64),)),
    64: (
        HopperForwardTile(2, 128, 3, 240, True, "turns", 64),
        HopperForwardTile(3, 64, 6, 160, False, "order", 64),
    ),
    128: (HopperForwardTile(2, 64, 3, 240, True, "trailing", 128),),
    256: (HopperForwardTile(2, 32, 3, 240, False, "trailing", 64),),
}
# Without U a tile has room for more hidden units. The narrowest heads, in which the activations are
# what takes time, go to plain Triton, which has more warps for them.
_HOPPER_UNGATED_FORWARD: dict[int, tuple[HopperForwardTile, ...]] = {
    64: _HOPPER_FORWARD[64][1:],
    128: (
        HopperForwardTile(2, 128, 2, 240, True, "turns", 128),
        HopperForwardTile(2, 64, 4, 240, True, "turns", 128),
    ),
    256: (HopperForwardTile(2, 64, 2, 240, False, "turns", 128),),
}
_HOPPER_FORWARD_TOKENS = 256  # fewer are faster as small tiles that many programs share

_HOPPER_BACKWARD: dict[Kernel, dict[int, HopperBackwardTile]] = {  # by padded head width, as above
    "dq": {
        **dict.fromkeys((16, 32, 64), HopperBackwardTile(128, 64, 5)),
        128: HopperBackwardTile(128, 64, 3),
    },
    # Never as many tokens as columns of the head: the assembler then lets two operands of the
    # products, of equal shape, share registers, though one of them lives on.
    "dv": {
        **dict.fromkeys((16, 32, 64), HopperBackwardTile(128, 128, 4)),
        128: HopperBackwardTile(64, 128, 4),
    },
    "dk_du": {
        **dict.fromkeys((16, 32, 64), HopperBackwardTile(64, 128, 3)),
        128: HopperBackwardTile(64, 128, 3),
    },
    "dk_dv": {
        **dict.fromkeys((16, 32, 64), HopperBackwardTile(64, 128, 4)),
        128: HopperBackwardTile(64, 128, 4),
    },
}
_HOPPER_BACKWARD_TOKENS = 1024  # fewer leave most of a card idle anyway

# From how many tokens on PyTorch's products are faster than plain Triton's kernels.
_BATCHED_FLOAT32_TOKENS = 256
_BATCHED_BACKWARD_TOKENS = 1024  # of 16 bits and the widest heads that plain Triton takes
_BATCHED_ELEMENTS = 4096  # of a tile, for 128 threads; half of it with a gate, for the registers

# The hidden units of a chunk, in bytes, which only the fewest rows may exceed. Smaller chunks stay
# in a large card's L2, but their products are too small for it, and the host too slow to launch
# them.
MOST_BYTES = 128 * 2**20
_FEWEST_ROWS = 128


def select(
    kernel: Kernel, sizes: Sizes, *, out_dtype: torch.dtype | None = None, row: Row | None = None
) -> Choice:
    """The kernel that runs where strides allow it: a family's, or else plain Triton's.

    `backward_kernels` has those of a backward pass. Of the kernel of dQ, `sizes.routed` asks
    whether R has a gradient. `out_dtype` is that of the forward's result, if it is not that of q.
    `row` stands in for the tables' row of plain Triton.
    """
    own = specialised(kernel, sizes, out_dtype=out_dtype)
    return Choice("plain", portable(kernel, sizes, row)) if own is None else own


def backward_kernels(sizes: Sizes) -> tuple[Kernel, ...]:
    """The kernels of a backward pass: one for all of it, or its parts."""
    if specialised("backward", sizes) is not None:
        return ("backward",)
    if specialised("dk_dv", sizes) is not None:
        return "dq", "dk_dv"
    return "dq", "dv", "dk_du"


@lru_cache
def specialised(
    kernel: Kernel, sizes: Sizes, *, out_dtype: torch.dtype | None = None
) -> Choice | None:
    """The kernel that was written for the card's architecture or the sizes, if there is one."""
    special = sizes.interpreted or sizes.packaged or out_dtype not in (None, sizes.dtype)
    for family, rules in _FAMILIES.items():
        if kernel not in rules or (special and family not in _RUN_ANYWHERE):
            continue
        tile = rules[kernel](sizes)
        if tile is not None and (family, kernel, _kind(sizes)) not in _refused:
            return Choice(family, tile)
    return None


_refused: set[tuple[str, Kernel, Sizes]] = set()


def refuse(family: str, kernel: Kernel, sizes: Sizes) -> None:
    """Leave a family's kernel out from now on, for all problems with such widths and weights."""
    _refused.add((family, kernel, _kind(sizes)))
    specialised.cache_clear()


def refuse_none() -> None:
    """Undo every `refuse`."""
    _refused.clear()
    specialised.cache_clear()


def _kind(sizes: Sizes) -> Sizes:
    """What a kernel's code depends on of the sizes, its tile apart."""
    return sizes._replace(tokens=0, heads=sizes.heads // sizes.groups, groups=1)


@lru_cache
def portable(kernel: Kernel, sizes: Sizes, row: Row | None = None) -> Tile:
    """The tile of plain Triton's kernel, which runs on all cards.

    `row` stands in for the tables' row.
    """
    tokens, heads, hidden, itemsize = sizes.tokens, sizes.heads, sizes.hidden, sizes.dtype.itemsize
    if row is None:
        row = _row(_table(itemsize, sizes.capability), kernel, sizes.head_dim)
    bm, bf, warps, stages = row
    bf = _shrink(bf, hidden)
    parts = 1
    if kernel in ("dv", "dk_du"):
        bm = _shrink(bm, tokens)
        # These own hidden units: a padded row costs as much as a real one.
        if bf > 64 and -(-hidden // bf) * bf > 1.2 * hidden:
            bf, warps = bf // 2, max(4, warps // 2)
    elif kernel == "forward":
        full, bm = bm, _shrink(bm, tokens)
        # Not smaller tiles, which would each read all weights again: more programs to a tile.
        parts = -(-ENOUGH_PROGRAMS // (-(-tokens // bm) * heads))
        if parts > 1:
            stages = min(stages, 3)  # a fourth only delays the first product
        parts = min(parts, sizes.sub_networks * -(-hidden // bf))
        if itemsize <= 2:
            warps = max(4, warps * bm // full)
    else:
        full, bm = bm, _shrink(bm, tokens)
        while bm > _SMALLEST and -(-tokens // bm) * heads < ENOUGH_PROGRAMS:
            bm //= 2
        if itemsize <= 2:
            warps = max(4, warps * bm // full)
    # Without matrix units the compiler reads products out of the plain layout of a pointer load.
    # Python makes descriptors, at each launch: a package has pointers.
    descriptors = itemsize <= 2 and sizes.capability[0] in (9, 10) and not sizes.packaged
    return Tile(bm, bf, warps, stages, descriptors, parts)


def packaged(
    sizes: Sizes, *, out_dtype: torch.dtype | None = None, dynamic: bool = False
) -> Tile | None:
    """The tile of plain Triton's forward kernel in a package of AOTInductor's.

    None stands for PyTorch's products, as Inductor compiles them. If the number of tokens is
    `dynamic`, no tile is cut in parts.
    """
    tile = select("forward", sizes._replace(packaged=True), out_dtype=out_dtype).tile
    if not isinstance(tile, Tile):
        return None
    return replace(tile, parts=1) if dynamic else tile


def _hopper_forward(sizes: Sizes, most_hidden: int | None = None) -> HopperForwardTile | None:
    if (
        sizes.capability[0] != 9
        or sizes.dtype.itemsize != 2
        or sizes.tokens < _HOPPER_FORWARD_TOKENS
    ):
        return None
    table = _HOPPER_FORWARD if sizes.gated else _HOPPER_UNGATED_FORWARD
    tiles = [
        replace(tile, hidden=max(32, _shrink(tile.hidden, sizes.hidden)))
        for tile in table.get(padded_width(sizes.head_dim), ())
        if most_hidden is None or tile.hidden <= most_hidden
    ]
    return min(tiles, key=lambda tile: -(-sizes.hidden // tile.hidden) * tile.hidden, default=None)


def _hopper_normed_forward(sizes: Sizes) -> HopperForwardTile | None:
    """The tile if the kernel also normalises and routes its queries.

    The router's parts are in bfloat16, and take the place of a K and a U tile of 64 hidden units.
    Heads up to 32 wide are computed in 64 columns, and normalised faster by a kernel of its own.
    """
    narrow = padded_width(sizes.head_dim) not in (64, 128)
    if sizes.dtype is not torch.bfloat16 or not sizes.gated or narrow:
        return None
    tile = _hopper_forward(sizes, most_hidden=64)
    return tile if tile is not None and tile.hidden == 64 else None


def _hopper_dq(sizes: Sizes) -> HopperBackwardTile | None:
    # As in the forward pass, activations without a gate go where more warps are at them.
    narrow = not sizes.gated and padded_width(sizes.head_dim) < 128
    return None if narrow else _hopper_backward("dq", sizes)


def _hopper_dv(sizes: Sizes) -> HopperBackwardTile | None:
    return _hopper_backward("dv", sizes) if sizes.gated else None


def _hopper_dk_du(sizes: Sizes) -> HopperBackwardTile | None:
    return _hopper_backward("dk_du", sizes) if sizes.gated else None


def _hopper_dk_dv(sizes: Sizes) -> HopperBackwardTile | None:
    """Without a gate, both in one pass; with one, their sums would not fit the registers."""
    return None if sizes.gated else _hopper_backward("dk_dv", sizes)


def _hopper_backward(kernel: Kernel, sizes: Sizes) -> HopperBackwardTile | None:
    few = sizes.tokens < _HOPPER_BACKWARD_TOKENS
    if sizes.capability != (9, 0) or sizes.dtype.itemsize != 2 or few:
        return None
    return _HOPPER_BACKWARD[kernel].get(padded_width(sizes.head_dim))


def _batched_forward(sizes: Sizes) -> BatchedTile | None:
    return _batched_tile(sizes, 256) if _multiplied_by_the_library(sizes) else None


def _batched_backward(sizes: Sizes) -> BatchedTile | None:
    wide = padded_width(sizes.head_dim) == WIDEST_TILE and not sizes.interpreted
    many = sizes.tokens >= _BATCHED_BACKWARD_TOKENS
    if (wide and many) or _multiplied_by_the_library(sizes):
        return _batched_tile(sizes, 128)  # whose rows are summed for the gradients of biases
    return None


def _multiplied_by_the_library(sizes: Sizes) -> bool:
    """Whether Triton's tiles cannot multiply, or far slower for want of matrix units.

    Interpreted, they do where they can.
    """
    many = sizes.tokens >= _BATCHED_FLOAT32_TOKENS
    slow = sizes.dtype == torch.float32 and many and not sizes.interpreted
    return sizes.head_dim > WIDEST_TILE or slow


def _batched_tile(sizes: Sizes, widest: int) -> BatchedTile:
    hidden = _shrink(widest, sizes.hidden)
    return BatchedTile(_BATCHED_ELEMENTS // (1 + sizes.gated) // hidden, hidden)


def batched_chunk(kernel: Kernel, sizes: Sizes) -> Chunk:
    """What the products of a pass compute at a time.

    As many groups of heads as have `MOST_BYTES` of hidden units. A group that would have more is
    cut along its rows.
    """
    rows = sizes.tokens * (sizes.heads // sizes.groups)
    units = sizes.sub_networks * sizes.hidden
    kept = 1 + sizes.gated + (kernel == "backward")  # tensors of hidden units at once
    row = kept * units * sizes.dtype.itemsize  # bytes
    if rows * row > MOST_BYTES:
        most = MOST_BYTES // row // _FEWEST_ROWS * _FEWEST_ROWS
        rows = min(rows, max(_FEWEST_ROWS, most))
        return Chunk(1, rows, rows * row)
    groups = MOST_BYTES // max(1, rows * row)
    rounds = -(-sizes.groups // min(groups, sizes.groups))
    groups = -(-sizes.groups // rounds)
    return Chunk(groups, rows, groups * rows * row)


#: by the folder in kernels/: when each of its kernels runs, and with which tile
_FAMILIES: dict[str, dict[Kernel, Callable[[Sizes], FamilyTile | None]]] = {
    "hopper": {
        "forward": _hopper_forward,
        "normed_forward": _hopper_normed_forward,
        "dq": _hopper_dq,
        "dv": _hopper_dv,
        "dk_du": _hopper_dk_du,
        "dk_dv": _hopper_dk_dv,
    },
    "batched": {
        "forward": _batched_forward,
        "backward": _batched_backward,
    },
}
#: those that the interpreter and packages have as well, and whose results may have any dtype
_RUN_ANYWHERE = frozenset({"batched"})


def shipped_rows(kernel: Kernel, sizes: Sizes) -> list[Row]:
    """The card's own row for such heads, followed by those of the other cards."""
    tables = [_table(sizes.dtype.itemsize, sizes.capability)]
    if sizes.dtype.itemsize <= 2:
        tables += [_HOPPER, _BLACKWELL, _AMPERE, _SMALL_AMPERE, _SMALL_BLACKWELL]
    return [_row(table, kernel, sizes.head_dim) for table in tables]


def padded_width(head_dim: int) -> int:
    """The block extent of the head width: a power of two that a matrix instruction takes."""
    return max(_SMALLEST, 1 << (head_dim - 1).bit_length())


def _row(table: _Table, kernel: Kernel, head_dim: int) -> Row:
    # Wider heads have no tile: whoever asks for one has refused PyTorch's products, and is told so
    # when it runs.
    return table[min(max(64, padded_width(head_dim)), WIDEST_TILE)][kernel]


def _table(itemsize: int, capability: tuple[int, int]) -> _Table:
    if itemsize > 2:
        return _FLOAT32
    if capability[0] in (9, 10):
        return _HOPPER if capability[0] == 9 else _BLACKWELL
    if capability[0] == 12:
        return _SMALL_BLACKWELL
    return _AMPERE if capability == (8, 0) else _SMALL_AMPERE


def _shrink(block: int, extent: int) -> int:
    """The smallest power of two that covers `extent`, at most `block`."""
    return min(block, max(_SMALLEST, 1 << (extent - 1).bit_length()))
