"""How one and the same tensor expression can be spelled: the vocabulary of the generator.

A ``Named`` is a Python expression and the axes of its dimensions. Axes are single letters, and a
dimension that merges several of them lists them outermost first, so ``("b", "l", "hd")`` are heads
cut out of the features. ``Writer`` turns what is meant, "this tensor, laid out so", "the sum over
d of the product of these two", into source text, and chooses among the spellings by its random
number generator.

    rearrange     view, reshape, unflatten, permute, transpose, movedim, flatten, einops
    contract      einsum, einops, @, bmm, baddbmm, linear, conv1d, tensordot, vmap, multiply and sum
    align         None indices and unsqueeze, for broadcasting
    select        one of many: an index, a slice, chunk, split, unbind, narrow
    detour        what changes nothing: transposed twice, times one, copied, cut and glued ...
"""

from __future__ import annotations

import ast
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

Dims = tuple[str, ...]

#: Axis -> how its size is written: (b)atch, (l)ength, (t)okens, (h)eads, (g)roups of heads that
#: share weights, heads in a group (s), sub-n(e)tworks, hidden units (f), head width (d), head
#: width of the output (o), gate or up (p), and gate and up side by side (u).
SIZES = {
    "b": "B",
    "l": "L",
    "t": "T",
    "h": "H",
    "g": "G",
    "s": "S",
    "e": "E",
    "f": "f",
    "d": "d",
    "o": "d",
    "p": "2",
    "u": "2 * f",
}
TOKENS = "blt"


def size(letters: str) -> str:
    """The size of a dimension, as source text."""
    return " * ".join(SIZES[letter] for letter in letters) or "1"


@dataclass(frozen=True)
class Named:
    """A tensor expression, and the axes of each of its dimensions ("" for a dimension of one)."""

    text: str
    dims: Dims

    @property
    def letters(self) -> str:
        return "".join(self.dims)

    @property
    def atom(self) -> str:
        """The text, in parentheses where a method call would bind more tightly."""
        tree = ast.parse(self.text, mode="eval").body
        simple = (ast.Name, ast.Call, ast.Attribute, ast.Subscript)
        return self.text if isinstance(tree, simple) else f"({self.text})"

    def dim(self, axis: str) -> int:
        return next(i for i, letters in enumerate(self.dims) if axis in letters)

    def then(self, suffix: str) -> Named:
        """A method call, or whatever else follows, that leaves the dimensions alone."""
        return Named(self.atom + suffix, self.dims)


@dataclass(frozen=True)
class Assignment:
    """A variable of the program: its name, its part in the network and its dimensions."""

    name: str
    role: str
    dims: Dims


