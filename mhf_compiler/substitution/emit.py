"""One op with its arguments, written into a graph.

The arguments of the op are views of values that the graph has anyway. So what is inserted are view
operations, the op, and views of its result in the shape that the readers expect.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..compat import (
    BUCKET,
    FloorDiv,
    example_of,
    place_numbers,
    placed_alike,
    redistributed,
    unwrap_for_grad,
)
from ..patterns import (
    RESHAPES,
    STACK,
    Axis,
    CanonicalCopy,
    Kind,
    RouterProduct,
    Site,
    Size,
    TensorView,
    Value,
    all_pieces,
    at_most,
    modules_around,
    multiply,
    plus,
    quotient,
    stride_in_sizes,
)

aten = torch.ops.aten

_ALIGNED_TOKENS = 8  # 16 bytes of 16-bit numbers


class EditError(Exception):
    """A site cannot be written into the graph; the message says what is in the way.

    Attributes:
        kind: the reason that the site is declined for.
        site: which one it is.
    """

    def __init__(
        self,
        message: str,
        kind: Kind = Kind.UNSUPPORTED_LAYOUT,
        site: Site | RouterProduct | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.site = site


class Editor:
    """Inserts one site after the node that holds its output."""

    def __init__(
        self,
        graph: fx.Graph,
        nodes: dict[fx.Node, fx.Node],
        copy: CanonicalCopy,
        site: Site | RouterProduct,
        results: dict[Value, fx.Node],
    ) -> None:
        self.graph, self.nodes, self.copy, self.site = graph, nodes, copy, site
        self.results = results
        self.position = copy.positions[site.output_node]
        self.last = nodes[site.output_node]
        self.modules = modules_around(site)  # the output may be a view outside of them
        self.made: dict[Value, fx.Node] = {}
        self.inserted: list[fx.Node] = []

    def insert(self) -> fx.Node:
        """The op's result, with the shape and the strides of the value that it replaces."""
        return self._outside_levels(self._inserted())

    def _inserted(self) -> fx.Node:
        site = self.site
        if isinstance(site, RouterProduct) and not site.placed and _aligned_by_tokens(site):
            return self.router_product(site, [2, 3, 0, 1])  # as the kernels read a router best
        order = _order_that_keeps_strides(site)
        out_order = None if order in (None, (0, 1, 2, 3)) else list(order)
        if isinstance(site, Site):
            output = self.network(site, out_order)
        else:
            output = self.router_product(site, out_order)
        if order is None:
            output = self._with_strides(output, site.output)
        if self.copy.shares_what_is_returned(site.output):
            # Returned next to a view or a detached alias of it. AOTAutograd makes these again from
            # what they are views of, and fails where the output is a view itself.
            output = self.call(torch.clone, output)
        places = self._sum_of_parts()
        return output if places is None else self.call(redistributed, output, places)

    def _sum_of_parts(self) -> tuple[Any, ...] | None:
        """How the original places what it adds up from all devices; None where it does not.

        Of cut sub-networks or hidden units, each device has a part of the sums over them. They may
        be added up within what the op replaces.
        """
        places = place_numbers(example_of(self.site.output_node))
        if not isinstance(self.site, Site) or not places or "sum" in places:
            return None
        replaced = (example_of(value.origin) for value in self.site.replaces)
        return places if any("sum" in (place_numbers(x) or ()) for x in replaced) else None

    def network(self, site: Site, out_order: list[int] | None) -> fx.Node:
        query = self.argument(site.query)
        gate, down = self.argument(site.gate), self.argument(site.down)
        up = self.optional(site.up)
        router = self.router(site)
        biases = [
            self.optional(view, None if view is None else site.dtype_of_bias(view))
            for view in (site.gate_bias, site.up_bias, site.down_bias)
        ]
        if self._sum_of_parts() is not None:  # and so is the query's gradient
            query = self.call(placed_alike, query)
        result = self.call(
            torch.ops.mhf_compiler.multi_head_ffn.default,
            *(query, gate, up, down, router, *biases),
            activation=site.activation,
            k_scale=site.gate_scale,
            u_scale=site.up_scale,
            out_scale=site.out_scale,
            out_order=out_order,
            out_dtype=None if site.out_dtype is site.dtype else site.out_dtype,
        )
        output = self.output(result)
        if site.residual is not None:
            residual = self.argument(site.residual)
            if site.residual.scale != 1.0:
                residual = self.call(operator.mul, residual, site.residual.scale)
            output = self.call(operator.add, output, residual)
        return output

    def router_product(self, site: RouterProduct, out_order: list[int] | None) -> fx.Node:
        result = self.call(
            torch.ops.mhf_compiler.router_product.default,
            self.argument(site.query),
            self.argument(site.weight),
            out_order=out_order,
        )
        output = self.output(result)
        if site.bias is not None:
            output = self.call(operator.add, output, self.argument(site.bias))
        return output

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function of PyTorch's.

        Not of a method: the check of AOTAutograd's cache would ask what it is a method of.
        """
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(target, args, kwargs)
        for key in ("stack_trace", BUCKET):
            if key in self.site.output_node.meta:
                self.last.meta[key] = self.site.output_node.meta[key]
        if self.modules:
            self.last.meta["nn_module_stack"] = self.modules
        self.inserted.append(self.last)
        return self.last

    # Arguments.

    def optional(self, view: TensorView | None, dtype: torch.dtype | None = None) -> fx.Node | None:
        if view is None:
            return None
        node = self.argument(view)
        if dtype is not None and view.value.dtype is not dtype:
            node = self.call(aten.to.dtype, node, dtype)
        if view.scale != 1.0:
            node = self.call(operator.mul, node, view.scale)
        return node

    def router(self, site: Site) -> fx.Node | None:
        routers = [self.argument(view) for view in site.routers]
        if (
            len(routers) > 1
        ):  # their product may leave the range of 16 bits where the output does not
            narrow = torch.bfloat16, torch.float16
            routers = [
                self.call(aten.to.dtype, node, torch.float32)
                if view.value.dtype in narrow
                else node
                for node, view in zip(routers, site.routers, strict=True)
            ]
        product_ = routers[0] if routers else None
        for other in routers[1:]:
            product_ = self.call(operator.mul, product_, other)
        return product_

    def value(self, value: Value) -> fx.Node:
        """A node that holds the value where the op stands; it is recomputed if there is none."""
        if value in self.results:
            return self.results[value]
        holder = self.copy.holder_at(value, self.position)
        if holder is not None:
            return self.nodes[holder]
        if value not in self.made:
            self.made[value] = self._recompute(value)
        return self.made[value]

    def _recompute(self, value: Value) -> fx.Node:
        if value.op == STACK:
            return self.stacked(value)
        held = self._held_view(value)
        if held is not None:
            return self.call(torch.reshape, held, [self.size(size) for size in value.shape])
        if isinstance(value.op, str):
            raise EditError(f"no node holds {value}")
        args, kwargs = self._plain(value.args), self._plain(value.kwargs)
        node = self.call(value.op, *args, **kwargs)
        return node if value.item is None else self.call(operator.getitem, node, value.item)

    def _held_view(self, value: Value) -> fx.Node | None:
        """A node that holds a reshape of it: of a linear layer's product, that alone is held."""
        for view in value.readers:
            alike = view.op in RESHAPES and view.requires_grad_mode is value.requires_grad_mode
            holder = self.copy.holder_at(view, self.position) if alike else None
            if holder is not None:
                return self.nodes[holder]
        return None

    def stacked(self, value: Value) -> fx.Node:
        """Tensors of the graph in one, such as the weights of several modules."""
        return self.call(torch.stack, [self.value(part) for part in value.args])

    def _plain(self, tree: Any) -> Any:
        if isinstance(tree, Value):
            return self.value(tree)
        if isinstance(tree, dict):
            return {key: self._plain(part) for key, part in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._plain(part) for part in tree)
        return self.size(tree) if isinstance(tree, sympy.Expr) else tree

    def argument(self, view: TensorView) -> fx.Node:
        """The view operations that turn its value into ``view``."""
        node = self.value(view.value)
        groups = _groups(view.dims)
        axes: list[Axis] = []
        for dim in reversed(range(len(view.index))):
            node, found = self._digits(node, view, dim)
            axes = found + axes
        outermost = _outermost(view)
        if outermost in axes:
            for one in _place_ones(groups):
                position = axes.index(outermost)
                node = self.call(torch.unsqueeze, node, position)
                axes.insert(position, one)
        wanted = [axis for group in groups for axis in group]
        present = [axis for axis in wanted if axis in axes]
        if len(present) != len(axes) or len(set(axes)) != len(axes):
            raise EditError("an argument is read along a diagonal")
        node = self._permute(node, [axes.index(axis) for axis in present])
        for position, axis in enumerate(wanted):
            if axis not in axes:
                node = self.call(torch.unsqueeze, node, position)
        if len(present) != len(wanted):
            sizes = [-1 if axis in axes else self.size(axis.size) for axis in wanted]
            node = self.call(torch.broadcast_to, node, sizes)
        return self._group(node, groups)

    def _digits(self, node: fx.Node, view: TensorView, dim: int) -> tuple[fx.Node, list[Axis]]:
        """Dimension ``dim`` of the value, split into the axes along which it is read."""
        form, size = view.index[dim].resolved(), view.value.shape[dim]
        terms = [(axis, step) for axis, step in form.terms if axis.size != 1]
        terms.sort(key=lambda term: _descending(term[1]))
        if not terms:
            return self.call(torch.select, node, dim, self.size(form.offset)), []
        axes = [axis for axis, _ in terms]
        if len(terms) == 1 and terms[0][1] == 1 and form.offset == 0 and axes[0].size == size:
            return node, axes
        offset, part = form.offset, _part(axes, [step for _, step in terms], form.offset, size)
        if part is not None:
            start, size = part
            offset -= start
            node = self.call(torch.narrow, node, dim, start, size)
        sizes = _sizes_of_digits(size, [step for _, step in terms])
        if sizes is None:
            return self._strided(node, dim, terms, offset, size), axes
        return self._split(node, dim, terms, offset, sizes), axes

    def _split(
        self,
        node: fx.Node,
        dim: int,
        terms: list[tuple[Axis, Size]],
        offset: Size,
        sizes: list[Size],
    ) -> fx.Node:
        """A dimension as several, one for each digit, narrowed to the part that is read."""
        if len(sizes) > 1:
            known = [s if isinstance(s, int) else None for s in sizes]
            node = self.call(torch.unflatten, node, dim, self._one_unknown(sizes, known))
        for position, (axis, step) in enumerate(terms):
            at: Size = 0
            if offset != 0:
                at, offset = divmod(offset, step)
            if not at_most(plus(at, axis.size), sizes[position]):
                raise EditError("an argument is read in overlapping parts")
            if at != 0 or axis.size != sizes[position]:
                where = (dim + position, self.size(at), self.size(axis.size))
                node = self.call(torch.narrow, node, *where)
        if len(sizes) > len(terms):  # something is skipped inside the innermost axis
            node = self.call(torch.select, node, dim + len(terms), self.size(offset))
        return node

    def _strided(
        self, node: fx.Node, dim: int, terms: list[Any], offset: Size, size: Size
    ) -> fx.Node:
        """One axis, read with a step that does not divide the dimension."""
        (axis, step), *others = terms
        end = plus(offset, plus(multiply(step, plus(axis.size, -1)), 1))
        if others or not isinstance(step, int) or not at_most(end, size):
            raise EditError("an argument is read at irregular distances")
        every = slice(self.size(offset), self.size(end), step)
        return self.call(operator.getitem, node, (*(slice(None),) * dim, every))

    def _one_unknown(self, sizes: list[Size], known: list[int | None]) -> tuple[Any, ...]:
        """Sizes for ``unflatten``, which can infer one symbolic size."""
        unknown = known.count(None)
        if unknown <= 1:
            return tuple(-1 if size is None else size for size in known)
        return tuple(self.size(size) for size in sizes)

    # The result.

    def output(self, node: fx.Node) -> fx.Node:
        """The op's four dimensions, in the shape of the value that it replaces."""
        site = self.site
        inner, groups = _groups(site.result_dims), _groups(site.output_dims)
        for dim in reversed(range(4)):
            if not inner[dim]:
                # Not a selection, whose gradient would be copied into a tensor of zeros.
                node = self.call(torch.squeeze, node, dim)
            elif len(inner[dim]) > 1:
                sizes = [axis.size for axis in inner[dim]]
                known = [size if isinstance(size, int) else None for size in sizes]
                node = self.call(torch.unflatten, node, dim, self._one_unknown(sizes, known))
        have = [axis for dim in inner for axis in dim]
        want = [axis for group in groups for axis in group]
        node = self._permute(node, [have.index(axis) for axis in want])
        return self._group(node, groups)

    def piece(self, output: fx.Node, piece: Value) -> fx.Node:
        """One of the values that the output concatenates, in a storage of its own."""
        merge = self.site.output
        dim = merge.argument(1, "dim", 0) % len(merge.shape)
        start = self.size(all_pieces(merge)[piece])
        if merge.op is torch.ops.aten.stack.default:
            node = self.call(torch.select, output, dim, start)
        else:
            node = self.call(torch.narrow, output, dim, start, self.size(piece.shape[dim]))
        order = piece.memory_order()
        if order is None:
            raise EditError("the strides of a head's output cannot be kept")
        node = self._permute(node, list(order))
        node = self.call(torch.clone, node, memory_format=torch.contiguous_format)
        node = self._permute(node, [order.index(dim) for dim in range(len(order))])
        return self._outside_levels(node)

    def copied(self, result: fx.Node) -> fx.Node:
        """A result once more, in a storage of its own."""
        return self._outside_levels(self.call(torch.clone, result))

    def _outside_levels(self, node: fx.Node) -> fx.Node:
        """What is computed inside of ``torch.func.grad``, as those outside see it.

        The values that nodes hold are those outside, the arguments of the op and what it replaces.
        """
        for level in reversed(self.copy.levels.get(self.site.output_node) or ()):
            node = self.call(unwrap_for_grad, node, level)
        return node

    def _with_strides(self, node: fx.Node, like: Value) -> fx.Node:
        """A copy with the strides of the replaced value: readers may depend on them."""
        order = like.memory_order()
        if order is None:
            raise EditError("the output's strides cannot be kept")
        node = self._permute(node, list(order))
        node = self.call(aten.contiguous.default, node)
        return self._permute(node, [order.index(dim) for dim in range(len(order))])

    # Small steps.

    def _permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        return node if order == sorted(order) else self.call(torch.permute, node, order)

    def _group(self, node: fx.Node, groups: list[list[Axis]]) -> fx.Node:
        """One dimension for each group of axes; a dimension of one for an empty group."""
        position = sum(map(len, groups))
        for count in map(len, reversed(groups)):
            position -= count
            if count == 0:
                node = self.call(torch.unsqueeze, node, position)
            elif count > 1:
                node = self.call(torch.flatten, node, position, position + count - 1)
        return node

    def size(self, size: Size) -> Any:
        """A size as an int, or as a node that computes it."""
        if isinstance(size, int):
            return size
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            return self._symbol(size)
        if size.is_Mul or size.is_Add:
            function = operator.mul if size.is_Mul else operator.add
            total, *rest = [self.size(part) for part in size.args]
            for part in rest:
                total = self.call(function, total, part)
            return total
        if isinstance(size, FloorDiv):
            return self.call(operator.floordiv, *map(self.size, size.args))
        raise EditError(f"the size {size} is not known in the graph")

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        for value, holder in self.copy.sized_at(self.position):
            if symbol in value.shape:
                return self.call(aten.sym_size.int, self.nodes[holder], value.shape.index(symbol))
        raise EditError(f"the size {symbol} is not known in the graph")


