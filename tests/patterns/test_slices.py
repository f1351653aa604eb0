"""Slices: sub-networks of one batched product, summed one by one, and parts of the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler import Report
from mhf_compiler.patterns import Kind

T, H, E, d, f = 7, 3, 4, 8, 5  # tokens, heads, sub-networks, width, hidden units
Combine = Callable[[Tensor, Tensor], Tensor]  # outputs [T, H, E, d], router [T, H, E]


class Sliced(nn.Module):
    """All sub-networks at once; ``combine`` says what becomes of their outputs."""

    def __init__(self, combine: Combine, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.combine = combine
        shapes = (H, E, f, d), (H, E, f, d), (H, E, f, d)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(s) / 3) for s in shapes)
        self.bias = nn.Parameter(torch.randn(H, E, d)) if bias else None
        self.route = nn.Parameter(torch.randn(H, d, E))

    def hidden(self, q: Tensor) -> Tensor:
        gate, up = (torch.einsum("thd,hefd->thef", q, w) for w in (self.gate, self.up))
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        y = torch.einsum("thef,hefd->thed", self.hidden(q), self.down)
        if self.bias is not None:
            y = y + self.bias
        return self.combine(y, torch.einsum("thd,hde->the", q, self.route).softmax(-1))


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(T, H * d, requires_grad=True)


def explained(model: nn.Module) -> Report:
    """The report, after values and gradients have been compared with those of the original."""
    options = {"rewrite": "always", "fallback": "eager", "strict": True}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    runs = []
    for run in (model, compiled):
        x = tokens()
        results = run(x)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [x, *model.parameters()]
        total = sum(result.square().sum() for result in results)
        runs.append((*results, *torch.autograd.grad(total, wanted, allow_unused=True)))
    for value, exact in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)
    return mhf_compiler.explain(model, options=options)(tokens())


def added(y: Tensor, r: Tensor) -> Tensor:
    return y[..., 0, :] + y[..., 1, :] + y[..., 2, :] + y[..., 3, :]


def unbound(y: Tensor, r: Tensor) -> Tensor:
    return sum(y.unbind(-2))


def in_another_order(y: Tensor, r: Tensor) -> Tensor:
    a, b, c, e = y.unbind(2)
    return (c + b) + (e + a)


def selected(y: Tensor, r: Tensor) -> Tensor:
    return sum(y.select(2, e) for e in range(E)) / E


def in_chunks(y: Tensor, r: Tensor) -> Tensor:
    first, second = y.chunk(2, 2)
    return (first + second).sum(2)


def split_one_by_one(y: Tensor, r: Tensor) -> Tensor:
    return sum(y.split(1, 2)).squeeze(2)


def in_strides(y: Tensor, r: Tensor) -> Tensor:
    return (y[:, :, ::2] + y[:, :, 1::2]).sum(2)


def in_place(y: Tensor, r: Tensor) -> Tensor:
    out = torch.zeros_like(y[:, :, 0])
    for e in range(E):
        out += y[:, :, e]
    return out


def routed(y: Tensor, r: Tensor) -> Tensor:
    return sum(r[..., e, None] * y[..., e, :] for e in range(E))


def routed_in_place(y: Tensor, r: Tensor) -> Tensor:
    out = torch.zeros_like(y[:, :, 0])
    for e in range(E):
        out.addcmul_(y[:, :, e], r[..., e, None])
    return out


def routed_by_einsum(y: Tensor, r: Tensor) -> Tensor:
    return sum(
        torch.einsum("thd,th->thd", a, b) for a, b in zip(y.unbind(2), r.unbind(2), strict=True)
    )


def head_by_head(y: Tensor, r: Tensor) -> Tensor:
    return torch.stack([unbound(one, r) for one in y.unbind(1)], 1)


def of_stacked_slices(y: Tensor, r: Tensor) -> Tensor:
    return torch.stack([r[..., e, None] * y[..., e, :] for e in range(E)]).sum(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "combine",
    [
        *(added, unbound, in_another_order, selected, in_chunks, split_one_by_one, in_strides),
        *(in_place, routed, routed_in_place, routed_by_einsum, head_by_head, of_stacked_slices),
    ],
)
def test_slices_that_are_summed_are_sub_networks(combine: Combine, bias: bool):
    report = explained(Sliced(combine, bias))
    (site,) = report.rewritten
    assert (site.sub_networks, site.heads) == (E, H)
    assert not report.declined


class PerSubNetwork(Sliced):
    """Gate and up for all sub-networks at once, a down projection for each."""

    def __init__(self, order: tuple[int, ...] = tuple(range(E)), skipped: bool = False) -> None:
        super().__init__(added)
        self.order, self.skipped = order, skipped

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.hidden(x.unflatten(-1, (H, d)))
        total = sum(
            torch.einsum("thf,hfd->thd", hidden[:, :, e], self.down[:, n])
            for e, n in enumerate(self.order)
        )
        return (total, hidden[:, :, -1]) if self.skipped else total


def test_slices_of_hidden_units_are_those_of_sub_networks():
    (site,) = explained(PerSubNetwork()).rewritten
    assert (site.sub_networks, site.heads) == (E, H)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 0, 1, 2)])
def test_slices_of_hidden_units_with_weights_of_others(order: tuple[int, ...]):
    report = explained(PerSubNetwork(order))
    assert all(site.sub_networks == 1 for site in report.rewritten)


def test_slices_of_hidden_units_that_are_returned():
    report = explained(PerSubNetwork((0, 1), skipped=True))
    assert all(site.sub_networks == 1 for site in report.rewritten)
    kinds = {site.reason.kind for site in report.declined if site.reason}
    assert kinds == {Kind.ESCAPING_INTERMEDIATE}


@pytest.mark.parametrize("first", [0, 1])
def test_a_part_of_the_sub_networks_is_read_from_the_weights_of_all(first: int):
    """Every second one, from the first or the second on: nothing reads the others."""
    report = explained(Sliced(lambda y, r: y[..., first, :] + y[..., first + 2, :]))
    (site,) = report.rewritten
    assert (site.sub_networks, site.heads) == (2, H)


def test_a_slice_that_is_added_twice_is_twice_the_slice():
    report = explained(Sliced(lambda y, r: added(y, r) + unbound(y, r)))
    (site,) = report.rewritten
    assert site.sub_networks == E
    report = explained(Sliced(lambda y, r: y[..., 0, :] + y[..., 0, :]))
    assert [site.sub_networks for site in report.rewritten] == [1]


#: what becomes of the outputs -> the kind of the reason, and a part of its detail
DECLINED: dict[str, tuple[Callable[[Tensor, Tensor], object], Kind, str]] = {
    "not evenly spaced": (
        lambda y, r: y[..., 0, :] + y[..., 1, :] + y[..., 3, :],
        Kind.IRREGULAR_WEIGHTS,
        "",
    ),
    "one of them twice": (
        lambda y, r: y[..., 0, :] + y[..., 1, :] + y[..., 0, :],
        Kind.UNEQUAL_HEADS,
        "factors 2 and 1",
    ),
    "different numbers": (
        lambda y, r: 2 * y[..., 0, :] + y[..., 1, :],
        Kind.UNEQUAL_HEADS,
        "factors 2 and 1",
    ),
    "different signs": (
        lambda y, r: y[..., 0, :] - y[..., 1, :],
        Kind.UNEQUAL_HEADS,
        "factors 1 and -1",
    ),
    "the routers of others": (
        lambda y, r: r[..., 1, None] * y[..., 0, :] + r[..., 0, None] * y[..., 1, :],
        Kind.IRREGULAR_WEIGHTS,
        "",
    ),
    "a router for one": (
        lambda y, r: r[..., 0, None] * y[..., 0, :] + y[..., 1, :],
        Kind.UNEQUAL_HEADS,
        "router",
    ),
    "some overlap": (
        lambda y, r: y[..., :3, :].sum(2) + y[..., 1:, :].sum(2),
        Kind.UNSUPPORTED_LAYOUT,
        "overlapping parts",
    ),
    "along the width": (
        lambda y, r: y[..., : d // 2].sum(2) + y[..., d // 2 :].sum(2),
        Kind.UNEQUAL_WIDTHS,
        "",
    ),
    "along tokens": (lambda y, r: y[:3].sum(2) + y[3:6].sum(2), Kind.ROUTER_ON_INPUT, ""),
    "one activated": (
        lambda y, r: y[..., 0, :].tanh() + y[..., 1, :].tanh(),
        Kind.UNKNOWN_OPERATION,
        "tanh",
    ),
    "one turned around": (
        lambda y, r: y[..., 0, :] + y[..., 1, :].flip(-1),
        Kind.UNKNOWN_OPERATION,
        "flip",
    ),
    "one turned around, and viewed": (
        lambda y, r: y[..., 0, :] + y[..., 1, :].flip(-1).transpose(0, 1).transpose(0, 1),
        Kind.UNKNOWN_OPERATION,
        "flip",
    ),
    "the largest": (
        lambda y, r: torch.maximum(y[..., 0, :], y[..., 1, :]),
        Kind.UNKNOWN_OPERATION,
        "maximum",
    ),
    "another one is returned": (
        lambda y, r: (y[..., 0, :] + y[..., 1, :], y[..., 2, :]),
        Kind.ESCAPING_INTERMEDIATE,
        "a part is returned",
    ),
    "two are stacked": (
        lambda y, r: torch.stack([y[..., 0, :], y[..., 1, :]]),
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        "two dimensions",
    ),
    "two are stacked, another one is returned": (
        lambda y, r: (torch.stack([y[..., 0, :], y[..., 1, :]]), y[..., 2, :]),
        Kind.ESCAPING_INTERMEDIATE,
        "a part is returned",
    ),
    "one of them is multiplied by a matrix first": (
        lambda y, r: y[..., 0, :] + y[..., 1, :] @ y.new_ones(d, d),
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        "two dimensions",
    ),
    "all are normalised": (
        lambda y, r: y * y.square().mean(-1, keepdim=True).rsqrt(),
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        "two dimensions",
    ),
    "something is made of all of them, and of their projection": (
        lambda y, r: y.sin() + (y @ y.new_ones(d, d)).sin(),
        Kind.TOKEN_DEPENDENT_WEIGHTS,
        "two dimensions",
    ),
    "one of them is returned": (
        lambda y, r: (added(y, r), y[..., 0, :]),
        Kind.ESCAPING_INTERMEDIATE,
        "a part is returned",
    ),
    "all are returned": (
        lambda y, r: (added(y, r), y),
        Kind.ESCAPING_INTERMEDIATE,
        "a part is returned",
    ),
    "one of them is read": (
        lambda y, r: (y[..., 0, :] + y[..., 1, :], y[..., 1, :].tanh()),
        Kind.ESCAPING_INTERMEDIATE,
        "read by tanh",
    ),
    "one of them is multiplied": (
        lambda y, r: (added(y, r), y[0] @ y[0].mT),
        Kind.ESCAPING_INTERMEDIATE,
        "read by",
    ),
    "two sums": (
        lambda y, r: (y[..., 0, :] + y[..., 1, :], y[..., 2, :] + y[..., 3, :]),
        Kind.ESCAPING_INTERMEDIATE,
        "in several sums",
    ),
}


@pytest.mark.parametrize(("combine", "kind", "detail"), DECLINED.values(), ids=DECLINED)
def test_slices_that_are_no_sub_networks_of_one(combine: Combine, kind: Kind, detail: str):
    report = explained(Sliced(combine))
    assert not report.rewritten
    (site,) = report.declined
    assert site.reason is not None
    assert site.reason.kind is kind
    assert detail in site.reason.detail


class TwoProducts(Sliced):
    """Sub-networks of two batched products; ``mix`` says which slices are added."""

    def __init__(self, mix: Combine) -> None:
        super().__init__(added)
        self.mix = mix
        self.other = nn.Parameter(torch.randn(H, E, f, d) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        first, second = (
            torch.einsum("thef,hefd->thed", hidden, self.down)
            for hidden in (self.hidden(q), F.silu(torch.einsum("thd,hefd->thef", q, self.other)))
        )
        return self.mix(first, second)


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a[:, :, 0] + b[:, :, 0],
        lambda a, b: a[:, :, 0] + b[:, :, 1],
        lambda a, b: a[:, :, 0] + a[:, :, 1] + b[:, :, 2] + b[:, :, 3],
    ],
)
def test_slices_of_different_products_are_not_mixed(mix: Combine):
    report = explained(TwoProducts(mix))
    assert all(site.sub_networks <= 2 for site in report.rewritten)


# Parts of a dynamic number of tokens.


class OfTokens(Sliced):
    """The network of what ``part`` makes of the tokens [B, L, H * d]."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__(unbound)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        part = self.part(x)
        return super().forward(part.flatten(0, 1)).unflatten(0, part.shape[:2])


