"""The operator ``torch.ops.mhf_compiler.multi_head_ffn``: schema, shapes, autograd, autocast."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cpu
from ..arguments import WIDE_BIAS, check_arguments, check_backward_arguments, check_device
from ..problem import Gradients, Problem
from .common import (
    empty_like_in_order,
    kernels,
    no_second_derivative,
    refuse_forward_mode,
    register,
)
from .sharding import know_dtensor

__all__ = ["compute_backward", "compute_forward", "multi_head_ffn"]

_REFERENCE = "mhf_compiler.lowering.multi_head_ffn_reference"
_TENSORS = len(Gradients._fields)  # the leading arguments of both operators
_ROUTER = Gradients._fields.index("r")
_NO_GRADIENT = 6  # activation, three scales, out_order, out_dtype

#: a problem in a schema, without defaults and after its first argument
AFTER_Q = (
    "Tensor k, Tensor? u, Tensor v, Tensor? r, Tensor? k_bias, Tensor? u_bias, Tensor? v_bias, "
    "str activation, float k_scale, float u_scale, float out_scale"
)

Forward = Callable[[Problem, Tensor], None]  # fills the result
Backward = Callable[[Problem, Tensor, Gradients], None]  # fills the gradients from the result's


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
    the backward pass recomputes them: only the arguments are saved. On CUDA, those of a few heads
    do at a time, at most 128 MiB, where PyTorch's products are faster than kernels that keep none.

    Every tensor may have any strides, so transposed, sliced, expanded and packed tensors are
    passed as views. The result is differentiable once, in reverse mode.

    All tensors but ``r`` have one dtype: float32, bfloat16 or float16, on the CPU also float64.
    Biases of 16-bit networks may be in float32, and are added in it. Autocast casts the others to
    its dtype and leaves ``r`` and float32 biases as they are.

    Args:
        q (Tensor): query, shape (B, L, H, d).
        k (Tensor): gate projection, shape (G, E, f, d); H is a multiple of G.
        u (Tensor, optional): up projection, shape (G, E, f, d). With ``None`` the network is not
            gated: the factor of ``u`` is 1.
        v (Tensor): down projection, shape (G, E, f, d).
        r (Tensor, optional): weight of every sub-network, shape (B, L, H, E): float32,
            float64, bfloat16 or float16, whatever the others are. Default: 1.

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
    problem = Problem(
        q, k, u, v, r, k_bias, u_bias, v_bias, activation, k_scale, u_scale, out_scale
    )
    check_arguments(problem, out_order=out_order, out_dtype=out_dtype)
    check_device(q, out_dtype)
    know_dtensor()
    return torch.ops.mhf_compiler.multi_head_ffn(*problem, out_order, out_dtype)


def compute_forward(compute: Forward, problem: Problem, out: Tensor) -> None:
    """Write the result to ``out``, if there is anything to compute."""
    if out.numel():
        compute(problem, out)


def compute_backward(
    compute: Backward, problem: Problem, grad_out: Tensor, gradients: Gradients
) -> None:
    """Fill the gradients, if there is anything to compute: without tokens they are zero."""
    wanted = gradients.wanted
    if grad_out.numel() == 0:
        for gradient in wanted:
            gradient.zero_()
    elif wanted:
        compute(problem, grad_out, gradients)


def _check_forward(*arguments: Any) -> None:
    problem, others = Problem.split(arguments)
    out_order, out_dtype = (*others, None, None)[:2]
    check_arguments(problem, out_order=out_order, out_dtype=out_dtype)
    check_device(problem.q, out_dtype)
    refuse_forward_mode(problem.q, "multi_head_ffn", _REFERENCE)


def _forward(compute: Forward | None, *arguments: Any) -> Tensor:
    problem, others = Problem.split(arguments)
    out_order, out_dtype = (*others, None, None)[:2]
    q = problem.q
    out = empty_like_in_order(q, q.shape, out_order, out_dtype or q.dtype)
    if compute is not None:
        compute_forward(compute, problem, out)
    return out


def _check_backward(grad_out: Tensor, *arguments: Any) -> None:
    problem, (needs,) = Problem.split(arguments)
    check_arguments(problem)
    check_device(problem.q)
    check_backward_arguments(grad_out, problem, needs)


def _backward(compute: Backward | None, grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    problem, (needs,) = Problem.split(arguments)
    gradients = problem.new_gradients(needs)
    if compute is not None:
        compute_backward(compute, problem, grad_out, gradients)
    return gradients.wanted


_FORWARD = register(
    "multi_head_ffn",
    "(Tensor q, Tensor k, Tensor? u, Tensor v, Tensor? r=None, Tensor? k_bias=None, "
    "Tensor? u_bias=None, Tensor? v_bias=None, str activation='silu', float k_scale=1.0, "
    "float u_scale=1.0, float out_scale=1.0, int[]? out_order=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    _forward,
    check=_check_forward,
    cpu=cpu.forward,
    cuda=kernels("dispatch.forward"),
    packaged=kernels("packaged.network"),
)
_BACKWARD = register(
    "multi_head_ffn_backward",
    f"(Tensor grad_out, Tensor q, {AFTER_Q}, bool[] needs) -> Tensor[]",
    _backward,
    check=_check_backward,
    cpu=cpu.backward,
    cuda=kernels("dispatch.backward"),
)


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
    return (*(next(gradients) if needed else None for needed in needs), *[None] * _NO_GRADIENT)


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save_inputs)
torch.library.register_autograd(_BACKWARD, no_second_derivative("multi_head_ffn", _REFERENCE))


def _autocast(device: str) -> Callable[..., Tensor]:
    """The operator under autocast: queries and weights in its dtype, and biases but float32 ones.

    Where the model's own biases are cast, by a linear layer, the compiler casts them before.
    """

    def cast(x: Tensor | None) -> Tensor | None:
        # Autocast never lowers float64.
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(torch.get_autocast_dtype(device))

    def multi_head_ffn_under_autocast(*arguments: Any) -> Tensor:
        tensors = [
            x
            if i == _ROUTER or (i > _ROUTER and x is not None and x.dtype == WIDE_BIAS)
            else cast(x)
            for i, x in enumerate(arguments[:_TENSORS])
        ]
        with torch.autocast(device, enabled=False):
            return torch.ops.mhf_compiler.multi_head_ffn(*tensors, *arguments[_TENSORS:])

    return multi_head_ffn_under_autocast


# torch.library.register_autocast casts every tensor to one fixed dtype; here r keeps its own.
_AUTOCAST = torch.library.Library("mhf_compiler", "FRAGMENT")
_AUTOCAST.impl("multi_head_ffn", _autocast("cpu"), "AutocastCPU")
_AUTOCAST.impl("multi_head_ffn", _autocast("cuda"), "AutocastCUDA")
