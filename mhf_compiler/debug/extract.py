"""One site as a program of its own, as the model spells it.

It computes the site's output from the tensors that the op's arguments are read from. It is built
from the values that recognition read, so autocast, ``vmap``, ``no_grad`` and in-place writes have
already become ATen operations, which autograd differentiates as it would differentiate the model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Set
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..compat import FakeTensorMode, example_of, make_fx, size_hint, symbolic_size, unbacked_symbols
from ..patterns import COPY, OPAQUE, SCATTER, Site, Value, is_cast, is_factory, uncast
from ..report.describe import boundary, name_of
from .accuracy import tensors_of

_SAMPLE = 6  # for a size that depends on data


@dataclass(frozen=True)
class Given:
    """Specification of one input of an extracted site.

    Attributes:
        name: its letter in the formula, then the model's name for it.
        shape: of the example.
        stride: of the example.
        dtype: of the example.
        device: of the example.
        requires_grad: whether the model trains it.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def make(self) -> Tensor:
        """Small random numbers, or zeros for integers."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        # Of an expanded tensor one element stands for all along a dimension.
        own = made[tuple(slice(0, 1) if step == 0 else slice(None) for step in self.stride)]
        if not made.is_floating_point():
            own.zero_()
            return made
        own.normal_(std=0.3)
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Part:
    """One site by itself.

    Attributes:
        spelling: computes the output of the site, a tensor, from its arguments.
        given: the arguments.
    """

    spelling: fx.GraphModule
    given: tuple[Given, ...]


def cut(gm: fx.GraphModule, site: Site) -> Part:
    """Extract a site. Dynamic sizes become those of the example.

    Args:
        gm: the graph in which the site was found, also after it was rewritten.
        site: the site.
    """
    spelling = Spelling(site, boundary(site), Sizes(gm))
    with FakeTensorMode(), torch.no_grad():
        made = make_fx(spelling)(*(entry.make() for entry in spelling.given))
        return Part(made, spelling.given)


class Spelling:
    """A site as the model spells it, as a function of the tensors that it is computed from.

    Attributes:
        inputs: the values that it is a function of.
        given: their specifications.
    """

    def __init__(self, site: Site, letters: dict[Value, str], sizes: Sizes) -> None:
        """``letters`` are the values where the site begins, each with its letter in the formula."""
        self._output, self._sizes = site.output, sizes
        computed = set(_closure(site.output, lambda value: True))
        letters = {_in_the_graph(value, computed): letter for value, letter in letters.items()}
        self.inputs, self._computed = _between(site.output, letters)
        others = {uncast(value) for value in self.inputs if value not in letters}
        if any(uncast(value) in others for value in letters):  # a query is cast more than once
            sources = {value: uncast(value) for value in letters}
            letters = {sources[v] if sources[v] in others else v: letters[v] for v in letters}
            self.inputs, self._computed = _between(site.output, letters)
        self.given = tuple(_given(value, letters.get(value), sizes) for value in self.inputs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        inside = frozenset(self._computed)
        known = dict(zip(self.inputs, tensors, strict=True))
        for value in self._computed:
            result = _compute(value, known, self._sizes, in_place=_is_last_reader(value, inside))
            # An in-place write casts to the dtype of its target.
            known[value] = result if result.dtype is value.dtype else result.to(value.dtype)
        return known[self._output]


def _in_the_graph(value: Value, computed: Container[Value]) -> Value:
    """A value, or what it is cast from if the model casts only views or parts of that."""
    while value not in computed and is_cast(value):
        value = value.source
    return value


def _between(output: Value, letters: dict[Value, str]) -> tuple[list[Value], list[Value]]:
    """The inputs, in the order of the formula, and the computed values, in order of execution.

    Inputs are the arguments, and values that do not depend on them unless they are constants.
    """
    reached = set(letters)
    for value in _closure(output, lambda value: value not in letters):
        if not reached.isdisjoint(value.operands):
            reached.add(value)

    def is_computed(value: Value) -> bool:
        return value not in letters and (value in reached or _is_constant(value))

    found = _closure(output, is_computed)
    order = list(letters)
    inputs = [value for value in found if not is_computed(value)]
    inputs.sort(key=lambda value: order.index(value) if value in letters else len(order))
    return inputs, [value for value in found if is_computed(value)]


def _is_constant(value: Value) -> bool:
    """Whether a value is computed from nothing but what factories create."""
    seen: set[Value] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if one not in seen and not is_factory(one):
            drawn = torch.Tag.nondeterministic_seeded in getattr(one.op, "tags", ())
            if not one.operands or one.op == OPAQUE or drawn:
                return False
            seen.add(one)
            todo += one.operands
    return True


def _closure(output: Value, enters: Callable[[Value], bool]) -> list[Value]:
    """The output and all values that it depends on, in order of execution."""
    found: set[Value] = set()
    todo = [output]
    while todo:
        value = todo.pop()
        if value not in found:
            found.add(value)
            todo += value.operands if enters(value) else ()
    return sorted(found, key=lambda value: value.step)


def _given(value: Value, letter: str | None, sizes: Sizes) -> Given:
    name = name_of(value)
    example = example_of(value.origin)
    return Given(
        name=name if letter is None else f"{letter} ({name})",
        shape=sizes.known(value.shape),
        stride=sizes.known(value.strides),
        dtype=value.dtype,
        device=value.device,
        requires_grad=any(x.requires_grad for x in tensors_of(example)),
    )


def _is_last_reader(value: Value, computed: Set[Value]) -> bool:
    """Whether a write may be done in place: nothing else reads the old contents."""
    if value.op != SCATTER or value.source not in computed:
        return False
    return all(reader is value or reader not in computed for reader in value.source.readers)


def _compute(value: Value, known: dict[Value, Tensor], sizes: Sizes, in_place: bool) -> Tensor:
    def concrete(tree: Any) -> Any:
        if isinstance(tree, Value):
            return known[tree]
        if isinstance(tree, dict):
            return {key: concrete(part) for key, part in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(map(concrete, tree))
        return sizes.known(tree)

    args, kwargs = concrete(value.args), concrete(value.kwargs)
    if value.op == COPY:
        return args[0].to(value.dtype).expand(sizes.known(value.shape)).clone()
    if value.op == SCATTER:
        base, part = args
        whole = shown = base if in_place else base.clone()
        for step in value.chain:
            shown = step.op(shown, *concrete(step.args), **concrete(step.kwargs))
            shown = shown if step.item is None else shown[step.item]
        shown.copy_(part)
        return whole
    result = value.op(*args, **kwargs)
    return result if value.item is None else result[value.item]


class Sizes:
    """Numbers for dynamic sizes: those of the example; a sample for what depends on data."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.hints: dict[sympy.Expr, int] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            example = example_of(node)
            shapes = [x.shape for x in tensors_of(example)]
            for size in (example, *(size for shape in shapes for size in shape)):
                if isinstance(size, torch.SymInt):
                    self._learn(size)

    def _learn(self, size: torch.SymInt) -> None:
        if not unbacked_symbols(size):
            self.hints[symbolic_size(size)] = size_hint(size)

    def known(self, tree: Any) -> Any:
        """The same, with a number for each size."""
        if isinstance(tree, (list, tuple)):
            return type(tree)(map(self.known, tree))
        if isinstance(tree, (torch.SymInt, torch.SymFloat)):
            return self._number(tree.node.expr) if unbacked_symbols(tree) else size_hint(tree)
        return self._number(tree) if isinstance(tree, sympy.Expr) else tree

    def _number(self, size: sympy.Expr) -> int:
        known = size.subs(self.hints)
        return int(known.subs(dict.fromkeys(known.free_symbols, _SAMPLE)))
