"""The forward kernel for Hopper, in Gluon: warps that load, warps that compute, and no other waits.

Plain Triton (plain/forward.py) levels off because its warps do everything together: products, then
activations, then products. Here one producer warp streams K, U and V tiles through a ring of shared
memory by TMA, and each consumer, a group of four warps, owns 64 tokens:

    producer   Q   KU V   KU V   KU V  ...            ring of slots, with a barrier for each part
    consumer   KU0 | KU1 V0 | KU2 V1 | ... | Vn       products, issued to the matrix unit
               act0    act1     act2                  activations, while V's product runs

A K and a U tile lie one after the other, so that one wide product makes both halves of the hidden
tile: it reads Q from the registers half as often. The product with V trails by one tile. It is
issued after the next tile's product with K and U, so that the matrix unit has work while this
consumer activates, and the other consumers fill the rest. All products of one turn are issued and
awaited within it: one that were still running at the end of a loop's body would be serialised by
the assembler.

That is one schedule of three (`Schedule` in tiles.py). Networks without U have less to multiply for
each activation: there the two consumers take turns. One issues V's product and the next tile's,
and hands the matrix unit over to the other, which has activated meanwhile; without turns both would
wait for the same tiles, multiply together and activate together. The narrowest heads have room for
a third consumer, and then plain order is as good.

    consumer 0   KU0 |      | V0 KU1 |        | V1 KU2 | ...   products
    consumer 1       | KU0  |        | V0 KU1 |        | ...

A slot of the ring is given back in two parts, K and U when they have been multiplied, V one turn
later, so that the next K and U are on their way meanwhile.

The kernel is persistent, one program to a multiprocessor, so that the producer loads the next
tile's operands while the last one is stored. The tiles of an incomplete last round are cut along
the hidden units (splitting.py), because 31 rounds and 4 tiles would otherwise take as long as 32.

R is loaded before the products of the tile that it weights, since some of its loads miss the
cache, and so are the biases of K and U, to which the products are added. Where the op is to
normalise and route the queries as well, each consumer does so with its own and finds R in shared
memory (routing.py).

Ragged edges need no mask: TMA fills with zeros what lies beyond L, F or D and drops what is stored
there. Contractions over the head width go by blocks of 64, the last of which may be narrower; the
product with V and the output are padded to a power of two, and to 64 at least: tiles of heads
narrower than that lie in memory for 64 columns, but Q meets only the ones it has in K and U.

`_plan` says which problems fit; plain/forward.py takes all others.
"""

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...device import multiprocessors
from ...problem import NormedRouter, Problem
from ...tiles import HopperForwardTile, Tile, padded_width
from ..activations import activate, activate_twice
from ..launch import allows_approximation, launch
from ..operands import (
    Operand,
    TokenAxes,
    bias_operand,
    router_operand,
    token_axes,
    token_operand,
    weight_operand,
)
from ..splitting import add_parts, split_last_round
from .compat import async_load, async_store, reinterpret
from .routing import (
    Routing,
    load_router,
    normed_queries,
    route,
    routed,
    router_logits,
    router_tiles,
    routing_operands,
)

_TOKENS = 64  # of one consumer: the rows of a warp-group's matrix instruction
_COLUMNS = 64  # of a block of Q, K and U: what one swizzled row of shared memory holds
_WARPS = 4  # of one consumer
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def run_forward(problem: Problem, out: Tensor, tile: HopperForwardTile) -> bool:
    """Fill `out` (B, L, H, d); False where a tensor's strides or address rule it out."""
    return _run(problem, out, None, tile)


def run_normed_forward(
    problem: Problem, out: Tensor, router: NormedRouter, tile: HopperForwardTile
) -> bool:
    """The same for the queries that it normalises and routes first; `out` may be their memory."""
    return _run(problem, out, router, tile)


class _Plan(NamedTuple):
    """A problem's operands, all of which suit the kernel."""

    axes: TokenAxes
    operands: dict[str, Operand]
    layouts: dict[str, str | None]  # of K and V


