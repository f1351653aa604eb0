"""Graphs that are kept, to ask which of them a change reads differently."""

from collections.abc import Callable

import torch
from support.graphs import graph_of
from torch import Tensor

from mhf_compiler.patterns import find_sites

from .graphs import kept_graphs


def test_graphs_in_which_nothing_is_found_are_kept_each():
    def products(between: Callable[[Tensor], Tensor], rows: int = 4) -> None:
        find_sites(graph_of(lambda x: between(x @ x) @ x, torch.randn(rows, rows)))

    with kept_graphs() as graphs:
        for between in (torch.sin, torch.cos, torch.sin):
            products(between)
        products(torch.sin, rows=5)
    for graph in graphs:
        graph.said = graph.read()
    sine, cosine, again, larger = (graph.key() for graph in graphs)
    assert sine == again
    assert len({sine, cosine, larger}) == 3
