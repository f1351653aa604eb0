"""Unrolled loops: copies of one term become one term with one more axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from support.graphs import graph_of
from support.values import a_value
from torch import Tensor, fx, nn

import mhf_compiler
from mhf_compiler import Report
from mhf_compiler.patterns import STACK, Kind, Site, find_sites
from mhf_compiler.patterns.canonical import INPUT
from mhf_compiler.patterns.recognise import Findings
from mhf_compiler.patterns.rolling import same_tensor

N, d, f = 4, 8, 5  # heads or sub-networks, width, hidden units


class OneTensor(nn.Module):
    """A loop over heads; ``order`` says which weights each of them reads."""

    def __init__(self, order: Sequence[int] = range(N), stored: int = N) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.up, self.down = (
            nn.Parameter(torch.randn(stored, *shape) / 4) for shape in ((d, f), (f, d))
        )

    def forward(self, x: Tensor) -> Tensor:
        pieces = [
            F.silu(q @ self.up[n]) @ self.down[n]
            for q, n in zip(x.chunk(N, -1), self.order, strict=True)
        ]
        return torch.cat(pieces, -1)


class Summed(OneTensor):
    """A loop over sub-networks."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.silu(x @ self.up[n]) @ self.down[n] for n in self.order)  # type: ignore[return-value]


