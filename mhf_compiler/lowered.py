"""What runs in place of a site: the op, its device's path, and the kernel that its sizes select."""

from __future__ import annotations

from .lowering.workload import Workload

_MANY_TOKENS = 8192  # what tiles are shown for where the number is dynamic


def kernels_of(workload: Workload) -> tuple[str, ...]:
    """The op and how it runs, a sentence each."""
    op = "torch.ops.mhf_compiler.multi_head_ffn"
    copies = workload.stacked_weights
    stacked = (f"before each call, copies {copies} of its weights together",) if copies else ()
    if workload.device.type == "cuda":
        return (op, _forward_kernel(workload), *_backward(workload), *stacked)
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
    from .lowering.kernels.tiles import choose, choose_pipelined
    from .lowering.kernels.tuned import row_of
    from .lowering.workload import tile_class

    card, itemsize = capability(w.device), w.dtype.itemsize
    tokens = _MANY_TOKENS if w.tokens is None else w.tokens
    pipelined = choose_pipelined(
        tokens=tokens,
        hidden=w.expert_dim,
        width=w.head_dim,
        itemsize=itemsize,
        capability=card,
    )
    if pipelined is not None and not interpreted() and w.out_dtype is w.dtype:
        return (
            f"forward kernel for Hopper: {64 * pipelined.consumers} tokens x {pipelined.hidden} "
            f"hidden units, {pipelined.stages} stages (where strides allow it)"
        )
    row = row_of(tile_class("forward", w))
    tile = choose(
        "forward",
        tokens=tokens,
        heads=w.heads,
        hidden=w.expert_dim,
        width=w.head_dim,
        itemsize=itemsize,
        capability=card,
        row=row,
    )
    cut = f", {tile.parts} programs to a tile" if tile.parts > 1 else ""
    return (
        f"forward kernel: {tile.tokens} tokens x {tile.hidden} hidden units, "
        f"{tile.warps} warps, {tile.stages} stages{cut}{'' if row is None else ', tuned'}"
    )
