"""Views: which element of its input each element of a view reads.

One table from operator to rule, and one rule for pieces of a tensor that are merged again. A rule
takes the view and the index that it is read at, and returns the tensor that it views and the
index there; None if the step is no affine index map: the walk then ends at the view itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeAlias

import torch

from .axes import Affine, Index, Size, along, at_most, multiply, plus, quotient, through_reshape
from .canonical import COPY, Value

aten = torch.ops.aten

MERGES = frozenset({aten.cat.default, aten.stack.default})

#: operations that read a tensor's sizes, dtype and device, and none of its numbers
LIKES = frozenset(
    {
        aten.empty_like.default,
        aten.full_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.zeros_like.default,
    }
)

Rule: TypeAlias = Callable[[Value, Index], "tuple[Value, Index] | None"]


def through_view(value: Value, index: Index) -> tuple[Value, Index] | None:
    """One step from a view to what it shows, or None if ``value`` is no (affine) view."""
    rule = _RULES.get(value.op)
    if rule is not None:
        return rule(value, index)
    return _together_again(value, index) if value.op in MERGES else None


def is_view(value: Value) -> bool:
    """Whether the operation only moves elements, by ``through_view``."""
    return value.op in _RULES


def is_factory(value: Value) -> bool:
    """Whether an operation creates the value from sizes and constants alone: ``zeros``."""
    if isinstance(value.op, str) or torch.Tag.nondeterministic_seeded in value.op.tags:
        return False
    return not value.operands or value.op in LIKES


def through_views(
    value: Value,
    index: Index,
    crossed: set[Value] | None = None,
    stops: AbstractSet[Value] = frozenset(),
) -> tuple[Value, Index]:
    """All the steps: the tensor that holds the data, and the index into it.

    The views on the way are added to ``crossed``. The walk goes no further than ``stops``.
    """
    while value not in stops and (step := through_view(value, index)) is not None:
        if crossed is not None:
            crossed.add(value)
        value, index = step
    return value, index


def broadcast(index: Index, shape: Sequence[Size]) -> Index:
    """The index into an operand of ``shape`` that takes part in a broadcast read at ``index``."""
    aligned = index[len(index) - len(shape) :]
    return tuple(Affine() if size == 1 else form for form, size in zip(aligned, shape, strict=True))


def _together_again(value: Value, index: Index) -> tuple[Value, Index] | None:
    """What ``unbind``, ``chunk`` or slices took apart and ``stack`` or ``cat`` merge as it was."""
    pieces = pieces_of(value)
    if not is_view(pieces[0]):
        return None
    source = pieces[0].source
    for piece in pieces:
        one = is_view(piece) and piece.source is source
        if not one or piece.requires_grad_mode is not value.requires_grad_mode:
            return None
    dim = value.argument(1, "dim", 0) % len(value.shape)
    read = piece_index(value, index, dim)
    if read is None:
        return None
    position, inner = read
    reads = [through_view(piece, inner) for piece in pieces]
    whole = along([step[1] for step in reads if step is not None], position)
    return None if whole is None or None in reads else (source, whole)


def grows_into(value: Value, whole: Value) -> bool:
    """Whether one ``cat`` is a piece of another one that could take all pieces at once."""
    if value.op is not aten.cat.default or whole.op is not aten.cat.default:
        return False
    rank = len(value.shape)
    along_one = value.argument(1, "dim", 0) % rank == whole.argument(1, "dim", 0) % rank
    same_mode = value.requires_grad_mode is whole.requires_grad_mode
    alike = all(one.dtype is value.dtype for one in value.args[0])
    return along_one and alike and (same_mode or not value.may_need_gradient())


def all_pieces(value: Value) -> dict[Value, Size]:
    """What ``cat`` or ``stack`` merges and where it begins.

    Of a tensor that grows in a loop, these are the pieces and all the stages.
    """
    found: dict[Value, Size] = {}
    start: Size = 0
    for piece in value.args[0]:
        found.setdefault(piece, start)
        if grows_into(piece, value):
            for inner, place in all_pieces(piece).items():
                found.setdefault(inner, plus(start, place))
        start = plus(start, _width(piece, value))
    return found


def pieces_of(value: Value) -> Sequence[Value]:
    """What ``cat`` or ``stack`` merges: its arguments, or what grew if they differ in width."""
    pieces = _filled(value)
    if len({_width(piece, value) for piece in pieces}) == 1:
        return pieces
    return _grown_from(value)


def stages_of(value: Value) -> set[Value]:
    """The tensors that grew into a ``cat``, between it and ``pieces_of``."""
    pieces = set(pieces_of(value))
    return {one for one in all_pieces(value) if one.op is aten.cat.default and one not in pieces}


def _grown_from(value: Value) -> list[Value]:
    pieces: list[Value] = []
    for piece in _filled(value):
        pieces += _grown_from(piece) if grows_into(piece, value) else [piece]
    return pieces


def _filled(value: Value) -> Sequence[Value]:
    """The arguments of ``cat`` or ``stack``, without the empty ones that loops start from."""
    pieces: Sequence[Value] = value.args[0]
    if any(piece.dtype is not value.dtype for piece in pieces):
        return pieces
    return [piece for piece in pieces if 0 not in piece.shape] or pieces


def _width(piece: Value, whole: Value) -> Size:
    """How many places a piece takes along the dimension that a ``cat`` or ``stack`` merges."""
    if whole.op is aten.stack.default:
        return 1
    dim = whole.argument(1, "dim", 0) % len(whole.shape)
    return piece.shape[dim] if len(piece.shape) == len(whole.shape) else 0


def piece_index(value: Value, index: Index, dim: int) -> tuple[Affine, Index] | None:
    """Which of ``pieces_of`` a ``cat`` or ``stack`` an index reads, and where in it.

    None where the pieces differ in width or the index reads across their borders.
    """
    pieces = pieces_of(value)
    if value.op is aten.stack.default:
        return index[dim], (*index[:dim], *index[dim + 1 :])
    if any(len(piece.shape) != len(value.shape) for piece in pieces):
        return None
    width = pieces[0].shape[dim]
    if any(piece.shape[dim] != width for piece in pieces):
        return None
    digits = through_reshape((index[dim],), (value.shape[dim],), (len(pieces), width))
    return None if digits is None else (digits[0], (*index[:dim], digits[1], *index[dim + 1 :]))


def _reshape(value: Value, index: Index) -> tuple[Value, Index] | None:
    source = value.source
    inner = through_reshape(index, value.shape, source.shape)
    return None if inner is None else (source, inner)


def _same(value: Value, index: Index) -> tuple[Value, Index]:
    return value.source, index


def _permute(value: Value, index: Index) -> tuple[Value, Index]:
    source = value.source
    rank = len(source.shape)
    inner: list[Affine] = [Affine()] * rank
    for position, dim in enumerate(value.args[1]):
        inner[dim % rank] = index[position]
    return source, tuple(inner)


def _transpose(value: Value, index: Index) -> tuple[Value, Index]:
    source, rank = value.source, len(value.shape)
    a, b = (1, 0) if value.op is aten.t.default else (value.args[1], value.args[2])
    inner = list(index)
    if rank > 1:
        inner[a % rank], inner[b % rank] = index[b % rank], index[a % rank]
    return source, tuple(inner)


def _copy(value: Value, index: Index) -> tuple[Value, Index] | None:
    same = value.source.dtype is value.dtype
    return (value.source, broadcast(index, value.source.shape)) if same else None


def _expand(value: Value, index: Index) -> tuple[Value, Index]:
    return value.source, broadcast(index, value.source.shape)


def _repeat(value: Value, index: Index) -> tuple[Value, Index] | None:
    """Which copy is read makes no difference, only where in it."""
    source = value.source
    new = len(value.shape) - len(source.shape)  # dimensions in front that it repeats along
    inner: list[Affine] = []
    for form, size, out in zip(index[new:], source.shape, value.shape[new:], strict=True):
        times = quotient(out, size)
        digits = None if times is None else through_reshape((form,), (out,), (times, size))
        if digits is None:
            return None
        inner.append(digits[1])
    return source, tuple(inner)


def _unsqueeze(value: Value, index: Index) -> tuple[Value, Index]:
    dim = value.args[1] % len(value.shape)
    return value.source, index[:dim] + index[dim + 1 :]


def _squeeze(value: Value, index: Index) -> tuple[Value, Index] | None:
    source = value.source
    rank = len(source.shape)
    dims = range(rank) if len(value.args) < 2 else value.args[1]
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % rank for dim in dims if source.shape[dim % rank] == 1}
    kept = iter(index)
    return source, tuple(Affine() if dim in gone else next(kept) for dim in range(rank))


def _slice(value: Value, index: Index) -> tuple[Value, Index] | None:
    dim = value.argument(1, "dim", 0) % len(value.shape)
    start = value.argument(2, "start", None) or 0
    step = value.argument(4, "step", 1)
    if not isinstance(step, int) or not (isinstance(start, int) or at_most(0, start)):
        return None
    if isinstance(start, int) and start < 0:
        size = value.source.shape[dim]
        if not isinstance(size, int):
            return None
        start = max(start + size, 0)
    if not _is_inside(value, dim, start, step):
        return None
    inner = list(index)
    inner[dim] = index[dim].scaled(step).shifted(start)
    return value.source, tuple(inner)


def _select(value: Value, index: Index) -> tuple[Value, Index] | None:
    source = value.source
    dim, position = value.args[1] % len(source.shape), value.args[2]
    return _fixed(source, index, dim, position)


def _unbind(value: Value, index: Index) -> tuple[Value, Index] | None:
    source = value.source
    dim = value.argument(1, "dim", 0) % len(source.shape)
    return _fixed(source, index, dim, value.item)


def _fixed(source: Value, index: Index, dim: int, at: object) -> tuple[Value, Index] | None:
    size = source.shape[dim]
    if not isinstance(at, int) or (at < 0 and not isinstance(size, int)):
        return None
    at = at + size if at < 0 else at
    return source, (*index[:dim], Affine((), at), *index[dim:])


def _split(value: Value, index: Index) -> tuple[Value, Index] | None:
    sizes, dim = value.args[1], value.argument(2, "dim", 0) % len(value.shape)
    assert value.item is not None
    if not isinstance(sizes, (list, tuple)):
        start = multiply(sizes, value.item)
    elif all(isinstance(size, int) for size in sizes[: value.item]):
        start = sum(sizes[: value.item])
    else:
        return None
    if not _is_inside(value, dim, start, 1):
        return None
    inner = list(index)
    inner[dim] = index[dim].shifted(start)
    return value.source, tuple(inner)


def _is_inside(value: Value, dim: int, start: Size, step: int) -> bool:
    """Whether a part is proved to lie in what it is a part of; any of a fixed size does.

    A third of four chunks does by what the graph is guarded for, which sizes do not say.
    """
    width = value.shape[dim]
    if isinstance(start, int) and isinstance(width, int):
        return True
    end = plus(start, plus(multiply(step, plus(width, -1)), 1))
    return at_most(end, value.source.shape[dim])


#: the same elements in the same order under another shape
RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten._reshape_alias.default,
    }
)
_RULES: dict[object, Rule] = {
    **dict.fromkeys(RESHAPES, _reshape),
    COPY: _copy,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.lift_fresh.default: _same,
    aten.contiguous.default: _same,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
}
