"""What runs in place of a site: the op, its device's path, the kernels that its sizes select."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .workload import Workload

if TYPE_CHECKING:
    from .tiles import Kernel

_MANY_TOKENS = 8192  # what tiles are shown for where the number is dynamic


def kernels_of(workload: Workload) -> tuple[str, ...]:
    """The op and how it runs, a sentence each."""
    op = "torch.ops.mhf_compiler.multi_head_ffn"
    copies = workload.copied
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
    from .kernels.launch import capability, interpreted
    from .tiles import choose_pipelined

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
    from .kernels.launch import capability, interpreted
    from .tiles import choose_streamed

    own = choose_streamed(
        kernel,
        tokens=_tokens(w),
        width=w.head_dim,
        itemsize=w.dtype.itemsize,
        capability=capability(w.device),
        gated=w.gated,
        routed=w.routed,
        biased=w.biased,
    )
    if own is None or interpreted():
        return f"backward kernel of {of}: {_plain_tile(kernel, w)}"
    return f"backward {_for_hopper(*own.sizes(kernel), own.stages, f' of {of}')}"


def _for_hopper(tokens: int, hidden: int, stages: int, of: str = "") -> str:
    tile = f"{tokens} tokens x {hidden} hidden units, {stages} stages"
    return f"kernel for Hopper{of}: {tile} (where strides allow it)"


def _plain_tile(kernel: Kernel, w: Workload) -> str:
    """The tile of plain Triton's kernel: the one that tuning found, or the shipped one."""
    from .kernels.launch import capability
    from .kernels.tuning.store import row_of
    from .tiles import choose
    from .workload import tile_class

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
