"""Value numbering: each computation becomes one ``Value``, and equal ones the same.

Two computations are equal when they apply the same operator to the same values with the same
constants under the same grad mode, and draw no random numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .axes import Size
from .canonical import SCATTER, CanonicalCopy, Value, values_in, written_range
from .parts import ViewStep, plain, shown_range
from .repeats import Like, frozen


class ValueNumbering:
    """Adds values to a canonical copy.

    Attributes:
        node: the Dynamo node that runs, the ``origin`` of every new value.
    """

    def __init__(self, copy: CanonicalCopy) -> None:
        self.node: fx.Node
        self._values = copy.values
        self._known: dict[Any, Value] = {}

    def value(
        self, op: Any, args: Any, kwargs: Any, like: Any, item: int | None = None, chain: Any = ()
    ) -> Value:
        """The value of a computation: a known one if it was computed before.

        Args:
            op: an ATen operator, or ``INPUT``, ``COPY``, ``OPAQUE`` or ``SCATTER``; only results of
                operators are ever equal.
            args: its positional arguments, with values in place of tensors.
            kwargs: its keyword arguments, likewise.
            like: a tensor or ``Like`` of the shape, strides, dtype and device of the value.
            item: which result, for operators that return several.
            chain: of a ``SCATTER``: the views that show the written part.
        """
        shape, strides = sizes_of(like)
        grad_mode = torch.is_grad_enabled()
        key = None
        if not isinstance(op, str) and torch.Tag.nondeterministic_seeded not in op.tags:
            key = (op, frozen(args), frozen(kwargs), item, shape, like.dtype, grad_mode)
            if key in self._known:
                return self._known[key]
        value = Value(
            op=op,
            args=plain(args),
            kwargs=plain(kwargs),
            shape=shape,
            dtype=like.dtype,
            device=like.device,
            origin=self.node,
            step=len(self._values),
            requires_grad_mode=grad_mode,
            item=item,
            chain=chain,
            strides=strides,
        )
        self._values.append(value)
        for operand in dict.fromkeys(value.operands):
            operand.readers.append(value)
        if key is not None:
            self._known[key] = value
        return value

    def unknown(self, op: str, like: Any, operands: Any = ()) -> Value:
        """A new value, an ``INPUT`` or ``OPAQUE``, made of operands in a way that is not known."""
        return self.value(op, (len(self._values), *values_in(operands)), {}, like)

    def view(self, value: Value, step: ViewStep) -> Value:
        """A view of the value; of a part that was written, what was written."""
        wanted = shown_range((step,), value.shape)
        while wanted is not None and value.op is SCATTER:
            written = written_range(value)
            if written == wanted:
                part = value.args[1]
                assert isinstance(part, Value)
                return part
            if written is None or not written.is_disjoint(wanted):
                break
            value = value.source
        like = Like(step.shape, step.dtype, value.device, step.strides)
        return self.value(step.op, (value, *step.args), step.kwargs, like, step.item)

    def scatter(self, base: Value, part: Value, chain: tuple[ViewStep, ...]) -> Value:
        """``base`` after a write of ``part`` through a chain of views."""
        return self.value(SCATTER, (base, part), {}, like_of(base), chain=chain)


def like_of(value: Value) -> Like:
    """A stand-in for a tensor that has this value."""
    return Like(value.shape, value.dtype, value.device, value.strides)


def sizes_of(like: torch.Tensor | Like) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Shape and strides as ints or sympy expressions."""
    if isinstance(like, Like):
        return like.shape, like.strides
    return plain(tuple(like.shape)), plain(tuple(like.stride()))
