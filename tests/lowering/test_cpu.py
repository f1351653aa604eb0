"""The CPU paths: right for every shape, stride, dtype and way of cutting it into blocks."""

import itertools
import json
import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from support import problems
from support.problems import BIASES, NAMES, Shape, Tensors, leaves
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.profiler import ProfilerActivity, profile

from mhf_compiler import compat
from mhf_compiler.lowering import multi_head_ffn, multi_head_ffn_reference
from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.lowering.cpu import blocked, compiled
from mhf_compiler.lowering.summary import _cpu_path

SCALES = {"k_scale": 0.7, "u_scale": 1.3, "out_scale": 0.4}


@pytest.fixture(autouse=True, params=["compiled", "blocked"])
def path(request, monkeypatch) -> str:
    """Every test runs in C++ and in PyTorch's operations."""
    monkeypatch.setattr(compiled, "takes", lambda q, activation: request.param == "compiled")
    return request.param


SHAPE = Shape(B=2, L=3, H=4, d=3, G=2, E=2, f=5)


def make(shape: Shape, dtype: torch.dtype = torch.float64, absent: Sequence[str] = ()) -> Tensors:
    return problems.make(shape, dtype, absent)


def run(function, tensors: Tensors, **options) -> list[Tensor]:
    """The output, then the gradient of every tensor that is there."""
    out = function(**tensors, **options)
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    inputs = [x for x in tensors.values() if x is not None]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def assert_same(tensors: Tensors, **options) -> None:
    found = run(multi_head_ffn, tensors, **options)
    expected = run(multi_head_ffn_reference, tensors, **options)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


ABSENT = {
    "everything": (),
    "no biases": BIASES,
    "no r": ("r",),
    "no r, no biases": ("r", *BIASES),
    "un-gated": ("u", "u_bias"),
    "un-gated, no r, no biases": ("u", "u_bias", "r", "k_bias", "v_bias"),
}


@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
def test_gradcheck(absent: tuple[str, ...]):
    tensors = leaves(make(SHAPE._replace(B=1, L=2, H=2, G=1, d=2, f=2), absent=absent))
    names = [name for name, x in tensors.items() if x is not None]

    def call(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        return multi_head_ffn(**{name: given.get(name) for name in NAMES}, **SCALES)

    assert torch.autograd.gradcheck(call, [tensors[name] for name in names])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, gated: bool):
    absent = () if gated else ("u", "u_bias")
    assert_same(leaves(make(SHAPE, absent=absent)), activation=activation, **SCALES)


SHAPES = {
    "all different": SHAPE._replace(B=2, L=5, H=6, d=4, G=3, E=7, f=8),
    "one network": SHAPE._replace(E=1),
    "one unit": SHAPE._replace(f=1),
    "head width 1": SHAPE._replace(d=1),
    "everything 1": Shape(1, 1, 1, 1, 1, 1, 1),
    "all heads share": SHAPE._replace(G=1),
    "no sharing": SHAPE._replace(G=4),
    "no length": SHAPE._replace(B=9, L=1),
    "no batch": SHAPE._replace(B=1, L=9),
    "prime": SHAPE._replace(B=3, L=7, H=5, d=11, G=5, E=3, f=13),
    "more than a block": SHAPE._replace(B=2, L=150, H=2, d=5, G=1, E=2, f=70),
    "whole vectors": SHAPE._replace(B=2, L=48, H=2, d=16, G=2, E=2, f=64),
}


@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: Shape, absent: tuple[str, ...]):
    assert_same(leaves(make(shape, absent=absent)), **SCALES)