def _plan(problem: Problem, out: Tensor, tile: HopperForwardTile) -> _Plan | None:
    """How to run `problem`, or None where a tensor's strides or address forbid it."""
    axes = token_axes(problem.q, problem.r, out)
    block = Tile(_TOKENS, tile.hidden, _WARPS, tile.stages, True, columns=_COLUMNS)
    operands = {
        "Q": token_operand(problem.q, axes, block),
        "K": weight_operand(problem.k, block),
        "U": weight_operand(problem.u, block),
        "V": weight_operand(problem.v, block),
        "Out": token_operand(out, axes, block),
    }
    if problem.u is not None and operands["K"].layout != operands["U"].layout:
        return None  # one product takes both
    layouts = {name: operands[name].layout for name in "KV"}
    for name, operand in operands.items():
        descriptor = operand.argument
        if descriptor is not None:
            if operand.layout == "pointer":
                return None
            if name in "QKU":
                axis = 2 if operand.layout == "columns" else 3
                descriptor = _in_blocks(descriptor, axis, _COLUMNS)
            elif name == "Out":
                descriptor = _in_blocks(descriptor, 3, tile.out_columns)
            descriptor = _with_layout(descriptor)
        operands[name] = Operand(descriptor, None, None)
    # Through pointers, for any strides: a value serves several tiles of hidden units.
    block = dataclasses.replace(block, descriptors=False)
    operands["R"] = router_operand(problem.r, axes, block)._replace(layout=None)
    operands["K_bias"] = bias_operand(problem.k_bias)
    operands["U_bias"] = bias_operand(problem.u_bias)
    operands["V_bias"] = bias_operand(problem.v_bias)
    return _Plan(axes, operands, layouts)


def _run(
    problem: Problem, out: Tensor, router: NormedRouter | None, tile: HopperForwardTile
) -> bool:
    plan = _plan(problem, out, tile)
    if plan is None:
        return False
    axes, operands, layouts = plan
    sub_networks, hidden = problem.k.shape[1:3]
    rows = tile.consumers * _TOKENS
    tiles = triton.cdiv(axes.length, rows) * axes.batch * problem.q.shape[2]
    programs = multiprocessors(out.device)
    split = split_last_round(tiles, sub_networks * triton.cdiv(hidden, tile.hidden), programs)
    partial = split.workspace(tiles, rows, out)
    halved = _halves_exactly(problem)
    out_scale = problem.out_scale * (2.0 if halved and problem.u is not None else 1.0)
    block = Tile(rows, tile.hidden, _WARPS, 1, True, columns=_COLUMNS)
    heads, head_dim = problem.q.shape[2:]
    constants = Constants(
        E=sub_networks,
        F=hidden,
        D=head_dim,
        HEADS_PER_GROUP=heads // problem.k.shape[0],
        ACTIVATION=problem.activation,
        K_SCALE=problem.k_scale,
        U_SCALE=problem.u_scale,
        OUT_SCALE=out_scale,
        APPROXIMATE=allows_approximation(problem.q.dtype),
        HALVED=halved,
        BIASES_FIRST=_biases_first(problem),
        GATED=problem.u is not None,
        K_LAYOUT=layouts["K"],
        V_LAYOUT=layouts["V"],
        BF=tile.hidden,
        BD=block.padded_width(head_dim),
        F_TILES=triton.cdiv(hidden, tile.hidden),
        BLOCKS=triton.cdiv(head_dim, _COLUMNS),
        LAST=padded_width(head_dim % _COLUMNS or _COLUMNS),
        PAIR=1 if problem.u is None else 2,
        CONSUMERS=tile.consumers,
        STAGES=tile.stages,
        REGISTERS=tile.registers,
        Q_IN_REGISTERS=tile.q_in_registers,
        SCHEDULE=tile.schedule,
        OUT_COLUMNS=tile.out_columns,
        ROUTING=None if router is None else Routing.of(router, heads),
    )
    scalars = {
        "B": axes.batch,
        "L": axes.length,
        "TILES": tiles,
        "WHOLE": split.whole,
        "PARTS": split.parts,
        "C": constants,
    }
    operands = operands | {"Part": Operand(partial, None, None)} | routing_operands(router)
    programs = min(programs, split.pieces(tiles))
    launch(mhf_hopper_forward_kernel, programs, block, out.device, operands, scalars)
    if partial is not None:
        add_parts(partial, out, axes, split, tiles, out_scale)
    return True


def _halves_exactly(problem: Problem) -> bool:
    """Whether to compute with q / 2, which saves the activation's own halving of every hidden unit.

    silu(m) is x + x tanh(x) at x = m / 2, and gelu is much like it. Halving a bfloat16 is exact,
    float16 has too few exponents for it.
    """
    plain = problem.k_scale == problem.u_scale == 1.0
    biased = any(x is not None for x in (problem.k_bias, problem.u_bias, problem.v_bias))
    return (
        problem.activation in ("silu", "gelu")
        and problem.q.dtype == torch.bfloat16
        and plain
        and (problem.u is None or not biased)
    )


