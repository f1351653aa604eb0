"""The norm of queries, their router and their network in one op, on a GPU."""

from typing import Any

import pytest
import torch
from support import problems
from support.networks import MultiHeadFFN, batched, loop
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

from mhf_compiler.lowering import multi_head_ffn
from mhf_compiler.lowering.device import capability
from mhf_compiler.lowering.kernels import dispatch
from mhf_compiler.lowering.kernels.replay import forget_repeats

pytestmark = pytest.mark.gpu

OP = torch.ops.mhf_compiler.normed_multi_head_ffn_over_query.default
NORM_AND_ROUTE = torch.ops.mhf_compiler.norm_and_route.default
CUDA = torch.device("cuda")

needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and capability(CUDA)[0] != 9, reason="Hopper's own kernel"
)


def make(
    shape: tuple[int, int, int, int, int, int] = (2, 300, 4, 128, 22, 64),
    router: torch.dtype = torch.float32,
    groups: int | None = None,
    routers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    by_columns: bool = False,
) -> dict[str, Any]:
    b, length, heads, head_dim, sub_networks, hidden = shape
    torch.manual_seed(0)

    def weight(scale: float) -> Tensor:
        size = (groups or heads, sub_networks, hidden, head_dim)
        x = (torch.randn(size, device=CUDA) * scale).to(dtype)
        return x.transpose(2, 3).contiguous().transpose(2, 3) if by_columns else x

    return {
        "q": (3 * torch.randn(b, length, heads, head_dim, device=CUDA)).to(dtype),
        "norm_weight": (torch.rand(head_dim, device=CUDA) + 0.5).to(dtype),
        "router": (
            torch.randn(routers or heads, head_dim, sub_networks, device=CUDA) / head_dim**0.5
        ).to(router),
        "k": weight(head_dim**-0.5),
        "u": weight(head_dim**-0.5),
        "v": weight(hidden**-0.5),
        "norm_eps": 1e-6,
        "rounds_first": False,
        "routing": "normalised",
        "sum_floor": 1e-20,
        "sum_eps": 0.0,
        "r_dtype": dtype,
        "activation": "silu",
        "k_scale": 1.0,
        "u_scale": 1.0,
        "out_scale": 1.0,
    }


def call(given: dict[str, Any]) -> Tensor:
    """What the op makes of a copy of the queries, with fresh memory that holds NaN."""
    q = given["q"].clone(memory_format=torch.preserve_format)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        OP(*(given | {"q": q}).values())
    finally:
        torch.use_deterministic_algorithms(False)
    return q


def in_two_steps(given: dict[str, Any]) -> Tensor:
    q, values = given["q"].clone(), dict(given)
    norm = [values.pop(name) for name in ("q", "norm_weight", "router", "k", "u", "v")]
    network = {name: values.pop(name) for name in ("activation", "k_scale", "u_scale", "out_scale")}
    r = NORM_AND_ROUTE(q, norm[1], norm[2], *values.values())
    return multi_head_ffn(q, *norm[3:], r, **network)


def check(given: dict[str, Any]) -> None:
    """Like the two ops: the same numbers, but for logits that differ in their last bits."""
    found, right = call(given), in_two_steps(given)
    assert found.isfinite().all()
    error = (found.double() - right.double()).norm() / right.double().norm()
    assert error <= 2e-4  # one in a hundred results a unit of bfloat16 off would be 4e-4


@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_two_ops(router: torch.dtype, head_dim: int) -> None:
    for tokens in ((2, 300), (1, 256)):
        check(make((*tokens, 4, head_dim, 22, 64), router))


@pytest.mark.parametrize(
    "replaced",
    [
        {"routing": "none", "r_dtype": torch.float32},
        {"routing": "sigmoid"},
        {"sum_floor": 0.0, "sum_eps": 0.5},
        {"sum_floor": 20.0},
        {"norm_eps": 2.0},
        {"rounds_first": True},
        {"norm_weight": None},
        {"r_dtype": torch.float32},
        {"r_dtype": torch.float16},
        {"activation": "gelu_tanh", "out_scale": 3.0},
        {"k_scale": 0.5, "u_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_other_formulas(head_dim: int, replaced: dict[str, Any]) -> None:
    check(make((2, 300, 6, head_dim, 8, 64), groups=3, routers=2) | replaced)


@pytest.mark.parametrize("sub_networks", [1, 2, 31, 32])
def test_other_numbers_of_networks(sub_networks: int) -> None:
    by_heads = {"norm_weight": torch.rand(4, 128, device=CUDA).bfloat16()}
    check(make((2, 300, 4, 128, sub_networks, 171)) | by_heads)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_weights_by_columns(head_dim: int) -> None:
    check(make((2, 300, 4, head_dim, 8, 192), by_columns=True))


@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16])
def test_programs_go_on_to_further_tokens(router: torch.dtype) -> None:
    """Several rounds of tiles, of which the last is cut along the hidden units."""
    check(make((2, 8200, 16, 128, 5, 64), router))
    check(make((3, 4100, 16, 64, 5, 64), router))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"shape": (1, 40, 4, 128, 22, 64)},
        {"shape": (8, 1, 4, 128, 22, 64)},
        {"shape": (2, 300, 4, 128, 22, 20)},
        {"shape": (2, 300, 4, 20, 22, 64)},
        {"shape": (2, 300, 4, 32, 22, 64)},
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_done_in_two_steps(options: dict[str, Any]) -> None:
    given = make(**options)
    assert call(given).equal(in_two_steps(given))
    given["u"] = None
    assert call(given).equal(in_two_steps(given))


