"""Where compiled graphs normalise and route queries by one op, and where they must not.

On a CPU the pass leaves graphs as they are; here it takes them for those of a GPU.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.inductor import NO_CPP, no_caches
from support.networks import MultiHeadFFN, batched, loop
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from mhf_compiler.compat import counters
from mhf_compiler.lowering.ops import norm_router as norm_router_op
from mhf_compiler.passes import functional, norm_router

B, L, H, E, d, f = 2, 16, 4, 3, 16, 32
CALL = "norm_and_route"
OVER_QUERY = "multi_head_ffn_over_query"


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(norm_router, "_DEVICES", ("cpu",))
    functional._error_of.cache_clear()
    yield
    functional._error_of.cache_clear()


class Network(MultiHeadFFN):
    """With what tests put in its norm's place and before it, in bfloat16."""

    def __init__(self) -> None:
        super().__init__(H, d, E, f)
        self.wide = nn.Linear(H * d, 2 * H * d, bias=False)
        self.scale, self.by_heads = nn.Parameter(torch.rand(d)), nn.Parameter(torch.rand(H, d))
        self.second = nn.Parameter(torch.randn(H, d, E) / d**0.5)
        self.query = nn.Parameter(torch.randn(B, L, H, d))
        self.bfloat16()
        self.in_float32 = nn.Parameter(torch.rand(d))

    def rest(self, q: Tensor, route: Callable[[Tensor], Tensor] = torch.sigmoid) -> Tensor:
        return self.project(self.network(q, route(self.logits(q))))


Run = Callable[[Network, Tensor], Any]


def tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


class Program(NamedTuple):
    """What was compiled: how often each op was put in place or declined, and the code."""

    counts: Counter[str]
    code: str


def infer(
    run: Run, module: Any = None, tokens: tuple[int, int] = (B, L), **options: Any
) -> Program:
    """The program, whose results are those of eager, over inputs that it leaves as they were."""
    module, x = module or Network(), torch.randn(*tokens, H * d).bfloat16()
    before = x.clone(), [p.clone() for p in module.parameters()]
    options = {"rewrite": "always", "strict": True} | options
    model = torch.compile(run, backend="flashmhf", options=options, fullgraph=True)
    with torch.no_grad(), no_caches():
        expected = run(module, x)
        found, codes = run_and_get_code(model, module, x)
        again = model(module, x)
    assert counters["flashmhf"]["sites_rewritten"] >= 1
    for one, other, right in zip(*map(tensors, (found, again, expected)), strict=True):
        assert one.dtype is right.dtype
        assert one.stride() == right.stride()
        assert (one.float() - right.float()).norm() <= 2e-2 * right.float().norm()
        assert one.equal(other)
    assert x.equal(before[0])
    assert all(p.equal(old) for p, old in zip(module.parameters(), before[1], strict=True))
    return Program(Counter(counters["flashmhf"]), "\n".join(codes))


