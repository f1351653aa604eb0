"""What replaces an MH-FFN: the op, its CPU path and its Triton kernels; knows no FX."""
