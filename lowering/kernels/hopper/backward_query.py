"""The backward kernel of the queries for Hopper, in Gluon: dQ and dR.

Q is in registers, and tiles of K, U and V stream past. A network without a gate has no U, and three
products instead of five.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...problem import Gradients, Problem
from ...tiles import HopperBackwardTile, Tile
from ..activations import activate_with_slope
from ..launch import start
from ..operands import token_axes, token_operand, weight_operand
from .backward import (
    COLUMNS_AT_LEAST,
    CONSUMERS,
    REGISTERS,
    ROWS,
    bias_arguments,
    constants,
    gluon_arguments,
    head_columns,
    load_tile,
    matrix,
    next_stage,
    store_tile,
)


def run_dq(
    problem: Problem, grad_out: Tensor, gradients: Gradients, blocks: HopperBackwardTile
) -> bool:
    """Fill dQ (B, L, H, d) and dR (B, L, H, E); False where a tensor's layout rules it out."""
    dq, dr = gradients.q, gradients.r
    axes = token_axes(problem.q, problem.r, grad_out, dq, dr)
    heads = problem.q.shape[2]
    tile = Tile(ROWS.value, blocks.hidden, 4, blocks.stages, True, columns=COLUMNS_AT_LEAST)
    operands = {
        "Q": token_operand(problem.q, axes, tile),
        "K": weight_operand(problem.k, tile),
        "U": weight_operand(problem.u, tile),
        "V": weight_operand(problem.v, tile),
        "dOut": token_operand(grad_out, axes, tile),
    }
    if dq is not None:
        operands["dQ"] = token_operand(dq, axes, tile)
    arguments = gluon_arguments(operands)
    if arguments is None:
        return False
    arguments.setdefault("dQ", None)
    for name, x in (("R", problem.r), ("dR", dr)):
        # Through pointers: each row of a product needs one value, and each thread has two rows.
        arguments[name] = x
        arguments[f"{name}_strides"] = None if x is None else axes.strides(x)
    arguments |= bias_arguments(K_bias=problem.k_bias, U_bias=problem.u_bias, V_bias=problem.v_bias)
    arguments |= {"B": axes.batch, "L": axes.length}
    arguments["C"] = constants(problem, tile, blocks.hidden, operands)
    programs = triton.cdiv(axes.length, CONSUMERS.value * ROWS.value) * axes.batch * heads
    start(mhf_hopper_backward_dq_kernel, programs, tile, grad_out.device, arguments)
    return True


