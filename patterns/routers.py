"""Routers that read the queries in float32: the product before a site's router, where there is one.

    logits = q.float() @ weight [+ bias]        any spelling; q in 16 bits, per head or for all
    router = anything of logits: sigmoid, normalisation, softmax, top-k

The product stays a product, and only the float32 copy of the queries goes, so the operations
between product and router need no proof. Two things do: nothing else reads or writes the copy; and,
before the layout of the result may change, nothing observes that layout. Otherwise the router stays
as it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .axes import Axis, Index, axes_of, axis_form, leaves, real
from .canonical import CanonicalCopy, Value
from .checks import check_memory, depends_on, two_token_dims
from .contractions import Contraction, Operand, as_contraction
from .meaning import POINTWISE
from .operations import REDUCTIONS, is_cast, is_other_pointwise
from .products import MATRIX_PRODUCTS
from .reasons import Declined
from .rolling import in_reading_order
from .site import RouterProduct, Site, TensorView
from .views import is_view, through_view, through_views

aten = torch.ops.aten

_NARROW = (torch.bfloat16, torch.float16)
_MOST_VISITED = 64  # values that a site's routers are computed from
_MOST_PRODUCTS = 2  # of one site: a loop over heads or sub-networks would become as many calls


def find_router_products(sites: Sequence[Site], copy: CanonicalCopy) -> list[list[RouterProduct]]:
    """For each site, the products of widened queries that its router is computed from.

    ``sites`` are all that are rewritten: the search does not enter them or go above their outputs.
    """
    others = frozenset(value for one in sites for value in (one.output, *one.pieces, *one.replaces))
    return [_products_of(site, others, copy) for site in sites]


def _products_of(site: Site, others: frozenset[Value], copy: CanonicalCopy) -> list[RouterProduct]:
    found: list[RouterProduct] = []
    todo = [view.value for view in site.routers if view.value not in others]
    seen = set(todo)
    for value in todo:  # grows: the nearest first
        product = _read(value, site, others, copy)
        if product is not None:
            found.append(product)
        elif value.op not in MATRIX_PRODUCTS and len(seen) < _MOST_VISITED:
            new = [v for v in value.operands if v not in seen and v not in others]
            seen.update(new)
            todo += new
    return found if len(found) <= _MOST_PRODUCTS else []


def _read(
    root: Value, site: Site, others: frozenset[Value], copy: CanonicalCopy
) -> RouterProduct | None:
    """The product that a value is a view of."""
    node = copy.made_by(root)
    if root.dtype is not torch.float32 or node is None:
        return None
    index = tuple(axis_form(Axis(size)) for size in root.shape)
    crossed: set[Value] = set()
    value, at = through_views(root, index, crossed, others)
    contraction = as_contraction(value, at) if value.op in MATRIX_PRODUCTS else None
    if contraction is None or (contraction.scale, contraction.bias_scale) != (1.0, 1.0):
        return None
    for wide, other in (
        (contraction.left, contraction.right),
        (contraction.right, contraction.left),
    ):
        query = _narrow(wide, node, crossed, others, copy)
        weight = _narrow(other, node, crossed, others, copy)
        if query is None or weight is None:
            return None
        if query.value.dtype in _NARROW and not query.value.is_parameter:
            between = frozenset({root, value, *crossed})
            product = _Product(contraction, query, weight, root, node, index, between)
            return _proved(product, site, copy)
    return None


def _narrow(
    operand: Operand,
    node: fx.Node,
    crossed: set[Value],
    others: frozenset[Value],
    copy: CanonicalCopy,
) -> Operand | None:
    """An operand before it was widened to float32, or the operand itself if it was not.

    The walk goes through views as far as some node still holds the value at ``node``, so that
    nothing is recomputed.
    """
    views: set[Value] = set()
    value, index = through_views(operand.value, operand.index, views, others)
    if is_cast(value) and value.source.dtype in _NARROW:
        crossed |= views | {value}
        value = value.source
    else:
        value, index = operand.value, operand.index
    found = None
    passed: list[Value] = []
    while True:
        if copy.holder_at(value, copy.positions[node]) is not None:
            found = Operand(value, index)
            crossed.update(passed)
            passed.clear()
        step = None if value in others else through_view(value, index)
        if step is None:
            return found
        passed.append(value)
        value, index = step


@dataclass(frozen=True, slots=True)
class _Product:
    """A product in float32 that a router is computed from, before anything is proved of it."""

    contraction: Contraction
    query: Operand  # before it was widened
    weight: Operand
    root: Value  # the value that the router reads
    node: fx.Node  # which makes it
    index: Index  # of the root
    between: frozenset[Value]  # what the product computes or reads on its way to query and weight

    @property
    def operands(self) -> list[Operand]:
        bias = self.contraction.bias
        return [self.query, self.weight, *([] if bias is None else [bias])]


@dataclass(frozen=True, slots=True)
class _Roles:
    """The axes of a router's product by what they count, outermost first."""

    tokens: tuple[Axis, ...]
    heads: tuple[Axis, ...]
    sub_networks: tuple[Axis, ...]
    width: tuple[Axis, ...]  # summed

    @classmethod
    def of(cls, product: _Product) -> _Roles:
        """By where an axis occurs: in the query, in the weight, or in both."""
        order = [axis for form in product.index for axis in form.axes()]
        of_query, of_weight = axes_of(product.query.index), axes_of(product.weight.index)
        return cls(
            tokens=tuple(a for a in order if a in of_query and a not in of_weight),
            heads=tuple(a for a in order if a in of_query and a in of_weight),
            sub_networks=tuple(a for a in order if a not in of_query and a in of_weight),
            width=leaves(product.contraction.summed),
        )

    def are_complete(self, product: _Product) -> bool:
        """Whether every axis has one of the roles, and the result moves along all but the sum."""
        order = [axis for form in product.index for axis in form.axes()]
        of_query, of_weight = axes_of(product.query.index), axes_of(product.weight.index)
        named = real((*self.tokens, *self.heads, *self.sub_networks))
        return (
            real(self.width) <= of_query & of_weight
            and real(order) == named
            and real(of_query | of_weight) <= named | set(self.width)
        )

    def are_static(self) -> bool:
        """Whether all sizes but the number of tokens are known."""
        axes = (*self.width, *self.heads, *self.sub_networks)
        return all(isinstance(axis.size, int) for axis in axes)


