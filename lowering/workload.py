"""One use of the op, described by its sizes: what is known of it before there are tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import device_objection
from .device import capability, interpreted
from .problem import Problem
from .tiles import MANY_TOKENS, TRIAL_TOKENS, Kernel, Sizes

if TYPE_CHECKING:
    from .kernels.tuning.search import Run
    from .kernels.tuning.store import TuningKey


@dataclass(frozen=True)
class Workload:
    """The sizes of one MH-FFN. ``batch`` and ``length`` are None where they are dynamic.

    ``pieces`` counts the tensors that each of gate, up and down lies in: one, or as many as there
    are modules in a list. The original spelling runs a product for each of them; for the op they
    are copied together before each call.
    """

    batch: int | None
    length: int | None
    heads: int
    kuv_heads: int
    head_dim: int
    experts: int
    expert_dim: int
    gated: bool
    routed: bool
    biased: tuple[bool, bool, bool]  # gate, up, down
    activation: str
    dtype: torch.dtype
    out_dtype: torch.dtype
    device: torch.device
    training: bool
    pieces: tuple[int, int, int] = (1, 1, 1)  # gate, up, down
    captured: bool = False  # launched from a CUDA graph, where the host costs nothing

    @property
    def tokens(self) -> int | None:
        if self.batch is None or self.length is None:
            return None
        return self.batch * self.length

    @property
    def products(self) -> tuple[int, ...]:
        """The pieces of each product of the forward pass: gate, up if there is one, down."""
        gate, up, down = self.pieces
        return (gate, up, down) if self.gated else (gate, down)

    @property
    def copied(self) -> int:
        """How many of gate, up and down are copied together before each call."""
        return sum(pieces > 1 for pieces in self.products)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.kuv_heads, self.experts, self.expert_dim, self.head_dim)

    def sizes(self, capability: tuple[int, int], interpreted: bool = False) -> Sizes:
        """What a kernel is chosen by, on such a card; dynamic tokens are taken to be many."""
        return Sizes(
            tokens=MANY_TOKENS if self.tokens is None else self.tokens,
            heads=self.heads,
            groups=self.kuv_heads,
            head_dim=self.head_dim,
            sub_networks=self.experts,
            hidden=self.expert_dim,
            gated=self.gated,
            routed=self.routed,
            biased=self.biased,
            dtype=self.dtype,
            capability=capability,
            interpreted=interpreted,
        )


def trial_run(workload: Workload) -> None:
    """Run the op once on the workload's device, so that a kernel that cannot run shows here.

    Compiles the kernels that the workload will use. On the CPU there is nothing to try: what cannot
    be compiled has PyTorch's operations behind it.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """
    if workload.device.type == "cpu":
        return
    tokens = min(workload.tokens or TRIAL_TOKENS, TRIAL_TOKENS)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=workload.device)
        return tensor.requires_grad_(workload.training)

    with torch.set_grad_enabled(workload.training), torch.autocast("cuda", enabled=False):
        problem = _problem(workload, tokens, zeros)
        out = torch.ops.mhf_compiler.multi_head_ffn(*problem, None, workload.out_dtype)
        if workload.training:
            # Dense, as a model's gradient is: that of a sum is one number expanded to the shape,
            # with strides of zero, over which Hopper's own backward kernels do not run.
            torch.autograd.backward(out, torch.ones_like(out))
    torch.cuda.synchronize(workload.device)


def tune(workload: Workload, folder: Path | None, say: Callable[[str], None]) -> None:
    """Choose the tiles that the workload will use by timing them, unless that was done before.

    What was found is kept in `folder`, and `say` is told what is being timed. Whatever fails, the
    shipped tiles remain.
    """
    if workload.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    if interpreted():
        return
    from .kernels.tuning import search

    kernels: list[Kernel] = ["forward"]
    if workload.training:
        kernels += ["query", "down", "up"]
    keys = [tuning_key(kernel, workload) for kernel in kernels]
    with torch.no_grad(), torch.cuda.device(workload.device):
        search.tune(keys, lambda: _plain_runs(workload, kernels), folder, say)


def tuning_key(kernel: Kernel, workload: Workload) -> TuningKey:
    """What tuning knows the workload by."""
    from .kernels.tuning.store import TuningKey

    device = workload.device
    sizes = workload.sizes(capability(device), interpreted())
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

    tokens = min(workload.tokens or MANY_TOKENS, MANY_TOKENS)
    problem = _problem(workload, tokens, random)
    out = torch.empty_like(problem.q, dtype=workload.out_dtype)
    grad_out = random(*problem.q.shape, dtype=workload.dtype)
    return plain_runs(problem, out, grad_out, kernels)


def _problem(workload: Workload, tokens: int, make: Callable[..., Tensor]) -> Problem:
    """The op's arguments for one sequence of `tokens` tokens."""
    w = workload
    groups, experts, hidden, width = w.weight_shape
    gate_bias, up_bias, down_bias = w.biased
    return Problem(
        q=make(1, tokens, w.heads, width, dtype=w.dtype),
        k=make(*w.weight_shape, dtype=w.dtype),
        u=make(*w.weight_shape, dtype=w.dtype) if w.gated else None,
        v=make(*w.weight_shape, dtype=w.dtype),
        r=make(1, tokens, w.heads, experts, dtype=torch.float32) if w.routed else None,
        k_bias=make(groups, experts, hidden, dtype=w.dtype) if gate_bias else None,
        u_bias=make(groups, experts, hidden, dtype=w.dtype) if up_bias else None,
        v_bias=make(groups, experts, width, dtype=w.dtype) if down_bias else None,
        activation=w.activation,
    )


def unsupported(workload: Workload) -> str | None:
    """Why the op does not take this workload on its device; None if it does."""
    w = workload
    return device_objection(w.device, w.dtype, w.head_dim, w.out_dtype)
