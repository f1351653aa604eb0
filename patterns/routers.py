"""Routers that read the queries in float32: the product behind a site's router, where it is one.

    logits = q.float() @ weight [+ bias]        any spelling; q in 16 bits, per head or for all
    router = anything of logits: sigmoid, normalisation, softmax, top-k

The product stays a product, only the copy of the queries in float32 is not needed. So nothing has
to be known of what is between it and the router, and where something is in the way the router stays
as it was written.
"""

from __future__ import annotations

import torch

from .axes import Axis, Index, axis_form
from .canonical import CanonicalCopy, Value
from .checks import axes_of, check_memory, depends_on, leaves, real, two_token_dims
from .contractions import MATRIX_PRODUCTS, Contraction, Operand, as_contraction
from .grammar import is_cast, is_other_pointwise
from .meaning import POINTWISE
from .reasons import Declined
from .rolling import in_reading_order
from .site import RouterProduct, Site, TensorView
from .views import behind_views, is_view

aten = torch.ops.aten

_NARROW = (torch.bfloat16, torch.float16)
_SOON = 64  # values between a product and the router
_REDUCTIONS = frozenset(
    {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten._softmax.default}
)


def find_router_products(site: Site, copy: CanonicalCopy) -> list[RouterProduct]:
    """The products of widened queries that a site's router is computed from."""
    found: list[RouterProduct] = []
    todo = [view.value for view in site.routers]
    seen = set(todo)
    for value in todo:  # grows: the nearest first
        product = _read(value, site, copy)
        if product is not None:
            found.append(product)
        elif value.op not in MATRIX_PRODUCTS and len(seen) < _SOON:
            new = [operand for operand in value.operands if operand not in seen]
            seen.update(new)
            todo += new
    return found


def _read(root: Value, site: Site, copy: CanonicalCopy) -> RouterProduct | None:
    """The product that a value is, behind views."""
    if root.dtype is not torch.float32 or copy.made_by(root) is None:
        return None
    index = tuple(axis_form(Axis(size)) for size in root.shape)
    crossed: set[Value] = {root}
    value, at = behind_views(root, index, crossed)
    contraction = as_contraction(value, at) if value.op in MATRIX_PRODUCTS else None
    if contraction is None or (contraction.scale, contraction.bias_scale) != (1.0, 1.0):
        return None
    crossed.add(value)
    for wide, other in (
        (contraction.left, contraction.right),
        (contraction.right, contraction.left),
    ):
        query, weight = _narrow(wide, crossed), _narrow(other, crossed)
        if query.value.dtype in _NARROW:
            placed = _is_placed(root, site, copy)
            return _proved(contraction, query, weight, root, index, crossed, placed, copy)
    return None


def _narrow(operand: Operand, crossed: set[Value]) -> Operand:
    """What an operand was before it was widened; itself, behind views, if it was not."""
    value, index = behind_views(operand.value, operand.index, crossed)
    if is_cast(value) and value.dtype is torch.float32 and value.source.dtype in _NARROW:
        crossed.add(value)
        value, index = behind_views(value.source, index, crossed)
    return Operand(value, index)


def _proved(
    contraction: Contraction,
    query: Operand,
    weight: Operand,
    root: Value,
    index: Index,
    crossed: set[Value],
    placed: bool,
    copy: CanonicalCopy,
) -> RouterProduct | None:
    """The product over named axes, if each of them plays one of the four roles."""
    order = [axis for form in index for axis in form.axes()]
    width = set(leaves(contraction.summed))
    of_query, of_weight = axes_of(query.index), axes_of(weight.index)
    tokens = tuple(a for a in order if a in of_query and a not in of_weight)
    heads = tuple(a for a in order if a in of_query and a in of_weight)
    networks = tuple(a for a in order if a not in of_query and a in of_weight)
    named = real((*tokens, *heads, *networks))
    if (
        not real(width) <= of_query & of_weight
        or real(order) != named
        or not real(of_query | of_weight) <= named | width
        or not tokens
        or not all(isinstance(axis.size, int) for axis in (*width, *heads, *networks))
        or root.memory_order() is None
    ):
        return None
    if weight.value is query.value or depends_on(weight.value, query.value):
        return None  # both are tokens
    if len({value.requires_grad_mode for value in crossed}) > 1:
        return None
    operands = [query, weight, *([contraction.bias] if contraction.bias else [])]
    try:
        check_memory(operands, root, copy)
    except Declined:
        return None
    if root.requires_grad_mode and any(copy.is_overwritten(x.value) for x in (query, weight)):
        return None  # the backward pass reads them again

    batch, length = two_token_dims(tokens, query.index, index)
    heads = in_reading_order(heads, query.index)
    inner = in_reading_order(tuple(width), query.index)
    output_dims = tuple(form.axes() for form in index)
    node = copy.made_by(root)
    assert node is not None
    return RouterProduct(
        query=TensorView(query.value, query.index, (batch, length, heads, inner)),
        weight=TensorView(weight.value, weight.index, (heads, inner, networks)),
        bias=None
        if contraction.bias is None
        else TensorView(contraction.bias.value, contraction.bias.index, output_dims),
        output=root,
        output_node=node,
        output_dims=output_dims,
        placed=placed,
    )


def _is_placed(output: Value, site: Site, copy: CanonicalCopy) -> bool:
    """Whether the place of a value in memory is seen, or handed on, outside of the site.

    What computes each element from those at the same place hands it on, and a sum does so for what
    is left. A view may not even exist for another place, unless it goes away with the site.
    """
    todo = [output]
    seen = {output}
    for value in todo:  # grows
        if value in copy.escaping:
            return True
        for reader in value.readers:
            if reader in site.replaces or reader in seen or not copy.is_live(reader):
                continue
            if not is_view(reader):
                if not _keeps_place(reader):
                    return True
                seen.add(reader)
                todo.append(reader)
            elif not _goes_away(reader, site, copy):
                return True
    return False


def _keeps_place(value: Value) -> bool:
    return value.op in POINTWISE or value.op in _REDUCTIONS or is_other_pointwise(value)


def _goes_away(view: Value, site: Site, copy: CanonicalCopy) -> bool:
    readers = [reader for reader in view.readers if copy.is_live(reader)]
    return view not in copy.escaping and all(
        reader in site.replaces or (is_view(reader) and _goes_away(reader, site, copy))
        for reader in readers
    )
