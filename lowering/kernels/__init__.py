"""The Triton kernels behind the op."""