@gluon.jit
def mhf_hopper_backward_dq_kernel(
    Q, K, U, V, R, K_bias, U_bias, V_bias, dOut, dQ, dR,
    R_strides, K_bias_strides, U_bias_strides, V_bias_strides, dR_strides,
    B, L, C: gl.constexpr,
):  # fmt: skip
    """dQ and dR of 128 tokens of one head, 64 for each warpgroup."""
    STAGES: gl.constexpr = C.STAGES
    BD: gl.constexpr = C.BD
    token_tiles = gl.cdiv(L, CONSUMERS * ROWS)
    program = gl.program_id(0)
    l0 = (program % token_tiles) * (CONSUMERS * ROWS)
    b = program // token_tiles % B
    h = program // token_tiles // B
    g = h // C.HEADS_PER_GROUP

    q_s = gl.allocate_shared_memory(Q.dtype, [CONSUMERS, 1, 1, ROWS, BD], Q.layout)
    do_s = gl.allocate_shared_memory(Q.dtype, [CONSUMERS, 1, 1, ROWS, BD], dOut.layout)
    k_s = gl.allocate_shared_memory(Q.dtype, [STAGES] + K.block_shape, K.layout)
    if U is not None:
        u_s = gl.allocate_shared_memory(Q.dtype, [STAGES] + U.block_shape, U.layout)
    else:
        u_s = k_s  # never read
    v_s = gl.allocate_shared_memory(Q.dtype, [STAGES] + V.block_shape, V.layout)
    tokens_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    u_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(tokens_here, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_here.index(stage), count=1)
        mbarrier.init(u_here.index(stage), count=1)
        mbarrier.init(v_here.index(stage), count=1)
        mbarrier.init(used.index(stage), count=CONSUMERS)

    tiles = (q_s, do_s, k_s, u_s, v_s)
    barriers = (tokens_here, k_here, u_here, v_here, used)
    if R is not None:
        R += gl.cast(b, gl.int64) * R_strides[0] + gl.cast(h, gl.int64) * R_strides[2]
    if dR is not None:
        dR += gl.cast(b, gl.int64) * dR_strides[0] + gl.cast(h, gl.int64) * dR_strides[2]
    if K_bias is not None:
        K_bias += gl.cast(g, gl.int64) * K_bias_strides[0]
    if U_bias is not None:
        U_bias += gl.cast(g, gl.int64) * U_bias_strides[0]
    if V_bias is not None:
        V_bias += gl.cast(g, gl.int64) * V_bias_strides[0]
    # The strides are not in another tuple: of those, Triton 3.6 forgets which are known to be 1.
    gl.warp_specialize(
        [
            (_dq_consumer, (
                0, tiles, barriers, R, R_strides, K_bias, K_bias_strides, U_bias, U_bias_strides,
                V_bias, V_bias_strides, dQ, dR, dR_strides, b, h, l0, L, C,
            )),
            (_dq_consumer, (
                1, tiles, barriers, R, R_strides, K_bias, K_bias_strides, U_bias, U_bias_strides,
                V_bias, V_bias_strides, dQ, dR, dR_strides, b, h, l0, L, C,
            )),
            (_dq_producer, (Q, K, U, V, dOut, tiles, barriers, b, h, l0, g, C)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _dq_producer(Q, K, U, V, dOut, tiles, barriers, b, h, l0, g, C: gl.constexpr):
    """Brings the token tiles once, then all tiles of K, V and U in turn."""
    q_s, do_s, k_s, u_s, v_s = tiles
    tokens_here, k_here, u_here, v_here, used = barriers
    BF: gl.constexpr = C.BS
    BD: gl.constexpr = C.BD
    F_TILES: gl.constexpr = (C.F + BF - 1) // BF
    mbarrier.expect(tokens_here, 2 * CONSUMERS * ROWS * BD * 2)
    for consumer in gl.static_range(CONSUMERS):
        load_tile(Q, b, h, l0 + consumer * ROWS, tokens_here, q_s.index(consumer), False)
        load_tile(dOut, b, h, l0 + consumer * ROWS, tokens_here, do_s.index(consumer), False)
    stage = 0
    phase = 0
    for i in range(C.E * F_TILES):
        e = i // F_TILES
        f0 = (i % F_TILES) * BF
        mbarrier.wait(used.index(stage), phase ^ 1)
        mbarrier.expect(k_here.index(stage), BF * BD * 2)
        load_tile(K, g, e, f0, k_here.index(stage), k_s.index(stage), C.K == "columns")
        mbarrier.expect(v_here.index(stage), BF * BD * 2)
        load_tile(V, g, e, f0, v_here.index(stage), v_s.index(stage), C.V == "columns")
        if U is not None:
            mbarrier.expect(u_here.index(stage), BF * BD * 2)
            load_tile(U, g, e, f0, u_here.index(stage), u_s.index(stage), C.U == "columns")
        stage, phase = next_stage(stage, phase, C.STAGES)


@gluon.jit
def _dq_consumer(
    consumer: gl.constexpr, tiles, barriers, R, R_strides, K_bias, K_bias_strides,
    U_bias, U_bias_strides, V_bias, V_bias_strides, dQ, dR, dR_strides, b, h, l0, L,
    C: gl.constexpr,
):  # fmt: skip
    """64 tokens against all hidden units: dQ in registers, dR stored once per sub-network."""
    q_s, do_s, k_s, u_s, v_s = tiles
    tokens_here, k_here, u_here, v_here, used = barriers
    BF: gl.constexpr = C.BS
    BD: gl.constexpr = C.BD
    ACTIVATION: gl.constexpr = C.ACTIVATION
    F_TILES: gl.constexpr = (C.F + BF - 1) // BF
    HIDDEN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BF, 16])
    WIDTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, HIDDEN, 2)
    LEFT_WIDE: gl.constexpr = gl.DotOperandLayout(0, WIDTH, 2)
    DTYPE: gl.constexpr = q_s.dtype

    l = l0 + consumer * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, HIDDEN))
    inside = l < L
    if R is not None:
        R += l.to(gl.int64) * R_strides[1]
    if dR is not None:
        dR += l.to(gl.int64) * dR_strides[1]
    nothing = gl.zeros([ROWS, BF], gl.float32, HIDDEN)
    dq = gl.zeros([ROWS, BD], gl.float32, WIDTH)
    mbarrier.wait(tokens_here, 0)
    q = head_columns(matrix(q_s.index(consumer), False), C).load(LEFT)  # [ROWS, BC]
    do = matrix(do_s.index(consumer), False)
    do_columns = head_columns(do, C)
    stage = 0
    phase = 0
    for e in range(C.E):
        if R is not None:
            r = gl.load(R + gl.cast(e, gl.int64) * R_strides[3], mask=inside, other=0.0).to(
                gl.float32
            )
        dr = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, HIDDEN))
        if dR is not None and V_bias is not None:
            v_bias = _bias(V_bias, V_bias_strides, e, 0, C.D, BD, WIDTH)
            v_bias = v_bias.to(gl.float32).expand_dims(0)
            of_bias = gl.sum(do.load(WIDTH).to(gl.float32) * v_bias, 1)
            dr = gl.convert_layout(of_bias, gl.SliceLayout(1, HIDDEN))
        for i in range(F_TILES):
            k = matrix(k_s.index(stage), C.K == "columns")  # [BF, BD]
            v = matrix(v_s.index(stage), C.V == "columns")
            # Biases are loaded before a product is issued, and added when it is there.
            if K_bias is not None:
                k_bias = _bias(K_bias, K_bias_strides, e, i * BF, C.F, BF, HIDDEN)
            mbarrier.wait(k_here.index(stage), phase)
            k_columns = head_columns(k, C).permute((1, 0))
            m = warpgroup_mma(q, k_columns, nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_here.index(stage), phase)
            v_columns = head_columns(v, C).permute((1, 0))
            da = warpgroup_mma(do_columns, v_columns, nothing, use_acc=False, is_async=True)
            m = warpgroup_mma_wait(1, [m])
            if C.K_SCALE != 1.0:
                m *= C.K_SCALE
            if K_bias is not None:
                m += k_bias.to(gl.float32).expand_dims(0)
            y, slope = activate_with_slope(m, ACTIVATION, True)
            if C.U is not None:
                # U's product comes last: there are no registers for it before m is used up. There
                # are none for its bias either, which it begins with where nothing scales it.
                u = matrix(u_s.index(stage), C.U == "columns")
                n = nothing
                BIAS_FIRST: gl.constexpr = U_bias is not None and C.U_SCALE == 1.0
                if BIAS_FIRST:
                    u_bias = _bias(U_bias, U_bias_strides, e, i * BF, C.F, BF, HIDDEN)
                    n += u_bias.to(gl.float32).expand_dims(0)
                mbarrier.wait(u_here.index(stage), phase)
                u_columns = head_columns(u, C).permute((1, 0))
                n = warpgroup_mma(q, u_columns, n, use_acc=BIAS_FIRST, is_async=True)
                da = warpgroup_mma_wait(1, [da])
                dn = da * y
                dm = da * slope
                n = warpgroup_mma_wait(0, [n])
                if C.U_SCALE != 1.0:
                    n *= C.U_SCALE
                    if U_bias is not None:
                        u_bias = _bias(U_bias, U_bias_strides, e, i * BF, C.F, BF, HIDDEN)
                        n += u_bias.to(gl.float32).expand_dims(0)
                dm *= n
                if dR is not None:
                    dr += gl.sum(dn * n, 1)
            else:
                da = warpgroup_mma_wait(0, [da])
                dm = da * slope
                if dR is not None:
                    dr += gl.sum(da * y, 1)
            if dQ is not None:
                if R is not None:
                    dm *= r.expand_dims(1)
                if C.K_SCALE != 1.0:
                    dm *= C.K_SCALE
                dm = gl.convert_layout(dm.to(DTYPE), LEFT_WIDE)
                if C.U is not None:
                    if R is not None:
                        dn *= r.expand_dims(1)
                    if C.U_SCALE != 1.0:
                        dn *= C.U_SCALE
                    dn = gl.convert_layout(dn.to(DTYPE), LEFT_WIDE)
                dq = warpgroup_mma(dm, k, dq, is_async=True)
                if C.U is not None:
                    dq = warpgroup_mma(dn, u, dq, is_async=True)
                dq = warpgroup_mma_wait(0, [dq])
            mbarrier.arrive(used.index(stage), count=1)
            stage, phase = next_stage(stage, phase, C.STAGES)
        if dR is not None:
            dR_here = dR + gl.cast(e, gl.int64) * dR_strides[3]
            gl.store(dR_here, (dr * C.OUT_SCALE).to(dR.dtype.element_ty), mask=inside)
    if dQ is not None:
        first = l0 + consumer * ROWS
        store_tile(dQ, b, h, first, dq * C.OUT_SCALE, q_s.index(consumer), False)


@gluon.jit
def _bias(X, strides, e, first, SIZE: gl.constexpr, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Entries from `first` on of a group's bias (E, SIZE), zero beyond it: [BLOCK]."""
    column = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
    X += gl.cast(e, gl.int64) * strides[1]
    return gl.load(X + column * strides[2], mask=column < SIZE, other=0.0)
