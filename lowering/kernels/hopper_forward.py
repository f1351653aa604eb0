"""The forward kernel for Hopper, in Gluon: warps that load, warps that compute, and no other waits.

Plain Triton (forward_pass.py) levels off because its warps do everything together: products, then
activations, then products. Here one producer warp streams K, U and V tiles through a ring of shared
memory by TMA, and each consumer, a group of four warps, owns 64 tokens:

    producer   Q   K U V   K U V   K U V  ...          ring of `stages` slots, a barrier each
    consumer   K0 U0 | K1 U1 V0 | K2 U2 V1 | ... | Vn   products, issued to the matrix unit
                   act0      act1       act2            activations, while V's product runs

The product with V trails by one tile. It is issued behind the next tile's products with K and U, so
that the matrix unit has work while this consumer activates, and the other consumers fill the rest.
All products of one turn are issued and awaited within it: one that were still running at the end of
a loop's body would be serialised by the assembler.

The kernel is persistent, one program to a multiprocessor, so that the producer loads the next
tile's operands while the last one is stored. The tiles of an incomplete last round are cut along
the hidden units (splitting.py), because 31 rounds and 4 tiles would otherwise take as long as 32.

Ragged edges need no mask: TMA fills with zeros what lies beyond L, F or D and drops what is stored
there. `plan` says which problems fit; forward_pass.py takes all others.
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

from .activations import activate
from .launching import Problem, launch, multiprocessors
from .loads import (
    Operand,
    TokenAxes,
    bias_operand,
    router_operand,
    token_axes,
    token_operand,
    weight_operand,
)
from .splitting import add_parts, split_last_round
from .tiles import PipelinedTile, Tile

_TOKENS = 64  # of one consumer: the rows of a warp-group's matrix instruction
_WARPS = 4  # of one consumer
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class Plan(NamedTuple):
    """A problem's operands, once all of them have turned out to suit the kernel."""

    axes: TokenAxes
    operands: dict[str, Operand]
    tile: PipelinedTile


def plan(problem: Problem, out: Tensor, tile: PipelinedTile) -> Plan | None:
    """How to run `problem`, or None where a tensor's dtype, strides or address forbid it."""
    if out.dtype != problem.q.dtype or out.dtype not in _DTYPES:
        return None
    axes = token_axes(problem.q, problem.r, out)
    block = Tile(_TOKENS, tile.hidden, _WARPS, tile.stages, True)
    operands = {
        "Q": token_operand(problem.q, axes, block),
        "K": weight_operand(problem.k, block),
        "U": weight_operand(problem.u, block),
        "V": weight_operand(problem.v, block),
        "Out": token_operand(out, axes, block),
    }
    for name, operand in operands.items():
        if operand.argument is None:
            continue
        if operand.layout == "pointer":
            return None
        layout = None if name in ("Q", "Out") else operand.layout
        operands[name] = Operand(_with_layout(operand.argument), None, layout)
    # Through pointers whatever its strides: a value serves several tiles of hidden units.
    block = dataclasses.replace(block, descriptors=False)
    operands["R"] = router_operand(problem.r, axes, block)._replace(layout=None)
    operands["K_bias"] = bias_operand(problem.k_bias)
    operands["U_bias"] = bias_operand(problem.u_bias)
    operands["V_bias"] = bias_operand(problem.v_bias)
    return Plan(axes, operands, tile)


def run_hopper_forward(problem: Problem, out: Tensor, plan: Plan) -> None:
    """Fill `out` (B, L, H, d)."""
    axes, operands, tile = plan
    networks, hidden = problem.k.shape[1:3]
    rows = tile.consumers * _TOKENS
    tiles = triton.cdiv(axes.length, rows) * axes.batch * problem.q.shape[2]
    programs = multiprocessors(out.device)
    split = split_last_round(tiles, networks * triton.cdiv(hidden, tile.hidden), programs)
    partial = split.workspace(tiles, rows, out)
    halved = tile.q_in_registers and _halves_exactly(problem)
    out_scale = problem.out_scale * (2.0 if halved and problem.u is not None else 1.0)
    scalars = problem.scalars(axes, Tile(rows, tile.hidden, _WARPS, tile.stages, True))
    for name in ("PRECISION", "COMPENSATED", "BM"):
        del scalars[name]
    scalars |= {
        "OUT_SCALE": out_scale,
        "TILES": tiles,
        "WHOLE": split.whole,
        "PARTS": split.parts,
        "HALVED": halved,
        "CONSUMERS": tile.consumers,
        "STAGES": tile.stages,
        "REGISTERS": tile.registers,
        "Q_IN_REGISTERS": tile.q_in_registers,
    }
    operands = operands | {"Part": Operand(partial, None, None)}
    programs = min(programs, split.pieces(tiles))
    block = Tile(_TOKENS, tile.hidden, _WARPS, 1, True)
    launch(hopper_forward_kernel, programs, block, out.device, operands, scalars)
    if partial is not None:
        add_parts(partial, out, axes, split, tiles, out_scale)


