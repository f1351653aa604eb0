"""Tokens and weights as matrices of a batch, with one matrix for each group of heads.

All tokens of a group's heads are the rows of its matrix, (G, rows, c), and all hidden units of its
sub-networks those of another, (G, E f, c). Both are views where strides allow it; a tensor that no
product takes as it lies is copied, the heads of a chunk at a time.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Rows:
    """How tensors of tokens (B, L, H, c) become matrices (G, rows, c), for one call.

    Rows are (heads of a group, B, L) if `heads_first`; otherwise (B, L, heads of a group).
    """

    def __init__(self, groups: int, heads_first: bool) -> None:
        self.groups, self.heads_first = groups, heads_first
        self._views: dict[int, tuple[Tensor, Tensor | None]] = {}  # each with its tensor

    @classmethod
    def of(cls, groups: int, *tensors: Tensor | None) -> "Rows":
        """The order of rows in which most of the tensors need no copy."""
        orders = [cls(groups, heads_first) for heads_first in (False, True)]
        present = [x for x in tensors if x is not None]
        return max(orders, key=lambda rows: sum(rows.view(x) is not None for x in present))

    def view(self, x: Tensor) -> Tensor | None:
        """All of `x` as matrices in its own memory; None if it does not lie so."""
        if id(x) not in self._views:
            self._views[id(x)] = x, self._view(x)
        return self._views[id(x)][1]

    def _view(self, x: Tensor) -> Tensor | None:
        batch, length, heads, columns = x.shape
        b, l, h, c = x.stride()
        share = heads // self.groups
        axes = [(batch, b), (length, l), (share, h)]
        if self.heads_first:
            axes = [axes[2], *axes[:2]]
        step = _step(axes)
        if step is None:
            return None
        shape = (self.groups, batch * length * share, columns)
        return _multiplied(x.as_strided(shape, (share * h, step, c), x.storage_offset()))

    def read(self, x: Tensor, groups: slice) -> Tensor:
        """Some groups of `x` as matrices, in its own memory if it lies so."""
        view = self.view(x)
        return self._split(x)[groups].flatten(1, 3) if view is None else view[groups]

    def place(self, x: Tensor, groups: slice, dtype: torch.dtype) -> Tensor:
        """Where a product may write some groups of `x`: its own memory, or new memory."""
        view = self.view(x) if x.dtype == dtype else None
        if view is not None:
            return view[groups]
        return x.new_empty(self._split(x)[groups].flatten(1, 3).shape, dtype=dtype)

    def keep(self, x: Tensor, groups: slice, rows: Tensor) -> None:
        """Copy what was written to a `place` outside of `x`."""
        if rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            target = self._split(x)[groups]
            target.copy_(rows.view(target.shape))

    def _split(self, x: Tensor) -> Tensor:
        """`x` with its rows in three dimensions."""
        split = x.unflatten(2, (self.groups, x.shape[2] // self.groups))  # (B, L, G, heads, c)
        return split.permute(2, 3, 0, 1, 4) if self.heads_first else split.permute(2, 0, 1, 3, 4)


def units_of(x: Tensor) -> Tensor | None:
    """Weights (G, E, f, d) as matrices (G, E f, d) in their own memory; None if they lie apart."""
    groups, sub_networks, hidden, width = x.shape
    g, e, f, d = x.stride()
    step = _step([(sub_networks, e), (hidden, f)])
    if step is None:
        return None
    shape = (groups, sub_networks * hidden, width)
    return _multiplied(x.as_strided(shape, (g, step, d), x.storage_offset()))


class Units:
    """Weights (G, E, f, d), of which some groups at a time are read as matrices."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.view = x, units_of(x)

    def read(self, groups: slice) -> Tensor:
        """Some groups (g, E f, d), in their own memory if they lie so."""
        if self.view is None:
            return self.x[groups].flatten(1, 2).contiguous()
        return self.view[groups]


def _step(axes: Sequence[tuple[int, int]]) -> int | None:
    """The stride of axes, outermost first, that are walked as one; None if they are not one.

    Each is its size and its stride.
    """
    real = [(size, stride) for size, stride in axes if size != 1]
    if any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(real)):
        return None
    return real[-1][1] if real else axes[-1][1]


def _multiplied(x: Tensor) -> Tensor | None:
    """`x` (batch, rows, columns) if the library multiplies and writes it as it lies."""
    _, rows, columns = x.shape
    _, r, c = x.stride()
    by_rows = c == 1 and (r >= columns or rows == 1)
    by_columns = r == 1 and (c >= rows or columns == 1)
    return x if by_rows or by_columns else None
