"""The kernels in plain Triton, for all cards, sizes, dtypes and strides.

forward.py      one kernel: the hidden units stay on the chip
backward.py     dQ and dR; dV; dK and dU: three kernels, each recomputing the hidden units
router.py       16-bit queries times a float32 router: an op of its own
norm_router.py  the norm of the queries before it, and the weights after it, in one kernel
sums.py         sums of products over a loop
"""