@dataclass
class Writer:
    """Writes the body of ``forward``, one statement after the other."""

    rng: Random
    sizes: dict[str, int]  # by letter; for spellings that depend on a number
    dynamic: bool = False  # whether batch or length have no fixed size
    detours: float = 0.1  # how often one is taken
    cast: bool = False  # whether autocast may be on: then hidden units and weights differ in dtype
    lines: list[str] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    spellings: set[str] = field(default_factory=set)  # which contractions were used
    _depth: int = 0
    _taken: set[str] = field(default_factory=set)

    # Statements.

    def add(self, line: str) -> None:
        self.lines.append("    " * self._depth + line)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        self.add(header)
        self._depth += 1
        yield
        self._depth -= 1

    def name(self, wanted: str) -> str:
        """``wanted``, or the first of its numbered variants that is free."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}{count}"
        self._taken.add(name)
        return name

    def let(self, wanted: str, value: Named, role: str = "") -> Named:
        """Assign a value to a variable, by a detour at times."""
        value = self.detour(value)
        if value.text.isidentifier():
            name = value.text
        else:
            name = self.name(wanted)
            self.add(f"{name} = {value.text}")
        self.assignments.append(Assignment(name, role or wanted, value.dims))
        return Named(name, value.dims)

    # Choices.

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # Layout.

    def rearrange(self, value: Named, target: Sequence[str]) -> Named:
        """The same elements with the dimensions ``target``."""
        target = tuple(target)
        if value.dims == target:
            return value
        assert sorted(value.letters) == sorted("".join(target)), (value, target)
        spell = self._by_einops if self.chance(0.02) else self._step_by_step
        return spell(value, target)

    def _by_einops(self, value: Named, target: Dims) -> Named:
        def side(dims: Dims) -> str:
            return " ".join(
                "1" if not x else x if len(x) == 1 else f"({' '.join(x)})" for x in dims
            )

        cut = {letter for letters in value.dims if len(letters) > 1 for letter in letters}
        sizes = "".join(f", {letter}={SIZES[letter]}" for letter in sorted(cut))
        pattern = f"{side(value.dims)} -> {side(target)}"
        return Named(f'einops.rearrange({value.text}, "{pattern}"{sizes})', target)

    def _step_by_step(self, value: Named, target: Dims) -> Named:
        value = self._squeezed(value)
        for at in reversed(range(len(value.dims))):
            if len(value.dims[at]) > 1 and value.dims[at] not in target:
                value = self._split(value, at)
        wanted = [
            unit for letters in target for unit in ([letters] if letters in value.dims else letters)
        ]
        value = self._permuted(value, wanted)
        for letters in target:
            if len(letters) > 1 and letters not in value.dims:
                value = self._merged(value, letters)
        for at, letters in enumerate(target):
            if not letters:
                value = self._unsqueezed(value, at)
        return value

    def _squeezed(self, value: Named) -> Named:
        for at in reversed(range(len(value.dims))):
            if not value.dims[at]:
                rest = value.dims[:at] + value.dims[at + 1 :]
                value = Named(f"{value.atom}.squeeze({self._at(at, len(rest) + 1)})", rest)
        return value

    def _unsqueezed(self, value: Named, at: int) -> Named:
        rank = len(value.dims)
        dims = (*value.dims[:at], "", *value.dims[at:])
        if self.chance(0.5):
            return Named(f"{value.atom}.unsqueeze({self._at(at, rank + 1)})", dims)
        index = ", ".join([*[":"] * at, "None"])
        return Named(f"{value.atom}[{index}]", dims)

    def _split(self, value: Named, at: int) -> Named:
        letters = value.dims[at]
        dims = (*value.dims[:at], *letters, *value.dims[at + 1 :])
        sizes = ", ".join(size(letter) for letter in letters)
        if self.chance(0.6):
            return Named(
                f"{value.atom}.unflatten({self._at(at, len(value.dims))}, ({sizes}))", dims
            )
        method = self.pick("view", "reshape")
        return Named(f"{value.atom}.{method}({self.shape(dims)})", dims)

    def _permuted(self, value: Named, wanted: Sequence[str]) -> Named:
        order = [value.dims.index(unit) for unit in wanted]
        moved = [at for at, source in enumerate(order) if at != source]
        if not moved:
            return value
        rank, dims = len(order), tuple(wanted)
        spellings = [f".permute({', '.join(map(str, order))})", f".permute({tuple(order)})"]
        if len(moved) == 2:
            a, b = moved if self.chance(0.5) else (at - rank for at in moved)
            spellings += [f".transpose({a}, {b})"] * 3 + [f".swapaxes({b}, {a})"]
            if moved == [rank - 2, rank - 1]:
                spellings += [".mT"] * 3
        if order[1:] == sorted(order[1:]):
            spellings.append(f".movedim({order[0]}, 0)")
        return Named(value.atom + self.pick(*spellings), dims)

    def _merged(self, value: Named, letters: str) -> Named:
        start = value.dims.index(letters[0])
        stop = start + len(letters)
        dims = (*value.dims[:start], letters, *value.dims[stop:])
        rank = len(value.dims)
        if self.chance(0.5):
            last = self._at(stop - 1, rank)
            return Named(f"{value.atom}.flatten({self._at(start, rank)}, {last})", dims)
        return Named(f"{value.atom}.reshape({self.shape(dims)})", dims)

    def _at(self, position: int, rank: int) -> int:
        """A dimension, counted from either end."""
        return position if self.chance(0.5) else position - rank

    def shape(self, dims: Sequence[str]) -> str:
        sizes = [size(letters) for letters in dims]
        tokens = [at for at, letters in enumerate(dims) if set(letters) & set(TOKENS)]
        if tokens and self.chance(0.2):
            sizes[self.rng.choice(tokens)] = "-1"
        return ", ".join(sizes)

    def singles(self, value: Named) -> Named:
        """Every axis a dimension of its own, in the order they are in."""
        return self.rearrange(value, tuple(value.letters))

    def align(self, value: Named, dims: Sequence[str]) -> Named:
        """``value`` so that it broadcasts against a tensor of ``dims``."""
        value = self.rearrange(value, [axis for axis in dims if axis in value.letters])
        missing = [axis not in value.letters for axis in dims]
        first = missing.index(False) if False in missing else len(dims)
        if self.chance(0.7):
            missing = missing[first:]
            dims = dims[first:]
        if not any(missing):
            return value
        if self.chance(0.5):
            items = ["None" if gone else ":" for gone in missing]
            if "None" in items and items[0] == ":" and self.chance(0.5):
                kept = items.index("None")
                items = ["...", *items[kept:]] if kept else items
            return Named(f"{value.atom}[{', '.join(items)}]", tuple(dims))
        for at, gone in enumerate(missing):
            if gone:
                value = self._unsqueezed(value, at)
        return Named(value.text, tuple(dims))

    def times(self, a: Named, b: Named) -> Named:
        """``a * b``, with the dimensions of ``a``."""
        factors = [a.atom, self.align(b, a.dims).atom]
        self.rng.shuffle(factors)
        return Named(" * ".join(factors), a.dims)

    def plus(self, a: Named, b: Named) -> Named:
        """``a + b``, with the dimensions of ``a``."""
        terms = [a.text, self.align(b, a.dims).text]
        self.rng.shuffle(terms)
        return Named(" + ".join(terms), a.dims)

    def select(self, value: Named, axis: str, index: str) -> Named:
        """Element ``index`` along ``axis``."""
        at = value.dim(axis)
        rank, whole = len(value.dims), value.dims[at]
        if len(whole) > 1 and (whole[0] != axis or self.chance(0.3)):
            return self.select(self._split(value, at), axis, index)
        dim = self._at(at, rank)
        if len(whole) == 1:
            dims = value.dims[:at] + value.dims[at + 1 :]
            items = [*[":"] * at, index]
            if at == rank - 1 and self.chance(0.6):
                items = ["...", index]
            spellings = [
                f"[{', '.join(items)}]",
                f"[{', '.join(items)}]",
                f".select({dim}, {index})",
                f".unbind({dim})[{index}]",
                f".narrow({dim}, {index}, 1).squeeze({dim})",
            ]
            return Named(value.atom + self.pick(*spellings), dims)
        rest = whole[1:]
        dims = (*value.dims[:at], rest, *value.dims[at + 1 :])
        step = size(rest)
        step = step if len(rest) == 1 else f"({step})"
        items = [*[":"] * at, f"{index} * {step} : ({index} + 1) * {step}"]
        if at == rank - 1:
            items = ["...", items[-1]]
        spellings = [
            f"[{', '.join(items)}]",
            f"[{', '.join(items)}]",
            f".chunk({SIZES[axis]}, {dim})[{index}]",
            f".split({step}, {dim})[{index}]",
            f".narrow({dim}, {index} * {step}, {step})",
        ]
        return Named(value.atom + self.pick(*spellings), dims)

    def halves(self, value: Named, which: str) -> tuple[Named, Named]:
        """Both parts of a packed projection: apart, or halves of one dimension, or interleaved."""
        if "p" in value.letters:
            value = self.singles(value)
            return self.select(value, "p", "0"), self.select(value, "p", "1")
        value = self.singles(value)
        at, rank = value.dim("u"), len(value.dims)
        dims = tuple("f" if axis == "u" else axis for axis in value.dims)
        dim = self._at(at, rank)
        before = "..., " if at == rank - 1 else ":, " * at
        if which == "halves":
            both = self.pick(f".chunk(2, {dim})", f".split(f, {dim})", f".tensor_split(2, {dim})")
            cuts = [(f"{both}[0]", f"{both}[1]"), (f"[{before}:f]", f"[{before}f:]")]
            cuts.append((f".narrow({dim}, 0, f)", f".narrow({dim}, f, f)"))
        else:
            cuts = [(f"[{before}::2]", f"[{before}1::2]"), (f"[{before}0::2]", f"[{before}1::2]")]
            after = at if dim >= 0 else dim
            inner = at + 1 if dim >= 0 else dim
            split = f".unflatten({after}, (f, 2))"
            cuts.append((f"{split}.select({inner}, 0)", f"{split}.select({inner}, 1)"))
        first, second = self.rng.choice(cuts)
        return Named(value.atom + first, dims), Named(value.atom + second, dims)

    # Contractions.

    def contract(
        self,
        a: Named,
        w: Named,
        summed: str,
        bias: Named | None = None,
        kind: str = "",
        alpha: float = 1.0,
    ) -> Named:
        """``alpha`` times the sum over ``summed`` of ``a * w``, plus ``bias``.

        The result has one axis a dimension.
        """
        shared = "".join(x for x in w.letters if x in a.letters and x not in summed)
        kinds = ["einsum", "einsum", "matmul", "matmul", "bmm", "multiply"]
        kinds += ["vmap"] if shared else ["linear", "linear", "tensordot"]
        if self.cast and "f" in summed and not shared:  # which tensordot refuses
            kinds.remove("tensordot")
        tokens = [x for x in a.letters if x not in summed and x not in shared]
        if len(tokens) <= 3 and shared and not self.dynamic:
            kinds += ["conv1d"]
        if self.chance(0.03):  # Dynamo takes its time to trace it
            kinds = ["einops"]
        kind = kind if kind in kinds else self.pick(*kinds)
        self.spellings.add(kind)
        spell: dict[str, Callable[..., Named]] = {
            "einsum": self._einsum_of_two,
            "einops": self._einops,
            "matmul": self._matmul,
            "multiply": self._multiply,
            "vmap": self._vmap,
            "tensordot": self._tensordot,
        }
        if kind in spell:
            result = spell[kind](a, w, summed, shared)
        else:
            outer = "".join(x for x in w.letters if x not in summed and x not in shared)
            spell = {"bmm": self._bmm, "linear": self._linear, "conv1d": self._conv1d}
            takes = bias is not None and set(bias.letters) <= set(shared + outer)
            takes = takes and len(set(shared + outer) - set(bias.letters if bias else "")) == 0
            result = spell[kind](a, w, summed, shared, bias if takes else None)
            if takes and kind == "bmm" and alpha != 1.0:
                result = Named(f"{result.text.removesuffix(')')}, alpha={alpha})", result.dims)
                alpha = 1.0
            bias = None if takes else bias
        result = self.singles(result)
        if alpha != 1.0:
            result = result.then(f" * {alpha}")
        return result if bias is None else self.plus(result, bias)

    def _order(self, a: Named, w: Named, summed: str) -> str:
        """An order for the axes of the result."""
        natural = [x for x in a.letters if x not in summed]
        natural += [x for x in w.letters if x not in summed and x not in a.letters]
        if self.chance(0.25):
            self.rng.shuffle(natural)
        return "".join(natural)

    def _einsum_of_two(self, a: Named, w: Named, summed: str, shared: str) -> Named:
        return self.einsum([a, w], self._order(a, w, summed))

    def einsum(self, operands: Sequence[Named], out: str) -> Named:
        """An einsum with letters of its own, an ellipsis and spaces at times."""
        operands = [self.singles(operand) for operand in operands]
        if self.chance(0.3):
            self.rng.shuffle(operands)
        used = sorted({x for operand in operands for x in operand.letters})
        spelled = {x: x for x in used}
        if self.chance(0.5):
            others = self.rng.sample(string.ascii_letters, len(used))
            spelled = dict(zip(used, others, strict=True))
        terms = ["".join(spelled[x] for x in t) for t in (*(o.letters for o in operands), out)]
        if self.chance(0.3):
            terms = self._with_ellipsis([*(o.letters for o in operands), out], spelled)
        if self.chance(0.1):
            terms = [" ".join(term.replace("...", "\0")).replace("\0", "...") for term in terms]
        spec = f"{', '.join(terms[:-1])} -> {terms[-1]}"
        spec = spec if self.chance(0.2) else spec.replace(", ", ",").replace(" -> ", "->")
        arguments = ", ".join(operand.text for operand in operands)
        return Named(f'torch.einsum("{spec}", {arguments})', tuple(out))

    @staticmethod
    def _with_ellipsis(terms: list[str], spelled: dict[str, str]) -> list[str]:
        """The first axes of one operand, which no other operand has, as ``...``."""
        out = terms[-1]
        plain = ["".join(spelled[x] for x in term) for term in terms]
        for at, term in enumerate(terms[:-1]):
            length = 0
            while length < min(len(term), len(out)) and term[length] == out[length]:
                length += 1
            others = {x for other in terms[:-1] if other is not term for x in other}
            while set(term[:length]) & others:
                length -= 1
            if length:
                plain[at] = "..." + plain[at][length:]
                plain[-1] = "..." + plain[-1][length:]
                return plain
        return plain

    def _einops(self, a: Named, w: Named, summed: str, shared: str) -> Named:
        a, w, out = self.singles(a), self.singles(w), self._order(a, w, summed)
        pattern = f"{' '.join(a.letters)}, {' '.join(w.letters)} -> {' '.join(out)}"
        return Named(f'einops.einsum({a.text}, {w.text}, "{pattern}")', tuple(out))

    def _matmul(self, a: Named, w: Named, summed: str, shared: str) -> Named:
        own = [x for x in a.letters if x not in summed and x not in shared]
        outer = "".join(x for x in w.letters if x not in summed and x not in shared)
        rows = self.rng.choice(["".join(own), own[-1] if own else "", own[-1] if own else "", ""])
        batch = [x for x in own if x not in rows] + list(shared)
        if self.chance(0.4):
            self.rng.shuffle(batch)
        mine = [*batch, rows, summed]
        theirs = [x if x in shared else "" for x in batch]
        while theirs and not theirs[0] and self.chance(0.8):
            theirs.pop(0)
        if self.chance(0.2):  # weight first
            left = self.rearrange(w, [*theirs, outer, summed])
            right = self.rearrange(a, [*batch, summed, rows])
            dims = (*batch, outer, rows)
        else:
            left = self.rearrange(a, mine)
            right = self.rearrange(w, [*theirs, summed, outer])
            dims = (*batch, rows, outer)
        text = self.pick(
            f"{left.atom} @ {right.atom}",
            f"{left.atom} @ {right.atom}",
            f"torch.matmul({left.text}, {right.text})",
            f"{left.atom}.matmul({right.text})",
        )
        return Named(text, dims)

    def _bmm(self, a: Named, w: Named, summed: str, shared: str, bias: Named | None) -> Named:
        own = "".join(x for x in a.letters if x not in summed and x not in shared)
        outer = "".join(x for x in w.letters if x not in summed and x not in shared)
        left = self.rearrange(a, [shared, own, summed])
        right = self.rearrange(w, [shared, summed, outer])
        dims = (shared, own, outer)
        if bias is not None:
            added = self.rearrange(bias, [shared, "", outer])
            self.spellings.add("baddbmm")
            return Named(f"torch.baddbmm({added.text}, {left.text}, {right.text})", dims)
        return Named(f"torch.bmm({left.text}, {right.text})", dims)

    def _linear(self, a: Named, w: Named, summed: str, shared: str, bias: Named | None) -> Named:
        own = [x for x in a.letters if x not in summed]
        outer = "".join(x for x in w.letters if x not in summed)
        left, right = self.rearrange(a, [*own, summed]), self.rearrange(w, [outer, summed])
        added = "" if bias is None else f", {self.rearrange(bias, [outer]).text}"
        return Named(f"F.linear({left.text}, {right.text}{added})", (*own, outer))

    def _conv1d(self, a: Named, w: Named, summed: str, shared: str, bias: Named | None) -> Named:
        """Shared axes are the groups of a convolution that is one element wide."""
        own = [x for x in a.letters if x not in summed and x not in shared]
        outer = "".join(x for x in w.letters if x not in summed and x not in shared)
        first, rest = (own[0], "".join(own[1:])) if len(own) > 1 else ("".join(own), "")
        left = self.rearrange(a, [first, shared + summed, rest])
        right = self.rearrange(w, [shared + outer, summed, ""])
        added = "" if bias is None else f", {self.rearrange(bias, [shared + outer]).text}"
        groups = size(shared)
        text = f"F.conv1d({left.text}, {right.text}{added}, groups={groups})"
        return Named(text, (first, shared + outer, rest))

    def _multiply(self, a: Named, w: Named, summed: str, shared: str) -> Named:
        order = list(self._order(a, w, summed))
        at = self.rng.randrange(len(order) + 1)
        order[at:at] = summed
        left, right = self.align(a, order), self.align(w, order)
        positions = [i for i, x in enumerate(order) if x in summed]
        if self.chance(0.5):
            positions = [i - len(order) for i in positions]
        over = str(positions[0]) if len(positions) == 1 else str(tuple(positions))
        rest = tuple(x for x in order if x not in summed)
        return Named(f"({left.atom} * {right.atom}).sum({over})", rest)

    def _vmap(self, a: Named, w: Named, summed: str, shared: str) -> Named:
        """One of the shared axes is mapped over; what is left is an einsum."""
        over = self.rng.choice(shared)
        a, w = self.singles(a), self.singles(w)
        terms = [x.letters.replace(over, "") for x in (a, w)]
        out = self._order(Named("", tuple(terms[0])), Named("", tuple(terms[1])), summed)
        at = self.rng.randrange(len(out) + 1)
        where = f"in_dims=({a.dim(over)}, {w.dim(over)}), out_dims={at}"
        body = f'torch.einsum("{terms[0]},{terms[1]}->{out}", x, w)'
        text = f"torch.vmap(lambda x, w: {body}, {where})({a.text}, {w.text})"
        return Named(text, (*out[:at], over, *out[at:]))

    def _tensordot(self, a: Named, w: Named, summed: str, shared: str) -> Named:
        a, w = self.singles(a), self.singles(w)
        over = ([a.dim(x) for x in summed], [w.dim(x) for x in summed])
        dims = tuple(x for x in a.letters + w.letters if x not in summed)
        return Named(f"torch.tensordot({a.text}, {w.text}, dims={over})", dims)

    # What changes nothing.

    def detour(self, value: Named) -> Named:
        """The same value, at times by an operation or two that change nothing."""
        while self.chance(self.detours):
            value = self._detour(value)
        return value

    def _detour(self, value: Named) -> Named:
        rank = len(value.dims)
        at = self.rng.randrange(rank)
        other = self.rng.randrange(rank)
        dim = self._at(at, rank)
        spellings = [
            ".contiguous()",
            ".clone()",
            f".transpose({at}, {other}).transpose({other}, {at})",
            f".unsqueeze({at}).squeeze({at})",
            ".to(x.dtype)" if self.rng.random() < 0.5 else ".type_as(x)",
            " * 1.0",
            " / 1",
            " + 0",
            f".reshape({self.shape(value.dims)})",
            f".expand({', '.join(['-1'] * rank)})",
            f".flatten({at}).unflatten({at}, ({', '.join(size(x) for x in value.dims[at:])},))",
            f".movedim({at}, {other}).movedim({other}, {at})",
        ]
        calls = [f"F.dropout({value.text}, {p})" for p in ("0.0", "0.5, training=False")]
        if not set(value.dims[at]) & set(TOKENS):
            calls.append(f"torch.cat({value.atom}.split(1, {dim}), {dim})")
            calls.append(f"torch.stack({value.atom}.unbind({dim}), {dim})")
        if self.chance(0.7):
            return value.then(self.pick(*spellings))
        return Named(self.pick(*calls), value.dims)
