"""A norm, a router and the network after them, by one op over the queries' memory.

In inference `norm_and_route` (norm_router.py) overwrites the queries, and the op after it reads
them again with the weights that it returned, and overwrites them once more. This op stands for both
(problem.py has the formula, network.py the network's). Where a kernel computes it in one pass,
queries are read and written once, and the router's weights never reach memory. Elsewhere it runs
one after the other.

Models do not call it: mhf_compiler/passes/norm_network.py inserts it where a graph has both calls,
nothing else reads the values in between, and the machine may have such a kernel.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cpu
from ..arguments import ArgumentError, check_arguments, check_device
from ..device import capability, interpreted
from ..problem import Formula, NormedRouter, Problem
from ..tiles import TRIAL_TOKENS, Sizes, specialised
from .common import kernels, overwrite, register, trial
from .norm_router import check_normed_router, norm_and_route_on_cpu

__all__ = ["Like", "may_pay", "trial_run"]


class Like(NamedTuple):
    """A tensor by what a kernel is compiled for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def zeros(self, device: torch.device) -> Tensor:
        """A dense tensor with its dimensions in the same order."""
        order = sorted(range(len(self.shape)), key=lambda dim: -self.strides[dim])
        dense = torch.zeros([self.shape[dim] for dim in order], dtype=self.dtype, device=device)
        return dense.permute([order.index(dim) for dim in range(len(order))])


def may_pay(tokens: int | None, k: Like, gated: bool, device: torch.device) -> bool:
    """Whether the machine has a kernel that does all of it; for some strides it has none.

    ``tokens`` is None where their number is dynamic.
    """
    if device.type != "cuda":
        return False
    groups, sub_networks, hidden, head_dim = k.shape
    sizes = Sizes(
        tokens=TRIAL_TOKENS if tokens is None else tokens,
        heads=groups,  # or a multiple, which makes no difference
        groups=groups,
        head_dim=head_dim,
        sub_networks=sub_networks,
        hidden=hidden,
        gated=gated,
        routed=True,
        biased=(False, False, False),
        dtype=k.dtype,
        capability=capability(device),
        interpreted=interpreted(),
    )
    return specialised("normed_forward", sizes) is not None


def trial_run(
    heads: int, tensors: Sequence[Like | None], constants: Sequence[Any], device: torch.device
) -> None:
    """Compile and run the kernel once; nothing on the CPU.

    Args:
        heads: of the queries.
        tensors: like the op's, from ``norm_weight`` on.
        constants: what the op takes after them.
        device: where.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """

    def run() -> None:
        given = [None if like is None else like.zeros(device) for like in tensors]
        k = given[2]
        assert k is not None
        q = k.new_zeros(1, TRIAL_TOKENS, heads, k.shape[3])
        torch.ops.mhf_compiler.normed_multi_head_ffn_over_query(q, *given, *constants)

    trial(device, run)


def _values(
    q: Tensor,
    norm_weight: Tensor | None,
    router: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    *constants: Any,
) -> tuple[Problem, NormedRouter]:
    """The op's arguments as values."""
    count = len(Formula._fields)
    activation, *scales = constants[count:]
    problem = Problem(q, k, u, v, None, None, None, None, activation, *scales)
    return problem, NormedRouter(norm_weight, router, Formula(*constants[:count]))


def _check(*arguments: Any) -> None:
    problem, normed_router = _values(*arguments)
    check_normed_router(problem.q, normed_router)
    check_arguments(problem)
    check_device(problem.q)
    weight, sub_networks = normed_router.weight, problem.k.shape[1]
    if weight.shape[2] != sub_networks:
        raise ArgumentError(
            f"router has shape {tuple(weight.shape)}, must have shape (G, d, E) "
            f"for the E={sub_networks} sub-networks of k"
        )


def _normed_forward(
    compute: Callable[[Problem, NormedRouter], None] | None, q: Tensor, *others: Any
) -> None:
    if compute is not None and q.numel():
        problem, normed_router = _values(q, *others)
        overwrite(
            q,
            others[:5],  # norm_weight, router, k, u, v
            lambda result: compute(problem._replace(q=result), normed_router),
            reads=True,
        )


def _compute_on_cpu(problem: Problem, router: NormedRouter) -> None:
    """Overwrite the problem's q with the result for its normalised tokens, routed by `router`."""
    q = problem.q
    r = torch.empty((*q.shape[:3], problem.k.shape[1]), dtype=router.formula.r_dtype)
    norm_and_route_on_cpu(q, router, r)
    cpu.forward(problem._replace(r=r), q)


register(
    "normed_multi_head_ffn_over_query",
    "(Tensor(a!) q, Tensor? norm_weight, Tensor router, Tensor k, Tensor? u, Tensor v, "
    "float norm_eps, bool rounds_first, str routing, float sum_floor, float sum_eps, "
    "ScalarType r_dtype, str activation, float k_scale, float u_scale, float out_scale) -> ()",
    _normed_forward,
    check=_check,
    cpu=_compute_on_cpu,
    cuda=kernels("dispatch.normed_forward"),
)
