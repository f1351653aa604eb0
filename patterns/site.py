"""A site: one MH-FFN that was found and proved, as the arguments of the op.

The site is the value that recognition passes to rewriting. Tensors are ``TensorView``: a value
of the graph, where it is read, and which axes make up each dimension of the op's argument. A
``RouterProduct`` is the same for what computes a site's router from widened queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .axes import Axis, Index, Size, product
from .canonical import Value
from .operations import holds
from .products import MATRIX_PRODUCTS

#: of biases with more digits than their network has
WIDE_BIAS = torch.float32


@dataclass(frozen=True)
class TensorView:
    """An argument of the op: ``argument[dims] = scale * value[index]``.

    Each entry of ``dims`` holds the axes of one dimension, outermost first. An axis that ``index``
    does not mention is broadcast.
    """

    value: Value
    index: Index
    dims: tuple[tuple[Axis, ...], ...]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape of the argument."""
        return tuple(product(axis.size for axis in dim) for dim in self.dims)


@dataclass(frozen=True)
class Location:
    """A line of the user's source.

    Attributes:
        file: its path.
        line: its number.
        function: the name of the function that it is in.
        code: its text.
    """

    file: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One MH-FFN: the op's arguments, and the value of the graph that it produces.

    Shapes of the views, with tokens (B, L), heads H in G groups that share weights, sub-networks E,
    hidden units f and head width d: query ``(B, L, H, d)``; gate, up, down ``(G, E, f, d)``;
    routers ``(B, L, H, E)``, to be multiplied with each other; gate_bias, up_bias ``(G, E, f)``;
    down_bias ``(G, E, d)``. The residual has the dimensions of the output; it is added after the
    op.
    """

    query: TensorView
    gate: TensorView
    up: TensorView | None
    down: TensorView
    routers: tuple[TensorView, ...]
    gate_bias: TensorView | None
    up_bias: TensorView | None
    down_bias: TensorView | None
    residual: TensorView | None

    activation: str
    gate_scale: float
    up_scale: float
    out_scale: float

    heads: int
    groups: int
    head_dim: int
    sub_networks: int
    hidden: int
    tokens: tuple[Size, Size]  # (B, L)
    dtype: torch.dtype  # of the projections
    out_dtype: torch.dtype
    device: torch.device

    output: Value
    output_node: fx.Node  # holds ``output``; the op takes its place
    output_dims: tuple[tuple[Axis, ...], ...]  # the output's dimensions over the op's axes
    pieces: tuple[Value, ...]  # parts of the output, concatenated or stacked, that are read apart
    location: Location | None
    replaces: frozenset[Value]  # what the graph computes and the op would compute itself

    @property
    def result_dims(self) -> tuple[tuple[Axis, ...], ...]:
        """The axes of the op's result, (B, L, H, d)."""
        return (*self.query.dims[:3], self.down.dims[-1])

    @property
    def gated(self) -> bool:
        """Whether there is an up projection."""
        return self.up is not None

    @property
    def routed(self) -> bool:
        """Whether sub-networks are weighted per token (the paper's R)."""
        return bool(self.routers)

    @property
    def products(self) -> int:
        """How many matrix products the graph computes that the op would compute itself."""
        return sum(value.op in MATRIX_PRODUCTS for value in self.replaces)

    def dtype_of_bias(self, bias: TensorView) -> torch.dtype:
        """The dtype in which the op reads a bias: the network's, if that has all of its digits."""
        return self.dtype if holds(self.dtype, bias.value.dtype) else WIDE_BIAS

    def views(self) -> dict[str, TensorView]:
        """The tensor arguments by role, without the absent ones."""
        named = {
            "query": self.query,
            "gate": self.gate,
            "up": self.up,
            "down": self.down,
            "gate_bias": self.gate_bias,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
            "residual": self.residual,
        }
        present = {role: view for role, view in named.items() if view is not None}
        return present | {f"router{i}": view for i, view in enumerate(self.routers)}


@dataclass(frozen=True, kw_only=True)
class RouterProduct:
    """A product in float32 of 16-bit queries and weights, from which a site's router is made.

    Shapes of the views: query ``(B, L, H, d)``; weight ``(G, d, E)``, with G heads or one. The bias
    has the dimensions of the output; it is added after the product. ``placed`` says whether what
    stays in the graph may depend on where in memory the output's elements lie.
    """

    query: TensorView
    weight: TensorView
    bias: TensorView | None
    output: Value
    output_node: fx.Node
    output_dims: tuple[tuple[Axis, ...], ...]
    placed: bool
    pieces: tuple[Value, ...] = ()

    @property
    def result_dims(self) -> tuple[tuple[Axis, ...], ...]:
        """The axes of the result, (B, L, H, E)."""
        return (*self.query.dims[:3], self.weight.dims[-1])

    def views(self) -> dict[str, TensorView]:
        """The tensor arguments by role, without the absent one."""
        named = {"query": self.query, "weight": self.weight, "bias": self.bias}
        return {role: view for role, view in named.items() if view is not None}
