"""Along which dimension of each input of the graph the heads of a site lie.

The walk goes from the op's arguments down to inputs, through everything that keeps heads apart:
views, casts, pointwise operations, norms and softmaxes along other dimensions, and products, from
which the projections of queries and routers are known. It ends where the heads do. Above the site
it looks for one thing alone, a product that sums over heads, as an output projection does.

What is found says how to divide parameters between devices. No number depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .axes import Affine, Axis, Index, Size, axis_form, leaves, multiply, product, through_reshape
from .canonical import INPUT, Value
from .contractions import as_contraction, summed_index
from .meaning import POINTWISE
from .operations import REDUCTIONS, is_cast, is_other_pointwise
from .products import MATRIX_PRODUCTS
from .rolling import STACK
from .site import Site
from .views import MERGES, broadcast, piece_index, pieces_of, through_view, through_views

aten = torch.ops.aten

_NORMS = frozenset(
    op.default
    for name in ("native_layer_norm", "_fused_rms_norm", "rms_norm")
    if (op := getattr(aten, name, None)) is not None
)
_SOON = 8  # operations from the output of a site to its output projection
OUTPUT = "output"  # the role of what an output projection reads


@dataclass(frozen=True)
class Heads:
    """How the heads of a site lie in one input of the graph.

    Attributes:
        role: the argument of the op that is computed from the input, as in ``Site.views``, or
            ``"output"``.
        value: the input.
        dim: its dimension along which heads follow each other; None if there is none.
        count: how many blocks of heads that dimension consists of: heads, or groups of them.
        alone: whether the input has the weights of one head, or of some heads, and not of all.
    """

    role: str
    value: Value
    dim: int | None
    count: int = 1
    alone: bool = False


def find_heads(site: Site) -> Iterator[Heads]:
    """How the heads lie in the inputs that a site's arguments, and its projections, are made of.

    Inputs without heads, such as a norm's that all heads share, are left out.
    """
    heads = site.query.dims[2]
    for role, view in site.views().items():
        if role != "residual":
            yield from _inputs(role, view.value, view.index, heads)
    for value, index, axes in _output_projections(site):
        yield from _inputs(OUTPUT, value, index, axes)


def _inputs(role: str, value: Value, index: Index, heads: Sequence[Axis]) -> Iterator[Heads]:
    """The inputs that a value, read at an index, is computed from head by head."""
    todo = [(value, index)]
    seen: set[Value] = set()
    while todo:
        value, index = todo.pop()
        if _mention(index, heads) and (value not in seen or value.op == INPUT):
            seen.add(value)
            if value.op == INPUT:
                yield _of_input(role, value, index, heads)
            elif _mention(_piece(value, index), heads):
                inputs = (one for one in value.ancestors() if one.op == INPUT)
                yield from (Heads(role, one, None, alone=True) for one in inputs)
            else:
                todo += _operands(value, index)


def _piece(value: Value, index: Index) -> Index:
    """Which of the tensors that are merged an index reads."""
    if value.op == STACK:
        return index[:1]
    if value.op not in MERGES or through_view(value, index) is not None:
        return ()
    read = piece_index(value, index, value.argument(1, "dim", 0) % len(value.shape))
    return () if read is None else read[:1]


def _of_input(role: str, value: Value, index: Index, heads: Sequence[Axis]) -> Heads:
    dims = [dim for dim, form in enumerate(index) if _mention((form,), heads)]
    if len(dims) != 1:
        return Heads(role, value, None)
    (dim,) = dims
    form, rest, count = index[dim], value.shape[dim], 1
    for axis in leaves(heads):
        if axis.size == 1:
            continue
        step = form.coefficient(axis)
        if not isinstance(axis.size, int) or multiply(step, axis.size) != rest:
            break
        rest, count = step, count * axis.size
    return Heads(role, value, dim if count > 1 else None, count)


def _mention(index: Index, heads: Sequence[Axis]) -> bool:
    of_heads = {axis for axis in leaves(heads) if axis.size != 1}
    return any(axis in of_heads for form in index for axis in form.axes())


def _operands(value: Value, index: Index) -> list[tuple[Value, Index]]:
    """What a value read at an index reads, and where; nothing for what mixes elements otherwise."""
    step = through_view(value, index)
    if step is not None:
        return [step]
    if value.op == STACK:
        return [(part, index[1:]) for part in value.operands]
    if value.op in MERGES:
        dim = value.argument(1, "dim", 0) % len(value.shape)
        read = piece_index(value, index, dim)
        return [] if read is None else [(piece, read[1]) for piece in pieces_of(value)]
    if is_cast(value) or value.op in POINTWISE or is_other_pointwise(value):
        return [
            (operand, broadcast(index, operand.shape))
            for operand in value.operands
            if len(operand.shape) <= len(index)
        ]
    contraction = as_contraction(value, index)
    if contraction is not None:
        operands = (contraction.left, contraction.right, contraction.bias)
        return [(operand.value, operand.index) for operand in operands if operand is not None]
    if value.op in REDUCTIONS:
        return [(value.source, summed_index(value, index)[0])]
    if value.op in _NORMS:
        inner = len(value.args[1])
        normed = (*index[:-inner], *map(_all_of, value.source.shape[-inner:]))
        affine = [(one, index[-len(one.shape) :]) for one in value.operands[1:]]
        return [(value.source, normed), *affine]
    return _along_a_dimension(value, index)


def _along_a_dimension(value: Value, index: Index) -> list[tuple[Value, Index]]:
    """The operands of what mixes elements along one dimension: a softmax, ``topk``, ``gather``."""
    if isinstance(value.op, str):
        return []
    for position, argument in enumerate(value.op._schema.arguments):
        if argument.name == "dim":
            dim = value.argument(position, "dim", argument.default_value)
            break
    else:
        return []
    if not isinstance(dim, int) or not index:
        return []
    dim %= len(index)
    return [
        (one, (*index[:dim], _all_of(one.shape[dim]), *index[dim + 1 :]))
        for one in value.operands
        if len(one.shape) == len(index)
    ]


def _all_of(size: Size) -> Affine:
    return axis_form(Axis(size))


# Above the site.


def _output_projections(site: Site) -> Iterator[tuple[Value, Index, tuple[Axis, ...]]]:
    """The weights of products that sum over a site's heads: value, index, and the axes of heads."""
    todo = [(site.output, 0)]
    seen = {site.output}
    while todo:
        value, distance = todo.pop()
        for reader in value.readers:
            if reader in seen or distance == _SOON:
                continue
            seen.add(reader)
            if reader.op in MATRIX_PRODUCTS:
                yield from _summed_over_heads(reader, site)
            elif is_cast(reader) or through_view(reader, _index_of(reader)) is not None:
                todo.append((reader, distance + 1))


