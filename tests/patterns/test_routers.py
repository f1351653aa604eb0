"""Products of widened queries before a router: which are taken, and which stay as they are."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mhf_compiler.patterns import RouterProduct, find_router_products, find_sites

B, L, H, E, d, f = 2, 6, 4, 3, 8, 5

Router = Callable[[nn.Module, Tensor], Tensor]


class Network(nn.Module):
    """Sub-networks in bfloat16 whose router ``route`` computes from the queries (B, L, H, d)."""

    def __init__(self, route: Router) -> None:
        super().__init__()
        self.route = route
        shape = H, E, d, f
        self.gate, self.up = (nn.Parameter(torch.randn(shape).bfloat16()) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, E, f, d).bfloat16())
        self.per_head = nn.Parameter(torch.randn(H, d, E))
        self.flat = nn.Parameter(torch.randn(E, H * d))
        self.narrow = nn.Parameter(torch.randn(H, d, E).bfloat16())
        self.shared = nn.Linear(d, E)
        self.factor = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        r = self.route(self, q).to(q.dtype)
        hidden = F.silu(torch.einsum("blhd,hedf->blhef", q, self.gate))
        hidden = hidden * torch.einsum("blhd,hedf->blhef", q, self.up)
        return torch.einsum("blhef,hefd,blhe->blhd", hidden, self.down, r).flatten(2)


def products(route: Router, tokens: tuple[int, int] = (B, L)) -> list[RouterProduct]:
    found: list[RouterProduct] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        findings = find_sites(gm)
        assert findings.copy is not None
        (site,) = findings.sites
        found.extend(*find_router_products([site], findings.copy))
        return gm.forward

    model = Network(route)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(*tokens, H * d).bfloat16())
    return found


def einsum(m: nn.Module, q: Tensor) -> Tensor:
    return torch.einsum("blhd,hde->blhe", q.float(), m.per_head).sigmoid()


def weights_first(m: nn.Module, q: Tensor) -> Tensor:
    return torch.einsum("hde,blhd->bhle", m.per_head, q.float()).transpose(1, 2).sigmoid()


def matmul(m: nn.Module, q: Tensor) -> Tensor:
    return (q.float().transpose(1, 2) @ m.per_head).transpose(1, 2).softmax(-1)


def bmm(m: nn.Module, q: Tensor) -> Tensor:
    rows = q.to(torch.float32).flatten(0, 1).transpose(0, 1)  # (H, B L, d)
    return torch.bmm(rows, m.per_head).transpose(0, 1).unflatten(0, q.shape[:2]).sigmoid()


def cast_afterwards(m: nn.Module, q: Tensor) -> Tensor:
    return torch.einsum("blhd,hde->blhe", q.transpose(1, 2).float().transpose(1, 2), m.per_head)


def for_all_heads(m: nn.Module, q: Tensor) -> Tensor:
    return F.softmax(m.shared(q.float()), dim=-1)


def narrow_weights(m: nn.Module, q: Tensor) -> Tensor:
    logits = torch.einsum("blhd,hde->blhe", q.float(), m.narrow.float()).sigmoid()
    return logits / logits.sum(-1, keepdim=True).clamp_min(1e-20)


def best_two(m: nn.Module, q: Tensor) -> Tensor:
    logits = torch.einsum("blhd,hde->blhe", q.float(), m.per_head)
    best, where = logits.topk(2, dim=-1)
    return torch.zeros_like(logits).scatter(-1, where, best.softmax(-1))


def of_all_features(m: nn.Module, q: Tensor) -> Tensor:
    return F.linear(q.flatten(2).float(), m.flat).sigmoid()[:, :, None].expand(-1, -1, H, -1)


PER_HEAD = [einsum, weights_first, matmul, bmm, cast_afterwards, narrow_weights, best_two]


@pytest.mark.parametrize("route", PER_HEAD)
def test_spellings_of_one_product(route: Router):
    (product,) = products(route)
    assert product.query.shape == (B, L, H, d)
    assert product.weight.shape == (H, d, E)
    assert product.query.value.dtype is torch.bfloat16
    assert product.bias is None


@pytest.mark.parametrize("route", PER_HEAD)
@pytest.mark.parametrize("tokens", [(1, 1), (1, L), (B, 1)], ids=str)
def test_few_tokens(route: Router, tokens: tuple[int, int]):
    """Down to the one of a decoding step, which leaves no axis of tokens."""
    (product,) = products(route, tokens)
    assert math.prod(product.query.shape[:2]) == math.prod(tokens)
    assert product.query.shape[2:] == (H, d)
    assert product.weight.shape == (H, d, E)


def test_narrow_weights_are_read_as_they_are():
    (product,) = products(narrow_weights)
    assert product.weight.value.dtype is torch.bfloat16


def test_one_router_for_all_heads_with_a_bias():
    (product,) = products(for_all_heads)
    assert product.weight.shape == (1, d, E)
    assert product.query.shape[-1] == d
    assert product.bias is not None


def test_one_router_for_a_whole_token():
    (product,) = products(of_all_features)
    assert product.weight.shape == (1, H * d, E)


# What stays.


def in_16_bits(m: nn.Module, q: Tensor) -> Tensor:
    return torch.einsum("blhd,hde->blhe", q, m.narrow).float().sigmoid()


def in_float64(m: nn.Module, q: Tensor) -> Tensor:
    return torch.einsum("blhd,hde->blhe", q.double(), m.per_head.double()).float()


def scaled_before(m: nn.Module, q: Tensor) -> Tensor:
    """What is read is no 16-bit tensor."""
    return torch.einsum("blhd,hde->blhe", q.float() * m.factor, m.per_head)


def normalised_before(m: nn.Module, q: Tensor) -> Tensor:
    return torch.einsum("blhd,hde->blhe", F.normalize(q.float(), dim=-1), m.per_head)


def with_the_queries_themselves(m: nn.Module, q: Tensor) -> Tensor:
    """Both operands are tokens."""
    scores = torch.einsum("blhd,blgd->blhg", q.float(), q.float())  # (B, L, H, H)
    return scores[..., :E]


def overwritten(m: nn.Module, q: Tensor) -> Tensor:
    logits = torch.einsum("blhd,hde->blhe", q.float(), m.per_head)
    return logits.sigmoid_()


def part_without_gradients(m: nn.Module, q: Tensor) -> Tensor:
    with torch.no_grad():
        wide = q.float()
    return torch.einsum("blhd,hde->blhe", wide, m.per_head).sigmoid()


def scaled_product(m: nn.Module, q: Tensor) -> Tensor:
    rows = q.float().flatten(0, 1).transpose(0, 1)
    zeros = torch.zeros(1, 1, 1)
    logits = torch.baddbmm(zeros, rows, m.per_head, alpha=0.5)
    return logits.transpose(0, 1).unflatten(0, (B, L)).sigmoid()


def hook_on_the_copy(m: nn.Module, q: Tensor) -> Tensor:
    wide = (q * m.factor.to(q.dtype)).float()
    logits = torch.einsum("blhd,hde->blhe", wide, m.per_head)
    wide.register_hook(torch.zeros_like)
    return logits.sigmoid()


def copy_overwritten_behind_autograd(m: nn.Module, q: Tensor) -> Tensor:
    wide = q.float()
    logits = torch.einsum("blhd,hde->blhe", wide, m.per_head)
    wide.detach().zero_()
    return logits.sigmoid()


def weights_copy_overwritten(m: nn.Module, q: Tensor) -> Tensor:
    wide = m.narrow.float()
    logits = torch.einsum("blhd,hde->blhe", q.float(), wide)
    wide.detach().zero_()
    return logits.sigmoid()


def narrow_weights_of_wide_tokens(m: nn.Module, q: Tensor) -> Tensor:
    """A float32 input: what is widened are the weights."""
    return torch.einsum("blhd,hde->blhe", q.double().float(), m.narrow.float())


def head_by_head(m: nn.Module, q: Tensor) -> Tensor:
    """As many calls as heads would not pay."""
    logits = [q[:, :, h].float() @ m.per_head[h] for h in range(H)]
    return torch.stack(logits, dim=2).sigmoid()


def static(m: nn.Module, q: Tensor) -> Tensor:
    return m.per_head.sum(1).sigmoid().expand(B, L, H, E)


def static_product(m: nn.Module, q: Tensor) -> Tensor:
    """It reads no tokens."""
    prompt = (m.gate[:, 0, :, 0] * 2).float()
    return torch.einsum("hd,hde->he", prompt, m.per_head).sigmoid().expand(B, L, H, E)


@pytest.mark.parametrize(
    "route",
    [
        in_16_bits,
        in_float64,
        scaled_before,
        normalised_before,
        with_the_queries_themselves,
        overwritten,
        part_without_gradients,
        scaled_product,
        hook_on_the_copy,
        copy_overwritten_behind_autograd,
        weights_copy_overwritten,
        narrow_weights_of_wide_tokens,
        head_by_head,
        static,
        static_product,
    ],
)
def test_other_products_stay(route: Router):
    assert products(route) == []


def test_the_product_of_an_earlier_layer_is_not_looked_for():
    """What is above another product is not this router's."""

    def above_another(m: nn.Module, q: Tensor) -> Tensor:
        early = torch.einsum("blhd,hde->blhe", q.float(), m.per_head)
        return early @ torch.eye(E)

    assert products(above_another) == []


