"""The op that normalises queries, routes them and computes their network: as its two parts do."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mhf_compiler.lowering import ArgumentError, multi_head_ffn
from mhf_compiler.lowering.ops.norm_network import Like, may_pay
from mhf_compiler.lowering.problem import ROUTINGS

OP = torch.ops.mhf_compiler.normed_multi_head_ffn_over_query.default
NORM_AND_ROUTE = torch.ops.mhf_compiler.norm_and_route.default
B, L, H, d, E, f = 2, 5, 4, 8, 3, 6


def make(dtype: torch.dtype = torch.bfloat16, groups: int = H) -> dict[str, Any]:
    torch.manual_seed(0)
    weights = [(torch.randn(groups, E, f, d) / d**0.5).to(dtype) for _ in range(3)]
    return {
        "q": (3 * torch.randn(B, L, H, d)).to(dtype),
        "norm_weight": torch.rand(d).to(dtype),
        "router": torch.randn(H, d, E),
        **dict(zip("kuv", weights, strict=True)),
        "norm_eps": 1e-6,
        "rounds_first": False,
        "routing": "normalised",
        "sum_floor": 1e-20,
        "sum_eps": 0.0,
        "r_dtype": torch.float32,
        "activation": "silu",
        "k_scale": 1.0,
        "u_scale": 1.0,
        "out_scale": 1.0,
    }


def in_two_steps(given: dict[str, Any]) -> Tensor:
    values = dict(given)
    q = values.pop("q").clone()
    norm_weight, router, k, u, v = (
        values.pop(name) for name in ("norm_weight", "router", "k", "u", "v")
    )
    network = {name: values.pop(name) for name in ("activation", "k_scale", "u_scale", "out_scale")}
    r = NORM_AND_ROUTE(q, norm_weight, router, *values.values())
    return multi_head_ffn(q, k, u, v, r, **network)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no weight": {"norm_weight": None},
    "a weight for each head": {"norm_weight": torch.rand(H, d).bfloat16()},
    "one router for all": {"router": torch.randn(1, d, E)},
    "logits": {"routing": "none"},
    "sigmoids": {"routing": "sigmoid"},
    "in bfloat16": {"r_dtype": torch.bfloat16},
    "rounded twice": {"rounds_first": True},
    "another sum": {"sum_floor": 0.5, "sum_eps": 0.25, "norm_eps": 2.0},
    "not gated": {"u": None},
    "another network": {"activation": "relu2", "k_scale": 0.5, "u_scale": 2.0, "out_scale": 3.0},
    "strided": {"q": torch.randn(B, H, L, d).bfloat16().transpose(1, 2)},
    "no tokens": {"q": torch.randn(B, 0, H, d).bfloat16()},
}


@pytest.mark.parametrize("replaced", OPTIONS.values(), ids=OPTIONS)
def test_does_what_two_ops_do(replaced: dict[str, Any]):
    given = make() | replaced
    given["q"] = given["q"].clone()
    right = in_two_steps(given)
    OP(*given.values())
    assert given["q"].equal(right)


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_share_weights(dtype: torch.dtype, groups: int):
    given = make(dtype, groups)
    right = in_two_steps(given)
    OP(*given.values())
    assert given["q"].equal(right)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("replaced", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(replaced: dict[str, Any], routing: str):
    given = make() | replaced | {"routing": routing}
    opcheck(OP, tuple((given | {"q": given["q"].clone()}).values()))


def test_other_memory_is_not_written():
    memory = torch.full((B, L + 2, H, d + 3), 7.0).bfloat16()
    inner = memory[:, 1 : L + 1, :, 2 : d + 2]
    inner.copy_(torch.randn(B, L, H, d))
    given = make() | {"q": inner}
    right = in_two_steps(given)
    OP(*given.values())
    assert inner.equal(right)
    inner.fill_(7.0)
    assert memory.eq(7.0).all()


def test_memory_that_others_read():
    """The weights lie in the queries' memory: they are read before anything is written."""
    memory = torch.randn(B * L * H * d + H * E * f * d).bfloat16()
    given = make() | {
        "q": memory[: B * L * H * d].view(B, L, H, d),
        "v": memory[B * L * H * d :].view(H, E, f, d),
    }
    right = in_two_steps(given)
    OP(*given.values())
    assert given["q"].equal(right)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"q": torch.randn(B, L, H, d)}, "q is torch.float32, must be bfloat16 or float16"),
        ({"router": torch.randn(H, d, E + 1)}, r"must have shape \(G, d, E\) for the E=3 sub-netw"),
        ({"router": torch.randn(3, d, E)}, "a divisor of q's 4 heads"),
        ({"norm_weight": torch.rand(d + 1)}, r"must have shape \(d\) or \(H, d\)"),
        ({"routing": "softmax"}, "must be one of none, sigmoid, normalised, got 'softmax'"),
        ({"r_dtype": torch.float64}, "r_dtype must be float32, bfloat16 or float16"),
        ({"activation": "mish"}, "activation"),
        ({"k": torch.randn(H, E, f, d + 1).bfloat16()}, "which must equal"),
        ({"v": torch.randn(H, E, f, d)}, "must have dtype bfloat16 as q"),
    ],
)
def test_errors_say_what_is_allowed(replaced: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        OP(*(make() | replaced).values())


def test_no_kernel_without_a_gpu():
    weights = Like(torch.bfloat16, (16, 22, 256, 128), (720896, 32768, 128, 1))
    assert not may_pay(4096, weights, True, torch.device("cpu"))


@pytest.mark.parametrize(
    ("tokens", "replaced", "gated", "expected"),
    [
        (4096, {}, True, True),
        (None, {}, True, True),
        (256, {}, True, True),
        (255, {}, True, False),
        (4096, {}, False, False),
        (4096, {"dtype": torch.float16}, True, False),
        (4096, {"head_dim": 96}, True, True),
        (4096, {"head_dim": 40}, True, True),
        (4096, {"head_dim": 32}, True, False),
        (4096, {"head_dim": 160}, True, False),
        (4096, {"hidden": 64}, True, True),
        (4096, {"hidden": 32}, True, False),
        (4096, {"capability": (10, 0)}, True, False),
        (4096, {"capability": (8, 0)}, True, False),
    ],
)
def test_where_there_is_a_kernel(
    tokens: int | None,
    replaced: dict[str, Any],
    gated: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("triton")
    from mhf_compiler.lowering.ops import norm_network

    of = {"capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128, "hidden": 256} | replaced
    monkeypatch.setattr(norm_network, "capability", lambda device: of["capability"])
    shape = (16, 22, of["hidden"], of["head_dim"])
    weights = Like(of["dtype"], shape, torch.empty(shape, device="meta").stride())
    assert may_pay(tokens, weights, gated, torch.device("cuda")) is expected
