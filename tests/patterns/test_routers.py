"""Products of widened queries before a router: which are taken, and which stay as they are."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from support.graphs import graph_of
from support.values import a_value
from torch import Tensor, fx, nn

from mhf_compiler.patterns import RouterProduct, find_router_products, find_sites
from mhf_compiler.patterns.axes import Axis, Index, axis_form
from mhf_compiler.patterns.canonical import INPUT, CanonicalCopy, Value
from mhf_compiler.patterns.contractions import Operand
from mhf_compiler.patterns.routers import _is_placed, _products_of, _proved, _read, _Roles
from mhf_compiler.patterns.tracer import trace

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


# Products and the readers of their logits, in graphs as they are written.

N = 6


class Traced:
    """The copy of a function of tensors (N, N), its values by the names of nodes."""

    def __init__(self, function: Callable[..., Any], inputs: int = 2) -> None:
        self.gm = graph_of(function, *(torch.randn(N, N) for _ in range(inputs)))
        self.copy = trace(self.gm)
        self.values = {node.name: value for node, value in self.copy.value_of.items()}

    def __getitem__(self, name: str) -> Value:
        return self.values[name]


def many(x: Tensor, y: Tensor) -> Tensor:
    """In which each value is read twice, thirty times one after the other."""
    r = x @ y
    for _ in range(30):
        r = r.sin() + r.cos()
    return r * y


PLACED: dict[str, tuple[Callable[[Tensor, Tensor], Any], bool]] = {
    "read by the site": (lambda x, y: (x @ y).sigmoid() * y, False),
    "read on many ways": (many, False),
    "another activation": (lambda x, y: F.hardswish(x @ y) * y, False),
    "summed": (lambda x, y: (x @ y).sigmoid().sum(0) * y, False),
    "a view of a view": (lambda x, y: (x @ y).t().unsqueeze(0) * y, False),
    "sizes of the product": (lambda x, y: (lambda r: (r.sigmoid() * y, r.size(0)))(x @ y), True),
    "sizes of a view": (lambda x, y: (lambda r: (r * y, r.size(0)))((x @ y).t()), True),
    "a view read elsewhere": (lambda x, y: (lambda r: (r * y, r.sin()))((x @ y).t()), True),
    "an alias": (lambda x, y: (x @ y).contiguous().sigmoid() * y, True),
    "an alias of a view": (lambda x, y: (x @ y).unsqueeze(0).contiguous() * y, True),
    "added in place": (lambda x, y: (y * 2).add_(x @ y).sigmoid() * y, True),
    "in two operations at once": (lambda x, y: torch.addcmul(y, x @ y, y).sigmoid() * y, True),
    "turned round": (lambda x, y: (x @ y).flip(0) * y, True),
    "returned": (lambda x, y: (lambda r: (r.sigmoid() * y, r))(x @ y), True),
}


@pytest.mark.parametrize(("function", "placed"), PLACED.values(), ids=PLACED)
def test_the_layout_of_logits_is_seen_by(function: Callable[[Tensor, Tensor], Any], placed: bool):
    """The site replaces the last product of elements."""
    copy = Traced(function)
    name = max((n for n in copy.values if n.startswith("mul")), key=lambda n: copy[n].step)
    site: Any = SimpleNamespace(replaces={copy[name]})
    assert _is_placed(copy["matmul"], site, copy.copy) is placed


def test_the_layout_of_logits_in_other_memory_is_seen():
    def in_an_input(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.mm(x, y, out=z).sigmoid() * y

    def under_an_older_view(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        logits = y.new_empty(N, N)
        older = logits.view(-1)
        r = torch.mm(x, y, out=logits).sigmoid() * y
        older.zero_()
        return r

    for function in (in_an_input, under_an_older_view):
        with torch.no_grad():
            copy = Traced(function, 3)
        site: Any = SimpleNamespace(replaces={copy["mul"]})
        assert _is_placed(copy["mm"], site, copy.copy)


def routed(route: Callable[..., Tensor], *inputs: Tensor) -> list[RouterProduct]:
    """The products before the router of a site of queries (..., H, d), the first input."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = (H, E, d, f), (H, E, f, d), (H, d, E)
            self.up, self.down, self.router = (nn.Parameter(torch.randn(s)) for s in shapes)

        def network(self, q: Tensor, *others: Tensor) -> Tensor:
            r = route(self, q, *others).to(torch.bfloat16)
            hidden = torch.einsum("...hd,hedf->...hef", q, self.up.bfloat16()).relu()
            return torch.einsum("...hef,hefd,...he->...hd", hidden, self.down.bfloat16(), r)

    class OfOne(Routed):
        def forward(self, q: Tensor) -> Tensor:
            return self.network(q)

    class OfTwo(Routed):
        def forward(self, q: Tensor, z: Tensor) -> Tensor:
            return self.network(q, z)

    findings = find_sites(graph_of((OfOne, OfTwo)[len(inputs) - 1](), *inputs))
    assert findings.copy is not None
    (site,) = findings.sites
    (found,) = find_router_products([site], findings.copy)
    return found


