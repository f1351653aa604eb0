"""The operator ``torch.ops.mhf_compiler.multi_head_ffn``: schema, shapes, autograd, autocast."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cpu
from ..arguments import (
    check_arguments,
    check_backward_arguments,
    check_device,
    differentiates_forward,
)

__all__ = ["multi_head_ffn"]

_FORWARD = "mhf_compiler::multi_head_ffn"
_BACKWARD = "mhf_compiler::multi_head_ffn_backward"
_REFERENCE = "mhf_compiler.lowering.multi_head_ffn_reference"
_TENSORS = 8  # q, k, u, v, r, k_bias, u_bias, v_bias: the leading arguments of both operators
_OTHERS = 6  # activation, three scales, out_order, out_dtype: what has no gradient

torch.library.define(
    _FORWARD,
    "(Tensor q, Tensor k, Tensor? u, Tensor v, Tensor? r=None, Tensor? k_bias=None, "
    "Tensor? u_bias=None, Tensor? v_bias=None, str activation='silu', float k_scale=1.0, "
    "float u_scale=1.0, float out_scale=1.0, int[]? out_order=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    _BACKWARD,
    "(Tensor grad_out, Tensor q, Tensor k, Tensor? u, Tensor v, Tensor? r, Tensor? k_bias, "
    "Tensor? u_bias, Tensor? v_bias, str activation, float k_scale, float u_scale, "
    "float out_scale, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def multi_head_ffn(
    q: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    r: Tensor | None = None,
    *,
    k_bias: Tensor | None = None,
    u_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    activation: str = "silu",
    k_scale: float = 1.0,
    u_scale: float = 1.0,
    out_scale: float = 1.0,
    out_order: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multi-head feed-forward network: per head, a routed sum of small gated networks.

    For token (b, l) and head h, whose weights are those of group g = h // (H / G):

        out[b,l,h] = out_scale * sum over e of r[b,l,h,e] * (hidden[e] v[g,e] + v_bias[g,e])
        hidden[e]  = act(k_scale * q[b,l,h] k[g,e]^T + k_bias[g,e])
                     * (u_scale * q[b,l,h] u[g,e]^T + u_bias[g,e])

    The hidden units, E f / d times the size of the output, never exist in memory as a whole, and
    the backward pass recomputes them: only the arguments are saved.

    Every tensor may have any strides, so transposed, sliced, expanded and packed tensors are
    passed as views. The result is differentiable once, in reverse mode.

    All tensors but ``r`` have one dtype: float32, bfloat16 or float16, on the CPU also float64.
    Autocast casts them to its dtype and leaves ``r`` as it is. On CUDA the head width d is at most
    256.

    Args:
        q (Tensor): query, shape (B, L, H, d).
        k (Tensor): gate projection, shape (G, E, f, d); H is a multiple of G.
        u (Tensor, optional): up projection, shape (G, E, f, d). With ``None`` the network is not
            gated: the factor of ``u`` is 1.
        v (Tensor): down projection, shape (G, E, f, d).
        r (Tensor, optional): weight of every sub-network, shape (B, L, H, E), of any floating
            dtype. Default: 1.

    Keyword Args:
        k_bias (Tensor, optional): shape (G, E, f).
        u_bias (Tensor, optional): shape (G, E, f); needs ``u``.
        v_bias (Tensor, optional): shape (G, E, d).
        activation (str): act, one of ``"silu"``, ``"gelu"`` (by the error function),
            ``"gelu_tanh"``, ``"relu"``, ``"relu2"`` (ReLU squared), ``"sigmoid"``, ``"tanh"``.
        k_scale (float): default: 1.
        u_scale (float): default: 1.
        out_scale (float): default: 1.
        out_order (sequence of int, optional): the dimensions of the result from outermost to
            innermost in memory, a permutation of ``(0, 1, 2, 3)``. It chooses the strides and
            never the shape. Default: ``(0, 1, 2, 3)``, contiguous.
        out_dtype (torch.dtype, optional): dtype of the result. Default: the dtype of ``q``.

    Returns:
        The result, of shape (B, L, H, d), accumulated in float32 (in float64 for float64 inputs)
        and rounded once.

    Raises:
        ArgumentError: an argument has a wrong shape, dtype, device or value. It is a
            ``ValueError`` that names the argument, what came and what is allowed.

    Examples:
        >>> q = torch.randn(8, 256, 4, 32)  # 8 sequences of 256 tokens, 4 heads of width 32
        >>> k, u, v = (torch.randn(4, 2, 64, 32) for _ in range(3))  # 2 networks of 64 units
        >>> r = torch.softmax(torch.randn(8, 256, 4, 2), dim=-1)
        >>> multi_head_ffn(q, k, u, v, r).shape
        torch.Size([8, 256, 4, 32])

    Source: the multi-head feed-forward network of FlashMHF, https://arxiv.org/abs/2512.06989.
    """
    check_arguments(
        q, k, u, v, r, k_bias, u_bias, v_bias,
        activation=activation, out_order=out_order, out_dtype=out_dtype,
    )  # fmt: skip
    check_device(q, out_dtype)
    return torch.ops.mhf_compiler.multi_head_ffn(
        q, k, u, v, r, k_bias, u_bias, v_bias,
        activation, k_scale, u_scale, out_scale, out_order, out_dtype,
    )  # fmt: skip


