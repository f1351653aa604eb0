"""One graph, from recognition to the edited graph and its report.

``rewrite_graph`` is what the back end and ``explain`` share: find the sites, drop those that do not
pay or that do not run on this machine, write the op into a copy of the graph, and take the copy
when it is whole. Graphs inside higher-order operations, such as activation checkpointing, are
treated in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .announcing import announce, progress
from .compat import (
    cache_folder,
    counters,
    has_symbols,
    no_fake_mode,
    run_pass,
    tracing_shape_env,
)
from .describing import graph_break, matrix_products, near_miss_report, site_report
from .edit import EditError, rewrite
from .options import Options, inductor_config, tunes
from .patterns import (
    STACK,
    CanonicalCopy,
    Findings,
    Kind,
    Location,
    Reason,
    RouterProduct,
    Site,
    Value,
    find_router_products,
    find_sites,
    inner_graphs,
    locate,
)
from .report import GraphReport, SiteReport

if TYPE_CHECKING:
    from .lowering.cost import Estimate
    from .lowering.workload import Workload


PASS = "flashmhf"  # its name among Inductor's passes, to disable it by


class MhfCompilerWarning(UserWarning):
    """Something was left in its original spelling."""


@dataclass(frozen=True)
class _Judged:
    """A proved site, its sizes, what was estimated from them, and what comes before its router."""

    site: Site
    workload: Workload
    estimate: Estimate
    products: tuple[RouterProduct, ...] = ()

    def report(self, reason: Reason | None = None) -> SiteReport:
        return site_report(self.site, self.workload, self.estimate, reason, self.products)


Keep = Callable[[fx.GraphModule, Site], None]


def rewrite_graph(gm: fx.GraphModule, options: Options, keep: Keep | None = None) -> GraphReport:
    """Put the op in place of every site of ``gm``, in place, and report what was done.

    The graph of ``gm`` is replaced only when the whole edit has succeeded. Then ``keep`` is called
    for each of ``report.rewritten``, in that order, with the site and the graph that it lies in.
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
    report.looked_at += findings.looked_at
    if findings.untraceable is not None:
        report.notes.append(f"a graph could not be analysed: {findings.untraceable}")
    report.declined += [near_miss_report(miss) for miss in findings.near_misses]
    if not findings.sites and not findings.near_misses:
        report.products += matrix_products(gm)
    accepted: list[_Judged] = []
    for site in findings.sites:
        judged = _judge(site, options)
        reason = _objection(judged, options)
        if reason is None:
            accepted.append(judged)
        else:
            report.declined.append(judged.report(reason))
    for judged in _write(gm, accepted, findings, report):
        report.rewritten.append(judged.report())
        if keep is not None:
            keep(gm, judged.site)


def _shape_env(gm: fx.GraphModule) -> Any | None:
    """The shape environment under way, if a size in this graph is symbolic.

    Fake tensors with an environment cost a third more, and most graphs have no use for one.
    """
    symbolic = any(has_symbols(node.meta.get("example_value")) for node in gm.graph.nodes)
    return tracing_shape_env() if symbolic else None


def _write(
    gm: fx.GraphModule, accepted: list[_Judged], findings: Findings, report: GraphReport
) -> list[_Judged]:
    """Edit the graph; a site that cannot be expressed is declined and the rest tried again."""
    if not accepted:
        return []
    copy = findings.copy
    assert copy is not None
    import mhf_compiler.lowering  # noqa: F401  (defines the ops)

    # The products before the sites' routers that need no float32 copy of the queries.
    found = find_router_products([judged.site for judged in accepted], copy)
    accepted = [
        replace(judged, products=tuple(filter(_runs, products)))
        for judged, products in zip(accepted, found, strict=True)
    ]
    try:
        gm.graph, accepted = _with_products(gm.graph, accepted, copy)
    except EditError as error:
        rest = [judged for judged in accepted if judged.site is not error.site]
        if not isinstance(error.site, Site) or len(rest) == len(accepted):
            raise
        (inexpressible,) = (judged for judged in accepted if judged.site is error.site)
        reason = Reason(Kind.UNSUPPORTED_LAYOUT, str(error), error.site.output_node)
        report.declined.append(inexpressible.report(reason))
        return _write(gm, rest, findings, report)
    gm.recompile()
    return accepted


