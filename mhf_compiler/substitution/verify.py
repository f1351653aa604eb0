"""Option ``verify``: a site is compared with the original spelling before it is accepted.

The region of the site is cut out, and so is what the editor would write in its place. Both are
functions of the tensors that the op's arguments are read from. They run on the device of the site,
on random numbers and on numbers that are extreme, and may differ by rounding alone, in results and
in gradients (debug/accuracy.py). This is the check of everything but the edit around the site,
which the guard checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..compat import no_fake_mode
from ..debug.accuracy import Difference, compare, seed_generators
from ..debug.extract import Given, Sizes, Spelling
from ..patterns import COPY, STACK, CanonicalCopy, Site, Value
from .emit import Editor

_LARGE, _TINY = 1e4, 1e-6  # factors of the random numbers

# Of the error that is allowed. Where few numbers are summed, plain PyTorch's roundings may cancel
# in one draw, and ours then seem large: what is wrong is so in other draws as well.
_BY_CHANCE = 2


class VerificationError(RuntimeError):
    """Under ``strict``: a site does not compute what the original spelling computes."""


def disagreement(gm: fx.GraphModule, site: Site, copy: CanonicalCopy) -> str | None:
    """In what a site differs from its original spelling; None if in nothing but rounding.

    It runs both several times in the dtype of the model and once in float64, and needs that memory.

    Args:
        gm: the graph in which the site was found. Dynamic sizes are those of its example; sizes
            that depend on data are small samples.
        site: the site.
        copy: what the graph computes.
    """
    sizes = Sizes(gm)
    original = Spelling(site, dict.fromkeys(arguments(site), ""), sizes)
    replaced = replacement(site, copy, original.inputs, sizes)
    training = site.output.requires_grad_mode
    devices = [site.device] if site.device.type == "cuda" else []
    with (
        no_fake_mode(),
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.set_grad_enabled(training),
        torch.autocast(site.device.type, enabled=False),
    ):
        for name, draw in _samples(original.given, training):
            disagreeing = partial(_disagreeing, original, replaced, draw)
            found = disagreeing(0)
            clear = [x for x in found if not x.error <= _BY_CHANCE * x.allowed]
            if clear or (found and any(map(disagreeing, (1, 2)))):
                return f"with {name}, {(clear or found)[0]}"
    return None


def _disagreeing(
    original: Callable[..., Any],
    replaced: Callable[..., Any],
    draw: Callable[[], list[Tensor]],
    seed: int,
) -> list[Difference]:
    """In what the two differ by more than rounding on inputs that are drawn with a seed."""
    seed_generators(seed)
    inputs = draw()
    finite = all(bool(x.isfinite().all()) for x in inputs)
    found = compare(original, replaced, inputs, overflows=not finite)
    return [difference for difference in found if not difference.agrees]


def arguments(site: Site) -> list[Value]:
    """The tensors of the graph that the op's arguments are read from."""
    return [value for view in site.views().values() for value in _unstacked(view.value)]


def _unstacked(value: Value) -> Iterator[Value]:
    if value.op == STACK:
        for part in value.args:
            yield from _unstacked(part)
    else:
        yield value


# What would be written.


def replacement(
    site: Site, copy: CanonicalCopy, inputs: Sequence[Value], sizes: Sizes
) -> Callable[..., Tensor]:
    """What is written in a site's place, as a function of the tensors in ``inputs``."""
    graph = fx.Graph()
    given = {value: graph.placeholder(f"x{number}") for number, value in enumerate(inputs)}
    graph.output(_Alone(graph, copy, site, given, sizes).insert())
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


class _Alone(Editor):
    """Writes a site into a graph of its own, where nothing but its arguments is given."""

    def __init__(
        self,
        graph: fx.Graph,
        copy: CanonicalCopy,
        site: Site,
        given: dict[Value, fx.Node],
        sizes: Sizes,
    ) -> None:
        super().__init__(graph, {site.output_node: [*given.values()][-1]}, copy, site, given)
        self.sizes = sizes

    def value(self, value: Value) -> fx.Node:
        if value in self.results:
            return self.results[value]
        if value.op == COPY:  # into a tensor of another dtype
            return self.call(torch.ops.aten.to.dtype, self.value(value.source), value.dtype)
        return self._recompute(value)

    def _held_view(self, value: Value) -> None:
        return None

    def _symbol(self, symbol: sympy.Symbol) -> int:  # type: ignore[override]
        known: int = self.sizes.known(symbol)
        return known

    def size(self, size: object) -> object:
        return self.sizes.known(size)


# What it is tried on.


def _samples(
    given: Sequence[Given], training: bool
) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """What inputs are called, and how to draw them."""

    def filled(fill: Callable[[Tensor], Tensor]) -> list[Tensor]:
        made = []
        for entry in given:
            tensor = entry.make().detach()
            if tensor.is_floating_point():
                tensor = fill(tensor).requires_grad_(training)
            made.append(tensor)
        return made

    def one_among(number: float) -> list[Tensor]:
        inputs = [x.detach() for x in filled(lambda x: x)]  # of gradients, there is no rule
        inputs[0] = _with_one(inputs[0], number)
        return inputs

    yield "random numbers", lambda: filled(lambda x: x)
    yield "zeros", lambda: filled(torch.zeros_like)
    yield "large numbers", lambda: filled(lambda x: x * _LARGE)
    yield "tiny numbers", lambda: filled(lambda x: x * _TINY)
    yield "an infinity among the queries", lambda: one_among(math.inf)
    yield "a NaN among the queries", lambda: one_among(math.nan)


def _with_one(tensor: Tensor, number: float) -> Tensor:
    """The same with a number at its first place."""
    if tensor.numel() and 0 not in tensor.stride():
        tensor[(0,) * tensor.dim()] = number
    return tensor
