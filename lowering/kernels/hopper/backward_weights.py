"""The backward kernels of the weights for Hopper, in Gluon: dV; dK and dU; dK and dV.

    mhf_hopper_backward_dv_kernel     dV: K and U in registers, Q and dOut tiles stream past
    mhf_hopper_backward_dk_du_kernel  dK and dU: K, U and V in shared memory, Q and dOut tiles
                                      stream past
    mhf_hopper_backward_dk_dv_kernel  dK and dV without a gate: K and V in shared memory, as above

The gradients of the biases of hidden units come with those of their weights.

They walk all tokens, so there are few, long programs: 704 for 132 multiprocessors in the 1.3B
shape, whose sixth wave would be a third full. The tiles of the last wave are therefore cut by
tokens into parts (`plan_parts`), whose sums go to a small workspace in float32 and are added in a
fixed order by `mhf_add_weight_parts_kernel`.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...device import multiprocessors
from ...problem import Gradients, Problem
from ...tiles import HopperBackwardTile, Tile
from ..activations import activate, activate_with_slope
from ..launch import start
from ..loads import store_bias, store_weights
from ..operands import router_operand, token_axes, token_operand, weight_operand
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
from .compat import async_load, reinterpret

_MOST_PARTS = 4
_FEWEST_STEPS = 32  # tiles of tokens in a part: below, adding the parts costs what they save
# Where all tiles are fewer than the multiprocessors, most of which would have nothing to do.
_MOST_PARTS_OF_FEW = 16
_FEWEST_STEPS_OF_FEW = 8
_ADDED_ROWS = 16  # of a tile, which one program adds


class Parts(NamedTuple):
    """How the token loop of the weights' gradients is cut.

    The first `whole` programs own their tiles; each later tile is shared by `parts` programs.
    """

    whole: int
    shared: int
    parts: int

    @property
    def programs(self) -> int:
        return self.whole + self.shared * self.parts


def run_dv(
    problem: Problem, grad_out: Tensor, gradients: Gradients, blocks: HopperBackwardTile
) -> bool:
    """Fill dV (G, E, f, d); False where a tensor's layout rules it out."""
    assert gradients.v is not None
    return _run(
        mhf_hopper_backward_dv_kernel,
        ("k", "u"),
        problem,
        grad_out,
        blocks,
        {"v": _Sum(gradients.v)},
    )


def run_dk_du(
    problem: Problem, grad_out: Tensor, gradients: Gradients, blocks: HopperBackwardTile
) -> bool:
    """Fill dK, dU (G, E, f, d), and their biases' gradients (G, E, f) where these are wanted.

    False where a layout, or one of the two missing, rules it out.
    """
    if gradients.k is None or gradients.u is None:
        return False
    return _run(
        mhf_hopper_backward_dk_du_kernel,
        ("k", "u", "v"),
        problem,
        grad_out,
        blocks,
        {
            "k": _Sum(gradients.k, problem.k_scale, gradients.k_bias),
            "u": _Sum(gradients.u, problem.u_scale, gradients.u_bias),
        },
    )


def run_dk_dv(
    problem: Problem, grad_out: Tensor, gradients: Gradients, blocks: HopperBackwardTile
) -> bool:
    """Fill dK, dV (G, E, f, d), and dK_bias (G, E, f) where it is wanted, of a network without U.

    False where a layout, or one of the two missing, rules it out.
    """
    if gradients.k is None or gradients.v is None:
        return False
    return _run(
        mhf_hopper_backward_dk_dv_kernel,
        ("k", "v"),
        problem,
        grad_out,
        blocks,
        {"k": _Sum(gradients.k, problem.k_scale, gradients.k_bias), "v": _Sum(gradients.v)},
    )


class _Sum(NamedTuple):
    """What a kernel sums over tokens: a weight's gradient, and its bias's where that is wanted."""

    weight: Tensor
    scale: float = 1.0
    bias: Tensor | None = None


