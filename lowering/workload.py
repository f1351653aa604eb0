"""One use of the op, described by its sizes: what is known of it before there are tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import WIDE_BIAS, device_objection
from .device import ANY_CARD, Card, capability, interpreted
from .ops.common import trial
from .problem import Problem
from .tiles import MANY_TOKENS, TRIAL_TOKENS, Kernel, Sizes, backward_kernels, select

if TYPE_CHECKING:
    from .kernels.tuning.search import Run
    from .kernels.tuning.store import TuningKey


@dataclass(frozen=True)
class Workload:
    """One MH-FFN: its sizes, and what else is known of the calls.

    If the number of tokens is ``dynamic``, ``sizes`` has many, since that is where rewriting
    matters. ``pieces`` counts the tensors that each of gate, up and down lies in: one, or as many
    as there are modules in a list; for the op they are copied together before each call.
    ``written`` counts the products of the original spelling, which may take the sub-networks of one
    tensor one by one; 0 stands for one for each piece.
    """

    sizes: Sizes  # of no card
    activation: str
    out_dtype: torch.dtype
    device: torch.device
    training: bool
    dynamic: bool = False
    pieces: tuple[int, int, int] = (1, 1, 1)  # gate, up, down
    written: int = 0
    wide_biases: tuple[bool, bool, bool] = (False, False, False)  # in float32 next to 16 bits
    captured: bool = False  # launched from a CUDA graph, where the host costs nothing
    card: Card | None = None  # that is assumed, so that nothing can be tried

    @property
    def products(self) -> tuple[int, ...]:
        """The pieces of each product of the forward pass: gate, up if there is one, down."""
        gate, up, down = self.pieces
        return (gate, up, down) if self.sizes.gated else (gate, down)

    @property
    def copied(self) -> int:
        """How many of gate, up and down are copied together before each call."""
        return sum(pieces > 1 for pieces in self.products)

    def sizes_on(self, capability: tuple[int, int], interpreted: bool = False) -> Sizes:
        """The sizes that select a kernel on such a card."""
        return self.sizes._replace(capability=capability, interpreted=interpreted)


def trial_run(workload: Workload) -> None:
    """Run the op once on the workload's device, so that a kernel that cannot run shows here.

    Compiles the kernels that the workload will use. On the CPU there is nothing to try: what cannot
    be compiled has PyTorch's operations to replace it.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """
    tokens = min(workload.sizes.tokens or TRIAL_TOKENS, TRIAL_TOKENS)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=workload.device)
        return tensor.requires_grad_(workload.training)

    def run() -> None:
        problem = _problem(workload, tokens, zeros)
        out = torch.ops.mhf_compiler.multi_head_ffn(*problem, None, workload.out_dtype)
        if workload.training:
            # Dense, as a model's gradient is: that of a sum is one number expanded to the shape,
            # with strides of zero, over which Hopper's own backward kernels do not run.
            torch.autograd.backward(out, torch.ones_like(out))

    trial(workload.device, run, training=workload.training)


def tune(workload: Workload, folder: Path | None, say: Callable[[str], None]) -> None:
    """Choose the tiles that the workload will use by timing them, unless that was done before.

    The results are kept in `folder`, and `say` receives a line about what is being timed. If
    anything fails, the shipped tiles remain.
    """
    if workload.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    if interpreted() or workload.sizes.packaged:  # a package has the shipped tiles
        return
    from .kernels.tuning import search

    kernels = _tunable(workload)
    keys = [tuning_key(kernel, workload) for kernel in kernels]
    with torch.no_grad(), torch.cuda.device(workload.device):
        search.tune(keys, lambda: _plain_runs(workload, kernels), folder, say)


def _tunable(workload: Workload) -> list[Kernel]:
    """The kernels that may turn out to be plain Triton's, at a launch."""
    sizes = workload.sizes_on(capability(workload.device), interpreted())
    out_dtype = workload.out_dtype
    of_products = select("forward", sizes, out_dtype=out_dtype).family == "batched"
    kernels: list[Kernel] = [] if of_products else ["forward"]
    if workload.training and "backward" not in backward_kernels(sizes):
        kernels += ["dq", "dv", "dk_du"]
    return kernels


def tuning_key(kernel: Kernel, workload: Workload) -> TuningKey:
    """The key of the workload's tuning results."""
    from .kernels.tuning.store import TuningKey

    device = workload.device
    sizes = workload.sizes_on(capability(device), interpreted())
    return TuningKey.of(kernel, sizes, workload.activation, device)


def _plain_runs(workload: Workload, kernels: list[Kernel]) -> dict[Kernel, Run]:
    """The kernels that plain Triton will run for the workload, over random numbers."""
    from .kernels.tuning.search import plain_runs

    # Of their own, so that a model draws the same numbers whether its kernels were tuned or not;
    # and not zeros, over which a card is faster.
    generator = torch.Generator(workload.device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, device=workload.device)
        return (x * shape[-1] ** -0.5).to(dtype)

    tokens = min(workload.sizes.tokens or MANY_TOKENS, MANY_TOKENS)
    problem = _problem(workload, tokens, random)
    out = torch.empty_like(problem.q, dtype=workload.out_dtype)
    grad_out = random(*problem.q.shape, dtype=workload.sizes.dtype)
    return plain_runs(problem, out, grad_out, kernels)


def _problem(workload: Workload, tokens: int, make: Callable[..., Tensor]) -> Problem:
    """The op's arguments for one sequence of `tokens` tokens."""
    s = workload.sizes
    groups, sub_networks, hidden, head_dim = s.weight_shape

    def bias(number: int, width: int) -> Tensor | None:
        dtype = WIDE_BIAS if workload.wide_biases[number] else s.dtype
        return make(groups, sub_networks, width, dtype=dtype) if s.biased[number] else None

    return Problem(
        q=make(1, tokens, s.heads, head_dim, dtype=s.dtype),
        k=make(*s.weight_shape, dtype=s.dtype),
        u=make(*s.weight_shape, dtype=s.dtype) if s.gated else None,
        v=make(*s.weight_shape, dtype=s.dtype),
        r=make(1, tokens, s.heads, sub_networks, dtype=torch.float32) if s.routed else None,
        k_bias=bias(0, hidden),
        u_bias=bias(1, hidden),
        v_bias=bias(2, head_dim),
        activation=workload.activation,
    )


def unsupported(workload: Workload) -> str | None:
    """Why the op does not take this workload on its device; None if it does."""
    if workload.card is ANY_CARD:
        return None
    return device_objection(workload.device, workload.sizes.dtype, workload.out_dtype)
