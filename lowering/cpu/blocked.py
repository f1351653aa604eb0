"""The op on the CPU: blocks of tokens through batched matrix products in cache-sized buffers.

The hidden activations of a block live in a few scratch buffers that every block reuses, so the
memory of a call does not grow with tokens times hidden units. A block covers some weight groups
(the batch of the matrix products), one of the heads that share each group, some tokens, and some
hidden units; the units of whole sub-networks are adjacent, so that one product covers them.
Half precision is computed in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, Activation
from ..problem import Gradients, Problem

__all__ = ["backward", "forward"]

# Elements per thread of one hidden buffer. The forward pass has two: 512 KiB of float32 together,
# which a second-level cache holds. The backward pass has four and more calls per block, so larger
# blocks, in the third level, serve it better.
_FORWARD_ELEMENTS = 64 * 1024
_BACKWARD_ELEMENTS = 128 * 1024
# Below this many rows a matrix product waits for its weights, so hidden units are split first.
_TOKENS = 256


@dataclass(frozen=True)
class _Units:
    """A block of hidden units: those of whole sub-networks, or a part of those of one."""

    sub_networks: slice
    columns: slice  # the same units among the columns of [E * f]


@dataclass(frozen=True)
class _Blocks:
    """How a call is cut: the size of a block along each axis."""

    batch: int
    length: int
    groups: int
    sub_networks: int
    units: int


def _even(total: int, limit: int) -> int:
    """The size of a block when ``total`` is cut evenly into blocks of at most ``limit``."""
    pieces = max(1, -(-total // max(1, limit)))
    return max(1, -(-total // pieces))


def _cut(q: Tensor, k: Tensor, compute: torch.dtype, elements: int) -> _Blocks:
    batch, length = q.shape[:2]
    groups, sub_networks, units, head_dim = k.shape
    budget = elements * torch.get_num_threads()
    tokens = min(batch * length, _TOKENS)
    converted = sub_networks * units * head_dim
    if units * tokens > budget:
        sub_networks, units = 1, _even(units, budget // tokens)
    else:
        sub_networks = _even(sub_networks, budget // (tokens * units))
    limit = budget // (tokens * sub_networks * units)
    if k.dtype != compute:  # the weights of a block of groups are converted together
        limit = min(limit, 4 * budget // converted)
    groups = _even(groups, limit)
    tokens = budget // (groups * sub_networks * units)
    length = _even(length, tokens)
    return _Blocks(_even(batch, tokens // length), length, groups, sub_networks, units)


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _token_blocks(x: Tensor, groups: slice, blocks: _Blocks) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cover x [H/G, G, B, L, n] for some groups; each gives [G', B', L', n]."""
    batches, lengths = _slices(x.shape[2], blocks.batch), _slices(x.shape[3], blocks.length)
    for head in range(x.shape[0]):
        for batch in batches:
            for length in lengths:
                yield head, groups, batch, length


