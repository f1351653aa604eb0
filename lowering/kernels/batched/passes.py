"""The forward and the backward pass, a chunk of heads at a time; see hidden.py for the formulas.

What a chunk writes over is read by this chunk alone, and before: the result may lie in the memory
of q, and dQ in that of dOut. Scales are applied by the products, before anything is rounded.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...problem import Gradients, Problem
from ...tiles import BatchedTile, batched_chunk
from ..replay import leave_unrepeated
from .hidden import activate_units, differentiate_units, row_tiles
from .products import multiply
from .views import Rows, Units, units_of

_ROWS = 128  # that are summed at once


def run_forward(problem: Problem, out: Tensor, tile: BatchedTile) -> bool:
    """Fill `out` (B, L, H, d), of any floating dtype."""
    leave_unrepeated()
    with torch.inference_mode():
        _forward(problem, out, tile)
    return True


def run_backward(
    problem: Problem, grad_out: Tensor, gradients: Gradients, tile: BatchedTile
) -> bool:
    """Fill the gradients that are not None, and compute no product that none of them needs."""
    leave_unrepeated()
    with torch.inference_mode():
        _backward(problem, grad_out, gradients, tile)
    return True


def sum_results(problem: Problem, grad_out: Tensor, gradient: Tensor) -> None:
    """Fill the gradient of V's bias (G, E, d), from a gradient of the result in any dtype."""
    leave_unrepeated()
    groups = problem.sizes.groups
    rows, everything = Rows.of(groups, grad_out), slice(0, groups)
    r = None if problem.r is None else rows.read(problem.r, everything)
    with torch.inference_mode():
        _sum_of_results(gradient, rows.read(grad_out, everything), r, problem.out_scale)


def _forward(problem: Problem, out: Tensor, tile: BatchedTile) -> None:
    q, v_bias, sizes = problem.q, problem.v_bias, problem.sizes
    if v_bias is not None and problem.r is None:  # [G, 1, d]
        v_bias = v_bias.sum(1, keepdim=True, dtype=torch.float32)
    chunk = batched_chunk("forward", sizes)
    rows = Rows.of(sizes.groups, q, out)
    hidden = _Hidden(problem, chunk.groups, chunk.rows)
    summed = q.dtype if out.dtype == q.dtype else torch.float32
    weights = _weights(problem)
    for groups in _slices(sizes.groups, chunk.groups):
        part = _of_groups(problem, groups)
        tokens = rows.read(q, groups)  # [g, rows, d]
        r = None if problem.r is None else rows.read(problem.r, groups)  # [g, rows, E]
        k, u, v = (None if x is None else x.read(groups) for x in weights)  # [g, E f, d]
        assert k is not None
        assert v is not None
        place = rows.place(out, groups, summed)
        for piece in _slices(tokens.shape[1], chunk.rows):
            x = _rows_of(tokens, piece)
            weight = None if r is None else _rows_of(r, piece)
            m = hidden.times(0, x, k, problem.k_scale)  # [g, rows, E f]
            n = None if u is None else hidden.times(1, x, u, problem.u_scale)
            activate_units(part, m, n, weight, tile)
            to = _rows_of(place, piece)
            if v_bias is not None:
                if weight is None:
                    to.copy_(v_bias[groups])
                elif v_bias.dtype == q.dtype:
                    multiply(weight.to(q.dtype), v_bias[groups], to)
                else:
                    exact = to.new_empty(to.shape, dtype=v_bias.dtype)
                    multiply(weight.to(v_bias.dtype), v_bias[groups], exact)
                    to.copy_(exact)
            kept = 0.0 if v_bias is None else problem.out_scale
            multiply(m, v, to, scale=problem.out_scale, keep=kept)
        rows.keep(out, groups, place)


