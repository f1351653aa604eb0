"""One graph, from recognition to the edited graph and its report.

``rewrite_graph`` is shared by the back end and ``explain``: find the sites, decide which of them
are rewritten, write the op into a copy of the graph, and take the copy once it is complete. Graphs
inside higher-order operations, such as activation checkpointing, are treated in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..compat import has_symbols, run_pass, tracing_shape_env
from ..options import Options
from ..patterns import (
    CanonicalCopy,
    Findings,
    Reason,
    RouterProduct,
    Site,
    find_router_products,
    find_sites,
    inner_graphs,
)
from ..report.describe import graph_break, matrix_products, near_miss_report, site_report
from ..report.logs import announce
from ..report.values import GraphReport, SiteReport
from . import guard
from .edit import rewrite
from .emit import EditError
from .judge import Decision, decide, product_runs

PASS = "flashmhf"  # its name among Inductor's passes, to disable it by

Keep = Callable[[fx.GraphModule, Site], None]


def rewrite_graph(gm: fx.GraphModule, options: Options, keep: Keep | None = None) -> GraphReport:
    """Put the op in place of every site of ``gm``, in place, and report what was done.

    The graph of ``gm`` is replaced only if the whole edit has succeeded. Then ``keep`` is called
    for each of ``report.rewritten``, in that order, with the site and the graph that contains it.
    """
    before = gm.print_readable(print_output=False)
    report = GraphReport(before=before, after=before, operations=len(gm.graph.nodes))
    report.graph_break = graph_break(gm)
    if options.rewrite == "never":
        report.notes.append("the graph was not looked at: option 'rewrite' is 'never'")
    elif not run_pass(gm, PASS, lambda gm: _rewrite_module(gm, options, report, keep)):
        report.notes.append(f"the pass {PASS!r} is disabled, or left out by a bisection")
    if report.rewritten:
        report.after = gm.print_readable(print_output=False)
    announce(report)
    return report


def _rewrite_module(
    gm: fx.GraphModule, options: Options, report: GraphReport, keep: Keep | None
) -> None:
    for inner, modes in inner_graphs(gm):
        if modes is None:
            report.notes.append(
                "an inner graph was not looked at: it is called under torch.inference_mode, under "
                "several modes of autocast or gradients, or under modes that are not known"
            )
        else:
            with modes.entered():
                _rewrite_module(inner, options, report, keep)
    findings = find_sites(gm, _shape_env(gm))
    decisions = [decide(site, options) for site in findings.sites]
    decisions = _write(gm, decisions, findings)
    _describe(gm, findings, decisions, report)
    if keep is not None:
        for decision in decisions:
            if decision.reason is None:
                keep(gm, decision.site)


def _describe(
    gm: fx.GraphModule, findings: Findings, decisions: Sequence[Decision], report: GraphReport
) -> None:
    """Add what was found and decided to the report."""
    report.looked_at += findings.looked_at
    if findings.untraceable is not None:
        report.notes.append(f"a graph could not be analysed: {findings.untraceable}")
    if not findings.sites and not findings.near_misses:
        report.products += matrix_products(gm)
    report.declined += [near_miss_report(miss) for miss in findings.near_misses]
    for decision in decisions:
        sites = report.rewritten if decision.reason is None else report.declined
        sites.append(_site_report(decision))


def _site_report(decision: Decision) -> SiteReport:
    return site_report(
        decision.site, decision.workload, decision.estimate, decision.reason, decision.products
    )


def _shape_env(gm: fx.GraphModule) -> Any | None:
    """The current shape environment, if a size in this graph is symbolic.

    Fake tensors with an environment cost a third more, and most graphs need none.
    """
    symbolic = any(has_symbols(node.meta.get("example_value")) for node in gm.graph.nodes)
    return tracing_shape_env() if symbolic else None


# The edit.


def _write(gm: fx.GraphModule, decisions: Sequence[Decision], findings: Findings) -> list[Decision]:
    """Edit the graph; decline a site that cannot be expressed, and try the rest again."""
    accepted = [decision for decision in decisions if decision.reason is None]
    if not accepted:
        return list(decisions)
    copy = findings.copy
    assert copy is not None
    import mhf_compiler.lowering  # noqa: F401  (defines the ops)

    # The products before the sites' routers that need no float32 copy of the queries.
    found = find_router_products([decision.site for decision in accepted], copy)
    products = {
        decision.site: tuple(filter(product_runs, before))
        for decision, before in zip(accepted, found, strict=True)
    }
    try:
        gm.graph, products = _with_products(gm.graph, products, copy, _shape_env(gm))
    except EditError as error:
        if error.site not in products:
            raise
        reason = Reason(error.kind, str(error), error.site.output_node)
        declined = [replace(d, reason=reason) if d.site is error.site else d for d in decisions]
        return _write(gm, declined, findings)
    gm.recompile()
    return [replace(d, products=products.get(d.site, ())) for d in decisions]


_Products = dict[Site, tuple[RouterProduct, ...]]  # of the sites that are rewritten


def _with_products(
    graph: fx.Graph, products: _Products, copy: CanonicalCopy, shape_env: Any | None
) -> tuple[fx.Graph, _Products]:
    """The edited graph, and what was written into it.

    A router's product that cannot be expressed keeps its original spelling.
    """
    # Sites may share a router.
    shared = {product.output: product for before in products.values() for product in before}
    try:
        edit = rewrite(graph, [*shared.values(), *products], copy)
        guard.check(edit, copy, shape_env)
        return edit.graph, products
    except EditError as error:
        if not isinstance(error.site, RouterProduct):
            raise
        lost = error.site.output
        rest = {
            site: tuple(product for product in before if product.output is not lost)
            for site, before in products.items()
        }
        return _with_products(graph, rest, copy, shape_env)
