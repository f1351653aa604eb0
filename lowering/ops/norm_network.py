"""A norm, a router and the network behind them, by one op over the queries' memory.

In inference `norm_and_route` (normed_router.py) overwrites the queries, and the op behind it reads
them again with the weights that it returned, and overwrites them once more. This op stands for both
(routing.py has the formula, op.py the network's). Where a kernel computes it in one pass, queries
are read and written once, and the router's weights never reach memory. Elsewhere it does the one
after the other.

Nothing calls it by itself: mhf_compiler/joining.py puts it where a graph has both calls, nobody
else reads what lies in between, and the machine may have such a kernel.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cpu
from ..arguments import ArgumentError, check_arguments, check_device
from ..problem import Formula, NormedRouter
from .in_place import ours_alone
from .norm_router import check_normed_router, norm_and_route_on_cpu

__all__ = ["Like", "may_pay", "trial_run"]

_NAME = "mhf_compiler::normed_multi_head_ffn_over_query"
_TRIAL_TOKENS = 4096  # more select no other kernel

torch.library.define(
    _NAME,
    "(Tensor(a!) q, Tensor? norm_weight, Tensor router, Tensor k, Tensor? u, Tensor v, "
    "float norm_eps, bool rounds_first, str routing, float sum_floor, float sum_eps, "
    "ScalarType r_dtype, str activation, float k_scale, float u_scale, float out_scale) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Like(NamedTuple):
    """A tensor by what a kernel is compiled for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def zeros(self, device: torch.device) -> Tensor:
        """Dense, whatever this is a part of, and with its dimensions in the same order."""
        order = sorted(range(len(self.shape)), key=lambda dim: -self.strides[dim])
        dense = torch.zeros([self.shape[dim] for dim in order], dtype=self.dtype, device=device)
        return dense.permute([order.index(dim) for dim in range(len(order))])


def may_pay(tokens: int | None, k: Like, gated: bool, device: torch.device) -> bool:
    """Whether the machine has a kernel that does all of it; for some strides it has none.

    ``tokens`` is None where their number is dynamic.
    """
    if device.type != "cuda":
        return False
    from ..kernels.launch import capability, interpreted
    from ..tiles import choose_routing

    tile = choose_routing(
        tokens=_TRIAL_TOKENS if tokens is None else tokens,
        hidden=k.shape[2],
        width=k.shape[3],
        dtype=k.dtype,
        capability=capability(device),
        gated=gated,
    )
    return tile is not None and not interpreted()


def trial_run(
    heads: int, tensors: Sequence[Like | None], constants: Sequence[Any], device: torch.device
) -> None:
    """Compile and run the kernel once; nothing on the CPU.

    Args:
        heads: of the queries.
        tensors: like the op's, from ``norm_weight`` on.
        constants: what the op takes behind them.
        device: where.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """
    if device.type == "cpu":
        return
    given = [None if like is None else like.zeros(device) for like in tensors]
    k = given[2]
    assert k is not None
    q = k.new_zeros(1, _TRIAL_TOKENS, heads, k.shape[3])
    with torch.no_grad():
        torch.ops.mhf_compiler.normed_multi_head_ffn_over_query(q, *given, *constants)
    torch.cuda.synchronize(device)


def _operator(compute: Callable[..., None] | None) -> Callable[..., None]:
    """The operator on one device, whose arithmetic is ``compute`` (none: shapes only)."""

    def normed_multi_head_ffn_over_query_on_device(
        q: Tensor,
        norm_weight: Tensor | None,
        router: Tensor,
        k: Tensor,
        u: Tensor | None,
        v: Tensor,
        norm_eps: float,
        rounds_first: bool,
        routing: str,
        sum_floor: float,
        sum_eps: float,
        r_dtype: torch.dtype,
        activation: str,
        k_scale: float,
        u_scale: float,
        out_scale: float,
    ) -> None:
        formula = Formula(norm_eps, rounds_first, routing, sum_floor, sum_eps, r_dtype)
        normed_router = NormedRouter(norm_weight, router, formula)
        check_normed_router(q, normed_router)
        check_arguments(q, k, u, v, None, None, None, None, activation=activation)
        check_device(q)
        if router.shape[2] != k.shape[1]:
            raise ArgumentError(
                f"router has shape {tuple(router.shape)}, must have shape (G, d, E) "
                f"for the E={k.shape[1]} sub-networks of k"
            )
        if compute is None:
            return
        safe = ours_alone(q, (norm_weight, router, k, u, v))
        # A tensor of its own in either case: launches are repeated by which tensor goes where.
        result = q.detach() if safe else q.clone()
        compute(
            result, normed_router, k, u, v,
            activation=activation, k_scale=k_scale, u_scale=u_scale, out_scale=out_scale,
        )  # fmt: skip
        if not safe:
            q.copy_(result)

    return normed_multi_head_ffn_over_query_on_device


def _compute_on_cpu(
    q: Tensor, router: NormedRouter, k: Tensor, u: Tensor | None, v: Tensor, **constants: Any
) -> None:
    r = torch.empty((*q.shape[:3], k.shape[1]), dtype=router.formula.r_dtype)
    norm_and_route_on_cpu(q, router, r)
    cpu.forward(q, k, u, v, r, None, None, None, q, **constants)


def _compute_on_cuda(*arguments: Any, **constants: Any) -> None:
    # Triton's kernels, imported by the first call.
    from ..kernels import normed_forward

    normed_forward(*arguments, **constants)


torch.library.impl(_NAME, "cpu", _operator(_compute_on_cpu))
torch.library.impl(_NAME, "cuda", _operator(_compute_on_cuda))
torch.library.register_fake(_NAME, _operator(None))