def _halves_exactly(problem: Problem) -> bool:
    """Whether to compute with q / 2, which saves silu's own halving of every hidden unit.

    silu(m) is x + x tanh(x) at x = m / 2. Halving a bfloat16 is exact, float16 has too few
    exponents for it.
    """
    plain = problem.k_scale == problem.u_scale == 1.0
    biased = any(x is not None for x in (problem.k_bias, problem.u_bias, problem.v_bias))
    return (
        problem.activation == "silu" and problem.q.dtype == torch.bfloat16 and plain and not biased
    )


def _with_layout(descriptor: Any) -> TensorDescriptor:
    """Gluon's descriptor of the same memory, which also says how a tile lies in shared memory."""
    block = list(descriptor.block_shape)
    layout = _shared_layout(tuple(block), _DTYPES[descriptor.base.dtype])
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    return TensorDescriptor(descriptor.base, shape, strides, block, layout)


@lru_cache
def _shared_layout(block: tuple[int, ...], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


@gluon.jit(do_not_specialize=["TILES", "WHOLE", "PARTS"])
def hopper_forward_kernel(
    Q, K, U, V, R, K_bias, U_bias, V_bias, Out, Part,
    Q_strides, K_strides, U_strides, V_strides, R_strides,
    K_bias_strides, U_bias_strides, V_bias_strides, Out_strides, Part_strides,
    B, L, TILES, WHOLE, PARTS,
    E: gl.constexpr, F: gl.constexpr, D: gl.constexpr, HEADS_PER_GROUP: gl.constexpr,
    ACTIVATION: gl.constexpr,
    K_SCALE: gl.constexpr, U_SCALE: gl.constexpr, OUT_SCALE: gl.constexpr,
    APPROXIMATE: gl.constexpr, HALVED: gl.constexpr,
    K_layout: gl.constexpr, U_layout: gl.constexpr, V_layout: gl.constexpr,
    BF: gl.constexpr, BD: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = Q.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, BD], Q.layout)
    if Q_IN_REGISTERS:
        out_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, BD], Q.layout)
    else:
        out_tiles = q_tiles
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + K.block_type.shape, K.layout)
    if U is None:
        u_ring = k_ring
    else:
        u_ring = gl.allocate_shared_memory(dtype, [STAGES] + U.block_type.shape, U.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + V.block_type.shape, V.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    u_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(u_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)

    barriers = (q_full, q_empty, k_full, u_full, v_full, empty)
    work = (B, L, TILES, WHOLE, PARTS)
    memory = (q_tiles, out_tiles, k_ring, u_ring, v_ring)
    operands = (R, K_bias, U_bias, V_bias, Out, Part)
    strides = (R_strides, K_bias_strides, U_bias_strides, V_bias_strides)
    # Constants stay constants only where they are written out.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    0, operands, strides, memory, barriers, work, E, F, D, HEADS_PER_GROUP,
                    ACTIVATION, K_SCALE, U_SCALE, OUT_SCALE, APPROXIMATE, HALVED, U is not None,
                    K_layout, U_layout, V_layout, BF, BD, CONSUMERS, STAGES, Q_IN_REGISTERS)),
                (_consume, (
                    1, operands, strides, memory, barriers, work, E, F, D, HEADS_PER_GROUP,
                    ACTIVATION, K_SCALE, U_SCALE, OUT_SCALE, APPROXIMATE, HALVED, U is not None,
                    K_layout, U_layout, V_layout, BF, BD, CONSUMERS, STAGES, Q_IN_REGISTERS)),
                (_produce, (
                    Q, K, U, V, memory, barriers, work, E, F, HEADS_PER_GROUP,
                    K_layout, U_layout, V_layout, BF, BD, CONSUMERS, STAGES)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (
                    0, operands, strides, memory, barriers, work, E, F, D, HEADS_PER_GROUP,
                    ACTIVATION, K_SCALE, U_SCALE, OUT_SCALE, APPROXIMATE, HALVED, U is not None,
                    K_layout, U_layout, V_layout, BF, BD, CONSUMERS, STAGES, Q_IN_REGISTERS)),
                (_consume, (
                    1, operands, strides, memory, barriers, work, E, F, D, HEADS_PER_GROUP,
                    ACTIVATION, K_SCALE, U_SCALE, OUT_SCALE, APPROXIMATE, HALVED, U is not None,
                    K_layout, U_layout, V_layout, BF, BD, CONSUMERS, STAGES, Q_IN_REGISTERS)),
                (_consume, (
                    2, operands, strides, memory, barriers, work, E, F, D, HEADS_PER_GROUP,
                    ACTIVATION, K_SCALE, U_SCALE, OUT_SCALE, APPROXIMATE, HALVED, U is not None,
                    K_layout, U_layout, V_layout, BF, BD, CONSUMERS, STAGES, Q_IN_REGISTERS)),
                (_produce, (
                    Q, K, U, V, memory, barriers, work, E, F, HEADS_PER_GROUP,
                    K_layout, U_layout, V_layout, BF, BD, CONSUMERS, STAGES)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
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
def _produce(
    Q, K, U, V, memory, barriers, work,
    E: gl.constexpr, F: gl.constexpr, HEADS_PER_GROUP: gl.constexpr,
    K_layout: gl.constexpr, U_layout: gl.constexpr, V_layout: gl.constexpr,
    BF: gl.constexpr, BD: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: keeps the ring full, and loads the next tile's Q as soon as its place is free."""
    q_tiles, _, k_ring, u_ring, v_ring = memory
    q_full, q_empty, k_full, u_full, v_full, empty = barriers
    F_TILES: gl.constexpr = (F + BF - 1) // BF
    slot = 0
    lap = 1  # parity of the ring's passes: the slots of the first one are empty
    turn = 1
    for piece in range(gl.program_id(0), _pieces(work), gl.num_programs(0)):
        l0, b, h, first, last = _piece(piece, work, CONSUMERS * 64, E * F_TILES)
        g = h // HEADS_PER_GROUP
        mbarrier.wait(q_empty, turn)
        turn ^= 1
        mbarrier.expect(q_full, CONSUMERS * 64 * BD * 2)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(Q, [b, h, l0 + c * 64, 0], q_full, q_tiles.index(c))
        for i in range(first, last):
            e = i // F_TILES
            f0 = i % F_TILES * BF
            mbarrier.wait(empty.index(slot), lap)
            _load(K, g, e, f0, k_full.index(slot), k_ring.index(slot), BF * BD * 2, K_layout)
            if U is not None:
                _load(U, g, e, f0, u_full.index(slot), u_ring.index(slot), BF * BD * 2, U_layout)
            _load(V, g, e, f0, v_full.index(slot), v_ring.index(slot), BF * BD * 2, V_layout)
            slot += 1
            if slot == STAGES:
                slot = 0
                lap ^= 1


@gluon.jit
def _load(W, g, e, f0, full, tile, BYTES: gl.constexpr, LAYOUT: gl.constexpr):
    mbarrier.expect(full, BYTES)
    if LAYOUT == "rows":
        tma.async_copy_global_to_shared(W, [g, e, f0, 0], full, tile)
    else:
        tma.async_copy_global_to_shared(W, [g, e, 0, f0], full, tile)


@gluon.jit
def _weights(ring, slot, BF: gl.constexpr, BD: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile of the ring, however it is stored: [BF, BD]."""
    if LAYOUT == "rows":
        return ring.index(slot).reshape([BF, BD])
    else:
        return ring.index(slot).reshape([BD, BF]).permute((1, 0))


@gluon.jit
def _bias(X, strides, g, e, f0, F: gl.constexpr, BF: gl.constexpr, LAYOUT: gl.constexpr):
    """Entries f0.. of a bias (G, E, F), zero beyond F: float32 [1, BF]."""
    f = f0 + gl.arange(0, BF, layout=gl.SliceLayout(0, LAYOUT))
    X += gl.cast(g, gl.int64) * strides[0] + gl.cast(e, gl.int64) * strides[1]
    return gl.load(X + f * strides[2], mask=f < F, other=0.0).to(gl.float32).expand_dims(0)


@gluon.jit
def _gate(m, R, e, g, f0, inside, K_bias, R_strides, K_bias_strides, F: gl.constexpr,
          ACTIVATION: gl.constexpr, K_SCALE: gl.constexpr, APPROXIMATE: gl.constexpr,
          HALVED: gl.constexpr, BF: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """r act(m) for a tile of pre-activations: [64, BF]. R points at each token's first weight."""
    if K_SCALE != 1.0:
        m *= K_SCALE
    if K_bias is not None:
        m += _bias(K_bias, K_bias_strides, g, e, f0, F, BF, LAYOUT)
    if HALVED:
        a = m * activate(m, "tanh", APPROXIMATE) + m
    else:
        a = activate(m, ACTIVATION, APPROXIMATE)
    if R is not None:
        r = gl.load(R + e.to(gl.int64) * R_strides[3], mask=inside, other=0.0)
        a *= r.to(gl.float32).expand_dims(1)
    return a


@gluon.jit
def _up(n, e, g, f0, U_bias, U_bias_strides, F: gl.constexpr, U_SCALE: gl.constexpr,
        BF: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """The up projection, scaled and biased: [64, BF]."""
    if U_SCALE != 1.0:
        n *= U_SCALE
    if U_bias is not None:
        n += _bias(U_bias, U_bias_strides, g, e, f0, F, BF, LAYOUT)
    return n


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, operands, strides, memory, barriers, work,
    E: gl.constexpr, F: gl.constexpr, D: gl.constexpr, HEADS_PER_GROUP: gl.constexpr,
    ACTIVATION: gl.constexpr, K_SCALE: gl.constexpr, U_SCALE: gl.constexpr,
    OUT_SCALE: gl.constexpr, APPROXIMATE: gl.constexpr, HALVED: gl.constexpr,
    GATED: gl.constexpr, K_layout: gl.constexpr, U_layout: gl.constexpr, V_layout: gl.constexpr,
    BF: gl.constexpr, BD: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 tokens of each of the program's tiles."""
    R, K_bias, U_bias, V_bias, Out, Part = operands
    R_strides, K_bias_strides, U_bias_strides, V_bias_strides = strides
    q_tiles, out_tiles, k_ring, u_ring, v_ring = memory
    q_full, q_empty, k_full, u_full, v_full, empty = barriers
    _, L, _, WHOLE, _ = work
    dtype: gl.constexpr = q_tiles.dtype
    F_TILES: gl.constexpr = (F + BF - 1) // BF
    HIDDEN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BF, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    # With both operands in shared memory a matrix instruction of 64 rows waits for its memory.
    Q_OPERAND: gl.constexpr = gl.DotOperandLayout(0, HIDDEN, 2)
    A_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    nothing = gl.zeros([64, BF], gl.float32, HIDDEN)
    rows = CONSUMER * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, HIDDEN))
    slot = 0
    lap = 0
    turn = 0
    for piece in range(gl.program_id(0), _pieces(work), gl.num_programs(0)):
        l0, b, h, first, last = _piece(piece, work, CONSUMERS * 64, E * F_TILES)
        g = h // HEADS_PER_GROUP
        inside = l0 + rows < L
        if R is not None:
            r_row = R + (gl.cast(b, gl.int64) * R_strides[0] + gl.cast(h, gl.int64) * R_strides[2])
            r_row += (l0 + rows).to(gl.int64) * R_strides[1]
        else:
            r_row = None
        mbarrier.wait(q_full, turn)
        turn ^= 1
        q = q_tiles.index(CONSUMER).reshape([64, BD])
        if Q_IN_REGISTERS:
            q = q.load(Q_OPERAND)
            mbarrier.arrive(q_empty, count=1)
            if HALVED:
                q = (q.to(gl.float32) * 0.5).to(dtype)

        # The first tile, whose product with V is left to the loop.
        e = first // F_TILES
        f0 = first % F_TILES * BF
        mbarrier.wait(k_full.index(slot), lap)
        k = _weights(k_ring, slot, BF, BD, K_layout).permute((1, 0))
        m = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        if GATED:
            mbarrier.wait(u_full.index(slot), lap)
            u = _weights(u_ring, slot, BF, BD, U_layout).permute((1, 0))
            n = warpgroup_mma(q, u, nothing, use_acc=False, is_async=True)
            m = warpgroup_mma_wait(1, [m])
        else:
            m = warpgroup_mma_wait(0, [m])
        a = _gate(m, r_row, e, g, f0, inside, K_bias, R_strides, K_bias_strides, F,
                  ACTIVATION, K_SCALE, APPROXIMATE, HALVED, BF, HIDDEN)  # fmt: skip
        if GATED:
            n = warpgroup_mma_wait(0, [n])
            a *= _up(n, e, g, f0, U_bias, U_bias_strides, F, U_SCALE, BF, HIDDEN)
        a_operand = gl.convert_layout(a.to(dtype), A_OPERAND)

        acc = gl.zeros([64, BD], gl.float32, OUTPUT)
        for i in range(first + 1, last):
            e = i // F_TILES
            f0 = i % F_TILES * BF
            trailing = slot
            trailing_lap = lap
            slot += 1
            if slot == STAGES:
                slot = 0
                lap ^= 1
            mbarrier.wait(k_full.index(slot), lap)
            k = _weights(k_ring, slot, BF, BD, K_layout).permute((1, 0))
            m = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            if GATED:
                mbarrier.wait(u_full.index(slot), lap)
                u = _weights(u_ring, slot, BF, BD, U_layout).permute((1, 0))
                n = warpgroup_mma(q, u, nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(trailing), trailing_lap)
            v = _weights(v_ring, trailing, BF, BD, V_layout)
            acc = warpgroup_mma(a_operand, v, acc, is_async=True)
            if GATED:
                m = warpgroup_mma_wait(2, [m])
            else:
                m = warpgroup_mma_wait(1, [m])
            a = _gate(m, r_row, e, g, f0, inside, K_bias, R_strides, K_bias_strides, F,
                      ACTIVATION, K_SCALE, APPROXIMATE, HALVED, BF, HIDDEN)  # fmt: skip
            if GATED:
                n, acc = warpgroup_mma_wait(0, [n, acc])
                a *= _up(n, e, g, f0, U_bias, U_bias_strides, F, U_SCALE, BF, HIDDEN)
            else:
                acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index(trailing), count=1)
            a_operand = gl.convert_layout(a.to(dtype), A_OPERAND)

        mbarrier.wait(v_full.index(slot), lap)
        v = _weights(v_ring, slot, BF, BD, V_layout)
        acc = warpgroup_mma(a_operand, v, acc, is_async=False)
        mbarrier.arrive(empty.index(slot), count=1)
        slot += 1
        if slot == STAGES:
            slot = 0
            lap ^= 1

        if V_bias is not None:
            for e in range(0, gl.where(first == 0, E, 0)):  # once for each tile
                bias = _bias(V_bias, V_bias_strides, g, e, 0, D, BD, OUTPUT)
                if R is not None:
                    r = gl.load(r_row + gl.cast(e, gl.int64) * R_strides[3], mask=inside, other=0.0)
                    r = gl.convert_layout(r.to(gl.float32), gl.SliceLayout(1, OUTPUT))
                    acc += r.expand_dims(1) * bias
                else:
                    acc += bias
        if piece < WHOLE:
            out_tile = out_tiles.index(CONSUMER)
            tma.store_wait(0)  # the last tile has left its place
            out_tile.reshape([64, BD]).store((acc * OUT_SCALE).to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(Out, [b, h, l0 + CONSUMER * 64, 0], out_tile)
        elif Part is not None:
            # Beyond L the rows are not masked: the workspace holds whole tiles.
            row = gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT)).expand_dims(1)
            column = gl.arange(0, BD, layout=gl.SliceLayout(0, OUTPUT)).expand_dims(0)
            start = ((piece - WHOLE).to(gl.int64) * CONSUMERS + CONSUMER) * (64 * D)
            gl.store(Part + start + (row * D + column), acc, mask=column < D)
        if not Q_IN_REGISTERS:
            tma.store_wait(0)  # Q and Out share their place
            mbarrier.arrive(q_empty, count=1)
    tma.store_wait(0)