def _runs(product: RouterProduct) -> bool:
    """Whether there is a kernel for a product, and it runs on this machine."""
    from .lowering.router import takes, trial_run

    query, weight = product.query.value, product.weight.value
    shape = [int(size) for size in product.weight.shape]
    if not takes(query.dtype, weight.dtype, *shape[1:]):
        return False
    try:
        with no_fake_mode():
            training = product.output.requires_grad_mode
            trial_run(query.dtype, weight.dtype, shape, query.device, training)
    except Exception as error:
        warn_of_failure("the product before a router", locate(product.output_node), error)
        return False
    return True


def _with_products(
    graph: fx.Graph, accepted: list[_Judged], copy: CanonicalCopy
) -> tuple[fx.Graph, list[_Judged]]:
    """The edited graph, and what was written into it.

    A router's product that cannot be expressed stays as it was written.
    """
    # Sites may share a router.
    products = {p.output: p for judged in accepted for p in judged.products}
    try:
        sites = [judged.site for judged in accepted]
        return rewrite(graph, [*products.values(), *sites], copy), accepted
    except EditError as error:
        if not isinstance(error.site, RouterProduct):
            raise
        lost = error.site.output
        rest = [
            replace(judged, products=tuple(p for p in judged.products if p.output is not lost))
            for judged in accepted
        ]
        return _with_products(graph, rest, copy)


def _judge(site: Site, options: Options) -> _Judged:
    from .lowering.cost import estimate

    workload = workload_of(site, options)
    return _Judged(site, workload, estimate(workload))


def _objection(judged: _Judged, options: Options) -> Reason | None:
    """Why a proved site is not rewritten here, if there is a reason."""
    from .lowering.arguments import differentiates_forward
    from .lowering.workload import trial_run, tune, unsupported

    site = judged.site
    message = unsupported(judged.workload)
    if message is not None:
        return Reason(Kind.UNSUPPORTED_PROBLEM, message, site.output_node)
    if differentiates_forward(torch.empty(0)):
        return Reason(Kind.FORWARD_MODE, node=site.output_node)
    if options.rewrite == "auto" and not judged.estimate.pays:
        return Reason(Kind.DOES_NOT_PAY, str(judged.estimate), site.output_node)
    try:
        with no_fake_mode():
            if tunes(options):
                with progress() as say:
                    tune(judged.workload, cache_folder(), say)
            trial_run(judged.workload)
    except Exception as error:
        warn_of_failure("the MH-FFN", site.location, error)
        return Reason(Kind.KERNEL_FAILED, str(error).splitlines()[0], site.output_node)
    return None


def warn_of_failure(what: str, location: Location | None, error: Exception | str) -> None:
    warnings.warn(
        f"the kernel for {what} at {_place(location)} failed; it is left as it was: {error}",
        MhfCompilerWarning,
        stacklevel=2,
    )
    counters["flashmhf"]["failures"] += 1


def workload_of(site: Site, options: Options) -> Workload:
    """The sizes of a site, for the lowering room, which knows no graphs."""
    from .lowering.workload import Workload

    batch, length = (_hint(size) for size in site.tokens)
    return Workload(
        batch=batch,
        length=length,
        heads=site.heads,
        kuv_heads=site.kuv_heads,
        head_dim=site.head_dim,
        experts=site.experts,
        expert_dim=site.expert_dim,
        gated=site.gated,
        routed=site.has_gate,
        biased=(
            site.gate_bias is not None,
            site.up_bias is not None,
            site.down_bias is not None,
        ),
        activation=site.activation,
        dtype=site.dtype,
        out_dtype=site.out_dtype,
        device=site.device,
        training=site.output.requires_grad_mode,
        pieces=(
            _pieces(site.gate.value),
            1 if site.up is None else _pieces(site.up.value),
            _pieces(site.down.value),
        ),
        captured=bool(inductor_config(options).get("triton.cudagraphs")),
    )


def _pieces(value: Value) -> int:
    """How many tensors of the graph a weight is stacked from; modules may be nested."""
    return sum(map(_pieces, value.args)) if value.op == STACK else 1


def _hint(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _place(location: Location | None) -> str:
    return "an unknown place" if location is None else str(location)