def _backward(problem: Problem, grad_out: Tensor, gradients: Gradients, tile: BatchedTile) -> None:
    q, sizes = problem.q, problem.sizes
    chunk = batched_chunk("backward", sizes)
    rows = Rows.of(sizes.groups, q, grad_out, gradients.q)
    count = sizes.tokens * sizes.heads // sizes.groups
    pieces = list(_slices(count, chunk.rows))
    hidden = _Hidden(problem, chunk.groups, chunk.rows)

    gated = problem.u is not None
    of_q, of_r = gradients.q is not None, gradients.r is not None
    biases = [
        None if x is None else _BiasSum(x, len(pieces))
        for x in (gradients.k_bias, gradients.u_bias)
    ]
    writes = (
        gradients.v is not None,
        of_q or gradients.k is not None,
        gated and (of_q or gradients.u is not None),
    )
    weights = _weights(problem)
    sums = tuple(
        None if x is None else _WeightSum(x, len(pieces))
        for x in (gradients.k, gradients.u, gradients.v)
    )
    needs_da = any(writes[1:]) or of_r or any(x is not None for x in biases)
    reads_n = gated and (any(writes[:2]) or of_r or biases[0] is not None)

    for groups in _slices(sizes.groups, chunk.groups):
        part = _of_groups(problem, groups)
        do = rows.read(grad_out, groups)  # [g, rows, d]
        r = None if problem.r is None else rows.read(problem.r, groups)  # [g, rows, E]
        if gradients.v_bias is not None:
            _sum_of_results(gradients.v_bias[groups], do, r, problem.out_scale)
        dr = None
        if of_r:
            dr = do.new_empty((*do.shape[:2], sizes.sub_networks), dtype=torch.float32)
            if problem.v_bias is not None:
                v_bias = problem.v_bias[groups].transpose(1, 2)  # [g, d, E]
                multiply(do.to(v_bias.dtype), v_bias, dr, scale=problem.out_scale)
        if not (writes[0] or needs_da):
            continue
        tokens = rows.read(q, groups)
        k, u, v = (None if x is None else x.read(groups) for x in weights)  # [g, E f, d]
        assert k is not None
        dq = None if gradients.q is None else rows.place(gradients.q, groups, q.dtype)
        for weight_sum in sums:
            if weight_sum is not None:
                weight_sum.begin(groups)
        dk, du, dv = sums
        for piece in pieces:
            x, dy = _rows_of(tokens, piece), _rows_of(do, piece)
            m = hidden.times(0, x, k, problem.k_scale)  # [g, rows, E f]
            da = None if v is None or not needs_da else hidden.times(1, dy, v, problem.out_scale)
            n = None
            if u is not None and (reads_n or writes[2]):
                n = hidden.times(2, x, u, problem.u_scale) if reads_n else hidden.like(2, m)
            differentiate_units(
                part,
                m,
                n,
                da,
                None if r is None else _rows_of(r, piece),
                None if dr is None else _rows_of(dr, piece),
                (_lines(biases[0], m, tile), _lines(biases[1], m, tile)),
                tile,
                adds_dr=problem.v_bias is not None,
                reads_n=reads_n,
                writes=writes,
            )
            for bias in biases:
                if bias is not None:
                    bias.add(groups)
            if dv is not None:
                dv.add(m, dy, problem.out_scale)
            if dk is not None and da is not None:
                dk.add(da, x, problem.k_scale)
            if du is not None and n is not None:
                du.add(n, x, problem.u_scale)
            if dq is not None and da is not None:  # last: it may lie in the memory of dy
                to = _rows_of(dq, piece)
                multiply(da, k, to, scale=problem.k_scale)
                if u is not None and n is not None:
                    multiply(n, u, to, scale=problem.u_scale, keep=1.0)
        for weight_sum in sums:
            if weight_sum is not None:
                weight_sum.keep()
        if gradients.q is not None and dq is not None:
            rows.keep(gradients.q, groups, dq)
        if gradients.r is not None and dr is not None:
            rows.keep(gradients.r, groups, dr)
    for bias in biases:
        if bias is not None:
            bias.keep()


def _slices(size: int, step: int) -> Iterator[slice]:
    """Ranges of at most `step` that cover `size`."""
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def _rows_of(x: Tensor, piece: slice) -> Tensor:
    """A piece of the rows of x [g, rows, c]; slices that keep everything take the host as long."""
    return x if piece.stop - piece.start == x.shape[1] else x[:, piece]


def _weights(problem: Problem) -> tuple[Units | None, Units | None, Units | None]:
    """K, U and V as matrices."""
    u = None if problem.u is None else Units(problem.u)
    return Units(problem.k), u, Units(problem.v)


def _of_groups(problem: Problem, groups: slice) -> Problem:
    """The problem with the biases of some groups."""
    k_bias, u_bias = (None if x is None else x[groups] for x in (problem.k_bias, problem.u_bias))
    return problem._replace(k_bias=k_bias, u_bias=u_bias)


