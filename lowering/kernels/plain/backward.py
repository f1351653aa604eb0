"""The backward kernels. Each recomputes the hidden tile it needs; none writes one.

With m and n the two pre-activations, y = act(m), y' its slope and da = dOut V^T (before R), the
gradients are

    dV = (R y n)^T dOut        dR = sum_f da y n
    dm = R da n y'             dn = R da y
    dK = dm^T Q   dU = dn^T Q  dQ = dm K + dn U

They fall into three kernels by what stays on the chip: `mhf_backward_dq_kernel` walks the hidden
units and keeps dQ and dR of a token tile; `mhf_backward_dv_kernel` and `mhf_backward_dk_du_kernel`
walk the tokens and keep dV, or dK and dU, of a hidden tile. One kernel for all three weights would
save two products in ten, but its three accumulators leave no registers to overlap them. Every
gradient has one owner, which adds in a fixed order: no atomics, the same bits each time.

Padding needs no mask: dOut is zero beyond L and V beyond F, so da is zero in both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Gradients, Problem
from ...tiles import ENOUGH_PROGRAMS, Tile, padded_width
from ..activations import activate, activate_with_slope
from ..launch import launch, parameters, sums_lie_apart
from ..loads import (
    load_bias,
    load_router,
    load_tokens,
    load_weights,
    store_bias,
    store_router,
    store_tokens,
    store_weights,
)
from ..operands import (
    Operand,
    bias_operand,
    router_gradient,
    router_operand,
    token_axes,
    token_operand,
    weight_operand,
)
from .sums import add_product, no_carry

# Two accumulators of wider heads do not fit Hopper's registers: at width 256, seven products
# without spills took 6.5 ms where five with spills took 9.0 (H200).
_WIDEST_PAIR = 128

# Of programs that share a sum over tokens, and the tiles that each of them reads.
_MOST_PARTS = 32
_FEWEST_STEPS = 4

_UNUSED_BY_DOWN_BIAS = (
    "F", "ACTIVATION", "K_SCALE", "U_SCALE", "APPROXIMATE", "PRECISION", "COMPENSATED", "BF",
)  # fmt: skip


def run_dq(problem: Problem, grad_out: Tensor, gradients: Gradients, tile: Tile) -> None:
    """Fill dQ (B, L, H, d) and dR (B, L, H, E)."""
    dq, dr = gradients.q, gradients.r
    axes = token_axes(problem.q, problem.r, grad_out, dq, dr)
    heads = problem.q.shape[2]
    operands = {
        "Q": token_operand(problem.q, axes, tile),
        "K": weight_operand(problem.k, tile),
        "U": weight_operand(problem.u, tile),
        "V": weight_operand(problem.v, tile),
        "R": router_operand(problem.r, axes, tile),
        "K_bias": bias_operand(problem.k_bias),
        "U_bias": bias_operand(problem.u_bias),
        "V_bias": bias_operand(problem.v_bias),
        "dOut": token_operand(grad_out, axes, tile),
        "dQ": token_operand(dq, axes, tile),
        "dR": router_gradient(dr, axes),
    }
    programs = triton.cdiv(axes.length, tile.tokens) * axes.batch * heads
    scalars = parameters(problem, axes, tile)
    scalars["APART"] = not scalars["COMPENSATED"] and sums_lie_apart(grad_out.device)
    launch(mhf_backward_dq_kernel, programs, tile, grad_out.device, operands, scalars)


def run_dv(problem: Problem, grad_out: Tensor, gradients: Gradients, tile: Tile) -> None:
    """Fill dV (G, E, f, d)."""
    axes = token_axes(problem.q, problem.r, grad_out)
    groups, sub_networks, hidden, _ = problem.k.shape
    operands = {
        "Q": token_operand(problem.q, axes, tile),
        "K": weight_operand(problem.k, tile),
        "U": weight_operand(problem.u, tile),
        "R": router_operand(problem.r, axes, tile),
        "K_bias": bias_operand(problem.k_bias),
        "U_bias": bias_operand(problem.u_bias),
        "dOut": token_operand(grad_out, axes, tile),
        "dV": weight_operand(gradients.v, tile),
    }
    programs = triton.cdiv(hidden, tile.hidden) * sub_networks * groups
    launch(
        mhf_backward_dv_kernel,
        programs,
        tile,
        grad_out.device,
        operands,
        parameters(problem, axes, tile),
    )


def run_dk_du(problem: Problem, grad_out: Tensor, gradients: Gradients, tile: Tile) -> None:
    """Fill dK, dU (G, E, f, d) and their biases' gradients (G, E, f)."""
    both = gradients.k is not None and gradients.u is not None
    if both and tile.descriptors and padded_width(problem.q.shape[3]) > _WIDEST_PAIR:
        run_dk_du(problem, grad_out, gradients._replace(u=None, u_bias=None), tile)
        gradients = gradients._replace(k=None, k_bias=None)
    axes = token_axes(problem.q, problem.r, grad_out)
    groups, sub_networks, hidden, _ = problem.k.shape
    operands = {
        "Q": token_operand(problem.q, axes, tile),
        "K": weight_operand(problem.k, tile),
        "U": weight_operand(problem.u, tile),
        "V": weight_operand(problem.v, tile),
        "R": router_operand(problem.r, axes, tile),
        "K_bias": bias_operand(problem.k_bias),
        "U_bias": bias_operand(problem.u_bias),
        "dOut": token_operand(grad_out, axes, tile),
        "dK": weight_operand(gradients.k, tile),
        "dU": weight_operand(gradients.u, tile),
        "dK_bias": bias_operand(gradients.k_bias),
        "dU_bias": bias_operand(gradients.u_bias),
    }
    programs = triton.cdiv(hidden, tile.hidden) * sub_networks * groups
    launch(
        mhf_backward_dk_du_kernel,
        programs,
        tile,
        grad_out.device,
        operands,
        parameters(problem, axes, tile),
    )


