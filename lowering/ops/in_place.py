"""The op and its backward pass over memory that nobody needs any more: the result in the query's
place, the query's gradient in that of the result's gradient, and the router's part of the query's
gradient added to the rest of it.

Each saves a tensor of the query's size. Nothing calls these three by itself: a graph that has been
differentiated and scheduled knows who reads what, and mhf_compiler/reusing.py puts them where they
are right. Every kernel reads a tile of what it overwrites before it writes that tile, reads no
other one, and is the last to read any. What cannot be proved is computed elsewhere and copied.

The gradients that nobody wants come back empty, as PyTorch makes an op that writes to an argument
functional only if it returns a fixed number of tensors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import cpu
from ..arguments import ArgumentError, check_arguments, check_backward_arguments, check_device
from .network import cuda_backward, cuda_forward, with_strides_of
from .router import add_gradients_on_cpu, add_gradients_on_cuda, check_product

__all__ = ["ours_alone"]

_FORWARD = "mhf_compiler::multi_head_ffn_over_query"
_BACKWARD = "mhf_compiler::multi_head_ffn_backward_over_gradient"
_ROUTER = "mhf_compiler::router_product_backward_onto"

torch.library.define(
    _FORWARD,
    "(Tensor(a!) q, Tensor k, Tensor? u, Tensor v, Tensor? r, Tensor? k_bias, Tensor? u_bias, "
    "Tensor? v_bias, str activation, float k_scale, float u_scale, float out_scale) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    _BACKWARD,
    "(Tensor(a!) grad_out, Tensor q, Tensor k, Tensor? u, Tensor v, Tensor? r, Tensor? k_bias, "
    "Tensor? u_bias, Tensor? v_bias, str activation, float k_scale, float u_scale, "
    "float out_scale, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    _ROUTER,
    "(Tensor(a!) dq, Tensor grad_out, Tensor q, Tensor weight, bool needs_weight) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def ours_alone(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether each element of ``x`` has memory of its own, and none of ``others`` lies there."""
    memory = x.untyped_storage().data_ptr()
    if any(y is not None and y.untyped_storage().data_ptr() == memory for y in others):
        return False
    reach = 1  # from the innermost dimension on, each steps over all that lies within
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * size
    return True


def _forward(compute: Callable[..., None] | None) -> Callable[..., None]:
    """The operator on one device, whose arithmetic is ``compute`` (none: shapes only)."""

    def multi_head_ffn_over_query_on_device(
        q: Tensor,
        k: Tensor,
        u: Tensor | None,
        v: Tensor,
        r: Tensor | None,
        k_bias: Tensor | None,
        u_bias: Tensor | None,
        v_bias: Tensor | None,
        activation: str,
        k_scale: float,
        u_scale: float,
        out_scale: float,
    ) -> None:
        others = (k, u, v, r, k_bias, u_bias, v_bias)
        check_arguments(q, *others, activation=activation)
        check_device(q)
        if compute is None:
            return
        safe = ours_alone(q, others)
        # A tensor of its own in either case: launches are repeated by which tensor goes where.
        out = q.detach() if safe else torch.empty_like(q)
        compute(
            q, *others, out,
            activation=activation, k_scale=k_scale, u_scale=u_scale, out_scale=out_scale,
        )  # fmt: skip
        if not safe:
            q.copy_(out)

    return multi_head_ffn_over_query_on_device


def _backward(
    compute: Callable[..., list[Tensor]] | None,
) -> Callable[..., tuple[Tensor, ...]]:
    """The backward operator on one device, whose arithmetic is ``compute`` (none: shapes only)."""

    def multi_head_ffn_backward_over_gradient_on_device(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        u: Tensor | None,
        v: Tensor,
        r: Tensor | None,
        k_bias: Tensor | None,
        u_bias: Tensor | None,
        v_bias: Tensor | None,
        activation: str,
        k_scale: float,
        u_scale: float,
        out_scale: float,
        needs: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        inputs = (q, k, u, v, r, k_bias, u_bias, v_bias)
        check_arguments(*inputs, activation=activation)
        check_device(q)
        check_backward_arguments(grad_out, q, inputs, needs)
        if not needs[0] or grad_out.dtype != q.dtype:
            raise ArgumentError("grad_out must have the dtype of q, and needs must ask for q's")
        if compute is None:
            found = [torch.empty_like(x) for x in _wanted(inputs, needs)]
        else:
            safe = ours_alone(grad_out, inputs)
            dq = grad_out.detach() if safe else torch.empty_like(grad_out)
            found = compute(
                grad_out, *inputs,
                activation=activation, k_scale=k_scale, u_scale=u_scale, out_scale=out_scale,
                needs=list(needs), dq_place=dq,
            )  # fmt: skip
            if not safe:
                grad_out.copy_(dq)
        gradients = iter(found[1:])
        return tuple(next(gradients) if needed else q.new_empty(0) for needed in needs[1:])

    return multi_head_ffn_backward_over_gradient_on_device


def _router(
    compute: Callable[..., Tensor | None] | None,
) -> Callable[..., Tensor]:
    """The router's backward operator on one device, whose arithmetic is ``compute``.

    ``compute`` adds to a gradient of memory of its own, and returns the weight's if it is wanted.
    """

    def router_product_backward_onto_on_device(
        dq: Tensor, grad_out: Tensor, q: Tensor, weight: Tensor, needs_weight: bool
    ) -> Tensor:
        check_product(q, weight)
        if dq.shape != q.shape or dq.dtype != q.dtype or dq.device != q.device:
            raise ArgumentError(
                f"dq is {dq.dtype} of shape {tuple(dq.shape)} on {dq.device}, must be as q: "
                f"{q.dtype} of shape {tuple(q.shape)} on {q.device}"
            )
        if compute is None:
            return torch.empty_like(weight) if needs_weight else weight.new_empty(0)
        safe = ours_alone(dq, (grad_out, q, weight))
        onto = dq.detach() if safe else dq.clone()
        found = compute(onto, grad_out, q, weight, needs_weight)
        if not safe:
            dq.copy_(onto)
        return weight.new_empty(0) if found is None else with_strides_of(weight, found)

    return router_product_backward_onto_on_device


def _wanted(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]


torch.library.impl(_FORWARD, "cpu", _forward(cpu.forward))
torch.library.impl(_FORWARD, "cuda", _forward(cuda_forward))
torch.library.register_fake(_FORWARD, _forward(None))
torch.library.impl(_BACKWARD, "cpu", _backward(cpu.backward))
torch.library.impl(_BACKWARD, "cuda", _backward(cuda_backward))
torch.library.register_fake(_BACKWARD, _backward(None))
torch.library.impl(_ROUTER, "cpu", _router(add_gradients_on_cpu))
torch.library.impl(_ROUTER, "cuda", _router(add_gradients_on_cuda))
torch.library.register_fake(_ROUTER, _router(None))
