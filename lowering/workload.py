"""One use of the op, described by its sizes: what is known of it before there are tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import device_objection
from .op import multi_head_ffn

_TRIAL_TOKENS = 4096  # beyond this, more tokens select no other kernel


@dataclass(frozen=True)
class Workload:
    """The sizes of one MH-FFN. ``batch`` and ``length`` are None where they are dynamic.

    ``stacked_weights`` counts those of gate, up and down that lie in separate tensors and have to
    be copied together before each call.
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
    stacked_weights: int = 0
    captured: bool = False  # launched from a CUDA graph, where the host costs nothing

    @property
    def tokens(self) -> int | None:
        if self.batch is None or self.length is None:
            return None
        return self.batch * self.length

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.kuv_heads, self.experts, self.expert_dim, self.head_dim)


def trial_run(workload: Workload) -> None:
    """Run the op once on the workload's device, so that a kernel that cannot run shows here.

    Compiles the kernels that the workload will use. On the CPU there is nothing to compile.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """
    if workload.device.type == "cpu":
        return
    tokens = min(workload.tokens or _TRIAL_TOKENS, _TRIAL_TOKENS)
    groups, experts, hidden, width = workload.weight_shape

    def empty(*shape: int, dtype: torch.dtype = workload.dtype) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=workload.device)
        return tensor.requires_grad_(workload.training)

    gate_bias, up_bias, down_bias = workload.biased
    with torch.set_grad_enabled(workload.training), torch.autocast("cuda", enabled=False):
        out = multi_head_ffn(
            empty(1, tokens, workload.heads, width),
            empty(*workload.weight_shape),
            empty(*workload.weight_shape) if workload.gated else None,
            empty(*workload.weight_shape),
            empty(1, tokens, workload.heads, experts, dtype=torch.float32)
            if workload.routed
            else None,
            k_bias=empty(groups, experts, hidden) if gate_bias else None,
            u_bias=empty(groups, experts, hidden) if up_bias else None,
            v_bias=empty(groups, experts, width) if down_bias else None,
            activation=workload.activation,
            out_dtype=workload.out_dtype,
        )
        if workload.training:
            out.sum().backward()
    torch.cuda.synchronize(workload.device)


def unsupported(workload: Workload) -> str | None:
    """Why the op does not take this workload on its device; None if it does."""
    w = workload
    return device_objection(w.device, w.dtype, w.head_dim, w.out_dtype)
