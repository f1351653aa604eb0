"""Tiles in and out of global memory, inside the kernels.

A kernel reads a tensor by the layout of its operand (operands.py), which is a constant of a
compiled kernel: a tensor's other paths are not in its code. Through pointers, masks take the place
of what descriptors fill with zeros and drop.
"""

import triton
import triton.language as tl


@triton.jit
def load_tokens(X, strides, b, l0, h, L, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
                LAYOUT: tl.constexpr):  # fmt: skip
    """Tokens l0.. of one head, zero beyond the sequence and the head width: [BM, BD]."""
    if LAYOUT == "rows":
        return X.load([b, h, l0, 0]).reshape(BM, BD)
    else:
        l = l0 + tl.arange(0, BM)
        c = tl.arange(0, BD)
        pointers = token_pointers(X, strides, b, l[:, None], h, c[None, :])
        return tl.load(pointers, mask=(l < L)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def store_tokens(X, value, strides, b, l0, h, L, D: tl.constexpr, BM: tl.constexpr,
                 BD: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """The counterpart of `load_tokens`; rounds `value` [BM, BD] once, to the dtype of X."""
    if LAYOUT == "rows":
        X.store([b, h, l0, 0], value.to(X.dtype).reshape(1, 1, BM, BD))
    else:
        l = l0 + tl.arange(0, BM)
        c = tl.arange(0, BD)
        pointers = token_pointers(X, strides, b, l[:, None], h, c[None, :])
        value = value.to(X.dtype.element_ty)
        tl.store(pointers, value, mask=(l < L)[:, None] & (c < D)[None, :])


@triton.jit
def load_router(R, strides, b, l0, h, e, L, BM: tl.constexpr, LAYOUT: tl.constexpr):
    """R for tokens l0.. of one head and sub-network, zero beyond the sequence: float32 [BM]."""
    if LAYOUT == "columns":
        return R.load([b, h, e, l0]).reshape([BM]).to(tl.float32)
    else:
        l = l0 + tl.arange(0, BM)
        pointers = _router_pointers(R, strides, b, l, h, e)
        return tl.load(pointers, mask=l < L, other=0.0).to(tl.float32)


@triton.jit
def store_router(R, value, strides, b, l0, h, e, L, when, BM: tl.constexpr):
    """The counterpart of `load_router`, executed only `when` true."""
    l = l0 + tl.arange(0, BM)
    pointers = _router_pointers(R, strides, b, l, h, e)
    tl.store(pointers, value.to(R.dtype.element_ty), mask=(l < L) & when)


@triton.jit
def load_weights(W, strides, g, e, f0, F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr,
                 BD: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """Hidden units f0.. of one sub-network, zero beyond F and the head width: [BF, BD]."""
    if LAYOUT == "rows":
        return W.load([g, e, f0, 0]).reshape(BF, BD)
    elif LAYOUT == "columns":
        return W.load([g, e, 0, f0]).reshape(BD, BF).T
    elif LAYOUT == "column pointers":
        # As it lies, and then transposed: read transposed, a tile whose two products want it either
        # way is not loaded ahead, but kept in registers.
        f = f0 + tl.arange(0, BF)
        c = tl.arange(0, BD)
        W += tl.cast(g, tl.int64) * strides[0] + tl.cast(e, tl.int64) * strides[1]
        pointers = W + c.to(tl.int64)[:, None] * strides[3] + f.to(tl.int64)[None, :] * strides[2]
        return tl.load(pointers, mask=(c < D)[:, None] & (f < F)[None, :], other=0.0).T
    else:
        f = f0 + tl.arange(0, BF)
        c = tl.arange(0, BD)
        pointers = _weight_pointers(W, strides, g, e, f, c)
        return tl.load(pointers, mask=(f < F)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def store_weights(W, value, strides, g, e, f0, F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr,
                  BD: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """The counterpart of `load_weights`; rounds `value` [BF, BD] once, to the dtype of W."""
    if LAYOUT == "rows":
        W.store([g, e, f0, 0], value.to(W.dtype).reshape(1, 1, BF, BD))
    elif LAYOUT == "columns":
        W.store([g, e, 0, f0], value.to(W.dtype).T.reshape(1, 1, BD, BF))
    else:
        f = f0 + tl.arange(0, BF)
        c = tl.arange(0, BD)
        pointers = _weight_pointers(W, strides, g, e, f, c)
        value = value.to(W.dtype.element_ty)
        tl.store(pointers, value, mask=(f < F)[:, None] & (c < D)[None, :])


@triton.jit
def load_bias(B, strides, g, e, f0, F: tl.constexpr, BF: tl.constexpr):
    """Entries f0.. of a bias (G, E, F), zero beyond F: float32 [BF]."""
    f = f0 + tl.arange(0, BF)
    return tl.load(_bias_pointers(B, strides, g, e, f), mask=f < F, other=0.0).to(tl.float32)


@triton.jit
def store_bias(B, value, strides, g, e, f0, F: tl.constexpr, BF: tl.constexpr):
    """The counterpart of `load_bias`."""
    f = f0 + tl.arange(0, BF)
    tl.store(_bias_pointers(B, strides, g, e, f), value.to(B.dtype.element_ty), mask=f < F)


@triton.jit
def token_pointers(X, strides, b, l, h, c):
    """To columns `c` of tokens `l` of one head, which broadcast."""
    X += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    return X + l.to(tl.int64) * strides[1] + c.to(tl.int64) * strides[3]


@triton.jit
def _router_pointers(R, strides, b, l, h, e):
    R += (
        tl.cast(b, tl.int64) * strides[0]
        + tl.cast(h, tl.int64) * strides[2]
        + tl.cast(e, tl.int64) * strides[3]
    )
    return R + l.to(tl.int64) * strides[1]


@triton.jit
def _weight_pointers(W, strides, g, e, f, c):
    W += tl.cast(g, tl.int64) * strides[0] + tl.cast(e, tl.int64) * strides[1]
    return W + f.to(tl.int64)[:, None] * strides[2] + c.to(tl.int64)[None, :] * strides[3]


@triton.jit
def _bias_pointers(B, strides, g, e, f):
    B += tl.cast(g, tl.int64) * strides[0] + tl.cast(e, tl.int64) * strides[1]
    return B + f.to(tl.int64) * strides[2]
