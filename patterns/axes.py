"""Index maps: where each element of a tensor is read, as integer forms over axes.

Recognition never compares shapes or the names of view operations. It asks which element of which
tensor a result reads, and writes the answer as one affine form per dimension:

    q.view(B, L, H, d).transpose(1, 2)[b, h, l, j]   reads   q[b, l, h*d + j]

``Axis`` is one loop index with its size, ``Affine`` an integer combination of axes. A reshape may
need only a part of an axis, say the head out of a flattened feature index. The axis is then *split*
into an outer and an inner one. Splits are recorded in the axis itself, and ``Affine.resolved``
reads a form through them, so that forms written down before the split stay true after it.

Sizes are ints, or sympy expressions over the positive integer symbols of a dynamic shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TypeAlias

import sympy

from mhf_compiler.compat import least_without_floors

Size: TypeAlias = int | sympy.Expr


@dataclass(eq=False, slots=True)
class Axis:
    """One loop index, running from 0 to ``size - 1``. Compared by identity.

    ``parts`` is set when the axis has been split: ``axis = outer * inner.size + inner``.
    """

    size: Size
    parts: tuple[Axis, Axis] | None = None

    def leaves(self) -> tuple[Axis, ...]:
        """The axes that this one has been split into, outermost first."""
        if self.parts is None:
            return (self,)
        outer, inner = self.parts
        return outer.leaves() + inner.leaves()


@dataclass(frozen=True, slots=True)
class Affine:
    """``offset + sum(coefficient * axis)``: one coordinate of a read element."""

    terms: tuple[tuple[Axis, Size], ...] = ()
    offset: Size = 0

    def resolved(self) -> Affine:
        """The same form over axes that are not split any further."""
        if all(axis.parts is None for axis, _ in self.terms):
            return self
        terms: list[tuple[Axis, Size]] = []
        for axis, coefficient in self.terms:
            stride: Size = coefficient
            digits: list[tuple[Axis, Size]] = []
            for leaf in reversed(axis.leaves()):
                digits.append((leaf, stride))
                stride = multiply(stride, leaf.size)
            terms += reversed(digits)
        return Affine(tuple(terms), self.offset)

    def coefficient(self, axis: Axis) -> Size:
        """The factor of an axis; 0 if the form does not mention it."""
        return next((c for a, c in self.resolved().terms if a is axis), 0)

    def axes(self) -> tuple[Axis, ...]:
        """The axes of the form, as split by now."""
        return tuple(axis for axis, _ in self.resolved().terms)

    def scaled(self, factor: Size) -> Affine:
        """``factor * form``"""
        terms = tuple((axis, multiply(c, factor)) for axis, c in self.terms)
        return Affine(terms, multiply(self.offset, factor))

    def shifted(self, offset: Size) -> Affine:
        """``form + offset``"""
        return Affine(self.terms, plus(self.offset, offset))

    def replaced(self, mapping: dict[Axis, Axis]) -> Affine:
        """The form over other axes; those that ``mapping`` lacks stay."""
        form = self.resolved()
        return Affine(tuple((mapping.get(a, a), c) for a, c in form.terms), form.offset)


Index: TypeAlias = tuple[Affine, ...]


def along(indices: Sequence[Index], position: Affine) -> Index | None:
    """The index that is ``indices[i]`` where ``position`` is ``i``.

    None unless all of them move along the same axes, at offsets in ascending progression, of which
    each may be repeated as many times: heads that share weights in groups.
    """
    index: list[Affine] = []
    for forms in zip(*(index for index in indices), strict=True):
        first, offsets = forms[0].resolved(), [form.offset for form in forms]
        if not all(same_steps((first,), (form,)) for form in forms[1:]):
            return None
        times = run_length(offsets)
        place = position if times == len(offsets) else each_of(position, len(offsets), times)
        step = _progression(offsets[::times])
        if step is None or place is None:
            return None
        moved = place.scaled(step)
        index.append(
            first
            if step == 0
            else Affine(first.terms + moved.terms, plus(first.offset, moved.offset))
        )
    return tuple(index)


def _progression(offsets: Sequence[Size]) -> Size | None:
    """The step from each offset to the next; None unless it is the same, and not negative."""
    steps = {plus(b, multiply(a, -1)) for a, b in pairwise(offsets)}
    step = steps.pop() if steps else 0
    return None if steps or not at_most(0, step) else step


def run_length(items: Sequence[object]) -> int:
    """How many times in a row each item is repeated, if all are the same number of times; or 1."""
    runs = [len([*run]) for _, run in groupby(items)]
    return runs[0] if len(set(runs)) == 1 else 1


def each_of(position: Affine, size: int, times: int) -> Affine | None:
    """``position // times``, for a position below ``size``; None if that is no affine form."""
    digits = through_reshape((position,), (size,), (size // times, times))
    return None if digits is None else digits[0]


@dataclass(slots=True)
class _Digits:
    """What one dimension of a mixed-radix number has received so far."""

    size: Size
    stride: Size
    terms: list[tuple[Axis, Size]] = field(default_factory=list)
    offset: Size = 0


def axis_form(axis: Axis) -> Affine:
    """The position of one axis, as a form."""
    return Affine(((axis, 1),))


def leaves(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The axes that these have been split into by now, outermost first."""
    return tuple(leaf for axis in axes for leaf in axis.leaves())


def real(axes: Iterable[Axis]) -> frozenset[Axis]:
    """The axes that are not of size one."""
    return frozenset(axis for axis in axes if axis.size != 1)


def axes_of(index: Index) -> frozenset[Axis]:
    """The axes, as split by now, that an index moves along, those of size one included."""
    return frozenset(axis for form in index for axis in form.axes())


def real_axes(index: Index) -> frozenset[Axis]:
    """The axes, as split by now, that an index moves along."""
    return frozenset(axis for form in index for axis in form.axes() if axis.size != 1)


def same_steps(a: Index, b: Index) -> bool:
    """Whether two indices move alike: along the same axes in the same steps.

    Nothing moves along an axis of size one.
    """

    def steps(form: Affine) -> frozenset[tuple[Axis, Size]]:
        return frozenset((axis, c) for axis, c in form.resolved().terms if axis.size != 1)

    return len(a) == len(b) and all(steps(x) == steps(y) for x, y in zip(a, b, strict=True))


def same_index(a: Index, b: Index) -> bool:
    """Whether two indices read the same elements: they move alike from the same place."""
    return same_steps(a, b) and all(x.offset == y.offset for x, y in zip(a, b, strict=True))


def multiply(a: Size, b: Size) -> Size:
    """``a * b``, expanded, so that equal sizes compare equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return _tidy(sympy.expand(sympy.sympify(a) * b))


def plus(a: Size, b: Size) -> Size:
    """``a + b``, expanded."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return _tidy(sympy.expand(sympy.sympify(a) + b))


def stride_in_sizes(stride: Size, shape: Sequence[Size] = ()) -> Size:
    """A stride as a product of sizes, expanded; it may be another one where such a size is zero.

    PyTorch has ``Max(1, size)`` as a factor in place of a size that may be zero, and leaves
    ``s * (t - 1)`` as it is. A stride that equals the product of the sizes further inside then does
    so wherever the tensor has elements. What is no factor stays: ``8 * Max(1, n) + 8`` is 16 for
    zero, where a dimension of ``n + 1`` is not empty. So does what is a size of ``shape`` itself.
    """
    if isinstance(stride, int):
        return stride
    factors = sympy.Mul.make_args(sympy.sympify(stride))
    return product(one if one in shape else _size_in(one) for one in factors)


def _size_in(factor: sympy.Expr) -> Size:
    """``size`` of ``Max(1, size)``; anything else as it is."""
    if factor.func.__name__ != "Max" or len(factor.args) != 2 or sympy.S.One not in factor.args:
        return factor
    (size,) = (argument for argument in factor.args if argument != 1)
    return size


def quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` when ``b`` divides ``a`` for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    numerator, denominator = sympy.cancel(sympy.sympify(a) / b).as_numer_denom()
    if denominator != 1:
        return None
    return _tidy(sympy.expand(numerator))


def product(sizes: Iterable[Size]) -> Size:
    """The product of all sizes; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def at_most(a: Size, b: Size) -> bool:
    """Whether ``a <= b`` for every value of the symbols; False when that is not known."""
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    more = sympy.expand(sympy.sympify(b) - a)
    return bool(more.is_nonnegative or least_without_floors(more).is_nonnegative)


def split(axis: Axis, inner_size: Size) -> bool:
    """Split ``axis`` so that its inner part has ``inner_size``; False when that does not divide."""
    outer_size = quotient(axis.size, inner_size)
    if outer_size is None:
        return False
    axis.parts = (Axis(outer_size), Axis(inner_size))
    return True


def paired(a: Iterable[Axis], b: Iterable[Axis]) -> dict[Axis, Axis] | None:
    """The axes of ``a``, each with the one of ``b`` in its place; None where their sizes differ.

    Both are given outermost first. What is one axis on one side and several on the other is split.
    """
    mine, theirs = [*leaves(a)], [*leaves(b)]
    pairs: dict[Axis, Axis] = {}
    while mine and theirs:
        one, other = mine.pop(), theirs.pop()
        if one.size != other.size:
            if split(one, other.size):
                mine += one.leaves()
                theirs.append(other)
            elif split(other, one.size):
                mine.append(one)
                theirs += other.leaves()
            else:
                return None
        else:
            pairs[one] = other
    return None if real((*mine, *theirs)) else pairs


def stride_order(stride: Size) -> tuple[bool, int, int]:
    """Sort key: small strides first, symbolic ones after all numbers, by their factors."""
    if isinstance(stride, int):
        return (False, 0, stride)
    coefficient, symbols = stride.as_coeff_Mul()
    powers = (factor.as_base_exp()[1] for factor in sympy.Mul.make_args(symbols))
    return (True, sum(int(power) if power.is_Integer else 1 for power in powers), int(coefficient))


def contiguous_strides(shape: Sequence[Size]) -> list[Size]:
    """The strides of a contiguous tensor of this shape, in elements."""
    strides: list[Size] = []
    stride: Size = 1
    for size in reversed(shape):
        strides.append(stride)
        stride = multiply(stride, size)
    return strides[::-1]


def through_reshape(index: Index, shape: Sequence[Size], source: Sequence[Size]) -> Index | None:
    """The index into a tensor of shape ``source`` that ``index`` into its reshape reads.

    ``shape`` is the shape after the reshape. The position in row-major order is the same on both
    sides, so the position is written as one form and cut into the digits of ``source``, splitting
    axes where a digit ends inside one. None when the digits are no affine forms.

    Outer dimensions that both have stay as they are, so that a place in one of symbolic size does
    not have to be proved to be inside of it again.
    """
    if 0 in shape:
        return None  # nothing is read
    kept = 0
    for size, other in zip(shape, source, strict=False):
        if size != other:
            break
        kept += 1
    position = Affine()
    for form, stride in zip(index[kept:], contiguous_strides(shape[kept:]), strict=True):
        part = form.resolved().scaled(stride)
        position = Affine(position.terms + part.terms, plus(position.offset, part.offset))
    inner = _digits(position, source[kept:])
    return None if inner is None else (*(form.resolved() for form in index[:kept]), *inner)


def _digits(position: Affine, source: Sequence[Size]) -> Index | None:
    """A position in row-major order as one coordinate per dimension of ``source``."""
    digits = [_Digits(s, t) for s, t in zip(source, contiguous_strides(source), strict=True)]
    real = [digit for digit in digits if digit.size != 1]
    pending = [term for term in position.terms if term[0].size != 1]
    while pending:
        split_off = _place(*pending.pop(), real)
        if split_off is None:
            return None
        pending += split_off
    if not _place_offset(position.offset, real) or not all(map(_in_bounds, real)):
        return None
    return tuple(Affine(tuple(digit.terms), digit.offset) for digit in digits)


def _place(
    axis: Axis, coefficient: Size, digits: Sequence[_Digits]
) -> list[tuple[Axis, Size]] | None:
    """Add ``coefficient * axis`` to the digit that it moves.

    Returns:
        The terms to place instead, if the axis spans several digits and has been split; none if it
        has been placed; None if it fits no digit.
    """
    for digit in digits:  # the outermost digit whose stride divides the coefficient
        step = quotient(coefficient, digit.stride)
        if step is not None:
            break
    else:
        return None
    count = quotient(digit.size, step)  # values of the axis that fit into this digit
    if count is None:
        # Only a partial, non-dividing cover can be right: bounds are checked at the end.
        digit.terms.append((axis, step))
        return []
    if quotient(count, axis.size) is not None or at_most(axis.size, count):
        digit.terms.append((axis, step))
        return []
    if digit is not digits[0] and split(axis, count):
        assert axis.parts is not None
        outer, inner = axis.parts
        return [(outer, multiply(coefficient, count)), (inner, coefficient)]
    return None


def _place_offset(offset: Size, digits: Sequence[_Digits]) -> bool:
    """Distribute a constant over the digits; False where its digits are not known."""
    if isinstance(offset, int) and all(isinstance(digit.stride, int) for digit in digits):
        for digit in digits:
            digit.offset, offset = divmod(offset, digit.stride)
        return offset == 0
    for digit in digits if offset != 0 else ():
        step = quotient(offset, digit.stride)
        if step is not None:
            digit.offset = step
            return True
    return offset == 0


def _in_bounds(digit: _Digits) -> bool:
    """Whether the digit stays below its size: no carry into the next one."""
    return within(Affine(tuple(digit.terms), digit.offset), digit.size)


def within(form: Affine, size: Size) -> bool:
    """Whether every value of ``form`` is a position in a dimension of ``size``."""
    largest = form.offset
    for axis, step in form.terms:
        largest = plus(largest, multiply(step, plus(axis.size, -1)))
    return at_most(plus(largest, 1), size)


def _tidy(expression: sympy.Expr) -> Size:
    return int(expression) if expression.is_Integer else expression
