"""The operator: what PyTorch asks of one, what it saves, what it refuses and how it says so."""

import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from support import problems
from support.problems import BIASES, Shape, leaves
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from mhf_compiler.lowering import ArgumentError, multi_head_ffn, multi_head_ffn_reference
from mhf_compiler.lowering.arguments import check_device

OP = torch.ops.mhf_compiler.multi_head_ffn.default
BACKWARD = torch.ops.mhf_compiler.multi_head_ffn_backward.default
WIDE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums of some hundred terms, in another order


SHAPE = Shape(B=2, L=3, H=4, d=8, G=2, E=3, f=5)


def make(dtype: torch.dtype = torch.float32, B: int = 2, L: int = 3, **replaced) -> dict:
    return problems.make(SHAPE._replace(B=B, L=L), dtype) | replaced


SAMPLES = {
    "everything": ({}, {}),
    "un-gated": ({"u": None, "u_bias": None}, {"activation": "gelu"}),
    "bare": ({"u": None, "r": None, "k_bias": None, "u_bias": None, "v_bias": None}, {}),
    "another order and dtype": ({}, {"out_order": [2, 0, 1, 3], "out_dtype": torch.float64}),
    "scales": ({"v_bias": None}, {"k_scale": 0.5, "u_scale": 2.0, "out_scale": -1.0}),
    "strided": ({"q": torch.randn(2, 4, 3, 8).transpose(1, 2)}, {"out_order": [0, 2, 1, 3]}),
    "expanded": ({"r": torch.ones(1).expand(2, 3, 4, 3)}, {}),
    "no tokens": ({"q": torch.randn(2, 0, 4, 8), "r": torch.randn(2, 0, 4, 3)}, {}),
}


@pytest.mark.parametrize(("replaced", "options"), SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(replaced: dict, options: dict, dtype: torch.dtype):
    """Schema, shapes on fake tensors, autograd registration, and AOTAutograd with symbols."""
    tensors = {
        name: x if x is None else x.to(dtype).requires_grad_()
        for name, x in make(**replaced).items()
    }
    opcheck(OP, tuple(tensors.values()), options)


@pytest.mark.parametrize("needed", [range(8), (0,), (1, 4), (5, 6, 7)], ids=str)
def test_opcheck_backward(needed):
    needs = [i in needed for i in range(8)]
    grad_out = torch.randn(2, 3, 4, 8)
    opcheck(BACKWARD, (grad_out, *make().values(), "silu", 1.0, 1.0, 1.0, needs))


def test_gradients_have_the_strides_of_dense_inputs_as_the_shape_function_says():
    """Transposed memory stays transposed, so no optimizer or layer has to copy a gradient."""
    inputs = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in make().values()]
    arguments = (torch.randn(2, 3, 4, 8), *inputs, "silu", 1.0, 1.0, 1.0, [True] * 8)
    opcheck(BACKWARD, arguments)
    assert [g.stride() for g in BACKWARD(*arguments)] == [x.stride() for x in inputs]


