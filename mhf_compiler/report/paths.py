"""Paths of modules: many in one expression, and how many of a list's modules they are.

layers.0.ffn, layers.1.ffn, layers.2.ffn         layers.{0-2}.ffn
of a model whose layers are 0 to 3               3 of 4 layers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

_NUMBER = "\0"  # in the place of a number in a path


@dataclass(frozen=True)
class Coverage:
    """Where equal networks are: a number of modules of how many.

    Attributes:
        where: the modules, numbers as ranges in braces: ``"layers.{1-23}.ffn"``.
        modules: the paths of all of them.
        times: how often each is called; 0 if not all are called equally often.
        of: how many modules the list has that their last number counts; None without a number.
        noun: what the list calls them, such as ``"layers"``.
        missing: the modules of that list which are in a graph and not among them.
        absent: those which are in no graph.
    """

    where: str
    modules: tuple[str, ...]
    times: int = 1
    of: int | None = None
    noun: str = "modules"
    missing: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = []
        if self.of is not None:
            others = [f"not {compressed(self.missing)}"] if self.missing else []
            if self.absent:
                verb = "is" if len(self.absent) == 1 else "are"
                others.append(f"{compressed(self.absent)} {verb} in no graph")
            here = self.of - len(self.missing) - len(self.absent)
            rest = f" ({'; '.join(others)})" if others else ""
            parts.append(f"{f'{here} of' if others else 'all'} {self.of} {self.noun}{rest}")
        if self.times != 1:
            often = f"{self.times} times" if self.times else "several times"
            parts.append(f"{often} each" if len(self.modules) > 1 and self.times else often)
        return f"{self.where}: {', '.join(parts)}" if parts else self.where


def coverage(
    counts: Mapping[str, int], known: Iterable[str], absent: Iterable[str] = ()
) -> list[Coverage]:
    """How many modules of each list are among some.

    Args:
        counts: their paths, with the number of calls of each. Those that differ in their numbers
            only are put together.
        known: the paths of all modules of the graphs.
        absent: those of modules in no graph.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for path in counts:
        found.setdefault(without_numbers(path), []).append(path)
    every = [*dict.fromkeys([*known, *counts])]
    unseen: dict[tuple[str, ...], list[str]] = {}
    for path in absent:
        unseen.setdefault(without_numbers(path), []).append(path)
    return [
        _coverage(skeleton, paths, counts, every, unseen.get(skeleton, []))
        for skeleton, paths in found.items()
    ]


def _coverage(
    skeleton: tuple[str, ...],
    paths: list[str],
    counts: Mapping[str, int],
    known: Iterable[str],
    absent: Iterable[str],
) -> Coverage:
    often = {counts[path] for path in paths}
    times = often.pop() if len(often) == 1 else 0
    one = Coverage(compressed(paths), tuple(paths), times)
    last = max((at for at, part in enumerate(skeleton) if part == _NUMBER), default=None)
    if last is None:
        return one
    lists = skeleton[: last + 1]
    members = _starts(paths, last + 1)
    every = _starts((path for path in known if _begins(path, lists)), last + 1)
    unseen = [path for path in _starts(absent, last + 1) if path not in every]
    missing = tuple(path for path in every if path not in members and not _holds(path, counts))
    if len(members) == 1 and not missing:
        return one  # of heads for several tasks, say, a call needs one: others are not left out
    noun = lists[-2] if len(lists) > 1 and lists[-2] != _NUMBER else "modules"
    number = len(every) + len(unseen)
    return replace(one, of=number, noun=noun, missing=missing, absent=tuple(unseen))


def _starts(paths: Iterable[str], length: int) -> dict[str, None]:
    """What paths begin with, each once: so many of their parts."""
    return {".".join(path.split(".")[:length]): None for path in paths}


def _holds(path: str, modules: Iterable[str]) -> bool:
    """Whether one of the modules is inside of another, or is that one."""
    return any(module == path or module.startswith(f"{path}.") for module in modules)


def _begins(path: str, skeleton: tuple[str, ...]) -> bool:
    return without_numbers(path)[: len(skeleton)] == skeleton


def common_start(parts: Iterable[Sequence[str]]) -> list[str]:
    """What sequences have in common at their beginning; nothing if there are none."""
    same = takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False))
    return [each[0] for each in same]


def compressed(paths: Iterable[str]) -> str:
    """Paths in one expression, in which numbers are ranges: ``"layers.{0-2,5}.ffn, head"``."""
    found: dict[tuple[str, ...], list[tuple[frozenset[int], ...]]] = {}
    for path in dict.fromkeys(paths):
        skeleton, numbers = _split(path)
        found.setdefault(skeleton, []).append(tuple(frozenset([number]) for number in numbers))
    return ", ".join(
        _spelled(skeleton, sets) for skeleton, many in found.items() for sets in _merged(many)
    )


def without_numbers(path: str) -> tuple[str, ...]:
    """The parts of a path, all places in lists alike."""
    return _split(path)[0]


def _split(path: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A path without its numbers, and those."""
    parts = path.split(".")
    skeleton = tuple(_NUMBER if _is_number(part) else part for part in parts)
    return skeleton, tuple(int(part) for part in parts if _is_number(part))


def _is_number(part: str) -> bool:
    """Whether it is the place in a list; a name such as ``"01"`` is not."""
    return part.isdecimal() and str(int(part)) == part


def _merged(many: list[tuple[frozenset[int], ...]]) -> list[tuple[frozenset[int], ...]]:
    """Products of sets of numbers: those that differ in one place are one, the last place first."""
    for place in reversed(range(len(many[0]))):
        joined: dict[tuple[frozenset[int], ...], frozenset[int]] = {}
        for sets in many:
            others = (*sets[:place], *sets[place + 1 :])
            joined[others] = joined.get(others, frozenset()) | sets[place]
        many = [(*others[:place], found, *others[place:]) for others, found in joined.items()]
    return many


def _spelled(skeleton: tuple[str, ...], sets: tuple[frozenset[int], ...]) -> str:
    numbers = iter(sets)
    return ".".join(_ranges(next(numbers)) if part == _NUMBER else part for part in skeleton)


def _ranges(numbers: frozenset[int]) -> str:
    """``{0-2,5}`` for 0, 1, 2 and 5; a single number as it is."""
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return str(ordered[0])
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return f"{{{','.join(shown)}}}"
