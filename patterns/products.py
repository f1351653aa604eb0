"""What a matrix product is: for ATen's operations, and for the functions and methods of a graph.

This file alone says whether something is one. What the operations compute is in
``contractions.py``, which has a rule for each of them.
"""

from __future__ import annotations

import re

import torch
from torch import fx

from mhf_compiler.compat import OpOverload

aten = torch.ops.aten

MATRIX_PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.bmm.default,
        aten.mv.default,
        aten.dot.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.addbmm.default,
        aten.addmv.default,
        aten.linear.default,
        aten.convolution.default,
    }
)

#: names of functions and methods that are decomposed into those
_NAMED = re.compile(
    r"(^|[._ ])(linear|matmul|chain_matmul|einsum|inner|tensordot|multi_dot|vecdot|v?dot"
    r"|(add|baddb|addb|b)?mm_?|(add)?mv_?|conv\dd|convolution)\b"
)


def is_product_call(node: fx.Node) -> bool:
    """Whether a node calls a matrix product."""
    return _calls(node) and _NAMED.search(_target(node)) is not None


def may_be_product_call(node: fx.Node) -> bool:
    """The same, or a product of elements, which may be summed."""
    return is_product_call(node) or (_calls(node) and "mul" in _target(node))


def is_summed_product_call(node: fx.Node) -> bool:
    """A matrix product, or a product of elements that a sum reads at once."""
    summed = may_be_product_call(node) and any("sum" in _target(user) for user in node.users)
    return is_product_call(node) or summed


def _calls(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method")


def _target(node: fx.Node) -> str:
    """``einsum``, ``aten.mm.default``, ``linear``: the name, without what is around it."""
    target = node.target
    if isinstance(target, (str, OpOverload)):
        return str(target)
    return str(getattr(target, "__name__", target))