@pytest.mark.parametrize("order", [None, (0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
def test_out_order_chooses_the_strides_only(order):
    out = multi_head_ffn(**make(torch.float64), out_order=order)
    expected = multi_head_ffn_reference(**make(torch.float64), out_order=order)
    assert out.shape == (2, 3, 4, 8)
    assert out.permute(order or (0, 1, 2, 3)).is_contiguous()
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_out_dtype(dtype: torch.dtype, out_dtype: torch.dtype):
    """The result has it, and so may the incoming gradient; gradients have their inputs' dtypes."""
    tensors = leaves(make(dtype, r=torch.randn(2, 3, 4, 3)))
    out = multi_head_ffn(**tensors, out_dtype=out_dtype)
    expected = multi_head_ffn_reference(**tensors, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    torch.testing.assert_close(out, expected, **({} if out_dtype.itemsize == 2 else WIDE))
    out.sum().backward()
    assert [x.grad.dtype for x in tensors.values()] == [x.dtype for x in tensors.values()]
    assert [x.grad.shape for x in tensors.values()] == [x.shape for x in tensors.values()]


def test_a_higher_dtype_of_the_result_is_not_rounded_on_the_way():
    tensors = make(torch.bfloat16)
    exact = multi_head_ffn_reference(**{name: x.double() for name, x in tensors.items()})
    out = multi_head_ffn(**tensors, out_dtype=torch.float32)
    torch.testing.assert_close(out.double(), exact, **WIDE)


def test_only_the_inputs_are_saved():
    tensors = leaves(make())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        multi_head_ffn(**tensors)
    inputs = {(x.data_ptr(), x.shape) for x in tensors.values()}
    assert {(x.data_ptr(), x.shape) for x in saved} == inputs
    assert len(saved) == len(tensors)


def test_no_grad_and_inference_mode():
    with torch.no_grad():
        out = multi_head_ffn(**leaves(make()))
    assert not out.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(multi_head_ffn(**make()), out)


def test_a_call_without_the_optional_arguments():
    tensors = leaves({name: make()[name] for name in ("q", "k", "u", "v")})
    torch.ops.mhf_compiler.multi_head_ffn(*tensors.values()).sum().backward()
    assert all(x.grad is not None for x in tensors.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool):
    direct, again = leaves(make()), leaves(make())
    multi_head_ffn(**direct).square().sum().backward()

    def call(q, k, u, v, r, k_bias, u_bias, v_bias):
        return multi_head_ffn(q, k, u, v, r, k_bias=k_bias, u_bias=u_bias, v_bias=v_bias)

    checkpoint(call, *again.values(), use_reentrant=use_reentrant).square().sum().backward()
    for name in direct:
        torch.testing.assert_close(direct[name].grad, again[name].grad)


def test_forward_mode_is_refused():
    """Or else the tangent would be lost without a word."""
    q, k, u, v = torch.randn(1, 2, 1, 4), *(torch.randn(1, 1, 3, 4) for _ in range(3))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: multi_head_ffn(q, k, u, v), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reference"):
        multi_head_ffn(forward_ad.make_dual(q, q), k, u, v)
    _, tangent = torch.func.jvp(lambda q: multi_head_ffn_reference(q, k, u, v), (q,), (q,))
    assert tangent.any()


def test_second_derivatives_are_refused():
    tensors = leaves(make())
    out = multi_head_ffn(**tensors)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_everything_but_r_and_float32_biases(dtype: torch.dtype):
    tensors = leaves(make(v_bias=torch.randn(2, 3, 8).to(torch.float16)))
    with torch.autocast("cpu", dtype=dtype):
        out = multi_head_ffn(**tensors)
        wide = multi_head_ffn(**tensors, out_dtype=torch.float32)
    kept = ("r", "k_bias", "u_bias")
    cast = {name: x if name in kept else x.to(dtype) for name, x in tensors.items()}
    assert out.dtype == dtype
    assert torch.equal(out, multi_head_ffn(**cast))
    assert wide.dtype == torch.float32
    assert torch.equal(wide, multi_head_ffn(**cast, out_dtype=torch.float32))
    out.sum().backward()
    assert all(x.grad.dtype == x.dtype for x in tensors.values())


@pytest.mark.parametrize("wide", [("k_bias",), ("u_bias",), ("v_bias",), BIASES], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_biases_of_networks_in_16_bits(dtype: torch.dtype, wide: Sequence[str]):
    """They are added as they are, and have gradients in float32; float64 is too much."""
    tensors = make(dtype) | {name: make()[name] * (1 + 2**-14) for name in wide}
    given, exact = leaves(tensors), leaves({name: x.double() for name, x in tensors.items()})
    out = multi_head_ffn(**given, out_dtype=torch.float32)
    expected = multi_head_ffn_reference(**exact)
    torch.testing.assert_close(out.double(), expected, **WIDE)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name in wide:
        assert given[name].grad.dtype == torch.float32
        torch.testing.assert_close(given[name].grad.double(), exact[name].grad, **WIDE)
    with pytest.raises(ArgumentError, match=rf"{wide[0]} has dtype float64, .* or float32"):
        multi_head_ffn(**tensors | {wide[0]: tensors[wide[0]].double()})


def test_autocast_reconciles_dtypes_and_leaves_float64():
    mixed = make(k=torch.randn(2, 3, 5, 8).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert multi_head_ffn(**mixed).dtype == torch.bfloat16
        assert multi_head_ffn(**make(torch.float64)).dtype == torch.float64
        with pytest.raises(ArgumentError, match="k has dtype float64"):
            multi_head_ffn(**make(k=torch.randn(2, 3, 5, 8).double()))


def test_compile_with_dynamic_shapes_compiles_once():
    """Neither the batch nor the length is specialised, forward and backward."""
    torch.compiler.reset()
    network = torch.compile(multi_head_ffn, backend="aot_eager", dynamic=True, fullgraph=True)
    # Two sizes of the first call that are equal by chance would be taken for the same symbol.
    network(**leaves(make(B=13, L=11))).sum().backward()
    for B, L in ((5, 7), (3, 64), (16, 2)):
        compiled, eager = leaves(make(B=B, L=L)), leaves(make(B=B, L=L))
        with torch.compiler.set_stance("fail_on_recompile"):
            out = network(**compiled)
        torch.testing.assert_close(out, multi_head_ffn(**eager))
        out.sum().backward()
        multi_head_ffn(**eager).sum().backward()
        for name in eager:
            torch.testing.assert_close(compiled[name].grad, eager[name].grad)


def test_compile_keeps_strides_and_dtype():
    torch.compiler.reset()

    def network(tensors):
        out = multi_head_ffn(**tensors, out_order=(2, 0, 1, 3), out_dtype=torch.float64)
        return out.permute(2, 0, 1, 3).view(4, -1) + 1  # fails unless the order is known

    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(make()), network(make()))


def test_compile_under_autocast():
    torch.compiler.reset()
    network = torch.compile(multi_head_ffn, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(**make())
        assert torch.equal(out, multi_head_ffn(**make()))


def test_meta_tensors_have_shapes():
    out = multi_head_ffn(
        **{name: x.to("meta") for name, x in make().items()}, out_order=(2, 0, 1, 3)
    )
    assert out.is_meta
    assert out.stride() == multi_head_ffn(**make(), out_order=(2, 0, 1, 3)).stride()


def test_import_needs_no_triton():
    modules = ("", ".cost", ".device", ".problem", ".summary", ".tiles", ".workload")
    names = ", ".join(f"mhf_compiler.lowering{name}" for name in modules)
    code = f"import sys, {names}; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_of_the_documentation():
    q = torch.randn(8, 256, 4, 32)
    k, u, v = (torch.randn(4, 2, 64, 32) for _ in range(3))
    r = torch.softmax(torch.randn(8, 256, 4, 2), dim=-1)
    assert multi_head_ffn(q, k, u, v, r).shape == torch.Size([8, 256, 4, 32])


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# Bad arguments, and what the message must say about them.
BAD = {
    "q of rank 3": (
        {"q": zeros(2, 4, 8)},
        r"q must have 4 dimensions \(B, L, H, d\), got .*2, 4, 8",
    ),
    "k of rank 3": ({"k": zeros(2, 3, 5)}, r"k must have 4 dimensions \(G, E, f, d\)"),
    "r of rank 3": ({"r": zeros(2, 3, 4)}, r"r must have 4 dimensions \(B, L, H, E\)"),
    "k_bias of rank 4": ({"k_bias": zeros(2, 3, 5, 1)}, r"k_bias must have 3 dimensions"),
    "v_bias of rank 2": ({"v_bias": zeros(3, 8)}, r"v_bias must have 3 dimensions"),
    "width of k": ({"k": zeros(2, 3, 5, 9)}, r"k of shape .* has d=9 .* must equal the d=8 of q"),
    "width of v": ({"v": zeros(2, 3, 5, 4)}, r"v of shape .* has d=4"),
    "units of u": ({"u": zeros(2, 3, 6, 8)}, r"u of shape .* has f=6 .* must equal the f=5 of k"),
    "units of v": ({"v": zeros(2, 3, 6, 8)}, r"v of shape .* has f=6"),
    "networks of v": ({"v": zeros(2, 4, 5, 8)}, r"v of shape .* has E=4"),
    "groups of u": ({"u": zeros(4, 3, 5, 8)}, r"u of shape .* has G=4"),
    "length of r": ({"r": zeros(2, 1, 4, 3)}, r"r of shape .* has L=1 .* must equal the L=3 of q"),
    "batch of r": ({"r": zeros(1, 3, 4, 3)}, r"r of shape .* has B=1"),
    "heads of r": ({"r": zeros(2, 3, 2, 3)}, r"r of shape .* has H=2"),
    "networks of r": ({"r": zeros(2, 3, 4, 1)}, r"r of shape .* has E=1"),
    "units of k_bias": ({"k_bias": zeros(2, 3, 1)}, r"k_bias of shape .* has f=1"),
    "units of u_bias": ({"u_bias": zeros(2, 3, 8)}, r"u_bias of shape .* has f=8"),
    "width of v_bias": ({"v_bias": zeros(2, 3, 5)}, r"v_bias of shape .* has d=5"),
    "heads and groups": (
        {"q": zeros(2, 3, 3, 8), "r": zeros(2, 3, 3, 3)},
        r"heads H=3 of q must be a multiple of .* groups G=2 of k",
    ),
    "no units": ({"k": zeros(2, 3, 0, 8)}, r"k of shape .* is empty: f .* at least 1"),
    "no groups": ({"k": zeros(0, 3, 5, 8)}, r"k of shape .* is empty: G .* at least 1"),
    "no width": ({"q": zeros(2, 3, 4, 0)}, r"q of shape .* is empty: d .* at least 1"),
    "q of integers": ({"q": zeros(2, 3, 4, 8, dtype=torch.int64)}, r"q .* floating .* got int64"),
    "r of integers": ({"r": zeros(2, 3, 4, 3, dtype=torch.int32)}, r"r .* floating .* got int32"),
    "r of booleans": ({"r": zeros(2, 3, 4, 3, dtype=torch.bool)}, r"r .* floating .* got bool"),
    "complex k": ({"k": zeros(2, 3, 5, 8, dtype=torch.complex64)}, r"k .* got complex64"),
    "dtype of k": (
        {"k": zeros(2, 3, 5, 8, dtype=torch.bfloat16)},
        r"k has dtype bfloat16, must have dtype float32 as q",
    ),
    "dtype of v_bias": ({"v_bias": zeros(2, 3, 8, dtype=torch.float64)}, r"v_bias .* float64"),
    "device of k": ({"k": zeros(2, 3, 5, 8, device="meta")}, r"k is on device meta, .* cpu as q"),
    "device of r": ({"r": zeros(2, 3, 4, 3, device="meta")}, r"r is on device meta, .* cpu as q"),
    "float8": (
        {name: x.to(torch.float8_e4m3fn) for name, x in make().items()},
        r"q has dtype float8_e4m3fn, supported on cpu are float32, float64, bfloat16, float16",
    ),
    "k missing": ({"k": None}, r"k must be a tensor, got NoneType"),
    "r a number": ({"r": 1.0}, r"r must be a tensor or None, got float"),
    "u_bias without u": ({"u": None}, r"u_bias is given but u is None"),
    "activation": ({"activation": "gelu-tanh"}, r"got 'gelu-tanh'; the nearest is 'gelu_tanh'"),
    "swish": ({"activation": "swish"}, r"activation must be one of silu, gelu, .* got 'swish'"),
    "no activation": ({"activation": None}, r"activation must be one of silu"),
    "out_order too short": ({"out_order": (0, 1, 2)}, r"out_order must be a permutation"),
    "out_order repeats": ({"out_order": (0, 1, 1, 3)}, r"permutation .* got \(0, 1, 1, 3\)"),
    "out_order negative": ({"out_order": (0, 1, 2, -1)}, r"out_order must be a permutation"),
    "out_dtype": ({"out_dtype": torch.int8}, r"out_dtype must be a floating dtype .* got int8"),
    "out_dtype float8": ({"out_dtype": torch.float8_e5m2}, r"out_dtype is float8_e5m2, supported"),
}


@pytest.mark.parametrize(("replaced", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(replaced: dict, message: str):
    with pytest.raises(ArgumentError, match=message):
        multi_head_ffn(**make(**replaced))


# What the operator accepts and a careless check would not.
GOOD = {
    "r of another dtype": {"r": torch.rand(2, 3, 4, 3).double()},
    "r of half precision": {"r": torch.rand(2, 3, 4, 3).half()},
    "no up projection": {"u": None, "u_bias": None},
    "one group": {name: x[:1] for name, x in make().items() if name not in ("q", "r")},
    "as many groups as heads": {
        name: x.repeat_interleave(2, 0) for name, x in make().items() if name not in ("q", "r")
    },
    "no sequences": {"q": zeros(0, 3, 4, 8), "r": zeros(0, 3, 4, 3)},
    "a list as out_order": {"out_order": [3, 2, 1, 0]},
    "a large width": {
        "q": zeros(2, 3, 4, 300),
        **{name: zeros(2, 3, 5, 300) for name in ("k", "u", "v")},
        "v_bias": zeros(2, 3, 300),
    },
}


@pytest.mark.parametrize("replaced", GOOD.values(), ids=GOOD)
def test_good_arguments_pass(replaced: dict):
    found = multi_head_ffn(**make(**replaced))
    torch.testing.assert_close(found, multi_head_ffn_reference(**make(**replaced)), **WIDE)


def test_the_operator_itself_checks_its_arguments():
    with pytest.raises(ArgumentError, match="k of shape"):
        OP(*make(k=zeros(2, 3, 5, 9)).values())
    with pytest.raises(ArgumentError, match=r"grad_out must have the shape"):
        BACKWARD(zeros(2, 3, 4, 1), *make().values(), "silu", 1.0, 1.0, 1.0, [True] * 8)
    with pytest.raises(ArgumentError, match=r"needs must have 8 flags, got 7"):
        BACKWARD(zeros(2, 3, 4, 8), *make().values(), "silu", 1.0, 1.0, 1.0, [True] * 7)
    inputs = make(u=None, u_bias=None).values()
    with pytest.raises(ArgumentError, match=r"gradient of u, which is None"):
        BACKWARD(zeros(2, 3, 4, 8), *inputs, "silu", 1.0, 1.0, 1.0, [True] * 8)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "out_dtype", "message"),
    [
        ("cuda", torch.float32, 256, None, None),
        ("cuda", torch.bfloat16, 1536, None, None),
        ("cuda", torch.float64, 8, None, r"q has dtype float64, supported on cuda are float32"),
        ("cuda", torch.float32, 8, torch.float64, r"out_dtype is float64, supported on cuda"),
        ("mps", torch.float32, 8, None, r"q is on device mps:0, supported are cpu, cuda"),
        ("xpu", torch.float32, 8, None, r"q is on device xpu:0, supported are cpu, cuda"),
    ],
)
def test_limits_of_devices_that_are_not_here(device, dtype, width, out_dtype, message):
    """The check reads three attributes of q, which here stand in for a tensor."""
    q = SimpleNamespace(device=torch.device(device, 0), dtype=dtype, shape=(2, 3, 4, width))
    if message is None:
        check_device(q, out_dtype)
    else:
        with pytest.raises(ArgumentError, match=message):
            check_device(q, out_dtype)
