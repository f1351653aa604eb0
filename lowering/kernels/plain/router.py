"""The product of 16-bit queries with a router's weights, in float32, and its gradients.

Matrix units multiply float32 only after cutting it to TF32. Here every float32 operand is instead
written as a sum of bfloat16 numbers, whose products are exact and are added in float32: 16 bits of
query need one such number (bfloat16) or two (float16), a float32 weight three. That is as exact as
float32, and still costs nothing: reading the queries is all the time that these kernels take.

With G = dLogits, dQ = G W^T is rounded to the queries' dtype, so the leading parts of G and W are
enough for it. One kernel computes dQ and dW, to read the queries once: each program walks a share
of the tokens of some columns of one head and writes its sum of dW, in float32; the host adds those
in order.

All those parts take registers, so heads are read in blocks of at most 64 columns.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...device import capability, multiprocessors
from ...tiles import Tile, padded_width
from ..launch import launch, sums_lie_apart
from ..loads import token_pointers
from ..operands import Operand, token_axes
from ..replay import repeat
from ..verdicts import Few, Results, WrongKernelError, lies, random_on, trusts
from .sums import add_product_apart

PART_ROWS = 32  # of a router that is cut: no product has more sub-networks

_TOKENS = 64  # of a tile
_FEW_TOKENS = 5 * _TOKENS // 2  # of a comparison
_COLUMNS = 64
_CUT_COLUMNS = 32  # that a program cuts
_PROGRAMS = 4  # of the backward kernel on each multiprocessor: its loads overlap


def forward(q: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the product to `out` (B, L, H, E), float32 of any strides."""
    if out.numel() == 0:
        return

    def run() -> None:
        require("router", q, weight, (), _compare_forward)
        programs, tile, operands, scalars = work_of_forward(q, weight, out)
        launch(mhf_router_kernel, programs, tile, q.device, operands, scalars)

    repeat("router", (q, weight, out), run)


def work_of_forward(
    q: Tensor, weight: Tensor, out: Tensor
) -> tuple[int, Tile, dict[str, Operand], dict[str, object]]:
    """The number of programs that fill `out`, their tile, operands, and other parameters."""
    axes = token_axes(q, out)
    tile, operands, scalars = _shared(q, weight)
    operands |= {"Out": Operand(out, axes.strides(out), None)}
    operands |= {"Q": Operand(q, axes.strides(q), None)}
    scalars |= {"B": axes.batch, "L": axes.length}
    return triton.cdiv(axes.length, _TOKENS) * axes.batch * q.shape[2], tile, operands, scalars


