"""Random calls of ``multi_head_ffn``: what does not fit is refused, all else is as specified.

A call that fits has tensors of any strides, absent ones, dtypes and constants, and is compared with
``multi_head_ffn_reference`` in values and gradients. A call that does not fit has one fault. It
must raise ``ArgumentError``, and no other error, with the name of an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhf_compiler import multi_head_ffn
from mhf_compiler.lowering import multi_head_ffn_reference
from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.lowering.arguments import ArgumentError
from tests.support.problems import BIASES, NAMES, Shape, make

Call = dict[str, Any]  # the arguments of the op, by name

NUMBERS = ("k_scale", "u_scale", "out_scale")
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
REQUIRED = ("q", "k", "v")

fixed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# Calls that fit.


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    def upto(most: int, least: int = 1) -> int:
        return draw(st.integers(least, most))

    groups = upto(3)
    return Shape(
        B=upto(3, 0), L=upto(3, 0), H=groups * upto(2), d=upto(5), G=groups, E=upto(3), f=upto(4)
    )


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Call:
    """Arguments that fit together, contiguous and with defaults at times."""
    absent = [name for name in NAMES if name not in REQUIRED and draw(st.booleans())]
    if "u" in absent:
        absent.append("u_bias")
    dtype = dtype or draw(st.sampled_from([*DTYPES]))
    call: Call = dict(
        make(
            draw(shapes()),
            dtype,
            absent,
            router_dtype=draw(st.sampled_from([None, *DTYPES])),
            scaled=True,
        )
    )
    if dtype.itemsize == 2 and draw(st.booleans()):
        call |= {name: None if call[name] is None else call[name].float() for name in BIASES}
    call["activation"] = draw(st.sampled_from(sorted(ACTIVATIONS)))
    for name in NUMBERS:
        call[name] = draw(st.sampled_from([1.0, 0.5, -1.0, 2, 0.0]))
    call["out_order"] = draw(st.none() | st.permutations(range(4)))
    call["out_dtype"] = draw(st.sampled_from([None, *DTYPES]))
    return call


def _reversed(x: Tensor) -> Tensor:
    """With its axes lying in memory the other way round."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def _every_other(x: Tensor) -> Tensor:
    """Every other element of a tensor that is not a number elsewhere."""
    memory = x.new_full([2 * size + 1 for size in x.shape], math.nan)
    part = memory[tuple(slice(1, None, 2) for _ in x.shape)]
    return part.copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """Its first row for all of them, with a stride of zero."""
    return x[:1].expand(x.shape) if x.shape[0] else x


def _unaligned(x: Tensor) -> Tensor:
    """At an offset of one element, in memory that goes on after it."""
    return x.new_full((x.numel() + 2,), math.nan)[1:-1].view(x.shape).copy_(x)


def _negated(x: Tensor) -> Tensor:
    """A view that PyTorch negates when it is read."""
    if x.dtype not in (torch.float32, torch.float64):
        return x
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


STRIDES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    _reversed,
    _every_other,
    _expanded,
    _unaligned,
    _negated,
]


@st.composite
def strided_calls(draw: st.DrawFn) -> Call:
    call = draw(calls())
    for name in NAMES:
        if call[name] is not None:
            call[name] = draw(st.sampled_from(STRIDES))(call[name])
    return call


def step(function: Callable[..., Tensor], call: Call) -> dict[str, Tensor]:
    """The result, and the gradients of all tensors, by name."""
    given = dict(call)
    tensors = [name for name in NAMES if call[name] is not None]
    for name in tensors:
        # a leaf with the strides of the argument
        given[name] = call[name].detach().requires_grad_()
    out = function(**given)
    torch.manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(loss, [given[name] for name in tensors])
    return {"out": out.detach(), **dict(zip(tensors, gradients, strict=True))}


