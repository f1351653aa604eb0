"""The Triton kernels behind the op: `forward` and `backward` over arbitrary strided views.

    forward_pass.py   out: one kernel, the hidden units stay on the chip
    hopper_forward.py the same for Hopper, in Gluon: loads, products and activations overlap
    splitting.py      tiles cut along the hidden units, and the sum of their parts
    backward_pass.py  dQ and dR; dV; dK and dU: three kernels, each recomputing the hidden units
    hopper_backward.py the same for Hopper, in Gluon
    router_product.py 16-bit queries times a float32 router: an op of its own
    normed_router.py  the norm of the queries before it, and the weights behind it, in one kernel
    hopper_routing.py the same inside of hopper_forward.py
    activations.py    the activations and their slopes
    sums.py           sums of products over a loop
    loads.py          tensor descriptors, pointers and masks
    launching.py      from tensors to a launch
    tiles.py          the tile sizes for a problem and a GPU
    tuning.py         other tile sizes timed, for whoever asks for it
    tuned.py          what that found, in memory and on disk

Inside the kernels the paper's letters are used: Q the per-head queries, K, U and V the gate, up and
down projections, R the router's weights; E sub-networks of F hidden units, heads of width D.

Nothing of the size tokens x hidden units reaches memory, sums are kept in float32 and rounded once,
and no order of addition depends on scheduling: equal inputs give equal bits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import NormedRouter
from ..tiles import Kernel, Row, Tile, choose, choose_pipelined, choose_routing, choose_streamed
from .launch import Problem, capability, interpreted, repeat
from .loads import token_axes, tokens_innermost
from .plain.backward import run_down, run_down_bias, run_query, run_up
from .plain.forward import run_forward
from .plain.norm_router import run_norm_and_route
from .tuning import store as tuned

__all__ = ["backward", "forward", "normed_forward"]


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
    k_scale: float = 1.0,
    u_scale: float = 1.0,
    out_scale: float = 1.0,
) -> None:
    """Write the op's output to `out` (B, L, H, d), of any strides and floating dtype.

    It may be the memory of `q`, in the same strides: a tile of Q is read by one program alone, and
    before that writes it. Where several programs share a tile, a second kernel writes it.
    """
    if out.numel() == 0:
        return
    problem = Problem(
        q, k, u, v, r, k_bias, u_bias, v_bias, activation, k_scale, u_scale, out_scale
    )

    run = partial(_run_forward, problem, out)
    repeat(("forward", *problem[8:]), (*problem[:8], out), run)


def normed_forward(
    q: Tensor,
    router: NormedRouter,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    *,
    activation: str,
    k_scale: float = 1.0,
    u_scale: float = 1.0,
    out_scale: float = 1.0,
) -> None:
    """Write to `q` (B, L, H, d) the output for its normalised tokens, routed by `router`.

    Hopper's kernel does it all, where it takes the problem. Elsewhere q is overwritten twice.
    """
    if q.numel() == 0:
        return
    problem = Problem(q, k, u, v, None, None, None, None, activation, k_scale, u_scale, out_scale)

    def run() -> None:
        if _run_pipelined(problem, q, router):
            return
        shape = (q.shape[2], router.weight.shape[2], *q.shape[:2])
        r = torch.empty(shape, dtype=router.formula.r_dtype, device=q.device)
        r = r.permute(2, 3, 0, 1)  # (B, L, H, E), the tokens side by side
        run_norm_and_route(q, router, r)
        _run_forward(problem._replace(r=r), q)

    norm_weight, weight, formula = router
    repeat(("normed forward", formula, *problem[8:]), (q, norm_weight, weight, k, u, v), run)


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
    k_scale: float = 1.0,
    u_scale: float = 1.0,
    out_scale: float = 1.0,
    needs: Sequence[bool],
    dq_place: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of those of (q, k, u, v, r, k_bias, u_bias, v_bias) that `needs` marks.

    Each comes in its input's dtype and shape, and in its memory layout where that is dense. That of
    q goes to `dq_place` if there is one. As the output of `forward` in that of q, it may be the
    memory of `grad_out`, in the same strides and dtype.
    """
    inputs = (q, k, u, v, r, k_bias, u_bias, v_bias)
    places = (dq_place, *[None] * 7)
    grads = [
        (torch.empty_like(x) if place is None else place) if need and x is not None else None
        for x, need, place in zip(inputs, needs, places, strict=True)
    ]
    wanted = [grad for grad in grads if grad is not None]
    if grad_out.numel() == 0:
        return [grad.zero_() for grad in wanted]
    # An output wider than q sends its gradient back through the cast, as autograd would.
    grad_out = grad_out.to(q.dtype)
    if r is not None:
        r = tokens_innermost(r, token_axes(q, grad_out).merged)
    problem = Problem(
        q, k, u, v, r, k_bias, u_bias, v_bias, activation, k_scale, u_scale, out_scale
    )
    repeat(
        ("backward", *problem[8:]),
        (*problem[:8], grad_out, *grads),
        lambda: _run_backward(problem, grad_out, *grads),
    )
    return wanted


