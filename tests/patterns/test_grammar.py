"""Outputs that are read, and the nearest ones that are not, in graphs as they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import dynamic_graph_of, graph_of, records_gradients
from torch import Tensor, fx, nn

from mhf_compiler.patterns import Kind, Reason, Site, find_sites
from mhf_compiler.patterns.grammar import _projected_by, read_output
from mhf_compiler.patterns.reasons import Declined
from mhf_compiler.patterns.recognise import Findings, _anchors, _path
from mhf_compiler.patterns.tracer import trace

T, H, E, d, f = 6, 4, 3, 8, 5


class Ffn(nn.Module):
    """Weights of heads, or of sub-networks; ``compute`` says what becomes of them and inputs."""

    def __init__(self, compute: Callable[..., Any], inputs: int = 1, n: int = H) -> None:
        super().__init__()
        self.compute, self.inputs = compute, inputs
        shapes = (n, d, f), (n, d, f), (n, f, d), (n, d)
        self.gate, self.up, self.down, self.bias = (nn.Parameter(torch.randn(s)) for s in shapes)
        self.fixed = nn.Buffer(torch.randn(n, 1, f * d))

    def hidden(self, q: Tensor) -> Tensor:
        """(n, T, d), or (T, d) for all of them, to (n, T, f)."""
        return F.silu(q @ self.gate) * (q @ self.up)

    def one(self, q: Tensor, e: int) -> Tensor:
        """(T, d) to the hidden units (T, f) of one."""
        return F.silu(q @ self.gate[e]) * (q @ self.up[e])

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


class FfnOfTwo(Ffn):
    def forward(self, x: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.compute(self, x, z)


def found(compute: Callable[..., Any], *inputs: Tensor) -> Findings:
    model = (Ffn, FfnOfTwo)[len(inputs) - 1](compute)
    return find_sites(graph_of(model, *inputs))


def the_site(compute: Callable[..., Any], *inputs: Tensor) -> Site:
    (site,) = found(compute, *inputs).sites
    return site


def reasons(findings: Findings) -> list[Kind | Any]:
    assert not findings.sites
    return [miss.reason.kind for miss in findings.near_misses]


def refused(compute: Callable[..., Any], *inputs: Tensor) -> Reason:
    """Why what is returned cannot be read as the output of a network."""
    gm = graph_of((Ffn, FfnOfTwo)[len(inputs) - 1](compute), *inputs)
    copy = trace(gm)
    outside = frozenset(value for anchor in _anchors(copy) for value in _path(anchor, copy, set()))
    (root,) = copy.reads[gm.graph.output_node()].values()
    with pytest.raises(Declined) as declined:
        read_output(root, outside)
    return declined.value.reason


HEADS = torch.randn(H, T, d)
TOKENS = torch.randn(T, d)
ONE = torch.randn(1, d)


# Sums over sub-networks.


def test_a_mean_over_no_sub_networks_is_none():
    assert "mean" in refused(lambda m, x: (m.hidden(x) @ m.down)[:0].mean(0), TOKENS).detail


def test_a_mean_is_over_a_known_number_of_sub_networks():
    def mean(gate: Tensor, down: Tensor, x: Tensor) -> Tensor:
        return (F.silu(x @ gate) @ down).mean(0)

    graph, shape_env = dynamic_graph_of(
        mean, torch.randn(E, d, f), torch.randn(E, f, d), torch.randn(T, d)
    )
    (miss,) = find_sites(graph, shape_env).near_misses
    assert miss.reason.kind is Kind.UNSUPPORTED_PROBLEM


def routed_by_a_product(m: Ffn, x: Tensor, beta: float, alpha: float) -> Tensor:
    """Router times weights of each sub-network as one product, [H, T, f * d]."""
    router = x[..., :H].sigmoid().t().unsqueeze(-1)
    weights = m.down.flatten(1).unsqueeze(1)
    down = torch.baddbmm(m.fixed, router, weights, beta=beta, alpha=alpha)
    hidden = m.hidden(x).unsqueeze(-2)  # [H, T, 1, f]
    out = hidden @ down.view(H, T, f, d)
    return out.squeeze(-2).sum(0)


def test_a_router_may_be_multiplied_with_the_weights_by_a_product():
    site = the_site(lambda m, x: routed_by_a_product(m, x, 0.0, 1.0), TOKENS)
    assert site.routed
    assert site.sub_networks == H


@pytest.mark.parametrize(
    ("beta", "alpha"), [(0.0, 2.0), (1.0, 1.0)], ids=["scaled", "added to something"]
)
def test_a_product_that_does_more_is_no_router(beta: float, alpha: float):
    compute = lambda m, x: routed_by_a_product(m, x, beta, alpha)  # noqa: E731
    assert reasons(found(compute, TOKENS)) == [Kind.TOKEN_DEPENDENT_WEIGHTS]


@pytest.mark.parametrize("first", [True, False])
def test_a_router_may_move_along_sub_networks_that_are_all_the_same(first: bool):
    """On either side of the product: (E, T, 1) and the output (T, d)."""

    def compute(m: Ffn, x: Tensor) -> Tensor:
        router, y = x[:, :E].sigmoid().t().unsqueeze(-1), m.one(x, 0) @ m.down[0]
        return (router * y if first else y * router).mean(0)

    site = the_site(compute, TOKENS)
    assert site.routed
    assert site.sub_networks == E


@pytest.mark.parametrize(
    ("weights", "routed"),
    [(lambda w, r: w * r, True), (lambda w, r: w + r, False)],
    ids=["multiplied", "added"],
)
def test_only_what_is_multiplied_with_the_weights_is_a_router(
    weights: Callable[[Tensor, Tensor], Tensor], routed: bool
):
    def compute(m: Ffn, x: Tensor) -> Tensor:
        down = weights(m.down.unsqueeze(1), x[..., :1, None])  # [H, T, f, d]
        return (m.hidden(x).unsqueeze(-2) @ down).squeeze(-2)

    findings = found(compute, HEADS)
    assert [site.routed for site in findings.sites] == ([True] if routed else [])


def test_a_sum_over_more_than_the_weights_is_no_router():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        router = x[..., :H].sigmoid().t()
        wide = torch.stack([m.down, m.down.sin()], -1)  # [H, f, d, 2]
        down = (router[..., None, None, None] * wide.unsqueeze(1)).sum(-1)
        return (m.hidden(x).unsqueeze(-2) @ down).squeeze(-2).sum(0)

    assert reasons(found(compute, TOKENS)) == [Kind.TOKEN_DEPENDENT_WEIGHTS]


def test_a_factor_of_tokens_and_features_is_no_router():
    compute = lambda m, x: (  # noqa: E731
        m.hidden(x).unsqueeze(-2) @ (m.down.unsqueeze(1) * x.unsqueeze(-2))
    ).squeeze(-2)
    assert reasons(found(compute, HEADS)) == [Kind.TOKEN_DEPENDENT_WEIGHTS]


def test_a_factor_of_heads_is_a_part_of_the_weights():
    compute = lambda m, x: m.hidden(x) @ (m.down * m.bias[:, :1, None])  # noqa: E731
    assert not the_site(compute, HEADS).routed


def test_queries_along_two_dimensions_and_along_one_of_them_differ():
    def compute(m: Ffn, x: Tensor) -> Tensor:  # [H, T, 2, 4]
        gate = torch.einsum("htni,hnif->htf", x, m.gate.unflatten(1, (2, 4)))
        up = torch.einsum("hti,hif->htf", x[:, :, 0], m.up[:, :4])
        return (F.silu(gate) * up) @ m.down

    assert reasons(found(compute, torch.randn(H, T, 2, 4))) == [Kind.DIFFERENT_QUERIES]


# What is added.


def test_zeros_that_addmm_adds_are_no_bias():
    """They are added to one after the other, as in a loop that starts from them."""

    def compute(m: Ffn, x: Tensor) -> Tensor:
        out = x.new_zeros(1, d)
        for e in range(H):
            out = torch.addmm(out, m.one(x, e), m.down[e])
        return out

    site = the_site(compute, TOKENS)
    assert site.sub_networks == H
    assert site.down_bias is None
    assert site.residual is None


def test_zeros_of_one_row_are_no_bias_of_the_sub_networks_before_them():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        first, second, *others = (m.one(x, e) @ m.down[e] for e in range(H))
        return first + second + x.new_zeros(d) + others[0] + others[1]

    site = the_site(compute, TOKENS)
    assert site.sub_networks == H
    assert site.down_bias is None


def test_a_vector_that_addmm_adds_to_one_token_is_a_bias():
    def compute(m: Ffn, x: Tensor, z: Tensor) -> Tensor:
        return torch.cat([torch.addmm(z.sin(), m.one(x, h), m.down[h]) for h in range(H)], -1)

    site = the_site(compute, ONE, torch.randn(d))
    assert site.down_bias is not None
    assert site.residual is None


def test_a_parameter_of_all_tokens_that_addmm_adds_is_a_residual():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        hidden = (x @ m.gate.transpose(0, 1).flatten(1)).relu()
        heads = hidden.unflatten(-1, (H, f)) * x[:, :H, None]
        return torch.addmm(m.places, heads.flatten(1), m.all_down)

    model = Ffn(compute)
    model.places, model.all_down = (nn.Parameter(torch.randn(n, d)) for n in (T, H * f))
    (site,) = find_sites(graph_of(model, TOKENS)).sites
    assert site.routed
    assert site.residual is not None


def summed(start: Callable[[Ffn, Tensor], Tensor]) -> Callable[[Ffn, Tensor], Tensor]:
    """Sub-networks that are added to something."""

    def compute(m: Ffn, x: Tensor) -> Tensor:
        out = start(m, x)
        for e in range(H):
            out = out + m.one(x, e) @ m.down[e]
        return out

    return compute


def test_one_token_that_sub_networks_are_added_to_is_a_residual():
    site = the_site(summed(lambda m, x: x), ONE)
    assert site.residual is not None
    assert site.down_bias is None


def test_the_output_of_another_network_is_a_residual_where_it_is_a_view():
    """It is read as it is, and not as one more sub-network."""

    def compute(m: Ffn, x: Tensor) -> Tensor:
        heads = (m.hidden(x) @ m.down).flatten(0, 1)
        return summed(lambda m, x: x)(m, heads)

    first, second = found(compute, HEADS).sites
    assert second.sub_networks == H
    assert second.residual is not None
    assert second.residual.value is first.output


def test_one_token_that_a_head_is_added_to_is_a_residual():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        parts = (x[:, h * d : (h + 1) * d] for h in range(H))
        return torch.cat([q + m.one(q, h) @ m.down[h] for h, q in enumerate(parts)], -1)

    site = the_site(compute, torch.randn(1, H * d))
    assert site.residual is not None
    assert site.down_bias is None


def test_what_is_made_of_another_token_is_a_residual():
    def compute(m: Ffn, x: Tensor, z: Tensor) -> Tensor:
        return summed(lambda m, x: z.sin())(m, x)

    site = the_site(compute, ONE, ONE)
    assert site.residual is not None
    assert site.down_bias is None


def test_what_is_made_of_parameters_is_a_bias_of_one_token():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        outs = [m.one(x, e) @ m.down[e] + m.bias[e].sin() for e in range(H)]
        return outs[0] + outs[1] + outs[2] + outs[3]

    site = the_site(compute, ONE)
    assert site.down_bias is not None
    assert site.residual is None


def test_what_is_made_of_another_input_is_a_bias_of_each_sub_network():
    def compute(m: Ffn, x: Tensor, z: Tensor) -> Tensor:
        outs = [m.one(x, e) @ m.down[e] + z[e].sin() for e in range(H)]
        return outs[0] + outs[1] + outs[2] + outs[3]

    assert the_site(compute, TOKENS, torch.randn(H, d)).down_bias is not None


def test_a_router_may_be_expanded_to_all_features():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        return (m.hidden(x) @ m.down) * x[..., :1].sigmoid().expand(-1, -1, d)

    assert the_site(compute, HEADS).routed


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: (m.hidden(x[0]) @ m.down) + x[0],
        lambda m, x: (m.hidden(x) @ m.down) + x,
    ],
    ids=["the same", "of each head"],
)
def test_tokens_that_are_added_to_all_heads_are_added_after_the_site(compute: Callable[..., Any]):
    assert the_site(compute, HEADS).residual is None


RESIDUALS: dict[str, Callable[[Callable[[int], Tensor], int, Tensor], Tensor]] = {
    "another one": lambda y, h, x: 2 * (x + y(h)) + x.sin(),
    "an input": lambda y, h, x: 2 * (x.sin() + y(h)) + x,
    "one of each sub-network": lambda y, h, x: 2 * (x + y(h)) + 2 * (x + y((h + 1) % H)),
}


@pytest.mark.parametrize("add", RESIDUALS.values(), ids=RESIDUALS)
def test_a_head_has_one_residual(add: Callable[[Callable[[int], Tensor], int, Tensor], Tensor]):
    def compute(m: Ffn, x: Tensor) -> Tensor:
        def head(h: int) -> Tensor:
            return add(lambda e: m.one(x[h], e) @ m.down[e], h, x[h])

        return torch.stack([head(h) for h in range(H)])

    assert reasons(found(compute, HEADS)) == [Kind.OPERATION_IN_LOOP]


def test_heads_in_vmap_have_one_residual():
    gate, down, x = torch.randn(H, d, f), torch.randn(H, f, d), torch.randn(H, T, d)

    def sites(add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Site]:
        graphs: list[fx.GraphModule] = []

        def keep(gm: fx.GraphModule, _: Any) -> Any:
            graphs.append(gm)
            return gm.forward

        def in_vmap(z: Tensor) -> Tensor:
            head = lambda gate, down, x: add(F.relu(z @ gate) @ down, x, z)  # noqa: E731
            return torch.vmap(head)(gate, down, x)

        torch.compile(in_vmap, backend=keep, fullgraph=True)(TOKENS)
        return find_sites(graphs[0]).sites

    for add in (lambda y, x, z: y + z, lambda y, x, z: y + x):
        (site,) = sites(add)
        assert site.residual is not None
    assert sites(lambda y, x, z: y + x.sin() + z) == []


def test_a_factor_of_each_element_is_no_router():
    compute = lambda m, x: (m.hidden(x) @ m.down) * x.sin()  # noqa: E731
    assert refused(compute, HEADS).detail == "multiplied elementwise"


@pytest.mark.parametrize(
    "compute",
    [lambda m, x: 2 * (m.hidden(x) @ m.down), lambda m, x: m.hidden(x) @ m.down + x],
    ids=["a multiple", "a sum"],
)
def test_what_is_not_known_to_be_an_output_is_a_leaf(compute: Callable[..., Any]):
    """Although a rule of the grammar holds for it; nothing is then left to be a term."""
    gm = graph_of(Ffn(compute), HEADS)
    (root,) = trace(gm).reads[gm.graph.output_node()].values()
    with pytest.raises(Declined) as declined:
        read_output(root, frozenset({root}))
    assert declined.value.reason.kind is Kind.UNKNOWN_OPERATION


# Buffers and pieces.


def filled(starts: list[int], heads: int = H) -> Callable[[Ffn, Tensor], Tensor]:
    """A buffer of features that outputs are written into from these places on."""

    def compute(m: Ffn, x: Tensor) -> Tensor:
        out = x.new_zeros(T, heads * d)
        for h, start in enumerate(starts):
            out[:, start : start + d].copy_(m.one(x, h) @ m.down[h])
        return out

    return compute


def test_a_buffer_is_filled_in_equal_parts():
    assert the_site(filled([0, 8, 16, 24]), TOKENS).heads == H


@pytest.mark.parametrize(
    ("starts", "heads", "detail"),
    [([0, 8, 16], H, "filled evenly"), ([0, 4], 2, "uneven part")],
    ids=["one is left out", "one overlaps"],
)
def test_a_buffer_that_is_not_is_told(starts: list[int], heads: int, detail: str):
    assert detail in refused(filled(starts, heads), TOKENS).detail


def test_one_piece_may_be_read_of_what_is_merged():
    """What the others are does not matter."""
    merged = lambda m, x: torch.stack([m.hidden(x) @ m.down, x.sin()])  # noqa: E731
    assert the_site(lambda m, x: merged(m, x)[0] * 2, HEADS).out_scale == 2


def test_heads_are_not_merged_in_two_steps_of_which_one_records_gradients():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        first, *others = (m.one(x[h], h) @ m.down[h] for h in range(H))
        records_gradients(x, False)
        two = torch.cat([first, others.pop(0)], -1)
        records_gradients(x, True)
        return torch.cat([two, *others], -1)

    assert refused(compute, HEADS).kind is Kind.GRADIENTS_CUT


def test_what_outputs_are_merged_with_is_no_operation_in_their_loop():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        return torch.stack([m.one(x[0], 0) @ m.down[0], x[1].sin()])

    reason = refused(compute, HEADS)
    assert (reason.kind, reason.detail) == (Kind.UNKNOWN_OPERATION, "sin")


def test_a_part_of_a_buffer_that_cuts_heads_is_not_read():
    part = refused(lambda m, x: filled([0, 8, 16, 24])(m, x)[:, 4:20], TOKENS)
    assert part.kind is Kind.UNSUPPORTED_LAYOUT


def test_a_reason_in_a_loop_that_is_no_operation_stays():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        dropped = (F.dropout(m.one(x[h], h)) @ m.down[h] for h in range(H))
        return torch.stack(list(dropped))

    assert refused(compute, HEADS).kind is Kind.DROPOUT_INSIDE


def test_the_mean_of_a_projection_is_named_where_it_is_no_hidden_unit():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        mean = (x @ m.gate.sin()).mean(1, keepdim=True)
        return (F.silu(x @ m.gate) * F.silu(x @ m.up) * mean) @ m.down

    (miss,) = found(compute, HEADS).near_misses
    assert miss.reason.kind is Kind.NOT_A_PRODUCT
    assert miss.reason.node is not None
    assert miss.reason.node.name == "mean"
    assert miss.reason.detail == "2 activated and 0 linear projections"


@pytest.mark.parametrize(
    ("product", "projected"),
    [
        (lambda x, w: x @ w, True),
        (lambda x, w: x @ x.t(), False),
        (lambda x, w: w @ w.t(), False),
        (lambda x, w: (x @ w) * 2, True),
        (lambda x, w: (x @ w) * x[:, :f], False),
        (lambda x, w: x * 2, False),
        (lambda x, w: x.cos(), False),
    ],
    ids=[
        *("of tokens", "of tokens with tokens", "of weights", "scaled", "multiplied by tokens"),
        *("none", "no product"),
    ],
)
def test_a_product_projects_what_is_multiplied_with_weights(
    product: Callable[[Tensor, Tensor], Tensor], projected: bool
):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(d, f))

        def forward(self, x: Tensor) -> Tensor:
            return product(x.sin(), self.weight)

    gm = graph_of(Product(), TOKENS)
    copy = trace(gm)
    (result,) = copy.reads[gm.graph.output_node()].values()
    found = _projected_by(result)
    assert (found is not None and found.op is torch.ops.aten.sin.default) is projected


# Biases, and what is none.


def test_a_bias_may_be_summed_over_one_sub_network():
    compute = lambda m, x: (m.hidden(x) @ m.down + m.bias.unsqueeze(1)).unsqueeze(0).sum(0)  # noqa: E731
    site = the_site(compute, HEADS)
    assert site.output.op is torch.ops.aten.sum.dim_IntList
    assert site.down_bias is not None


def test_a_bias_of_each_sub_network_is_summed_with_a_dimension_of_one():
    compute = lambda m, x: (m.hidden(x) @ m.down + m.bias.unsqueeze(1)).unsqueeze(0).sum((0, 1))  # noqa: E731
    site = the_site(compute, TOKENS)
    assert site.sub_networks == H
    assert site.down_bias is not None


@pytest.mark.parametrize(
    ("added", "detail"),
    [
        (lambda y, q, b: y + b + b.sin(), "a second bias is added to the output"),
        (lambda y, q, b: y + q[:, :1], "a tensor is added to the output"),
        (lambda y, q, b: y * q[:, :1] + b, "a tensor is added to the output"),
        (lambda y, q, b: (y + b) * q[:, :1] + b.sin(), "a tensor is added to the output"),
    ],
    ids=["two", "of tokens alone", "after a router", "two around a router"],
)
def test_what_is_added_is_named(added: Callable[[Tensor, Tensor, Tensor], Tensor], detail: str):
    def compute(m: Ffn, x: Tensor) -> Tensor:
        outs = (added(m.one(x[h], h) @ m.down[h], x[h], m.bias[h]) for h in range(H))
        return torch.stack(list(outs))

    assert refused(compute, HEADS).detail == detail
