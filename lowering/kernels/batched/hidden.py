"""What is between the products, in place: one pass over the hidden units of a chunk.

A chunk's matrices (groups, rows, E F) are contiguous. They hold sums of products, rounded to the
dtype of the network; scales are in them already. With y = act(m + k_bias), y' its slope and n the
up projection with its bias, the forward pass needs r y n for V's product, and the backward pass

    a = r y n    dm = r da n y'    dn = r da y    dR = sum_f da y n

where da = dOut V^T. A program owns a tile of rows and one sub-network, so that a row's sum for dR
has one owner. Sums over rows, for the gradients of biases, are written for each tile of rows and
added afterwards: no atomics.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...tiles import BatchedTile
from ..activations import activate, activate_with_slope
from ..launch import allows_approximation, start
from ..replay import repeat


def activate_units(
    problem: Problem, m: Tensor, n: Tensor | None, r: Tensor | None, tile: BatchedTile
) -> None:
    """Turn the products m and n (groups, rows, E F) into V's operand, in place of m.

    The problem's biases are those of the chunk, and r is (groups, rows, E).
    """
    _launch(
        mhf_batched_forward_kernel,
        problem,
        tile,
        {"M": m, "N": n, "R": r, "K_bias": problem.k_bias, "U_bias": problem.u_bias},
        {},
    )


def differentiate_units(
    problem: Problem,
    m: Tensor,
    n: Tensor | None,
    da: Tensor | None,
    r: Tensor | None,
    dr: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    tile: BatchedTile,
    *,
    adds_dr: bool,
    reads_n: bool,
    writes: tuple[bool, bool, bool],
) -> None:
    """Turn the products m, n and da into the hidden units and their gradients, in place.

    Args:
        problem: with the biases of the chunk.
        m: becomes a.
        n: becomes dn; None without a gate, or if neither n nor dn is needed.
        da: becomes dm.
        r: the router's weights, (groups, rows, E).
        dr: for R's gradient, (groups, rows, E) in float32.
        sums: of dm and of dn over each tile of rows, (tiles, groups, E F) in float32.
        tile: how a program walks them.
        adds_dr: whether R's gradient is added to what is in `dr`.
        reads_n: whether n was computed.
        writes: whether a, dm and dn are written.
    """
    tensors = {"M": m, "N": n, "dA": da, "R": r, "K_bias": problem.k_bias}
    tensors |= {"U_bias": problem.u_bias, "dR": dr, "K_sums": sums[0], "U_sums": sums[1]}
    flags = dict(zip(("WRITES_A", "WRITES_DM", "WRITES_DN"), writes, strict=True))
    flags |= {"ADDS_DR": adds_dr, "READS_N": reads_n, "WHOLE": dr is not None}
    _launch(mhf_batched_backward_kernel, problem, tile, tensors, flags)


def row_tiles(rows: int, tile: BatchedTile) -> int:
    """How many tiles of rows have sums of their own."""
    return -(-rows // tile.tokens)


def _launch(
    kernel: Any,
    problem: Problem,
    tile: BatchedTile,
    tensors: dict[str, Tensor | None],
    flags: dict[str, bool],
) -> None:
    """Launch `kernel`; launches on tensors that look the same are repeated."""
    m = tensors["M"]
    assert m is not None
    groups, rows, _ = m.shape
    _, sub_networks, hidden, _ = problem.k.shape

    def run() -> None:
        arguments: dict[str, Any] = dict(tensors) | flags
        for name in ("R", "K_bias", "U_bias"):
            x = tensors[name]
            arguments[f"{name}_strides"] = None if x is None else x.stride()
        arguments |= {
            "ROWS": rows,
            "E": sub_networks,
            "F": hidden,
            "ACTIVATION": problem.activation,
            "APPROXIMATE": allows_approximation(m.dtype),
            "BM": tile.tokens,
            "BF": tile.hidden,
        }
        steps = 1 if flags.get("WHOLE") else -(-hidden // tile.hidden)
        programs = groups * row_tiles(rows, tile) * sub_networks * steps
        start(kernel, programs, tile, m.device, arguments)

    what = (kernel.fn.__name__, hidden, problem.activation, tile, *flags.values())
    repeat(what, [m, *(x for name, x in tensors.items() if name != "M")], run)


@triton.jit
def _tile_of(ROWS, E: tl.constexpr, F: tl.constexpr, STEPS: tl.constexpr, BM: tl.constexpr):
    """The group, sub-network, first step and rows of a program; a row's neighbours follow it."""
    program = tl.program_id(0)
    step = program % STEPS
    e = program // STEPS % E
    tiles = tl.cdiv(ROWS, BM)
    i = program // STEPS // E % tiles
    g = program // STEPS // E // tiles
    rows = i * BM + tl.arange(0, BM)
    return g, e, step, i, rows


@triton.jit
def _router_of(R, R_strides, g, e, rows, ROWS):
    """R of a program's rows: float32 [BM, 1]."""
    R += tl.cast(g, tl.int64) * R_strides[0] + tl.cast(e, tl.int64) * R_strides[2]
    r = tl.load(R + rows.to(tl.int64) * R_strides[1], mask=rows < ROWS, other=0.0)
    return r.to(tl.float32)[:, None]


