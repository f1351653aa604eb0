"""Equal sites of several layers, put together.

Sites that come from one source line and differ in their modules only, as the layers of a tower do,
share a row of the table, a paragraph and a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .values import SiteReport

_MOST_NUMBERS = 4
_ACTIVATIONS = ("Q", "R", "X")  # named by the graph, with a number that differs by layer


@dataclass(frozen=True)
class Group:
    """Sites that are equal except for the module that they belong to."""

    first: SiteReport
    modules: tuple[str | None, ...]
    numbers: tuple[int, ...] = ()  # positions in the list that was grouped

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
    def where(self) -> str:
        """The first module, and how many others there are."""
        others = len(self.modules) - 1
        if self.first.module is None:
            return f"{others + 1} times" if others else ""
        return f"{self.first.module} and {others} more" if others else self.first.module


def grouped(sites: Sequence[SiteReport]) -> list[Group]:
    """Groups of equal sites, in the order in which they were found."""
    found: dict[object, list[int]] = {}
    for number, site in enumerate(sites):
        found.setdefault(_without_module(site), []).append(number)
    return [
        Group(sites[same[0]], tuple(sites[number].module for number in same), tuple(same))
        for same in found.values()
    ]


def _without_module(site: SiteReport) -> SiteReport:
    """The site without what differs between instances of its module's class."""
    prefix = f"{site.module}."
    arguments = tuple(
        replace(argument, name=argument.name.replace(prefix, ""))
        for argument in site.arguments
        if argument.role not in _ACTIVATIONS
    )
    return replace(site, module=None, arguments=arguments, operation=None, region=())
