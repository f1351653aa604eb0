"""How the ops compute on shards: on the DTensors of `torch.distributed.tensor`.

An op computes on shards when every tensor that has one of some axes is cut along it and all others
are whole. The axes that are cut together are a *cut*:

    cut              cut along it       Partial sums
    B or L, tokens   q, r, out          gradients of weights and biases
    H with G, heads  all                none
    H where G = 1    q, r, out          gradients of weights and biases
    E, sub-networks  k, u, v, biases, r the network's out, and q's gradient
    f, hidden units  k, u, v, biases    out, and the gradients of q and r
    d of a router    q, weight          its out

A result without the axis of a cut has a part of its sum on each device, since every axis that a
result does not have is one that its definition sums over. There is one exception: `v_bias` is added
once, not once for each hidden unit, so that with one f is not cut.

Each dimension of a mesh has a cut of its own, or none. DTensor chooses the cheapest; arguments that
are placed otherwise are redistributed first. The ops that overwrite an argument are left out: they
are in graphs after autograd, which compute on local tensors.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from ..arguments import AXES

__all__ = ["know_dtensor", "shardings"]

#: of a placement: the dimension along which a tensor is cut, whole, or one part of a sum
Placement = int | str | None
Placements = Sequence[Placement]  # along each dimension of the mesh
WHOLE, PARTIAL = None, "sum"

_TOKENS = "BL"  # of which the last shards may have few, or none
_RAGGED = "Efd"  # of which a shard may have fewer than others


@dataclass(frozen=True)
class _Axes:
    """The axes of an op's tensors, a letter for each dimension, and its cuts.

    Attributes:
        arguments: of its leading arguments; there may be None in place of a tensor.
        result: of the result of the forward op.
        cuts: the axes that are cut together, other than those of heads.
        backward: whether it is the backward op. Its first argument is the gradient of the result,
            its last says which of the other arguments need one.
    """

    arguments: tuple[str, ...]
    result: str
    cuts: tuple[str, ...]
    backward: bool = False

    @property
    def all_arguments(self) -> tuple[str, ...]:
        return (self.result, *self.arguments) if self.backward else self.arguments

    def results(self, arguments: Sequence[Any]) -> list[str]:
        """The axes of the results of a call."""
        if not self.backward:
            return [self.result]
        return [axes for axes, needed in zip(self.arguments, arguments[-1], strict=True) if needed]


_NETWORK = _Axes(tuple(AXES.values()), AXES["q"], ("B", "L", "E", "f"))
_ROUTER = _Axes(("BLHd", "GdE"), "BLHE", ("B", "L", "E", "d"))

_OPS = {
    "multi_head_ffn": _NETWORK,
    "multi_head_ffn_backward": _Axes(
        _NETWORK.arguments, _NETWORK.result, _NETWORK.cuts, backward=True
    ),
    "router_product": _ROUTER,
    "router_product_backward": _Axes(
        _ROUTER.arguments, _ROUTER.result, _ROUTER.cuts, backward=True
    ),
}


def know_dtensor() -> None:
    """Tell DTensor how the ops are sharded, if the process uses it.

    To be called before an op is called with DTensors; costs nothing where there are none.
    """
    if "torch.distributed.tensor" in sys.modules:
        _register()


# What torch.compiler.assume_constant_result sets, but without importing Dynamo: it calls this
# function when it meets it, and puts nothing into its graph.
know_dtensor._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _register() -> None:
    try:
        from mhf_compiler.compat import register_shardings

        for name in _OPS:
            op = getattr(torch.ops.mhf_compiler, name).default
            register_shardings(op, partial(shardings, name))
    except (AttributeError, ImportError):
        return  # PyTorch lacks a private name: DTensor will say that it does not know the ops


def shardings(
    op: str, arguments: Sequence[Any], mesh: Sequence[int]
) -> Iterator[tuple[list[Placements], list[Placements]]]:
    """The ways in which a call computes on shards; the first needs whole tensors.

    Args:
        op: its name.
        arguments: of the call; tensors have a ``shape``.
        mesh: the number of devices along each dimension of the mesh.

    Yields:
        The placements along the mesh of each tensor argument that is not None, and of each result.
    """
    axes = _OPS[op]
    given = [
        (letters, argument.shape)
        for letters, argument in zip(axes.all_arguments, arguments, strict=False)
        if argument is not None
    ]
    sizes = {
        letter: size
        for letters, shape in given
        for letter, size in zip(letters, shape, strict=True)
    }
    cuts = ["", *axes.cuts, "HG"]
    if sizes["G"] == 1:
        cuts.append("H")
    if any(letters == AXES["v_bias"] for letters, _ in given):
        cuts.remove("f")
    results = axes.results(arguments)
    for chosen in product(cuts, repeat=len(mesh)):
        if _leaves_work_for_all(chosen, sizes, mesh):
            yield (
                [[_place(cut, letters, WHOLE) for cut in chosen] for letters, _ in given],
                [[_place(cut, letters, PARTIAL) for cut in chosen] for letters in results],
            )


def _place(cut: str, letters: str, otherwise: Placement) -> Placement:
    """How a tensor is placed along a dimension of the mesh."""
    if not cut:
        return WHOLE
    return next((letters.index(letter) for letter in cut if letter in letters), otherwise)


def _leaves_work_for_all(chosen: Sequence[str], sizes: dict[str, int], mesh: Sequence[int]) -> bool:
    """Whether no shard is empty, and the shards of heads are those of their groups.

    A tensor is cut into pieces of equal size, but for the last; pieces are cut in the same way
    along the next dimension of the mesh.
    """
    for letter in set("".join(chosen)):
        counts = [count for cut, count in zip(chosen, mesh, strict=True) if letter in cut]
        size, shards = sizes[letter], math.prod(counts)
        if letter in _TOKENS:
            works = size >= shards
        elif letter in _RAGGED and shards == max(counts):
            works = size > (shards - 1) * -(-size // shards)
        else:
            works = size % shards == 0
        if not works:
            return False
    return True