def _proved(product: _Product, site: Site, copy: CanonicalCopy) -> RouterProduct | None:
    """The product over named axes, if it is one that the op can compute in its place."""
    roles = _Roles.of(product)
    if not roles.are_complete(product) or not roles.are_static():
        return None
    if not roles.tokens and site.query.shape[:2] != (1, 1):
        return None
    if not _can_move(product, copy):
        return None
    query, weight, bias = product.query, product.weight, product.contraction.bias
    batch, length = two_token_dims(roles.tokens, query.index)
    heads = in_reading_order(roles.heads, query.index)
    inner = in_reading_order(roles.width, query.index)
    output_dims = tuple(form.axes() for form in product.index)
    return RouterProduct(
        query=TensorView(query.value, query.index, (batch, length, heads, inner)),
        weight=TensorView(weight.value, weight.index, (heads, inner, roles.sub_networks)),
        bias=None if bias is None else TensorView(bias.value, bias.index, output_dims),
        output=product.root,
        output_node=product.node,
        output_dims=output_dims,
        placed=_is_placed(product.root, site, copy),
    )


def _can_move(product: _Product, copy: CanonicalCopy) -> bool:
    """Whether nothing reads or writes what the product would no longer compute."""
    query, weight, root = product.query.value, product.weight.value, product.root
    if weight is query or depends_on(weight, query):
        return False  # both are tokens
    if root.memory_order() is None:
        return False
    if len({value.requires_grad_mode for value in product.between}) > 1:
        return False
    # The backward pass of eager reads the copy, and a hook on it sees its gradient.
    if root.requires_grad_mode and any(
        copy.is_overwritten(value) for value in {query, weight, *product.between}
    ):
        return False
    bias = product.contraction.bias
    if bias is not None and copy.holder_at(bias.value, copy.positions[product.node]) is None:
        return False
    try:
        check_memory(product.operands, root, copy)
    except Declined:
        return False
    return True


def _is_placed(output: Value, site: Site, copy: CanonicalCopy) -> bool:
    """Whether the layout of a value can be observed, or is handed on, outside of the site.

    The nodes that read it decide, since not every node leaves an operation in the copy. One that
    computes each element from those at the same place hands the layout on, and a sum does so for
    the remaining dimensions. All others observe it, unless the site replaces them.
    """
    todo = [output]
    seen = {output}
    for value in todo:  # grows
        if value in copy.escaping or copy.is_overwritten(value):
            return True
        for node, _ in copy.readers_of.get(value, ()):
            result = copy.value_of.get(node)
            if result is None or result is value or node not in copy.pure:
                return True  # reads sizes, aliases or writes
            if result in seen or _computes(result, site) or _goes_away(result, site, copy):
                continue
            if result.op is aten._softmax.default:
                continue  # its result is contiguous for any input
            if value not in result.operands or not _keeps_place(result):
                return True
            seen.add(result)
            todo.append(result)
    return False


def _keeps_place(value: Value) -> bool:
    return value.op in POINTWISE or value.op in REDUCTIONS or is_other_pointwise(value)


def _computes(result: Value, site: Site) -> bool:
    """Whether the site replaces the node of a result, or what that is a view of."""
    while is_view(result):
        result = result.source
    return result in site.replaces


def _goes_away(view: Value, site: Site, copy: CanonicalCopy) -> bool:
    """Whether it is a view that only the site reads."""
    if not is_view(view):
        return False
    results = [copy.value_of.get(node) for node, _ in copy.readers_of.get(view, ())]
    return all(
        result is not None
        and result is not view
        and (_computes(result, site) or _goes_away(result, site, copy))
        for result in results
    )