@pytest.mark.parametrize("path", ["blocked"], indirect=True)
@pytest.mark.parametrize("elements", [1, 7, 40, 150, 1000])
@pytest.mark.parametrize("absent", [(), ("u", "u_bias"), ("r",)], ids=["all", "un-gated", "no r"])
def test_blocks_of_any_size(monkeypatch, elements: int, absent: tuple[str, ...]):
    """Small buffers split groups, tokens, networks and hidden units, with uneven last blocks."""
    monkeypatch.setattr(blocked, "_FORWARD_ELEMENTS", elements)
    monkeypatch.setattr(blocked, "_BACKWARD_ELEMENTS", elements)
    monkeypatch.setattr(blocked, "_TOKENS", 4)
    assert_same(leaves(make(SHAPES["all different"], absent=absent)), **SCALES)
    half = make(SHAPES["prime"], torch.bfloat16, absent)  # converted weights cut differently
    found = run(multi_head_ffn, leaves(half))
    monkeypatch.undo()
    for x, y in zip(found, run(multi_head_ffn, leaves(half)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("empty", [{"B": 0}, {"L": 0}], ids=["no sequences", "no positions"])
def test_zero_tokens(empty: dict[str, int]):
    shape = SHAPE._replace(**empty)
    out, *gradients = run(multi_head_ffn, leaves(make(shape)))
    assert out.shape == (shape.B, shape.L, shape.H, shape.d)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_at_a_time(name: str):
    """Each gradient is right when no other is computed."""
    for absent in ((), ("u", "u_bias")):
        if name in absent:
            continue
        tensors = make(SHAPE, absent=absent)
        tensors[name] = tensors[name].requires_grad_()
        (found,) = torch.autograd.grad(multi_head_ffn(**tensors, **SCALES).sum(), tensors[name])
        reference = multi_head_ffn_reference(**tensors, **SCALES)
        (expected,) = torch.autograd.grad(reference.sum(), tensors[name])
        torch.testing.assert_close(found, expected)


def transposed(x: Tensor) -> Tensor:
    """The same values, with the memory of the last two dimensions swapped."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, -2).contiguous().transpose(0, -2)


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def part_of_more(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 2, 1, 1), value=torch.nan)
    return padded[..., 1:-1, 1:-2]


def expanded(x: Tensor) -> Tensor:
    """Other values: those of the first index of the first dimension, with stride 0."""
    return x[:1].expand_as(x)


def scalar(x: Tensor) -> Tensor:
    """One value with every stride 0."""
    return x.flatten()[0].expand_as(x)


@pytest.mark.parametrize(
    "view", [transposed, heads_first, every_other, part_of_more, expanded, scalar]
)
def test_strides(view):
    """Views are read where they lie; gradients have the shapes of the views."""
    given = make(SHAPE._replace(B=3, L=4))
    tensors = {name: view(x).requires_grad_() for name, x in given.items()}
    assert_same(tensors, **SCALES)


@pytest.mark.parametrize("view", [transposed, heads_first, every_other, expanded, scalar])
def test_strides_of_the_incoming_gradient(view):
    tensors = leaves(make(SHAPE))
    grad_out = view(torch.randn(2, 3, 4, 3, dtype=torch.float64))
    inputs = list(tensors.values())
    found = torch.autograd.grad(multi_head_ffn(**tensors), inputs, grad_out)
    expected = torch.autograd.grad(multi_head_ffn_reference(**tensors), inputs, grad_out)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def plain(q, k, u, v, r, k_bias, u_bias, v_bias):
    """The usual spelling, every intermediate in the dtype of the inputs."""
    gate = torch.einsum("blhd,hefd->blhef", q, k) + k_bias
    up = torch.einsum("blhd,hefd->blhef", q, u) + u_bias
    down = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, v) + v_bias
    return torch.einsum("blhed,blhe->blhd", down, r.to(down.dtype))


@pytest.mark.parametrize("r_dtype", [None, torch.float32], ids=["r as q", "r float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype, r_dtype):
    """Of the output and of every gradient, measured from the float64 reference."""
    tensors = make(SHAPE._replace(B=2, L=64, H=2, d=16, G=2, E=3, f=24), dtype)
    for name in ("k", "u", "v"):
        tensors[name] = tensors[name] / 4
    tensors["r"] = tensors["r"].to(r_dtype or dtype)
    exact = run(multi_head_ffn_reference, leaves({name: x.double() for name, x in tensors.items()}))
    found = run(multi_head_ffn, leaves(tensors))
    usual = run(plain, leaves(tensors))
    for name, x, y, z in zip(("out", *NAMES), found, usual, exact, strict=True):
        assert x.dtype == y.dtype
        assert (x - z).norm() <= 2 * (y - z).norm(), name


def test_sums_are_kept_in_float32_and_rounded_once():
    """A sum over 257 networks in bfloat16 would stop at 256, where 256 + 1 is 256."""
    ones = torch.ones(1, 257, 1, 1, dtype=torch.bfloat16)
    q = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    r = torch.ones(1, 1, 1, 257)
    r[..., 0] = 256.0
    out = multi_head_ffn(q, ones, None, ones, r, activation="relu")
    assert out.dtype == torch.bfloat16
    assert out.item() == 512.0


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads(monkeypatch, threads, count: int, groups: int, length: int):
    """A thread takes whole groups of heads, or a part of a group's tokens, or finds none left."""
    monkeypatch.setattr(compiled, "PRODUCTS_OF_THREAD", 1)
    threads(count)
    tensors = leaves(make(SHAPE._replace(B=2, L=length, H=12, d=3, G=groups)))
    assert_same(tensors, **SCALES)
    first, second = run(multi_head_ffn, tensors), run(multi_head_ffn, tensors)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_written_before_it_is_read(dtype: torch.dtype):
    """PyTorch fills new memory with NaN here, in buffers and results."""
    tensors = leaves(make(SHAPES["prime"], dtype))
    expected = run(multi_head_ffn, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        found = run(multi_head_ffn, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


EXTREMES = [x for size in (1e-30, 1, 10, 50, 88, 90, 104, 1e3, 1e10) for x in (size, -size)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_pre_activations(activation: str):
    q = torch.tensor([*EXTREMES, torch.nan]).view(1, -1, 1, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1)
    found = multi_head_ffn(q, one, None, one, activation=activation)
    expected = multi_head_ffn_reference(q, one, None, one, activation=activation)
    torch.testing.assert_close(found, expected, equal_nan=True)
    (slope,) = torch.autograd.grad(found.sum(), q)
    (expected,) = torch.autograd.grad(expected.sum(), q)
    torch.testing.assert_close(slope[0, :-1], expected[0, :-1])  # at NaN they may say 0 or 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_as_exact_as_pytorchs(activation: str):
    """In float32, where nothing but the activation and its slope is computed."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    one = torch.ones(1, 1, 1, 1)
    q = x.float().view(1, -1, 1, 1).requires_grad_()
    found = multi_head_ffn(q, one, None, one, activation=activation)
    function = ACTIVATIONS[activation].function
    values = [found.flatten(), *(function(x.to(dtype)) for dtype in (torch.float32, torch.float64))]
    slopes = [torch.autograd.grad(found.sum(), q)[0].flatten()]
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        slopes += torch.autograd.grad(function(leaf).sum(), leaf)
    for ours, plain, exact in (values, slopes):
        assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_an_infinite_weight_that_no_token_feels():
    """A ReLU's unit that is off for every token stays off, also after the last token."""
    q = torch.full((1, 3, 1, 2), -1.0)
    k = torch.tensor([[torch.inf, 1.0], [1.0, 2.0]]).view(1, 1, 2, 2)
    v = torch.ones(1, 1, 2, 2, requires_grad=True)
    out = multi_head_ffn(q, k, None, v, activation="relu")
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert out.count_nonzero() == 0
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("training", [False, True])
def test_memory_does_not_grow_with_tokens_times_units(tmp_path, training: bool):
    """What the allocator held at most is less than a single hidden activation of the call."""
    shape = SHAPE._replace(B=2, L=1024, H=4, d=8, G=4, E=4, f=64)
    tensors = make(shape, torch.float32, absent=BIASES)
    if training:
        tensors = leaves(tensors)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(multi_head_ffn, tensors) if training else multi_head_ffn(**tensors)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    held = list(itertools.accumulate(change for _, change in sorted(changes)))
    hidden = 4 * shape.B * shape.L * shape.H * shape.E * shape.f
    assert 0 < max(held) < (hidden if training else hidden / 2)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs the wider vectors, too")
@pytest.mark.parametrize("path", ["compiled"], indirect=True)
def test_narrower_vectors():
    """Half as wide, and half as many registers: other tiles, and other panels of tokens."""
    compiled._built.cache_clear()
    try:
        with inductor_config.patch({"cpp.simdlen": 256}):
            for shape in ("prime", "more than a block", "whole vectors"):
                assert_same(leaves(make(SHAPES[shape])), **SCALES)
    finally:
        compiled._built.cache_clear()


# Which of the two is taken.


@pytest.fixture
def choice(monkeypatch, threads) -> None:
    monkeypatch.undo()
    compiled._built.cache_clear()
    threads(2)
    yield
    compiled._built.cache_clear()


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("path", ["compiled"], indirect=True)
class TestChoice:
    def test_c_plus_plus(self):
        assert compiled.takes(torch.empty(1, 17, 1, 8), "silu")
        assert compiled.takes(torch.empty(1, 1, 2, 8), "silu")

    def test_fewer_tokens_than_give_each_thread_a_vector(self):
        assert not compiled.takes(torch.empty(1, 16, 1, 8), "silu")

    def test_an_activation_that_has_no_c_plus_plus(self):
        assert not compiled.takes(torch.empty(1, 64, 4, 8), "an activation of tomorrow")

    def test_every_activation_has(self):
        assert all(compiled.takes(torch.empty(1, 64, 4, 8), name) for name in ACTIVATIONS)

    def test_no_compiler(self, monkeypatch):
        """The result is the same, with one warning; the report says so, too."""

        def fail(source: str):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(compat, "load_cpp", fail)
        compat.counters.clear()
        tensors = leaves(make(SHAPE._replace(L=40)))
        with pytest.warns(RuntimeWarning, match="slower.*: no compiler$"):
            assert_same(tensors, **SCALES)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert_same(tensors, **SCALES)
        assert compat.counters["flashmhf"]["failures.cpp"] == 1
        assert _cpu_path().endswith("for want of C++: no compiler")