def test_strided_queries() -> None:
    given = make((3, 277, 4, 128, 22, 64))
    memory = torch.full((3, 4, 280, 136), 7.0, device=CUDA).bfloat16()
    inner = memory[:, :, 2:279, 8:].transpose(1, 2)
    inner.copy_(given["q"])
    right = in_two_steps(given)
    OP(*(given | {"q": inner}).values())
    assert (inner.double() - right.double()).norm() <= 2e-4 * right.double().norm()
    inner.fill_(7.0)
    assert memory.eq(7.0).all()


@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_two_ops(router: torch.dtype) -> None:
    given = make((1, 512, 4, 128, 22, 128), router) | {"r_dtype": torch.float32}
    x = problems.normed(given["q"], given["norm_weight"], given["norm_eps"]).bfloat16().double()
    r = problems.routed(x, given["router"], "normalised")
    k, u, v = (given[name].double() for name in "kuv")
    exact = problems.spelled(x, k, u, v, r)
    errors = [problems.relative_error(y, exact) for y in (call(given), in_two_steps(given))]
    assert errors[0] <= 1.02 * errors[1]


def test_calls_are_repeated_on_other_memory() -> None:
    """Later calls put their own addresses into what the first one launched."""
    forget_repeats()
    for seed in range(3):
        given = make()
        check(given | {"q": given["q"] * (seed + 1), "k": given["k"] / (seed + 1)})


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_same_bits_each_time(head_dim: int) -> None:
    given = make((4, 2000, 4, head_dim, 22, 64), torch.bfloat16)
    first = call(given)
    assert all(call(given).equal(first) for _ in range(3))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_is_not_a_number_stays_in_its_token(head_dim: int) -> None:
    given = make((1, 300, 2, head_dim, 8, 64))
    given["q"][0, 33, 1, 5] = float("nan")
    found = call(given)
    assert found[0, 33, 1].isnan().all()
    assert int(found.isnan().any(-1).sum()) == 1


def test_a_graph_replays_it() -> None:
    given = make((2, 300, 4, 128, 22, 64))
    right, q = call(given), given["q"].clone()
    given["q"] = q.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OP(*given.values())
    for _ in range(2):
        given["q"].copy_(q)
        graph.replay()
        assert given["q"].equal(right)


@needs_hopper
def test_one_kernel_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("in two steps")

    forget_repeats()
    monkeypatch.setattr(dispatch, "run_norm_and_route", fail)
    for head_dim in (40, 64, 96, 128):
        call(make((2, 300, 4, head_dim, 22, 64)))
    forget_repeats()


@needs_hopper
@pytest.mark.parametrize("networks", [batched, loop])
@pytest.mark.parametrize("tokens", [(2, 512), (1, 304)])
def test_whole_models(networks: Any, tokens: tuple[int, int]) -> None:
    """Multiples of 8 tokens: Inductor may pad other products, and then the queries are a part."""
    torch.manual_seed(0)
    torch.compiler.reset()
    module = MultiHeadFFN(8, 128, 22, 64, networks).to("cuda", torch.bfloat16)
    x = torch.randn(*tokens, 1024, device=CUDA, dtype=torch.bfloat16)
    run = lambda x: x + module(x + module(x))  # noqa: E731
    options = {"rewrite": "always", "strict": True}
    model = torch.compile(run, backend="flashmhf", options=options, fullgraph=True)
    before = x.clone()
    with torch.no_grad(), fresh_cache():
        right = run(x)
        found, (code,) = run_and_get_code(model, x)
        again = model(x)
    assert code.count("mhf_compiler.normed_multi_head_ffn_over_query.compiled(") == 2
    assert "mhf_compiler.norm_and_route.compiled(" not in code
    assert (found - right).norm() <= 2e-2 * right.norm()
    assert found.equal(again)
    assert x.equal(before)
