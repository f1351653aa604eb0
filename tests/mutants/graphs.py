"""The graphs that tests read, kept, so that a change can be asked which it reads differently.

A test takes a second, most of it in Dynamo and in what compiles the graph; to read its graph again
takes a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:  # PyTorch asks for the number of threads when it is imported
    import torch
    from torch import fx

#: more of one test are not kept
_MOST = 12


@dataclass
class KeptGraph:
    """One graph as the back end, ``explain`` or ``find_sites`` was given it.

    Attributes:
        gm: a copy of it.
        answer: what is made of it: the report and the edited graph, or what was found, before
            routers and along heads as well.
        modes: whether gradients are recorded, and the dtype of autocast on a CPU, or None.
        alive: example tensors that the graph itself refers to weakly.
        said: the answer without a change.
    """

    gm: fx.GraphModule
    answer: Callable[[fx.GraphModule], str]
    modes: tuple[bool, torch.dtype | None]
    alive: list[Any]
    said: str = ""

    def read(self) -> str:
        """Read the graph as it was read first. It stays as it is."""
        import torch

        from mhf_compiler.substitution.graph import Originals

        grad, autocast = self.modes
        originals = Originals(self.gm)
        try:
            with (
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
            ):
                return self.answer(self.gm)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            originals.restore()

    def key(self) -> Hashable:
        """Equal for graphs that are the same, as far as reading them shows anything.

        The answer alone does not do: nothing is found in many a graph, each for its own reason.
        """
        inputs = self.gm.graph.find_nodes(op="placeholder")
        known = [node.meta.get("example_value", node.meta.get("val")) for node in inputs]
        return self.gm.code, repr(known), self.modes, self.said


@contextmanager
def kept_graphs() -> Iterator[list[KeptGraph]]:
    """All that is read meanwhile."""
    from mhf_compiler.patterns import find_heads, find_router_products, recognise
    from mhf_compiler.report.values import GraphReport
    from mhf_compiler.substitution import graph

    found: list[KeptGraph] = []
    rewriting = False
    rewrite_all, trace = graph._rewrite_all, recognise.trace

    def rewritten(gm: fx.GraphModule, options: Any, training: bool) -> str:
        report = GraphReport(before="", after="", operations=0)
        rewrite_all(gm, options, report, None, training)
        left = (report.declined, report.ordinary, report.unread, report.notes)
        return repr((report.after, report.rewritten, left))

    def sites(gm: fx.GraphModule, shape_env: Any) -> str:
        findings = recognise.find_sites(gm, shape_env)
        seen = [
            {f.name: getattr(site, f.name) for f in fields(site) if f.name != "replaces"}
            for site in findings.sites
        ]
        products: Any = []
        if findings.copy is not None:
            products = find_router_products(findings.sites, findings.copy)
        heads = [[*find_heads(site)] for site in findings.sites]
        asked = findings.looked_at, findings.unreadable, products, heads
        return repr((seen, findings.near_misses, *asked))

    def keep_rewritten(gm: fx.GraphModule, options: Any, *rest: Any) -> None:
        nonlocal rewriting
        if len(found) < _MOST:
            found.append(_kept(gm, lambda gm: rewritten(gm, options, rest[-1])))
        rewriting = True
        try:
            rewrite_all(gm, options, *rest)
        finally:
            rewriting = False

    def keep_read(gm: fx.GraphModule, shape_env: Any = None) -> Any:
        if not rewriting and len(found) < _MOST:
            found.append(_kept(gm, lambda gm: sites(gm, shape_env)))
        return trace(gm, shape_env)

    with (
        mock.patch.object(graph, "_rewrite_all", keep_rewritten),
        mock.patch.object(recognise, "trace", keep_read),
    ):
        yield found


def _kept(gm: fx.GraphModule, answer: Callable[[fx.GraphModule], str]) -> KeptGraph:
    import torch

    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    alive = [node.meta["grapharg"].example for node in gm.graph.nodes if node.meta.get("grapharg")]
    return KeptGraph(_copied(gm), answer, (torch.is_grad_enabled(), autocast), alive)


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graphs, with the same parameters and examples."""
    from torch import fx

    graph = fx.Graph()
    graph._codegen = gm.graph._codegen
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copy, name, _copied(child))
    return copy