def plan_parts(owners: int, steps: int, units: int) -> Parts:
    """Cut the tiles of the last wave of `owners` programs on `units` multiprocessors.

    The fewest parts that shorten it most; each keeps enough steps to be worth its start. If it is
    the only wave, that is fewer steps, and there may be as many parts as fill it.
    """
    whole, shared = owners // units * units, owners % units
    if shared == 0:
        return Parts(owners, 0, 1)
    best = Parts(owners, 0, 1)
    shortest = 1.0  # the last wave, in times of a whole tile
    most, fewest = _MOST_PARTS, _FEWEST_STEPS
    if whole == 0:
        most = max(most, min(_MOST_PARTS_OF_FEW, units // owners))
        fewest = _FEWEST_STEPS_OF_FEW
    for parts in range(2, min(most, steps // fewest) + 1):
        length = -(-shared * parts // units) / parts
        if length < shortest:
            best, shortest = Parts(whole, shared, parts), length
    return best


def _run(
    kernel: Any,
    weights: tuple[str, ...],
    problem: Problem,
    grad_out: Tensor,
    blocks: HopperBackwardTile,
    sums: dict[str, _Sum],
) -> bool:
    """Launch a kernel that reads some weights and sums gradients of some, and add its parts."""
    tensors = problem.named_tensors
    axes = token_axes(problem.q, problem.r, grad_out)
    tile = Tile(blocks.tokens, ROWS.value, 4, blocks.stages, True, columns=COLUMNS_AT_LEAST)
    operands = {
        "Q": token_operand(problem.q, axes, tile),
        "R": router_operand(problem.r, axes, tile),
        "dOut": token_operand(grad_out, axes, tile),
    }
    operands |= {name.upper(): weight_operand(tensors[name], tile) for name in weights}
    operands |= {f"d{name.upper()}": weight_operand(x.weight, tile) for name, x in sums.items()}
    arguments = gluon_arguments(operands)
    if arguments is None:
        return False
    projections = [name for name in weights if name in "ku"]
    arguments |= bias_arguments(**{f"{x.upper()}_bias": tensors[f"{x}_bias"] for x in projections})
    arguments |= bias_arguments(
        **{f"d{name.upper()}_bias": x.bias for name, x in sums.items() if name in "ku"}
    )
    arguments |= {"B": axes.batch, "L": axes.length}
    arguments["C"] = constants(problem, tile, blocks.tokens, operands)
    groups, sub_networks, hidden, head_dim = problem.k.shape
    owners = triton.cdiv(sub_networks * triton.cdiv(hidden, ROWS.value), CONSUMERS.value) * groups
    steps = problem.q.shape[2] // groups * axes.batch * triton.cdiv(axes.length, blocks.tokens)
    plan = plan_parts(owners, steps, multiprocessors(problem.q.device))
    arguments |= {"whole": plan.whole, "parts": plan.parts}

    def workspace(*width: int) -> Tensor:
        shape = (plan.shared * plan.parts * CONSUMERS.value, ROWS.value, *width)
        return problem.q.new_empty(shape if plan.shared else 1, dtype=torch.float32)

    for name, x in sums.items():
        arguments[f"d{name.upper()}_parts"] = workspace(tile.padded_width(head_dim))
        if name in "ku":
            bias_parts = None if x.bias is None else workspace()
            arguments[f"d{name.upper()}_bias_parts"] = bias_parts
    device = problem.q.device
    start(kernel, plan.programs, tile, device, arguments)
    piece = replace(tile, hidden=_ADDED_ROWS)
    programs = plan.shared * CONSUMERS.value * (ROWS.value // _ADDED_ROWS)
    for name, x in sums.items() if plan.shared else ():
        target = weight_operand(x.weight, piece)
        added = {
            "dW": target.argument,
            "dW_parts": arguments[f"d{name.upper()}_parts"],
            "dW_strides": target.strides,
            "dW_layout": target.layout,
            "dX": x.bias,
            "dX_parts": arguments.get(f"d{name.upper()}_bias_parts"),
            "dX_strides": None if x.bias is None else x.bias.stride(),
            "first": plan.whole,
            "parts": plan.parts,
            "E": sub_networks,
            "F": hidden,
            "D": head_dim,
            "SCALE": x.scale * problem.out_scale,
            "OUT_SCALE": problem.out_scale,
            "BF": piece.hidden,
            "BD": tile.padded_width(head_dim),
        }
        start(mhf_add_weight_parts_kernel, programs, piece, device, added)
    return True


@gluon.jit
def _hidden_tile(index, F_TILES: gl.constexpr):
    """Sub-network and first hidden unit of a tile; past the last sub-network for an idle one."""
    return index // F_TILES, (index % F_TILES) * ROWS


@gluon.jit
def _first_tile(whole, parts, C: gl.constexpr):
    """The group of a program and, among the group's tiles of 64 hidden units, the first it has."""
    BLOCKS: gl.constexpr = (C.E * ((C.F + ROWS - 1) // ROWS) + CONSUMERS - 1) // CONSUMERS
    program = gl.program_id(0)
    block = gl.where(program < whole, program, whole + (program - whole) // parts)
    return block // BLOCKS, block % BLOCKS * CONSUMERS


@gluon.jit
def _steps(whole, parts, B, L, C: gl.constexpr):
    """The range of token tiles that a program loops over: from, to."""
    steps = C.HEADS_PER_GROUP * B * gl.cdiv(L, C.BS)
    shared = gl.program_id(0) - whole
    part = shared % parts
    first = gl.where(shared < 0, 0, steps * part // parts)
    return first, gl.where(shared < 0, steps, steps * (part + 1) // parts)


@gluon.jit
def _token_ring(Q, dOut, R, C: gl.constexpr):
    """Shared memory for the tiles of tokens, and the barriers of these and of the weights."""
    STAGES: gl.constexpr = C.STAGES
    BM: gl.constexpr = C.BS
    BD: gl.constexpr = C.BD
    q_s = gl.allocate_shared_memory(Q.dtype, [STAGES, 1, 1, BM, BD], Q.layout)
    do_s = gl.allocate_shared_memory(Q.dtype, [STAGES, 1, 1, BM, BD], dOut.layout)
    if R is not None:
        r_s = gl.allocate_shared_memory(R.dtype, [CONSUMERS * STAGES, 1, 1, 1, BM], R.layout)
    else:
        r_s = q_s  # never read
    weights_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(weights_here, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_here.index(stage), count=1)
        mbarrier.init(do_here.index(stage), count=1)
        mbarrier.init(used.index(stage), count=CONSUMERS)
    return (q_s, do_s, r_s), (weights_here, q_here, do_here, used)


@gluon.jit
def _weight_tile(W):
    """Shared memory for a weight's tiles, one for each consumer."""
    return gl.allocate_shared_memory(W.dtype, [CONSUMERS] + W.block_shape, W.layout)


@gluon.jit
def mhf_hopper_backward_dv_kernel(
    Q, K, U, R, K_bias, U_bias, dOut, dV, dV_parts, K_bias_strides, U_bias_strides,
    B, L, whole, parts, C: gl.constexpr,
):  # fmt: skip
    """dV of 128 hidden units, 64 for each warpgroup, over all tokens of the heads that share it."""
    weights = (_weight_tile(K), _weight_tile(U))
    tiles, barriers = _token_ring(Q, dOut, R, C)
    biases = (K_bias, U_bias)
    strides = (K_bias_strides, U_bias_strides)
    gradients = (dV, dV_parts)
    tokens = (B, L, whole, parts)
    ROUTED: gl.constexpr = R is not None
    gl.warp_specialize(
        [
            (_dv_consumer, (
                0, weights, biases, strides, tiles, barriers, gradients, tokens, ROUTED, C,
            )),
            (_dv_consumer, (
                1, weights, biases, strides, tiles, barriers, gradients, tokens, ROUTED, C,
            )),
            (_token_producer, ((K, U), Q, dOut, R, weights, tiles, barriers, tokens, C)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _token_producer(Weights, Q, dOut, R, weights, tiles, barriers, tokens, C: gl.constexpr):
    """Brings the weights' tiles once, then the tokens' tiles in turn."""
    B, L, whole, parts = tokens
    g, index = _first_tile(whole, parts, C)
    first, last = _steps(whole, parts, B, L, C)
    q_s, do_s, r_s = tiles
    weights_here, q_here, do_here, used = barriers
    BM: gl.constexpr = C.BS
    BD: gl.constexpr = C.BD
    F_TILES: gl.constexpr = (C.F + ROWS - 1) // ROWS
    mbarrier.expect(weights_here, len(Weights) * CONSUMERS * ROWS * BD * 2)
    for which in gl.static_range(len(Weights)):
        for consumer in gl.static_range(CONSUMERS):
            e, f0 = _hidden_tile(index + consumer, F_TILES)
            buffer = weights[which].index(consumer)
            load_tile(Weights[which], g, e, f0, weights_here, buffer, C.LAYOUTS[which] == "columns")
    token_tiles = gl.cdiv(L, BM)
    l0 = (first % token_tiles) * BM
    b = first // token_tiles % B
    h = g * C.HEADS_PER_GROUP + first // token_tiles // B
    stage = 0
    phase = 0
    for _ in range(last - first):
        mbarrier.wait(used.index(stage), phase ^ 1)
        if R is not None:
            r_bytes: gl.constexpr = CONSUMERS * BM * (R.dtype.primitive_bitwidth // 8)
            mbarrier.expect(q_here.index(stage), BM * BD * 2 + r_bytes)
            for consumer in gl.static_range(CONSUMERS):
                e, f0 = _hidden_tile(index + consumer, F_TILES)
                async_load(
                    R, [b, h, e, l0], q_here.index(stage), r_s.index(CONSUMERS * stage + consumer)
                )
        else:
            mbarrier.expect(q_here.index(stage), BM * BD * 2)
        load_tile(Q, b, h, l0, q_here.index(stage), q_s.index(stage), False)
        mbarrier.expect(do_here.index(stage), BM * BD * 2)
        load_tile(dOut, b, h, l0, do_here.index(stage), do_s.index(stage), False)
        stage, phase = next_stage(stage, phase, C.STAGES)
        l0 += BM
        if l0 >= L:
            l0 = 0
            b += 1
            if b == B:
                b = 0
                h += 1


@gluon.jit
def _router_row(r_s, index, first: gl.constexpr, BM: gl.constexpr, LAYOUT: gl.constexpr):
    """R of `BM` tokens of a tile, the columns of a product: float32 [1, BM].

    The tile may be overwritten by the copy engine after the turn without a fence, since the product
    that ends the turn has used the value.
    """
    r = r_s.index(index).reshape([r_s.shape[4]]).slice(first, BM).load(gl.SliceLayout(0, LAYOUT))
    return r.to(gl.float32).expand_dims(0)


@gluon.jit
def _halves(x, LAYOUT: gl.constexpr):
    """The left and the right columns of a product, which different registers hold."""
    left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, LAYOUT), gl.convert_layout(right, LAYOUT)


@gluon.jit
def _bias(X, strides, whole, parts, consumer: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr):
    """A bias (G, E, F) of a consumer's hidden units, zero beyond F: float32 [64, 1]."""
    offsets, inside = _bias_offsets(strides, whole, parts, consumer, C, LAYOUT)
    return gl.load(X + offsets, mask=inside, other=0.0).to(gl.float32).expand_dims(1)


@gluon.jit
def _bias_offsets(
    strides, whole, parts, consumer: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr
):
    """Where a consumer's hidden units lie in a bias, and which of them there are."""
    g, index = _first_tile(whole, parts, C)
    e, f0 = _hidden_tile(index + consumer, (C.F + ROWS - 1) // ROWS)
    f = f0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    offsets = gl.cast(g, gl.int64) * strides[0] + gl.cast(e, gl.int64) * strides[1]
    return offsets + f.to(gl.int64) * strides[2], (f < C.F) & (e < C.E)


@gluon.jit
def _finish_bias(
    dX, dX_parts, strides, whole, parts, consumer: gl.constexpr, acc,
    C: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`_finish` for the gradient of a bias [64], where it is wanted."""
    if dX is not None:
        part = gl.program_id(0) - whole
        if part >= 0:
            row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            gl.store(dX_parts + (CONSUMERS * part + consumer) * ROWS + row, acc)
        else:
            offsets, inside = _bias_offsets(strides, whole, parts, consumer, C, LAYOUT)
            value = (acc * C.OUT_SCALE).to(dX.dtype.element_ty)
            gl.store(dX + offsets, value, mask=inside)


@gluon.jit
def _finish(
    dW, dW_parts, whole, parts, consumer: gl.constexpr, acc, scale: gl.constexpr, buffer,
    C: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store a weight's gradient [64, BD], or one part of it as it is."""
    BD: gl.constexpr = C.BD
    part = gl.program_id(0) - whole
    if part >= 0:
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)).expand_dims(1)
        column = gl.arange(0, BD, layout=gl.SliceLayout(0, LAYOUT)).expand_dims(0)
        gl.store(dW_parts + (CONSUMERS * part + consumer) * (ROWS * BD) + row * BD + column, acc)
    else:
        g, index = _first_tile(whole, parts, C)
        e, f0 = _hidden_tile(index + consumer, (C.F + ROWS - 1) // ROWS)
        store_tile(dW, g, e, f0, acc * scale, buffer, COLUMNS)


@gluon.jit
def _dv_consumer(
    consumer: gl.constexpr, weights, biases, strides, tiles, barriers, gradients, tokens,
    ROUTED: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """64 hidden units against the tokens: dV stays in registers, as do K and U."""
    k_s, u_s = weights
    K_bias, U_bias = biases
    K_bias_strides, U_bias_strides = strides
    dV, dV_parts = gradients
    q_s, do_s, r_s = tiles
    weights_here, q_here, do_here, used = barriers
    BM: gl.constexpr = C.BS
    BD: gl.constexpr = C.BD
    ACTIVATION: gl.constexpr = C.ACTIVATION
    TOKENS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    WIDTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, TOKENS, 2)
    LEFT_WIDE: gl.constexpr = gl.DotOperandLayout(0, WIDTH, 2)
    DTYPE: gl.constexpr = q_s.dtype

    nothing = gl.zeros([ROWS, BM], gl.float32, TOKENS)
    dv = gl.zeros([ROWS, BD], gl.float32, WIDTH)
    B, L, whole, parts = tokens
    if K_bias is not None:
        k_bias = _bias(K_bias, K_bias_strides, whole, parts, consumer, C, TOKENS)  # [64, 1]
    if U_bias is not None:
        u_bias = _bias(U_bias, U_bias_strides, whole, parts, consumer, C, TOKENS)
    mbarrier.wait(weights_here, 0)
    k = matrix(k_s.index(consumer), C.K == "columns").load(LEFT)  # [64, BD]
    u = matrix(u_s.index(consumer), C.U == "columns").load(LEFT)
    first, last = _steps(whole, parts, B, L, C)
    stage = 0
    phase = 0
    for _ in range(last - first):
        q = matrix(q_s.index(stage), False)  # [BM, BD]
        do = matrix(do_s.index(stage), False)
        mbarrier.wait(q_here.index(stage), phase)
        m = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        n = warpgroup_mma(u, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        m = warpgroup_mma_wait(1, [m])
        if C.K_SCALE != 1.0:
            m *= C.K_SCALE
        if K_bias is not None:
            m += k_bias
        a = activate(m, ACTIVATION, True)
        if ROUTED:
            a *= _router_row(r_s, CONSUMERS * stage + consumer, 0, BM, TOKENS)
        n = warpgroup_mma_wait(0, [n])
        if C.U_SCALE != 1.0:
            n *= C.U_SCALE
        if U_bias is not None:
            n += u_bias
        a = gl.convert_layout((a * n).to(DTYPE), LEFT_WIDE)
        mbarrier.wait(do_here.index(stage), phase)
        dv = warpgroup_mma(a, do, dv, is_async=True)
        dv = warpgroup_mma_wait(0, [dv])
        mbarrier.arrive(used.index(stage), count=1)
        stage, phase = next_stage(stage, phase, C.STAGES)
    _finish(
        dV, dV_parts, whole, parts, consumer, dv, C.OUT_SCALE,
        reinterpret(k_s.index(consumer), DTYPE, dV.block_shape, dV.layout),
        C, C.dV == "columns", WIDTH,
    )  # fmt: skip


@gluon.jit
def mhf_hopper_backward_dk_du_kernel(
    Q, K, U, V, R, K_bias, U_bias, dOut, dK, dU, dK_bias, dU_bias,
    dK_parts, dU_parts, dK_bias_parts, dU_bias_parts,
    K_bias_strides, U_bias_strides, dK_bias_strides, dU_bias_strides,
    B, L, whole, parts, C: gl.constexpr,
):  # fmt: skip
    """dK and dU of 128 hidden units, 64 for each warpgroup, over all tokens of their heads.

    Those of the biases, sums over the same tokens, come with them where they are wanted.
    """
    weights = (_weight_tile(K), _weight_tile(U), _weight_tile(V))
    tiles, barriers = _token_ring(Q, dOut, R, C)
    biases = (K_bias, U_bias)
    strides = (K_bias_strides, U_bias_strides, dK_bias_strides, dU_bias_strides)
    gradients = (dK, dU, dK_bias, dU_bias)
    sums = (dK_parts, dU_parts, dK_bias_parts, dU_bias_parts)
    tokens = (B, L, whole, parts)
    ROUTED: gl.constexpr = R is not None
    gl.warp_specialize(
        [
            (_dk_du_consumer, (
                0, weights, biases, strides, tiles, barriers, gradients, sums, tokens, ROUTED, C,
            )),
            (_dk_du_consumer, (
                1, weights, biases, strides, tiles, barriers, gradients, sums, tokens, ROUTED, C,
            )),
            (_token_producer, ((K, U, V), Q, dOut, R, weights, tiles, barriers, tokens, C)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _dk_du_consumer(
    consumer: gl.constexpr, weights, biases, strides, tiles, barriers, gradients, sums, tokens,
    ROUTED: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """64 hidden units against the tokens: dK and dU stay in registers."""
    k_s, u_s, v_s = weights
    K_bias, U_bias = biases
    K_bias_strides, U_bias_strides, dK_bias_strides, dU_bias_strides = strides
    q_s, do_s, r_s = tiles
    weights_here, q_here, do_here, used = barriers
    dK, dU, dK_bias, dU_bias = gradients
    dK_parts, dU_parts, dK_bias_parts, dU_bias_parts = sums
    BM: gl.constexpr = C.BS
    BD: gl.constexpr = C.BD
    ACTIVATION: gl.constexpr = C.ACTIVATION
    TOKENS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    WIDTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    LEFT_WIDE: gl.constexpr = gl.DotOperandLayout(0, WIDTH, 2)
    DTYPE: gl.constexpr = q_s.dtype

    nothing = gl.zeros([ROWS, BM], gl.float32, TOKENS)
    dk = gl.zeros([ROWS, BD], gl.float32, WIDTH)
    du = gl.zeros([ROWS, BD], gl.float32, WIDTH)
    dk_bias = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, TOKENS))
    du_bias = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, TOKENS))
    B, L, whole, parts = tokens
    if K_bias is not None:
        k_bias = _bias(K_bias, K_bias_strides, whole, parts, consumer, C, TOKENS)  # [64, 1]
    if U_bias is not None:
        u_bias = _bias(U_bias, U_bias_strides, whole, parts, consumer, C, TOKENS)
    mbarrier.wait(weights_here, 0)
    k = matrix(k_s.index(consumer), C.K == "columns")  # [64, BD]
    u = matrix(u_s.index(consumer), C.U == "columns")
    v = matrix(v_s.index(consumer), C.V == "columns")
    first, last = _steps(whole, parts, B, L, C)
    stage = 0
    phase = 0
    for _ in range(last - first):
        q = matrix(q_s.index(stage), False)  # [BM, BD]
        do = matrix(do_s.index(stage), False)
        mbarrier.wait(q_here.index(stage), phase)
        m = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(do_here.index(stage), phase)
        da = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
        m, da = warpgroup_mma_wait(0, [m, da])
        if C.K_SCALE != 1.0:
            m *= C.K_SCALE
        if K_bias is not None:
            m += k_bias
        if ROUTED:
            da *= _router_row(r_s, CONSUMERS * stage + consumer, 0, BM, TOKENS)
        y, slope = activate_with_slope(m, ACTIVATION, True)
        dn = da * y
        if dU_bias is not None:
            du_bias += gl.sum(dn, 1)
        dn = gl.convert_layout(dn.to(DTYPE), LEFT_WIDE)
        dm = da * slope
        # U's product takes the registers that m and da have left: issued earlier, it would spill.
        # The product for dU keeps the matrix units busy while dm waits for it.
        n = warpgroup_mma(u, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        du = warpgroup_mma(dn, q, du, is_async=True)
        n = warpgroup_mma_wait(1, [n])
        if C.U_SCALE != 1.0:
            n *= C.U_SCALE
        if U_bias is not None:
            n += u_bias
        dm *= n
        if dK_bias is not None:
            dk_bias += gl.sum(dm, 1)
        dm = gl.convert_layout(dm.to(DTYPE), LEFT_WIDE)
        dk = warpgroup_mma(dm, q, dk, is_async=True)
        du, dk = warpgroup_mma_wait(0, [du, dk])
        mbarrier.arrive(used.index(stage), count=1)
        stage, phase = next_stage(stage, phase, C.STAGES)
    _finish(
        dK, dK_parts, whole, parts, consumer, dk, C.K_SCALE * C.OUT_SCALE,
        reinterpret(k_s.index(consumer), DTYPE, dK.block_shape, dK.layout),
        C, C.dK == "columns", WIDTH,
    )  # fmt: skip
    _finish(
        dU, dU_parts, whole, parts, consumer, du, C.U_SCALE * C.OUT_SCALE,
        reinterpret(u_s.index(consumer), DTYPE, dU.block_shape, dU.layout),
        C, C.dU == "columns", WIDTH,
    )  # fmt: skip
    _finish_bias(
        dK_bias, dK_bias_parts, dK_bias_strides, whole, parts, consumer, dk_bias, C, TOKENS
    )
    _finish_bias(
        dU_bias, dU_bias_parts, dU_bias_strides, whole, parts, consumer, du_bias, C, TOKENS
    )


@gluon.jit
def mhf_hopper_backward_dk_dv_kernel(
    Q, K, V, R, K_bias, dOut, dK, dV, dK_bias, dK_parts, dV_parts, dK_bias_parts,
    K_bias_strides, dK_bias_strides,
    B, L, whole, parts, C: gl.constexpr,
):  # fmt: skip
    """dK, dV and dK_bias of 128 hidden units without a gate, over all tokens of their heads."""
    weights = (_weight_tile(K), _weight_tile(V))
    tiles, barriers = _token_ring(Q, dOut, R, C)
    strides = (K_bias_strides, dK_bias_strides)
    gradients = (dK, dV, dK_bias)
    sums = (dK_parts, dV_parts, dK_bias_parts)
    tokens = (B, L, whole, parts)
    ROUTED: gl.constexpr = R is not None
    gl.warp_specialize(
        [
            (_dk_dv_consumer, (
                0, weights, K_bias, strides, tiles, barriers, gradients, sums, tokens, ROUTED, C,
            )),
            (_dk_dv_consumer, (
                1, weights, K_bias, strides, tiles, barriers, gradients, sums, tokens, ROUTED, C,
            )),
            (_token_producer, ((K, V), Q, dOut, R, weights, tiles, barriers, tokens, C)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _dk_dv_consumer(
    consumer: gl.constexpr, weights, K_bias, strides, tiles, barriers, gradients, sums, tokens,
    ROUTED: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """64 hidden units against the tokens: dK and dV stay in registers."""
    k_s, v_s = weights
    K_bias_strides, dK_bias_strides = strides
    q_s, do_s, r_s = tiles
    weights_here, q_here, do_here, used = barriers
    dK, dV, dK_bias = gradients
    dK_parts, dV_parts, dK_bias_parts = sums
    BM: gl.constexpr = C.BS
    BD: gl.constexpr = C.BD
    ACTIVATION: gl.constexpr = C.ACTIVATION
    TOKENS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM // 2, 16])
    WIDTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    LEFT_WIDE: gl.constexpr = gl.DotOperandLayout(0, WIDTH, 2)
    DTYPE: gl.constexpr = q_s.dtype

    nothing = gl.zeros([ROWS, BM], gl.float32, TOKENS)
    dk = gl.zeros([ROWS, BD], gl.float32, WIDTH)
    dv = gl.zeros([ROWS, BD], gl.float32, WIDTH)
    dk_bias = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, HALF))
    B, L, whole, parts = tokens
    if K_bias is not None:
        k_bias = _bias(K_bias, K_bias_strides, whole, parts, consumer, C, HALF)  # [64, 1]
    mbarrier.wait(weights_here, 0)
    k = head_columns(matrix(k_s.index(consumer), C.K == "columns"), C)  # [64, BC]
    v = head_columns(matrix(v_s.index(consumer), C.V == "columns"), C)
    first, last = _steps(whole, parts, B, L, C)
    stage = 0
    phase = 0
    for _ in range(last - first):
        q = matrix(q_s.index(stage), False)  # [BM, BD]
        do = matrix(do_s.index(stage), False)
        mbarrier.wait(q_here.index(stage), phase)
        q_columns = head_columns(q, C).permute((1, 0))  # [BC, BM]
        m = warpgroup_mma(k, q_columns, nothing, use_acc=False, is_async=True)
        mbarrier.wait(do_here.index(stage), phase)
        do_columns = head_columns(do, C).permute((1, 0))
        da = warpgroup_mma(v, do_columns, nothing, use_acc=False, is_async=True)
        m, da = warpgroup_mma_wait(0, [m, da])
        # By halves: the second one is activated while the products of the first one run, and fewer
        # values are on their way at a time.
        ms = _halves(m, HALF)
        das = _halves(da, HALF)
        for half in gl.static_range(2):
            m = ms[half]
            if C.K_SCALE != 1.0:
                m *= C.K_SCALE
            if K_bias is not None:
                m += k_bias
            a, slope = activate_with_slope(m, ACTIVATION, True)
            dm = das[half] * slope
            if ROUTED:
                r = _router_row(r_s, CONSUMERS * stage + consumer, half * (BM // 2), BM // 2, HALF)
                a *= r
                dm *= r
            if dK_bias is not None:
                dk_bias += gl.sum(dm, 1)
            a = gl.convert_layout(a.to(DTYPE), LEFT_WIDE)
            dm = gl.convert_layout(dm.to(DTYPE), LEFT_WIDE)
            dv = warpgroup_mma(a, do.slice(half * (BM // 2), BM // 2), dv, is_async=True)
            dk = warpgroup_mma(dm, q.slice(half * (BM // 2), BM // 2), dk, is_async=True)
        dv, dk = warpgroup_mma_wait(0, [dv, dk])
        mbarrier.arrive(used.index(stage), count=1)
        stage, phase = next_stage(stage, phase, C.STAGES)
    _finish(
        dK, dK_parts, whole, parts, consumer, dk, C.K_SCALE * C.OUT_SCALE,
        reinterpret(k_s.index(consumer), DTYPE, dK.block_shape, dK.layout),
        C, C.dK == "columns", WIDTH,
    )  # fmt: skip
    _finish(
        dV, dV_parts, whole, parts, consumer, dv, C.OUT_SCALE,
        reinterpret(v_s.index(consumer), DTYPE, dV.block_shape, dV.layout),
        C, C.dV == "columns", WIDTH,
    )  # fmt: skip
    _finish_bias(dK_bias, dK_bias_parts, dK_bias_strides, whole, parts, consumer, dk_bias, C, HALF)


@triton.jit
def mhf_add_weight_parts_kernel(
    dW, dX, dW_parts, dX_parts, dW_strides, dX_strides, first, parts,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    dW_layout: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the parts of BF rows of a warpgroup's tile, in their order.

    `first` is the first shared block. dX is the gradient of the weight's bias, or None.
    """
    F_TILES: tl.constexpr = (F + ROWS - 1) // ROWS
    BLOCKS: tl.constexpr = (E * F_TILES + CONSUMERS - 1) // CONSUMERS
    PIECES: tl.constexpr = ROWS // BF
    row = tl.program_id(0) % PIECES * BF + tl.arange(0, BF)
    consumer = tl.program_id(0) // PIECES % CONSUMERS
    block = tl.program_id(0) // PIECES // CONSUMERS
    offsets = row[:, None] * BD + tl.arange(0, BD)[None, :]
    acc = tl.zeros((BF, BD), tl.float32)
    of_bias = tl.zeros((BF,), tl.float32)
    for part in tl.range(0, parts, loop_unroll_factor=4):
        tile = (block * parts + part) * CONSUMERS + consumer
        acc += tl.load(dW_parts + tile * (ROWS * BD) + offsets)
        if dX is not None:
            of_bias += tl.load(dX_parts + tile * ROWS + row)
    index = (first + block) % BLOCKS * CONSUMERS + consumer
    e = index // F_TILES
    f0 = (index % F_TILES) * ROWS + tl.program_id(0) % PIECES * BF
    if e < E:
        g = (first + block) // BLOCKS
        store_weights(dW, acc * SCALE, dW_strides, g, e, f0, F, D, BF, BD, dW_layout)
        if dX is not None:
            store_bias(dX, of_bias * OUT_SCALE, dX_strides, g, e, f0, F, BF)