def steps(x: Tensor) -> list[int]:
    """Its strides, where they matter."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


@given(strided_calls())
@settings(fixed, max_examples=100)
def test_a_call_that_fits_is_as_specified(call: Call):
    before = {name: call[name].clone() for name in NAMES if call[name] is not None}
    found, expected = step(multi_head_ffn, call), step(multi_head_ffn_reference, call)
    lowest = {call["q"].dtype, call["out_dtype"] or call["q"].dtype}
    lowest |= set() if call["r"] is None else {call["r"].dtype}
    tolerance = max(DTYPES[dtype] for dtype in lowest)
    assert steps(found["out"]) == steps(expected["out"])
    largest = max((float(x.abs().max()) for x in expected.values() if x.numel()), default=0.0)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        assert found[name].shape == x.shape, name
        torch.testing.assert_close(
            found[name].double(), x.double(), rtol=tolerance, atol=tolerance * (1 + largest)
        )
    for name, x in before.items():
        assert torch.equal(call[name], x), f"{name} was overwritten"


@given(calls())
@settings(fixed, max_examples=30)
def test_a_call_on_the_meta_device_has_the_form_of_the_result(call: Call):
    on_meta = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in call.items()}
    found, expected = multi_head_ffn(**on_meta), multi_head_ffn(**call)
    assert found.device.type == "meta"
    assert (found.shape, found.dtype, found.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )


# Calls with one fault. Each function returns the names of which the message must have one.

Fault = Callable[[st.DrawFn, Call], tuple[str, ...]]


def _some_tensor(draw: st.DrawFn, call: Call, *but: str) -> str:
    names = [name for name in NAMES if call[name] is not None and name not in but]
    name: str = draw(st.sampled_from(names))
    return name


def another_number_of_dimensions(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    name = _some_tensor(draw, call)
    x = call[name]
    options = [x[None], x[..., None], x.flatten(0, 1), x.flatten(), x.sum()]
    call[name] = draw(st.sampled_from(options))
    return (name,)


#: the axes of each tensor, as the documentation of the op names them
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


def another_size(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    """One that another tensor has otherwise; a size of one must not be broadcast."""
    name = _some_tensor(draw, call)
    present = [other for other in NAMES if call[other] is not None and other != name]
    shared = [a for a in AXES[name] if any(a in AXES[other] for other in present)]
    axis = draw(st.sampled_from(shared))
    sizes = list(call[name].shape)
    at = AXES[name].index(axis)
    wrong = [n for n in (1, 2, sizes[at] + 1, 2 * sizes[at]) if n != sizes[at]]
    sizes[at] = draw(st.sampled_from(wrong))
    call[name] = call[name].new_zeros(sizes)
    return (name, *(other for other in present if axis in AXES[other]))


def heads_that_are_no_multiple(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    B, L = call["q"].shape[:2]
    groups = draw(st.integers(2, 4))
    heads = draw(st.integers(1, 9).filter(lambda n: n % groups))
    for name in NAMES:
        x = call[name]
        if x is None:
            continue
        if name in ("q", "r"):
            call[name] = x.new_zeros(B, L, heads, x.shape[-1])
        else:
            call[name] = x[:1].expand(groups, *x.shape[1:])
    return ("q",)


def an_empty_weight(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    axis = draw(st.sampled_from("GEfd"))
    names = []
    for name in NAMES:
        if call[name] is not None and axis in AXES[name]:
            call[name] = call[name].narrow(AXES[name].index(axis), 0, 0)
            names.append(name)
    return tuple(names)


def another_dtype(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    name = _some_tensor(draw, call, "r")
    fits = {call[name].dtype, call["q"].dtype}
    if name in BIASES and call["q"].dtype.itemsize == 2:
        fits.add(torch.float32)
    others = [dtype for dtype in DTYPES if dtype not in fits]
    call[name] = call[name].to(draw(st.sampled_from(others)))
    return (name, "k") if name == "q" else (name,)


def no_floating_dtype(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    name = _some_tensor(draw, call)
    dtypes = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.uint8]
    call[name] = call[name].to(draw(st.sampled_from(dtypes)))
    return (name, "k") if name == "q" else (name,)


def an_eight_bit_dtype(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    dtype = draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
    for name in NAMES:
        if call[name] is not None:
            call[name] = call[name].to(dtype)
    return ("q has dtype", "r has dtype")


def a_router_in_eight_bits(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    r = call["q"].new_zeros(*call["q"].shape[:3], call["k"].shape[1])
    call["r"] = r.to(draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2])))
    return ("r has dtype",)


def another_device(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    name = _some_tensor(draw, call)
    call[name] = call[name].to("meta")
    return (name, "k") if name == "q" else (name,)


def another_storage(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    """A tensor without strides, or a list of tensors as one."""
    name = _some_tensor(draw, call)
    x = call[name]
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    call[name] = draw(st.sampled_from([x.to_sparse(), nested]))
    return (f"{name} must be a dense tensor",)


def no_tensor(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    name = draw(st.sampled_from(NAMES))
    options = [1.0, "x", [1.0], (), torch.float32]
    if name in REQUIRED:
        options.append(None)
    elif call[name] is not None:
        options += [call[name].tolist(), call[name].double().numpy()]
    call[name] = draw(st.sampled_from(options))
    return (name,)


def a_bias_of_nothing(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    call["u"], call["u_bias"] = None, call["k"][..., 0]
    return ("u_bias",)


def no_activation(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    options = [
        "swish",
        "",
        "SILU",
        "gelu ",
        None,
        3,
        ACTIVATIONS["silu"].function,
        ["silu"],
        b"silu",
    ]
    call["activation"] = draw(st.sampled_from(options))
    return ("activation",)


def no_number(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    name = draw(st.sampled_from(NUMBERS))
    options = ["1.0", None, 1j, [1.0], torch.ones(2), torch.ones((), requires_grad=True)]
    call[name] = draw(st.sampled_from(options))
    return (name,)


def no_order(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    options = [
        (0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4), (0, 1, 2, -1), (), (0, 1, 2, 3, 4), 3, "0123",
        (0, 1, 2, "3"), (0, 1, 2, None), (0.0, 1.0, 2.0, 3.0), (False, True, 2, 3),
    ]  # fmt: skip
    call["out_order"] = draw(st.sampled_from(options))
    return ("out_order",)


def no_output_dtype(draw: st.DrawFn, call: Call) -> tuple[str, ...]:
    options = [
        torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", float, 6,
    ]  # fmt: skip
    call["out_dtype"] = draw(st.sampled_from(options))
    return ("out_dtype",)


FAULTS: list[Fault] = [
    another_number_of_dimensions,
    another_size,
    heads_that_are_no_multiple,
    an_empty_weight,
    another_dtype,
    no_floating_dtype,
    an_eight_bit_dtype,
    a_router_in_eight_bits,
    another_device,
    another_storage,
    no_tensor,
    a_bias_of_nothing,
    no_activation,
    no_number,
    no_order,
    no_output_dtype,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: Fault):
    @given(st.data())
    @settings(fixed, max_examples=40)
    def refused(data: st.DataObject) -> None:
        call = data.draw(calls())
        named = fault(data.draw, call)
        with pytest.raises(ArgumentError) as error:
            multi_head_ffn(**call)
        message = str(error.value)
        assert any(name in message for name in named), message
        if "supported on cpu" not in message:  # the specification runs on any device and dtype
            with pytest.raises(ArgumentError):
                multi_head_ffn_reference(**call)

    refused()
