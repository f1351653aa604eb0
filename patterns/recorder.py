"""The recorder: writes down a value for every ATen operation that runs.

It is a dispatch mode below autograd and functorch, so composite operations arrive decomposed and
``vmap`` arrives batched. What an operation does decides what is written down:

    pure            y = mm(a, b)         the value of each result
    view            y = a[0]             the value, and where its tensor lies in memory
    view in place   a.t_()               another view for the same tensor
    write           a.add_(b)            the value of ``add``, as the new value of a's storage
                    mm(a, b, out=y)      the value of ``mm``, as the new value of y's storage
    unknown write   f([y, z])            an opaque value for y, and for z
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch

from mhf_compiler.compat import TorchDispatchMode

from .canonical import COPY, UntraceableGraph, Value
from .memory import Memory
from .numbering import ValueNumbering, sizes_of
from .parts import ViewStep
from .reasons import Unreadable
from .repeats import Call, Like, map_tensors, tensors_in
from .views import is_factory

#: ``a + value * b * c`` -> the sum of ``a`` and the product
_PRODUCTS_ADDED = {
    torch.ops.aten.addcmul.default: torch.ops.aten.add.Tensor,
    torch.ops.aten.addcmul_.default: torch.ops.aten.add_.Tensor,
}

#: views in place whose functional form has another overload's name
_OTHERWISE_NAMED = {torch.ops.aten.transpose_.default: torch.ops.aten.transpose.int}

_CAT = torch.ops.aten.cat.default

#: what gives a tensor other memory
_SWAPS = frozenset(
    getattr(packet, name)
    for packet in (torch.ops.aten.set_, torch.ops.aten.resize_)
    for name in packet.overloads()
)


class _Traits(NamedTuple):
    """What the schema of an operation says of it."""

    turns: bool  # a tensor into another view of its memory, or gives it other memory
    writes: bool
    views: bool
    draws: bool  # random numbers


@cache
def _traits(func: Any) -> _Traits:
    schema = func._schema
    return _Traits(
        turns=torch.Tag.inplace_view in func.tags,
        writes=schema.is_mutable,
        views=any(result.alias_info is not None for result in schema.returns),
        draws=torch.Tag.nondeterministic_seeded in func.tags,
    )


class Recorder(TorchDispatchMode):
    """Sees every ATen operation of the node that runs.

    Attributes:
        calls: the operations of this node so far.
        has_effects: whether one of them did more than compute its result.
        is_broken: whether it was the recorder itself that failed.
    """

    def __init__(self, values: ValueNumbering, memory: Memory) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.has_effects = False
        self.is_broken = False
        self._values = values
        self._memory = memory

    def begin_node(self) -> None:
        """Another node is about to run."""
        self.calls.clear()
        self.has_effects = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        result = func(*args, **kwargs)
        if func.namespace != "prim":  # other questions about a tensor
            for call in _taken_apart(_without_empty_pieces(Call(func, args, kwargs, result))):
                self.calls.append(call)
                self.is_broken = True
                self.record(call)
                self.is_broken = False
        return result

    def record(self, call: Call) -> None:
        """Write down one operation that has run, or that stands for one.

        Raises:
            UntraceableGraph: it changes a tensor in a way that is not followed.
        """
        traits = _traits(call.func)
        undeclared = call.undeclared_writes()
        if traits.writes or undeclared or traits.draws:
            self.has_effects = True
        if traits.turns:
            self._record_view_in_place(call)
        elif traits.writes:
            self._record_write(call)
        elif traits.views:
            self._record_view(call)
        else:
            self._record_pure(call)
        for target in undeclared:
            self._memory.write_unknown(target, call.args, tuple(call.kwargs.values()))

    def _record_pure(self, call: Call) -> None:
        args = map_tensors(self._memory.read, call.args)
        kwargs = map_tensors(self._memory.read, call.kwargs)
        for tensor, item in _results(call):
            if tensor not in self._memory:
                value = self._values.value(call.func, args, kwargs, tensor, item=item)
                self._memory.allocate(tensor, value)

    def _record_view(self, call: Call) -> None:
        viewed = call.args[0]
        base = self._memory.alias(viewed)
        source = self._memory.read(viewed)
        rest = map_tensors(self._memory.read, call.args[1:])
        artefact = base.made_by is self._memory.node and is_factory(source)
        if call.func is torch.ops.aten.detach.default and artefact:
            # The factories of a fake mode return a detached view; no other tensor sees what it
            # views.
            self._memory.add_view(call.result, base.storage, base.chain, source)
            return
        for tensor, item in _results(call):
            if tensor not in self._memory:
                step = ViewStep(call.func, rest, call.kwargs, item, *sizes_of(tensor), tensor.dtype)
                value = self._values.view(source, step)
                chain = (*base.chain, step)
                self._memory.add_view(tensor, base.storage, chain, value, source)

    def _record_view_in_place(self, call: Call) -> None:
        """A tensor becomes another view of its storage, and so do all nodes that return it."""
        target = call.args[0]
        functional = _functional_form(call.func) or _OTHERWISE_NAMED.get(call.func)
        outside = self._memory.alias(target).storage.is_outside
        if functional is None or call.func in _SWAPS or outside:
            name, _ = _names(call.func)
            raise UntraceableGraph(Unreadable.REPLACED_TENSOR, name, self._memory.node)
        rest = map_tensors(self._memory.read, call.args[1:])
        step = ViewStep(functional, rest, call.kwargs, None, *sizes_of(target), target.dtype)
        self._memory.view_in_place(target, step)

    def _record_write(self, call: Call) -> None:
        """An in-place or ``out=`` operation gives the written tensors new values."""
        memory, args, kwargs = self._memory, call.args, call.kwargs
        written = _written_by(call)
        target = written[0] if len(written) == 1 else None
        functional = _functional_form(call.func)
        if target is not None and torch.Tag.nondeterministic_seeded in call.func.tags:
            # Dropout: never equal to another.
            others = [x for x in (*args, *kwargs.values()) if x is not target]
            read = tuple(tensors_in(others))
            value = self._values.value(call.func, tuple(map(memory.read, read)), {}, target)
            memory.write(target, value)
        elif call.func is torch.ops.aten.copy_.default:
            value = self._values.value(COPY, (memory.read(args[1]),), {}, args[0])
            memory.write(args[0], value)
        elif functional is not None and args and target is args[0]:
            read = map_tensors(memory.read, args), map_tensors(memory.read, kwargs)
            memory.write(target, self._values.value(functional, *read, target))
        elif target is not None and (returned := self._returned_in(target, call)) is not None:
            memory.write(target, returned)
        else:
            # Everything is read before any of it is written.
            before = map_tensors(memory.read, (args, tuple(kwargs.values())))
            for tensor in written:
                memory.write_unknown(tensor, before)
            for tensor in tensors_in(call.result):
                if tensor not in memory:
                    memory.allocate(tensor, memory.opaque(tensor, before))

    def _returned_in(self, target: torch.Tensor, call: Call) -> Value | None:
        """What an ``out=`` operation would return without it; None if its target is no such tensor.

        It casts to the dtype of the target, resizes it, and may read what it has written.
        """
        functional, memory = _without_out(call.func), self._memory
        options = {name: given for name, given in call.kwargs.items() if name != "out"}
        if functional is None:
            return None
        storage = memory.alias(target).storage
        if any(memory.alias(x).storage is storage for x in tensors_in((call.args, options))):
            return None
        like = functional(*call.args, **options)
        if not isinstance(like, torch.Tensor) or (like.dtype, like.device) != (
            target.dtype,
            target.device,
        ):
            return None
        if sizes_of(like)[0] != memory.read(target).shape:
            return None
        args, kwargs = map_tensors(memory.read, call.args), map_tensors(memory.read, options)
        return self._values.value(functional, args, kwargs, target)


def _results(call: Call) -> Sequence[tuple[Any, int | None]]:
    """The tensors that an operation returned, with their places where it returns several."""
    if isinstance(call.result, (torch.Tensor, Like)):
        return [(call.result, None)]
    if not isinstance(call.result, (list, tuple)):
        return []
    items = enumerate(call.result)
    return [(x, item) for item, x in items if isinstance(x, (torch.Tensor, Like))]


def _written_by(call: Call) -> list[Any]:
    """The tensors that an operation writes, by its schema."""
    written: list[Any] = []
    arguments = call.func._schema.arguments
    for argument, given in zip(arguments, call.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors_in(given)
    for argument in arguments:
        if argument.name in call.kwargs and argument.alias_info is not None:
            written += tensors_in(call.kwargs[argument.name])
    return written


def _functional_form(func: Any) -> Any | None:
    """``aten.add_.Tensor`` -> ``aten.add.Tensor``; None when there is no such operator."""
    name, overload = _names(func)
    if not name.endswith("_") or name.startswith("__"):
        return None
    packet = getattr(getattr(torch.ops, func.namespace), name[:-1], None)
    return getattr(packet, overload, None)


def _without_out(func: Any) -> Any | None:
    """``aten.mm.out`` -> ``aten.mm.default``; None when there is no such operator."""

    def arguments(schema: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]

    packet = getattr(getattr(torch.ops, func.namespace), _names(func)[0])
    overloads = (getattr(packet, name) for name in packet.overloads())
    alike = (
        one
        for one in overloads
        if not one._schema.is_mutable and arguments(one._schema) == arguments(func._schema)
    )
    return next(alike, None)


def _names(func: Any) -> tuple[str, str]:
    """``aten.add_.Tensor`` -> ``("add_", "Tensor")``"""
    name, _, overload = func.name().partition("::")[2].partition(".")
    return name, overload or "default"


def _without_empty_pieces(call: Call) -> Call:
    """``cat`` without ``torch.empty(0)``, which PyTorch skips whatever the other shapes are.

    It stays where it decides the dtype.
    """
    if call.func is not _CAT:
        return call
    pieces, *rest = call.args
    something = [piece for piece in pieces if piece.dim() == call.result.dim()]
    if any(piece.dtype is not call.result.dtype for piece in something):
        return call
    return replace(call, args=(something, *rest))


def _taken_apart(call: Call) -> list[Call]:
    """``a + value * b * c`` as a product and a sum, which have rules of their own.

    Only if the separate product has as many digits as the sum.
    """
    addition: Any
    weight: Any
    if call.func.name() == "prims::fma":
        # Dynamo writes some of them as ``a * b + c``, by an operator that it defines then.
        left, right, target = call.args
        addition, weight = torch.ops.aten.add.Tensor, 1
        if not isinstance(right, torch.Tensor):
            return [Call(addition, (target, left), {"alpha": right}, call.result)]
    elif call.func in _PRODUCTS_ADDED and len(call.args) == 3:
        target, left, right = call.args
        addition, weight = _PRODUCTS_ADDED[call.func], call.kwargs.get("value", 1)
    else:
        return [call]
    product = torch.ops.aten.mul.Tensor(left, right)
    if not product.dtype.is_floating_point or product.dtype is not call.result.dtype:
        return [call]
    return [
        Call(torch.ops.aten.mul.Tensor, (left, right), {}, product),
        Call(addition, (target, product), {"alpha": weight}, call.result),
    ]
