"""Single operations by kind, for the files that read values."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType

import torch

from .canonical import COPY, OPAQUE, Value
from .meaning import POINTWISE
from .views import is_view

aten = torch.ops.aten

DROPOUT = frozenset(
    {aten.native_dropout.default, aten.bernoulli.p, aten.bernoulli.default, aten.bernoulli_.float}
)
#: what mixes elements: of tokens, of hidden units, of a router's weights
REDUCTIONS = frozenset({aten.amax.default, aten.mean.dim, aten.sum.dim_IntList})
#: activations that not every release of PyTorch tags as pointwise
_OTHER_ACTIVATIONS = frozenset(
    {
        aten.elu.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.log_sigmoid_forward.default,
        aten._prelu_kernel.default,
    }
)
_ZEROS = frozenset(
    {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.zero.default}
)
_FULLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}


def operation_name(value: Value) -> str:
    """The operation of a value, as a report names it."""
    if value.op == OPAQUE:
        target = value.origin.target
        module = getattr(target, "__module__", "torch")
        function = isinstance(target, (BuiltinFunctionType, FunctionType))
        named = function or module in (None, "builtins")
        return str(getattr(target, "__name__", target) if named else target)
    return str(value.op).removeprefix("aten.").removesuffix(".default")


def is_other_pointwise(value: Value) -> bool:
    """A pointwise operation that ``meaning.py`` does not know."""
    tagged = torch.Tag.pointwise in getattr(value.op, "tags", ())
    return value.op not in POINTWISE and (tagged or value.op in _OTHER_ACTIVATIONS)


def is_cast(value: Value) -> bool:
    """A change of floating dtype and of nothing else."""
    if value.op is not aten._to_copy.default and value.op != COPY:
        return False
    source = value.source
    floating = value.dtype.is_floating_point and source.dtype.is_floating_point
    return floating and value.device == source.device and value.shape == source.shape


def is_zero(value: Value) -> bool:
    """Zeros that a factory made, through views and casts."""
    while is_view(value) or is_cast(value) or value.op is aten.detach.default:
        value = value.source
    if value.op in _ZEROS:
        return True
    return value.op in _FULLS and value.args[_FULLS[value.op]] == 0


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a dtype has all the digits and the range of another floating one."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    a, b = torch.finfo(wide), torch.finfo(narrow)
    try:
        return a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny
    except NotImplementedError:  # PyTorch does not say it of four bits
        return False