def refuse_forward_mode(x: Tensor, op: str, instead: str) -> None:
    """Raise where a tangent of the op's result would be lost without a word."""
    if differentiates_forward(x):
        raise NotImplementedError(f"{op} has no forward-mode derivative. For one use {instead}.")


def no_second_derivative(op: str, instead: str) -> Callable[..., None]:
    """The derivative of an op's backward pass, which raises."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op} is differentiable once: its backward pass has no derivative. "
            f"For second derivatives use {instead}."
        )

    return refuse


def empty_like_in_order(
    like: Tensor, shape: Sequence[int], order: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """A new tensor of four dimensions that lie in memory in ``order``, from the outermost on."""
    strides: list[int] = [0] * 4
    step: int = 1
    for dim in reversed((0, 1, 2, 3) if order is None else tuple(order)):
        strides[dim] = step
        step = step * shape[dim]
    # Not a permuted view: autograd lets nobody change a view made inside of a function in place.
    return like.new_empty_strided(shape, strides, dtype=dtype)


def _forward(compute: Callable[..., None] | None) -> Callable[..., Tensor]:
    """The operator on one device, whose arithmetic is ``compute`` (none: shapes only)."""

    def multi_head_ffn_on_device(
        q: Tensor,
        k: Tensor,
        u: Tensor | None,
        v: Tensor,
        r: Tensor | None = None,
        k_bias: Tensor | None = None,
        u_bias: Tensor | None = None,
        v_bias: Tensor | None = None,
        activation: str = "silu",
        k_scale: float = 1.0,
        u_scale: float = 1.0,
        out_scale: float = 1.0,
        out_order: Sequence[int] | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        check_arguments(
            q, k, u, v, r, k_bias, u_bias, v_bias,
            activation=activation, out_order=out_order, out_dtype=out_dtype,
        )  # fmt: skip
        check_device(q, out_dtype)
        refuse_forward_mode(q, "multi_head_ffn", _REFERENCE)
        out = empty_like_in_order(q, q.shape, out_order, out_dtype or q.dtype)
        if compute is not None:
            compute(
                q, k, u, v, r, k_bias, u_bias, v_bias, out,
                activation=activation, k_scale=k_scale, u_scale=u_scale, out_scale=out_scale,
            )  # fmt: skip
        return out

    return multi_head_ffn_on_device


def _backward(compute: Callable[..., list[Tensor]] | None) -> Callable[..., list[Tensor]]:
    """The backward operator on one device, whose arithmetic is ``compute`` (none: shapes only)."""

    def multi_head_ffn_backward_on_device(
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
    ) -> list[Tensor]:
        inputs = (q, k, u, v, r, k_bias, u_bias, v_bias)
        check_arguments(*inputs, activation=activation)
        check_device(q)
        check_backward_arguments(grad_out, q, inputs, needs)
        wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
        if compute is None:
            return [torch.empty_like(x) for x in wanted]
        return compute(
            grad_out, *inputs,
            activation=activation, k_scale=k_scale, u_scale=u_scale, out_scale=out_scale,
            needs=list(needs),
        )  # fmt: skip

    return multi_head_ffn_backward_on_device


def cuda_forward(*args: Any, **kwargs: Any) -> None:
    # Imported by the first call: the package must import where there is no Triton.
    from .. import kernels

    kernels.forward(*args, **kwargs)


def cuda_backward(
    grad_out: Tensor,
    *inputs: Any,
    needs: Sequence[bool],
    dq_place: Tensor | None = None,
    **constants: Any,
) -> list[Tensor]:
    from .. import kernels

    gradients = kernels.backward(grad_out, *inputs, needs=needs, dq_place=dq_place, **constants)
    wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
    return [
        gradient if gradient is dq_place else with_strides_of(x, gradient)
        for x, gradient in zip(wanted, gradients, strict=True)
    ]


def with_strides_of(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides that the shape function promised for it."""
    promised = torch.empty_like(x, device="meta")  # no memory only to ask for strides
    if gradient.stride() == promised.stride():
        return gradient
    return torch.empty_like(x).copy_(gradient)


