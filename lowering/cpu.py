"""The op on the CPU: blocks of tokens through batched matrix products in cache-sized buffers.

The hidden activations of a block live in a few scratch buffers that every block reuses, so the
memory of a call does not grow with tokens times hidden units. A block covers some weight groups
(the batch of the matrix products), one of the heads that share each group, some tokens, and some
hidden units; the units of whole sub-networks stand side by side, so that one product covers them.
Half precision is computed in float32.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import ACTIVATIONS, Activation

__all__ = ["backward", "forward"]

# Elements of one hidden buffer per thread: 512 KiB of float32, so that the two or three buffers
# in use at a time stay in the second and third cache level.
_BUFFER_ELEMENTS = 128 * 1024
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


@dataclass(frozen=True)
class _Blocks:
    """How a call is cut: sizes of the blocks along each axis."""

    batch: int
    length: int
    groups: int
    networks: int
    units: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def hidden(self) -> int:
        """Elements of the hidden buffer of one block."""
        return self.groups * self.tokens * self.networks * self.units


def _even(total: int, limit: int) -> int:
    """The size of a block when ``total`` is cut evenly into blocks of at most ``limit``."""
    pieces = max(1, -(-total // max(1, limit)))
    return max(1, -(-total // pieces))


def _cut(q: Tensor, k: Tensor, compute: torch.dtype) -> _Blocks:
    batch, length = q.shape[:2]
    groups, networks, units, width = k.shape
    budget = _BUFFER_ELEMENTS * torch.get_num_threads()
    rows = max(1, min(batch * length, _TOKENS))
    if units * rows > budget:
        networks, units = 1, _even(units, budget // rows)
    else:
        networks = _even(networks, budget // (rows * units))
    columns = networks * units
    groups_at_once = _even(groups, budget // (rows * columns))
    if k.dtype != compute:  # the weights of these groups are converted, all three at once
        converted = k.shape[1] * k.shape[2] * width
        groups_at_once = _even(groups, min(groups_at_once, 4 * budget // converted))
    rows = max(1, budget // (groups_at_once * columns))
    length_at_once = _even(length, rows)
    batch_at_once = _even(batch, rows // length_at_once)
    return _Blocks(batch_at_once, length_at_once, groups_at_once, networks, units)


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _token_blocks(q: Tensor, groups: slice, share: int, blocks: _Blocks) -> Iterator[_Tokens]:
    for head in range(share):
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


def _of(buffer: Tensor, *shape: int) -> Tensor:
    """The front of a flat scratch buffer in this shape."""
    return buffer[: math.prod(shape)].view(shape)


def _pack(x: Tensor, into: Tensor) -> Tensor:
    """x [G', B', L', n] as contiguous rows [G', T', n], in the dtype of the buffer."""
    groups, batch, length, width = x.shape
    packed = _of(into, groups, batch, length, width)
    packed.copy_(x)
    return packed.view(groups, batch * length, width)


def _matrix(x: Tensor, compute: torch.dtype) -> Tensor:
    """A matrix [G', E, f, d] of weights as [G', E * f, d] that a matrix product reads in place."""
    x = x.to(compute).flatten(1, 2)
    rows, columns = x.shape[1:]
    by_rows = x.stride(2) == 1 and x.stride(1) >= columns
    by_columns = x.stride(1) == 1 and x.stride(2) >= rows
    return x if by_rows or by_columns else x.contiguous()


@dataclass(frozen=True)
class _Weights:
    """The weights of some groups in the dtype of the computation, networks side by side."""

    k: Tensor  # [G', E * f, d]
    u: Tensor | None
    v: Tensor
    k_bias: Tensor | None  # [G', 1, E * f]
    u_bias: Tensor | None
    v_bias: Tensor | None  # [G', E, d]


def _weights(
    groups: slice,
    compute: torch.dtype,
    k: Tensor,
    u: Tensor | None,
    v: Tensor,
    k_bias: Tensor | None,
    u_bias: Tensor | None,
    v_bias: Tensor | None,
) -> _Weights:
    def row(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias[groups].to(compute).flatten(1).unsqueeze(1)

    return _Weights(
        k=_matrix(k[groups], compute),
        u=None if u is None else _matrix(u[groups], compute),
        v=_matrix(v[groups], compute),
        k_bias=row(k_bias),
        u_bias=row(u_bias),
        v_bias=None if v_bias is None else v_bias[groups].to(compute),
    )


def _project(
    rows: Tensor, weight: Tensor, bias: Tensor | None, scale: float, units: _Units, out: Tensor
) -> Tensor:
    """scale * rows weight^T + bias for these hidden units: [G', T', F'], written into ``out``."""
    transposed = weight[:, units.columns].transpose(1, 2)
    if bias is None:
        return torch.baddbmm(out, rows, transposed, beta=0, alpha=scale, out=out)
    start = bias[..., units.columns].expand_as(out)
    return torch.baddbmm(start, rows, transposed, alpha=scale, out=out)


def _by_network(hidden: Tensor, units: _Units) -> Tensor:
    """[G', T', F'] as [G', T', E', f'], a view."""
    return hidden.unflatten(2, (units.networks.stop - units.networks.start, -1))


def _heads_by_group(x: Tensor, groups: int) -> Tensor:
    """[B, L, H, n] as [B, L, G, H/G, n], a view for any strides."""
    return x.unflatten(2, (groups, x.shape[2] // groups))


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
    groups, networks, _, width = k.shape
    share = q.shape[2] // groups
    phi = ACTIVATIONS[activation]
    blocks = _cut(q, k, compute)
    unit_blocks = _unit_blocks(k, blocks)

    rows = blocks.groups * blocks.tokens
    q_buffer, out_buffer = (q.new_empty(rows * width, dtype=compute) for _ in range(2))
    gate_buffer = q.new_empty(blocks.hidden, dtype=compute)
    up_buffer = q.new_empty(0 if u is None else blocks.hidden, dtype=compute)
    r_buffer = q.new_empty(0 if r is None else rows * networks, dtype=compute)
    q, out = _heads_by_group(q, groups), _heads_by_group(out, groups)
    r = None if r is None else _heads_by_group(r, groups)

    for some in _slices(groups, blocks.groups):
        w = _weights(some, compute, k, u, v, k_bias, u_bias, v_bias)
        for block in _token_blocks(q, some, share, blocks):
            rows_q = _pack(block.of(q), q_buffer)  # [G', T', d]
            rows_r = None if r is None else _pack(block.of(r), r_buffer)  # [G', T', E]
            result = _of(out_buffer, *rows_q.shape)
            _start(result, rows_r, w.v_bias, out_scale)
            for units in unit_blocks:
                shape = (*rows_q.shape[:2], units.columns.stop - units.columns.start)
                hidden = _project(
                    rows_q, w.k, w.k_bias, k_scale, units, _of(gate_buffer, *shape)
                )  # [G', T', F']
                phi.evaluate_(hidden)
                if w.u is not None:
                    hidden.mul_(
                        _project(rows_q, w.u, w.u_bias, u_scale, units, _of(up_buffer, *shape))
                    )
                if rows_r is not None:
                    _by_network(hidden, units).mul_(rows_r[..., units.networks, None])
                torch.baddbmm(result, hidden, w.v[:, units.columns], alpha=out_scale, out=result)
            target = block.of(out)
            target.copy_(result.view(target.shape))


def _start(result: Tensor, r: Tensor | None, v_bias: Tensor | None, out_scale: float) -> None:
    """Set ``result`` [G', T', d] to the part of the output that the biases of v make."""
    if v_bias is None:
        result.zero_()
    elif r is None:
        result.copy_(v_bias.sum(dim=1, keepdim=True).mul_(out_scale))
    else:
        torch.baddbmm(result, r, v_bias, beta=0, alpha=out_scale, out=result)


@dataclass(frozen=True)
class _WeightGradients:
    """Sums over tokens, in the dtype of the computation; None where no gradient is wanted."""

    k: Tensor | None  # [G', E * f, d]
    u: Tensor | None
    v: Tensor | None
    k_bias: Tensor | None  # [G', 1, E * f]
    u_bias: Tensor | None
    v_bias: Tensor | None  # [G', E, d]


@dataclass(frozen=True)
class _Rows:
    """What one block of tokens reads, and the sums over hidden units that it makes."""

    q: Tensor  # [G', T', d]
    g: Tensor  # [G', T', d], the gradient of the output times its scale
    r: Tensor | None  # [G', T', E]
    dq: Tensor | None  # [G', T', d]
    dr: Tensor | None  # [G', T', E]


@dataclass(frozen=True)
class _Scratch:
    """Flat hidden buffers of the backward pass."""

    act: Tensor
    slope: Tensor
    up: Tensor
    d: Tensor
    product: Tensor


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
    groups, networks, units_each, width = k.shape
    blocks = _cut(q, k, compute)
    unit_blocks = _unit_blocks(k, blocks)

    def scratch(size: int, wanted: bool = True) -> Tensor:
        return q.new_empty(size if wanted else 0, dtype=compute)

    rows = blocks.groups * blocks.tokens
    q_buffer, g_buffer = scratch(rows * width), scratch(rows * width)
    dq_buffer = scratch(rows * width, grad_q is not None)
    r_buffer = scratch(rows * networks, r is not None)
    dr_buffer = scratch(rows * networks, grad_r is not None)
    hidden = _Scratch(
        act=scratch(blocks.hidden),
        slope=scratch(blocks.hidden),
        up=scratch(blocks.hidden, u is not None),
        d=scratch(blocks.hidden),
        product=scratch(blocks.hidden, grad_r is not None),
    )
    q, g = _heads_by_group(q, groups), _heads_by_group(grad_out, groups)
    r = None if r is None else _heads_by_group(r, groups)
    grad_q = None if grad_q is None else _heads_by_group(grad_q, groups)
    grad_r = None if grad_r is None else _heads_by_group(grad_r, groups)

    for some in _slices(groups, blocks.groups):
        w = _weights(some, compute, k, u, v, k_bias, u_bias, v_bias)
        count = some.stop - some.start

        def zeros(of: Tensor | None, *shape: int) -> Tensor | None:
            return None if of is None else q.new_zeros(shape, dtype=compute)

        columns = networks * units_each
        dw = _WeightGradients(
            k=zeros(grad_k, count, columns, width),
            u=zeros(grad_u, count, columns, width),
            v=zeros(grad_v, count, columns, width),
            k_bias=zeros(grad_k_bias, count, 1, columns),
            u_bias=zeros(grad_u_bias, count, 1, columns),
            v_bias=zeros(grad_v_bias, count, networks, width),
        )
        for block in _token_blocks(q, some, q.shape[3], blocks):
            rows_q = _pack(block.of(q), q_buffer)
            now = _Rows(
                q=rows_q,
                g=_pack(block.of(g), g_buffer).mul_(out_scale),
                r=None if r is None else _pack(block.of(r), r_buffer),
                dq=None if grad_q is None else _of(dq_buffer, *rows_q.shape).zero_(),
                dr=None if grad_r is None else _of(dr_buffer, *rows_q.shape[:2], networks).zero_(),
            )
            _differentiate_v_bias(now, w.v_bias, dw.v_bias)
            for units in unit_blocks:
                _differentiate(now, w, dw, units, hidden, ACTIVATIONS[activation], k_scale, u_scale)
            for grad, source in ((grad_q, now.dq), (grad_r, now.dr)):
                if grad is not None and source is not None:
                    target = block.of(grad)
                    target.copy_(source.view(target.shape))
        for grad, total in (
            (grad_k, dw.k),
            (grad_u, dw.u),
            (grad_v, dw.v),
            (grad_k_bias, dw.k_bias),
            (grad_u_bias, dw.u_bias),
            (grad_v_bias, dw.v_bias),
        ):
            if grad is not None and total is not None:
                target = grad[some]
                target.copy_(total.view(target.shape))
    return wanted


def _differentiate_v_bias(now: _Rows, v_bias: Tensor | None, dv_bias: Tensor | None) -> None:
    """Add what the biases of v contribute to the gradient of r, and their own gradient."""
    if v_bias is not None and now.dr is not None:
        torch.bmm(now.g, v_bias.transpose(1, 2), out=now.dr)
    if dv_bias is not None:
        if now.r is None:
            dv_bias.add_(now.g.sum(dim=1, keepdim=True))
        else:
            dv_bias.baddbmm_(now.r.transpose(1, 2), now.g)


def _differentiate(
    now: _Rows,
    w: _Weights,
    dw: _WeightGradients,
    units: _Units,
    hidden: _Scratch,
    phi: Activation,
    k_scale: float,
    u_scale: float,
) -> None:
    """Add what these hidden units contribute to every gradient of one block of tokens.

    Each buffer holds [G', T', F'] and is overwritten as soon as its value has been read.
    """
    shape = (*now.q.shape[:2], units.columns.stop - units.columns.start)
    columns = units.columns
    r = None if now.r is None else now.r[..., units.networks, None]  # [G', T', E', 1]
    to_gate = now.dq is not None or dw.k is not None or dw.k_bias is not None
    to_up = w.u is not None and (now.dq is not None or dw.u is not None or dw.u_bias is not None)

    act = _project(now.q, w.k, w.k_bias, k_scale, units, _of(hidden.act, *shape))
    slope = _of(hidden.slope, *shape)
    if to_gate:
        phi.evaluate_with_derivative_(act, slope)
    else:
        phi.evaluate_(act)
    product = act  # of both branches
    if w.u is not None:
        product = _project(now.q, w.u, w.u_bias, u_scale, units, _of(hidden.up, *shape))
        if to_gate:
            slope.mul_(product)
        product.mul_(act)

    d = _of(hidden.d, *shape)  # the gradient of the product
    if to_gate or to_up or now.dr is not None:
        torch.bmm(now.g, w.v[:, columns].transpose(1, 2), out=d)
    if now.dr is not None:
        torch.mul(product, d, out=(weighted := _of(hidden.product, *shape)))
        now.dr[..., units.networks].add_(_by_network(weighted, units).sum(dim=3))
    if (to_gate or to_up) and r is not None:
        _by_network(d, units).mul_(r)
    if dw.v is not None:
        if r is not None:
            _by_network(product, units).mul_(r)
        dw.v[:, columns].baddbmm_(product.transpose(1, 2), now.g)
    if to_gate:
        slope.mul_(d)
        _differentiate_projection(now, slope, w.k, dw.k, dw.k_bias, k_scale, columns)
    if to_up and w.u is not None:
        act.mul_(d)
        _differentiate_projection(now, act, w.u, dw.u, dw.u_bias, u_scale, columns)


def _differentiate_projection(
    now: _Rows,
    d: Tensor,
    weight: Tensor,
    dw: Tensor | None,
    dbias: Tensor | None,
    scale: float,
    columns: slice,
) -> None:
    """Add the gradients of scale * q weight^T + bias, whose own gradient is d [G', T', F']."""
    if now.dq is not None:
        now.dq.baddbmm_(d, weight[:, columns], alpha=scale)
    if dw is not None:
        dw[:, columns].baddbmm_(d.transpose(1, 2), now.q, alpha=scale)
    if dbias is not None:
        dbias[..., columns].add_(d.sum(dim=1, keepdim=True))