def _descending(step: Size) -> tuple[int, int]:
    """Sort key: a symbolic step is a product with the inner sizes, so it comes first."""
    return (1, -step) if isinstance(step, int) else (0, -len(sympy.Mul.make_args(step)))


def _sizes_of_digits(size: Size, steps: list[Size]) -> list[Size] | None:
    """The sizes of the parts into which steps divide a dimension; None where they do not."""
    inner = [] if steps[-1] == 1 else [1]
    sizes: list[Size] = []
    for outer, step in itertools.pairwise([size, *steps, *inner]):
        digit = quotient(outer, step)
        if digit is None:
            return None
        sizes.append(digit)
    return sizes


def _groups(dims: Sequence[Sequence[Axis]]) -> list[list[Axis]]:
    """The axes of each dimension that have several elements, outermost first."""
    return [[axis for axis in dim if axis.size != 1] for dim in dims]


def _place_ones(groups: list[list[Axis]]) -> list[Axis]:
    """New axes of one element in the groups that are empty."""
    ones = []
    for group in groups:
        if not group:
            group.append(Axis(1))
            ones += group
    return ones


def _outermost(view: TensorView) -> Axis | None:
    """The axis with the largest stride, where sizes are symbols and dimensions of one are added.

    Only next to it such a dimension gets the stride that Inductor gives it in a tensor with the
    same order of strides. If a tensor that is saved for the backward graph got other strides than
    the fake one has, AOTAutograd would take them, and so the symbols, for constants.
    """
    if all(isinstance(size, int) for size in view.value.shape):
        return None
    for dim in view.value.memory_order() or ():
        form = view.index[dim].resolved()
        axes = [(step, axis) for axis, step in form.terms if axis.size != 1]
        if axes:
            return min(axes, key=lambda pair: _descending(pair[0]))[1]
    return None