def scaled(x: Tensor, eps: float = 1e-6) -> Tensor:
    """As models without a norm of PyTorch's spell it; in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def squares(x: Tensor) -> Tensor:
    wide = x.float()
    return torch.rsqrt(1e-6 + (wide * wide).mean(dim=3, keepdim=True)) * wide


NORMS: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "module": lambda m, x: m.norm(x),
    "function": lambda m, x: F.rms_norm(x, (d,), m.scale, 1e-5),
    "without a weight": lambda m, x: F.rms_norm(x, (d,)),
    "rounded after the weight": lambda m, x: (scaled(x) * m.scale).bfloat16(),
    "rounded before the weight": lambda m, x: m.scale * scaled(x).bfloat16(),
    "rounded before it and after": lambda m, x: (scaled(x).type_as(x) * m.in_float32).type_as(x),
    "a weight in float32": lambda m, x: (m.in_float32 * scaled(x)).bfloat16(),
    "a weight for each head": lambda m, x: (scaled(x) * m.by_heads).bfloat16(),
    "squares as products": lambda m, x: squares(x).bfloat16(),
    "of a sine": lambda m, x: m.norm(x.sin()),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_that_are_taken(norm: Callable[[Network, Tensor], Tensor]):
    counts = infer(lambda m, x: m.rest(norm(m, m.queries(x)))).counts
    assert counts[CALL] == counts[OVER_QUERY] == 1
    assert counts[f"{CALL}_declined"] == 0


def test_nothing_is_copied():
    """The queries are made once, and two ops write over them. The other buffer is the output."""
    code = infer(lambda m, x: m.rest(m.norm(m.queries(x)))).code
    assert code.count(" = empty_strided_cpu(") == 2
    assert "copy_" not in code
    query = [line.split(".compiled(")[1].split(", arg")[0] for line in code.splitlines()
             if f"{CALL}.compiled(" in line or f"{OVER_QUERY}.compiled(" in line]  # fmt: skip
    assert query[0] == query[1]


def normalised(x: Tensor) -> Tensor:
    r = x.sigmoid()
    return r / r.sum(-1, keepdim=True)


def divided(by: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (r := x.sigmoid()) / by(r.sum(-1, keepdim=True))


ROUTINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sigmoid": (torch.sigmoid, "'sigmoid', 0.0, 0.0, torch.bfloat16"),
    "sum": (normalised, "'normalised', 0.0, 0.0, torch.bfloat16"),
    "clamp_min": (divided(lambda s: s.clamp_min(1e-20)), "'normalised', 1e-20, 0.0"),
    "clamp": (divided(lambda s: s.clamp(min=1e-20)), "'normalised', 1e-20, 0.0"),
    "eps": (divided(lambda s: s + 1e-9), "'normalised', 0.0, 1e-09"),
    "clamp and eps": (divided(lambda s: s.clamp_min(1.0) + 1), "'normalised', 1.0, 1.0"),
    # Inductor rounds once what is rounded twice in a row.
    "rounded twice": (lambda x: x.sigmoid().half(), "'sigmoid', 0.0, 0.0, torch.bfloat16"),
    # What the op does not compute is left to Inductor, after what it computes.
    "none": (lambda x: x, "'none', 0.0, 0.0, torch.bfloat16"),
    "softmax": (lambda x: x.softmax(-1), "'none', 0.0, 0.0, torch.float32"),
    "another activation": (torch.tanh, "'none', 0.0, 0.0, torch.float32"),
    "a bias": (lambda x: (x + 1).sigmoid(), "'none', 0.0, 0.0, torch.float32"),
    "over heads": (lambda x: (r := x.sigmoid()) / r.sum(2, keepdim=True), "'sigmoid', 0.0, 0.0"),
    "clamp from above": (divided(lambda s: s.clamp(1e-20, 2)), "'sigmoid', 0.0, 0.0"),
    "eps before clamp": (divided(lambda s: (s + 1e-9).clamp_min(1)), "'sigmoid', 0.0, 0.0"),
    "twice": (divided(lambda s: s + s), "'sigmoid', 0.0, 0.0"),
    "the sum alone": (lambda x: x.sigmoid().sum(-1, keepdim=True) / x.exp(), "'none'"),
    "upside down": (lambda x: (r := x.sigmoid()).sum(-1, keepdim=True) / r, "'sigmoid'"),
    "rounded in between": (lambda x: x.bfloat16().sigmoid(), "'none', 0.0, 0.0, torch.bfloat16"),
}


@pytest.mark.parametrize(("route", "constants"), ROUTINGS.values(), ids=ROUTINGS)
def test_routings(route: Callable[[Tensor], Tensor], constants: str):
    counts, code = infer(lambda m, x: m.rest(m.norm(m.queries(x)), route), **NO_CPP)
    assert counts[CALL] == counts[OVER_QUERY] == 1
    assert constants in code


READ: dict[str, tuple[Callable[..., Any], str]] = {
    "the logits": (lambda x, s, r: x, "'none'"),
    "the sigmoids": (lambda x, s, r: s.exp(), "'sigmoid'"),
    "their sum": (lambda x, s, r: s.sum(-1, keepdim=True).expand(-1, -1, -1, E) * 2, "'sigmoid'"),
    "the weights": (lambda x, s, r: r, "'normalised', 0.0, 0.0, torch.float32"),
}


@pytest.mark.parametrize(("other", "routing"), READ.values(), ids=READ)
def test_what_somebody_else_reads_is_a_result(other: Callable[..., Any], routing: str):
    def run(m: Network, x: Tensor) -> Any:
        q = m.norm(m.queries(x))
        logits = m.logits(q)
        sigmoids = logits.sigmoid()
        r = sigmoids / sigmoids.sum(-1, keepdim=True)
        return m.project(m.network(q, r)), other(logits, sigmoids, r)

    counts, code = infer(run, **NO_CPP)
    assert counts[CALL] == counts[OVER_QUERY] == 1
    assert routing in code


def with_query(m: Network, query: Tensor, *others: Tensor) -> Any:
    out = m.rest(m.norm(query))
    return (out, *others) if others else out


def with_queries(m: Network, q: Tensor, *others: Tensor) -> Any:
    out = m.rest(q)
    return (out, *others) if others else out


def parts(m: Network, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A norm's factors, and its result."""
    wide = m.queries(x).float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return wide, scale, (wide * scale).bfloat16()


