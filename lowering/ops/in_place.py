"""The ops that overwrite an argument that is no longer needed: the result in the query's place, the
query's gradient in that of the result's gradient, and the router's part of the query's gradient
added to the rest of it.

Each saves a tensor of the query's size. Models do not call these three:
mhf_compiler/passes/overwrite.py inserts them into graphs after autograd, where all readers are
known. Every kernel reads a tile of what it overwrites before it writes that tile, reads no other
one, and is the last to read any. If tensors may overlap, the result is computed into new memory and
copied.

Gradients that are not needed come back empty, as PyTorch makes an op that writes to an argument
functional only if it returns a fixed number of tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import cpu
from ..arguments import ArgumentError, check_arguments, check_backward_arguments, check_device
from ..problem import Problem
from .common import kernels, overwrite, register, with_strides_of
from .network import AFTER_Q, Backward, Forward, compute_backward, compute_forward
from .router import add_gradients_on_cpu, check_product


def _check_forward(*arguments: Any) -> None:
    problem, _ = Problem.split(arguments)
    check_arguments(problem)
    check_device(problem.q)


def _forward(compute: Forward | None, *arguments: Any) -> None:
    problem, _ = Problem.split(arguments)
    if compute is not None:
        overwrite(problem.q, problem.tensors[1:], partial(compute_forward, compute, problem))


def _check_backward(grad_out: Tensor, *arguments: Any) -> None:
    problem, (needs,) = Problem.split(arguments)
    check_arguments(problem)
    check_device(problem.q)
    check_backward_arguments(grad_out, problem, needs)
    if not needs[0] or grad_out.dtype != problem.q.dtype:
        raise ArgumentError("grad_out must have the dtype of q, and needs must ask for q's")


def _backward(compute: Backward | None, grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    problem, (needs,) = Problem.split(arguments)
    gradients = problem.new_gradients(needs, q=grad_out)
    if compute is not None:
        overwrite(
            grad_out,
            problem.tensors,
            lambda dq: compute_backward(compute, problem, grad_out, gradients._replace(q=dq)),
        )
    return tuple(problem.q.new_empty(0) if x is None else x for x in gradients[1:])


def _check_router(dq: Tensor, grad_out: Tensor, q: Tensor, weight: Tensor, _: bool) -> None:
    check_product(q, weight)
    if dq.shape != q.shape or dq.dtype != q.dtype or dq.device != q.device:
        raise ArgumentError(
            f"dq is {dq.dtype} of shape {tuple(dq.shape)} on {dq.device}, must be as q: "
            f"{q.dtype} of shape {tuple(q.shape)} on {q.device}"
        )


def _router(
    compute: Callable[..., Tensor | None] | None,
    dq: Tensor,
    grad_out: Tensor,
    q: Tensor,
    weight: Tensor,
    needs_weight: bool,
) -> Tensor:
    if compute is None:
        return torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    others = (grad_out, q, weight)
    found = overwrite(dq, others, lambda onto: compute(onto, *others, needs_weight), reads=True)
    return weight.new_empty(0) if found is None else with_strides_of(weight, found)


register(
    "multi_head_ffn_over_query",
    f"(Tensor(a!) q, {AFTER_Q}) -> ()",
    _forward,
    check=_check_forward,
    cpu=cpu.forward,
    cuda=kernels("dispatch.forward"),
)
register(
    "multi_head_ffn_backward_over_gradient",
    f"(Tensor(a!) grad_out, Tensor q, {AFTER_Q}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    check=_check_backward,
    cpu=cpu.backward,
    cuda=kernels("dispatch.backward"),
)
register(
    "router_product_backward_onto",
    "(Tensor(a!) dq, Tensor grad_out, Tensor q, Tensor weight, bool needs_weight) -> Tensor",
    _router,
    check=_check_router,
    cpu=add_gradients_on_cpu,
    cuda=kernels("plain.router.backward_onto"),
)