class _Hidden:
    """Memory for the hidden units of a chunk, which is that of all chunks, one after the other."""

    def __init__(self, problem: Problem, groups: int, rows: int) -> None:
        _, sub_networks, hidden, _ = problem.k.shape
        self.like_q = problem.q
        self.elements = groups * rows * sub_networks * hidden
        self.memory: dict[int, Tensor] = {}
        self.views: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def times(self, which: int, x: Tensor, weights: Tensor, scale: float) -> Tensor:
        """`scale * x weights^T` [g, rows, E f] of x [g, rows, d] and weights [g, E f, d]."""
        out = self._of(which, (x.shape[0], x.shape[1], weights.shape[1]))
        multiply(x, weights.transpose(1, 2), out, scale=scale)
        return out

    def like(self, which: int, x: Tensor) -> Tensor:
        """Memory in the shape of x."""
        return self._of(which, x.shape)

    def _of(self, which: int, shape: tuple[int, ...]) -> Tensor:
        if which not in self.memory:
            self.memory[which] = self.like_q.new_empty(self.elements)
        view = self.views.get((which, shape))
        if view is None:
            groups, rows, units = shape
            view = self.memory[which][: groups * rows * units].view(shape)
            self.views[which, shape] = view
        return view


class _WeightSum:
    """The gradient of weights, summed over pieces of the rows of some groups at a time.

    Several pieces are summed in float32, and rounded once.
    """

    def __init__(self, gradient: Tensor, pieces: int) -> None:
        self.gradient = gradient  # [G, E, f, d]
        self.dtype = gradient.dtype if pieces == 1 else torch.float32
        self.view = units_of(gradient) if pieces == 1 else None

    def begin(self, groups: slice) -> None:
        """Go on to some groups."""
        self.groups, self.kept = groups, 0.0
        if self.view is not None:
            self.sum = self.view[groups]
            return
        _, sub_networks, hidden, width = self.gradient.shape
        shape = (groups.stop - groups.start, sub_networks * hidden, width)
        self.sum = self.gradient.new_empty(shape, dtype=self.dtype)

    def add(self, units: Tensor, x: Tensor, scale: float) -> None:
        """Add `scale * units^T x`, of units [g, rows, E f] and x [g, rows, d]."""
        multiply(units.transpose(1, 2), x, self.sum, scale=scale, keep=self.kept)
        self.kept = 1.0

    def keep(self) -> None:
        """Copy what was not summed in the gradient's own memory."""
        if self.view is None:
            target = self.gradient[self.groups]
            target.copy_(self.sum.view(target.shape))


class _BiasSum:
    """The gradient of a bias of hidden units, summed over tiles of rows, in float32."""

    def __init__(self, gradient: Tensor, pieces: int) -> None:
        self.gradient, self.pieces = gradient, pieces
        sums = gradient.new_zeros if pieces > 1 else gradient.new_empty
        self.sums = sums(gradient.shape, dtype=torch.float32).flatten(1)  # [G, E f]
        self.lines: Tensor | None = None  # [tiles, g, E f]

    def add(self, groups: slice) -> None:
        """Add the lines of some groups."""
        assert self.lines is not None
        if self.pieces > 1:
            self.sums[groups] += self.lines.sum(0)
        else:
            torch.sum(self.lines, 0, out=self.sums[groups])

    def keep(self) -> None:
        self.gradient.copy_(self.sums.view(self.gradient.shape))


def _lines(bias: _BiasSum | None, m: Tensor, tile: BatchedTile) -> Tensor | None:
    """Memory for the sums of each tile of rows of m [g, rows, E f]."""
    if bias is None:
        return None
    groups, rows, units = m.shape
    shape = (row_tiles(rows, tile), groups, units)
    if bias.lines is None or bias.lines.shape != shape:
        bias.lines = None  # free before the next
        bias.lines = m.new_empty(shape, dtype=torch.float32)
    return bias.lines


def _sum_of_results(gradient: Tensor, do: Tensor, r: Tensor | None, scale: float) -> None:
    """The gradient of V's bias [g, E, d]: dOut [g, rows, d] summed over rows, weighted by r."""
    if r is None:
        # In two steps: the sum of many rows at once takes memory of the size of a chunk.
        whole = do.shape[1] // _ROWS * _ROWS
        sums = do[:, :whole].unflatten(1, (-1, _ROWS)).sum(2, dtype=torch.float32)
        total = sums.sum(1) + do[:, whole:].sum(1, dtype=torch.float32)
        gradient.copy_(total.unsqueeze(1) * scale)
    elif do.dtype.itemsize == 2:
        multiply(r.to(do.dtype).transpose(1, 2), do, gradient, scale=scale)
    else:  # a product of so few results adds one row after the other, and loses digits
        for e in range(r.shape[2]):
            gradient[:, e].copy_((do * r[..., e : e + 1]).sum(1) * scale)
