"""Each check says no once, to a small change of one model that passes them all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import call, graph_of, records_gradients
from support.values import a_value
from torch import Tensor, fx, nn

import mhf_compiler
from mhf_compiler import Report
from mhf_compiler.patterns import Kind, find_sites
from mhf_compiler.patterns.axes import Affine, Axis
from mhf_compiler.patterns.canonical import (
    COPY,
    INPUT,
    OPAQUE,
    SCATTER,
    CanonicalCopy,
    Storage,
    Value,
)
from mhf_compiler.patterns.checks import (
    _check_readable,
    _check_returned_alone,
    _has_gradient,
    _nested,
    check_piece,
)
from mhf_compiler.patterns.reasons import Declined
from mhf_compiler.patterns.recognise import Findings

B, L, H, d, f = 2, 6, 4, 8, 5


def project(q: Tensor, w: Tensor) -> Tensor:
    """Each head by its own matrix."""
    return torch.einsum("blhi,hio->blho", q, w)


class Ffn(nn.Module):
    """A SwiGLU for each head; ``compute`` says what becomes of its parts."""

    def __init__(self, compute: Callable[[Ffn, Tensor], Any], **sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        heads, out = sizes.get("heads", H), sizes.get("out", d)
        self.compute = compute
        shapes = (heads, d, f), (heads, d, f), (heads, f, out)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(s) / 4) for s in shapes)

    def hidden(self, q: Tensor, other: Tensor | None = None) -> Tensor:
        return F.silu(project(q, self.gate)) * project(q if other is None else other, self.up)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def explain(compute: Callable[[Ffn, Tensor], Any], **sizes: int) -> Report:
    """The report, after the compiled model has been compared with the original."""
    x = torch.randn(B, L, sizes.get("heads", H), d)
    model = Ffn(compute, **sizes)
    options = {"rewrite": "always", "fallback": "eager", "strict": True}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)
    return mhf_compiler.explain(model, options=options)(x)


def test_the_model_itself_passes():
    report = explain(lambda m, q: project(m.hidden(q), m.down))
    assert len(report.rewritten) == 1
    assert report.declined == []


def half_without_gradients(m: Ffn, q: Tensor) -> Tensor:
    with torch.no_grad():
        gate = F.silu(project(q, m.gate))
    return project(gate * project(q, m.up), m.down)


def up_in_another_precision(m: Ffn, q: Tensor) -> Tensor:
    up = project(q.double(), m.up.double()).float()
    return project(F.silu(project(q, m.gate)) * up, m.down)


def hidden_units_returned(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    hidden = m.hidden(q)
    return project(hidden, m.down), hidden


def hidden_units_summed(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    hidden = m.hidden(q)
    return project(hidden, m.down), hidden.square().mean()


def weighted(m: Ffn, q: Tensor, router: Callable[[Tensor], Tensor]) -> Tensor:
    """A router that is made of the hidden units."""
    hidden = m.hidden(q)
    return project(hidden, m.down) * router(hidden)


def query_overwritten(m: Ffn, q: Tensor) -> Tensor:
    q = q * 1
    hidden = m.hidden(q.detach())
    with torch.no_grad():
        q.zero_()
    return project(hidden, m.down)


def output_held_twice(m: Ffn, q: Tensor) -> Tensor:
    overwritten, again = (project(m.hidden(q), m.down) for _ in range(2))
    overwritten.zero_()
    return again


def up_of_other_heads(m: Ffn, q: Tensor) -> Tensor:
    up = project(q, m.up).roll(1, 2)
    return project(F.silu(project(q, m.gate)) * up, m.down)


def dropped_out(m: Ffn, q: Tensor) -> Tensor:
    return project(F.dropout(m.hidden(q), 0.0001), m.down)


def autocast_at_the_end(m: Ffn, q: Tensor) -> Tensor:
    out = project(m.hidden(q), m.down)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return out * 2


def weights_made_of_tokens(m: Ffn, q: Tensor) -> Tensor:
    fast = m.down + q.mean((0, 1, 2))
    return project(m.hidden(q), fast)


def per_head(m: Ffn, q: Tensor, finish: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A loop over heads; ``finish`` makes what is merged of output and query."""
    outs = []
    for h in range(H):
        part = q[:, :, h]
        hidden = F.silu(part @ m.gate[h]) * (part @ m.up[h])
        outs.append(finish(hidden @ m.down[h], part))
    return torch.stack(outs, 2)


def wider_residual_in_vmap(m: Ffn, q: Tensor) -> Tensor:
    """The same for all heads, and of more digits than the network's output."""
    z = q[:, :, 0]
    return torch.vmap(lambda up, down: z.double() + F.relu(z @ up) @ down)(m.gate, m.down)


def output_under_autocast(m: Ffn, q: Tensor) -> Tensor:
    """The down projection is a sum of products, which autocast leaves in float32."""
    hidden = m.hidden(q)
    with torch.autocast("cpu", torch.bfloat16):
        return (hidden.unsqueeze(-1) * m.down).sum(-2)


def queries_of_units(q: Tensor) -> Tensor:
    """Another query for each hidden unit: (B, L, H, f, d)."""
    return torch.stack([q.roll(unit, -1) for unit in range(f)], 3)


def with_queries_of_units(m: Ffn, q: Tensor) -> Tensor:
    gate, up = (torch.einsum("blhfi,hif->blhf", q, w) for w in (m.gate, m.up))
    return project(F.silu(gate) * up, m.down)


def fast_weights_and_gathered_tokens(m: Ffn, q: Tensor) -> Tensor:
    return project(m.hidden(q[:, torch.arange(L - 1, -1, -1)]), m.down + q.mean((0, 1, 2)))


def fast_weights_and_scattered_tokens(m: Ffn, q: Tensor) -> Tensor:
    sequences, tokens = torch.arange(B), torch.arange(L)
    return project(m.hidden(q[sequences[:, None], tokens]), m.down + q.mean((0, 1, 2)))


