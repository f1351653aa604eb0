"""Sums of products over a kernel's loop, and the carry that long float32 sums need.

A sum over thousands of tiles in one accumulator loses digits one addition at a time. Sixteen-bit
inputs never notice: their own rounding is larger. Float32 inputs do, and a library product, which
adds in blocks, would be several times more exact. So float32 sums carry what each addition lost
(Kahan).
"""

import triton
import triton.language as tl


@triton.jit
def no_carry(ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPENSATED: tl.constexpr):
    """The carry of an empty sum."""
    if COMPENSATED:
        return tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        return 0.0


@triton.jit
def add_product(acc, carry, a, b, COMPENSATED: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + a @ b` and the new carry."""
    if COMPENSATED:
        addend = tl.dot(a, b, input_precision=PRECISION) - carry
        total = acc + addend
        return total, (total - acc) - addend
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION), carry


@triton.jit
def add_product_apart(acc, a, b, APART: tl.constexpr):
    """`acc + a @ b`; if APART, the product is computed by itself and added in registers.

    A plain addition would not do: the compiler makes one product with a sum to begin with of it.
    """
    if APART:
        return tl.sum(tl.join(acc, tl.dot(a, b)), 2)
    else:
        return tl.dot(a, b, acc)
