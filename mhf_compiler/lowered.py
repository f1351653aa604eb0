"""What runs in place of a site: the op, its device's path, the kernels that its sizes select."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .lowering.workload import Workload

if TYPE_CHECKING:
    from .lowering.kernels.tiles import Kernel

_MANY_TOKENS = 8192  # what tiles are shown for where the number is dynamic


def kernels_of(workload: Workload) -> tuple[str, ...]:
    """The op and how it runs, a sentence each."""
    op = "torch.ops.mhf_compiler.multi_head_ffn"
    copies = workload.stacked_weights
    stacked = (f"before each call, copies {copies} of its weights together",) if copies else ()
    if workload.device.type == "cuda":
        kernels = (_forward_kernel(workload), *_backward(workload), *_backward_kernels(workload))
        return (op, *kernels, *stacked)
    if workload.device.type == "cpu":
        path = "CPU path: blocks of tokens whose hidden units stay in the cache"
        return (op, path, *_backward(workload), *stacked)
    return (op, *stacked)


def _backward(workload: Workload) -> tuple[str, ...]:
    if not workload.training:
        return ()
    return ("the backward pass recomputes the hidden units: only the arguments are saved",)


def _forward_kernel(w: Workload) -> str:
    """The forward kernel's tile, as the launch will choose it."""
    from .lowering.kernels.launching import capability, interpreted
    from .lowering.kernels.tiles import choose_pipelined

    pipelined = choose_pipelined(
        tokens=_tokens(w),
        hidden=w.expert_dim,
        width=w.head_dim,
        itemsize=w.dtype.itemsize,
        capability=capability(w.device),
    )
    if pipelined is not None and not interpreted() and w.out_dtype is w.dtype:
        tokens = 64 * pipelined.consumers
        return f"forward {_for_hopper(tokens, pipelined.hidden, pipelined.stages)}"
    return f"forward kernel: {_plain_tile('forward', w)}"


def _backward_kernels(w: Workload) -> tuple[str, ...]:
    """The tiles of the three backward kernels, where every argument is trained."""
    if not w.training:
        return ()
    kernels: dict[Kernel, str] = {
        "query": "dQ and dR" if w.routed else "dQ",
        "down": "dV",
        "up": "dK and dU" if w.gated else "dK",
    }
    return tuple(_backward_kernel(kernel, of, w) for kernel, of in kernels.items())


def _backward_kernel(kernel: Kernel, of: str, w: Workload) -> str:
    blocks = _hopper_blocks(kernel, w)
    if blocks is None:
        return f"backward kernel of {of}: {_plain_tile(kernel, w)}"
    own, streamed, stages = blocks
    tokens, hidden = (own, streamed) if kernel == "query" else (streamed, own)
    return f"backward {_for_hopper(tokens, hidden, stages, f' of {of}')}"


def _hopper_blocks(kernel: Kernel, w: Workload) -> tuple[int, int, int] | None:
    """What a program of Hopper's own backward kernel owns, what streams past it, and the stages.

    None where plain Triton's runs. Which one does is asked of the launch itself, with tensors that
    have no memory.
    """
    from .lowering import kernels
    from .lowering.kernels.launching import Problem, capability
    from .lowering.kernels.tiles import padded_width

    def like(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=w.dtype, device="meta")

    weight, unit = like(*w.weight_shape), like(*w.weight_shape[:3])
    gate_bias, up_bias, down_bias = w.biased
    problem = Problem(
        q=like(1, _tokens(w), w.heads, w.head_dim),
        k=weight,
        u=weight if w.gated else None,
        v=weight,
        r=like(1, _tokens(w), w.heads, w.experts) if w.routed else None,
        k_bias=unit if gate_bias else None,
        u_bias=unit if up_bias else None,
        v_bias=like(w.kuv_heads, w.experts, w.head_dim) if down_bias else None,
        activation=w.activation,
        k_scale=1.0,
        u_scale=1.0,
        out_scale=1.0,
    )
    # Of a tensor without memory it takes the card to be the newest that it knows.
    if capability(w.device) != (9, 0) or not kernels._suits_hopper_backward(problem):
        return None
    if kernel == "query" and w.routed and down_bias:
        return None
    from .lowering.kernels import hopper_backward as hopper

    blocks = hopper._BLOCKS[kernel][padded_width(w.head_dim)]
    return hopper._CONSUMERS.value * hopper._ROWS.value, blocks.columns, blocks.stages


def _for_hopper(tokens: int, hidden: int, stages: int, of: str = "") -> str:
    tile = f"{tokens} tokens x {hidden} hidden units, {stages} stages"
    return f"kernel for Hopper{of}: {tile} (where strides allow it)"


def _plain_tile(kernel: Kernel, w: Workload) -> str:
    """The tile of plain Triton's kernel: the one that tuning found, or the shipped one."""
    from .lowering.kernels.launching import capability
    from .lowering.kernels.tiles import choose
    from .lowering.kernels.tuned import row_of
    from .lowering.workload import tile_class

    row = row_of(tile_class(kernel, w))
    tile = choose(
        kernel,
        tokens=_tokens(w),
        heads=w.heads,
        hidden=w.expert_dim,
        width=w.head_dim,
        itemsize=w.dtype.itemsize,
        capability=capability(w.device),
        row=row,
    )
    cut = f", {tile.parts} programs to a tile" if tile.parts > 1 else ""
    return (
        f"{tile.tokens} tokens x {tile.hidden} hidden units, "
        f"{tile.warps} warps, {tile.stages} stages{cut}{'' if row is None else ', tuned'}"
    )


def _tokens(w: Workload) -> int:
    return _MANY_TOKENS if w.tokens is None else w.tokens