def backward(grad_out: Tensor, q: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of those of (q, weight) that `needs` marks, each in its input's dtype."""
    if grad_out.numel() == 0:
        empty = [x for x, needed in zip((q, weight), needs, strict=True) if needed]
        return [torch.zeros_like(x) for x in empty]
    gradients = [torch.empty_like(q)] if needs[0] else []
    total = _run_backward(grad_out, q, weight, gradients[0] if gradients else None, needs[1])
    return gradients if total is None else [*gradients, total.to(weight.dtype)]


def backward_onto(
    dq: Tensor, grad_out: Tensor, q: Tensor, weight: Tensor, needs_weight: bool
) -> Tensor | None:
    """Add the gradient of q to `dq`, which no other argument shares memory with.

    Returns the gradient of the weight, if it is wanted.
    """
    if grad_out.numel() == 0:
        return torch.zeros_like(weight) if needs_weight else None
    total = _run_backward(grad_out, q, weight, dq, needs_weight, onto=True)
    return None if total is None else total.to(weight.dtype)


def _run_backward(
    grad_out: Tensor,
    q: Tensor,
    weight: Tensor,
    dq: Tensor | None,
    needs_weight: bool,
    *,
    onto: bool = False,
) -> Tensor | None:
    """Fill `dq`, or add to it, and return the weight's gradient in float32, if they are wanted."""
    groups, head_dim, sub_networks = weight.shape
    heads = q.shape[2]
    axes = token_axes(grad_out, q, dq)
    tiles = triton.cdiv(axes.length, _TOKENS) * axes.batch
    blocks = triton.cdiv(head_dim, _COLUMNS)
    parts = max(1, min(tiles, _PROGRAMS * multiprocessors(q.device) // (heads * blocks)))
    shape = (heads, parts, head_dim, sub_networks)
    sums = q.new_empty(shape, dtype=torch.float32) if needs_weight else None

    def run() -> None:
        wanted = (dq is not None, needs_weight, onto)
        require("router backward", q, weight, wanted, partial(_compare_backward, wanted))
        tile, operands, scalars = _shared(q, weight)
        if onto and q.dtype == torch.float16 and capability(q.device)[0] in (8, 12):
            scalars["BM"] = _TOKENS // 2  # with both parts of Q, and dQ, whole tiles spill
        operands |= {
            "Q": Operand(q, axes.strides(q), None),
            "Grad": Operand(grad_out, axes.strides(grad_out), None),
            "dQ": Operand(dq, None if dq is None else axes.strides(dq), None),
            "Part": Operand(sums, None, None),
        }
        scalars |= {"B": axes.batch, "L": axes.length, "PARTS": parts, "ONTO": onto}
        programs = heads * parts * blocks
        launch(mhf_router_backward_kernel, programs, tile, q.device, operands, scalars)

    repeat(("router backward", onto), (grad_out, q, weight, dq, sums), run)
    return None if sums is None else sums.view(groups, -1, head_dim, sub_networks).sum(1)


def require(
    kernel: str,
    q: Tensor,
    weight: Tensor,
    about: Hashable,
    compare: Callable[[Tensor, Tensor], Results],
) -> None:
    """Raise WrongKernelError unless a kernel of such queries and weights is right on this card.

    `compare` gets few queries of one group of heads, and its weights.
    """
    share = q.shape[2] // weight.shape[0]
    about = (lies(q), lies(weight), share, tuple(weight.shape[1:]), about)

    def on_few() -> Results:
        random, few = random_on(q.device), Few(_FEW_TOKENS, share)
        return compare(few.of_tokens(q, random), few.of_weights(weight, random))

    if not trusts("plain", kernel, about, q.device, on_few):
        raise WrongKernelError(kernel)


def _compare_forward(q: Tensor, weight: Tensor) -> Results:
    out = q.new_full((*q.shape[:3], weight.shape[2]), math.nan, dtype=torch.float32)
    forward(q, weight, out)
    return [(out, q.double() @ weight.double())]


def _compare_backward(wanted: tuple[bool, bool, bool], q: Tensor, weight: Tensor) -> Results:
    needs_q, needs_weight, onto = wanted
    grad = random_on(q.device)(torch.float32, *q.shape[:3], weight.shape[2])
    dq = q.clone() if onto else torch.full_like(q, math.nan)
    total = _run_backward(grad, q, weight, dq if needs_q else None, needs_weight, onto=onto)
    results: Results = []
    if needs_q:
        expected = grad.double() @ weight.double().mT
        results.append((dq, expected + q.double() if onto else expected))
    if total is not None:
        results.append((total, torch.einsum("blhd,blhe->de", q.double(), grad.double())[None]))
    return results


def _shared(q: Tensor, weight: Tensor) -> tuple[Tile, dict[str, Operand], dict[str, object]]:
    """What the two kernels have in common."""
    scalars = product_constants(q, weight) | {"BM": _TOKENS}
    tile = Tile(_TOKENS, scalars["BE"], 4, 2, descriptors=False)
    return tile, {"W": Operand(weight, weight.stride(), None)}, dict(scalars)


def product_constants(q: Tensor, weight: Tensor) -> dict[str, int]:
    """The sizes and parts that a product is compiled for, by the names of kernel parameters."""
    groups, head_dim, sub_networks = weight.shape
    return {
        "E": sub_networks,
        "D": head_dim,
        "HEADS_PER_GROUP": q.shape[2] // groups,
        "Q_PARTS": 1 if q.dtype == torch.bfloat16 else 2,
        "W_PARTS": parts_of(weight.dtype),
        "BE": max(16, triton.next_power_of_2(sub_networks)),
        "BD": min(_COLUMNS, padded_width(head_dim)),
        "APART": sums_lie_apart(q.device),
    }


def parts_of(dtype: torch.dtype) -> int:
    """How many bfloat16 numbers make one of a router's weights."""
    return {torch.float32: 3, torch.float16: 2}.get(dtype, 1)


def cut_router(weight: Tensor) -> Tensor:
    """The parts of a router's weights (G, d, E), for kernels that load them by descriptors.

    Returns bfloat16 (G, parts * 32, d), the width rounded up to multiples of 8: each part's
    sub-networks, and zeros in place of missing ones.
    """
    groups, head_dim, sub_networks = weight.shape
    parts, padded = parts_of(weight.dtype), 8 * triton.cdiv(head_dim, 8)
    shape = (groups, parts * PART_ROWS, padded)
    out = torch.empty(shape, dtype=torch.bfloat16, device=weight.device)
    operands = {
        "W": Operand(weight, weight.stride(), None),
        "Out": Operand(out, None, None),
    }
    scalars = {"E": sub_networks, "D": head_dim, "PADDED": padded, "W_PARTS": parts}
    scalars |= {"BE": PART_ROWS, "BD": _CUT_COLUMNS}
    programs = groups * triton.cdiv(padded, _CUT_COLUMNS)
    tile = Tile(PART_ROWS, _CUT_COLUMNS, 4, 1, descriptors=False)
    launch(mhf_cut_router_kernel, programs, tile, weight.device, operands, scalars)
    return out


@triton.jit
def _leading(x):
    """The bfloat16 nearest to each number: the first part of its sum."""
    return x.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _rest(x, part):
    """The remainder of each number after a part. Exact."""
    return x.to(tl.float32) - part.to(tl.float32)


@triton.jit
def load_head(X, strides, b, l, h, c, L, C: tl.constexpr):
    """Tokens l and columns c of one head, zero beyond L and C."""
    pointers = token_pointers(X, strides, b, l[:, None], h, c[None, :])
    return tl.load(pointers, mask=(l < L)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def store_head(X, value, strides, b, l, h, c, L, C: tl.constexpr):
    """The counterpart of `load_head`; rounds `value` once, to the dtype of X."""
    pointers = token_pointers(X, strides, b, l[:, None], h, c[None, :])
    value = value.to(X.dtype.element_ty)
    tl.store(pointers, value, mask=(l < L)[:, None] & (c < C)[None, :])


@triton.jit
def load_router_weights(W, strides, g, c, e, D: tl.constexpr, E: tl.constexpr):
    """Columns c of one group's weights, the width innermost: [BE, BD]."""
    W += tl.cast(g, tl.int64) * strides[0]
    pointers = W + c.to(tl.int64)[None, :] * strides[1] + e.to(tl.int64)[:, None] * strides[2]
    return tl.load(pointers, mask=(e < E)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def exact_product(q, w, Q_PARTS: tl.constexpr, W_PARTS: tl.constexpr, APART: tl.constexpr):
    """Some columns of queries [BM, BD] times those of weights [BE, BD], as float32: [BM, BE]."""
    q0, w0 = _leading(q), _leading(w)
    # Matrix units cut what they add to a sum they began with: the small products have a sum of
    # their own, and so has every block of columns.
    small = tl.zeros((q.shape[0], w.shape[0]), tl.float32)
    if W_PARTS > 1:
        w_rest = _rest(w, w0)
        w1 = _leading(w_rest)
        if W_PARTS > 2:
            small = add_product_apart(small, q0, _leading(_rest(w_rest, w1)).T, APART)
        if Q_PARTS > 1:
            small = add_product_apart(small, _leading(_rest(q, q0)), w1.T, APART)
        small = add_product_apart(small, q0, w1.T, APART)
    if Q_PARTS > 1:
        small = add_product_apart(small, _leading(_rest(q, q0)), w0.T, APART)
    if APART:
        return add_product_apart(small, q0, w0.T, APART)
    else:
        return tl.dot(q0, w0.T) + small


@triton.jit
def mhf_router_kernel(
    Q, W, Out, Q_strides, W_strides, Out_strides, B, L,
    E: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    Q_PARTS: tl.constexpr, W_PARTS: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The logits of one tile of tokens of one head."""
    token_tiles = tl.cdiv(L, BM)
    program = tl.program_id(0)
    l = (program % token_tiles) * BM + tl.arange(0, BM)
    b = program // token_tiles % B
    h = program // token_tiles // B
    e = tl.arange(0, BE)

    out = tl.zeros((BM, BE), tl.float32)
    for c0 in tl.static_range(0, D, BD):
        c = c0 + tl.arange(0, BD)
        q = load_head(Q, Q_strides, b, l, h, c, L, D)  # [BM, BD]
        w = load_router_weights(W, W_strides, h // HEADS_PER_GROUP, c, e, D, E)  # [BE, BD]
        out += exact_product(q, w, Q_PARTS, W_PARTS, APART)  # [BM, BE]
    store_head(Out, out, Out_strides, b, l, h, e, L, E)


@triton.jit
def mhf_router_backward_kernel(
    Q, W, Grad, dQ, Part, Q_strides, W_strides, Grad_strides, dQ_strides, Part_strides,
    B, L, PARTS,
    E: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    Q_PARTS: tl.constexpr, W_PARTS: tl.constexpr, ONTO: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Some columns of dQ for a share of one head's tokens, and that share's sum of dW.

    If requested, dQ is added to the old contents, and their sum is rounded once. Part holds the
    sums, of which each program writes its columns: [H, PARTS, D, E].
    """
    token_tiles = tl.cdiv(L, BM)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    c = program % BLOCKS * BD + tl.arange(0, BD)
    share = program // BLOCKS
    h = share // PARTS
    tiles = token_tiles * B
    first = ((share % PARTS).to(tl.int64) * tiles // PARTS).to(tl.int32)
    last = ((share % PARTS + 1).to(tl.int64) * tiles // PARTS).to(tl.int32)
    e = tl.arange(0, BE)

    if dQ is not None:
        w = load_router_weights(W, W_strides, h // HEADS_PER_GROUP, c, e, D, E)  # [BE, BD]
        w0 = _leading(w)
        w1 = _leading(_rest(w, w0))
    dw = tl.zeros((BD, BE), tl.float32)
    for tile in tl.range(first, last):
        b = tile // token_tiles
        l = (tile % token_tiles) * BM + tl.arange(0, BM)
        grad = load_head(Grad, Grad_strides, b, l, h, e, L, E)  # [BM, BE]
        g0 = _leading(grad)
        g_rest = _rest(grad, g0)
        g1 = _leading(g_rest)
        if dQ is not None:
            if ONTO:
                dq = load_head(dQ, dQ_strides, b, l, h, c, L, D).to(tl.float32)
            else:
                dq = tl.zeros((BM, BD), tl.float32)
            dq = add_product_apart(dq, g1, w0, APART)
            if W_PARTS > 1:
                dq = add_product_apart(dq, g0, w1, APART)
            dq = add_product_apart(dq, g0, w0, APART)  # [BM, BD]
            store_head(dQ, dq, dQ_strides, b, l, h, c, L, D)
        if Part is not None:
            q = load_head(Q, Q_strides, b, l, h, c, L, D)  # [BM, BD]
            q0 = _leading(q)
            dw = add_product_apart(dw, q0.T, _leading(_rest(g_rest, g1)), APART)
            if Q_PARTS > 1:
                q1 = _leading(_rest(q, q0))
                dw = add_product_apart(dw, q1.T, g1, APART)
                dw = add_product_apart(dw, q1.T, g0, APART)
            dw = add_product_apart(dw, q0.T, g1, APART)
            dw = add_product_apart(dw, q0.T, g0, APART)  # [BD, BE]
    if Part is not None:
        Part += share.to(tl.int64) * (D * E)
        tl.store(Part + c[:, None] * E + e[None, :], dw, mask=(c < D)[:, None] & (e < E)[None, :])


@triton.jit
def mhf_cut_router_kernel(
    W, Out, W_strides, Out_strides,
    E: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, W_PARTS: tl.constexpr,
    BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Some columns of one group's weights, part by part: Out [G, W_PARTS, BE, PADDED]."""
    blocks = tl.cdiv(PADDED, BD)
    g = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    e = tl.arange(0, BE)
    w = load_router_weights(W, W_strides, g, c, e, D, E)  # [BE, BD]
    Out += g.to(tl.int64) * (W_PARTS * BE * PADDED) + e[:, None] * PADDED + c[None, :]
    for part in tl.static_range(W_PARTS):
        leading = _leading(w)
        tl.store(Out + part * BE * PADDED, leading, mask=(c < PADDED)[None, :])
        w = _rest(w, leading)
