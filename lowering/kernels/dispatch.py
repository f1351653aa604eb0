"""From an op to its kernels: those of a family, and plain Triton's where there is none."""

from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import Gradients, NormedRouter, Problem
from ..tiles import WIDEST_TILE, Choice, Kernel, portable, specialised
from .batched.passes import sum_results
from .operands import token_axes, tokens_innermost
from .plain.backward import run_dk_du, run_dq, run_dv, run_dv_bias
from .plain.forward import run_forward
from .plain.norm_router import run_norm_and_route
from .replay import repeat
from .tuning import store
from .verdicts import WrongKernelError, trusts_network

__all__ = ["backward", "forward", "normed_forward", "specialised_backward", "specialised_forward"]


def forward(problem: Problem, out: Tensor) -> None:
    """Write the op's output to `out` (B, L, H, d), of any strides and floating dtype.

    It may be the memory of q, in the same strides: a tile of Q is read by one program alone, and
    before that writes it. Where several programs share a tile, a second kernel writes it.
    """
    repeat(
        ("forward", *problem.constants),
        (*problem.tensors, out),
        lambda: _run_forward(problem, out),
    )


def normed_forward(problem: Problem, router: NormedRouter) -> None:
    """Overwrite the problem's q (B, L, H, d) with the output for its normalised tokens.

    They are routed by `router`. A kernel of the card's family does all of it, if it supports the
    problem. Otherwise q is overwritten twice.
    """
    q = problem.q

    def run() -> None:
        choice = specialised("normed_forward", problem.sizes)
        if _run(choice, "normed_forward", problem, q, router):
            return
        shape = (q.shape[2], router.weight.shape[2], *q.shape[:2])
        r = torch.empty(shape, dtype=router.formula.r_dtype, device=q.device)
        r = r.permute(2, 3, 0, 1)  # (B, L, H, E), the tokens contiguous
        run_norm_and_route(q, router, r)
        _run_forward(problem._replace(r=r), q)

    norm_weight, weight, formula = router
    repeat(
        ("normed forward", formula, *problem.constants),
        (*problem.tensors, norm_weight, weight),
        run,
    )


def backward(problem: Problem, grad_out: Tensor, gradients: Gradients) -> None:
    """Fill the gradients that are not None, in tensors that look like the problem's.

    That of q may be the memory of `grad_out`, in the same strides and dtype, as the output of
    `forward` may be that of q.
    """
    q, r = problem.q, problem.r
    # An output wider than q sends its gradient back through the cast, as autograd would; but a bias
    # in float32 was added after it.
    exact = grad_out
    grad_out = grad_out.to(q.dtype)
    if gradients.v_bias is None or gradients.v_bias.dtype != exact.dtype:
        exact = grad_out
    if r is not None:
        problem = problem._replace(r=tokens_innermost(r, token_axes(q, grad_out).merged))
    repeat(
        ("backward", *problem.constants),
        (*problem.tensors, grad_out, *gradients, *([] if exact is grad_out else [exact])),
        lambda: _run_backward(problem, grad_out, exact, gradients),
    )


def specialised_forward(problem: Problem, out: Tensor) -> bool:
    """Fill `out` by the kernel of a family, if there is one that takes the tensors."""
    choice = specialised("forward", problem.sizes, out_dtype=out.dtype)
    return _run(choice, "forward", problem, out)


def specialised_backward(
    kernel: Kernel, problem: Problem, grad_out: Tensor, gradients: Gradients
) -> bool:
    """The same for one of the backward kernels."""
    sizes = problem.sizes
    if kernel == "dq":
        sizes = sizes._replace(routed=gradients.r is not None)
    return _run(specialised(kernel, sizes), kernel, problem, grad_out, gradients)


def _run(choice: Choice | None, kernel: Kernel, problem: Problem, *tensors: Any) -> bool:
    """Run the kernel that was chosen, if there is one that is trusted and takes the tensors."""
    if choice is None:
        return False
    # Imported by the first call that needs it: other devices need not have Gluon.
    family = import_module(f".{choice.family}", __package__)
    run = getattr(family, f"run_{kernel}")
    if not trusts_network(choice.family, kernel, run, choice.tile, problem, *tensors):
        return False
    return bool(run(problem, *tensors, choice.tile))


def _run_forward(problem: Problem, out: Tensor) -> None:
    """Fill `out` by the fastest kernel that takes the problem."""
    if not specialised_forward(problem, out):
        _run_plain("forward", problem, run_forward, out)


def _run_backward(problem: Problem, grad_out: Tensor, exact: Tensor, gradients: Gradients) -> None:
    """Fill the gradients that are not None, each kernel in the fastest form that takes it.

    `exact` is what `grad_out` was rounded from, if the down bias has a gradient of its dtype.
    The kernel of dQ runs last: dQ may share its memory with dOut, which the other kernels read.
    """
    if exact is not grad_out and gradients.v_bias is not None:
        sum_results(problem, exact, gradients.v_bias)
        gradients = gradients._replace(v_bias=None)
    tensors = (grad_out, gradients)
    if specialised_backward("backward", problem, *tensors):
        return
    if not _run_dk_dv(problem, *tensors):
        if gradients.v is not None and not specialised_backward("dv", problem, *tensors):
            _run_plain("dv", problem, run_dv, *tensors)
        dk_du = (gradients.k, gradients.u, gradients.k_bias, gradients.u_bias)
        wanted = any(x is not None for x in dk_du)
        if wanted and not specialised_backward("dk_du", problem, *tensors):
            _run_plain("dk_du", problem, run_dk_du, *tensors)
    if gradients.v_bias is not None:
        _run_plain("dv", problem, run_dv_bias, *tensors)
    dq = (gradients.q, gradients.r)
    if any(x is not None for x in dq) and not specialised_backward("dq", problem, *tensors):
        _run_plain("dq", problem, run_dq, *tensors)


def _run_dk_dv(problem: Problem, grad_out: Tensor, gradients: Gradients) -> bool:
    """Fill dK and dV at once, by the card's family, where both are wanted and it can."""
    if gradients.k is None or gradients.v is None:
        return False
    return specialised_backward("dk_dv", problem, grad_out, gradients)


def _run_plain(kernel: Kernel, problem: Problem, run: Any, *tensors: Any) -> None:
    """Run plain Triton's kernel with the tile that tuning found, or with the shipped one."""
    if problem.q.shape[3] > WIDEST_TILE:  # a family's, which proved to be wrong
        raise WrongKernelError(kernel)
    row = store.row_for(kernel, problem)
    tile = portable(kernel, problem.sizes, row)
    # The sum of a bias multiplies nothing.
    compares = run is not run_dv_bias
    if compares and not trusts_network("plain", kernel, run, tile, problem, *tensors):
        tile, row = portable(kernel, problem.sizes), None
        if not trusts_network("plain", kernel, run, tile, problem, *tensors):
            raise WrongKernelError(kernel)
    try:
        run(problem, *tensors, tile)
    except triton.OutOfResources:
        if row is None:
            raise
        # It was timed on tensors whose layout takes less shared memory.
        run(problem, *tensors, portable(kernel, problem.sizes))
