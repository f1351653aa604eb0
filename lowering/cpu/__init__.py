"""The op on the CPU: `forward` and `backward` over arbitrary strided views.

    compiled.py    calls blocks.cpp, which Inductor's C++ toolchain builds at the first call
    blocks.cpp     blocks of tokens and hidden units that stay in the caches
    library.cpp    the same for programs without Python, see lowering/library.py
    products.h     its matrix products
    activations.h  the activations and their slopes
    blocked.py     the same in PyTorch's operations, where there is no compiler, or too few tokens
                   to give every thread some

The hidden activations of a call never exist at once, and the backward pass recomputes them.
"""

from torch import Tensor

from ..problem import Gradients, Problem
from . import blocked, compiled

__all__ = ["backward", "forward"]


def forward(problem: Problem, out: Tensor) -> None:
    """Write the op's result into ``out`` [B, L, H, d], of any floating dtype and strides.

    It may be the memory of the problem's q, in the same strides: each block of tokens is read
    before it is written.
    """
    path = compiled if compiled.takes(problem.q, problem.activation) else blocked
    path.forward(problem, out)


def backward(problem: Problem, grad_out: Tensor, gradients: Gradients) -> None:
    """Fill the gradients that are not None.

    That of q may be the memory of ``grad_out``, as the output of ``forward`` may be that of q.
    """
    path = compiled if compiled.takes(problem.q, problem.activation) else blocked
    path.backward(problem, grad_out, gradients)
