"""The ops that write over what they read: the same bits, in that memory, or a copy of them."""

import re
from pathlib import Path

import pytest
import torch
from support import problems
from torch import Tensor
from torch.library import opcheck

from mhf_compiler.lowering import ArgumentError, ops
from mhf_compiler.lowering.cpu import blocked, compiled
from mhf_compiler.lowering.ops import in_place
from mhf_compiler.lowering.ops.common import function_of_kernels, owns_memory
from mhf_compiler.lowering.problem import Gradients, Problem

OPS = torch.ops.mhf_compiler
OVER_QUERY = OPS.multi_head_ffn_over_query.default
OVER_GRADIENT = OPS.multi_head_ffn_backward_over_gradient.default
ONTO = OPS.router_product_backward_onto.default
SCALES = (1.3, 0.7, 0.9)
SHAPE = (3, 70, 4, 8)  # more tokens than a block


def make(dtype: torch.dtype = torch.float32, absent: tuple[str, ...] = ()) -> problems.Tensors:
    B, L, H, d = SHAPE
    return problems.make(problems.Shape(B, L, H, d, G=2, E=3, f=5), dtype, absent)


ABSENT = [(), ("r",), ("u", "u_bias"), problems.BIASES]


@pytest.fixture(params=["compiled", "blocked"])
def small_blocks(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens, and of what else there is, on both paths."""
    monkeypatch.setattr(compiled, "takes", lambda q, activation: request.param == "compiled")
    for name in ("_FORWARD_ELEMENTS", "_BACKWARD_ELEMENTS"):
        monkeypatch.setattr(blocked, name, 8)


@pytest.mark.parametrize("absent", ABSENT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
def test_the_result_lies_where_the_query_lay(dtype: torch.dtype, absent: tuple[str, ...]):
    tensors = make(dtype, absent)
    expected = OPS.multi_head_ffn(*tensors.values(), "gelu", *SCALES)
    OVER_QUERY(*tensors.values(), "gelu", *SCALES)
    assert tensors["q"].equal(expected)


@pytest.mark.parametrize("absent", ABSENT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", [range(8), (0,), (0, 3, 4), (0, 1, 2)], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_the_querys_gradient_lies_where_that_of_the_result_lay(
    needed: tuple[int, ...], dtype: torch.dtype, absent: tuple[str, ...]
):
    tensors, grad_out = make(dtype, absent), torch.randn(SHAPE).to(dtype)
    needs = [i in needed and x is not None for i, x in enumerate(tensors.values())]
    arguments = (*tensors.values(), "silu", *SCALES, needs)
    expected = iter(OPS.multi_head_ffn_backward(grad_out, *arguments))
    others = OVER_GRADIENT(grad_out, *arguments)
    assert grad_out.equal(next(expected))
    for needed_, found in zip(needs[1:], others, strict=True):
        assert found.equal(next(expected)) if needed_ else found.numel() == 0


def test_the_kernels_get_the_memory_itself():
    tensors, places = make(), []
    grad_out = torch.randn(SHAPE)

    def forward(problem: Problem, out: Tensor) -> None:
        places.append(out.data_ptr() == problem.q.data_ptr())
        assert out is not problem.q  # launches are repeated by which tensor goes where

    def backward(problem: Problem, grad_out: Tensor, gradients: Gradients) -> None:
        (dq,) = gradients.wanted
        places.append(dq.data_ptr() == grad_out.data_ptr())
        assert dq is not grad_out

    in_place._forward(forward, *tensors.values(), "silu", *SCALES)
    needs = [True, *[False] * 7]
    in_place._backward(backward, grad_out, *tensors.values(), "silu", *SCALES, needs)
    tensors["q"] = tensors["q"][:, :1].expand(SHAPE)
    with pytest.raises(RuntimeError, match="single memory location"):
        in_place._forward(forward, *tensors.values(), "silu", *SCALES)
    assert places == [True, True, False]


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
def test_any_order_in_memory(order: tuple[int, ...]):
    tensors, grad_out = make(), torch.randn(SHAPE)
    expected = OPS.multi_head_ffn(*tensors.values(), "silu", *SCALES)
    needs = [True] * 8
    gradients = OPS.multi_head_ffn_backward(grad_out, *tensors.values(), "silu", *SCALES, needs)
    grad_out = problems.stored_as(grad_out, order)
    tensors["q"] = problems.stored_as(tensors["q"], order)
    OVER_GRADIENT(grad_out, *tensors.values(), "silu", *SCALES, needs)
    OVER_QUERY(*tensors.values(), "silu", *SCALES)
    torch.testing.assert_close(tensors["q"], expected)
    torch.testing.assert_close(grad_out, gradients[0])


@pytest.mark.usefixtures("small_blocks")
def test_what_another_argument_lies_in_is_written_at_the_end():
    """R of a token lies in the query of the next one, which is read and written later."""
    tensors = make()
    q = torch.randn(3, 42, 4, 8)
    tensors["r"] = q[:, :41, :, :3]
    tensors["q"] = q[:, 1:]
    expected = OPS.multi_head_ffn(*tensors.values(), "silu", *SCALES)
    OVER_QUERY(*tensors.values(), "silu", *SCALES)
    assert tensors["q"].equal(expected)


def test_a_gradient_that_lies_in_the_query_is_written_at_the_end():
    tensors = make()
    needs = [True] * 8
    arguments = tuple(tensors.values())
    q = tensors["q"]
    expected = OPS.multi_head_ffn_backward(q.clone(), *arguments, "silu", *SCALES, needs)
    others = OVER_GRADIENT(q, *arguments, "silu", *SCALES, needs)
    for found, right in zip((q, *others), expected, strict=True):
        torch.testing.assert_close(found, right)


def of_router(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A gradient to add to, and the arguments of a router's backward pass."""
    torch.manual_seed(0)
    B, L, H, d = SHAPE
    return {
        "dq": torch.randn(SHAPE).to(dtype),
        "grad_out": torch.randn(B, L, H, 3),
        "q": torch.randn(SHAPE).to(dtype),
        "weight": torch.randn(2, d, 3),
    }


@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_routers_part_is_added_and_rounded_once(dtype: torch.dtype, needs_weight: bool):
    given = of_router(dtype)
    weight = given["weight"].repeat_interleave(2, 0)
    total = given["dq"].float() + torch.einsum("blhe,hde->blhd", given["grad_out"], weight)
    (expected,) = OPS.router_product_backward(*list(given.values())[1:], [False, True])
    found = ONTO(*given.values(), needs_weight)
    torch.testing.assert_close(given["dq"], total.to(dtype), rtol=1e-6, atol=0)
    assert found.equal(expected) if needs_weight else found.numel() == 0


def test_a_part_whose_memory_others_read_is_added_at_the_end():
    given = of_router()
    alone = given | {"dq": given["q"].clone()}
    ONTO(*alone.values(), True)
    ONTO(*(given | {"dq": given["q"]}).values(), True)
    assert given["q"].equal(alone["dq"])


@pytest.mark.parametrize("needs_weight", [False, True])
def test_opcheck_of_the_routers_part(needs_weight: bool):
    opcheck(ONTO, (*of_router().values(), needs_weight))


def test_a_part_must_be_as_the_query():
    for wrong in (torch.randn(SHAPE), torch.randn(SHAPE).bfloat16()[..., :4]):
        with pytest.raises(ArgumentError, match=r"dq is .* must be as q"):
            ONTO(*(of_router() | {"dq": wrong}).values(), True)


def test_the_ops_that_write_to_an_argument_are_listed():
    defined = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in defined if name.startswith("mhf_compiler::")}
    assert {name for op in ops.ALL for name in (op.__name__, f"{op.__name__}.compiled")} == ours
    mutable = [op for op in ops.ALL if op.default._schema.is_mutable]
    assert list(ops.MUTATING) == mutable


