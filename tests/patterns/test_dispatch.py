"""Axes that share weights: they count tokens unless something else needs them as heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mhf_compiler.patterns import Kind, Reason, Site, find_sites

G, S, d, f = 4, 6, 8, 5  # groups of weights, what shares them, head width, hidden units


def the_site(function: Callable[..., Any], *args: Tensor) -> Site:
    found: list[Site] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        context = torch._guards.TracingContext.get()
        findings = find_sites(gm, context.fake_mode.shape_env)
        assert not findings.near_misses
        found.extend(findings.sites)
        return gm.forward

    torch.compile(function, backend=backend)(*args)
    (site,) = found
    return site


def network(q: Tensor) -> Tensor:
    """Of queries (..., G, S, d)."""
    hidden = F.silu(torch.einsum("...gsd,gdf->...gsf", q, GATE)) * (q @ UP)
    return hidden @ DOWN


GATE, UP, DOWN = torch.randn(G, d, f), torch.randn(G, d, f), torch.randn(G, f, d)


def sizes(site: Site) -> tuple[Any, ...]:
    return (site.heads, site.groups, site.tokens)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((G * S, d), (1, S)), ((3, G * S, d), (3, S)), ((S + 1, G * S, d), (S, S + 1))],
    ids=["alone", "in batches", "in many batches"],
)
def test_rows_behind_each_head_are_tokens(shape: tuple[int, ...], tokens: tuple[int, int]):
    """The longer dimension is the one that kernels cut into tiles."""
    site = the_site(lambda x: network(x.unflatten(-2, (G, S))), torch.randn(shape))
    assert sizes(site) == (G, G, tokens)


def test_tokens_before_each_head_have_the_dimensions_of_the_query():
    """Whichever is longer: what is near in memory stays so."""
    site = the_site(lambda x: network(x.unsqueeze(-2)), torch.randn(7, 3, G, d))
    assert sizes(site) == (G, G, (7, 3))


def test_rows_behind_each_head_are_tokens_where_the_result_is_flat():
    """There are no other tokens: nothing needs the rows as heads."""

    def flat(x: Tensor) -> Tensor:
        return network(x.unflatten(-2, (G, S))).flatten(-2)

    assert sizes(the_site(flat, torch.randn(G * S, d))) == (G, G, (1, S))


def test_rows_behind_each_head_are_tokens_to_a_router_of_each_row():
    E = 3
    route, gate, down = torch.randn(G * d, E), torch.randn(G, E, d, f), torch.randn(G, E, f, d)

    def routed(x: Tensor) -> Tensor:
        q = x.unflatten(0, (G, S))
        r = (q.transpose(0, 1).flatten(1) @ route).softmax(-1)
        hidden = torch.relu(torch.einsum("gsd,gedf->gsef", q, gate)) * r[..., None]
        return torch.einsum("gsef,gefd->gsd", hidden, down).reshape(G, S * d)

    assert sizes(the_site(routed, torch.randn(G * S, d))) == (G, G, (1, S))


def test_rows_of_two_dimensions_of_tokens_are_heads():
    site = the_site(lambda x: network(x.unflatten(-2, (G, S))), torch.randn(2, 3, G * S, d))
    assert sizes(site) == (G * S, G, (2, 3))


def test_an_unknown_number_of_rows_are_tokens():
    """The number of heads is fixed."""

    def dispatched(x: Tensor) -> Tensor:
        return network(x.flatten(2, 3).sin().unflatten(2, (G, -1)))

    x = torch.randn(2, 3, G, S, d)
    torch._dynamo.mark_dynamic(x, 3)
    site = the_site(dispatched, x)
    assert (site.heads, site.groups) == (G, G)


def test_rows_before_each_head_are_tokens_whatever_the_result_merges():
    def flat(x: Tensor) -> Tensor:
        return network(x.unflatten(0, (2, 3, G, 1))).flatten(1)

    assert sizes(the_site(flat, torch.randn(2 * 3 * G, d))) == (G, G, (1, 6))


def test_rows_of_three_dimensions_that_the_result_merges_are_heads():
    """The op has two dimensions of tokens."""

    def flat(x: Tensor) -> Tensor:
        rows = x.unflatten(0, (G, 2, 3, S)).transpose(1, 3)  # [G, S, 3, 2, d]
        return network(rows.flatten(1, 3)).flatten(1)

    assert sizes(the_site(flat, torch.randn(G * 2 * 3 * S, d))) == (G * 2 * 3 * S, G, (1, 1))


def test_heads_cut_out_of_the_features_are_heads():
    site = the_site(lambda x: network(x.unflatten(-1, (G, S, d))), torch.randn(7, G * S * d))
    assert sizes(site) == (G * S, G, (1, 7))


def test_heads_merged_into_the_features_are_heads():
    def merged(x: Tensor) -> Tensor:
        return network(x.unflatten(-2, (G, S))).flatten(-3)

    assert sizes(the_site(merged, torch.randn(7, G * S, d))) == (G * S, G, (1, 7))


def test_heads_in_a_routers_features_are_heads():
    """The router's product gives the weights of all heads and sub-networks in one dimension."""
    E = 3
    route, gate, down = torch.randn(d, G * S * E), torch.randn(G, E, d, f), torch.randn(G, E, f, d)

    def routed(x: Tensor, z: Tensor) -> Tensor:
        q = x.unflatten(-2, (G, S))
        r = (z @ route).softmax(-1).view(-1, G, S, E)
        hidden = torch.relu(torch.einsum("ngsd,gedf->ngsef", q, gate)) * r[..., None]
        return torch.einsum("ngsef,gefd->ngsd", hidden, down)

    site = the_site(routed, torch.randn(7, G * S, d), torch.randn(7, d))
    assert sizes(site) == (G * S, G, (1, 7))


@pytest.mark.parametrize(
    ("dims", "kind", "detail"),
    [
        ((2, 2, 1), Kind.UNSUPPORTED_PROBLEM, "the number of hidden units is dynamic"),
        ((1, 1, 2), Kind.UNSUPPORTED_PROBLEM, "the number of features of a head is dynamic"),
        ((0, 0, 0), Kind.TOKEN_DEPENDENT_WEIGHTS, "a batch of weights, or a dynamic number"),
    ],
    ids=["hidden", "width", "heads"],
)
def test_dynamic_sizes_of_weights_are_named(dims: tuple[int, ...], kind: Kind, detail: str):
    reasons: list[Reason] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        context = torch._guards.TracingContext.get()
        findings = find_sites(gm, context.fake_mode.shape_env)
        assert not findings.sites
        reasons.extend(miss.reason for miss in findings.near_misses)
        return gm.forward

    def given(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.bmm(F.silu(torch.bmm(x, gate)) * torch.bmm(x, up), down)

    x, weights = torch.randn(G, S, d), (GATE.clone(), UP.clone(), DOWN.clone())
    for w, dim in zip(weights, dims, strict=True):
        torch._dynamo.mark_dynamic(w, dim)
    if dims[0] != 2:
        torch._dynamo.mark_dynamic(x, 0 if dims[0] == 0 else 2)
    torch.compile(given, backend=backend)(x, *weights)
    (reason,) = reasons
    assert reason.kind is kind
    assert detail in reason.detail
