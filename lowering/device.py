"""Properties of the device that the choice of kernels depends on. Triton is imported on demand."""

from functools import lru_cache

import torch

__all__ = ["capability", "cards", "interpreted", "multiprocessors"]


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that tiles are chosen for."""
    if device.type == "cuda" and torch.version.hip is not None:
        return 8, 6  # AMD counts its cards otherwise; these are the most modest choices
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return 9, 0  # Triton's interpreter, which runs any choice


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel that takes a whole multiprocessor run at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132  # an H100's


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; it decides so at its import."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def cards() -> tuple[tuple[str, int, int, int], ...]:
    """The kinds of CUDA devices that there are, as kernels are chosen for: name, compute capability
    and number of multiprocessors."""
    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(
        sorted({(one.name, one.major, one.minor, one.multi_processor_count) for one in found})
    )