QUERIES = torch.randn(L, H, d).bfloat16()


def logits(m: Any, q: Tensor, form: str = "lhd,hde->lhe") -> Tensor:
    return torch.einsum(form, q.float(), m.router)


def after_many(m: Any, q: Tensor, number: int) -> Tensor:
    r = logits(m, q)
    for _ in range(number):
        r = r.sin()
    return r


@pytest.mark.parametrize(("number", "found"), [(8, 1), (80, 0)])
def test_a_product_is_looked_for_nearby(number: int, found: int):
    assert len(routed(lambda m, q: after_many(m, q, number), QUERIES)) == found


def test_one_token_may_have_no_dimension():
    assert len(routed(lambda m, q: logits(m, q, "hd,hde->he"), QUERIES[0])) == 1


def test_a_narrow_parameter_is_no_query():
    """Its sub-networks would count as tokens."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, N).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() @ self.weight.float()

    gm = graph_of(Narrow(), torch.randn(1, N))
    copy = trace(gm)
    (root,) = copy.reads[gm.graph.output_node()].values()
    site: Any = SimpleNamespace(query=SimpleNamespace(shape=(1, 1)), replaces=set())
    assert _read(root, site, frozenset(), copy) is None


def test_weights_are_read_before_they_were_widened_and_not_before_they_were_rounded():
    def rounded(m: Any, q: Tensor) -> Tensor:
        return torch.einsum("lhd,hde->lhe", q.float(), m.router.double().float())

    def widened(m: Any, q: Tensor) -> Tensor:
        return torch.einsum("lhd,hde->lhe", q.float(), m.router.bfloat16().float())

    for route, dtype in ((rounded, torch.float32), (widened, torch.bfloat16)):
        (product,) = routed(route, QUERIES)
        assert product.weight.value.dtype is dtype


def test_weights_of_tokens_are_none():
    """Also if they are the queries themselves: of each token, another row."""
    square = torch.randn(E, H, d).bfloat16()

    def themselves(m: Any, q: Tensor) -> Tensor:
        return torch.einsum("lhd,ehd->lhe", q.float(), q.float())

    def made_of_them(m: Any, q: Tensor) -> Tensor:
        return torch.einsum("lhd,ehd->lhe", q.float(), q.float().sin())

    assert routed(themselves, square) == []
    assert routed(made_of_them, square) == []


def test_a_scaled_product_stays():
    def route(m: Any, q: Tensor) -> Tensor:
        rows = q.float().transpose(0, 1)
        scaled = torch.baddbmm(m.router[:, :1], rows, m.router, alpha=2.0)
        return scaled.transpose(0, 1)

    assert routed(route, QUERIES) == []


@pytest.mark.parametrize("recorded", [False, True])
def test_queries_may_be_overwritten_later_where_nothing_is_recorded(recorded: bool):
    def route(m: Any, q: Tensor, z: Tensor) -> Tensor:
        r = torch.einsum("lhd,hde->lhe", z.float(), m.router)
        z.detach().zero_()
        return r

    with torch.set_grad_enabled(recorded):
        assert len(routed(route, QUERIES, QUERIES)) == (0 if recorded else 1)


# Products by themselves.


def a_product(index: str, query: str, weight: str, summed: str, **sizes: Any) -> Any:
    """Letters for axes."""
    axes = {letter: Axis(sizes.get(letter, 3)) for letter in index + query + weight}

    def at(letters: str) -> Index:
        return tuple(axis_form(axes[letter]) for letter in letters)

    return SimpleNamespace(
        index=at(index),
        query=Operand(a_value(INPUT), at(query)),
        weight=Operand(a_value(INPUT), at(weight)),
        contraction=SimpleNamespace(summed=tuple(axes[letter] for letter in summed), bias=None),
    )


@pytest.mark.parametrize(
    ("letters", "complete"),
    [
        (("lhe", "lhd", "hde", "d"), True),
        (("lhe", "lh", "hde", "d"), False),
        (("lhe", "lhd", "he", "d"), False),
        (("lhex", "lhd", "hde", "d"), False),
        (("he", "lhd", "hde", "d"), False),
    ],
    ids=[
        "a product",
        "a width of the weights alone",
        "of the queries alone",
        "repeated",
        "one of many tokens",
    ],
)
def test_all_axes_of_a_product_have_a_role(letters: tuple[str, ...], complete: bool):
    product = a_product(*letters, d=4)
    assert _Roles.of(product).are_complete(product) is complete
    if not complete:
        site: Any = SimpleNamespace(query=SimpleNamespace(shape=(1, 1)))
        assert _proved(product, site, CanonicalCopy()) is None


def test_only_the_number_of_tokens_may_be_dynamic():
    n = sympy.Symbol("n", integer=True, positive=True)
    assert _Roles.of(a_product("lhe", "lhd", "hde", "d", l=n)).are_static()
    site: Any = SimpleNamespace(query=SimpleNamespace(shape=(1, 1)))
    for letter in "hde":
        product = a_product("lhe", "lhd", "hde", "d", **{letter: n})
        assert not _Roles.of(product).are_static()
        assert _proved(product, site, CanonicalCopy()) is None


def test_a_product_of_what_no_node_holds_is_none():
    """Of a query, or of weights, that is computed inside of another operation."""
    for operand in (0, 1):
        copy = Traced(lambda x, y: x.bfloat16().float() @ y)
        inside = copy["matmul"].operands[operand]
        for value in (inside, *inside.operands):
            copy.copy._holdings.pop(value, None)
        site: Any = SimpleNamespace(query=SimpleNamespace(shape=(1, N)))
        assert _read(copy["matmul"], site, frozenset(), copy.copy) is None


def test_a_bias_that_no_node_holds_is_not_computed_again():
    copy = Traced(lambda x, y, z: torch.addmm(z.t(), x.bfloat16().float(), y), 3)
    site: Any = SimpleNamespace(query=SimpleNamespace(shape=(1, N)), replaces=set())
    assert _read(copy["addmm"], site, frozenset(), copy.copy) is not None
    bias = copy["addmm"].operands[0]
    del copy.copy._holdings[bias]
    assert _read(copy["addmm"], site, frozenset(), copy.copy) is None


def test_nothing_is_looked_for_in_or_behind_other_sites():
    copy = Traced(lambda x, y: (x.bfloat16().float() @ y).sin().cos())
    site: Any = SimpleNamespace(
        routers=[SimpleNamespace(value=copy["cos"])],
        query=SimpleNamespace(shape=(1, N)),
        replaces=set(),
    )
    assert len(_products_of(site, frozenset(), copy.copy)) == 1
    assert _products_of(site, frozenset({copy["sin"]}), copy.copy) == []