def test_queries_that_are_overwritten_later_stay():
    """Eager saves the float32 copy; the op would save the queries themselves."""

    def through_data(m: nn.Module, q: Tensor) -> Tensor:
        twice = q * 2
        r = torch.einsum("blhd,hde->blhe", twice.float(), m.per_head).sigmoid()
        twice.detach().zero_()
        return r

    assert products(through_data) == []


# Where the logits lie in memory.


def test_nobody_sees_where_logits_lie():
    for route in (einsum, narrow_weights, for_all_heads):
        (product,) = products(route)
        assert not product.placed


def returned(m: nn.Module, q: Tensor) -> Tensor:
    m.logits = torch.einsum("blhd,hde->blhe", q.float(), m.per_head)
    return m.logits.sigmoid()


def viewed(m: nn.Module, q: Tensor) -> Tensor:
    rows = (q.float().flatten(0, 1).transpose(0, 1) @ m.per_head).transpose(0, 1)  # (B L, H, E)
    r = rows.sigmoid()
    return r.unflatten(0, (B, L)) + r.transpose(0, 1).reshape(-1).view(H, -1).sum() / 1000


def aliased(m: nn.Module, q: Tensor) -> Tensor:
    """What is contiguous is not copied by contiguous(); in another layout it would be."""
    logits = m.shared(q.float()) * 2.0
    logits.contiguous().add_(1)
    return logits.sigmoid()


def asserted(m: nn.Module, q: Tensor) -> Tensor:
    r = m.shared(q.float()).sigmoid()
    torch._assert_async(r.view(-1).isfinite().all())
    return r


@pytest.mark.parametrize("route", [returned, viewed, best_two, aliased, asserted])
def test_somebody_may_see_where_logits_lie(route: Router):
    """A caller, a view, an operation with a layout of its own."""
    found = products(route)
    assert all(product.placed for product in found)
    assert found


class Two(Network):
    """A second network, which reads what the first has made."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x * 2))


def test_nothing_is_looked_for_behind_another_network():
    found: list[list[RouterProduct]] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        findings = find_sites(gm)
        assert findings.copy is not None
        found.extend(find_router_products(findings.sites, findings.copy))
        return gm.forward

    torch.compile(Two(einsum), backend=backend)(torch.randn(B, L, H * d).bfloat16())
    (first,), (second,) = found
    assert first.output is not second.output
    assert second.query.shape == (B, L, H, d)
    assert second.query.value.dtype is torch.bfloat16
