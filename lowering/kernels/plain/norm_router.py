"""A norm of each head's queries, and a router's weights for them, in one pass over the queries.

As kernels of their own, the norm reads and writes the queries, the router's product reads them
again, and the activation reads and writes the logits. Here a program reads 64 tokens of one head,
and keeps them in their 16 bits while their squares are summed; then it normalises them, writes them
where they lay, multiplies them (router.py), and writes the weights alone. What it computes takes
less time than this memory does, if the router's weights are read and cut into their parts once: so
a program goes on to further tokens of its head, and loads the next while it computes.

A program reads a tile of tokens before it writes the first of them, and no other program's.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...device import multiprocessors
from ...problem import NormedRouter
from ...tiles import Tile
from ..launch import launch
from ..operands import Operand, norm_operand, token_axes
from ..replay import repeat
from ..verdicts import Results, small_router
from .router import (
    exact_product,
    load_head,
    load_router_weights,
    product_constants,
    require,
    store_head,
)

_TOKENS = 64  # of a tile
_PROGRAMS = 4  # on each multiprocessor: as many as the registers allow


def norm_and_route(q: Tensor, router: NormedRouter, r: Tensor) -> None:
    """Normalise `q` (B, L, H, d) where it lies, and write the weights to `r` (B, L, H, E)."""
    if q.numel() == 0:
        return
    norm_weight, weight, formula = router
    run = partial(run_norm_and_route, q, router, r)
    repeat(("norm and route", formula), (q, norm_weight, weight, r), run)


def run_norm_and_route(q: Tensor, router: NormedRouter, r: Tensor) -> None:
    """The same, with the launch described again."""
    norm_weight, weight, formula = router
    norm = None if norm_weight is None else (norm_weight.dtype, norm_weight.dim())
    require("norm and route", q, weight, (norm, formula), partial(_compare, router))
    axes = token_axes(q, r)
    constants = product_constants(q, weight)
    operands = {
        "Q": Operand(q, axes.strides(q), None),
        "N": norm_operand(norm_weight),
        "W": Operand(weight, weight.stride(), None),
        "R": Operand(r, axes.strides(r), None),
    }
    scalars = constants | {
        "B": axes.batch,
        "H": q.shape[2],
        "L": axes.length,
        "BM": _TOKENS,
    }
    # R's dtype is seen from R.
    scalars |= {name.upper(): constant for name, constant in formula._asdict().items()}
    del scalars["R_DTYPE"]
    heads = q.shape[2]
    tiles = triton.cdiv(axes.length, _TOKENS) * axes.batch
    programs = heads * min(tiles, max(1, _PROGRAMS * multiprocessors(q.device) // heads))
    tile = Tile(_TOKENS, constants["BE"], 4, 2, descriptors=False)
    launch(mhf_norm_and_route_kernel, programs, tile, q.device, operands, scalars)


def _compare(router: NormedRouter, q: Tensor, weight: Tensor) -> Results:
    from ...ops.norm_router import norm_and_route_on_cpu

    small = small_router(router, q)
    r = q.new_empty((*q.shape[:3], weight.shape[2]), dtype=router.formula.r_dtype)
    expected = q.clone(), torch.empty_like(r)
    norm_and_route_on_cpu(expected[0], small, expected[1])
    run_norm_and_route(q, small, r.fill_(math.nan))
    return [(q, expected[0]), (r.to(q.dtype), expected[1])]


@triton.jit
def mhf_norm_and_route_kernel(
    Q, N, W, R, Q_strides, N_strides, W_strides, R_strides, B, L,
    NORM_EPS: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
    ROUTING: tl.constexpr, SUM_FLOOR: tl.constexpr, SUM_EPS: tl.constexpr,
    H: tl.constexpr, E: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    Q_PARTS: tl.constexpr, W_PARTS: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Some tiles of tokens of one head, loading one while it computes another."""
    token_tiles = tl.cdiv(L, BM)
    heads_programs = tl.num_programs(0) // H
    h = tl.program_id(0) % H  # together, programs that run at once read whole rows of all heads
    e = tl.arange(0, BE)

    weights = ()  # of blocks of columns, each [BE, BD]
    for c0 in tl.static_range(0, D, BD):
        c = c0 + tl.arange(0, BD)
        w = load_router_weights(W, W_strides, h // HEADS_PER_GROUP, c, e, D, E)
        weights = weights + (w,)  # type: ignore[assignment]
    for tile in tl.range(tl.program_id(0) // H, token_tiles * B, heads_programs):
        b = tile // token_tiles
        l = tile % token_tiles * BM + tl.arange(0, BM)
        blocks = ()  # of columns, each [BM, BD]
        squares = tl.zeros((BM,), tl.float32)
        for c0 in tl.static_range(0, D, BD):
            q = load_head(Q, Q_strides, b, l, h, c0 + tl.arange(0, BD), L, D)
            blocks = blocks + (q,)  # type: ignore[assignment]
            squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
        scale = tl.rsqrt(squares / D + NORM_EPS)[:, None]

        logits = tl.zeros((BM, BE), tl.float32)
        for block in tl.static_range(len(blocks)):
            c = block * BD + tl.arange(0, BD)
            q = blocks[block].to(tl.float32) * scale
            if N is not None:
                if ROUNDS_FIRST:
                    q = q.to(Q.dtype.element_ty).to(tl.float32)
                pointers = N + h * N_strides[0] + c * N_strides[1]
                q = q * tl.load(pointers, mask=c < D, other=0.0).to(tl.float32)[None, :]
            q = q.to(Q.dtype.element_ty)
            store_head(Q, q, Q_strides, b, l, h, c, L, D)
            logits += exact_product(q, weights[block], Q_PARTS, W_PARTS, APART)  # [BM, BE]

        if ROUTING == "none":
            r = logits
        else:
            r = tl.sigmoid(logits)
            if ROUTING == "normalised":
                total = tl.sum(tl.where((e < E)[None, :], r, 0.0), 1)
                total = tl.maximum(total, SUM_FLOOR, propagate_nan=tl.PropagateNan.ALL) + SUM_EPS
                r = r / total[:, None]
        store_head(R, r, R_strides, b, l, h, e, L, E)
