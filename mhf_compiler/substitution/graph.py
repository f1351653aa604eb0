"""One graph, from recognition to the edited graph and its report.

``rewrite_graph`` is shared by the back end and ``explain``: find the sites, decide which of them
are rewritten, write the op into a copy of the graph, and take the copy once it is complete. Graphs
inside higher-order operations, such as activation checkpointing, are treated in the same way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import fx

from ..calls import in_all_calls
from ..compat import (
    device_mesh,
    example_of,
    has_examples_of_dynamo,
    no_saved_tensor_hooks,
    run_pass,
    shape_env_of,
)
from ..errors import NotAnalysedError, fault, only_reporting, warn_once
from ..options import Options
from ..patterns import (
    CanonicalCopy,
    Findings,
    Kind,
    Reason,
    RouterProduct,
    Site,
    Unreadable,
    find_router_products,
    find_sites,
    inner_graphs,
    is_summed_product_call,
)
from ..report.describe import (
    graph_break,
    matrix_products,
    modules_of,
    name_of_input,
    near_miss_report,
    site_report,
    unfollowed_products,
    unread_graph,
)
from ..report.logs import announce
from ..report.values import GraphReport, SiteReport
from . import guard, shards
from .aten import spell_in_aten
from .edit import rewrite
from .emit import EditError
from .judge import Decision, decide, product_runs
from .regions import calls_in
from .verify import VerificationError, disagreement

if TYPE_CHECKING:
    from ..lowering.device import Card

PASS = "flashmhf"  # its name among Inductor's passes, to disable it by

Keep = Callable[[fx.GraphModule, Site], None]


def rewrite_graph(
    gm: fx.GraphModule,
    options: Options,
    keep: Keep | None = None,
    *,
    training: bool = True,
    card: Card | None = None,
    packaged: bool = False,
) -> GraphReport:
    """Put the op in place of every site of ``gm``, in place, and report what was done.

    Whatever fails leaves all graphs as they were: it is counted, told once and reported.

    Args:
        gm: a graph of Dynamo's, or a copy of an exported program's.
        options: the back end's.
        keep: is called for each of ``report.rewritten``, in that order, with the site and the graph
            that contains it.
        training: whether to expect a backward pass where gradients are recorded.
        card: one that is assumed, of which nothing is tried.
        packaged: whether the graph is for a package of AOTInductor's, which has kernels of its own.

    Raises:
        NotAnalysedError: under ``strict``, a graph could not be analysed.
        Exception: under ``strict``, whatever has failed.
    """
    before = gm.print_readable(print_output=False)
    report = GraphReport(before=before, after=before, operations=len(gm.graph.nodes))
    if options.rewrite == "never":
        report.notes.append("the graph was not looked at: option 'rewrite' is 'never'")
    else:
        # What is saved here is no tensor of the user's, whose hooks may be set.
        with no_saved_tensor_hooks(), _no_collection():
            judge = partial(
                decide, options=options, training=training, card=card, packaged=packaged
            )
            _rewrite_all(gm, options, report, keep, judge)
    with only_reporting("the report of a graph"):
        report.modules = modules_of(gm)
        report.graph_break = graph_break(gm)
        announce(report)
    return report


def _rewrite_all(
    gm: fx.GraphModule,
    options: Options,
    report: GraphReport,
    keep: Keep | None,
    judge: Callable[[Site], Decision],
) -> None:
    """Rewrite a graph and those inside of it, or none of them."""
    originals = Originals(gm)
    kept: list[tuple[fx.GraphModule, Site]] = []
    told: list[_Told] = []
    try:
        if not run_pass(
            gm, PASS, lambda gm: _rewrite_module(gm, options, report, kept, told, judge)
        ):
            report.notes.append(f"the pass {PASS!r} is disabled, or left out by a bisection")
        if report.rewritten:
            report.after = gm.print_readable(print_output=False)
    except Exception as error:
        originals.restore()
        report.rewritten.clear()
        report.declined.clear()
        report.ordinary.clear()
        what = f"{type(error).__name__}: {error}"
        report.unread = [unread_graph(Reason(Unreadable.COMPILER_FAULT, what))]
        message = "rewriting failed, the graph is compiled as it is"
        fault("rewrite", message, error, strict=options.strict)
        return
    for unread in report.unread:
        if options.strict:
            originals.restore()
            raise NotAnalysedError(str(unread))
        warn_once(str(unread))
    inner = [one for one in told if one[0] is not gm]
    if inner:
        with only_reporting("the calls of a graph inside of another"):
            _name_inner_sites(gm, inner)
    if keep is not None:
        for module, site in kept:
            keep(module, site)


#: a graph, and where the report of what was found in it is: in which list, and at which place
_Told = tuple[fx.GraphModule, list[SiteReport], int]


def _name_inner_sites(gm: fx.GraphModule, inner: Sequence[_Told]) -> None:
    """Give what was found in graphs inside of ``gm`` its names, and the modules of all calls."""
    calls = calls_in(gm)
    for module, sites, place in inner:
        given = [
            {name: name_of_input(node) for name, node in call.items()}
            for call in calls.get(module, [])
        ]
        sites[place] = in_all_calls(sites[place], given)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for circular garbage, of which reading a graph leaves next to none.

    It is set off by the number of new objects, goes through all that Dynamo has made, and took a
    fifth of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Originals:
    """The graphs of a module and of those inside of it, as they were."""

    def __init__(self, gm: fx.GraphModule) -> None:
        modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
        self.graphs = [(module, module.graph) for module in modules]

    @property
    def were_replaced(self) -> bool:
        return any(module.graph is not graph for module, graph in self.graphs)

    def restore(self) -> None:
        for module, graph in self.graphs:
            if module.graph is not graph:
                module.graph = graph


def _rewrite_module(
    gm: fx.GraphModule,
    options: Options,
    report: GraphReport,
    kept: list[tuple[fx.GraphModule, Site]],
    told: list[_Told],
    judge: Callable[[Site], Decision],
    is_inner: bool = False,
) -> None:
    for inner, modes in inner_graphs(gm):
        if isinstance(modes, Unreadable):
            products = [node for node in inner.graph.nodes if is_summed_product_call(node)]
            if len(products) > 1:
                report.unread.append(unread_graph(Reason(modes, node=products[0])))
        else:
            with modes.entered():
                _rewrite_module(inner, options, report, kept, told, judge, is_inner=True)
    findings = find_sites(gm, shape_env_in(gm))
    decisions = [_on_shards(judge(site), gm, findings) for site in findings.sites]
    if options.verify:
        decisions = [_verified(decision, gm, findings, options) for decision in decisions]
    # Inductor's own code returns no views; all else returns what the graph does.
    copies_returned = is_inner or options.fallback != "inductor"
    decisions = _write(gm, decisions, findings, options.strict, copies_returned)
    lists = report.rewritten, report.declined, report.ordinary
    before = [len(sites) for sites in lists]
    _describe(gm, findings, decisions, report)
    for sites, start in zip(lists, before, strict=True):
        told += [(gm, sites, place) for place in range(start, len(sites))]
    kept += [(gm, decision.site) for decision in decisions if decision.reason is None]


def _on_shards(decision: Decision, gm: fx.GraphModule, findings: Findings) -> Decision:
    """Decline a site over DTensors whose shards the op would have to send around."""
    site, copy = decision.site, findings.copy
    if decision.reason is not None or copy is None:
        return decision
    try:
        message = shards.objection(gm, site, copy)
    except EditError:  # as _write finds out
        return decision
    if message is None:
        return decision
    return replace(decision, reason=Reason(Kind.NOT_ON_SHARDS, message, site.output_node))


def _verified(
    decision: Decision, gm: fx.GraphModule, findings: Findings, options: Options
) -> Decision:
    """Decline a site that does not compute what its original spelling computes."""
    if decision.reason is not None:
        return decision
    site = decision.site
    assert findings.copy is not None
    try:
        wrong = disagreement(gm, site, findings.copy)
    except EditError as error:  # what cannot be compared is not rewritten
        return replace(decision, reason=Reason(error.kind, str(error), site.output_node))
    if wrong is None:
        return decision
    message = f"a site at {site.location} is not rewritten"
    fault("verify", message, VerificationError(wrong), strict=options.strict)
    return replace(decision, reason=Reason(Kind.NOT_VERIFIED, wrong, site.output_node))


def _describe(
    gm: fx.GraphModule, findings: Findings, decisions: Sequence[Decision], report: GraphReport
) -> None:
    """Add what was found and decided to the report."""
    report.looked_at += findings.looked_at
    if findings.unreadable is not None:
        report.unread.append(unread_graph(findings.unreadable))
    if not findings.sites and not findings.near_misses:
        report.products += matrix_products(gm)
    unfollowed = {} if findings.copy is None else findings.copy.unfollowed
    report.notes += [unfollowed_products(name, nodes) for name, nodes in unfollowed.items()]
    for miss in findings.near_misses:
        ordinary = miss.reason.kind is Kind.PLAIN_FFN
        (report.ordinary if ordinary else report.declined).append(near_miss_report(miss))
    for decision in decisions:
        sites = report.rewritten if decision.reason is None else report.declined
        sites.append(_site_report(decision))


def _site_report(decision: Decision) -> SiteReport:
    return site_report(
        decision.site, decision.workload, decision.estimate, decision.reason, decision.products
    )


def shape_env_in(gm: fx.GraphModule) -> Any | None:
    """The shape environment of the symbolic sizes in this graph; None if there are none.

    Fake tensors with an environment cost a third more, and most graphs need none.
    """
    found = (shape_env_of(example_of(node)) for node in gm.graph.nodes)
    return next((env for env in found if env is not None), None)


# The edit.


def _write(
    gm: fx.GraphModule,
    decisions: Sequence[Decision],
    findings: Findings,
    strict: bool,
    copies_returned: bool,
) -> list[Decision]:
    """Edit the graph; decline a site that cannot be expressed, and try the rest again."""
    accepted = [decision for decision in decisions if decision.reason is None]
    if not accepted:
        return list(decisions)
    copy = findings.copy
    assert copy is not None
    import mhf_compiler.lowering  # noqa: F401  (defines the ops)

    # The products before the sites' routers that need no float32 copy of the queries.
    whole = [d.site for d in accepted if device_mesh(example_of(d.site.output_node)) is None]
    found = dict(zip(whole, find_router_products(whole, copy), strict=True))
    products = {
        d.site: tuple(product for product in found.get(d.site, ()) if product_runs(product, strict))
        for d in accepted
    }
    try:
        gm.graph, products = _with_products(
            gm.graph, products, copy, shape_env_in(gm), copies_returned=copies_returned
        )
    except EditError as error:
        if error.site not in products:
            raise
        reason = Reason(error.kind, str(error), error.site.output_node)
        declined = [replace(d, reason=reason) if d.site is error.site else d for d in decisions]
        return _write(gm, declined, findings, strict, copies_returned)
    gm.recompile()
    return [replace(d, products=products.get(d.site, ())) for d in decisions]


_Products = dict[Site, tuple[RouterProduct, ...]]  # of the sites that are rewritten


def _with_products(
    graph: fx.Graph,
    products: _Products,
    copy: CanonicalCopy,
    shape_env: Any | None,
    *,
    copies_returned: bool,
) -> tuple[fx.Graph, _Products]:
    """The edited graph, and what was written into it.

    A router's product that cannot be expressed keeps its original spelling.
    """
    # Sites may share a router.
    shared = {product.output: product for before in products.values() for product in before}
    try:
        edit = rewrite(graph, [*shared.values(), *products], copy, copies_returned=copies_returned)
        if not any(map(has_examples_of_dynamo, graph.nodes)):
            spell_in_aten(edit, copy, shape_env)
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
        return _with_products(graph, rest, copy, shape_env, copies_returned=copies_returned)
