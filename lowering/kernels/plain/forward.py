"""The forward kernel: one token tile of one head against every hidden unit of every sub-network.

The sum over sub-networks and hidden units has no softmax in it, so its order is free: one loop runs
through all (e, f) tiles, keeps a single accumulator in registers, and the hidden activations never
leave the chip. R scales the hidden tile rather than its product with V, which lets all sub-networks
share that accumulator.

Hidden units beyond F meet zero rows of V, and tokens beyond L are not stored: neither needs a mask.

Few tokens make few tiles, and then the weights have to be streamed by more programs than that: each
tile's hidden units are cut in parts, one program each (splitting.py). These kernels take some
microseconds, so their launches overlap with what runs before and after them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...tiles import Tile
from ..activations import activate
from ..launch import early_launch, launch, parameters
from ..loads import load_bias, load_router, load_tokens, load_weights, store_tokens
from ..operands import (
    Operand,
    TokenAxes,
    bias_operand,
    router_operand,
    token_axes,
    token_operand,
    weight_operand,
)
from ..splitting import Split, add_parts
from .sums import add_product, no_carry


class Work(NamedTuple):
    """What a forward pass launches, tensor descriptors and early launches apart."""

    programs: int
    operands: dict[str, Operand]
    scalars: dict[str, Any]
    axes: TokenAxes
    split: Split
    tiles: int
    partial: Tensor | None  # where the parts of tiles go that are cut


def run_forward(problem: Problem, out: Tensor, tile: Tile) -> None:
    """Fill `out` (B, L, H, d)."""
    work = work_of_forward(problem, out, tile)
    partial = work.partial
    scalars = work.scalars | early_launch(out.device, partial is not None)
    launch(mhf_forward_kernel, work.programs, tile, out.device, work.operands, scalars)
    if partial is not None:
        add_parts(partial, out, work.axes, work.split, work.tiles, problem.out_scale)


def work_of_forward(problem: Problem, out: Tensor, tile: Tile) -> Work:
    """What fills `out` (B, L, H, d)."""
    axes = token_axes(problem.q, problem.r, out)
    heads = problem.q.shape[2]
    sub_networks, hidden = problem.k.shape[1:3]
    tiles = triton.cdiv(axes.length, tile.tokens) * axes.batch * heads
    parts = min(tile.parts, sub_networks * triton.cdiv(hidden, tile.hidden))
    split = Split(tiles, 1) if parts == 1 else Split(0, parts)
    partial = split.workspace(tiles, tile.tokens, out)
    operands = {
        "Q": token_operand(problem.q, axes, tile),
        "K": weight_operand(problem.k, tile),
        "U": weight_operand(problem.u, tile),
        "V": weight_operand(problem.v, tile),
        "R": router_operand(problem.r, axes, tile),
        "K_bias": bias_operand(problem.k_bias),
        "U_bias": bias_operand(problem.u_bias),
        "V_bias": bias_operand(problem.v_bias),
        "Out": token_operand(out if partial is None else None, axes, tile),
        "Part": Operand(partial, None, None),
    }
    scalars = parameters(problem, axes, tile) | {"PARTS": split.parts}
    return Work(split.pieces(tiles), operands, scalars, axes, split, tiles, partial)


@triton.jit
def mhf_forward_kernel(
    Q, K, U, V, R, K_bias, U_bias, V_bias, Out, Part,
    Q_strides, K_strides, U_strides, V_strides, R_strides,
    K_bias_strides, U_bias_strides, V_bias_strides, Out_strides, Part_strides,
    B, L, PARTS,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_SCALE: tl.constexpr, U_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, COMPENSATED: tl.constexpr,
    Q_layout: tl.constexpr, K_layout: tl.constexpr, U_layout: tl.constexpr,
    V_layout: tl.constexpr, R_layout: tl.constexpr, Out_layout: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Out, or with Part the partial sums of every tile's PARTS parts: [.., BM, D] in float32."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    # Token tiles fastest: programs that run together read the same head's weights from L2.
    token_tiles = tl.cdiv(L, BM)
    program = tl.program_id(0)
    F_TILES: tl.constexpr = (F + BF - 1) // BF
    first = 0
    last = E * F_TILES
    if Part is not None:
        part = program % PARTS
        first = part * (E * F_TILES) // PARTS
        last = (part + 1) * (E * F_TILES) // PARTS
        Part += program.to(tl.int64) * (BM * D)
        program //= PARTS
    l0 = (program % token_tiles) * BM
    b = program // token_tiles % B
    h = program // token_tiles // B
    g = h // HEADS_PER_GROUP

    q = load_tokens(Q, Q_strides, b, l0, h, L, D, BM, BD, Q_layout)  # [BM, BD]
    acc = tl.zeros((BM, BD), tl.float32)
    carry = no_carry(BM, BD, COMPENSATED)
    for i in tl.range(first, last):
        e = i // F_TILES
        f0 = (i % F_TILES) * BF
        if R is not None:  # first, so that it arrives while the products run
            r = load_router(R, R_strides, b, l0, h, e, L, BM, R_layout)[:, None]  # [BM, 1]
        k = load_weights(K, K_strides, g, e, f0, F, D, BF, BD, K_layout)  # [BF, BD]
        m = tl.dot(q, k.T, input_precision=PRECISION)  # [BM, BF]
        if K_SCALE != 1.0:
            m *= K_SCALE
        if K_bias is not None:
            m += load_bias(K_bias, K_bias_strides, g, e, f0, F, BF)[None, :]
        a = activate(m, ACTIVATION, APPROXIMATE)
        if U is not None:
            u = load_weights(U, U_strides, g, e, f0, F, D, BF, BD, U_layout)
            n = tl.dot(q, u.T, input_precision=PRECISION)  # [BM, BF]
            if U_SCALE != 1.0:
                n *= U_SCALE
            if U_bias is not None:
                n += load_bias(U_bias, U_bias_strides, g, e, f0, F, BF)[None, :]
            if R is not None:
                n *= r
            a *= n
        elif R is not None:
            a *= r
        v = load_weights(V, V_strides, g, e, f0, F, D, BF, BD, V_layout)
        acc, carry = add_product(acc, carry, a.to(v.dtype), v, COMPENSATED, PRECISION)  # [BM, BD]

    if V_bias is not None:
        for e in tl.range(0, E if first == 0 else 0):  # once for each tile
            v_bias = load_bias(V_bias, V_bias_strides, g, e, 0, D, BD)[None, :]  # [1, BD]
            if R is not None:
                v_bias *= load_router(R, R_strides, b, l0, h, e, L, BM, R_layout)[:, None]
            acc += v_bias
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if Part is not None:
        rows = tl.arange(0, BM)
        c = tl.arange(0, BD)
        mask = (l0 + rows < L)[:, None] & (c < D)[None, :]
        # Weights that stream through the cache would push them out to memory before they are added.
        pointers = Part + rows[:, None] * D + c[None, :]
        tl.store(pointers, acc, mask=mask, eviction_policy="evict_last")
    else:
        store_tokens(Out, acc * OUT_SCALE, Out_strides, b, l0, h, L, D, BM, BD, Out_layout)