def _biases_first(problem: Problem) -> bool:
    """Whether products are added to the biases of K and U, whose loads then overlap with them."""
    biased = problem.k_bias is not None or problem.u_bias is not None
    return biased and problem.k_scale == problem.u_scale == 1.0


def _in_blocks(descriptor: Any, axis: int, columns: int) -> TensorDescriptor:
    """The descriptor, with the head width in blocks of so many columns."""
    block = list(descriptor.block_shape)
    block[axis] = columns
    return dataclasses.replace(descriptor, block_shape=block)


def _with_layout(descriptor: Any) -> TensorDescriptor:
    """Gluon's descriptor of the same memory, which also says how a tile lies in shared memory."""
    block = list(descriptor.block_shape)
    layout = _shared_layout(tuple(block), _DTYPES[descriptor.base.dtype])
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    return TensorDescriptor(descriptor.base, shape, strides, block, layout)


@lru_cache
def _shared_layout(block: tuple[int, ...], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


@dataclasses.dataclass(frozen=True)
class Constants:
    """All that the kernel is compiled for: sizes, the network, and how the work is cut.

    One argument stands for all of them, and is passed on whole: each attribute of it is a constant.
    There are fields alone, no properties: Triton knows a compiled kernel by their values. A string
    has to be named a constant before it is passed on by itself (Triton 3.6).
    """

    E: int  # sub-networks
    F: int  # hidden units of each
    D: int  # width of a head
    HEADS_PER_GROUP: int
    ACTIVATION: str
    K_SCALE: float
    U_SCALE: float
    OUT_SCALE: float
    APPROXIMATE: bool
    HALVED: bool  # computes with q / 2
    BIASES_FIRST: bool  # products are added to the biases of K and U
    GATED: bool
    K_LAYOUT: str | None  # U's, too
    V_LAYOUT: str | None
    BF: int
    BD: int
    F_TILES: int  # of a sub-network
    BLOCKS: int  # of 64 columns of Q, K and U
    LAST: int  # columns of the last of these, padded
    PAIR: int  # tiles that one product with Q takes: K's and U's
    CONSUMERS: int
    STAGES: int
    REGISTERS: int
    Q_IN_REGISTERS: bool
    SCHEDULE: str
    OUT_COLUMNS: int  # that are stored at once
    ROUTING: Routing | None


@gluon.jit(do_not_specialize=["TILES", "WHOLE", "PARTS"])
def mhf_hopper_forward_kernel(
    Q, K, U, V, R, K_bias, U_bias, V_bias, Out, Part, N, W,
    Q_strides, K_strides, U_strides, V_strides, R_strides,
    K_bias_strides, U_bias_strides, V_bias_strides, Out_strides, Part_strides,
    N_strides, W_strides,
    B, L, TILES, WHOLE, PARTS,
    C: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = Q.dtype
    BD: gl.constexpr = C.BD
    CONSUMERS: gl.constexpr = C.CONSUMERS
    STAGES: gl.constexpr = C.STAGES
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS * (BD // 64), 1, 1, 64, 64], Q.layout)
    out_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, C.OUT_COLUMNS], Out.layout)
    ku_ring = gl.allocate_shared_memory(
        dtype, [STAGES * C.BLOCKS * C.PAIR] + K.block_type.shape, K.layout
    )
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + V.block_type.shape, V.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    ku_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ku_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
        mbarrier.init(turns.index(c), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ku_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(ku_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    if C.ROUTING is None:
        memory = (q_tiles, out_tiles, ku_ring, v_ring, None)
    else:
        r_tiles = router_tiles(C)
        memory = (q_tiles, out_tiles, ku_ring, v_ring, r_tiles)
    barriers = (q_full, q_empty, ku_full, v_full, ku_empty, v_empty, turns)
    work = (B, L, TILES, WHOLE, PARTS)
    operands = (R, K_bias, U_bias, V_bias, Out, Part, N)
    strides = (R_strides, K_bias_strides, U_bias_strides, V_bias_strides, N_strides)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, operands, strides, memory, barriers, work, C)),
                (_consume, (1, operands, strides, memory, barriers, work, C)),
                (_produce, (Q, K, U, V, W, memory, barriers, work, C)),
            ],
            [4, 1], [C.REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (0, operands, strides, memory, barriers, work, C)),
                (_consume, (1, operands, strides, memory, barriers, work, C)),
                (_consume, (2, operands, strides, memory, barriers, work, C)),
                (_produce, (Q, K, U, V, W, memory, barriers, work, C)),
            ],
            [4, 4, 1], [C.REGISTERS, C.REGISTERS, 24],
        )  # fmt: skip


