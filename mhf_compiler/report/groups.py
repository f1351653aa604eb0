"""Equal sites of several layers, put together.

Sites that come from one source line and differ in their modules only, as the layers of a tower do,
share a row of the table, a paragraph and a picture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

from ..patterns import Location
from .paths import Coverage, common_start, compressed, coverage
from .values import GraphReport, SiteReport

_MOST_NUMBERS = 4
_ACTIVATIONS = ("Q", "R", "X")  # named by the graph, with a number that differs by layer


@dataclass(frozen=True)
class Group:
    """Sites that are equal except for the module that they belong to.

    Attributes:
        first: one of them.
        modules: the module at each call of each of them; None for the model itself.
        numbers: positions in the list that was grouped.
    """

    first: SiteReport
    modules: tuple[str | None, ...]
    numbers: tuple[int, ...] = ()

    @property
    def numbered(self) -> str:
        """Their numbers; consecutive ones as a range."""
        first, last = self.numbers[0], self.numbers[-1]
        if last - first + 1 == len(self.numbers) > 2:
            return f"{first}-{last}"
        shown = ", ".join(map(str, self.numbers[:_MOST_NUMBERS]))
        more = len(self.numbers) - _MOST_NUMBERS
        return f"{shown} and {more} more" if more > 0 else shown

    @property
    def paths(self) -> list[str]:
        """The paths of their modules, each once."""
        return [path for path in dict.fromkeys(self.modules) if path is not None]

    @property
    def where(self) -> str:
        """Their modules in one expression; how often it is called, if it is one."""
        often = f"{len(self.modules)} times" if len(self.paths) < 2 <= len(self.modules) else ""
        return ", ".join(filter(None, [compressed(self.paths), often]))


def grouped(sites: Sequence[SiteReport]) -> list[Group]:
    """Groups of equal sites, in the order in which they were found."""
    found: dict[object, list[int]] = {}
    for number, site in enumerate(sites):
        found.setdefault(_without_module(site), []).append(number)
    return [
        Group(
            sites[same[0]],
            tuple(module for number in same for module in sites[number].modules),
            tuple(same),
        )
        for same in found.values()
    ]


def coverages(graphs: Sequence[GraphReport]) -> list[Coverage]:
    """Of which modules the networks are rewritten, whatever their sizes, and of how many."""
    known = [module.path for graph in graphs for module in graph.modules]
    absent = dict.fromkeys(module.path for graph in graphs for module in graph.absent)
    calls: dict[Location | None, Counter[_Called]] = {}  # two in one module are no two calls of it
    for graph in graphs:
        for location, found in _calls(graph.rewritten).items():
            # The same code compiled twice is not called twice, unless its calls were followed.
            before = calls.get(location, Counter())
            calls[location] = before + found if graph.calls else before | found
    every: Counter[_Called] = reduce(or_, calls.values(), Counter())
    paths: Counter[str] = Counter()
    for (path, _), times in every.items():
        paths[path] += times
    return coverage(paths, known, absent)


_Called = tuple[str, int | None]  # a module, and the number of its network if it is known


def _calls(sites: Iterable[SiteReport]) -> dict[Location | None, Counter[_Called]]:
    """How often each module is called, by line of the source."""
    found: dict[Location | None, Counter[_Called]] = {}
    for site in sites:
        named = [(path, number) for path, number in site.called if path is not None]
        found.setdefault(site.location, Counter()).update(named)
    return found


def _without_module(site: SiteReport) -> SiteReport:
    """The site without what differs between instances of its module's class."""
    weights = [argument for argument in site.arguments if argument.role not in _ACTIVATIONS]
    prefix = _common_parent([name for argument in weights for name in argument.tensors])
    numbers: dict[str, int] = {}
    arguments = tuple(
        replace(one, name="", tensors=_without_numbers(one.tensors, prefix, numbers))
        for one in weights
    )
    return replace(
        site,
        module=None,
        runs=(),
        networks=(),
        reason=site.reason and replace(site.reason, detail=_cut(site.reason.detail, prefix)),
        arguments=arguments,
        lowered=tuple(_cut(sentence, prefix) for sentence in site.lowered),
        operation=None,
        region=(),
    )


def _common_parent(names: Iterable[str]) -> str:
    """The path of the innermost module that has all of these parameters, with a dot at its end."""
    return "".join(f"{part}." for part in common_start(name.split(".")[:-1] for name in names))


def _without_numbers(names: Iterable[str], prefix: str, numbers: dict[str, int]) -> tuple[str, ...]:
    """Names below a module; of places in its lists, only in which order they come."""

    def numbered(part: str) -> str:
        return f"#{numbers.setdefault(part, len(numbers))}" if part.isdecimal() else part

    parts = (_cut(name.removeprefix(prefix), "").split(".") for name in names)
    return tuple(".".join(map(numbered, path)) for path in parts)


def _cut(text: str, prefix: str) -> str:
    """A text without the path of a module, and without the numbers that a graph gives to values."""
    if prefix:
        text = re.sub(rf"(?<![\w.]){re.escape(prefix)}", "", text)
    return re.sub(r"(?<=\w)_\d+\b", "", text)
