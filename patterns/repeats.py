"""Repeated computations: the operations of one node are copied for equal nodes, not run again.

A tower computes the same for every layer, and a loop for every sub-network: ``einsum`` of the same
equation over tensors of the same shapes decomposes into the same ATen operations each time. Running
a decomposition on fake tensors is most of what a canonical copy costs, so it is run for the first
of such nodes; for the others the copy takes the operations from there, over what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mhf_compiler.compat import FakeTensor, has_symbols, storage_identity, symbolic_size

from .axes import Size

_UNDECLARED_WRITES = frozenset(
    {
        torch.ops.aten.native_batch_norm.default,
        torch.ops.aten.cudnn_batch_norm.default,
        torch.ops.aten.miopen_batch_norm.default,
    }
)


@dataclass(eq=False, frozen=True, slots=True)
class Like:
    """A stand-in for a tensor that does not exist, compared by identity."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[Size, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        """A stand-in for a tensor of static sizes."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, tuple(tensor.stride()))


@dataclass(frozen=True, slots=True)
class Call:
    """One ATen operation with its arguments and its result, or its results."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def undeclared_writes(self) -> list[Any]:
        """The tensors that the operation writes although its schema does not say so."""
        if self.func not in _UNDECLARED_WRITES:
            return []
        names = [argument.name for argument in self.func._schema.arguments]
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        written = [given.get(name) for name in ("running_mean", "running_var")]
        training = given.get("training", given.get("use_input_stats"))
        return [tensor for tensor in written if tensor is not None] if training else []

    def mapped(self, function: Callable[[Any], Any]) -> Call:
        """The call with other tensors."""
        args, kwargs = map_tensors(function, self.args), map_tensors(function, self.kwargs)
        return Call(self.func, args, kwargs, map_tensors(function, self.result))


@dataclass(frozen=True, slots=True)
class Program:
    """The operations of one node over stand-ins, for nodes with the same key."""

    calls: tuple[Call, ...]
    inputs: tuple[Like, ...]
    result: Like
    offset: int | None = None  # of a result in the memory of the inputs, which are one tensor

    def over(self, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Iterator[Call]:
        """The calls on other inputs; what they make last is ``result``, the rest new stand-ins."""
        known: dict[Like, Any] = dict(zip(self.inputs, inputs, strict=True))
        known[self.result] = result

        def other(like: Like) -> Any:
            if like not in known:
                known[like] = Like(like.shape, like.dtype, like.device, like.strides)
            return known[like]

        for call in self.calls:
            yield call.mapped(other)


def key_of(node: fx.Node, args: Any, kwargs: Any) -> Hashable | None:
    """Equal for nodes that do the same; None if that is not known.

    An operation of PyTorch decomposes by its constants, by what its tensors look like and which of
    them are one tensor, and by the modes it runs under; never by the numbers in them.
    """
    if node.op != "call_method" and not (node.op == "call_function" and _is_torch(node.target)):
        return None
    tensors = tensors_in((args, kwargs))
    if not tensors or not all(isinstance(x, FakeTensor) for x in tensors):
        return None
    if has_symbols(args) or has_symbols(tuple(kwargs.values())):
        return None
    first = {id(x): place for place, x in reversed(list(enumerate(tensors)))}

    def look(x: torch.Tensor) -> tuple[Any, ...]:
        flags = x.is_conj(), x.is_neg(), x.requires_grad
        place = x.storage_offset(), x.device, first[id(x)]
        return (tuple(x.shape), x.stride(), x.dtype, *place, *flags)

    modes = torch.is_grad_enabled(), *map(autocast_dtype, ("cpu", "cuda"))
    return (node.target, frozen(map_tensors(look, args)), frozen(map_tensors(look, kwargs)), modes)


def program(calls: Sequence[Call], arguments: Any, result: Any) -> Program | None:
    """The operations of a node, if they can be repeated: pure ones and views.

    The result is in new memory, or a view of the one tensor that the node reads.
    """
    if not isinstance(result, FakeTensor):
        return None
    inputs = tensors_in(arguments)
    known = {id(x) for x in inputs}
    if id(result) in known:
        return None
    is_view = storage_identity(result) in {storage_identity(x) for x in inputs}
    if not (_shows_elements(result, inputs) if is_view else _fills_its_memory(result)):
        return None
    for call in calls:
        seeded = torch.Tag.nondeterministic_seeded in call.func.tags
        if seeded or call.func._schema.is_mutable or call.undeclared_writes():
            return None
        if any(id(x) not in known for x in tensors_in((call.args, call.kwargs))):
            return None  # a constant, whose number matters
        known.update(id(x) for x in tensors_in(call.result))
    if id(result) not in known:
        return None
    stand_ins: dict[int, Like] = {}

    def stand_in(tensor: torch.Tensor) -> Like:
        return stand_ins.setdefault(id(tensor), Like.of(tensor))

    return Program(
        tuple(call.mapped(stand_in) for call in calls),
        tuple(map(stand_in, inputs)),
        stand_in(result),
        int(result.storage_offset()) if is_view else None,
    )


def _is_torch(function: Any) -> bool:
    """Whether PyTorch defines a function. The model's own may do something else each time."""
    module = getattr(function, "__module__", None) or "torch"  # builtins may have none
    return module.partition(".")[0] in ("torch", "_operator")


def _shows_elements(view: torch.Tensor, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether a view of what a node reads is known by shape, strides and offset."""
    if len({id(x) for x in inputs}) != 1:
        return False  # of which of them it is a view, may not be the same for another node
    plain = not view.is_conj() and not view.is_neg() and not view.requires_grad
    return plain and view.dtype is inputs[0].dtype


def _fills_its_memory(x: torch.Tensor) -> bool:
    """Whether a new tensor of these strides has memory of the same size."""
    if x.numel() == 0:
        return False
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.untyped_storage().nbytes() == (last + 1) * x.element_size()


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to for a type of device, where it is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


# Trees of arguments.


def tensors_in(tree: Any) -> list[Any]:
    """The tensors and stand-ins in nested arguments, in order."""
    if isinstance(tree, (torch.Tensor, Like)):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]


def map_tensors(function: Any, tree: Any) -> Any:
    """The same nested arguments with ``function`` applied to each tensor and stand-in."""
    if isinstance(tree, (torch.Tensor, Like)):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, part) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_tensors(function, part) for part in tree])
    return tree


def frozen(tree: Any) -> Any:
    """A hashable form of an operator's arguments. Distinguishes 1 from 1.0 and True."""
    if type(tree) is int or tree is None:  # nearly all of them
        return tree
    if isinstance(tree, dict):
        return tuple((key, frozen(part)) for key, part in tree.items())
    if isinstance(tree, (list, tuple)):
        return tuple([frozen(part) for part in tree])
    if isinstance(tree, (torch.SymInt, torch.SymFloat)):
        return symbolic_size(tree)
    plain_number = isinstance(tree, (int, float, complex))
    return (type(tree), repr(tree)) if plain_number or not isinstance(tree, Hashable) else tree
