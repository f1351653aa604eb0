"""Tile sizes: a pure function of the problem and of the GPU's compute capability."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kernel = Literal["forward", "query", "down", "up", "down_bias"]


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    tokens: int
    hidden: int
    warps: int
    stages: int
    descriptors: bool


def padded_width(width: int) -> int:
    """The block extent of the head width: a power of two that a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


@lru_cache
def choose(
    kernel: Kernel, *, tokens: int, width: int, itemsize: int, capability: tuple[int, int]
) -> Tile:
    return Tile(32, 32, 8, 4, True)