def run_dv_bias(problem: Problem, grad_out: Tensor, gradients: Gradients, tile: Tile) -> None:
    """Fill the gradient of V's bias (G, E, d)."""
    axes = token_axes(problem.r, grad_out)
    groups, sub_networks = problem.k.shape[:2]
    owners = groups * sub_networks
    steps = problem.q.shape[2] // groups * axes.batch * triton.cdiv(axes.length, tile.tokens)
    parts = parts_of_bias(owners, steps)
    width = padded_width(problem.q.shape[3])
    partial = None
    if parts > 1:
        partial = grad_out.new_empty((owners, parts, width), dtype=torch.float32)
    operands = {
        "R": router_operand(problem.r, axes, tile),
        "dOut": token_operand(grad_out, axes, tile),
        "dV_bias": bias_operand(gradients.v_bias),
        "Part": Operand(partial, None, None),
    }
    scalars = parameters(problem, axes, tile)
    for name in _UNUSED_BY_DOWN_BIAS:
        del scalars[name]
    scalars["parts"] = parts
    device = grad_out.device
    launch(mhf_backward_dv_bias_kernel, owners * parts, tile, device, operands, scalars)
    if partial is not None:
        added = {name: operands[name] for name in ("dV_bias", "Part")}
        scalars = {name: scalars[name] for name in ("parts", "E", "D", "OUT_SCALE", "BD")}
        launch(mhf_add_bias_parts_kernel, owners, tile, device, added, scalars)