def _summed_over_heads(value: Value, site: Site) -> Iterator[tuple[Value, Index, tuple[Axis, ...]]]:
    contraction = as_contraction(value, _index_of(value))
    if contraction is None:
        return
    pair = (contraction.left, contraction.right)
    for tokens, weight in (pair, pair[::-1]):
        source, index = through_views(tokens.value, tokens.index, stops={site.output})
        while source is not site.output and is_cast(source):
            source, index = through_views(source.source, index, stops={site.output})
        if source is site.output:
            axes = _heads_in_output(site, index)
            if set(axes) & set(leaves(contraction.summed)):
                yield weight.value, weight.index, axes


def _heads_in_output(site: Site, index: Index) -> tuple[Axis, ...]:
    """The axes of an index into a site's output that stand for heads, outermost first."""
    heads = leaves(site.query.dims[2])
    for form, axes, size in zip(index, site.output_dims, site.output.shape, strict=True):
        parts = leaves(axes)
        count = sum(axis in heads for axis in parts)
        if count:
            if parts[:count] != heads:
                return ()
            outer = product(axis.size for axis in heads)
            inner = product(axis.size for axis in parts[count:])
            digits = through_reshape((form,), (size,), (outer, inner))
            if digits is None:
                return ()
            terms = [term for term in digits[0].resolved().terms if isinstance(term[1], int)]
            return tuple(axis for axis, _ in sorted(terms, key=lambda term: -int(term[1])))
    return ()


def _index_of(value: Value) -> Index:
    return tuple(_all_of(size) for size in value.shape)
