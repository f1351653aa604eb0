"""The kernels in plain Triton, for all cards."""
