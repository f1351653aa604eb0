"""Where a norm, a router and the network after them become one op, and where they must not.

On a CPU the passes leave graphs as they are; here they take them for those of a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support.inductor import NO_CPP, no_caches
from support.networks import MultiHeadFFN, batched, loop
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from mhf_compiler.compat import counters
from mhf_compiler.lowering.ops import norm_network as norm_network_op
from mhf_compiler.lowering.ops.norm_network import Like
from mhf_compiler.passes import functional, norm_network, norm_router

B, L, H, E, d, f = 2, 16, 4, 3, 16, 32
FUSED = "normed_multi_head_ffn_over_query"
PARTS = ("norm_and_route", "multi_head_ffn_over_query")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(norm_router, "_DEVICES", ("cpu",))
    monkeypatch.setattr(norm_network_op, "may_pay", lambda *sizes: True)
    functional._error_of.cache_clear()
    yield
    functional._error_of.cache_clear()


class Network(MultiHeadFFN):
    """With what tests put in between, and biases."""

    def __init__(self, networks: Any = batched) -> None:
        super().__init__(H, d, E, f, networks)
        self.bias = nn.Parameter(torch.randn(H, E, f))
        self.bfloat16()

    def queries(self, x: Tensor) -> Tensor:
        return self.norm(super().queries(x))

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries(x)
        return self.project(self.network(q, self.route(q)))

    def biased(self, q: Tensor, r: Tensor) -> Tensor:
        gate = torch.einsum("blhd,hefd->blhef", q, self.gate) + self.bias
        up = torch.einsum("blhd,hefd->blhef", q, self.up)
        hidden = nn.functional.silu(gate) * up * r.to(q.dtype).unsqueeze(-1)
        return torch.einsum("blhef,hefd->blhd", hidden, self.down)


Run = Callable[[Network, Tensor], Any]


class Program(NamedTuple):
    """What was compiled: how often each op was put in place or declined, and the code."""

    counts: Counter[str]
    code: str


def infer(
    run: Run, module: Any = None, tokens: tuple[int, int] = (B, L), **options: Any
) -> Program:
    """The program, whose results are those of eager, over inputs that it leaves as they were."""
    module, x = module or Network(), torch.randn(*tokens, H * d).bfloat16()
    before = x.clone()
    options = {"rewrite": "always", "strict": True} | options
    model = torch.compile(run, backend="flashmhf", options=options, fullgraph=True)
    with torch.no_grad(), no_caches():
        expected = run(module, x)
        found, codes = run_and_get_code(model, module, x)
        again = model(module, x)
    assert counters["flashmhf"]["sites_rewritten"] >= 1
    results = zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, again, expected)),
                  strict=True)  # fmt: skip
    for one, other, right in results:
        assert one.stride() == right.stride()
        assert (one.float() - right.float()).norm() <= 2e-2 * right.float().norm()
        assert one.equal(other)
    assert x.equal(before)
    return Program(Counter(counters["flashmhf"]), "\n".join(codes))


# Every number of tokens and either spelling, which share what the pass reads.
@pytest.mark.parametrize(
    ("networks", "tokens"),
    [(batched, (B, L)), (loop, (1, L)), (batched, (B, 1)), (loop, (1, 1))],
)
def test_one_call_takes_the_place_of_two(networks: Any, tokens: tuple[int, int]):
    counts, code = infer(lambda m, x: x + m(x), Network(networks), tokens)
    assert counts[FUSED] == 1
    assert counts[f"{FUSED}_declined"] == 0
    assert not any(f"mhf_compiler.{part}." in code for part in PARTS)


def test_nothing_is_copied():
    """The queries are made once, and one op writes over them. The other buffer is the output."""
    code = infer(lambda m, x: m(x)).code
    assert code.count(" = empty_strided_cpu(") == 2
    assert "copy_" not in code


def test_every_layer():
    counts = infer(lambda m, x: x + m(x + m(x + m(x))), **NO_CPP).counts
    assert counts[FUSED] == counts[PARTS[0]] == counts[PARTS[1]] == 3


def test_heads_that_share_weights():
    """Of the network, not of the router: one router for all heads takes them for tokens."""

    def run(m: Network, x: Tensor) -> Tensor:
        q = m.queries(x)
        gate, up, down = (w[::2].repeat_interleave(2, 0) for w in (m.gate, m.up, m.down))
        return m.outputs(m.networks(q, gate, up, down, m.route(q)).flatten(2))

    assert infer(run).counts[FUSED] == 1


def test_numbers_that_change_in_between():
    """The weights are read where the network stands, the router's where that stands."""

    def run(m: Network, x: Tensor) -> Tensor:
        scale = torch.ones(1).bfloat16()
        q = m.queries(x)
        r = torch.einsum("blhd,hde->blhe", q.float(), (m.router * scale).float()).sigmoid()
        scale.mul_(3)
        return m.outputs(m.networks(q, m.gate * scale, m.up, m.down, r).flatten(2))

    assert infer(run).counts[FUSED] == 1


