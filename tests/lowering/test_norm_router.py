"""The op that normalises queries where they lie and routes them: its meaning, and its CPU path."""

from typing import Any

import pytest
import torch
from support import problems
from torch import Tensor
from torch.library import opcheck

from mhf_compiler.lowering import ArgumentError
from mhf_compiler.lowering.problem import ROUTINGS

OP = torch.ops.mhf_compiler.norm_and_route.default
NARROW = (torch.bfloat16, torch.float16)
B, L, H, d, E = 2, 5, 4, 8, 3


def make(
    dtype: torch.dtype = torch.bfloat16, weights: torch.dtype = torch.float32, groups: int = H
) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": (3 * torch.randn(B, L, H, d)).to(dtype),
        "norm_weight": torch.rand(d).to(weights),
        "weight": torch.randn(groups, d, E).to(weights),
        "norm_eps": 1e-6,
        "rounds_first": False,
        "routing": "normalised",
        "sum_floor": 1e-20,
        "sum_eps": 0.0,
        "r_dtype": torch.float32,
        "out_order": None,
    }


def expected(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The normalised queries before they are rounded, and the weights of the rounded ones."""
    q, norm_weight, weight = (given[name] for name in ("q", "norm_weight", "weight"))
    x = problems.normed(q, norm_weight, given["norm_eps"])
    rounded = q.clone()
    OP(*(given | {"q": rounded}).values())
    formula = (given[name] for name in ("routing", "sum_floor", "sum_eps"))
    return x, problems.routed(rounded, weight, *formula)


def check(given: dict[str, Any], roundings: int = 1) -> Tensor:
    x, r = expected(given)
    found = OP(*given.values())
    q = given["q"]
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}
    torch.testing.assert_close(q.double(), x, rtol=1.01 * roundings * unit[q.dtype], atol=1e-6)
    assert found.dtype is given["r_dtype"]
    torch.testing.assert_close(found.double(), r, rtol=1.01 * unit[found.dtype], atol=1e-5)
    return found


@pytest.mark.parametrize("groups", [H, 2, 1])
@pytest.mark.parametrize("weights", [torch.float32, *NARROW])
@pytest.mark.parametrize("dtype", NARROW)
def test_is_a_norm_and_a_router(dtype: torch.dtype, weights: torch.dtype, groups: int):
    check(make(dtype, weights, groups))


OPTIONS: dict[str, dict[str, Any]] = {
    "no weight": {"norm_weight": None},
    "a weight for each head": {"norm_weight": torch.rand(H, d)},
    "weights by columns": {"norm_weight": torch.rand(d, H).T},
    "a large eps": {"norm_eps": 2.0},
    "logits": {"routing": "none"},
    "sigmoids": {"routing": "sigmoid"},
    "a floor": {"sum_floor": 2.0},
    "a number added": {"sum_floor": 0.0, "sum_eps": 0.5},
    "in bfloat16": {"r_dtype": torch.bfloat16},
    "in float16": {"r_dtype": torch.float16},
    "tokens innermost": {"out_order": [2, 3, 0, 1]},
    "strided": {"q": torch.randn(B, H, L, d).half().transpose(1, 2)},
    "no tokens": {"q": torch.randn(B, 0, H, d).half()},
}


@pytest.mark.parametrize("replaced", OPTIONS.values(), ids=OPTIONS)
def test_options(replaced: dict[str, Any]):
    given = make() | {
        name: x.clone() if isinstance(x, Tensor) else x for name, x in replaced.items()
    }
    found = check(given)
    assert found.permute(given["out_order"] or (0, 1, 2, 3)).is_contiguous()


@pytest.mark.parametrize("dtype", NARROW)
def test_rounds_where_it_is_told(dtype: torch.dtype):
    """The bits of the spelling that rounds before the weight, and of the one that does not."""
    for rounds_first in (False, True):
        given = make(dtype) | {"rounds_first": rounds_first}
        wide = given["q"].float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        right = ((wide.to(dtype) if rounds_first else wide) * given["norm_weight"]).to(dtype)
        OP(*given.values())
        assert given["q"].equal(right)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("replaced", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(replaced: dict[str, Any], routing: str):
    opcheck(OP, tuple((make() | replaced | {"routing": routing}).values()))


def test_other_memory_is_not_written():
    memory = torch.full((B, L + 2, H, d + 3), 7.0).bfloat16()
    inner = (slice(None), slice(1, L + 1), slice(None), slice(2, d + 2))
    memory[inner] = torch.randn(B, L, H, d).bfloat16()
    check(make() | {"q": memory[inner]})
    memory[inner] = 7.0
    assert memory.eq(7.0).all()


def test_autocast_leaves_it_in_float32():
    one, other = make(), make()
    with torch.autocast("cpu", torch.bfloat16):
        r = OP(*one.values())
    assert r.equal(OP(*other.values()))
    assert one["q"].equal(other["q"])


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"q": torch.randn(B, L, H, d)}, "q is torch.float32, must be bfloat16 or float16"),
        ({"weight": torch.randn(H, d, 33)}, "at most 32 sub-networks"),
        ({"weight": torch.randn(3, d, E)}, "a divisor of q's 4 heads"),
        ({"norm_weight": torch.rand(d + 1)}, r"must have shape \(d\) or \(H, d\)"),
        ({"norm_weight": torch.rand(1)}, r"here \(8,\) or \(4, 8\)"),
        ({"norm_weight": torch.rand(d).double()}, "must be float32, bfloat16 or float16"),
        ({"routing": "softmax"}, "must be one of none, sigmoid, normalised, got 'softmax'"),
        ({"r_dtype": torch.float64}, "r_dtype must be float32, bfloat16 or float16"),
        ({"out_order": [0, 1, 2, 2]}, "must be a permutation"),
        (
            {
                "q": torch.randn(B, L, H, 136).bfloat16(),
                "norm_weight": None,
                "weight": torch.randn(H, 136, E),
            },
            "q has heads of width 136, must have at most 128",
        ),
    ],
)
def test_errors_say_what_is_allowed(replaced: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        OP(*(make() | replaced).values())


def test_queries_that_share_memory_are_refused():
    q = torch.randn(B, 1, H, d).bfloat16().expand(B, L, H, d)
    with pytest.raises(RuntimeError, match="single memory location"):
        OP(*(make() | {"q": q}).values())