def test_what_runs_on_a_gpu_is_there():
    """Each op names a function of the kernels, which is looked for by the first call."""
    pytest.importorskip("triton")
    sources = [path.read_text() for path in Path(ops.__file__).parent.glob("*.py")]
    paths = [path for text in sources for path in re.findall(r'kernels\("([\w.]+)"\)', text)]
    packaged = [path for path in paths if path.startswith("packaged.")]
    assert len(paths) - len(packaged) == len(ops.ALL)
    assert all(callable(function_of_kernels(path)) for path in paths)


def test_owns_memory():
    x = torch.zeros(4, 6, 5)
    assert owns_memory(x, [None, torch.zeros(3)])
    assert owns_memory(x.transpose(0, 2), [])
    assert owns_memory(x[:, 1:3], [])
    assert owns_memory(x.as_strided((1, 6, 5), (0, 5, 1)), [])  # a single sequence may step by 0
    assert not owns_memory(x, [None, x[0]])
    assert not owns_memory(x[:1].expand(4, 6, 5), [])
    assert not owns_memory(x.as_strided((4, 6, 5), (2, 5, 1)), [])


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_opcheck(absent: tuple[str, ...]):
    """Schema, what is written, shapes on fake tensors, and AOTAutograd with symbols."""
    opcheck(OVER_QUERY, (*make(absent=absent).values(), "silu", *SCALES))
    tensors = make(absent=absent).values()
    for needs in ([x is not None for x in tensors], [True, *[False] * 7]):
        opcheck(OVER_GRADIENT, (torch.randn(SHAPE), *tensors, "silu", *SCALES, needs))


def test_arguments_are_checked():
    q, *others = make().values()
    with pytest.raises(ArgumentError, match="k of shape"):
        OVER_QUERY(q, torch.zeros(2, 3, 5, 9), *others[1:], "silu", *SCALES)
    with pytest.raises(ArgumentError, match="must ask for q's"):
        OVER_GRADIENT(q.clone(), q, *others, "silu", *SCALES, [False] * 8)
    grad_out: Tensor = torch.randn(SHAPE).double()
    with pytest.raises(ArgumentError, match="grad_out must have the dtype of q"):
        OVER_GRADIENT(grad_out, q, *others, "silu", *SCALES, [True] * 8)


def test_no_tokens():
    tensors = make() | {"q": torch.randn(2, 0, 4, 8), "r": torch.randn(2, 0, 4, 3)}
    OVER_QUERY(*tensors.values(), "silu", *SCALES)
    others = OVER_GRADIENT(torch.randn(2, 0, 4, 8), *tensors.values(), "silu", *SCALES, [True] * 8)
    assert all(x.eq(0).all() for x in others)