def _unit_blocks(k: Tensor, blocks: _Blocks) -> list[_Units]:
    sub_networks, units = k.shape[1:3]
    found = []
    for network in _slices(sub_networks, blocks.sub_networks):
        for unit in _slices(units, blocks.units):
            first = network.start * units + unit.start
            count = (network.stop - network.start) * (unit.stop - unit.start)
            found.append(_Units(network, slice(first, first + count)))
    return found


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, L, H, n] as [H/G, G, B, L, n], a view for any strides."""
    return x.unflatten(2, (groups, x.shape[2] // groups)).permute(3, 2, 0, 1, 4)


@dataclass(frozen=True)
class _Rows:
    """Scratch memory for some values of every token of a block."""

    by_position: Tensor  # [G', B', L', n]
    by_token: Tensor  # [G', T', n], the same memory


@dataclass(frozen=True)
class _Hidden:
    """Scratch memory for every hidden unit of a block."""

    flat: Tensor  # [G', T', F']
    by_network: Tensor  # [G', T', E', f'], the same memory


@dataclass(frozen=True)
class _Scratch:
    """Buffers by name, and the views of them that blocks of one shape use.

    The first block of a call is its largest, so later ones fit into its memory. Blocks are small
    enough that making views would take a noticeable part of their time, so views are kept.
    """

    like: Tensor
    dtype: torch.dtype
    buffers: dict[str, Tensor] = field(default_factory=dict)
    views: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def rows(self, name: str, shape: torch.Size, width: int) -> _Rows:
        """Rows of this width for a block of shape [G', B', L', ...]."""
        key = (name, shape, width)
        if key not in self.views:
            groups, batch, length = shape[:3]
            view = self._view(name, groups, batch, length, width)
            self.views[key] = _Rows(view, view.view(groups, batch * length, width))
        return self.views[key]

    def hidden(self, name: str, rows: Tensor, units: _Units) -> _Hidden:
        """Hidden units of the block of rows [G', T', n]."""
        columns = units.columns.stop - units.columns.start
        key = (name, rows.shape, columns)
        if key not in self.views:
            sub_networks = units.sub_networks.stop - units.sub_networks.start
            flat = self._view(name, *rows.shape[:2], columns)
            self.views[key] = _Hidden(flat, flat.unflatten(2, (sub_networks, -1)))
        return self.views[key]

    def weights_of_networks(self, r: Tensor, units: _Units) -> Tensor:
        """The part of the scratch rows r [G', T', E] for these networks, as [G', T', E', 1]."""
        key = (r.shape, units.sub_networks.start, units.sub_networks.stop)
        if key not in self.views:
            self.views[key] = r[..., units.sub_networks, None]
        return self.views[key]

    def _view(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size, dtype=self.dtype)
        return self.buffers[name][:size].view(shape)


@dataclass(frozen=True)
class _Weights:
    """The weights of one block of hidden units, in the dtype of the computation."""

    units: _Units
    k: Tensor  # [G', F', d]
    u: Tensor | None
    v: Tensor
    k_bias: Tensor | None  # [G', 1, F']
    u_bias: Tensor | None


def _weights(
    problem: Problem, groups: slice, unit_blocks: list[_Units], compute: torch.dtype
) -> list[_Weights]:
    """The weights of some groups, block by block of hidden units."""

    def row(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias[groups].to(compute).flatten(1).unsqueeze(1)

    k, v = (_matrix(x[groups].to(compute)) for x in (problem.k, problem.v))
    u = None if problem.u is None else _matrix(problem.u[groups].to(compute))
    k_bias, u_bias = row(problem.k_bias), row(problem.u_bias)
    return [
        _Weights(
            units,
            k=k[:, units.columns],
            u=None if u is None else u[:, units.columns],
            v=v[:, units.columns],
            k_bias=None if k_bias is None else k_bias[..., units.columns],
            u_bias=None if u_bias is None else u_bias[..., units.columns],
        )
        for units in unit_blocks
    ]


def _matrix(x: Tensor) -> Tensor:
    """[G', E, f, d] as [G', E * f, d] with strides that a matrix product reads without a copy."""
    x = x.flatten(1, 2)
    rows, columns = x.shape[1:]
    by_rows = x.stride(2) == 1 and x.stride(1) >= columns
    by_columns = x.stride(1) == 1 and x.stride(2) >= rows
    return x if by_rows or by_columns else x.contiguous()


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    """Write scale * rows weight^T + bias, [G', T', F'], into ``out``."""
    start, beta = (out, 0) if bias is None else (bias.expand_as(out), 1)
    torch.baddbmm(start, rows, weight.transpose(1, 2), beta=beta, alpha=scale, out=out)


def forward(problem: Problem, out: Tensor) -> None:
    """Write the op's result into ``out`` [B, L, H, d], of any floating dtype and strides."""
    compute = torch.promote_types(problem.q.dtype, torch.float32)
    groups = problem.k.shape[0]
    phi = ACTIVATIONS[problem.activation]
    blocks = _cut(problem.q, problem.k, compute, _FORWARD_ELEMENTS)
    unit_blocks = _unit_blocks(problem.k, blocks)
    scratch = _Scratch(problem.q, compute)
    q, out = _by_group(problem.q, groups), _by_group(out, groups)
    r = None if problem.r is None else _by_group(problem.r, groups)
    v_bias, out_scale = problem.v_bias, problem.out_scale

    for some in _slices(groups, blocks.groups):
        weights = _weights(problem, some, unit_blocks, compute)
        down_bias = None if v_bias is None else v_bias[some].to(compute)  # [G', E, d]
        for block in _token_blocks(q, some, blocks):
            rows, routing = _matrices(q[block], "q", scratch), None  # [G', T', d]
            if r is not None:
                routing = _pack(r[block], "r", scratch)  # [G', T', E]
            target = out[block]
            sums = scratch.rows("out", target.shape, target.shape[3])
            result = sums.by_token  # [G', T', d]
            beta = _begin(result, routing, down_bias, out_scale)
            for w in weights:
                hidden = scratch.hidden("hidden", rows, w.units)
                _project(rows, w.k, w.k_bias, problem.k_scale, hidden.flat)
                phi.evaluate_(hidden.flat)
                if w.u is not None:
                    up = scratch.hidden("up", rows, w.units)
                    _project(rows, w.u, w.u_bias, problem.u_scale, up.flat)
                    hidden.flat.mul_(up.flat)
                if routing is not None:
                    hidden.by_network.mul_(scratch.weights_of_networks(routing, w.units))
                torch.baddbmm(result, hidden.flat, w.v, beta=beta, alpha=out_scale, out=result)
                beta = 1
            target.copy_(sums.by_position)


def _pack(x: Tensor, name: str, scratch: _Scratch) -> Tensor:
    """Copy x [G', B', L', n] to scratch rows [G', T', n], in the dtype of the computation."""
    rows = scratch.rows(name, x.shape, x.shape[3])
    rows.by_position.copy_(x)
    return rows.by_token


def _matrices(x: Tensor, name: str, scratch: _Scratch) -> Tensor:
    """x [G', B', L', n] as rows [G', T', n]: a view where a matrix product can read one."""
    _, batch, length, width = x.shape
    one_step = batch == 1 or length == 1 or x.stride(1) == length * x.stride(2)
    step = x.stride(1) if length == 1 else x.stride(2)
    if x.dtype == scratch.dtype and one_step and x.stride(3) == 1 and step >= width:
        return x.flatten(1, 2)
    return _pack(x, name, scratch)


def _begin(result: Tensor, r: Tensor | None, v_bias: Tensor | None, out_scale: float) -> int:
    """Set ``result`` [G', T', d] to the biases of v. Returns its factor in the sum: 0 for none."""
    if v_bias is None:
        return 0
    if r is None:
        result.copy_(v_bias.sum(dim=1, keepdim=True).mul_(out_scale))
    else:
        torch.baddbmm(result, r, v_bias, beta=0, alpha=out_scale, out=result)
    return 1


@dataclass(frozen=True)
class _Sums:
    """Gradients of the weights of some groups, summed over tokens; None where none is wanted.

    Matrices are kept transposed: the product that makes them is then a fifth faster. Biases are
    small and summed over blocks in float64, as the blocks of a long call add up one after another.
    """

    k: Tensor | None  # [G', d, E * f]
    u: Tensor | None
    v: Tensor | None
    k_bias: Tensor | None  # [G', 1, E * f]
    u_bias: Tensor | None
    v_bias: Tensor | None  # [G', E, d]


@dataclass(frozen=True)
class _Block:
    """What one block of tokens reads, and the gradients that it sums over hidden units."""

    q: Tensor  # [G', T', d]
    g: Tensor  # [G', T', d], the gradient of the output times its scale
    r: Tensor | None  # [G', T', E]
    dq: Tensor | None  # [G', T', d]
    dr: Tensor | None  # [G', T', E]


def backward(problem: Problem, grad_out: Tensor, gradients: Gradients) -> None:
    """Fill the gradients that are not None.

    The hidden activations are recomputed block by block; nothing of the forward pass is read.
    """
    compute = torch.promote_types(problem.q.dtype, torch.float32)
    groups, sub_networks, _, head_dim = problem.k.shape
    phi = ACTIVATIONS[problem.activation]
    blocks = _cut(problem.q, problem.k, compute, _BACKWARD_ELEMENTS)
    unit_blocks = _unit_blocks(problem.k, blocks)
    scratch = _Scratch(problem.q, compute)
    q, g = _by_group(problem.q, groups), _by_group(grad_out, groups)
    r = None if problem.r is None else _by_group(problem.r, groups)
    grad_q = None if gradients.q is None else _by_group(gradients.q, groups)
    grad_r = None if gradients.r is None else _by_group(gradients.r, groups)
    v_bias, out_scale = problem.v_bias, problem.out_scale

    for some in _slices(groups, blocks.groups):
        weights = _weights(problem, some, unit_blocks, compute)
        down_bias = None if v_bias is None else v_bias[some].to(compute)  # [G', E, d]
        sums = _zero_sums(problem, gradients, some, compute)
        for index in _token_blocks(q, some, blocks):
            part = q[index]
            dq = None if grad_q is None else scratch.rows("dq", part.shape, head_dim)
            dr = None if grad_r is None else scratch.rows("dr", part.shape, sub_networks)
            block = _Block(
                q=_matrices(part, "q", scratch),
                g=_scaled_matrices(g[index], out_scale, scratch),
                r=None if r is None else _pack(r[index], "r", scratch),
                dq=None if dq is None else dq.by_token.zero_(),
                dr=None if dr is None else dr.by_token.zero_(),
            )
            _differentiate_down_bias(block, down_bias, sums.v_bias)
            for w in weights:
                _differentiate(block, w, sums, scratch, phi, problem.k_scale, problem.u_scale)
            if grad_q is not None and dq is not None:
                grad_q[index].copy_(dq.by_position)
            if grad_r is not None and dr is not None:
                grad_r[index].copy_(dr.by_position)
        _write_sums(sums, gradients, some)


def _scaled_matrices(g: Tensor, scale: float, scratch: _Scratch) -> Tensor:
    """The gradient of the output times its scale, as rows [G', T', d]."""
    return _matrices(g, "g", scratch) if scale == 1 else _pack(g, "g", scratch).mul_(scale)


def _zero_sums(
    problem: Problem, gradients: Gradients, groups: slice, compute: torch.dtype
) -> _Sums:
    """Zeros to sum the gradients of some groups in, for those that are wanted."""
    sub_networks, units, head_dim = problem.k.shape[1:]
    count = groups.stop - groups.start

    def zeros(gradient: Tensor | None, *shape: int) -> Tensor | None:
        if gradient is None:
            return None
        dtype = torch.float64 if gradient.dim() == 3 else compute
        return problem.q.new_zeros((count, *shape), dtype=dtype)

    return _Sums(
        k=zeros(gradients.k, head_dim, sub_networks * units),
        u=zeros(gradients.u, head_dim, sub_networks * units),
        v=zeros(gradients.v, head_dim, sub_networks * units),
        k_bias=zeros(gradients.k_bias, 1, sub_networks * units),
        u_bias=zeros(gradients.u_bias, 1, sub_networks * units),
        v_bias=zeros(gradients.v_bias, sub_networks, head_dim),
    )


def _write_sums(sums: _Sums, gradients: Gradients, groups: slice) -> None:
    """Copy the finished sums of some groups into the gradients of the weights."""
    for gradient, total in ((gradients.k, sums.k), (gradients.u, sums.u), (gradients.v, sums.v)):
        if gradient is not None and total is not None:
            sizes = gradient.shape[1:3]  # E, f
            gradient[groups].copy_(total.transpose(1, 2).unflatten(1, sizes))
    for gradient, total in (
        (gradients.k_bias, sums.k_bias),
        (gradients.u_bias, sums.u_bias),
        (gradients.v_bias, sums.v_bias),
    ):
        if gradient is not None and total is not None:
            gradient[groups].copy_(total.view(gradient[groups].shape))


def _differentiate_down_bias(block: _Block, v_bias: Tensor | None, total: Tensor | None) -> None:
    """Add what the biases of v contribute to the gradient of r, and their own gradient."""
    if v_bias is not None and block.dr is not None:
        torch.bmm(block.g, v_bias.transpose(1, 2), out=block.dr)
    if total is not None:
        # A plain sum keeps partial sums, so it is more accurate than a product with r^T.
        if block.r is None:
            total.add_(block.g.sum(dim=1, keepdim=True))
        else:
            for e in range(total.shape[1]):
                total[:, e].add_((block.g * block.r[..., e, None]).sum(dim=1))


def _differentiate(
    block: _Block,
    w: _Weights,
    sums: _Sums,
    scratch: _Scratch,
    phi: Activation,
    k_scale: float,
    u_scale: float,
) -> None:
    """Add what one block of hidden units contributes to every gradient of one block of tokens.

    With a the activation, a' its derivative and p = g v^T the gradient of the product of both
    branches, the pre-activations have the gradients r a' up p and r a p, and v sees r a up. Four
    buffers [G', T', F'] hold these in turn, each overwritten as soon as it has been read.
    """
    columns = w.units.columns
    to_k = block.dq is not None or sums.k is not None or sums.k_bias is not None
    to_u = w.u is not None and (
        block.dq is not None or sums.u is not None or sums.u_bias is not None
    )
    act, d, d_gate, up = (
        scratch.hidden(name, block.q, w.units) for name in ("act", "d", "d_gate", "up")
    )
    r = None if block.r is None else scratch.weights_of_networks(block.r, w.units)
    _project(block.q, w.k, w.k_bias, k_scale, act.flat)
    if to_k:
        phi.evaluate_with_derivative_(act.flat, d_gate.flat)
    else:
        phi.evaluate_(act.flat)
    if to_k or to_u or block.dr is not None:
        torch.bmm(block.g, w.v.transpose(1, 2), out=d.flat)
    if w.u is not None:
        _project(block.q, w.u, w.u_bias, u_scale, up.flat)

    if to_k:
        d_gate.flat.mul_(d.flat)
        if w.u is not None:
            d_gate.flat.mul_(up.flat)
        if r is not None:
            d_gate.by_network.mul_(r)
        _differentiate_projection(block, d_gate.flat, w.k, sums.k, sums.k_bias, k_scale, columns)
    if w.u is not None:
        d.flat.mul_(act.flat)
        act.flat.mul_(up.flat)  # the product of both branches
    if block.dr is not None:
        torch.mul(d.flat, act.flat if w.u is None else up.flat, out=up.flat)
        block.dr[..., w.units.sub_networks].add_(up.by_network.sum(dim=3))
    if sums.v is not None:
        if r is not None:
            act.by_network.mul_(r)
        sums.v[..., columns].baddbmm_(block.g.transpose(1, 2), act.flat)
    if to_u and w.u is not None:
        if r is not None:
            d.by_network.mul_(r)
        _differentiate_projection(block, d.flat, w.u, sums.u, sums.u_bias, u_scale, columns)


def _differentiate_projection(
    block: _Block,
    d: Tensor,
    weight: Tensor,
    total: Tensor | None,
    bias_total: Tensor | None,
    scale: float,
    columns: slice,
) -> None:
    """Add the gradients of scale * q weight^T + bias, whose own gradient is d [G', T', F']."""
    if block.dq is not None:
        block.dq.baddbmm_(d, weight, alpha=scale)
    if total is not None:
        total[..., columns].baddbmm_(block.q.transpose(1, 2), d, alpha=scale)
    if bias_total is not None:
        bias_total[..., columns].add_(d.sum(dim=1, keepdim=True))