def _aligned_by_tokens(site: RouterProduct) -> bool:
    """Whether rows of tokens, one for each head and sub-network, all begin at aligned addresses.

    A router that all heads share counts heads as tokens, too.
    """
    batch, length, heads = site.query.shape[:3]
    row = batch if length == 1 else length
    return heads != 1 and isinstance(row, int) and row % _ALIGNED_TOKENS == 0


def _order_that_keeps_strides(site: Site | RouterProduct) -> tuple[int, ...] | None:
    """The ``out_order`` that gives the output the strides of the replaced value."""
    return next((o for o in itertools.permutations(range(4)) if _keeps_strides(site, o)), None)


def _keeps_strides(site: Site | RouterProduct, order: tuple[int, ...]) -> bool:
    dims = site.result_dims
    stride_of: dict[Axis, Size] = {}
    step: Size = 1
    for dim in reversed(order):
        for axis in reversed(dims[dim]):
            stride_of[axis] = step
            step = multiply(step, axis.size)
    value = site.output
    strides = (stride_in_sizes(stride, value.shape) for stride in value.strides)
    for dim_axes, size, stride in zip(site.output_dims, value.shape, strides, strict=True):
        axes = [axis for axis in dim_axes if axis.size != 1]
        if size == 1:
            continue
        if stride_of[axes[-1]] != stride:
            return False
        for outer, inner in itertools.pairwise(axes):
            if stride_of[outer] != multiply(stride_of[inner], inner.size):
                return False
    return True


def _part(axes: list[Axis], steps: list[Size], offset: Size, size: Size) -> tuple[int, int] | None:
    """Start and width of the part of a dimension that several axes read, where it must be cut out.

    They need not begin at a multiple of their steps: weights lie in a flat vector at any offset.
    """
    outer, inner = steps[0], steps[-1]
    if not isinstance(size, int):
        return _dense_part(axes, steps, offset)
    known = isinstance(outer, int) and isinstance(inner, int) and isinstance(axes[0].size, int)
    if not known or len(axes) < 2 or not isinstance(offset, int) or not isinstance(size, int):
        return None
    start, width = offset - offset % inner, outer * axes[0].size
    regular = offset % outer < inner and size % outer == 0
    return None if regular or start + width > size else (start, width)


def _dense_part(axes: list[Axis], steps: list[Size], offset: Size) -> tuple[int, int] | None:
    """The part of a symbolic dimension that several axes read without gaps, if that is fixed.

    The dimension is long enough: the model reads the last element of the part.
    """
    width: Size = 1
    for axis, step in zip(reversed(axes), reversed(steps), strict=True):
        if step != width:
            return None
        width = multiply(width, axis.size)
    return (offset, width) if isinstance(width, int) and isinstance(offset, int) else None