def _run_backward(
    problem: Problem,
    grad_out: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    du: Tensor | None,
    dv: Tensor | None,
    dr: Tensor | None,
    dk_bias: Tensor | None,
    du_bias: Tensor | None,
    dv_bias: Tensor | None,
) -> None:
    """Fill the gradients that are not None, each kernel in the fastest form that takes it.

    The query kernel comes last: dQ may lie where the other kernels read dOut.
    """
    if dv is not None and not run_hopper("down", problem, grad_out, dv):
        _run_plain("down", problem, lambda tile: run_down(problem, grad_out, dv, tile))
    up = (dk, du, dk_bias, du_bias)
    if any(grad is not None for grad in up) and not run_hopper("up", problem, grad_out, dk, du):
        _run_plain("up", problem, lambda tile: run_up(problem, grad_out, *up, tile))
    if dv_bias is not None:
        _run_plain("down", problem, lambda tile: run_down_bias(problem, grad_out, dv_bias, tile))
    if (dq is not None or dr is not None) and not run_hopper("query", problem, grad_out, dq, dr):
        _run_plain("query", problem, lambda tile: run_query(problem, grad_out, dq, dr, tile))


def _run_forward(problem: Problem, out: Tensor) -> None:
    """Fill `out` by the fastest kernel that takes the problem."""
    if not run_hopper("forward", problem, out):
        _run_plain("forward", problem, lambda tile: run_forward(problem, out, tile))


def run_hopper(kernel: Kernel, problem: Problem, *tensors: Tensor | None) -> bool:
    """Run Hopper's own kernel on its tensors, as the plain one takes them, if it takes them too."""
    if kernel == "forward":
        (out,) = tensors
        return out is not None and _run_pipelined(problem, out)
    batch, length, _, width = problem.q.shape
    tile = choose_streamed(
        kernel,
        tokens=batch * length,
        width=width,
        itemsize=problem.q.element_size(),
        capability=capability(problem.q.device),
        gated=problem.u is not None,
        routed=kernel == "query" and tensors[-1] is not None,
        biased=(
            problem.k_bias is not None,
            problem.u_bias is not None,
            problem.v_bias is not None,
        ),
    )
    if tile is None or interpreted():
        return False
    # Imported by the first call that may need it: other devices need not have Gluon.
    from .hopper import backward as hopper

    run: dict[Kernel, Any] = {
        "query": hopper.run_query,
        "down": hopper.run_down,
        "up": hopper.run_up,
    }
    return run[kernel](problem, *tensors, tile)


def _run_plain(kernel: Kernel, problem: Problem, run: Callable[[Tile], None]) -> None:
    """Run plain Triton's kernel with the tile that tuning found, or with the shipped one."""
    row = tuned.row_for(kernel, problem)
    try:
        run(_tile(kernel, problem, row))
    except triton.OutOfResources:
        if row is None:
            raise
        run(_tile(kernel, problem))  # it was timed on tensors whose layout takes less room


def _run_pipelined(problem: Problem, out: Tensor, router: NormedRouter | None = None) -> bool:
    """Run Hopper's own forward kernel, if the problem and the device suit it.

    With a router, it normalises the queries first and computes their R, which is not in `problem`.
    """
    batch, length, _, width = problem.q.shape
    sizes: dict[str, Any] = {
        "tokens": batch * length,
        "hidden": problem.k.shape[2],
        "width": width,
        "capability": capability(problem.q.device),
    }
    if router is None:
        tile = choose_pipelined(itemsize=problem.q.element_size(), **sizes)
    else:
        tile = choose_routing(dtype=problem.q.dtype, gated=problem.u is not None, **sizes)
    if tile is None or interpreted():
        return False
    # Imported by the first call that may need it: other devices need not have Gluon.
    from .hopper.forward import plan, run_hopper_forward

    planned = plan(problem, out, tile)
    if planned is None:
        return False
    run_hopper_forward(problem, out, planned, router)
    return True


def _tile(kernel: Kernel, problem: Problem, row: Row | None = None) -> Tile:
    batch, length, heads, width = problem.q.shape
    return choose(
        kernel,
        tokens=batch * length,
        heads=heads,
        hidden=problem.k.shape[2],
        width=width,
        itemsize=problem.q.element_size(),
        capability=capability(problem.q.device),
        row=row,
    )