def up_cast_without_gradients(m: Ffn, q: Tensor) -> Tensor:
    gate, up, down = (w.bfloat16() for w in (m.gate, m.up, m.down))
    with torch.no_grad():
        narrow = q.bfloat16()
    return project(F.silu(project(q.bfloat16(), gate)) * project(narrow, up), down)


def up_scaled_with_its_bias(m: Ffn, q: Tensor) -> Tensor:
    gate, up, down = (w.half() for w in (m.gate, m.up, m.down))
    up_bias = (project(q.half(), up) + gate[:, 0]) * 4
    return project(F.silu(project(q.half(), gate)) * up_bias, down)


def queries_of_halves(m: Ffn, q: Tensor) -> Tensor:
    """Twice as many hidden units, of which the second half reads another query."""
    halves = torch.stack([q, q.roll(1, -1)], 3)  # [B, L, H, 2, d]
    gate, down = torch.stack([m.gate, m.up], 1), torch.stack([m.down, m.down.cos()], 1)
    hidden = torch.einsum("blhni,hnif->blhnf", halves, gate).relu()
    return torch.einsum("blhnf,hnfo->blho", hidden, down)


def heads_with_a_gap(m: Ffn, q: Tensor) -> Tensor:
    """Four heads of six, [B, L, 2, 3, d] without the last of each three."""
    six = torch.cat([q, q[:, :, :2]], 2).sin().unflatten(2, (2, 3))[:, :, :, :2]
    gate, down = (w.unflatten(0, (2, 2)) for w in (m.gate, m.down))
    hidden = torch.einsum("blghi,ghif->blghf", six, gate).relu()
    return torch.einsum("blghf,ghfo->blgho", hidden, down)


