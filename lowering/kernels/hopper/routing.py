"""The norm of the queries and the weights of their router, inside of Hopper's forward kernel.

As kernels of their own (plain/norm_router.py), they read all queries, write them, and write the
router's weights, for the forward kernel to read it all again. But a consumer of that kernel has the
queries of its 64 tokens at hand in any case. Here it normalises them first, multiplies them by the
router's weights, and keeps what it makes of the logits in shared memory:

    producer   Q   W       KU V  KU V ..   W in a slot of the ring, in place of a K and U tile
    consumer   q = norm Q  | q W | r       then as without a router, with r from shared memory

W is cut into bfloat16 parts beforehand, by a kernel of its own: one for bfloat16 weights and three
for those in float32, whose products are exact (plain/router.py). Of the 128 rows of a K and U
tile, 32 are one part: its sub-networks.

What is computed, and where it is rounded, is written down in lowering/problem.py.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...problem import Formula, NormedRouter
from ..operands import Operand, norm_operand
from ..plain.router import PART_ROWS, cut_router, parts_of
from .compat import async_load, reinterpret

_DTYPES = {torch.float32: gl.float32, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ROWS = gl.constexpr(PART_ROWS)  # of a part
_PLACES = gl.constexpr(4)  # for parts, in a slot's blocks of columns


@dataclass(frozen=True)
class Routing:
    """The constants of a `NormedRouter`, as the kernel takes them."""

    formula: Formula
    parts: int  # of each weight
    heads: int  # that share weights

    @property
    def dtype(self) -> gl.dtype:
        """Of R."""
        return _DTYPES[self.formula.r_dtype]

    @classmethod
    def of(cls, router: NormedRouter, heads: int) -> "Routing":
        """For queries of so many heads."""
        _, weight, formula = router
        return cls(formula, parts_of(weight.dtype), heads // weight.shape[0])


def routing_operands(router: NormedRouter | None) -> dict[str, Operand]:
    """The kernel's operands for a router, whose weights are cut by a kernel of its own."""
    if router is None:
        return dict.fromkeys("NW", Operand(None, None, None))
    parts = cut_router(router.weight)
    shape, strides = [1, *parts.shape], [parts.numel(), *parts.stride()]
    block = [1, 1, PART_ROWS, 64]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    descriptor = TensorDescriptor(parts, shape, strides, block, layout)
    return {"N": norm_operand(router.norm_weight), "W": Operand(descriptor, None, None)}


@gluon.jit
def router_tiles(C: gl.constexpr):
    """Shared memory for R of all consumers, tokens contiguous: [CONSUMERS * 32, 64]."""
    BY_TOKENS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    return gl.allocate_shared_memory(C.ROUTING.dtype, [C.CONSUMERS * _ROWS, 64], BY_TOKENS)


