"""The op on the CPU: `forward` and `backward` over arbitrary strided views.

    compiled.py    calls blocks.cpp, which Inductor's C++ toolchain builds at the first call
    blocks.cpp     blocks of tokens and hidden units that stay in the caches
    products.h     its matrix products
    activations.h  the activations and their slopes
    blocked.py     the same in PyTorch's operations, where there is no compiler, or too few tokens
                   to give every thread some

The hidden activations of a call never exist at once, and the backward pass recomputes them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import blocked, compiled

__all__ = ["backward", "forward"]


def forward(
    q: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    r: Tensor | None,
    k_bias: Tensor | None,
    u_bias: Tensor | None,
    v_bias: Tensor | None,
    out: Tensor,
    *,
    activation: str,
    k_scale: float,
    u_scale: float,
    out_scale: float,
) -> None:
    """Write the op's result into ``out`` [B, L, H, d], of any floating dtype and strides.

    It may be the memory of ``q``, in the same strides: each block of tokens is read before it is
    written.
    """
    if out.numel() == 0:
        return
    inputs = (q, k, u, v, r, k_bias, u_bias, v_bias)
    if compiled.takes(q, activation):
        compiled.forward(inputs, out, activation, (k_scale, u_scale, out_scale))
        return
    blocked.forward(
        *inputs, out,
        activation=activation, k_scale=k_scale, u_scale=u_scale, out_scale=out_scale,
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    r: Tensor | None,
    k_bias: Tensor | None,
    u_bias: Tensor | None,
    v_bias: Tensor | None,
    *,
    activation: str,
    k_scale: float,
    u_scale: float,
    out_scale: float,
    needs: Sequence[bool],
    dq_place: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of the flagged tensors, in the order of the arguments.

    That of q goes to ``dq_place`` if there is one. It may be the memory of ``grad_out``, as the
    output of ``forward`` may be that of q.
    """
    inputs = (q, k, u, v, r, k_bias, u_bias, v_bias)
    gradients = [
        torch.empty_like(x) if needed and x is not None else None
        for x, needed in zip(inputs, needs, strict=True)
    ]
    if dq_place is not None:
        gradients[0] = dq_place
    wanted = [gradient for gradient in gradients if gradient is not None]
    if q.numel() == 0:
        return [gradient.zero_() for gradient in wanted]
    if not wanted:
        return []
    if compiled.takes(q, activation):
        scales = (k_scale, u_scale, out_scale)
        compiled.backward(inputs, grad_out, gradients, activation, scales)
    else:
        blocked.backward(
            grad_out, *inputs, gradients,
            activation=activation, k_scale=k_scale, u_scale=u_scale, out_scale=out_scale,
        )  # fmt: skip
    return wanted
