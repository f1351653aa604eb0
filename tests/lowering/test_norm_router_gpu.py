"""The norm of queries and their router in one op, on a GPU."""

from typing import Any

import pytest
import torch
from support import problems
from support.networks import MultiHeadFFN, batched, loop
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

from mhf_compiler.lowering.ops import norm_router

pytestmark = pytest.mark.gpu

OP = torch.ops.mhf_compiler.norm_and_route.default
NARROW = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}


def make(
    shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype, groups: int | None = None
) -> dict[str, Any]:
    b, length, heads, head_dim, sub_networks = shape
    torch.manual_seed(0)
    weight = torch.randn(groups or heads, head_dim, sub_networks, device="cuda") / head_dim**0.5
    return {
        "q": (3 * torch.randn(b, length, heads, head_dim, device="cuda")).to(dtype),
        "norm_weight": (torch.rand(head_dim, device="cuda") + 0.5).to(weights),
        "weight": weight.to(weights),
        "norm_eps": 1e-6,
        "rounds_first": False,
        "routing": "normalised",
        "sum_floor": 1e-20,
        "sum_eps": 0.0,
        "r_dtype": dtype,
        "out_order": None,
    }


def call(given: dict[str, Any]) -> Tensor:
    """With fresh memory that holds NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        return OP(*given.values())
    finally:
        torch.use_deterministic_algorithms(False)


def check(given: dict[str, Any]) -> Tensor:
    q, weight, dtype = given["q"], given["weight"], given["q"].dtype
    exact = problems.normed(q, given["norm_weight"], given["norm_eps"])
    r = call(given)
    roundings = 1 + given["rounds_first"]
    torch.testing.assert_close(q.double(), exact, rtol=(roundings + 0.01) * UNIT[dtype], atol=1e-6)
    formula = (given[name] for name in ("routing", "sum_floor", "sum_eps"))
    right = problems.routed(q, weight, *formula)
    assert r.dtype is given["r_dtype"]
    torch.testing.assert_close(r.double(), right, rtol=1.01 * UNIT[r.dtype], atol=1e-5)
    return r


@pytest.mark.parametrize("order", [None, [2, 3, 0, 1]], ids=str)
@pytest.mark.parametrize("head_dim", [32, 96, norm_router.MOST_HEAD_DIM])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", NARROW)
def test_matches(
    dtype: torch.dtype, weights: torch.dtype, head_dim: int, order: list[int] | None
) -> None:
    for length in (1, 333):
        r = check(make((2, length, 4, head_dim, 22), dtype, weights) | {"out_order": order})
        assert r.permute(order or (0, 1, 2, 3)).is_contiguous()


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
    ],
    ids=str,
)
def test_other_formulas(replaced: dict[str, Any]) -> None:
    check(make((2, 130, 6, 40, 8), torch.bfloat16, torch.float32, 3) | replaced)


@pytest.mark.parametrize("sub_networks", [1, 32])
def test_other_numbers_of_networks(sub_networks: int) -> None:
    by_heads = {"norm_weight": torch.rand(6, 40, device="cuda")}
    check(make((2, 130, 6, 40, sub_networks), torch.float16, torch.float32, 3) | by_heads)


def test_a_program_goes_on_to_further_tokens() -> None:
    check(
        make((2, 8200, 16, 128, 22), torch.bfloat16, torch.bfloat16) | {"out_order": [2, 3, 0, 1]}
    )


def test_strided_queries() -> None:
    given = make((3, 77, 4, 128, 22), torch.bfloat16, torch.bfloat16)
    memory = torch.full((3, 4, 80, 132), 7.0, device="cuda", dtype=torch.bfloat16)
    inner = memory[:, :, 2:79, 4:].transpose(1, 2)
    inner.copy_(given["q"])
    check(given | {"q": inner})
    inner.fill_(7.0)
    assert memory.eq(7.0).all()


def test_calls_are_repeated_on_other_memory() -> None:
    """Later calls put their own addresses into what the first one launched."""
    for seed in range(3):
        given = make((2, 512, 4, 64, 8), torch.bfloat16, torch.float32)
        given["q"] = given["q"] * (seed + 1)
        check(given)


def test_the_same_bits_each_time() -> None:
    results = []
    for _ in range(3):
        given = make((4, 2000, 4, 128, 22), torch.bfloat16, torch.bfloat16)
        results.append((call(given), given["q"]))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_what_is_not_a_number_stays_in_its_token() -> None:
    given = make((1, 100, 2, 64, 8), torch.bfloat16, torch.float32)
    given["q"][0, 33, 1, 5] = float("nan")
    r = call(given)
    for x in (given["q"], r):
        assert x[0, 33, 1].isnan().all()
        assert int(x.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("networks", [batched, loop])
@pytest.mark.parametrize("tokens", [(2, 112), (1, 104), (8, 1), (1, 1)])
def test_whole_models(networks: Any, tokens: tuple[int, int]) -> None:
    """Too few tokens for it to be joined with the network (test_norm_network_gpu.py).

    Multiples of 8: Inductor may pad other products, and then the queries are a part.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    module = MultiHeadFFN(8, 128, 22, 64, networks).to("cuda", torch.bfloat16)
    x = torch.randn(*tokens, 1024, device="cuda", dtype=torch.bfloat16)
    run = lambda x: x + module(x + module(x))  # noqa: E731
    options = {"rewrite": "always", "strict": True}
    model = torch.compile(run, backend="flashmhf", options=options, fullgraph=True)
    before = x.clone()
    with torch.no_grad(), fresh_cache():
        right = run(x)
        found, (code,) = run_and_get_code(model, x)
        again = model(x)
    assert code.count("mhf_compiler.norm_and_route.compiled(") == 2
    assert code.count("mhf_compiler.multi_head_ffn_over_query.compiled(") == 2
    assert "mhf_compiler.router_product." not in code
    assert (found - right).norm() <= 2e-2 * right.norm()
    assert found.equal(again)
    assert x.equal(before)