@gluon.jit
def _piece(piece, work, ROWS: gl.constexpr, ITERATIONS: gl.constexpr):
    """The first token, sequence and head of a piece of work, and its range of hidden tiles."""
    B, L, _, WHOLE, PARTS = work
    tile = piece
    first = 0
    last = ITERATIONS
    if piece >= WHOLE:
        part = (piece - WHOLE) % PARTS
        tile = WHOLE + (piece - WHOLE) // PARTS
        first = part * ITERATIONS // PARTS
        last = (part + 1) * ITERATIONS // PARTS
    # Token tiles fastest: programs that run together read the same head's weights from L2.
    token_tiles = (L + ROWS - 1) // ROWS
    l0 = tile % token_tiles * ROWS
    b = tile // token_tiles % B
    h = tile // token_tiles // B
    return l0, b, h, first, last


@gluon.jit
def _pieces(work):
    _, _, TILES, WHOLE, PARTS = work
    return WHOLE + (TILES - WHOLE) * PARTS


@gluon.jit
def _produce(Q, K, U, V, W, memory, barriers, work, C: gl.constexpr):
    """The producer, one warp: keeps the ring full, and loads the next Q once its buffer is free."""
    q_tiles, _, ku_ring, v_ring, _ = memory
    q_full, q_empty, ku_full, v_full, ku_empty, v_empty, _ = barriers
    F_TILES: gl.constexpr = C.F_TILES
    BLOCKS: gl.constexpr = C.BLOCKS
    PAIR: gl.constexpr = C.PAIR
    BF: gl.constexpr = C.BF
    BD: gl.constexpr = C.BD
    CONSUMERS: gl.constexpr = C.CONSUMERS
    STAGES: gl.constexpr = C.STAGES
    K_LAYOUT: gl.constexpr = C.K_LAYOUT
    V_LAYOUT: gl.constexpr = C.V_LAYOUT
    slot = 0
    lap = 1  # parity of the ring's passes: the slots of the first one are empty
    turn = 1
    for piece in range(gl.program_id(0), _pieces(work), gl.num_programs(0)):
        l0, b, h, first, last = _piece(piece, work, CONSUMERS * 64, C.E * F_TILES)
        g = h // C.HEADS_PER_GROUP
        for c in gl.static_range(CONSUMERS):
            full = q_full.index(c)
            mbarrier.wait(q_empty.index(c), turn)
            mbarrier.expect(full, BLOCKS * 64 * 64 * 2)
            for j in gl.static_range(BLOCKS):
                q_tile = q_tiles.index(c * (BD // 64) + j)
                async_load(Q, [b, h, l0 + c * 64, j * 64], full, q_tile)
        turn ^= 1
        if C.ROUTING is not None:  # a slot of its own, in which no warp waits for V
            mbarrier.wait(ku_empty.index(slot), lap)
            mbarrier.wait(v_empty.index(slot), lap)
            load_router(W, h, ku_ring, ku_full.index(slot), slot, C)
            mbarrier.arrive(v_full.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                lap ^= 1
        for i in range(first, last):
            e = i // F_TILES
            f0 = i % F_TILES * BF
            mbarrier.wait(ku_empty.index(slot), lap)
            full = ku_full.index(slot)
            mbarrier.expect(full, BLOCKS * PAIR * BF * 64 * 2)
            for j in gl.static_range(BLOCKS):
                place = (slot * BLOCKS + j) * PAIR
                _load(K, g, e, f0, j * 64, full, ku_ring.index(place), K_LAYOUT)
                if U is not None:
                    _load(U, g, e, f0, j * 64, full, ku_ring.index(place + 1), K_LAYOUT)
            mbarrier.wait(v_empty.index(slot), lap)
            full = v_full.index(slot)
            mbarrier.expect(full, BF * BD * 2)
            _load(V, g, e, f0, 0, full, v_ring.index(slot), V_LAYOUT)
            slot += 1
            if slot == STAGES:
                slot = 0
                lap ^= 1


@gluon.jit
def _load(W, g, e, f0, c0, full, tile, LAYOUT: gl.constexpr):
    if LAYOUT == "rows":
        async_load(W, [g, e, f0, c0], full, tile)
    else:
        async_load(W, [g, e, c0, f0], full, tile)


@gluon.jit
def _query(tile, C: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """A block of Q, halved if requested: [64, WIDTH], in registers or in shared memory."""
    tile = tile.reshape([64, 64])
    if WIDTH < 64:
        tile = tile.slice(0, WIDTH, dim=1)
    if C.Q_IN_REGISTERS:
        q = tile.load(LAYOUT)
        if C.HALVED:
            q = (q.to(gl.float32) * 0.5).to(q.dtype)
        return q
    else:
        if C.HALVED:
            ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            tile.store((tile.load(ROWS).to(gl.float32) * 0.5).to(tile.dtype))
        return tile


@gluon.jit
def _queries(tiles, first: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr):
    """A consumer's Q, block by block."""
    q = _query(tiles.index(first + C.BLOCKS - 1), C, C.LAST, LAYOUT)
    if C.BLOCKS == 1:
        return (q,)
    elif C.BLOCKS == 2:
        return (_query(tiles.index(first), C, 64, LAYOUT), q)
    elif C.BLOCKS == 3:
        return (
            _query(tiles.index(first), C, 64, LAYOUT),
            _query(tiles.index(first + 1), C, 64, LAYOUT),
            q,
        )
    else:
        return (
            _query(tiles.index(first), C, 64, LAYOUT),
            _query(tiles.index(first + 1), C, 64, LAYOUT),
            _query(tiles.index(first + 2), C, 64, LAYOUT),
            q,
        )


@gluon.jit
def _project(q, ku_ring, full, slot, lap, start, dtype: gl.constexpr, C: gl.constexpr):
    """Issue Q's product with a slot's K and U tiles as one instruction: [64, PAIR * BF].

    It is added to `start` if that holds the biases.
    """
    BLOCKS: gl.constexpr = C.BLOCKS
    ROWS: gl.constexpr = C.PAIR * C.BF
    if C.K_LAYOUT == "rows":  # of each block of 64 columns, K's rows and then U's
        BY_ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        ring = reinterpret(ku_ring, dtype, [C.STAGES * BLOCKS, ROWS, 64], BY_ROWS)
    else:  # of each block of 64 rows, K's columns and then U's
        SWIZZLE: gl.constexpr = min(C.BF * 2, 128)
        BY_COLUMNS: gl.constexpr = gl.NVMMASharedLayout(SWIZZLE, 16, 2)
        ring = reinterpret(ku_ring, dtype, [C.STAGES * BLOCKS, 64, ROWS], BY_COLUMNS)
    mbarrier.wait(full.index(slot), lap)
    mn = start
    for j in gl.static_range(BLOCKS):
        ku = ring.index(slot * BLOCKS + j)
        if C.K_LAYOUT == "rows":
            ku = ku.permute((1, 0))
        if j == BLOCKS - 1 and C.LAST < 64:
            ku = ku.slice(0, C.LAST, dim=0)
        mn = warpgroup_mma(q[j], ku, mn, use_acc=C.BIASES_FIRST or j > 0, is_async=True)
    return mn


@gluon.jit
def _value(v_ring, slot, C: gl.constexpr):
    """A slot's V tile, however it is stored: [BF, BD]."""
    if C.V_LAYOUT == "rows":
        return v_ring.index(slot).reshape([C.BF, C.BD])
    else:
        return v_ring.index(slot).reshape([C.BD, C.BF]).permute((1, 0))


@gluon.jit
def _bias(X, strides, g, e, f0, FROM: gl.constexpr, TO: gl.constexpr, F: gl.constexpr,
          COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Entries f0.. of a bias (G, E, F), zero beyond F, in columns FROM to TO: float32 [1, COLUMNS].

    All other columns are zero.
    """
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    f = f0 + column - FROM
    X += gl.cast(g, gl.int64) * strides[0] + gl.cast(e, gl.int64) * strides[1]
    if FROM == 0 and TO == COLUMNS and F % COLUMNS == 0:
        x = gl.load(X + f * strides[2])
    else:
        inside = (column >= FROM) & (column < TO) & (f < F)
        x = gl.load(X + f * strides[2], mask=inside, other=0.0)
    return x.to(gl.float32).expand_dims(0)


@gluon.jit
def _start(i, g, operands, strides, C: gl.constexpr, LAYOUT: gl.constexpr):
    """What the product of hidden tile i is added to: biases, or nothing: [64, PAIR * BF].

    Call it before the products of the tile, so that the loads overlap with them.
    """
    _, K_bias, U_bias, _, _, _, _ = operands
    _, K_bias_strides, U_bias_strides, _, _ = strides
    BF: gl.constexpr = C.BF
    COLUMNS: gl.constexpr = C.PAIR * BF
    if C.BIASES_FIRST:
        e = i // C.F_TILES
        f0 = i % C.F_TILES * BF
        if U_bias is None:
            biases = _bias(K_bias, K_bias_strides, g, e, f0, 0, BF, C.F, COLUMNS, LAYOUT)
        else:
            biases = _bias(U_bias, U_bias_strides, g, e, f0, BF, COLUMNS, C.F, COLUMNS, LAYOUT)
            if K_bias is not None:
                biases += _bias(K_bias, K_bias_strides, g, e, f0, 0, BF, C.F, COLUMNS, LAYOUT)
        if C.HALVED:
            biases *= 0.5
        return biases + gl.full([64, COLUMNS], -0.0, gl.float32, LAYOUT)  # in all rows, for nothing
    else:
        return gl.zeros([64, COLUMNS], gl.float32, LAYOUT)


@gluon.jit
def _router_weights(i, router, F_TILES: gl.constexpr, CONSUMER: gl.constexpr,
                    LAYOUT: gl.constexpr):  # fmt: skip
    """R of a consumer's tokens for hidden tile i, ones where there is none: [64].

    Call it before the products of the tile, so that the loads overlap with them.
    """
    R_row, step, inside, r_tiles = router
    e = i // F_TILES
    if r_tiles is not None:
        return routed(r_tiles, e, CONSUMER, LAYOUT)
    elif R_row is not None:
        return gl.load(R_row + gl.cast(e, gl.int64) * step, mask=inside, other=0.0)
    else:
        return gl.full([64], 1.0, gl.float32, LAYOUT)


@gluon.jit
def _activate(mn, i, g, r, operands, strides, dtype: gl.constexpr, C: gl.constexpr,
              HIDDEN: gl.constexpr, A_OPERAND: gl.constexpr):  # fmt: skip
    """R act(m) n for hidden tile i, ready to be multiplied by V: [64, BF]."""
    _, K_bias, U_bias, _, _, _, _ = operands
    _, K_bias_strides, U_bias_strides, _, _ = strides
    BF: gl.constexpr = C.BF
    ACTIVATION: gl.constexpr = C.ACTIVATION
    e = i // C.F_TILES
    f0 = i % C.F_TILES * BF
    if C.GATED:
        m, n = mn.reshape([64, 2, BF]).permute((0, 2, 1)).split()
        m = gl.convert_layout(m, HIDDEN)
    else:
        m = mn
    if C.K_SCALE != 1.0:
        m *= C.K_SCALE
    if K_bias is not None and not C.BIASES_FIRST:
        m += _bias(K_bias, K_bias_strides, g, e, f0, 0, BF, C.F, BF, HIDDEN)
    if C.HALVED:
        a = activate_twice(m, ACTIVATION, C.APPROXIMATE)
    else:
        a = activate(m, ACTIVATION, C.APPROXIMATE)
    # Where activations are what takes time, two elements are multiplied by R at once. In bfloat16,
    # which has the exponents of float32, that costs a second rounding and no range.
    PAIRED: gl.constexpr = C.BD == 64 and dtype == gl.bfloat16 and r.dtype == gl.bfloat16
    if not PAIRED:
        a *= r.to(gl.float32).expand_dims(1)
    if C.GATED:
        n = gl.convert_layout(n, HIDDEN)
        if C.U_SCALE != 1.0:
            n *= C.U_SCALE
        if U_bias is not None and not C.BIASES_FIRST:
            n += _bias(U_bias, U_bias_strides, g, e, f0, 0, BF, C.F, BF, HIDDEN)
        a *= n
    a = a.to(dtype)
    if PAIRED:
        a *= r.expand_dims(1)
    return gl.convert_layout(a, A_OPERAND)


@gluon.jit
def _store_columns(Out, columns, tile, b, h, l, c0: gl.constexpr):
    """Store columns of the output from c0 on through shared memory, once that is free: [64, ..]."""
    WIDTH: gl.constexpr = columns.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    columns = gl.convert_layout(columns.to(tile.dtype), LAYOUT)
    tma.store_wait(0)
    tile.reshape([64, WIDTH]).store(columns)
    fence_async_shared()
    async_store(Out, [b, h, l, c0], tile)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _store(Out, out, tile, b, h, l, C: gl.constexpr):
    """Store a consumer's output, in pieces that its tile of shared memory holds: [64, BD]."""
    WIDTH: gl.constexpr = C.OUT_COLUMNS
    if C.BD == WIDTH:
        _store_columns(Out, out, tile, b, h, l, 0)
    else:
        left, right = _halves(out)
        if C.BD == 2 * WIDTH:
            _store_columns(Out, left, tile, b, h, l, 0)
            _store_columns(Out, right, tile, b, h, l, WIDTH)
        else:
            gl.static_assert(C.BD == 4 * WIDTH)
            first, second = _halves(left)
            third, fourth = _halves(right)
            _store_columns(Out, first, tile, b, h, l, 0)
            _store_columns(Out, second, tile, b, h, l, WIDTH)
            _store_columns(Out, third, tile, b, h, l, 2 * WIDTH)
            _store_columns(Out, fourth, tile, b, h, l, 3 * WIDTH)


@gluon.jit
def _consume(CONSUMER: gl.constexpr, operands, strides, memory, barriers, work, C: gl.constexpr):
    """A consumer of four warps: 64 tokens of each of the program's tiles."""
    R, _, _, V_bias, Out, Part, N = operands
    R_strides, _, _, V_bias_strides, N_strides = strides
    q_tiles, out_tiles, ku_ring, v_ring, r_tiles = memory
    q_full, q_empty, ku_full, v_full, ku_empty, v_empty, turns = barriers
    _, L, _, WHOLE, _ = work
    dtype: gl.constexpr = q_tiles.dtype
    ITERATIONS: gl.constexpr = C.E * C.F_TILES
    PAIR: gl.constexpr = C.PAIR
    BF: gl.constexpr = C.BF
    BD: gl.constexpr = C.BD
    STAGES: gl.constexpr = C.STAGES
    SCHEDULE: gl.constexpr = C.SCHEDULE
    PROJECTED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIR * BF, 16])
    HIDDEN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BF, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    Q_OPERAND: gl.constexpr = gl.DotOperandLayout(0, PROJECTED, 2)
    A_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, HIDDEN)
    rows = CONSUMER * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, HIDDEN))
    slot = 0
    lap = 0
    turn = 0
    mine = 1 - CONSUMER  # parity of the turns at the matrix unit: the first consumer begins
    for piece in range(gl.program_id(0), _pieces(work), gl.num_programs(0)):
        l0, b, h, first, last = _piece(piece, work, C.CONSUMERS * 64, ITERATIONS)
        g = h // C.HEADS_PER_GROUP
        inside = l0 + rows < L
        if R is not None:
            r_row = R + (gl.cast(b, gl.int64) * R_strides[0] + gl.cast(h, gl.int64) * R_strides[2])
            r_row += (l0 + rows).to(gl.int64) * R_strides[1]
            router = (r_row, R_strides[3], inside, r_tiles)
        else:
            router = (R, 0, inside, r_tiles)
        mbarrier.wait(q_full.index(CONSUMER), turn)
        turn ^= 1
        if C.ROUTING is None:
            q = _queries(q_tiles, CONSUMER * (BD // 64), C, Q_OPERAND)
        else:
            q = normed_queries(q_tiles, CONSUMER * (BD // 64), N, N_strides, h, C, Q_OPERAND)
        # What was written to the tile must be visible to the matrix unit. And what is still being
        # read from it into registers must have been read before the tensor copy engine writes the
        # next Q there: a barrier does not order the two, and a producer that waits for nothing else
        # would overtake the reads.
        if C.Q_IN_REGISTERS or C.HALVED or C.ROUTING is not None:
            fence_async_shared()
        if C.Q_IN_REGISTERS:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)

        if C.ROUTING is not None:
            mbarrier.wait(ku_full.index(slot), lap)
            logits = router_logits(q, ku_ring, slot, C)
            route(logits, r_tiles, CONSUMER, C)
            mbarrier.arrive(ku_empty.index(slot), count=1)
            mbarrier.arrive(v_empty.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                lap ^= 1
        acc = gl.zeros([64, BD], gl.float32, OUTPUT)
        if SCHEDULE == "trailing":
            start = _start(first, g, operands, strides, C, PROJECTED)
            mn = _project(q, ku_ring, ku_full, slot, lap, start, dtype, C)
            r = _router_weights(first, router, C.F_TILES, CONSUMER, R_LAYOUT)
            mn = warpgroup_mma_wait(0, [mn])
            mbarrier.arrive(ku_empty.index(slot), count=1)
            a = _activate(mn, first, g, r, operands, strides, dtype, C, HIDDEN, A_OPERAND)
            for i in range(first + 1, last):
                trailing = slot
                trailing_lap = lap
                slot += 1
                if slot == STAGES:
                    slot = 0
                    lap ^= 1
                r = _router_weights(i, router, C.F_TILES, CONSUMER, R_LAYOUT)
                start = _start(i, g, operands, strides, C, PROJECTED)
                mn = _project(q, ku_ring, ku_full, slot, lap, start, dtype, C)
                mbarrier.wait(v_full.index(trailing), trailing_lap)
                v = _value(v_ring, trailing, C)
                acc = warpgroup_mma(a, v, acc, is_async=True)
                mn = warpgroup_mma_wait(1, [mn])
                mbarrier.arrive(ku_empty.index(slot), count=1)
                a = _activate(mn, i, g, r, operands, strides, dtype, C, HIDDEN, A_OPERAND)
                acc = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(v_empty.index(trailing), count=1)
            mbarrier.wait(v_full.index(slot), lap)
            acc = warpgroup_mma(a, _value(v_ring, slot, C), acc)
            mbarrier.arrive(v_empty.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                lap ^= 1
        elif SCHEDULE == "turns":
            r = _router_weights(first, router, C.F_TILES, CONSUMER, R_LAYOUT)
            start = _start(first, g, operands, strides, C, PROJECTED)
            mbarrier.wait(turns.index(CONSUMER), mine)
            mn = _project(q, ku_ring, ku_full, slot, lap, start, dtype, C)
            mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
            mine ^= 1
            mn = warpgroup_mma_wait(0, [mn])
            mbarrier.arrive(ku_empty.index(slot), count=1)
            a = _activate(mn, first, g, r, operands, strides, dtype, C, HIDDEN, A_OPERAND)
            for i in range(first + 1, last):
                previous = slot
                previous_lap = lap
                slot += 1
                if slot == STAGES:
                    slot = 0
                    lap ^= 1
                r = _router_weights(i, router, C.F_TILES, CONSUMER, R_LAYOUT)
                start = _start(i, g, operands, strides, C, PROJECTED)
                mbarrier.wait(v_full.index(previous), previous_lap)
                mbarrier.wait(turns.index(CONSUMER), mine)
                acc = warpgroup_mma(a, _value(v_ring, previous, C), acc, is_async=True)
                mn = _project(q, ku_ring, ku_full, slot, lap, start, dtype, C)
                mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
                mine ^= 1
                acc, mn = warpgroup_mma_wait(0, [acc, mn])
                mbarrier.arrive(v_empty.index(previous), count=1)
                mbarrier.arrive(ku_empty.index(slot), count=1)
                a = _activate(mn, i, g, r, operands, strides, dtype, C, HIDDEN, A_OPERAND)
            mbarrier.wait(v_full.index(slot), lap)
            mbarrier.wait(turns.index(CONSUMER), mine)
            acc = warpgroup_mma(a, _value(v_ring, slot, C), acc, is_async=True)
            mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
            mine ^= 1
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(v_empty.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                lap ^= 1
        else:
            for i in range(first, last):
                r = _router_weights(i, router, C.F_TILES, CONSUMER, R_LAYOUT)
                start = _start(i, g, operands, strides, C, PROJECTED)
                mn = _project(q, ku_ring, ku_full, slot, lap, start, dtype, C)
                mn = warpgroup_mma_wait(0, [mn])
                mbarrier.arrive(ku_empty.index(slot), count=1)
                a = _activate(mn, i, g, r, operands, strides, dtype, C, HIDDEN, A_OPERAND)
                mbarrier.wait(v_full.index(slot), lap)
                acc = warpgroup_mma(a, _value(v_ring, slot, C), acc)
                mbarrier.arrive(v_empty.index(slot), count=1)
                slot += 1
                if slot == STAGES:
                    slot = 0
                    lap ^= 1

        if not C.Q_IN_REGISTERS:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        if V_bias is not None:
            for e in range(0, gl.where(first == 0, C.E, 0)):  # once for each tile
                bias = _bias(V_bias, V_bias_strides, g, e, 0, 0, BD, C.D, BD, OUTPUT)
                weight = _router_weights(e, router, 1, CONSUMER, R_LAYOUT).to(gl.float32)
                weight = gl.convert_layout(weight, gl.SliceLayout(1, OUTPUT))
                acc += weight.expand_dims(1) * bias
        if piece < WHOLE:
            _store(Out, acc * C.OUT_SCALE, out_tiles.index(CONSUMER), b, h, l0 + CONSUMER * 64, C)
        elif Part is not None:
            # Beyond L the rows are not masked: the workspace holds whole tiles.
            row = gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT)).expand_dims(1)
            column = gl.arange(0, BD, layout=gl.SliceLayout(0, OUTPUT)).expand_dims(0)
            place = ((piece - WHOLE).to(gl.int64) * C.CONSUMERS + CONSUMER) * (64 * C.D)
            gl.store(Part + place + (row * C.D + column), acc, mask=column < C.D)
    tma.store_wait(0)
