"""What a compilation reports about its graphs: counters, log lines, trace artifacts.

counters["flashmhf"]            graphs, sites rewritten and declined, each kind of reason,
                                and graphs that were not analysed
                                (the passes after autograd are counted where they run)
TORCH_LOGS="mhf_compiler"       a line for each site and near-miss; with "+" all details
TORCH_TRACE=folder              the graph before and after, the report and the fusions, for tlparse:
                                as text, and as JSON for programs
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..compat import counters, trace_artifact
from ..errors import first_time, only_reporting
from ..passes.outcome import Fusion
from .escape import visible, visible_lines
from .report import Report, plain
from .text import details, is_empty, line_for, line_for_fusion
from .values import GraphReport

log = logging.getLogger("mhf_compiler")


def announce(report: GraphReport) -> None:
    """Count, log and trace what happened to one graph."""
    _count(report)
    with only_reporting("the log of a graph"):
        _log(report)
        trace_artifact("flashmhf_before", "string", lambda: visible_lines(report.before))
        trace_artifact("flashmhf_after", "string", lambda: visible_lines(report.after))
        trace_artifact("flashmhf_report", "string", lambda: str(Report([report])))
        trace_artifact("flashmhf_report_json", "json", lambda: Report([report]).to_json())


def announce_fusions(fusions: Sequence[Fusion], notes: Sequence[str]) -> None:
    """Log and trace what the passes after autograd did to one of Inductor's graphs."""
    for fusion in fusions:
        log.info("%s", line_for_fusion(fusion))
    for note in notes:
        log.info("%s", visible(note))
    trace_artifact(
        "flashmhf_fusions",
        "string",
        lambda: "\n".join([*map(line_for_fusion, fusions), *map(visible, notes)]),
    )
    trace_artifact(
        "flashmhf_fusions_json",
        "json",
        lambda: json.dumps({"fusions": plain(fusions), "notes": plain(notes)}),
    )


def announce_nothing_rewritten(report: GraphReport) -> None:
    """Say once, also where nothing else is logged, that every candidate is left as it is."""
    reasons = Counter(site.reason.kind.name for site in report.declined if site.reason is not None)
    if report.rewritten or not reasons or counters["flashmhf"]["sites_rewritten"]:
        return
    if first_time("nothing rewritten"):
        log.warning(
            "flashmhf left all %d candidates for MH-FFNs as they are: %s. "
            "print(mhf_compiler.compilation_report()) says why; "
            "TORCH_LOGS=-mhf_compiler silences this line.",
            reasons.total(),
            ", ".join(f"{number} {kind}" for kind, number in reasons.most_common()),
        )


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show what is being waited for: one line of the terminal, erased at the end, or log lines.

    Prints nothing if there was nothing to wait for.
    """
    terminal = sys.stderr.isatty()
    shown = False

    def say(text: str) -> None:
        nonlocal shown
        if terminal:
            print(f"\r\x1b[Kflashmhf: {text}", end="", file=sys.stderr, flush=True)
            shown = True
        else:
            log.info("%s", text)

    try:
        yield say
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _count(report: GraphReport) -> None:
    tally = counters["flashmhf"]
    tally["graphs"] += 1
    for unread in report.unread:
        tally["unread"] += 1
        tally[f"unread.{unread.reason.kind.name}"] += 1
    # A graph inside of this one may be called for several layers.
    tally["sites_rewritten"] += sum(len(site.modules) for site in report.rewritten)
    tally["sites_declined"] += sum(len(site.modules) for site in report.declined)
    tally["ordinary"] += sum(len(site.modules) for site in report.ordinary)
    for site in report.declined:
        if site.reason is not None:
            tally[f"declined.{site.reason.kind.name}"] += len(site.modules)


def _log(report: GraphReport) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    for unread in report.unread:
        log.info("%s", unread)
    for site in [*report.rewritten, *report.declined]:
        log.info("%s", line_for(site))
        log.debug("%s", details(site))
    for site in report.ordinary:
        log.info("%s", visible(f"ordinary FFN, left to Inductor: {site.place}"))
    for note in report.notes:
        log.info("%s", visible(note))
    if is_empty([report]):
        log.info("nothing to rewrite among %d operations", report.operations)
        for product in report.products:
            place = visible(product.location or "unknown source")
            log.debug("looked at %s: %s", place, visible(product.call))
    if report.graph_break is not None:
        where = report.graph_break.location or "unknown source"
        (first, *_) = report.graph_break.reason.splitlines() or [""]
        log.info("graph break at %s: %s", visible(where), visible(first))
    if report.rewritten:
        log.debug("before:\n%s", visible_lines(report.before))
        log.debug("after:\n%s", visible_lines(report.after))
