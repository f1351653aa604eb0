"""Sums over networks, rewritten or declined, each counted as often as it is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .values import GraphReport, SiteReport


@dataclass(frozen=True)
class Totals:
    """What networks need together, in one call of the model, all that are rewritten or declined.

    Attributes:
        networks: how many there are: a module's, once for each time that one graph has it.
        calls: how often one runs.
        dynamic: whether a number of tokens is dynamic; then a large one stands for it.
        hidden_bytes: of hidden units that the forward passes do not store.
        kept_bytes: of hidden units, before their activation, that are not kept for the backward
            pass; 0 where no gradients are recorded.
        copied_bytes: of weights that are copied, to have those of each network in one tensor.
        rewritten: estimated seconds as ops; None if one is not known.
        original: estimated seconds in the original spelling.
    """

    networks: int
    calls: int
    dynamic: bool
    hidden_bytes: float
    kept_bytes: float
    copied_bytes: float
    rewritten: float | None
    original: float | None


def totals(graphs: Sequence[GraphReport]) -> Totals:
    """The sums over all rewritten networks of some graphs."""
    return _totals([graph.rewritten for graph in graphs])


def declined_totals(graphs: Sequence[GraphReport]) -> Totals:
    """The sums over all declined networks that are known to be MH-FFNs: what the op would do."""
    return _totals([[site for site in graph.declined if site.work is not None] for graph in graphs])


def _totals(graphs: Sequence[Sequence[SiteReport]]) -> Totals:
    sites = [(site, len(site.modules)) for sites in graphs for site in sites]
    works = [(site.work, calls) for site, calls in sites if site.work is not None]
    return Totals(
        networks=networks(graphs),
        calls=sum(calls for _, calls in sites),
        dynamic=any(work.dynamic for work, _ in works),
        hidden_bytes=sum(work.hidden_bytes * calls for work, calls in works),
        kept_bytes=sum(work.kept_bytes * calls for work, calls in works),
        copied_bytes=sum(copied_bytes(site) * calls for site, calls in sites),
        rewritten=_seconds([(work.rewritten, calls) for work, calls in works]),
        original=_seconds([(work.original, calls) for work, calls in works]),
    )


def networks(graphs: Iterable[Sequence[SiteReport]]) -> int:
    """How many networks the sites of some graphs are.

    A graph that is called for several modules is one network in each of them; the same network in
    several graphs, as where Dynamo compiles again for other sizes, is one. Numbers of networks tell
    them apart where modules have no names, or names of their layer alone.
    """
    found: Counter[object] = Counter()
    for sites in graphs:
        here = (
            (name, site.location, _weights(site) if name is None else ())
            for site in sites
            for name in dict.fromkeys(site.networks or site.modules)
        )
        found |= Counter(here)
    return found.total()


def _weights(site: SiteReport) -> tuple[str, ...]:
    return tuple(name for one in site.arguments if one.role in "KUV" for name in one.tensors)


def copied_bytes(site: SiteReport) -> float:
    """Of the weights of one network that are copied at each call."""
    return sum(argument.copied_bytes for argument in site.arguments)


def _seconds(each: Sequence[tuple[float | None, int]]) -> float | None:
    known = [seconds * calls for seconds, calls in each if seconds is not None]
    return sum(known) if len(known) == len(each) > 0 else None
