"""The operator ``torch.ops.mhf_compiler.router_product``: 16-bit queries times a router in float32.

Routers want float32: ``q.float() @ weight``. Compiled as it is written, that puts a float32 copy of
all queries into memory, in training a float32 gradient as well, each twice the size of the queries
and larger than all else that an MH-FFN needs. The operator widens the queries where they are
multiplied. Its backward pass reads them in the same way and rounds their gradient once, to their
own dtype, as the gradient of the cast would be.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import ArgumentError
from .common import (
    empty_like_in_order,
    kernels,
    no_second_derivative,
    refuse_forward_mode,
    register,
    trial,
    with_strides_of,
)
from .sharding import know_dtensor

__all__ = [
    "NARROW_DTYPES",
    "WEIGHT_DTYPES",
    "add_gradients_on_cpu",
    "check_product",
    "product_on_cpu",
    "router_product",
    "takes",
    "trial_run",
]

_PLAIN = "q.float() @ weight"
#: dtypes of the queries, and of weights and norms
NARROW_DTYPES = (torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (torch.float32, *NARROW_DTYPES)
_MOST_SUB_NETWORKS = 32  # whose logits the kernels hold together with a head's width
_MOST_HEAD_DIM = 256
_TOKENS = 4096  # that are widened at once on the CPU


def router_product(q: Tensor, weight: Tensor, out_order: Sequence[int] | None = None) -> Tensor:
    """``q.float() @ weight.float()`` for each head, without a float32 copy of ``q``.

        out[b,l,h,e] = sum over i of q[b,l,h,i] * weight[g,i,e],  g = h // (H / G)

    Products and sums are those of float32: no TF32, whatever PyTorch allows. On a GPU, what is not
    finite in an argument may become NaN where float32 keeps an infinity. Differentiable once, in
    reverse mode.

    Args:
        q (Tensor): query, shape (B, L, H, d), bfloat16 or float16; d is at most 256.
        weight (Tensor): shape (G, d, E), float32, bfloat16 or float16; H is a multiple of G, and E
            at most 32.
        out_order (sequence of int, optional): the dimensions of the result from outermost to
            innermost in memory. Default: ``(0, 1, 2, 3)``, contiguous.

    Returns:
        The result, of shape (B, L, H, E), in float32.

    Raises:
        ArgumentError: an argument has a wrong shape, dtype or device.
    """
    know_dtensor()
    return torch.ops.mhf_compiler.router_product(q, weight, out_order)


def takes(q: torch.dtype, weight: torch.dtype, head_dim: int, sub_networks: int) -> bool:
    """Whether there is a product of such queries and weights."""
    dtypes = q in NARROW_DTYPES and weight in WEIGHT_DTYPES
    return dtypes and 0 < head_dim <= _MOST_HEAD_DIM and 0 < sub_networks <= _MOST_SUB_NETWORKS


def trial_run(
    q: torch.dtype, weight: torch.dtype, shape: Sequence[int], device: torch.device, training: bool
) -> None:
    """Compile and run the kernels once for a weight of ``shape`` (G, d, E); nothing on the CPU.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=training)

    def run() -> None:
        groups, head_dim, _ = shape
        out = router_product(zeros(q, 1, 1, groups, head_dim), zeros(weight, *shape))
        if training:
            out.backward(torch.ones_like(out))

    trial(device, run, training=training)


def check_product(q: Tensor, weight: Tensor, out_order: Sequence[int] | None = None) -> None:
    """Raise ArgumentError where the operators do not take such arguments."""
    if q.dim() != 4 or weight.dim() != 3 or q.shape[3] != weight.shape[1]:
        raise ArgumentError(
            f"weight has shape {tuple(weight.shape)}, must have shape (G, d, E) "
            f"for a q of shape (B, L, H, d), which is {tuple(q.shape)}"
        )
    if weight.shape[0] == 0 or q.shape[2] % weight.shape[0]:
        raise ArgumentError(
            f"weight has {weight.shape[0]} groups, must have a divisor of q's {q.shape[2]} heads"
        )
    if not takes(q.dtype, weight.dtype, weight.shape[1], weight.shape[2]):
        raise ArgumentError(
            f"q is {q.dtype}, must be bfloat16 or float16; weight is {weight.dtype} of shape "
            f"{tuple(weight.shape)}, must be one of these or float32, of width at most "
            f"{_MOST_HEAD_DIM} and at most {_MOST_SUB_NETWORKS} sub-networks"
        )
    if q.device != weight.device:
        raise ArgumentError(f"weight is on {weight.device}, must be on {q.device} as q")
    if out_order is not None and sorted(out_order) != [0, 1, 2, 3]:
        raise ArgumentError(f"out_order must be a permutation of (0, 1, 2, 3), got {out_order}")