@triton.jit
def _bias_of(B, B_strides, g, e, f, F: tl.constexpr):
    """A bias of hidden units f: float32 [1, BF]."""
    B += tl.cast(g, tl.int64) * B_strides[0] + tl.cast(e, tl.int64) * B_strides[1]
    return tl.load(B + f.to(tl.int64) * B_strides[2], mask=f < F, other=0.0).to(tl.float32)[None, :]


@triton.jit
def mhf_batched_forward_kernel(
    M, N, R, K_bias, U_bias, R_strides, K_bias_strides, U_bias_strides,
    ROWS,
    E: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """A tile of V's operand, in place of M."""
    STEPS: tl.constexpr = (F + BF - 1) // BF
    g, e, step, _, rows = _tile_of(ROWS, E, F, STEPS, BM)
    f = step * BF + tl.arange(0, BF)
    at = tl.cast(g, tl.int64) * ROWS + rows.to(tl.int64)
    at = at[:, None] * (E * F) + e * F + f[None, :]
    mask = (rows < ROWS)[:, None] & (f < F)[None, :]

    m = tl.load(M + at, mask=mask, other=0.0).to(tl.float32)  # [BM, BF]
    if N is not None:
        n = tl.load(N + at, mask=mask, other=0.0).to(tl.float32)
    if K_bias is not None:
        m += _bias_of(K_bias, K_bias_strides, g, e, f, F)
    a = activate(m, ACTIVATION, APPROXIMATE)
    if N is not None:
        if U_bias is not None:
            n += _bias_of(U_bias, U_bias_strides, g, e, f, F)
        a *= n
    if R is not None:
        a *= _router_of(R, R_strides, g, e, rows, ROWS)
    tl.store(M + at, a.to(M.dtype.element_ty), mask=mask)


@triton.jit
def mhf_batched_backward_kernel(
    M, N, dA, R, K_bias, U_bias, dR, K_sums, U_sums,
    R_strides, K_bias_strides, U_bias_strides,
    ROWS,
    E: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    ADDS_DR: tl.constexpr, READS_N: tl.constexpr, WRITES_A: tl.constexpr,
    WRITES_DM: tl.constexpr, WRITES_DN: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """A tile of rows and hidden units or, if WHOLE, of rows and a sub-network's hidden units.

    M becomes a, dA dm and N dn.
    """
    TILES: tl.constexpr = (F + BF - 1) // BF
    STEPS: tl.constexpr = 1 if WHOLE else TILES
    g, e, step, i, rows = _tile_of(ROWS, E, F, STEPS, BM)
    row = tl.cast(g, tl.int64) * ROWS + rows.to(tl.int64)
    # of which a sum has a line for each tile of rows, whose groups follow each other
    groups = tl.num_programs(0) // (STEPS * E * tl.cdiv(ROWS, BM))
    line = (tl.cast(i, tl.int64) * groups + g) * (E * F) + e * F
    if R is not None:
        r = _router_of(R, R_strides, g, e, rows, ROWS)
    if dR is not None:
        dr = tl.zeros((BM, BF), tl.float32)

    for j in tl.range(0, TILES // STEPS):
        f = (step + j) * BF + tl.arange(0, BF)
        at = row[:, None] * (E * F) + e * F + f[None, :]
        mask = (rows < ROWS)[:, None] & (f < F)[None, :]
        m = tl.load(M + at, mask=mask, other=0.0).to(tl.float32)  # [BM, BF]
        if READS_N:
            n = tl.load(N + at, mask=mask, other=0.0).to(tl.float32)
            if U_bias is not None:
                n += _bias_of(U_bias, U_bias_strides, g, e, f, F)
        if K_bias is not None:
            m += _bias_of(K_bias, K_bias_strides, g, e, f, F)
        y, slope = activate_with_slope(m, ACTIVATION, APPROXIMATE)
        if WRITES_A:
            a = y
            if READS_N:
                a *= n
            if R is not None:
                a *= r
            tl.store(M + at, a.to(M.dtype.element_ty), mask=mask)
        if dA is not None:  # zero beyond the rows, as is all that follows
            da = tl.load(dA + at, mask=mask, other=0.0).to(tl.float32)
            dn = da * y
            dm = da * slope
            if READS_N:
                dm *= n
            if dR is not None:
                dr += dn * n if READS_N else dn
            if R is not None:
                dm *= r
                dn *= r
            if WRITES_DM:
                tl.store(dA + at, dm.to(dA.dtype.element_ty), mask=mask)
            if WRITES_DN:
                tl.store(N + at, dn.to(N.dtype.element_ty), mask=mask)
            if K_sums is not None:
                tl.store(K_sums + line + f, tl.sum(dm, 0), mask=f < F)
            if U_sums is not None:
                tl.store(U_sums + line + f, tl.sum(dn, 0), mask=f < F)

    if dR is not None:
        pointers = dR + row * E + e
        total = tl.sum(dr, 1)
        if ADDS_DR:
            total += tl.load(pointers, mask=rows < ROWS, other=0.0)
        tl.store(pointers, total, mask=rows < ROWS)