def kept_q(m: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    q = m.queries(x)
    return m.outputs(m.network(q, m.route(q)).flatten(2)), q


def kept_r(m: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    q = m.queries(x)
    r = m.route(q)
    return m.outputs(m.network(q, r).flatten(2)), r


def late_r(m: Network, x: Tensor) -> Tensor:
    q = m.queries(x)
    r = m.route(q)
    return m.outputs(m.network(q, r).flatten(2)) * r.float().mean()


def softmax(m: Network, x: Tensor) -> Tensor:
    """What the op does not compute lies between the two calls."""
    q = m.queries(x)
    r = torch.einsum("blhd,hde->blhe", q.float(), m.router.float()).softmax(-1)
    return m.outputs(m.network(q, r).flatten(2))


def heads_rolled(m: Network, x: Tensor) -> Tensor:
    """Each head is routed by the next one's weights."""
    q = m.queries(x)
    return m.outputs(m.network(q, m.route(q).roll(1, 2)).flatten(2))


def networks_flipped(m: Network, x: Tensor) -> Tensor:
    q = m.queries(x)
    return m.outputs(m.network(q, m.route(q).flip(3)).flatten(2))


def tokens_shifted(m: Network, x: Tensor) -> Tensor:
    q = m.queries(x)
    r = m.route(q)
    return m.outputs(m.network(q, torch.cat((r[:, 1:], r[:, :1]), 1)).flatten(2))


def two_networks(m: Network, x: Tensor) -> Tensor:
    q = m.queries(x)
    r = m.route(q)
    one, other = m.network(q, r), m.networks(q, m.up, m.gate, m.down, r)
    return m.outputs((one + other).flatten(2))


def routed_by_another(m: Network, x: Tensor) -> Tensor:
    """The network's queries are normalised by one call, its weights come from another."""
    q, other = m.queries(x), m.queries(x.flip(1))
    one, two = m.network(q, m.route(other)), m.network(other, m.route(q))
    return m.outputs((one - two).flatten(2))


def with_a_bias(m: Network, x: Tensor) -> Tensor:
    q = m.queries(x)
    return m.outputs(m.biased(q, m.route(q)).flatten(2))


APARTS: dict[str, Run] = {
    "q is returned": kept_q,
    "r is returned": kept_r,
    "r is read after the op": late_r,
    "softmax": softmax,
    "heads rolled": heads_rolled,
    "networks flipped": networks_flipped,
    "tokens shifted": tokens_shifted,
    "two networks read them": two_networks,
    "routed by another's queries": routed_by_another,
    "a bias": with_a_bias,
    "no router": lambda m, x: m.outputs(
        m.network(q := m.queries(x), torch.ones_like(q[..., :E])).flatten(2)
    ),
}


OBSTACLES = {
    "q is returned": "",  # then nothing is overwritten
    "r is returned": "NO_NORM_AND_ROUTE",
    "r is read after the op": "NO_NORM_AND_ROUTE",
    "softmax": "NO_NORM_AND_ROUTE",
    "heads rolled": "NO_NORM_AND_ROUTE",
    "networks flipped": "NO_NORM_AND_ROUTE",
    "tokens shifted": "NO_NORM_AND_ROUTE",
    "two networks read them": "NO_NORM_AND_ROUTE",
    "routed by another's queries": "NO_NORM_AND_ROUTE",
    "a bias": "BIAS",
    "no router": "NO_NORM_AND_ROUTE",
}


@pytest.mark.parametrize(("name", "run"), APARTS.items(), ids=APARTS)
def test_they_stay_apart(name: str, run: Run):
    counts = infer(run, **NO_CPP).counts
    networks = counts[PARTS[1]]
    assert counts[FUSED] == 0
    assert counts[f"{FUSED}_declined"] == networks
    assert networks == 0 or counts[f"{FUSED}_declined.{OBSTACLES[name]}"] == networks


def test_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr(norm_network_op, "may_pay", lambda *sizes: asked.append(sizes))
    counts = infer(lambda m, x: m(x), **NO_CPP).counts
    weights = Like(torch.bfloat16, (H, E, f, d), (E * f * d, f * d, d, 1))
    assert asked == [(B * L, weights, True, torch.device("cpu"))]
    assert counts[f"{FUSED}_declined.DOES_NOT_PAY"] == 1
    assert all(counts[part] == 1 for part in PARTS)


def test_a_kernel_that_fails_is_tried_once_and_the_calls_stay(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def fail(*arguments: Any) -> None:
        tried.append(arguments)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(norm_network_op, "trial_run", fail)
    with pytest.warns(match=r"the norm before a network at .*no such instruction"):
        counts = infer(lambda m, x: m(m(x)), strict=False, **NO_CPP).counts
    assert counts[FUSED] == 0
    assert counts[f"{FUSED}_declined.KERNEL_FAILED"] == 2
    assert all(counts[part] == 2 for part in PARTS)
    assert len(tried) == 1
    torch.compiler.reset()
    with pytest.warns(match="no such instruction"), pytest.raises(Exception, match="KERNEL_FAILED"):
        infer(lambda m, x: m(m(x)))


def test_what_is_tried_is_what_the_graph_has(monkeypatch: pytest.MonkeyPatch):
    tried: list[Any] = []
    monkeypatch.setattr(norm_network_op, "trial_run", lambda *arguments: tried.append(arguments))
    infer(lambda m, x: m(x), **NO_CPP)
    norm = Like(torch.bfloat16, (d,), (1,))
    router = Like(torch.bfloat16, (H, d, E), (d * E, E, 1))
    weights = Like(torch.bfloat16, (H, E, f, d), (E * f * d, f * d, d, 1))
    formula = (torch.finfo(torch.float32).eps, False, "normalised", 1e-20, 0.0, torch.bfloat16)
    network = ("silu", 1.0, 1.0, 1.0)
    tensors = (norm, router, weights, weights, weights)
    assert tried == [(H, tensors, (*formula, *network), torch.device("cpu"))]


def test_dynamic_shapes(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr(norm_network_op, "may_pay", lambda *sizes: asked.append(sizes) or True)
    module = Network()
    options = {"rewrite": "always", "strict": True, **NO_CPP}
    model = torch.compile(module, backend="flashmhf", options=options, dynamic=True)
    with torch.no_grad(), no_caches():
        for sizes in ((3, 7), (5, 4)):
            x = torch.randn(*sizes, H * d).bfloat16()
            found, right = model(x), module(x)
            assert (found - right).norm() <= 2e-2 * right.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["flashmhf"][FUSED] == 1
    assert asked[0][0] is None


STRIDED: dict[str, Callable[..., Tensor]] = {
    "gate": lambda m, q, packed: m.networks(q, packed[..., 0], m.up, m.down, m.route(q)),
    "down": lambda m, q, packed: m.networks(q, m.gate, m.up, packed[..., 0], m.route(q)),
}


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("network", STRIDED.values(), ids=STRIDED)
def test_dynamic_strides_stay_dynamic(
    network: Callable[..., Tensor], pays: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(norm_network_op, "may_pay", lambda *sizes: pays)
    module, x = Network(), torch.randn(B, L, H * d).bfloat16()
    run = lambda x, packed: module.outputs(  # noqa: E731
        network(module, module.queries(x), packed).flatten(2)
    )
    model = torch.compile(run, backend="flashmhf", options={"rewrite": "always", "strict": True})
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad(), no_caches():
        for size in (3, 4, 6):
            packed = (torch.randn(H, E, f, d, size) / 4).bfloat16()
            torch._dynamo.mark_dynamic(packed, 4)
            right = run(x, packed)
            assert (model(x, packed) - right).norm() <= 2e-2 * right.norm()
    assert counters["stats"]["unique_graphs"] == before + 1


def test_a_pass_that_fails_leaves_what_the_others_did(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such node")

    monkeypatch.setattr(norm_network, "_replace", fail)
    with pytest.warns(match="since the pass mhf_norm_network failed: RuntimeError: no such node"):
        counts, code = infer(lambda m, x: m(x), strict=False, **NO_CPP)
    assert counts[FUSED] == counts[f"{FUSED}_declined"] == 0
    assert all(code.count(f"mhf_compiler.{part}.compiled(") == 1 for part in PARTS)


def test_training_keeps_all_of_it_apart():
    module, x = Network(), torch.randn(B, L, H * d).bfloat16()
    options = {"rewrite": "always", **NO_CPP}
    model = torch.compile(module, backend="flashmhf", options=options)
    with no_caches():
        model(x).sum().backward()
    assert counters["flashmhf"][f"{PARTS[1]}_declined"] == 1  # the passes ran
    assert counters["flashmhf"][FUSED] == counters["flashmhf"][f"{FUSED}_declined"] == 0


def test_the_pass_reads_no_more_than_it_has_to():
    graph = torch.fx.symbolic_trace(nn.Linear(3, 3)).graph
    before = str(graph)
    assert norm_network.fuse_norm_network(graph) == []
    assert str(graph) == before