def behind_a_read(m: Network, x: Tensor) -> Tensor:
    """The query is read before the norm, but what is made of it late, after the op."""
    query = m.queries(x)
    late = query.sin()
    return m.rest(m.norm(query)) + late.flatten(2)


KEPT: dict[str, Run] = {
    # Others read q.
    "q is returned": lambda m, x: with_queries(m, q := m.norm(m.queries(x)), q),
    "a view of q is returned": lambda m, x: with_queries(m, q := m.norm(m.queries(x)), q[:, 1:]),
    "residual of q": lambda m, x: m.rest(q := m.norm(m.queries(x))) + q.flatten(2),
    "a mean of q": lambda m, x: m.rest(q := m.norm(m.queries(x))) * q.mean(),
    # Others read the query.
    "the query is returned": lambda m, x: with_query(m, q := m.queries(x), q),
    "a view of the query is returned": lambda m, x: with_query(m, q := m.queries(x), q[1]),
    "residual of the query": lambda m, x: m.rest(m.norm(q := m.queries(x))) + q.flatten(2),
    "the query is read before": behind_a_read,
    # Others read what lies between.
    "the query in float32": lambda m, x: with_queries(m, (p := parts(m, x))[2], p[0]),
    "the scale": lambda m, x: with_queries(m, (p := parts(m, x))[2], p[1]),
    # Its memory is not the norm's alone.
    "an input": lambda m, x: m.rest(m.norm(x.view(B, L, H, d))),
    "a parameter": lambda m, x: m.rest(m.norm(m.query)),
    "a part": lambda m, x: m.rest(m.norm(m.wide(x).chunk(2, -1)[0].unflatten(-1, (H, d)))),
    "expanded": lambda m, x: m.rest(m.norm(m.inputs(x)[..., None, :d].expand(B, L, H, d))),
    # It is another norm.
    "none": lambda m, x: m.rest(m.queries(x)),
    "with a mean": lambda m, x: m.rest(F.layer_norm(m.queries(x), (d,))),
    "over all heads": lambda m, x: m.rest(F.rms_norm(m.queries(x), (H, d))),
    "in bfloat16": lambda m, x: m.rest(
        (q := m.queries(x)) * torch.rsqrt((q * q).mean(-1, keepdim=True) + 1e-6)
    ),
    "by division": lambda m, x: m.rest(
        ((w := m.queries(x).float()) / (w.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    ),
    "the weight times the scale": lambda m, x: m.rest(
        (parts(m, x)[0] * (parts(m, x)[1] * m.scale)).bfloat16()
    ),
    "cubes": lambda m, x: m.rest(
        ((w := m.queries(x).float()) * (w.pow(3).mean(-1, True) + 9).rsqrt()).bfloat16()
    ),
    "of something else": lambda m, x: m.rest(
        (m.queries(x).float() * parts(m, x.flip(1))[1]).bfloat16()
    ),
    "a tensor added": lambda m, x: m.rest(
        (
            (w := m.queries(x).float()) * (w.pow(2).mean(-1, True) + m.in_float32[:1]).rsqrt()
        ).bfloat16()
    ),
    "a weight for each token": lambda m, x: m.rest((scaled(m.queries(x)) * m.query).bfloat16()),
    "a number as weight": lambda m, x: m.rest((scaled(m.queries(x)) * 2).bfloat16()),
    "a scalar as weight": lambda m, x: m.rest((scaled(m.queries(x)) * m.scale[0]).bfloat16()),
    "two weights": lambda m, x: m.rest((scaled(m.queries(x)) * m.scale * m.scale).bfloat16()),
    # It is another router.
    "two routers": lambda m, x: m.project(
        m.network(
            q := m.norm(m.queries(x)),
            (m.logits(q) + torch.einsum("blhd,hde->blhe", q.float(), m.second.float())).sigmoid(),
        )
    ),
    "a part of q": lambda m, x: m.project(m.network(q := m.norm(m.queries(x)), q[..., :E])),
    "a product in bfloat16": lambda m, x: m.project(
        m.network(q := m.norm(m.queries(x)), torch.einsum("blhd,hde->blhe", q, m.router).sigmoid())
    ),
}


#: why, where that is not another norm
OBSTACLES = {
    **dict.fromkeys(
        (
            *("q is returned", "a view of q is returned", "residual of q", "a mean of q"),
            *("the query is returned", "a view of the query is returned"),
            *("residual of the query", "the query is read before"),
            *("a part", "two routers"),
        ),
        "READ_ELSEWHERE",
    ),
    **dict.fromkeys(("the query in float32", "the scale"), "INTERMEDIATE_READ"),
    **dict.fromkeys(("an input", "a parameter"), "INPUT"),
    "expanded": "DIFFERENT_LAYOUT",
}
#: routers' products, where not one is found
PRODUCTS = {"two routers": 2, "a part of q": 0, "a product in bfloat16": 0}


@pytest.mark.parametrize(("name", "run"), KEPT.items(), ids=KEPT)
def test_the_norm_stays(name: str, run: Run):
    counts = infer(run, **NO_CPP).counts
    obstacle = OBSTACLES.get(name, "NO_NORM")
    assert counts[CALL] == 0
    assert counts[f"{CALL}_declined.{obstacle}"] == counts[f"{CALL}_declined"]
    assert counts[f"{CALL}_declined"] == PRODUCTS.get(name, 1)


def test_wide_heads_keep_their_norm(monkeypatch: pytest.MonkeyPatch):
    run: Run = lambda m, x: m.rest(m.norm(m.queries(x)))  # noqa: E731
    monkeypatch.setattr(norm_router_op, "MOST_HEAD_DIM", d)
    assert infer(run, **NO_CPP).counts[CALL] == 1
    monkeypatch.setattr(norm_router_op, "MOST_HEAD_DIM", d - 1)
    counters.clear()
    assert infer(run, **NO_CPP).counts == Counter(
        {
            "graphs": 1,
            "sites_rewritten": 1,
            "sites_declined": 0,
            "norm_and_route_declined": 1,
            "norm_and_route_declined.WIDE_HEADS": 1,
            "multi_head_ffn_over_query": 1,
            "normed_multi_head_ffn_over_query_declined": 1,
            "normed_multi_head_ffn_over_query_declined.NO_NORM_AND_ROUTE": 1,
        }
    )


def test_two_networks_may_read_what_is_normalised():
    """The last of them writes over it."""

    def run(m: Network, x: Tensor) -> Tensor:
        q = m.norm(m.queries(x))
        other = m.network(q, m.wide(x)[..., : H * E].unflatten(-1, (H, E)).sigmoid())
        return m.project(m.network(q, m.logits(q).sigmoid()) + other)

    counts = infer(run, **NO_CPP).counts
    assert counts[CALL] == counts[OVER_QUERY] == 1


@pytest.mark.parametrize("networks", [batched, loop])
def test_the_models_of_the_benchmarks(networks: Any):
    module = MultiHeadFFN(H, d, E, f, networks).bfloat16()
    counts, code = infer(lambda m, x: x + m(x + m(x)), module)
    assert counts[CALL] == counts[OVER_QUERY] == 2
    assert "copy_" not in code
    assert ("'normalised', 1e-20, 0.0, torch.bfloat16" in code) == (networks is batched)
    assert ("'normalised', 1e-20, 0.0, torch.float32" in code) == (networks is loop)


@pytest.mark.parametrize(
    ("networks", "tokens"),
    [(batched, (1, 16)), (batched, (3, 1)), (loop, (1, 9)), (loop, (1, 1))],
)
def test_dimensions_of_one(networks: Any, tokens: tuple[int, int]):
    """A single sequence, and a decoding step: the op sees views without such a dimension.

    Each spelling meets both; they share what the pass reads, so not every pair is compiled.
    """
    module = MultiHeadFFN(H, d, E, f, networks).bfloat16()
    counts, code = infer(lambda m, x: x + m(x), module, tokens)
    assert counts[CALL] == counts[OVER_QUERY] == 1
    assert "copy_" not in code
    assert code.count("'normalised', 1e-20, 0.0, torch.") == 1


class Plain(MultiHeadFFN):
    """A network of some heads, whose queries others make."""

    def __init__(self, heads: int, width: int = 16) -> None:
        super().__init__(heads, width, E, f)
        self.bfloat16()

    def forward(self, q: Tensor) -> Tensor:
        return self.network(q, self.logits(q).sigmoid())


QUERIES: dict[str, tuple[int, tuple[int, ...], Callable[[Plain, Tensor], Tensor]]] = {
    "one head, of a sequence": (1, (24, 16), lambda m, x: m.norm(m.inputs(x))[None, :, None]),
    "one head": (1, (2, 24, 16), lambda m, x: m.norm(m.inputs(x))[:, :, None]),
    "of a sequence": (6, (24, 96), lambda m, x: m.norm(m.inputs(x).view(24, 6, 16))[None]),
    "of a dimension more": (
        6,
        (2, 24, 96),
        lambda m, x: m.norm(m.inputs(x).view(2, 1, 24, 6, 16)).squeeze(1),
    ),
}


@pytest.mark.parametrize(("heads", "shape", "queries"), QUERIES.values(), ids=QUERIES)
def test_a_norm_of_queries_of_another_rank(
    heads: int,
    shape: tuple[int, ...],
    queries: Callable[[Plain, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
):
    tried: list[Any] = []
    monkeypatch.setattr(norm_router_op, "trial_run", lambda *arguments: tried.append(arguments))
    module, x = Plain(heads), torch.randn(shape).bfloat16()
    run = lambda x: module(queries(module, x))  # noqa: E731
    options = {"rewrite": "always", "strict": True}
    with torch.no_grad(), no_caches():
        found = torch.compile(run, backend="flashmhf", options=options)(x)
        right = run(x)
    assert (found - right).norm() <= 2e-2 * right.norm()
    assert counters["flashmhf"][CALL] == 1
    assert [arguments[1] for arguments in tried] == [heads]


def test_another_rank_does_not_fix_the_length():
    module, x = Plain(6), torch.randn(2, 24, 96).bfloat16()
    torch._dynamo.mark_dynamic(x, 1)
    run = lambda x: module(module.norm(module.inputs(x).view(2, 1, -1, 6, 16)).squeeze(1))  # noqa: E731
    with torch.no_grad(), no_caches():
        torch.compile(run, backend="flashmhf", options={"rewrite": "always"}, fullgraph=True)(x)


def test_a_routers_weights_as_another_norms_weight():
    """What the first call returns takes the place of what the second read."""
    one, two = Plain(1), Plain(6, width=E)
    x, y = torch.randn(1, 6, 16).bfloat16(), torch.randn(2, 24, 6 * E).bfloat16()

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        q = one.norm(one.inputs(x))[:, :, None]
        r = one.logits(q).view(6, E).sigmoid()
        other = (scaled(two.inputs(y).view(2, 24, 6, E)) * r).bfloat16()
        return one.network(q, r[None, :, None]), two(other)

    options = {"rewrite": "always", "strict": True}
    with torch.no_grad(), no_caches():
        results = torch.compile(run, backend="flashmhf", options=options)(x, y)
        for found, right in zip(results, run(x, y), strict=True):
            assert (found - right).norm() <= 2e-2 * right.norm()


def test_dynamic_shapes():
    module = MultiHeadFFN(H, d, E, f, batched).bfloat16()
    options = {"rewrite": "always", "strict": True, **NO_CPP}
    model = torch.compile(module, backend="flashmhf", options=options, dynamic=True)
    with torch.no_grad(), no_caches():
        for sizes in ((3, 7), (5, 4), (1, 9), (2, 1)):
            x = torch.randn(*sizes, H * d).bfloat16()
            found = model(x)
            right = module(x)
            assert (found - right).norm() <= 2e-2 * right.norm()
            assert counters["flashmhf"][CALL] >= 1


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str):
    assert infer(lambda m, x: m.rest(m.norm(m.queries(x))), mode=mode).counts[CALL] == 1


def test_training_keeps_the_norm():
    module = Network()
    model = torch.compile(
        lambda m, x: m.rest(m.norm(m.queries(x))),
        backend="flashmhf",
        options={"rewrite": "always", "strict": True, **NO_CPP},
    )
    x = torch.randn(B, L, H * d).bfloat16()
    with no_caches():
        model(module, x).sum().backward()
    counts = Counter(counters["flashmhf"])
    assert counts[f"{OVER_QUERY}_declined"] == 1  # the passes ran
    assert counts[CALL] == counts[f"{CALL}_declined"] == 0
    assert module.norm.weight.grad is not None


def test_gradients_that_nobody_computes_do_not_matter():
    """Gradients are recorded when this is compiled, so it counts as training."""
    module = Network().requires_grad_(False)
    options = {"rewrite": "always", "strict": True, **NO_CPP}
    model = torch.compile(
        lambda m, x: m.rest(m.norm(m.queries(x))), backend="flashmhf", options=options
    )
    with no_caches():
        model(module, torch.randn(B, L, H * d).bfloat16())
    counts = Counter(counters["flashmhf"])
    assert counts[OVER_QUERY] == 1
    assert counts[CALL] == counts[f"{CALL}_declined"] == 0


def test_a_cpu_keeps_the_norm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    counts = infer(lambda m, x: m.rest(m.norm(m.queries(x))), **NO_CPP).counts
    assert counts[f"{CALL}_declined.DEVICE"] == 1
    assert counts[CALL] == 0


def test_what_was_compiled_is_found_again():
    module, x = Network(), torch.randn(B, L, H * d).bfloat16()
    run = lambda m, x: m.rest(m.norm(m.queries(x)))  # noqa: E731
    with fresh_cache(), torch.no_grad():
        for _ in range(2):
            torch.compiler.reset()
            model = torch.compile(run, backend="flashmhf", options={"rewrite": "always"})
            found, right = model(module, x), run(module, x)
            assert (found - right).norm() <= 2e-2 * right.norm()
        assert counters["inductor"]["fxgraph_cache_bypass"] == 0
        assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_a_kernel_that_fails_is_tried_once_and_the_norm_stays(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def fail(*arguments: Any) -> None:
        tried.append(arguments)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(norm_router_op, "trial_run", fail)

    def two_layers(m: Network, x: Tensor) -> Tensor:
        return m.rest(m.norm(m.queries(m.rest(m.norm(m.queries(x))))))

    with pytest.warns(
        match=r"the norm before a router at .*networks\.py:\d+ .*no such instruction"
    ):
        counts = infer(two_layers, strict=False, **NO_CPP).counts
    assert counts[CALL] == 0
    assert counts[f"{CALL}_declined.KERNEL_FAILED"] == 2
    assert len(tried) == 1


def test_what_is_tried_is_what_the_graph_has(monkeypatch: pytest.MonkeyPatch):
    tried: list[Any] = []
    monkeypatch.setattr(norm_router_op, "trial_run", lambda *arguments: tried.append(arguments))
    infer(lambda m, x: m.rest((scaled(m.queries(x)) * m.by_heads).bfloat16(), normalised), **NO_CPP)
    (arguments,) = tried
    assert arguments == (
        torch.bfloat16,
        H,
        (torch.bfloat16, (H, d)),
        (torch.bfloat16, (H, d, E)),
        (1e-6, False, "normalised", 0.0, 0.0, torch.bfloat16),
        torch.device("cpu"),
    )


def test_the_pass_reads_no_more_than_it_has_to():
    """A graph without a router's product is left at once."""
    graph = torch.fx.symbolic_trace(nn.Linear(3, 3)).graph
    before = re.sub(r"\s", "", str(graph))
    assert norm_router.fuse_norm_router(graph) == []
    assert re.sub(r"\s", "", str(graph)) == before
