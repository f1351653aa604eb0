"""Parts of a tensor: what a view operation shows, and which range of which dimension that is.

A buffer that is filled part by part is written through views. Two views may show
the same part or different parts; where neither is proved, no use is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mhf_compiler.compat import symbolic_size

from .axes import Size, at_most, plus, quotient


@dataclass(frozen=True, slots=True)
class ViewStep:
    """One view operation, to be applied again to a newer value of the same storage."""

    op: Any
    args: tuple[Any, ...]  # without the viewed tensor
    kwargs: dict[str, Any]
    item: int | None
    shape: tuple[Size, ...]  # of the view
    strides: tuple[Size, ...]
    dtype: torch.dtype  # another one where numbers are reinterpreted: ``view_as_real``


@dataclass(frozen=True, slots=True)
class Range:
    """The part of a tensor from ``start`` on, ``width`` wide, along one dimension."""

    dim: int
    start: Size
    width: Size
    selects: bool  # whether the dimension is gone in the part

    @property
    def place(self) -> int | None:
        """Which one it is of the pieces of this width, if it is one of them."""
        place = quotient(self.start, self.width)
        return place if isinstance(place, int) else None

    def is_disjoint(self, other: Range) -> bool:
        """Whether the two are known to be different pieces of one partition."""
        same = (self.dim, self.width, self.selects) == (other.dim, other.width, other.selects)
        known = same and self.place is not None and other.place is not None
        return known and self.place != other.place


def shown_range(chain: Iterable[ViewStep], shape: tuple[Size, ...]) -> Range | None:
    """The part of a tensor of ``shape`` that a chain of views shows; None if it is no range."""
    found: Range | None = None
    for step in chain:
        if not _shows_all(step, shape):
            if found is not None:
                return None
            found = _range(step, shape)
            if found is None:
                return None
        shape = step.shape
    return found


def _shows_all(step: ViewStep, shape: tuple[Size, ...]) -> bool:
    return step.op is torch.ops.aten.slice.Tensor and step.shape == shape


def _range(step: ViewStep, shape: tuple[Size, ...]) -> Range | None:
    """What a select or a slice of a tensor of ``shape`` shows, where that is known."""
    selects = step.op is torch.ops.aten.select.int
    if not selects and (step.op is not torch.ops.aten.slice.Tensor or len(step.args) > 3):
        return None
    if step.kwargs:
        return None
    dim, start, *_ = (*plain(step.args), 0, 0)[: max(2, len(step.args))]
    dim, start = dim % len(shape), start or 0
    size, width = shape[dim], 1 if selects else step.shape[dim]
    if isinstance(start, int) and start < 0:
        start = plus(size, start)
    known = width != 0 and at_most(0, start) and at_most(plus(start, width), size)
    return Range(dim, start, width, selects) if known else None


def plain(tree: Any) -> Any:
    """Arguments with symbolic sizes as ints or sympy expressions."""
    if type(tree) is int:  # nearly all of them
        return tree
    if isinstance(tree, (torch.SymInt, torch.SymFloat)):
        return symbolic_size(tree)
    if isinstance(tree, dict):
        return {key: plain(part) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([plain(part) for part in tree])
    return tree


def is_number(value: Any) -> bool:
    """Whether an argument is a finite number that is known; a symbolic one is not."""
    return isinstance(value, (int, float)) and math.isfinite(value)