def third(size: int) -> int:
    return size // 3


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the first half": lambda x: x[:, : x.shape[1] // 2],
    "the second half": lambda x: x[:, x.shape[1] // 2 :],
    "the larger half": lambda x: x.chunk(2, 1)[0],
    "the smaller half": lambda x: x.chunk(2, 1)[1],
    "the third of four": lambda x: x.chunk(4, 1)[2],
    "a third in the middle": lambda x: x[:, third(x.shape[1]) : 2 * third(x.shape[1])],
    "all but a quarter": lambda x: x[:, : x.shape[1] - x.shape[1] // 4],
    "all but the last": lambda x: x[:, :-1],
    "the first five": lambda x: x[:, :5],
    "every second one": lambda x: x[:, ::2],
    "every third one from one on": lambda x: x[:, 1::3],
    "the first of each pair": lambda x: x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2))[:, :, 0],
    "windows in twos": lambda x: x.unfold(1, 2, 1).mT.flatten(1, 2),
    "rows that overlap": lambda x: x.as_strided(
        (2, x.shape[1] * 2 - 1, H * d), (x.shape[1] * H * d, H * d // 2, 1)
    ),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_of_a_dynamic_number_of_tokens(part: Callable[[Tensor], Tensor]):
    """What lies in the tokens by its size is read there; all else is a tensor of its own."""
    options = {"rewrite": "always", "fallback": "eager", "strict": True}
    model = OfTokens(part)
    compiled = torch.compile(model, backend="flashmhf", options=options)
    for size in (21, 14, 12, 9):
        x = torch.randn(2, size, H * d, requires_grad=True)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        pairs = []
        for run in (model, compiled):
            y = run(x)
            pairs.append((y, *torch.autograd.grad(y.square().sum(), [x, *weights_of(model)])))
        for value, exact in zip(pairs[1], pairs[0], strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 21, H * d)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    (site,) = mhf_compiler.explain(model, options=options)(x).rewritten
    assert site.sub_networks == E


def weights_of(model: Sliced) -> list[Tensor]:
    return [model.gate, model.up, model.down]


class Overlapping(OfTokens):
    """Heads of 8 columns that begin at every fourth one."""

    def forward(self, x: Tensor) -> Tensor:
        q = torch.stack([x[:, : x.shape[1] // 2, 4 * h : 4 * h + d] for h in range(H)], 2)
        return super(OfTokens, self).forward(q.flatten(0, 1).flatten(1))


def test_heads_that_read_overlapping_columns_are_no_view():
    x = torch.randn(2, 21, H * d)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    options = {"rewrite": "always", "fallback": "eager", "strict": True}
    model = Overlapping(lambda x: x)
    report = mhf_compiler.explain(model, options=options)(x)
    (site,) = report.declined
    assert site.reason is not None
    assert site.reason.kind is Kind.UNSUPPORTED_LAYOUT
    assert "overlapping parts" in site.reason.detail
    compiled = torch.compile(model, backend="flashmhf", options=options)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
