"""What runs in place of a site: the op, its device's path, the kernels that its sizes select."""

from __future__ import annotations

from .device import capability, interpreted
from .tiles import (
    BatchedTile,
    Kernel,
    Sizes,
    Tile,
    backward_kernels,
    batched_chunk,
    packaged,
    select,
)
from .workload import Workload

__all__ = ["kernels_of", "packaged_as"]


def kernels_of(workload: Workload) -> tuple[str, ...]:
    """The op and how it runs, a sentence each."""
    op = "torch.ops.mhf_compiler.multi_head_ffn"
    copies = workload.copied
    stacked = (f"before each call, copies {copies} of its weights together",) if copies else ()
    if workload.device.type == "cuda" and workload.sizes.packaged:
        return (op, *packaged_as(workload), *stacked)
    if workload.device.type == "cuda":
        sizes = _sizes(workload)
        filled = _filled(workload, sizes)
        kernels = tuple(_kernel(kernel, of, workload, sizes) for kernel, of in filled)
        return (op, *kernels[:1], *_backward(workload), *kernels[1:], *stacked)
    if workload.device.type == "cpu":
        return (op, _cpu_path(), *_backward(workload), *stacked)
    return (op, *stacked)


def packaged_as(workload: Workload) -> tuple[str, ...]:
    """What takes the place of a GPU's kernels in a package of AOTInductor's, in a sentence."""
    if workload.device.type != "cuda":
        return ()
    sizes = _sizes(workload)._replace(packaged=False)
    out_dtype, dynamic = workload.out_dtype, workload.dynamic
    tile = packaged(sizes, out_dtype=out_dtype, dynamic=dynamic)
    if tile is None:
        what = "PyTorch's products, which Inductor compiles, with all hidden units in memory"
    else:
        cut = f", {tile.parts} programs to a tile" if tile.parts > 1 else ""
        what = f"plain Triton's kernel, {tile.tokens} tokens x {tile.hidden} hidden units{cut}"
    family = select("forward", sizes, out_dtype=out_dtype).family
    instead = "" if family in ("plain", "batched") else f" in place of {family.capitalize()}'s"
    return (f"in a package of AOTInductor's: {what}{instead}",)


def _sizes(workload: Workload) -> Sizes:
    """The sizes on the workload's card, which may be an assumed one."""
    if workload.card is not None:
        return workload.sizes_on(workload.card.capability)
    return workload.sizes_on(capability(workload.device), interpreted())


def _cpu_path() -> str:
    from .cpu import compiled

    path = "CPU path: blocks of tokens whose hidden units stay in the cache"
    why = compiled.problem()
    return path if why is None else f"{path}, in PyTorch's operations for want of C++: {why}"


def _backward(workload: Workload) -> tuple[str, ...]:
    if not workload.training:
        return ()
    return ("the backward pass recomputes the hidden units: only the arguments are saved",)


def _filled(w: Workload, sizes: Sizes) -> list[tuple[Kernel, str]]:
    """The kernels, and of the backward pass what each fills, where every argument is trained."""
    if not w.training:
        return [("forward", "")]
    fills: dict[Kernel, str] = {
        "backward": "",
        "dq": "dQ and dR" if sizes.routed else "dQ",
        "dv": "dV",
        "dk_du": "dK and dU" if sizes.gated else "dK",
        "dk_dv": "dK and dV",
    }
    return [("forward", ""), *((kernel, fills[kernel]) for kernel in backward_kernels(sizes))]


def _kernel(kernel: Kernel, of: str, w: Workload, sizes: Sizes) -> str:
    """A kernel with its tile, as the launch will choose it: a tuned one, or the shipped one."""
    from .kernels.tuning.store import TuningKey, row_of

    tunable = w.card is None and kernel != "backward"
    row = row_of(TuningKey.of(kernel, sizes, w.activation, w.device)) if tunable else None
    out_dtype = w.out_dtype if kernel == "forward" else None
    family, tile = select(kernel, sizes, out_dtype=out_dtype, row=row)
    if isinstance(tile, BatchedTile):
        return _products(kernel, sizes)
    what = "forward kernel" if kernel == "forward" else "backward kernel"
    shape = f"{tile.tokens} tokens x {tile.hidden} hidden units"
    of = f" of {of}" if of else ""
    if not isinstance(tile, Tile):
        card = family.capitalize()
        return f"{what} for {card}{of}: {shape}, {tile.stages} stages (where strides allow it)"
    cut = f", {tile.parts} programs to a tile" if tile.parts > 1 else ""
    tuned = "" if row is None else ", tuned"
    return f"{what}{of}: {shape}, {tile.warps} warps, {tile.stages} stages{cut}{tuned}"


def _products(kernel: Kernel, sizes: Sizes) -> str:
    """A pass by PyTorch's products, with what they compute at a time."""
    chunk = batched_chunk(kernel, sizes)
    share = sizes.heads // sizes.groups
    cut = f"{chunk.groups * share} of {sizes.heads} heads"
    if chunk.rows < sizes.tokens * share:
        cut += f", {chunk.rows} of their {sizes.tokens * share} rows"
    return f"{kernel} pass by PyTorch's batched products: {cut} at a time"