def heads_in(
    dtype: torch.dtype, m: Ffn, q: Tensor, finish: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A loop over heads in another dtype."""
    outs = []
    for h in range(H):
        part = q[:, :, h].to(dtype)
        gate, up, down = (w[h].to(dtype) for w in (m.gate, m.up, m.down))
        outs.append(finish((F.silu(part @ gate) * (part @ up)) @ down, part))
    return torch.stack(outs, 2)


def scaled_in_float64(m: Ffn, q: Tensor, factor: float) -> Tensor:
    return heads_in(torch.float64, m, q, lambda y, _: y * factor)


def with_bias_times(m: Ffn, q: Tensor, alpha: float) -> Tensor:
    return per_head(m, q, lambda y, _: torch.add(y, m.down[0, 0], alpha=alpha))


def up_of_pieces_without_gradients(m: Ffn, q: Tensor) -> Tensor:
    with torch.no_grad():
        pieces = q.unbind(2)
    return project(m.hidden(q, torch.stack(pieces, 2)), m.down)


def square_heads(q: Tensor, weight: Callable[[int], Tensor]) -> Tensor:
    """Heads of as many hidden units as features, all of whose weights are the same."""
    heads = ((F.relu(q[:, :, h, :f] @ weight(h)) @ weight(h)) for h in range(H))
    return torch.stack(list(heads), 2)


def routed_heads(m: Ffn, q: Tensor, cast: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A loop over heads, each with a router of its own, cast by itself."""
    routers = q[..., 0].sigmoid()
    heads = zip(heads_apart(m, q), routers.unbind(-1), strict=True)
    return torch.stack([y * cast(r, h)[..., None] for h, (y, r) in enumerate(heads)], 2)


def written_along_tokens_and_heads(m: Ffn, q: Tensor) -> Tensor:
    """As many tokens as heads; what is written last fills the buffer."""
    q = q[:, :H]
    out = torch.empty_like(q)
    for t in range(H):
        out[:, t] = q[:, t]
    for h, y in enumerate(heads_apart(m, q)):
        out[:, :, h] = y
    return out


DECLINED: dict[str, tuple[Kind, Callable[[Ffn, Tensor], Any], dict[str, int]]] = {
    "one_query": (
        Kind.DIFFERENT_QUERIES,
        lambda m, q: project(m.hidden(q, q.cos()), m.down),
        {},
    ),
    "one_query, shifted by a head": (
        Kind.DIFFERENT_QUERIES,
        lambda m, q: project(m.hidden(q, q.roll(1, 2)), m.down),
        {},
    ),
    "one_query, of half the features": (
        Kind.DIFFERENT_QUERIES,
        lambda m, q: project(
            F.silu(project(q, m.gate)) * project(q[..., : d // 2], m.up[:, : d // 2]), m.down
        ),
        {},
    ),
    "one_query, heads and tokens exchanged": (
        Kind.DIFFERENT_QUERIES,
        lambda m, q: project(m.hidden(q[:, :H], q[:, :H].transpose(1, 2)), m.down),
        {},
    ),
    "one_query, another one in fewer digits": (
        Kind.DIFFERENT_QUERIES,
        lambda m, q: project(m.hidden(q, q.cos().bfloat16().float()), m.down),
        {},
    ),
    "one_query, cast without gradients": (Kind.DIFFERENT_QUERIES, up_cast_without_gradients, {}),
    "assign_roles, half an output twice": (
        Kind.UNEQUAL_WIDTHS,
        lambda m, q: project(m.hidden(q), m.down).repeat(1, 1, 1, 2),
        {"out": d // 2},
    ),
    "assign_roles, a query for each half of the hidden units": (
        Kind.UNPAIRED_BRANCHES,
        queries_of_halves,
        {},
    ),
    "assign_roles, a query for each hidden unit": (
        Kind.UNPAIRED_BRANCHES,
        lambda m, q: with_queries_of_units(m, queries_of_units(q)),
        {},
    ),
    "assign_roles, a scaled query for each hidden unit": (
        Kind.UNPAIRED_BRANCHES,
        lambda m, q: with_queries_of_units(m, queries_of_units(q) * queries_of_units(q.cos())),
        {},
    ),
    "assign_roles, a query of one feature": (
        Kind.UNPAIRED_BRANCHES,
        lambda m, q: project(
            F.silu((q[..., :1, None] * m.gate).sum(-2)) * (q[..., :1, None] * m.up).sum(-2), m.down
        ),
        {},
    ),
    "check_weights, of the up projection": (
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        lambda m, q: project(
            F.silu(project(q, m.gate)) * project(q, m.up + q.mean((0, 1, 2))[:, None]), m.down
        ),
        {},
    ),
    "check_weights, made of tokens that are gathered by two indices": (
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        fast_weights_and_scattered_tokens,
        {},
    ),
    "check_static_sizes, heads along two dimensions with a gap": (
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        heads_with_a_gap,
        {},
    ),
    "check_weights, made of tokens that are gathered": (
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        fast_weights_and_gathered_tokens,
        {},
    ),
    "check_rounding, to another range": (
        Kind.ROUNDING_CAST,
        lambda m, q: heads_in(torch.bfloat16, m, q, lambda y, _: y.half().bfloat16()),
        {},
    ),
    "check_range, of a bias": (
        Kind.FLOAT16_RANGE,
        lambda m, q: heads_in(torch.float16, m, q, lambda y, _: y / 4 + m.down[0, 0].half()),
        {},
    ),
    "check_range, of a projection's bias": (Kind.FLOAT16_RANGE, up_scaled_with_its_bias, {}),
    "check_range, of a residual": (
        Kind.FLOAT16_RANGE,
        lambda m, q: heads_in(torch.float16, m, q, lambda y, part: (y + part) * 4),
        {},
    ),
    "check_range, a bias beyond float32": (
        Kind.UNSUPPORTED_PROBLEM,
        lambda m, q: per_head(m, q, lambda y, _: y * 1e-30 + m.down[0, 0] * 1e15),
        {},
    ),
    "check_range, a bias that vanishes in float32": (
        Kind.UNSUPPORTED_PROBLEM,
        lambda m, q: per_head(m, q, lambda y, _: torch.add(y * 1e25, m.down[0, 0], alpha=1e-15)),
        {},
    ),
    "check_range, a bias beyond float64": (
        Kind.UNSUPPORTED_PROBLEM,
        lambda m, q: heads_in(torch.float64, m, q, lambda y, _: y * 1e-200 + m.down[0, 0].double()),
        {},
    ),
    "check_range, a network that vanishes in float64": (
        Kind.OPERATION_IN_LOOP,
        lambda m, q: heads_in(torch.float64, m, q, lambda y, _: y * 1e-200 * 1e-200),
        {},
    ),
    "check_range, a projection beyond float32": (
        Kind.UNSUPPORTED_PROBLEM,
        lambda m, q: project(F.relu(project(q * 0, m.gate) * 1e30 * 1e30), m.down),
        {},
    ),
    "check_range, hidden units beyond float32": (
        Kind.UNKNOWN_OPERATION,
        lambda m, q: project(
            F.silu(project(q, m.gate)) * project(q * 0, m.up) * 1e30 * 1e30, m.down
        ),
        {},
    ),
    "check_range, hidden units beyond any number": (
        Kind.UNKNOWN_OPERATION,
        lambda m, q: project(m.hidden(q * 0) * 1e200 * 1e200, m.down),
        {},
    ),
    "check_weights, the same for all features": (
        Kind.UNPAIRED_BRANCHES,
        lambda m, q: project(
            F.silu(project(q, m.gate[:, :1].expand(-1, d, -1))) * project(q, m.up), m.down
        ),
        {},
    ),
    "check_weights, the same for all hidden units": (
        Kind.UNPAIRED_BRANCHES,
        lambda m, q: project(
            F.silu(project(q, m.gate[:, :, :1].expand(-1, -1, f))) * project(q, m.up), m.down
        ),
        {},
    ),
    "check_weights": (Kind.TOKEN_DEPENDENT_WEIGHTS, weights_made_of_tokens, {}),
    "check_router": (
        Kind.UNKNOWN_OPERATION,
        lambda m, q: project(m.hidden(q) * m.gate[:, 0], m.down),
        {},
    ),
    "check_biases": (
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        lambda m, q: project(F.silu(project(q, m.gate) + q[..., :f]) * project(q, m.up), m.down),
        {},
    ),
    "check_biases, of the up projection": (
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        lambda m, q: project(F.silu(project(q, m.gate)) * (project(q, m.up) + q[..., :f]), m.down),
        {},
    ),
    "check_widths": (
        Kind.UNEQUAL_WIDTHS,
        lambda m, q: project(m.hidden(q), m.down),
        {"out": 2 * d},
    ),
    "check_multi_head": (
        Kind.PLAIN_FFN,
        lambda m, q: project(m.hidden(q), m.down),
        {"heads": 1},
    ),
    "check_dtypes": (Kind.MIXED_PRECISION, up_in_another_precision, {}),
    "check_gradients": (Kind.GRADIENTS_CUT, half_without_gradients, {}),
    "check_no_escape": (Kind.ESCAPING_INTERMEDIATE, hidden_units_returned, {}),
    "check_no_escape, read elsewhere": (Kind.ESCAPING_INTERMEDIATE, hidden_units_summed, {}),
    "check_memory": (Kind.MUTATION, query_overwritten, {}),
    "check_memory, the output": (Kind.MUTATION, output_held_twice, {}),
    "check_autocast": (Kind.AUTOCAST_BOUNDARY, output_under_autocast, {}),
    "the grammar: a residual that is scaled": (
        Kind.OPERATION_IN_LOOP,
        lambda m, q: per_head(m, q, lambda y, part: (y + part) * part[..., :1]),
        {},
    ),
    "the grammar: a residual of another dtype": (
        Kind.OPERATION_IN_LOOP,
        lambda m, q: per_head(m, q, lambda y, part: (y + part.double()).float()),
        {},
    ),
    "the grammar: a residual of another dtype, for all heads": (
        Kind.UNKNOWN_OPERATION,
        wider_residual_in_vmap,
        {},
    ),
    **{
        f"the grammar: multiplied by {factor} in a loop": (
            Kind.OPERATION_IN_LOOP,
            partial(scaled_in_float64, factor=factor),
            {},
        )
        for factor in (0.0, math.inf, math.nan, 1e-320)
    },
    "the grammar: divided by zero in a loop": (
        Kind.OPERATION_IN_LOOP,
        lambda m, q: per_head(m, q, lambda y, _: y / 0),
        {},
    ),
    **{
        f"the grammar: {alpha} times a bias in a loop": (
            Kind.OPERATION_IN_LOOP,
            partial(with_bias_times, alpha=alpha),
            {},
        )
        for alpha in (0, math.inf)
    },
    "the grammar: a number is added in a loop": (
        Kind.OPERATION_IN_LOOP,
        lambda m, q: per_head(m, q, lambda y, _: y + 1.0),
        {},
    ),
    "the grammar: a buffer that is filled along two dimensions": (
        Kind.PLAIN_FFN,
        written_along_tokens_and_heads,
        {},
    ),
    "the grammar: taken apart without gradients": (
        Kind.DIFFERENT_QUERIES,
        up_of_pieces_without_gradients,
        {},
    ),
    "the grammar: a weight that is read the other way round": (
        Kind.UNEQUAL_HEADS,
        lambda m, q: square_heads(q, lambda h: m.gate[h, :f] if h else m.gate[h, :f].T),
        {},
    ),
    "the grammar: a weight in a tensor of its own": (
        Kind.UNEQUAL_HEADS,
        lambda m, q: square_heads(q, lambda h: m.gate[h, :f] if h else m.gate[h, :f].sin()),
        {},
    ),
    "the grammar: weights at different places of different tensors": (
        Kind.IRREGULAR_WEIGHTS,
        lambda m, q: square_heads(q, lambda h: (m.gate * (h + 1))[h, :f]),
        {},
    ),
    "the grammar: routers cast to other dtypes": (
        Kind.UNEQUAL_HEADS,
        lambda m, q: routed_heads(m, q, lambda r, h: r.half() if h else r.bfloat16()),
        {},
    ),
    "the grammar: routers some of which are cast": (
        Kind.UNEQUAL_HEADS,
        lambda m, q: routed_heads(m, q, lambda r, h: r.half() if h else r),
        {},
    ),
    "the grammar: routers of other dtypes": (
        Kind.UNEQUAL_HEADS,
        lambda m, q: routed_heads(m, q, lambda r, h: r.half().sin() if h else r.bfloat16().sin()),
        {},
    ),
    "the grammar: hidden units truncated by a cast": (
        Kind.UNKNOWN_OPERATION,
        lambda m, q: project(m.hidden(q).long().float(), m.down),
        {},
    ),
    "the grammar: dropout": (Kind.DROPOUT_INSIDE, dropped_out, {}),
}


@pytest.mark.parametrize(("kind", "compute", "sizes"), DECLINED.values(), ids=DECLINED)
def test_each_check_says_no(
    kind: Kind, compute: Callable[[Ffn, Tensor], Any], sizes: dict[str, int]
):
    if kind is Kind.DROPOUT_INSIDE:
        report = mhf_compiler.explain(Ffn(compute), options={"rewrite": "always"})(
            torch.randn(B, L, H, d)
        )
    else:
        report = explain(compute, **sizes)
    assert report.rewritten == []
    (miss,) = report.declined + report.ordinary
    assert miss.reason is not None
    assert miss.reason.kind is kind
    assert miss.location is not None
    assert miss.location.file == __file__


def heads_apart(m: Ffn, q: Tensor) -> list[Tensor]:
    parts = [q[:, :, h] for h in range(H)]
    return [
        (F.silu(part @ m.gate[h]) * (part @ m.up[h])) @ m.down[h] for h, part in enumerate(parts)
    ]


def views_of_a_heads_output_returned(m: Ffn, q: Tensor) -> tuple[Tensor, ...]:
    first, *others = heads_apart(m, q)
    return torch.stack([first, *others], 2), first[..., 4:], first[..., :4]


def test_views_of_one_heads_output_that_are_returned_stay_views_of_one_memory():
    report = explain(views_of_a_heads_output_returned)
    assert report.rewritten == []
    (miss,) = report.declined
    assert miss.reason is not None
    assert miss.reason.kind is Kind.MUTATION
    assert "other views of its memory" in miss.reason.detail


def weighted_by_integers(m: Ffn, q: Tensor) -> Tensor:
    return project(m.hidden(q), m.down) * (q[..., :1] > 0).long()


def dropped_by_token(m: Ffn, q: Tensor) -> Tensor:
    """Random weights, of tokens and heads, that are made inside one operation."""
    y = project(m.hidden(q), m.down)
    return F.dropout1d(y.flatten(0, 1), 1e-7, training=True).view(y.shape)


def read_through_an_older_view(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    y = q.new_zeros(q.shape)
    older = y.flatten(2)
    y += project(m.hidden(q), m.down)
    return y.sin(), older.cos()


def copied_under_an_older_view(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    older = out[..., :4]
    out.copy_(project(m.hidden(q), m.down))
    return out, older * 1


def sub_networks(m: Ffn, q: Tensor) -> list[Tensor]:
    """The networks of all heads, over the same queries."""
    weights = zip(m.gate, m.up, m.down, strict=True)
    return [(F.silu(q @ gate) * (q @ up)) @ down for gate, up, down in weights]


def sum_with_a_bias(m: Ffn, q: Tensor) -> Tensor:
    """One bias for the sum of sub-networks, and none of theirs."""
    return sum(sub_networks(m, q[:, :, 0])) + m.down[0, 0]


BELOW: dict[str, Callable[[Ffn, Tensor], Any]] = {
    "check_router: integers": weighted_by_integers,
    "the grammar: a bias of a sum": sum_with_a_bias,
    "the grammar: copied to more dimensions of another dtype": lambda m, q: torch.empty(
        2, *q.shape, dtype=torch.float64
    ).copy_(project(m.hidden(q), m.down)),
    "check_memory: random numbers": dropped_by_token,
    "check_memory: an older view": read_through_an_older_view,
    "check_memory: an older view of a copy": copied_under_an_older_view,
}


@pytest.mark.parametrize("compute", BELOW.values(), ids=BELOW)
def test_what_cannot_be_part_of_the_site_is_left_after_it(compute: Callable[[Ffn, Tensor], Any]):
    """The network below is rewritten, and ``explain`` has compared the results."""
    (site,) = explain(compute).rewritten
    assert not site.routed


def zeros_like_a_cast(m: Ffn, q: Tensor) -> Tensor:
    """Sub-networks are added to zeros that look like the first one's output."""
    outs = sub_networks(m, q[:, :, 0])
    return sum(outs, torch.zeros_like(outs[0].double(), dtype=torch.float32))


def of_one_unit(m: Ffn, q: Tensor) -> Tensor:
    """Heads of a single hidden unit: neither operand of a projection moves along it."""
    q = q.transpose(1, 2)
    hidden = F.silu(q @ m.gate[..., :1]) * (q @ m.up[..., :1])
    return (hidden @ m.down[:, :1]).transpose(1, 2)


def of_one_unit_with_weights_first(m: Ffn, q: Tensor) -> Tensor:
    q = q.permute(0, 2, 3, 1)
    gate, up, down = m.gate[..., :1], m.up[..., :1], m.down[:, :1]
    return (down.mT @ (F.silu(gate.mT @ q) * (up.mT @ q))).permute(0, 3, 1, 2)


ALLOWED: dict[str, Callable[[Ffn, Tensor], Any]] = {
    "dropout afterwards": lambda m, q: F.dropout(project(m.hidden(q), m.down), 0.5, training=False),
    "a part of the output": lambda m, q: project(m.hidden(q), m.down)[:, 1:],
    "a residual of each head": lambda m, q: per_head(m, q, lambda y, part: y + part),
    "one residual for all heads": lambda m, q: per_head(m, q, lambda y, _: y + q[:, :, 0]),
    "the output read twice": lambda m, q: (lambda y: (y, y.sin()))(project(m.hidden(q), m.down)),
    "the query read elsewhere": lambda m, q: project(m.hidden(q), m.down) + q,
    "the weights read elsewhere": lambda m, q: (project(m.hidden(q), m.down), m.gate.sum()),
    "a router for each head": lambda m, q: project(m.hidden(q), m.down) * q[..., :1].sigmoid(),
    "biases of heads and units": lambda m, q: project(
        F.silu(project(q, m.gate) + m.up[:, 0]) * project(q, m.up), m.down
    ),
    "autocast begins afterwards": autocast_at_the_end,
    "heads that differ in the up projection alone": lambda m, q: (
        (F.silu(q @ m.gate[0]) * project(q, m.up)) @ m.down[0]
    ),
    "a result in eight bits": lambda m, q: (
        project(m.hidden(q), m.down).to(torch.float8_e4m3fn).float()
    ),
    "a factor beyond float32, in float64": lambda m, q: heads_in(
        torch.float64, m, q, lambda y, _: y * 1e60
    ),
    "heads that are merged, and cut otherwise": lambda m, q: torch.cat(
        heads_apart(m, q)[:3], -1
    ).unflatten(-1, (2, 12)),
    "an up projection that is scaled before its bias": lambda m, q: project(
        F.silu(project(q, m.gate)) * (3 * project(q, m.up) + m.gate[:, 0]), m.down
    ),
    "heads of one hidden unit": of_one_unit,
    "heads of one hidden unit, weights first": of_one_unit_with_weights_first,
    "hidden units that are taken apart and merged again": lambda m, q: project(
        torch.stack(m.hidden(q).unbind(2), 2), m.down
    ),
    "heads that are negated one by one": lambda m, q: per_head(m, q, lambda y, _: -y),
    "heads that are widened one by one": lambda m, q: per_head(m, q, lambda y, _: y.double()),
    "heads that are rounded one by one": lambda m, q: per_head(m, q, lambda y, _: y.bfloat16()),
    "a bias that is multiplied, in float32": lambda m, q: per_head(
        m, q, lambda y, _: y / 4 + m.down[0, 0]
    ),
    "heads that read the same features": lambda m, q: project(
        F.silu(torch.einsum("bli,hio->blho", q[:, :, 0], m.gate))
        * torch.einsum("bli,hio->blho", q[:, :, 0], m.up),
        m.down,
    ),
    "heads along two dimensions": lambda m, q: torch.einsum(
        "blghi,ghio->blgho",
        torch.einsum(
            "blghi,ghio->blgho", q.unflatten(2, (2, 2)), m.gate.unflatten(0, (2, 2))
        ).relu(),
        m.down.unflatten(0, (2, 2)),
    ),
    "zeros like a cast of the first output": zeros_like_a_cast,
    "zeros that are detached": lambda m, q: sum(
        sub_networks(m, q[:, :, 0]), torch.zeros_like(q[:, :, 0]).detach()
    ),
    "a bias that addcmul multiplies, in float32": lambda m, q: project(
        F.silu(torch.addcmul(project(q, m.gate), m.up[:, 0], m.down[..., 0])) * project(q, m.up),
        m.down,
    ),
    "weights and tokens of one tensor": lambda m, q: project(
        F.silu(project(q, q[0, :f].permute(1, 2, 0))) * project(q, m.up), m.down
    ),
}


@pytest.mark.parametrize("compute", ALLOWED.values(), ids=ALLOWED)
def test_what_the_checks_let_through(compute: Callable[[Ffn, Tensor], Any]):
    report = explain(compute)
    assert len(report.rewritten) == 1
    assert report.declined == []


@pytest.mark.parametrize(
    ("compute", "detail"),
    [
        (hidden_units_returned, "it is returned"),
        (hidden_units_summed, r"read by .*test_checks\.py:\d+: return .*hidden\.square\(\)\.mean"),
        (lambda m, q: weighted(m, q, lambda hidden: hidden.mean(-1, keepdim=True)), "read by"),
        (lambda m, q: weighted(m, q, lambda h: torch.ones_like(h[..., :1])), "read by"),
    ],
    ids=["returned", "read elsewhere", "read by the router", "sizes read by the router"],
)
def test_hidden_units_that_escape_are_told_with_their_reader(
    compute: Callable[[Ffn, Tensor], Any], detail: str
):
    report = explain(compute)
    assert report.rewritten == []
    (miss,) = report.declined
    assert miss.reason is not None
    assert re.search(detail, miss.reason.detail)


def test_a_router_that_is_one_number_in_float64_is_one():
    (site,) = explain(lambda m, q: project(m.hidden(q), m.down) * q.double().mean()).rewritten
    assert site.routed


@pytest.mark.parametrize("first", [False, True])
def test_a_router_may_be_the_output_of_another_network(first: bool):
    """On either side: it is the one that is the same for all features."""

    def routed(m: Ffn, q: Tensor) -> Tensor:
        router = project(F.relu(project(q, m.gate.sin())), m.down[..., :1])
        output = project(m.hidden(q), m.down)
        return router * output if first else output * router

    (site,) = explain(routed).rewritten
    assert site.routed


def test_a_head_that_is_returned_is_cut_out_of_the_result():
    """Nothing of it is computed twice."""

    def returned(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = heads_apart(m, q)
        return torch.stack([first, *others], 2), first

    report = explain(returned)
    assert len(report.rewritten) == 1
    assert " @ " in report.graphs[0].before
    assert " @ " not in report.graphs[0].after


@pytest.mark.parametrize(
    ("dtype", "kinds"), [(torch.float32, []), (torch.float64, [Kind.UNSUPPORTED_DTYPE])]
)
def test_float64_is_computed_on_a_cpu_alone(dtype: torch.dtype, kinds: list[Kind]):
    """On another device it is no dtype of the op."""
    model = Ffn(lambda m, q: project(m.hidden(q), m.down)).to("meta", dtype)
    report = mhf_compiler.explain(model, options={"rewrite": "always"})(
        torch.empty(B, L, H, d, device="meta", dtype=dtype)
    )
    assert [miss.reason and miss.reason.kind for miss in report.declined] == kinds


# Networks in graphs as they are written, and checks by themselves.


def found(
    compute: Callable[[Ffn, Tensor], Any], *others: Tensor, trained: bool = True, **sizes: int
) -> Findings:
    model = Ffn(compute, **sizes).requires_grad_(trained)
    with torch.set_grad_enabled(trained):
        return find_sites(graph_of(model, torch.randn(B, L, H, d), *others))


def reasons(findings: Findings) -> list[Kind | Any]:
    assert not findings.sites
    return [miss.reason.kind for miss in findings.near_misses]


def merged(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    """The output of all heads, and that of the first."""
    first, *others = heads_apart(m, q)
    return torch.stack([first, *others], 2), first


def test_a_reader_that_nothing_reads_is_none():
    def read(m: Ffn, q: Tensor) -> Tensor:
        y, first = merged(m, q)
        first.sin()
        return y

    (site,) = found(read).sites
    assert site.pieces == ()


def test_zeros_may_look_like_a_view_of_what_is_added_to_them():
    def started(m: Ffn, q: Tensor) -> Tensor:
        q = q[:, :, 0]
        outs = [(F.silu(q @ m.gate[e]) * (q @ m.up[e])) @ m.down[e] for e in range(H)]
        return sum(outs, torch.zeros_like(outs[0].transpose(0, 1)).transpose(0, 1))

    assert len(found(started).sites) == 1


@pytest.mark.parametrize(
    "factor",
    [lambda m, q: m.gate[0, :, 0], lambda m, q: m.gate[:, :, 0], lambda m, q: q[:, :, :1].sin()],
    ids=["alone", "and heads", "and tokens"],
)
def test_a_factor_of_output_features_is_no_router(factor: Callable[[Ffn, Tensor], Tensor]):
    """The op's routers have no such axis: they would be read at one feature for all."""
    (site,) = found(lambda m, q: project(m.hidden(q), m.down) * factor(m, q)).sites
    assert site.routers == ()
    assert site.output.op is not torch.ops.aten.mul.Tensor


def heads_of_wider_products(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of each product the first half is a head's output."""
    wide = torch.cat([m.down, m.down], -1)
    outs = []
    for h in range(H):
        part = q[:, :, h]
        outs.append(((F.silu(part @ m.gate[h]) * (part @ m.up[h])) @ wide[h])[..., :d])
    return torch.stack(outs, 2), outs[0]


def test_a_heads_output_with_gaps_in_memory_is_not_cut_out_of_the_result():
    assert len(found(lambda m, q: heads_of_wider_products(m, q)[0]).sites) == 1
    assert found(heads_of_wider_products).sites == []


def merged_and_detached(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    y, first = merged(m, q)
    return y.detach(), first


def merged_without_gradients(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    y, first = merged(m, q)
    records_gradients(q, False)
    return y * 2, first


def compared_when_merged(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    y, first = merged(m, q)
    return y > 0, first


def test_a_head_has_a_gradient_if_all_have_one():
    assert len(found(merged).sites) == 1


def sizes_of_merged(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    y, first = merged(m, q)
    return torch.zeros_like(y), first


def spectrum_of_a_head(m: Ffn, q: Tensor) -> tuple[Tensor, Tensor]:
    """The head's gradient passes through complex numbers."""
    y, first = merged(m, q)
    return y > 0, torch.fft.rfft(first).abs()


@pytest.mark.parametrize(
    "compute",
    [
        merged_and_detached,
        merged_without_gradients,
        compared_when_merged,
        sizes_of_merged,
        spectrum_of_a_head,
    ],
)
def test_a_head_has_no_gradient_through_a_result_that_has_none(
    compute: Callable[[Ffn, Tensor], Any],
):
    """Where nothing is trained, that is no matter."""
    assert reasons(found(compute)) == [Kind.GRADIENTS_CUT]
    model = Ffn(compute).requires_grad_(False)
    assert len(find_sites(graph_of(model, torch.randn(B, L, H, d))).sites) == 1


def test_what_the_backward_pass_reads_again_is_not_overwritten():
    """Eager computes gradients from the new numbers, the op from its arguments."""

    def hidden_units(m: Ffn, q: Tensor) -> Tensor:
        hidden = m.hidden(q)
        y = project(hidden, m.down)
        hidden.detach().zero_()
        return y

    assert reasons(found(hidden_units)) == [Kind.MUTATION]
    assert len(found(hidden_units, trained=False).sites) == 1


def test_half_a_network_without_gradients_matters_where_some_are_wanted():
    def half(m: Ffn, q: Tensor) -> Tensor:
        records_gradients(q, False)
        gate = F.silu(project(q, m.gate))
        records_gradients(q, True)
        return project(gate * project(q, m.up), m.down)

    assert reasons(found(half)) == [Kind.GRADIENTS_CUT]
    assert len(find_sites(graph_of(Ffn(half).requires_grad_(False), torch.ones(B, L, H, d))).sites)


@pytest.mark.parametrize("trained", [False, True])
def test_a_network_is_not_half_in_a_region_of_inference_mode(trained: bool):
    """A view of what is computed there is of another kind than the op's result."""

    def viewed(m: Ffn, q: Tensor) -> Tensor:
        region = call(q, torch.autograd.grad_mode._enter_inference_mode, True)
        y = project(m.hidden(q), m.down)
        call(q, torch.autograd.grad_mode._exit_inference_mode, region)
        return y.flatten(2)

    def finished(m: Ffn, q: Tensor) -> Tensor:
        region = call(q, torch.autograd.grad_mode._enter_inference_mode, True)
        hidden = m.hidden(q)
        call(q, torch.autograd.grad_mode._exit_inference_mode, region)
        return project(hidden, m.down)

    assert reasons(found(viewed, trained=trained)) == [Kind.INFERENCE_REGION]
    assert reasons(found(finished, trained=trained)) == [Kind.GRADIENTS_CUT]


def test_a_result_takes_the_place_of_memory_that_is_overwritten():
    """Unless something reads that memory by another way than through the result's node."""

    def overwritten(m: Ffn, q: Tensor) -> Tensor:
        y = project(m.hidden(q), m.down)
        z = y.sin()
        y.zero_()
        return z + y

    def through_an_older_view(m: Ffn, q: Tensor) -> Tensor:
        product = project(m.hidden(q), m.down)
        older = product[:1]
        y = product.transpose(0, 1)
        older.zero_()
        return y * 2

    def twice(m: Ffn, q: Tensor) -> Tensor:
        y = project(m.hidden(q), m.down)
        z = project(m.hidden(q), m.down)
        z.zero_()
        return y + z

    assert len(found(overwritten, trained=False).sites) == 1
    assert len(found(through_an_older_view, trained=False).sites) == 1
    assert reasons(found(twice, trained=False)) == [Kind.MUTATION]


def test_a_result_may_be_copied_into_an_input_and_not_computed_there():
    def copied(m: Ffn, q: Tensor) -> Tensor:
        y = project(m.hidden(q), m.down)
        q.copy_(y)
        return y

    class Computed(nn.Module):
        """[H, tokens, d] to the same, the result in the memory of the second input."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.randn(H, d, f), torch.randn(H, f, d)

        def forward(self, q: Tensor, y: Tensor) -> Tensor:
            torch.bmm(torch.bmm(q, self.up).relu(), self.down, out=y)
            return y * 2

    def another_written(m: Ffn, q: Tensor) -> Tensor:
        y = project(m.hidden(q * 2), m.down)
        q.sin_()
        return y

    assert len(found(copied, trained=False).sites) == 1
    assert len(found(another_written, trained=False).sites) == 1
    x = torch.randn(H, L, d)
    with torch.no_grad():
        assert reasons(find_sites(graph_of(Computed(), x, x))) == [Kind.MUTATION]


# What is said of weights that depend on tokens.


def narrow(form: str, weights: Callable[[Ffn, Tensor], Tensor]) -> Callable[[Ffn, Tensor], Tensor]:
    """A network in bfloat16 whose down projection by other weights is cast from float32."""

    def compute(m: Ffn, q: Tensor) -> Tensor:
        x = q.bfloat16()
        gate, up = (torch.einsum("blhi,hif->blhf", x, w.bfloat16()) for w in (m.gate, m.up))
        return torch.einsum(form, F.silu(gate) * up, weights(m, q).bfloat16())

    return compute


ONE, EACH = "blhf,hfo->blho", "blhf,blhfo->blho"


@pytest.mark.parametrize(
    ("form", "weights", "kind"),
    [
        (EACH, lambda m, q: m.down * q[..., :1, None], Kind.MIXED_PRECISION),
        (EACH, lambda m, q: m.down + q[..., :1, None], Kind.TOKEN_DEPENDENT_WEIGHTS),
        (ONE, lambda m, q: (m.down + q.mean((0, 1, 2))) * 2, Kind.TOKEN_DEPENDENT_WEIGHTS),
        (EACH, lambda m, q: m.down * q[..., :f, None], Kind.TOKEN_DEPENDENT_WEIGHTS),
        (
            ONE,
            lambda m, q: (m.down + q.mean((0, 1, 2))) * m.gate[:, :1, :1],
            Kind.TOKEN_DEPENDENT_WEIGHTS,
        ),
        (ONE, lambda m, q: (m.down + q.mean((0, 1, 2))).sin(), Kind.TOKEN_DEPENDENT_WEIGHTS),
    ],
    ids=[
        "a router is multiplied",
        "a router is added",
        "a number is multiplied",
        "a factor of hidden units",
        "a factor of heads alone",
        "of one operand",
    ],
)
def test_a_router_before_a_cast_of_the_weights_is_told_apart(
    form: str, weights: Callable[[Ffn, Tensor], Tensor], kind: Kind
):
    assert reasons(found(narrow(form, weights))) == [kind]


def gathered(x: Tensor, z: Tensor) -> Tensor:
    return x.gather(1, z.argsort(1))


def added_by_addmm(x: Tensor, z: Tensor) -> Tensor:
    return torch.addmm(x, z.t(), torch.ones(d, d))


def read_twice(x: Tensor, z: Tensor) -> Tensor:
    """A sum, and the same turned round, so that tokens are along the other of its dimensions."""
    both = x[:, 0].unsqueeze(1) + z[:, 0]
    return both + both.t()


def doubled(x: Tensor, z: Tensor) -> Tensor:
    """Read on as many ways as nobody could follow one by one."""
    q = x + z
    for _ in range(40):
        q = q + q
    return q


class Two(Ffn):
    """Queries (d, d) made of two inputs, and a down projection that is made of one of them."""

    def __init__(self, query: Callable[[Tensor, Tensor], Tensor], source: int) -> None:
        super().__init__(lambda m, q: q)
        self.query, self.source = query, source

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        q, shift = self.query(x, z), (x, z)[self.source].mean()
        gate, up = (torch.einsum("td,hdf->thf", q, w) for w in (self.gate, self.up))
        return torch.einsum("thf,hfd->thd", F.silu(gate) * up, self.down + shift)


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("query", [added_by_addmm, gathered, read_twice, doubled])
def test_weights_may_not_be_made_of_what_tokens_are_made_of(
    query: Callable[[Tensor, Tensor], Tensor], source: int
):
    graph = graph_of(Two(query, source), torch.randn(d, d), torch.randn(d, d))
    assert reasons(find_sites(graph)) == [Kind.TOKEN_DEPENDENT_WEIGHTS]


def test_weights_may_be_made_of_what_scales_all_tokens_alike():
    scaled = Two(lambda x, z: x * z.mean(), 1)
    assert len(find_sites(graph_of(scaled, torch.randn(d, d), torch.randn(d, d))).sites) == 1


def test_an_axis_of_size_one_is_not_nested_in_heads():
    heads, one, inner = Axis(H), Axis(1), Axis(3)
    form = Affine(((heads, 6), (one, 2), (inner, 1)))
    assert _nested((form,), {heads}) == {inner}


# Values by themselves.


def held(*values: Value) -> tuple[CanonicalCopy, fx.Node]:
    """A copy in which nodes hold these values, and a node after them."""
    graph, copy = fx.Graph(), CanonicalCopy()
    for position, value in enumerate(values):
        node = graph.placeholder("x")
        copy.positions[node], copy.autocast[node] = position, {}
        copy.add_result(node, value, Storage(value), value.strides, is_part=False)
    op = graph.placeholder("op")
    copy.positions[op], copy.autocast[op] = len(values), {}
    return copy, op


def test_a_heads_output_that_no_node_holds_is_not_cut_out():
    piece = a_value(torch.ops.aten.mm.default)
    with pytest.raises(Declined) as declined:
        check_piece(piece, None, piece, CanonicalCopy())  # type: ignore[arg-type]
    assert declined.value.reason.kind is Kind.ESCAPING_INTERMEDIATE


@pytest.mark.parametrize(
    ("strides", "kind"), [((6, 1), None), ((1, 4), Kind.MUTATION)], ids=["as it is", "turned"]
)
def test_a_result_is_returned_in_the_memory_that_it_is_computed_in(
    strides: tuple[int, ...], kind: Kind | None
):
    value = a_value(torch.ops.aten.mm.default)
    graph, copy, memory = fx.Graph(), CanonicalCopy(), Storage(value)
    node = graph.placeholder("x")
    copy.add_result(node, value, memory, strides, is_part=False)
    copy.add_read(graph.output(node), node, value, memory)
    declined = None
    try:
        _check_returned_alone(value, copy)
    except Declined as error:
        declined = error.reason.kind
    assert declined is kind


@pytest.mark.parametrize("op", [INPUT, OPAQUE, COPY, SCATTER])
def test_what_no_node_holds_is_not_computed_again_where_no_operation_made_it(op: str):
    copy, node = held()
    copy.autocast.clear()
    with pytest.raises(Declined) as declined:
        _check_readable(a_value(op, a_value(INPUT)), copy, node, records=True)
    assert declined.value.reason.kind is Kind.MUTATION


@pytest.mark.parametrize(("wanted", "kind"), [(True, Kind.GRADIENTS_CUT), (False, None)])
def test_what_is_computed_again_has_its_gradients(wanted: bool, kind: Kind | None):
    x = a_value(INPUT, requires_grad=wanted)
    copy, node = held(x)
    again = a_value(torch.ops.aten.sin.default, x, requires_grad_mode=False)
    copy.autocast[again.origin] = {}
    assert refused(again, copy, node) is kind


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (torch.ops.aten.sin.default, Kind.AUTOCAST_BOUNDARY),
        (torch.ops.aten.clone.default, None),
        (torch.ops.aten._to_copy.default, None),
    ],
    ids=["computed", "a view", "a cast"],
)
def test_what_is_computed_again_has_its_autocast(op: Any, kind: Kind | None):
    x = a_value(INPUT)
    copy, node = held(x)
    dtype = torch.bfloat16 if op is torch.ops.aten._to_copy.default else torch.float32
    again = a_value(op, x, dtype=dtype)
    copy.autocast[again.origin] = {"cpu": torch.bfloat16}
    assert refused(again, copy, node) is kind


def refused(value: Value, copy: CanonicalCopy, node: fx.Node) -> Kind | Any:
    try:
        _check_readable(value, copy, node, records=True)
    except Declined as declined:
        return declined.reason.kind
    return None


def test_a_gradient_is_looked_for_once_in_each_value():
    """Each of forty is read twice by the next."""
    value = first = a_value(INPUT)
    values = [first]
    for _ in range(40):
        value = a_value(torch.ops.aten.add.Tensor, value, value)
        values[-1].readers += [value, value]
        values.append(value)
    copy, _ = held(*values)
    copy.finish()
    copy._live.update(values)
    assert not _has_gradient(first, copy)
