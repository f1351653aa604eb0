"""Compiled graphs call overloads that check nothing; packages call the documented ones."""

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.virtualized import V

from mhf_compiler.compat import auto_functionalized
from mhf_compiler.lowering import ArgumentError, ops
from mhf_compiler.passes.overloads import call_without_checks

OPS = torch.ops.mhf_compiler


def graph() -> fx.Graph:
    """One direct call, and the functional form of one that writes to an argument."""
    made = fx.Graph()
    q, k, v = (made.placeholder(name) for name in "qkv")
    one = made.call_function(OPS.multi_head_ffn.default, (q, k, None, v))
    op = OPS.multi_head_ffn_over_query.default
    other = made.call_function(auto_functionalized, (op,), {"q": q, "k": k, "v": v})
    made.output((one, other, made.call_function(torch.ops.aten.neg.default, (q,))))
    return made


def called(made: fx.Graph) -> list[object]:
    nodes = [node for node in made.nodes if node.op == "call_function"]
    return [node.args[0] if node.target is auto_functionalized else node.target for node in nodes]


def test_our_ops_are_called_without_checks() -> None:
    made = graph()
    call_without_checks(made)
    aten = torch.ops.aten.neg.default
    over = OPS.multi_head_ffn_over_query.compiled
    assert called(made) == [OPS.multi_head_ffn.compiled, over, aten]


def test_a_package_keeps_the_ops_of_the_documentation() -> None:
    made = graph()
    before = called(made)
    with V.set_aot_compilation(True):
        call_without_checks(made)
    assert called(made) == before


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.__name__)
def test_both_overloads_have_one_schema(op: torch._ops.OpOverloadPacket) -> None:
    one, other = (str(overload._schema).partition("(")[2] for overload in (op.default, op.compiled))
    assert one == other


def tensors() -> list[Tensor]:
    return [torch.randn(1, 3, 2, 4), *(torch.randn(2, 1, 5, 4) for _ in range(3))]


def test_a_call_without_an_overload_is_checked_and_differentiated() -> None:
    q, k, u, v = tensors()
    with pytest.raises(ArgumentError, match="k must have 4 dimensions"):
        OPS.multi_head_ffn(q, k[0], u, v)
    assert OPS.multi_head_ffn(q.requires_grad_(), k, u, v).requires_grad


def test_the_compiled_overload_neither_records_gradients_nor_casts() -> None:
    q, k, u, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = OPS.multi_head_ffn.compiled(q.requires_grad_(), k, u, v)
    assert not out.requires_grad
    torch.testing.assert_close(out, OPS.multi_head_ffn(q, k, u, v).detach(), rtol=0, atol=0)