torch.library.impl(_FORWARD, "cpu", _forward(cpu.forward))
torch.library.impl(_FORWARD, "cuda", _forward(cuda_forward))
torch.library.register_fake(_FORWARD, _forward(None))
torch.library.impl(_BACKWARD, "cpu", _backward(cpu.backward))
torch.library.impl(_BACKWARD, "cuda", _backward(cuda_backward))
torch.library.register_fake(_BACKWARD, _backward(None))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.constants = inputs[_TENSORS : _TENSORS + 4]  # activation and the three scales


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    # A call that leaves trailing arguments to their defaults has flags only for what it passed.
    flags = (*ctx.needs_input_grad, *[False] * _TENSORS)
    needs = list(flags[:_TENSORS])
    gradients = iter(
        torch.ops.mhf_compiler.multi_head_ffn_backward(
            grad_out, *ctx.saved_tensors, *ctx.constants, needs
        )
    )
    return (*(next(gradients) if needed else None for needed in needs), *[None] * _OTHERS)


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save_inputs)
torch.library.register_autograd(_BACKWARD, no_second_derivative("multi_head_ffn", _REFERENCE))


def _autocast(device: str) -> Callable[..., Tensor]:
    """The operator under autocast: every tensor but ``r`` in the dtype of autocast."""

    def cast(x: Tensor | None) -> Tensor | None:
        # Autocast never lowers float64.
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(torch.get_autocast_dtype(device))

    def multi_head_ffn_under_autocast(
        q: Tensor,
        k: Tensor,
        u: Tensor | None,
        v: Tensor,
        r: Tensor | None = None,
        k_bias: Tensor | None = None,
        u_bias: Tensor | None = None,
        v_bias: Tensor | None = None,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        q_, k_, u_, v_, k_bias, u_bias, v_bias = map(cast, (q, k, u, v, k_bias, u_bias, v_bias))
        with torch.autocast(device, enabled=False):
            return torch.ops.mhf_compiler.multi_head_ffn(
                q_, k_, u_, v_, r, k_bias, u_bias, v_bias, *others, **named
            )

    return multi_head_ffn_under_autocast


# torch.library.register_autocast casts every tensor to one fixed dtype; here r keeps its own.
_AUTOCAST = torch.library.Library("mhf_compiler", "FRAGMENT")
_AUTOCAST.impl("multi_head_ffn", _autocast("cpu"), "AutocastCPU")
_AUTOCAST.impl("multi_head_ffn", _autocast("cuda"), "AutocastCUDA")