def _check_forward(q: Tensor, weight: Tensor, out_order: Sequence[int] | None = None) -> None:
    refuse_forward_mode(q, "router_product", _PLAIN)
    check_product(q, weight, out_order)


def _forward(
    compute: Callable[[Tensor, Tensor, Tensor], None] | None,
    q: Tensor,
    weight: Tensor,
    out_order: Sequence[int] | None = None,
) -> Tensor:
    shape = (*q.shape[:3], weight.shape[2])
    out = empty_like_in_order(q, shape, out_order, torch.float32)
    if compute is not None:
        compute(q, weight, out)
    return out


def _check_backward(grad_out: Tensor, q: Tensor, weight: Tensor, needs: Sequence[bool]) -> None:
    check_product(q, weight)


def _backward(
    compute: Callable[..., list[Tensor]] | None,
    grad_out: Tensor,
    q: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    wanted = [x for x, needed in zip((q, weight), needs, strict=True) if needed]
    if compute is None:
        return [torch.empty_like(x) for x in wanted]
    gradients = compute(grad_out, q, weight, needs)
    return [with_strides_of(x, gradient) for x, gradient in zip(wanted, gradients, strict=True)]


# On the CPU: a block of tokens at a time, widened. Autocast would narrow these products.


@torch.autocast("cpu", enabled=False)
def product_on_cpu(q: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write the product to ``out`` (B, L, H, E), of any strides."""
    groups = weight.shape[0]
    wide = weight.float()
    for some, result in zip(_blocks(q, groups), _blocks(out, groups), strict=True):
        result.copy_(torch.einsum("tgsd,gde->tgse", some.float(), wide))


def _backward_on_cpu(
    grad_out: Tensor, q: Tensor, weight: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    dq = torch.zeros_like(q) if needs[0] else None
    total = add_gradients_on_cpu(dq, grad_out, q, weight, needs[1])
    return [x for x in (dq, total) if x is not None]


@torch.autocast("cpu", enabled=False)
def add_gradients_on_cpu(
    dq: Tensor | None, grad_out: Tensor, q: Tensor, weight: Tensor, needs_weight: bool
) -> Tensor | None:
    """Add the gradient of ``q`` to ``dq``, if there is one, and return the weight's if wanted."""
    groups = weight.shape[0]
    wide = weight.float()
    total = torch.zeros_like(wide)
    rows = zip(*(_blocks(x, groups) for x in (grad_out, q, q if dq is None else dq)), strict=True)
    for grad, some, result in rows:
        if dq is not None:
            result.copy_(result.float() + torch.einsum("tgse,gde->tgsd", grad, wide))
        if needs_weight:
            total += torch.einsum("tgsd,tgse->gde", some.float(), grad)
    return total.to(weight.dtype) if needs_weight else None


def _blocks(x: Tensor, groups: int) -> list[Tensor]:
    """Views of ``x`` (B, L, H, c), of not too many tokens each: (t, G, H / G, c)."""
    grouped = x.unflatten(2, (groups, x.shape[2] // groups))
    return [part for sequence in grouped.unbind(0) for part in sequence.split(_TOKENS)]


_FORWARD = register(
    "router_product",
    "(Tensor q, Tensor weight, int[]? out_order=None) -> Tensor",
    _forward,
    check=_check_forward,
    cpu=product_on_cpu,
    cuda=kernels("plain.router.forward"),
    packaged=kernels("packaged.router"),
)
_BACKWARD = register(
    "router_product_backward",
    "(Tensor grad_out, Tensor q, Tensor weight, bool[] needs) -> Tensor[]",
    _backward,
    check=_check_backward,
    cpu=_backward_on_cpu,
    cuda=kernels("plain.router.backward"),
)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    gradients = iter(
        torch.ops.mhf_compiler.router_product_backward(grad_out, *ctx.saved_tensors, needs)
    )
    return (*(next(gradients) if needed else None for needed in needs), None)


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save_inputs)
torch.library.register_autograd(_BACKWARD, no_second_derivative("router_product", _PLAIN))
