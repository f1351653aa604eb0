"""Calls of `blocks.cpp`: its arguments, when it is built, and which calls it supports."""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..problem import Gradients, Problem

__all__ = [
    "ACTIVATIONS",
    "PRODUCTS_OF_THREAD",
    "backward",
    "forward",
    "problem",
    "read",
    "source",
    "takes",
]

_SOURCES = ("products.h", "activations.h", "blocks.cpp")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh")
_ALIGNMENT = 64  # bytes, of every buffer
_TOKENS = 16  # of one head, below which another thread is not worth it
PRODUCTS_OF_THREAD = 1 << 19  # of numbers, some 20 us of a thread's time: so much for each


class _View(ctypes.Structure):
    """A tensor of four dimensions; an absent one has a null address."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 4),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((size, ctypes.c_int64) for size in ("B", "L", "H", "d", "G", "E", "f")),
        *((name, ctypes.c_int64) for name in ("dtype", "activation", "threads")),
        *((scale, ctypes.c_double) for scale in ("k_scale", "u_scale", "out_scale")),
        *((name, _View) for name in Gradients._fields),  # named as the inputs
        ("out", _View),
        *((f"d{name}", _View) for name in Gradients._fields),
    )


def problem() -> str | None:
    """Why the op has no C++ on this machine; None if it has. The first call builds it."""
    return _built()[1]


def _library() -> ctypes.CDLL | None:
    return _built()[0]


@functools.cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled `blocks.cpp`; or None and why, after a warning, where it cannot be had."""
    from mhf_compiler import compat

    try:
        library = compat.load_cpp(source())
        for function in (library.multi_head_ffn_forward, library.multi_head_ffn_backward):
            function.argtypes = (ctypes.POINTER(_Call), ctypes.c_void_p)
            function.restype = ctypes.c_int64
    except Exception as error:
        (why, *_) = str(error).strip().splitlines() or [type(error).__name__]
        for counted in ("failures", "failures.cpp"):
            compat.counters["flashmhf"][counted] += 1
        warnings.warn(
            f"no C++ for multi_head_ffn on the CPU, so it runs in PyTorch's operations, which are "
            f"slower (mhf-compiler doctor tries the compiler): {why}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, why
    return library, None


def source() -> str:
    """The C++ of both passes."""
    return "\n".join(map(read, _SOURCES))


def read(name: str) -> str:
    """A file of this folder."""
    return Path(__file__).with_name(name).read_text()


def takes(q: Tensor, activation: str) -> bool:
    """Whether this path is the faster one: every thread gets whole vectors of tokens."""
    batch, length, heads, _ = q.shape
    pieces = heads * -(-batch * length // _TOKENS)
    few = pieces < torch.get_num_threads()
    return activation in ACTIVATIONS and not few and _library() is not None


def forward(problem: Problem, out: Tensor) -> None:
    """Write the op's result into ``out``."""
    _run("multi_head_ffn_forward", _call(problem, out, Gradients()), out)


def backward(problem: Problem, grad_out: Tensor, gradients: Gradients) -> None:
    """Fill the gradients that are not None."""
    _run("multi_head_ffn_backward", _call(problem, grad_out, gradients), grad_out)


def _call(problem: Problem, out: Tensor, gradients: Gradients) -> _Call:
    q, k = problem.q, problem.k
    activation, *scales = problem.constants
    compute = torch.promote_types(q.dtype, torch.float32)
    return _Call(
        *(*q.shape, *k.shape[:3]),
        *(_DTYPES.index(compute), ACTIVATIONS.index(activation), _threads(q, k)),
        *scales,
        *map(_view, (*_four(problem.tensors), out, *_four(gradients))),
    )


def _threads(q: Tensor, k: Tensor) -> int:
    products = q.numel() * k.shape[1] * k.shape[2]
    return max(1, min(torch.get_num_threads(), products // PRODUCTS_OF_THREAD))


def _four(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors with four dimensions: biases as one column [G, E, f, 1], one row [G, E, 1, d]."""
    k_bias, u_bias, v_bias = tensors[5:]
    return [
        *tensors[:5],
        None if k_bias is None else k_bias.unsqueeze(3),
        None if u_bias is None else u_bias.unsqueeze(3),
        None if v_bias is None else v_bias.unsqueeze(2),
    ]


def _view(x: Tensor | None) -> _View:
    if x is None:
        return _View()
    return _View(x.data_ptr(), _DTYPES.index(x.dtype), x.stride())


def _run(name: str, call: _Call, like: Tensor) -> None:
    function = getattr(_library(), name)
    size = function(call, None) + _ALIGNMENT
    memory = like.new_empty(size, dtype=torch.uint8)
    start = -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    function(call, start)