@gluon.jit
def load_router(W, h, ku_ring, full, slot, C: gl.constexpr):
    """The producer's: fill a slot with the parts of a head's weights."""
    BLOCKS: gl.constexpr = C.BLOCKS
    PARTS: gl.constexpr = C.ROUTING.parts
    shape: gl.constexpr = [C.STAGES * BLOCKS * _PLACES, 1, 1, _ROWS, 64]
    places = reinterpret(ku_ring, W.dtype, shape, W.layout)
    mbarrier.expect(full, BLOCKS * PARTS * _ROWS * 64 * 2)
    for j in gl.static_range(BLOCKS):
        for part in gl.static_range(PARTS):
            place = places.index((slot * BLOCKS + j) * _PLACES + part)
            row = [0, h // C.ROUTING.heads, part * _ROWS, j * 64]
            async_load(W, row, full, place)


@gluon.jit
def normed_queries(tiles, first: gl.constexpr, N, N_strides, h, C: gl.constexpr,
                   OPERAND: gl.constexpr):  # fmt: skip
    """A consumer's Q, normalised and, if requested, halved, block by block of columns."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    LAYOUT: gl.constexpr = OPERAND if C.Q_IN_REGISTERS else ROWS
    BLOCKS: gl.constexpr = C.BLOCKS
    gl.static_assert(BLOCKS <= 2)
    squares = gl.zeros([64], gl.float32, gl.SliceLayout(1, LAYOUT))
    for j in gl.static_range(BLOCKS):
        x = tiles.index(first + j).reshape([64, 64]).load(LAYOUT).to(gl.float32)
        squares += gl.sum(x * x, 1)
    scale = gl.rsqrt(squares / C.D + C.ROUTING.formula.norm_eps)
    last = _normed(tiles.index(first + BLOCKS - 1), scale, N, N_strides, h, BLOCKS * 64 - 64, C,
                   C.LAST, LAYOUT)  # fmt: skip
    if BLOCKS == 1:
        return (last,)
    else:
        one = _normed(tiles.index(first), scale, N, N_strides, h, 0, C, 64, LAYOUT)
        return (one, last)


@gluon.jit
def _normed(tile, scale, N, N_strides, h, c0, C: gl.constexpr, WIDTH: gl.constexpr,
            LAYOUT: gl.constexpr):  # fmt: skip
    """Columns c0.. of Q: [64, WIDTH], in registers or in shared memory."""
    tile = tile.reshape([64, 64])
    if WIDTH < 64:
        tile = tile.slice(0, WIDTH, dim=1)
    x = tile.load(LAYOUT)
    q = x.to(gl.float32) * scale.expand_dims(1)
    if N is not None:
        if C.ROUTING.formula.rounds_first:
            q = q.to(x.dtype).to(gl.float32)
        c = c0 + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
        n = gl.load(N + h * N_strides[0] + c * N_strides[1], mask=c < C.D, other=0.0)
        q *= n.to(gl.float32).expand_dims(0)
    q = q.to(x.dtype)
    if C.HALVED:
        q = (q.to(gl.float32) * 0.5).to(x.dtype)
    if C.Q_IN_REGISTERS:
        return q
    else:
        tile.store(q)
        return tile


@gluon.jit
def router_logits(q, ku_ring, slot, C: gl.constexpr):
    """Q, which may be halved, times the weights in a slot: [64, 32]."""
    BLOCKS: gl.constexpr = C.BLOCKS
    PARTS: gl.constexpr = C.ROUTING.parts
    COLUMNS: gl.constexpr = _ROWS * (PARTS if PARTS <= 2 else _PLACES)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    BY_ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    shape: gl.constexpr = [C.STAGES * BLOCKS, _PLACES * _ROWS, 64]
    ring = reinterpret(ku_ring, ku_ring.dtype, shape, BY_ROWS)
    nothing = gl.zeros([64, COLUMNS], gl.float32, LAYOUT)
    products = ()  # of blocks of columns, each [64, COLUMNS]
    for j in gl.static_range(BLOCKS):
        w = ring.index(slot * BLOCKS + j)
        if COLUMNS < _PLACES * _ROWS:
            w = w.slice(0, COLUMNS, dim=0)
        w = w.permute((1, 0))
        if j == BLOCKS - 1 and C.LAST < 64:
            w = w.slice(0, C.LAST, dim=0)
        # Each block has a sum of its own: matrix units cut what they add to one they began with.
        product = warpgroup_mma(q[j], w, nothing, use_acc=False, is_async=True)
        products = products + (product,)  # type: ignore[assignment]
    if BLOCKS == 1:
        logits = warpgroup_mma_wait(0, products)
    else:
        one, other = warpgroup_mma_wait(0, products)
        logits = one + other
    if PARTS == 2:
        left, right = _halves(logits)
        logits = left + right
    elif PARTS == 3:
        left, right = _halves(logits)
        first, second = _halves(left)
        third, _ = _halves(right)  # nothing was loaded to the fourth place
        logits = first + (second + third)
    if C.HALVED:
        logits *= 2.0
    return logits


@gluon.jit
def routed(r_tiles, e, CONSUMER: gl.constexpr, LAYOUT: gl.constexpr):
    """R of a consumer's tokens for one sub-network: [64]."""
    return r_tiles.index(CONSUMER * _ROWS + e).load(LAYOUT)


@gluon.jit
def _halves(x):
    """The left and the right columns."""
    COLUMNS: gl.constexpr = x.shape[1] // 2
    return x.reshape([64, 2, COLUMNS]).permute((0, 2, 1)).split()


@gluon.jit
def route(logits, r_tiles, CONSUMER: gl.constexpr, C: gl.constexpr):
    """Activate a consumer's logits, and store the weights in its part of shared memory."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    r = gl.convert_layout(logits, LAYOUT)
    if C.ROUTING.formula.routing != "none":
        r = 1.0 / (1.0 + gl.exp(-r))
    if C.ROUTING.formula.routing == "normalised":
        e = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, LAYOUT)).expand_dims(0)
        total = gl.sum(gl.where(e < C.E, r, 0.0), 1)
        floor: gl.constexpr = C.ROUTING.formula.sum_floor
        total = gl.maximum(total, floor, propagate_nan=tl.PropagateNan.ALL)
        r = r / (total + C.ROUTING.formula.sum_eps).expand_dims(1)
    BY_ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    tile = reinterpret(r_tiles, r_tiles.dtype, [C.CONSUMERS, _ROWS, 64], BY_ROWS).index(CONSUMER)
    tile.permute((1, 0)).store(r.to(r_tiles.dtype))
