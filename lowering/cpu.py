"""The op on the CPU: blocks of tokens through batched matrix products in cache-sized buffers.

The hidden activations of a block live in a few scratch buffers that every block reuses, so the
memory of a call does not grow with tokens times hidden units. A block covers some weight groups
(the batch of the matrix products), one of the heads that share each group, some tokens, and some
hidden units; the units of whole sub-networks stand side by side, so that one product covers them.
Half precision is computed in float32.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .activations import ACTIVATIONS, Activation

__all__ = ["backward", "forward"]

# Elements per thread of one hidden buffer. The forward pass has two: 512 KiB of float32 together,
# which a second-level cache holds. The backward pass has four and more calls per block, so larger
# blocks, in the third level, serve it better.
_FORWARD_ELEMENTS = 64 * 1024
_BACKWARD_ELEMENTS = 128 * 1024
# Below this many rows a matrix product waits for its weights, so hidden units are split first.
_TOKENS = 256


@dataclass(frozen=True)
class _Tokens:
    """A block of tokens of one head per weight group: a slice of the axes of [B, L, G, H/G]."""

    batch: slice
    length: slice
    groups: slice
    head: int  # which of the heads that share a group

    def of(self, x: Tensor) -> Tensor:
        """The part of x [B, L, G, H/G, n] in this block: [G', B', L', n], a view."""
        return x[self.batch, self.length, self.groups, self.head].permute(2, 0, 1, 3)


@dataclass(frozen=True)
class _Units:
    """A block of hidden units: those of whole sub-networks, or a part of those of one."""

    networks: slice
    columns: slice  # the same units among the columns of [E * f]

    def by_network(self, hidden: Tensor) -> Tensor:
        """[G', T', F'] as [G', T', E', f'], a view."""
        return hidden.unflatten(2, (self.networks.stop - self.networks.start, -1))


@dataclass(frozen=True)
class _Blocks:
    """How a call is cut: the size of a block along each axis."""

    batch: int
    length: int
    groups: int
    networks: int
    units: int


@dataclass(frozen=True)
class _Scratch:
    """Buffers by name. The first block of a call is its largest: later ones reuse its memory."""

    like: Tensor
    dtype: torch.dtype
    views: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        view = self.views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            buffer = self.buffers.get(name)
            if buffer is None or buffer.numel() < size:
                buffer = self.buffers[name] = self.like.new_empty(size, dtype=self.dtype)
            view = self.views[name, shape] = buffer[:size].view(shape)
        return view


def _even(total: int, limit: int) -> int:
    """The size of a block when ``total`` is cut evenly into blocks of at most ``limit``."""
    pieces = max(1, -(-total // max(1, limit)))
    return max(1, -(-total // pieces))


def _cut(q: Tensor, k: Tensor, compute: torch.dtype, elements: int) -> _Blocks:
    batch, length = q.shape[:2]
    groups, networks, units, width = k.shape
    budget = elements * torch.get_num_threads()
    tokens = min(batch * length, _TOKENS)
    converted = networks * units * width
    if units * tokens > budget:
        networks, units = 1, _even(units, budget // tokens)
    else:
        networks = _even(networks, budget // (tokens * units))
    limit = budget // (tokens * networks * units)
    if k.dtype != compute:  # the weights of a block of groups are converted together
        limit = min(limit, 4 * budget // converted)
    groups = _even(groups, limit)
    tokens = budget // (groups * networks * units)
    length = _even(length, tokens)
    return _Blocks(_even(batch, tokens // length), length, groups, networks, units)


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _token_blocks(q: Tensor, groups: slice, blocks: _Blocks) -> Iterator[_Tokens]:
    """The blocks that cover q [B, L, G, H/G, d] for some groups."""
    for head in range(q.shape[3]):
        for batch in _slices(q.shape[0], blocks.batch):
            for length in _slices(q.shape[1], blocks.length):
                yield _Tokens(batch, length, groups, head)


def _unit_blocks(k: Tensor, blocks: _Blocks) -> list[_Units]:
    networks, units = k.shape[1:3]
    found = []
    for network in _slices(networks, blocks.networks):
        for unit in _slices(units, blocks.units):
            first = network.start * units + unit.start
            count = (network.stop - network.start) * (unit.stop - unit.start)
            found.append(_Units(network, slice(first, first + count)))
    return found


def _heads_by_group(x: Tensor, groups: int) -> Tensor:
    """[B, L, H, n] as [B, L, G, H/G, n], a view for any strides."""
    return x.unflatten(2, (groups, x.shape[2] // groups))


def _pack(x: Tensor, name: str, scratch: _Scratch) -> Tensor:
    """x [G', B', L', n] as rows [G', T', n] in scratch memory, in the dtype of the computation."""
    groups, batch, length, width = x.shape
    scratch.get(name, (groups, batch, length, width)).copy_(x)
    return scratch.get(name, (groups, batch * length, width))


def _unpack(rows: Tensor, into: Tensor) -> None:
    """Copy rows [G', T', n] into the view [G', B', L', n], rounding to its dtype."""
    into.copy_(rows.view(into.shape))


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
    groups: slice,
    unit_blocks: list[_Units],
    compute: torch.dtype,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    k_bias: Tensor | None,
    u_bias: Tensor | None,
) -> list[_Weights]:
    """The weights of some groups, block by block of hidden units."""

    def row(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias[groups].to(compute).flatten(1).unsqueeze(1)

    k, v = _matrix(k[groups].to(compute)), _matrix(v[groups].to(compute))
    u = None if u is None else _matrix(u[groups].to(compute))
    k_bias, u_bias = row(k_bias), row(u_bias)
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


def forward(
    q: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    r: Tensor | None,
    k_bias: Tensor | None,
    u_bias: Tensor | None,
    v_bias: Tensor | None,
    out: Tensor,
    *,
    activation: str,
    k_scale: float,
    u_scale: float,
    out_scale: float,
) -> None:
    """Write the op's result into ``out`` [B, L, H, d], of any floating dtype and strides."""
    if out.numel() == 0:
        return
    compute = torch.promote_types(q.dtype, torch.float32)
    groups = k.shape[0]
    phi = ACTIVATIONS[activation]
    blocks = _cut(q, k, compute, _FORWARD_ELEMENTS)
    unit_blocks = _unit_blocks(k, blocks)
    scratch = _Scratch(q, compute)
    q, out = _heads_by_group(q, groups), _heads_by_group(out, groups)
    r = None if r is None else _heads_by_group(r, groups)

    for some in _slices(groups, blocks.groups):
        weights = _weights(some, unit_blocks, compute, k, u, v, k_bias, u_bias)
        down_bias = None if v_bias is None else v_bias[some].to(compute)  # [G', E, d]
        for block in _token_blocks(q, some, blocks):
            rows = _pack(block.of(q), "q", scratch)  # [G', T', d]
            routing = None if r is None else _pack(block.of(r), "r", scratch)  # [G', T', E]
            result = scratch.get("out", tuple(rows.shape))
            beta = _begin(result, routing, down_bias, out_scale)
            for w in weights:
                shape = (*rows.shape[:2], w.k.shape[1])
                hidden = scratch.get("hidden", shape)  # [G', T', F']
                _project(rows, w.k, w.k_bias, k_scale, hidden)
                phi.evaluate_(hidden)
                if w.u is not None:
                    up = scratch.get("up", shape)
                    _project(rows, w.u, w.u_bias, u_scale, up)
                    hidden.mul_(up)
                if routing is not None:
                    w.units.by_network(hidden).mul_(routing[..., w.units.networks, None])
                torch.baddbmm(result, hidden, w.v, beta=beta, alpha=out_scale, out=result)
                beta = 1
            _unpack(result, block.of(out))


def _begin(result: Tensor, r: Tensor | None, v_bias: Tensor | None, out_scale: float) -> int:
    """Set ``result`` [G', T', d] to what the biases of v make; the factor it has in the sum."""
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
class _Rows:
    """What one block of tokens reads, and the gradients that it sums over hidden units."""

    q: Tensor  # [G', T', d]
    g: Tensor  # [G', T', d], the gradient of the output times its scale
    r: Tensor | None  # [G', T', E]
    dq: Tensor | None  # [G', T', d]
    dr: Tensor | None  # [G', T', E]


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    r: Tensor | None,
    k_bias: Tensor | None,
    u_bias: Tensor | None,
    v_bias: Tensor | None,
    *,
    activation: str,
    k_scale: float,
    u_scale: float,
    out_scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the flagged tensors, in the order of the arguments.

    The hidden activations are recomputed block by block; nothing of the forward pass is read.
    """
    inputs = (q, k, u, v, r, k_bias, u_bias, v_bias)
    gradients = [
        torch.empty_like(x) if needed and x is not None else None
        for x, needed in zip(inputs, needs, strict=True)
    ]
    wanted = [gradient for gradient in gradients if gradient is not None]
    if q.numel() == 0 or not wanted:
        return [gradient.zero_() for gradient in wanted]
    grad_q, grad_k, grad_u, grad_v, grad_r, grad_k_bias, grad_u_bias, grad_v_bias = gradients

    compute = torch.promote_types(q.dtype, torch.float32)
    groups, networks, units, width = k.shape
    phi = ACTIVATIONS[activation]
    blocks = _cut(q, k, compute, _BACKWARD_ELEMENTS)
    unit_blocks = _unit_blocks(k, blocks)
    scratch = _Scratch(q, compute)
    q, g = _heads_by_group(q, groups), _heads_by_group(grad_out, groups)
    r = None if r is None else _heads_by_group(r, groups)
    grad_q = None if grad_q is None else _heads_by_group(grad_q, groups)
    grad_r = None if grad_r is None else _heads_by_group(grad_r, groups)

    def zeros(gradient: Tensor | None, *shape: int) -> Tensor | None:
        if gradient is None:
            return None
        return q.new_zeros(shape, dtype=torch.float64 if gradient.dim() == 3 else compute)

    for some in _slices(groups, blocks.groups):
        weights = _weights(some, unit_blocks, compute, k, u, v, k_bias, u_bias)
        down_bias = None if v_bias is None else v_bias[some].to(compute)  # [G', E, d]
        count = some.stop - some.start
        sums = _Sums(
            k=zeros(grad_k, count, width, networks * units),
            u=zeros(grad_u, count, width, networks * units),
            v=zeros(grad_v, count, width, networks * units),
            k_bias=zeros(grad_k_bias, count, 1, networks * units),
            u_bias=zeros(grad_u_bias, count, 1, networks * units),
            v_bias=zeros(grad_v_bias, count, networks, width),
        )
        for block in _token_blocks(q, some, blocks):
            packed = _pack(block.of(q), "q", scratch)
            shape = tuple(packed.shape)
            rows = _Rows(
                q=packed,
                g=_pack(block.of(g), "g", scratch).mul_(out_scale),
                r=None if r is None else _pack(block.of(r), "r", scratch),
                dq=None if grad_q is None else scratch.get("dq", shape).zero_(),
                dr=None if grad_r is None else scratch.get("dr", (*shape[:2], networks)).zero_(),
            )
            _differentiate_down_bias(rows, down_bias, sums.v_bias)
            for w in weights:
                _differentiate(rows, w, sums, scratch, phi, k_scale, u_scale)
            if grad_q is not None and rows.dq is not None:
                _unpack(rows.dq, block.of(grad_q))
            if grad_r is not None and rows.dr is not None:
                _unpack(rows.dr, block.of(grad_r))
        for gradient, total in ((grad_k, sums.k), (grad_u, sums.u), (grad_v, sums.v)):
            if gradient is not None and total is not None:
                gradient[some].copy_(total.transpose(1, 2).unflatten(1, (networks, units)))
        for gradient, total in (
            (grad_k_bias, sums.k_bias),
            (grad_u_bias, sums.u_bias),
            (grad_v_bias, sums.v_bias),
        ):
            if gradient is not None and total is not None:
                gradient[some].copy_(total.view(gradient[some].shape))
    return wanted


def _differentiate_down_bias(rows: _Rows, v_bias: Tensor | None, total: Tensor | None) -> None:
    """Add what the biases of v contribute to the gradient of r, and their own gradient."""
    if v_bias is not None and rows.dr is not None:
        torch.bmm(rows.g, v_bias.transpose(1, 2), out=rows.dr)
    if total is not None:
        # A plain sum keeps partial sums, so it is more accurate than a product with r^T.
        if rows.r is None:
            total.add_(rows.g.sum(dim=1, keepdim=True))
        else:
            for e in range(total.shape[1]):
                total[:, e].add_((rows.g * rows.r[..., e, None]).sum(dim=1))


def _differentiate(
    rows: _Rows,
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
    shape = (*rows.q.shape[:2], w.k.shape[1])
    columns = w.units.columns
    to_k = rows.dq is not None or sums.k is not None or sums.k_bias is not None
    to_u = w.u is not None and (
        rows.dq is not None or sums.u is not None or sums.u_bias is not None
    )
    act, d = scratch.get("act", shape), scratch.get("d", shape)
    d_gate, up = scratch.get("slope", shape), scratch.get("up", shape)

    _project(rows.q, w.k, w.k_bias, k_scale, act)
    if to_k:
        phi.evaluate_with_derivative_(act, d_gate)
    else:
        phi.evaluate_(act)
    if w.u is not None:
        _project(rows.q, w.u, w.u_bias, u_scale, up)
    if to_k or to_u or rows.dr is not None:
        torch.bmm(rows.g, w.v.transpose(1, 2), out=d)

    if to_k:
        d_gate.mul_(d)
        if w.u is not None:
            d_gate.mul_(up)
    if w.u is None:
        product, weighted = act, up  # the un-gated network leaves the buffer of u free
        if rows.dr is not None:
            torch.mul(act, d, out=weighted)
    else:
        d.mul_(act)
        act.mul_(up)
        product, weighted = act, up
        if rows.dr is not None:
            weighted.mul_(d)
    if rows.dr is not None:
        rows.dr[..., w.units.networks].add_(w.units.by_network(weighted).sum(dim=3))

    if rows.r is not None:
        r = rows.r[..., w.units.networks, None]  # [G', T', E', 1]
        for needed, hidden in ((sums.v is not None, product), (to_k, d_gate), (to_u, d)):
            if needed:
                w.units.by_network(hidden).mul_(r)
    if sums.v is not None:
        sums.v[..., columns].baddbmm_(rows.g.transpose(1, 2), product)
    if to_k:
        _differentiate_projection(rows, d_gate, w.k, sums.k, sums.k_bias, k_scale, columns)
    if to_u and w.u is not None:
        _differentiate_projection(rows, d, w.u, sums.u, sums.u_bias, u_scale, columns)


def _differentiate_projection(
    rows: _Rows,
    d: Tensor,
    weight: Tensor,
    total: Tensor | None,
    bias_total: Tensor | None,
    scale: float,
    columns: slice,
) -> None:
    """Add the gradients of scale * q weight^T + bias, whose own gradient is d [G', T', F']."""
    if rows.dq is not None:
        rows.dq.baddbmm_(d, weight, alpha=scale)
    if total is not None:
        total[..., columns].baddbmm_(rows.q.transpose(1, 2), d, alpha=scale)
    if bias_total is not None:
        bias_total[..., columns].add_(d.sum(dim=1, keepdim=True))