def parts_of_bias(owners: int, steps: int) -> int:
    """How many programs share the tokens of one sub-network's gradient of V's bias.

    A program reads and adds: a card takes several at a time to be busy. One that reads less than
    some tiles costs more than it saves.
    """
    if owners >= ENOUGH_PROGRAMS:
        return 1
    return max(1, min(4 * ENOUGH_PROGRAMS // owners, steps // _FEWEST_STEPS, _MOST_PARTS))


@triton.jit
def mhf_backward_dq_kernel(
    Q, K, U, V, R, K_bias, U_bias, V_bias, dOut, dQ, dR,
    Q_strides, K_strides, U_strides, V_strides, R_strides,
    K_bias_strides, U_bias_strides, V_bias_strides, dOut_strides, dQ_strides, dR_strides,
    B, L,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_SCALE: tl.constexpr, U_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, COMPENSATED: tl.constexpr,
    Q_layout: tl.constexpr, K_layout: tl.constexpr, U_layout: tl.constexpr,
    V_layout: tl.constexpr, R_layout: tl.constexpr, dOut_layout: tl.constexpr,
    dQ_layout: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """dQ and dR of one token tile of one head; either may be None.

    dm K and dn U are added to one sum or, if APART, each to its own.
    """
    token_tiles = tl.cdiv(L, BM)
    program = tl.program_id(0)
    l0 = (program % token_tiles) * BM
    b = program // token_tiles % B
    h = program // token_tiles // B
    g = h // HEADS_PER_GROUP

    q = load_tokens(Q, Q_strides, b, l0, h, L, D, BM, BD, Q_layout)  # [BM, BD]
    do = load_tokens(dOut, dOut_strides, b, l0, h, L, D, BM, BD, dOut_layout)  # [BM, BD]
    dq = tl.zeros((BM, BD), tl.float32)
    carry = no_carry(BM, BD, COMPENSATED)
    if APART and U is not None:
        dq_up = tl.zeros((BM, BD), tl.float32)
    dr = tl.zeros((BM,), tl.float32)
    F_TILES: tl.constexpr = (F + BF - 1) // BF
    for i in tl.range(0, E * F_TILES):
        e = i // F_TILES
        f0 = (i % F_TILES) * BF
        k = load_weights(K, K_strides, g, e, f0, F, D, BF, BD, K_layout)  # [BF, BD]
        m = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BF]
        if K_SCALE != 1.0:
            m *= K_SCALE
        if K_bias is not None:
            m += load_bias(K_bias, K_bias_strides, g, e, f0, F, BF)[None, :]
        v = load_weights(V, V_strides, g, e, f0, F, D, BF, BD, V_layout)
        da = tl.dot(do, v.T, input_precision=PRECISION)  # [BM, BF]
        y, slope = activate_with_slope(m, ACTIVATION, APPROXIMATE)
        dn = da * y
        dm = da * slope
        if U is not None:
            u = load_weights(U, U_strides, g, e, f0, F, D, BF, BD, U_layout)
            n = tl.dot(q, u.T, input_precision=PRECISION)  # [BM, BF]
            if U_SCALE != 1.0:
                n *= U_SCALE
            if U_bias is not None:
                n += load_bias(U_bias, U_bias_strides, g, e, f0, F, BF)[None, :]
            dm *= n
        if dR is not None:
            # One store a sub-network, on its last tile; the sum restarts on its first.
            dr = tl.where(f0 == 0, 0.0, dr) + tl.sum(dn * n if U is not None else dn, 1)
            if V_bias is not None:
                v_bias = load_bias(V_bias, V_bias_strides, g, e, 0, D, BD)
                v_bias = tl.where(f0 == 0, v_bias, 0.0)
                dr += tl.sum(do.to(tl.float32) * v_bias[None, :], 1)
            last = f0 + BF >= F
            store_router(dR, dr * OUT_SCALE, dR_strides, b, l0, h, e, L, last, BM)
        if dQ is not None:
            if R is not None:
                r = load_router(R, R_strides, b, l0, h, e, L, BM, R_layout)[:, None]
                dm *= r
                dn *= r
            if K_SCALE != 1.0:
                dm *= K_SCALE
            dq, carry = add_product(dq, carry, dm.to(k.dtype), k, COMPENSATED, PRECISION)
            if U is not None:
                if U_SCALE != 1.0:
                    dn *= U_SCALE
                dn = dn.to(u.dtype)
                if APART:
                    dq_up = tl.dot(dn, u, dq_up)
                else:
                    dq, carry = add_product(dq, carry, dn, u, COMPENSATED, PRECISION)

    if dQ is not None:
        if APART and U is not None:
            dq += dq_up
        store_tokens(dQ, dq * OUT_SCALE, dQ_strides, b, l0, h, L, D, BM, BD, dQ_layout)


@triton.jit
def mhf_backward_dv_kernel(
    Q, K, U, R, K_bias, U_bias, dOut, dV,
    Q_strides, K_strides, U_strides, R_strides,
    K_bias_strides, U_bias_strides, dOut_strides, dV_strides,
    B, L,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_SCALE: tl.constexpr, U_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, COMPENSATED: tl.constexpr,
    Q_layout: tl.constexpr, K_layout: tl.constexpr, U_layout: tl.constexpr,
    R_layout: tl.constexpr, dOut_layout: tl.constexpr, dV_layout: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dV of one hidden tile, over all tokens of all heads that share it."""
    F_TILES: tl.constexpr = (F + BF - 1) // BF
    program = tl.program_id(0)
    f0 = (program % F_TILES) * BF
    e = program // F_TILES % E
    g = program // F_TILES // E

    k = load_weights(K, K_strides, g, e, f0, F, D, BF, BD, K_layout)  # [BF, BD]
    if K_bias is not None:
        k_bias = load_bias(K_bias, K_bias_strides, g, e, f0, F, BF)[:, None]  # [BF, 1]
    if U is not None:
        u = load_weights(U, U_strides, g, e, f0, F, D, BF, BD, U_layout)
        if U_bias is not None:
            u_bias = load_bias(U_bias, U_bias_strides, g, e, f0, F, BF)[:, None]
    dv = tl.zeros((BF, BD), tl.float32)
    carry = no_carry(BF, BD, COMPENSATED)
    for sequence in tl.range(0, HEADS_PER_GROUP * B):
        h = g * HEADS_PER_GROUP + sequence // B
        b = sequence % B
        for l0 in tl.range(0, L, BM):
            q = load_tokens(Q, Q_strides, b, l0, h, L, D, BM, BD, Q_layout)  # [BM, BD]
            m = tl.dot(k, q.T, input_precision=PRECISION)  # [BF, BM]
            if K_SCALE != 1.0:
                m *= K_SCALE
            if K_bias is not None:
                m += k_bias
            a = activate(m, ACTIVATION, APPROXIMATE)
            if U is not None:
                n = tl.dot(u, q.T, input_precision=PRECISION)  # [BF, BM]
                if U_SCALE != 1.0:
                    n *= U_SCALE
                if U_bias is not None:
                    n += u_bias
                if R is not None:
                    n *= load_router(R, R_strides, b, l0, h, e, L, BM, R_layout)[None, :]
                a *= n
            elif R is not None:
                a *= load_router(R, R_strides, b, l0, h, e, L, BM, R_layout)[None, :]
            do = load_tokens(dOut, dOut_strides, b, l0, h, L, D, BM, BD, dOut_layout)  # [BM, BD]
            dv, carry = add_product(dv, carry, a.to(do.dtype), do, COMPENSATED, PRECISION)
    store_weights(dV, dv * OUT_SCALE, dV_strides, g, e, f0, F, D, BF, BD, dV_layout)


@triton.jit
def mhf_backward_dk_du_kernel(
    Q, K, U, V, R, K_bias, U_bias, dOut, dK, dU, dK_bias, dU_bias,
    Q_strides, K_strides, U_strides, V_strides, R_strides,
    K_bias_strides, U_bias_strides, dOut_strides, dK_strides, dU_strides,
    dK_bias_strides, dU_bias_strides,
    B, L,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_SCALE: tl.constexpr, U_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, COMPENSATED: tl.constexpr,
    Q_layout: tl.constexpr, K_layout: tl.constexpr, U_layout: tl.constexpr,
    V_layout: tl.constexpr, R_layout: tl.constexpr, dOut_layout: tl.constexpr,
    dK_layout: tl.constexpr, dU_layout: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dK, dU and their biases' gradients of one hidden tile; any of them may be None."""
    F_TILES: tl.constexpr = (F + BF - 1) // BF
    program = tl.program_id(0)
    f0 = (program % F_TILES) * BF
    e = program // F_TILES % E
    g = program // F_TILES // E

    k = load_weights(K, K_strides, g, e, f0, F, D, BF, BD, K_layout)  # [BF, BD]
    v = load_weights(V, V_strides, g, e, f0, F, D, BF, BD, V_layout)
    if K_bias is not None:
        k_bias = load_bias(K_bias, K_bias_strides, g, e, f0, F, BF)[:, None]  # [BF, 1]
    if U is not None:
        u = load_weights(U, U_strides, g, e, f0, F, D, BF, BD, U_layout)
        if U_bias is not None:
            u_bias = load_bias(U_bias, U_bias_strides, g, e, f0, F, BF)[:, None]
    dk = tl.zeros((BF, BD), tl.float32)
    du = tl.zeros((BF, BD), tl.float32)
    dk_carry = no_carry(BF, BD, COMPENSATED)
    du_carry = no_carry(BF, BD, COMPENSATED)
    dk_bias = tl.zeros((BF,), tl.float32)
    du_bias = tl.zeros((BF,), tl.float32)
    for sequence in tl.range(0, HEADS_PER_GROUP * B):
        h = g * HEADS_PER_GROUP + sequence // B
        b = sequence % B
        for l0 in tl.range(0, L, BM):
            q = load_tokens(Q, Q_strides, b, l0, h, L, D, BM, BD, Q_layout)  # [BM, BD]
            do = load_tokens(dOut, dOut_strides, b, l0, h, L, D, BM, BD, dOut_layout)  # [BM, BD]
            m = tl.dot(k, q.T, input_precision=PRECISION)  # [BF, BM]
            if K_SCALE != 1.0:
                m *= K_SCALE
            if K_bias is not None:
                m += k_bias
            if U is not None:
                n = tl.dot(u, q.T, input_precision=PRECISION)  # [BF, BM]
                if U_SCALE != 1.0:
                    n *= U_SCALE
                if U_bias is not None:
                    n += u_bias
            da = tl.dot(v, do.T, input_precision=PRECISION)  # [BF, BM]
            if R is not None:
                da *= load_router(R, R_strides, b, l0, h, e, L, BM, R_layout)[None, :]
            y, slope = activate_with_slope(m, ACTIVATION, APPROXIMATE)
            dn = da * y
            dm = da * slope
            if U is not None:
                dm *= n
            if dK_bias is not None:
                dk_bias += tl.sum(dm, 1)
            if dU_bias is not None:
                du_bias += tl.sum(dn, 1)
            if dK is not None:
                dm = dm.to(q.dtype)
                dk, dk_carry = add_product(dk, dk_carry, dm, q, COMPENSATED, PRECISION)
            if dU is not None:
                dn = dn.to(q.dtype)
                du, du_carry = add_product(du, du_carry, dn, q, COMPENSATED, PRECISION)

    if dK is not None:
        dk *= K_SCALE * OUT_SCALE
        store_weights(dK, dk, dK_strides, g, e, f0, F, D, BF, BD, dK_layout)
    if dU is not None:
        du *= U_SCALE * OUT_SCALE
        store_weights(dU, du, dU_strides, g, e, f0, F, D, BF, BD, dU_layout)
    if dK_bias is not None:
        store_bias(dK_bias, dk_bias * OUT_SCALE, dK_bias_strides, g, e, f0, F, BF)
    if dU_bias is not None:
        store_bias(dU_bias, du_bias * OUT_SCALE, dU_bias_strides, g, e, f0, F, BF)


@triton.jit
def mhf_backward_dv_bias_kernel(
    R, dOut, dV_bias, Part, R_strides, dOut_strides, dV_bias_strides, Part_strides,
    B, L, parts,
    E: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, OUT_SCALE: tl.constexpr,
    R_layout: tl.constexpr, dOut_layout: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dV_bias of one sub-network: dOut summed over its tokens, weighted by R; or one part of it."""
    owner = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    e = owner % E
    g = owner // E
    acc = tl.zeros((BM, BD), tl.float32)
    token_tiles = tl.cdiv(L, BM)
    steps = HEADS_PER_GROUP * B * token_tiles
    for step in tl.range(steps * part // parts, steps * (part + 1) // parts):
        sequence = step // token_tiles
        h = g * HEADS_PER_GROUP + sequence // B
        b = sequence % B
        l0 = step % token_tiles * BM
        do = load_tokens(dOut, dOut_strides, b, l0, h, L, D, BM, BD, dOut_layout).to(tl.float32)
        if R is not None:
            do *= load_router(R, R_strides, b, l0, h, e, L, BM, R_layout)[:, None]
        acc += do
    total = tl.sum(acc, 0)
    if Part is not None:
        tl.store(Part + tl.program_id(0) * BD + tl.arange(0, BD), total)
    else:
        store_bias(dV_bias, total * OUT_SCALE, dV_bias_strides, g, e, 0, D, BD)


@triton.jit
def mhf_add_bias_parts_kernel(
    dV_bias, Part, dV_bias_strides, Part_strides,
    parts, E: tl.constexpr, D: tl.constexpr, OUT_SCALE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the parts of one sub-network's gradient of V's bias, in their order."""
    e = tl.program_id(0) % E
    g = tl.program_id(0) // E
    acc = tl.zeros((BD,), tl.float32)
    for part in tl.range(0, parts, loop_unroll_factor=4):
        acc += tl.load(Part + (tl.program_id(0) * parts + part) * BD + tl.arange(0, BD))
    store_bias(dV_bias, acc * OUT_SCALE, dV_bias_strides, g, e, 0, D, BD)