class Separate(nn.Module):
    """A loop over heads with weights in tensors of their own."""

    def __init__(
        self,
        widths: Sequence[int] = (f,) * N,
        acts: Sequence[Callable[[Tensor], Tensor]] = (F.silu,) * N,
        scales: Sequence[float] = (1.0,) * N,
        biases: Sequence[bool] = (False,) * N,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.acts, self.scales = acts, scales
        self.ups = nn.ModuleList(
            nn.Linear(d, width, bias) for width, bias in zip(widths, biases, strict=True)
        )
        self.downs = nn.ModuleList(nn.Linear(width, d, bias=False) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        loop = zip(x.chunk(N, -1), self.ups, self.downs, self.acts, self.scales, strict=True)
        return torch.cat([down(act(up(q))) * scale for q, up, down, act, scale in loop], -1)


def site_of(model: nn.Module, x: Tensor) -> Site:
    sites: list[Site] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        sites.extend(find_sites(gm).sites)
        return gm.forward

    torch.compile(model, backend=collect, fullgraph=True)(x)
    (site,) = sites
    return site


def explain(model: nn.Module, x: Tensor) -> Report:
    """The report, after the rewritten model has been compared with the original."""
    options = {"rewrite": "always", "fallback": "eager", "strict": True}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    return mhf_compiler.explain(model, options=options)(x)


def heads() -> Tensor:
    return torch.randn(2, 6, N * d)


@pytest.mark.parametrize(
    ("order", "stored"),
    [((0, 1, 2, 3), 4), ((2, 3, 4, 5), 8), ((0, 2, 4, 6), 8), ((1, 4, 7, 10), 12)],
    ids=["all", "some in the middle", "every other", "every third, from one on"],
)
def test_offsets_in_arithmetic_progression_become_an_axis(order: Sequence[int], stored: int):
    """The weights enter without a copy."""
    model = OneTensor(order, stored)
    site = site_of(model, heads())
    assert (site.heads, site.groups) == (N, N)
    assert all(view.value.op != STACK for view in site.views().values())
    assert len(explain(model, heads()).rewritten) == 1


@pytest.mark.parametrize("order", [(0, 0, 1, 1), (1, 1, 4, 4), (2, 2, 2, 2)])
def test_offsets_that_are_repeated_alike_are_groups_of_heads(order: Sequence[int]):
    model = OneTensor(order, 5)
    site = site_of(model, heads())
    assert (site.heads, site.groups) == (N, len({*order}))
    assert all(view.value.op != STACK for view in site.views().values())
    assert len(explain(model, heads()).rewritten) == 1


class Nested(nn.Module):
    """Eight heads: four share a gate, two an up projection, and each has its own way down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (
            nn.ParameterList(torch.randn(*shape) / 4 for _ in range(count))
            for count, shape in ((2, (d, f)), (4, (d, f)), (8, (f, d)))
        )

    def forward(self, x: Tensor) -> Tensor:
        pieces = [
            (F.silu(q @ self.gate[n // 4]) * (q @ self.up[n // 2])) @ self.down[n]
            for n, q in enumerate(x.chunk(8, -1))
        ]
        return torch.cat(pieces, -1)


def test_groups_may_lie_within_groups():
    """However often it is read: no order is left to where objects happen to lie in memory."""
    x = torch.randn(2, 6, 8 * d)
    for site in [site_of(Nested(), x) for _ in range(7)]:
        assert (site.heads, site.groups) == (8, 8)
    assert len(explain(Nested(), x).rewritten) == 1


@pytest.mark.parametrize(
    "order", [(0, 1, 3, 2), (3, 2, 1, 0), (0, 1, 2, 4), (0, 1, 0, 1), (0, 0, 0, 1), (1, 1, 0, 0)]
)
def test_other_offsets_are_declined(order: Sequence[int]):
    (miss,) = explain(OneTensor(order, 5), heads()).declined
    assert miss.reason is not None
    assert miss.reason.kind is Kind.IRREGULAR_WEIGHTS


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)])
def test_a_sum_may_come_in_any_order(order: Sequence[int]):
    model, x = Summed(order), torch.randn(2, 6, d)
    site = site_of(model, x)
    assert (site.heads, site.sub_networks) == (1, N)
    assert len(explain(model, x).rewritten) == 1


def test_sub_networks_that_share_one_weight_are_not_the_same():
    class Tied(Separate):
        def forward(self, x: Tensor) -> Tensor:
            return sum(self.downs[0](F.silu(up(x))) for up in self.ups)  # type: ignore[return-value]

    (site,) = explain(Tied(), torch.randn(2, 6, d)).rewritten
    assert site.sub_networks == N


def test_sub_networks_that_share_all_weights_are_declined():
    """They differ in their biases. The op would multiply by the same weights for each of them."""

    class Shared(OneTensor):
        def __init__(self) -> None:
            super().__init__()
            self.biases = nn.Parameter(torch.randn(N, f))

        def forward(self, x: Tensor) -> Tensor:
            up, down = self.up[0], self.down[0]
            return sum(F.silu(x @ up + bias) @ down for bias in self.biases)  # type: ignore[return-value]

    (miss,) = explain(Shared(), torch.randn(2, 6, d)).declined
    assert miss.reason is not None
    assert miss.reason.kind is Kind.UNEQUAL_HEADS
    assert "share all of their weights" in str(miss.reason)


def test_tensors_of_their_own_are_stacked():
    site = site_of(Separate(), heads())
    stacked = {role: view.value.op == STACK for role, view in site.views().items()}
    assert stacked == {"query": False, "gate": True, "down": True}
    assert (site.heads, site.groups, site.hidden) == (N, N, f)
    assert len(explain(Separate(), heads()).rewritten) == 1


def test_a_factor_of_all_terms_is_one_factor():
    site = site_of(Separate(scales=(0.5,) * N), heads())
    assert site.out_scale == 0.5


UNEQUAL = {
    "hidden units": {"widths": (5, 5, 6, 5)},
    "activations": {"acts": (F.silu, F.silu, F.silu, F.gelu)},
    "factors": {"scales": (1.0, 1.0, 2.0, 1.0)},
    "biases": {"biases": (True, True, True, False)},
}


@pytest.mark.parametrize("arguments", UNEQUAL.values(), ids=UNEQUAL)
def test_terms_that_differ_are_declined(arguments: dict[str, Sequence[object]]):
    (miss,) = explain(Separate(**arguments), heads()).declined  # type: ignore[arg-type]
    assert miss.reason is not None
    assert miss.reason.kind is Kind.UNEQUAL_HEADS


def test_the_difference_is_named():
    (miss,) = explain(Separate(acts=(F.silu, F.relu, F.silu, F.silu)), heads()).declined
    assert "silu and relu" in str(miss.reason)
    (miss,) = explain(Separate(widths=(5, 6, 5, 5)), heads()).declined
    assert "hidden units [5] and [6]" in str(miss.reason)


def test_a_loop_of_one_is_no_loop():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(*s)) for s in ((d, f), (f, d)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.silu(x @ self.up) @ self.down], -1)

    (miss,) = explain(One(), torch.randn(2, 6, d)).ordinary
    assert miss.reason is not None
    assert miss.reason.kind is Kind.PLAIN_FFN


# Heads in graphs as they are written.


class Loop(nn.Module):
    """Heads of a loop, each by a function of the queries (6, d), and stacked."""

    def __init__(self, head: Callable[[Loop, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.head = head
        self.up = nn.ParameterList(torch.randn(d, d) for _ in range(N))
        self.down = nn.Parameter(torch.randn(N, d, d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self, x, h) for h in range(N)])


def found(head: Callable[[Loop, Tensor, int], Tensor]) -> Findings:
    return find_sites(graph_of(Loop(head), torch.randn(6, d)))


def test_input_widths_that_differ_are_named():
    def head(m: Loop, x: Tensor, h: int) -> Tensor:
        width = d - 2 * (h == 1)
        return F.relu(x[:, :width] @ m.up[h][:width]) @ m.down[h]

    findings = found(head)
    assert findings.sites == []
    assert any(f"input widths [{d}] and [{d - 2}]" in str(m.reason) for m in findings.near_misses)


@pytest.mark.parametrize("turned", [False, True])
def test_tensors_of_their_own_are_read_alike(turned: bool):
    def head(m: Loop, x: Tensor, h: int) -> Tensor:
        weight = m.up[h].t() if turned and h == 1 else m.up[h]
        return F.relu(x @ weight) @ m.down[h]

    assert len(found(head).sites) == (0 if turned else 1)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_heads_in_another_order_that_are_cast_one_by_one_are_stacked(order: tuple[int, ...]):
    """In their own order they are parts of one cast."""

    def head(m: Loop, x: Tensor, h: int) -> Tensor:
        down = m.down[order[h]].bfloat16()
        return F.relu(x.bfloat16() @ m.up[h].bfloat16()) @ down

    (site,) = found(head).sites
    assert (site.down.value.op == STACK) is (order != (0, 1, 2, 3))


def test_stacks_are_the_same_if_all_of_them_is():
    a, b = a_value(INPUT), a_value(INPUT)
    assert same_tensor(a_value(STACK, a, b), a_value(STACK, a, b))
    assert not same_tensor(a_value(STACK, a, b), a_value(STACK, a, a))
    assert not same_tensor(a_value(STACK, a, b), a_value(STACK, a, b, a))
