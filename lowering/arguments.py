"""What arguments the op accepts, and the error that says which one is wrong."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .activations import ACTIVATIONS
from .problem import Problem

__all__ = ["ArgumentError", "check_arguments", "check_backward_arguments", "check_device"]

# The axes of every tensor: batch B, length L, heads H, head width d, weight groups G,
# sub-networks E, hidden units f.
AXES = {
    "q": "BLHd",
    "k": "GEfd",
    "u": "GEfd",
    "v": "GEfd",
    "r": "BLHE",
    "k_bias": "GEf",
    "u_bias": "GEf",
    "v_bias": "GEd",
}
_WEIGHT_AXES = "GEfd"

_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_ROUTER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: float32 biases of a 16-bit network are read as they are: autocast leaves one that is added alone
WIDE_BIAS = torch.float32
_BIASES = ("k_bias", "u_bias", "v_bias")


class ArgumentError(ValueError):
    """An argument of ``multi_head_ffn`` that it cannot work with.

    The message names the argument, what came and what is allowed.
    """


def check_arguments(
    problem: Problem,
    *,
    out_order: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise :class:`ArgumentError` unless the arguments fit together, on any device.

    Under autocast the tensors are judged by the dtype that autocast gives them.
    """
    tensors, activation = problem.named_tensors, problem.activation
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("q", "k", "v")):
            optional = "" if name in ("q", "k", "v") else " or None"
            raise ArgumentError(f"{name} must be a tensor{optional}, got {type(tensor).__name__}")
        if tensor is not None and (tensor.layout != torch.strided or tensor.is_nested):
            kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            raise ArgumentError(f"{name} must be a dense tensor (torch.strided), got {kind}")
    if problem.u_bias is not None and problem.u is None:
        raise ArgumentError("u_bias is given but u is None: an un-gated network has no up bias")
    _check_shapes(tensors)
    _check_dtypes_and_devices(problem.q, tensors)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        near = difflib.get_close_matches(str(activation), ACTIVATIONS, n=1, cutoff=0.0)
        raise ArgumentError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; "
            f"the nearest is {near[0]!r}"
        )
    for name in ("k_scale", "u_scale", "out_scale"):
        scale = getattr(problem, name)
        if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
            raise ArgumentError(f"{name} must be a number, got {type(scale).__name__}")
    if out_order is not None and not _is_permutation(out_order):
        raise ArgumentError(f"out_order must be a permutation of (0, 1, 2, 3), got {out_order!r}")
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise ArgumentError(f"out_dtype must be a torch.dtype or None, got {out_dtype!r}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ArgumentError(f"out_dtype must be a floating dtype or None, got {_name(out_dtype)}")


def differentiates_forward(x: Tensor) -> bool:
    """Whether a level of forward-mode differentiation is entered, so that tensors have tangents.

    Outside of one a tensor is its own primal. The tangent itself is not read: transforms of
    ``torch.func`` have taken it off where the op is computed.
    """
    return forward_ad.unpack_dual(x).primal is not x


def check_device(q: Tensor, out_dtype: torch.dtype | None = None) -> None:
    """Raise :class:`ArgumentError` unless the device of ``q`` runs this dtype.

    Tensors on the ``meta`` device compute nothing and always pass.
    """
    if q.device.type == "meta":
        return
    dtype = _effective_dtype(q, q.device.type)
    objection = device_objection(q.device, dtype, out_dtype)
    if objection is not None:
        raise ArgumentError(objection)


def device_objection(
    device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype | None
) -> str | None:
    """Why a device does not run this dtype; None if it does."""
    kind = device.type
    if kind not in _DTYPES:
        return f"q is on device {device}, supported are {', '.join(_DTYPES)}"
    allowed = ", ".join(_name(dtype) for dtype in _DTYPES[kind])
    if dtype not in _DTYPES[kind]:
        return f"q has dtype {_name(dtype)}, supported on {kind} are {allowed}"
    if out_dtype is not None and out_dtype not in _DTYPES[kind]:
        return f"out_dtype is {_name(out_dtype)}, supported on {kind} are {allowed}"
    return None


def check_backward_arguments(grad_out: Tensor, problem: Problem, needs: Sequence[bool]) -> None:
    """Raise :class:`ArgumentError` unless ``grad_out`` and ``needs`` fit the checked problem."""
    q = problem.q
    if tuple(grad_out.shape) != tuple(q.shape):
        raise ArgumentError(
            f"grad_out must have the shape {_shape(q)} of q, got {_shape(grad_out)}"
        )
    if not grad_out.dtype.is_floating_point:
        raise ArgumentError(f"grad_out must have a floating dtype, got {_name(grad_out.dtype)}")
    if grad_out.device != q.device:
        raise ArgumentError(f"grad_out is on device {grad_out.device}, q is on {q.device}")
    if len(needs) != len(AXES):
        raise ArgumentError(f"needs must have {len(AXES)} flags, got {len(needs)}")
    for name, tensor, needed in zip(AXES, problem.tensors, needs, strict=True):
        if needed and tensor is None:
            raise ArgumentError(f"needs asks for the gradient of {name}, which is None")


def _is_permutation(order: Sequence[int]) -> bool:
    """Whether it is a sequence of the integers 0 to 3, in some order."""
    if not isinstance(order, (list, tuple)):
        return False
    whole = all(isinstance(at, int) and not isinstance(at, bool) for at in order)
    return whole and sorted(order) == [0, 1, 2, 3]


def _check_shapes(tensors: dict[str, Tensor | None]) -> None:
    known: dict[str, tuple[int, str]] = {}  # axis -> (its size, the tensor that gave it)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        axes = AXES[name]
        layout = f"({', '.join(axes)})"
        if tensor.dim() != len(axes):
            raise ArgumentError(
                f"{name} must have {len(axes)} dimensions {layout}, got shape {_shape(tensor)}"
            )
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis not in known:
                known[axis] = (size, name)
                if axis in _WEIGHT_AXES and size < 1:
                    raise ArgumentError(
                        f"{name} of shape {_shape(tensor)} is empty: "
                        f"{axis} in {layout} must be at least 1"
                    )
            elif size != known[axis][0]:
                raise ArgumentError(
                    f"{name} of shape {_shape(tensor)} has {axis}={size} in {layout}, "
                    f"which must equal the {axis}={known[axis][0]} of {known[axis][1]}"
                )
    heads, groups = known["H"][0], known["G"][0]
    if heads % groups != 0:
        raise ArgumentError(
            f"the number of heads H={heads} of q must be a multiple of "
            f"the number of weight groups G={groups} of k"
        )


def _check_dtypes_and_devices(q: Tensor, tensors: dict[str, Tensor | None]) -> None:
    device = q.device.type
    expected = _effective_dtype(q, device)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(f"{name} must have a floating dtype, got {_name(tensor.dtype)}")
        if tensor.device != q.device:
            raise ArgumentError(f"{name} is on device {tensor.device}, must be on {q.device} as q")
        dtype = _effective_dtype(tensor, device)
        # Of a wrong dtype of all tensors, q is to blame: see check_device.
        known = expected in _ROUTER_DTYPES
        if name == "r" and known and tensor.dtype not in _ROUTER_DTYPES:
            allowed = ", ".join(map(_name, _ROUTER_DTYPES))
            raise ArgumentError(f"r has dtype {_name(tensor.dtype)}, supported are {allowed}")
        if name == "r" or (name in _BIASES and has_wide_bias(expected, tensor.dtype)):
            continue
        if dtype != expected:
            wide = has_wide_bias(expected, WIDE_BIAS) and name in _BIASES
            raise ArgumentError(
                f"{name} has dtype {_name(dtype)}, must have dtype {_name(expected)} as q"
                f"{f' or {_name(WIDE_BIAS)}' if wide else ''}"
            )


def has_wide_bias(dtype: torch.dtype, bias: torch.dtype) -> bool:
    """Whether a bias is wider than the network of ``dtype``, and taken so."""
    return bias == WIDE_BIAS and dtype in (torch.bfloat16, torch.float16)


def _effective_dtype(tensor: Tensor, device: str) -> torch.dtype:
    """The dtype after autocast, which leaves float64 as it is."""
    if tensor.dtype == torch.float64 or device not in _DTYPES:
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
