"""The kernels' arithmetic, under Triton's interpreter on the CPU.

Triton decides at its import whether it interprets, so outside the interpreter this module holds
one test, which runs the others in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from support import families, problems
from support.problems import (
    BIASES,
    NAMES,
    Shape,
    Tensors,
    assert_as_exact,
    present,
    relative_error,
    spelled_at_once,
    step,
    stored_as,
)
from torch import Tensor

from mhf_compiler.lowering import multi_head_ffn_reference
from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.lowering.problem import Formula, NormedRouter, Problem

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

SCALES = {"k_scale": 1.3, "u_scale": 0.7, "out_scale": 0.9}


@pytest.mark.skipif(
    version("triton") < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6's interpreter needs a NumPy before 2.4",
)
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


test_under_the_interpreter.__test__ = not INTERPRETING  # type: ignore[attr-defined]


# Ragged against the tiles of 16 in every direction, and two heads to a group.
SHAPE = Shape(B=2, L=19, H=2, d=24, G=1, E=2, f=21)
SMALL = Shape(B=1, L=17, H=1, d=8, G=1, E=2, f=18)
SHAPES = [SMALL, SHAPE._replace(B=1, L=70, H=1, E=1, f=130), SHAPE._replace(L=1)]


def make(shape: Shape, dtype: torch.dtype = torch.float32, absent: tuple[str, ...] = ()) -> Tensors:
    tensors = problems.make(shape, dtype, absent, router_dtype=torch.float32)
    for name in ("k", "u"):
        if tensors[name] is not None:
            tensors[name] /= shape.d**0.5
    return tensors


def expected(tensors: Tensors, grad_out: Tensor, activation: str) -> list[Tensor]:
    """The output and the gradients of what is present, by autograd through the definition."""
    options = {"activation": activation, **SCALES}
    return step(multi_head_ffn_reference, tensors, grad_out, torch.float64, **options)


def actual(tensors: Tensors, grad_out: Tensor, activation: str, out: Tensor) -> list[Tensor]:
    from mhf_compiler.lowering.kernels import dispatch
    from mhf_compiler.lowering.ops import network

    inputs = [tensors[name] for name in NAMES]
    problem = Problem(*inputs, activation=activation, **SCALES)
    network.compute_forward(dispatch.forward, problem, out.fill_(float("nan")))
    gradients = problem.new_gradients([x is not None for x in inputs])
    network.compute_backward(dispatch.backward, problem, grad_out, gradients)
    grads = gradients.wanted
    for grad, x in zip(grads, (x for x in inputs if x is not None), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    return [out, *grads]


def check(
    tensors: Tensors,
    activation: str = "silu",
    grad_out: Tensor | None = None,
    out: Tensor | None = None,
    tolerance: float = 1e-6,
) -> None:
    q = tensors["q"]
    assert q is not None
    if grad_out is None:
        grad_out = torch.randn(q.shape).to(q.dtype)
    if out is None:
        out = torch.empty_like(q)
    names = ["out", *present(tensors)]
    exact = expected(tensors, grad_out, activation)
    for name, x, y in zip(names, actual(tensors, grad_out, activation, out), exact, strict=True):
        assert relative_error(x, y) < tolerance, name


@pytest.fixture(params=["descriptors", "pointers"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 x 16, of which even small problems have several, ragged ones among them.

    How a tile is loaded and what is computed of it meet in no branch. So where a test is about
    arithmetic, its cases are shared out between the two; every way to load has a complete one.
    """
    from mhf_compiler.lowering.kernels import dispatch
    from mhf_compiler.lowering.tiles import Tile

    descriptors = request.param == "descriptors"
    monkeypatch.setattr(
        dispatch, "portable", lambda *_, **__: Tile(16, 16, 4, 2, descriptors=descriptors)
    )


def loaded_by(names: str, cases: dict[str, list]) -> pytest.MarkDecorator:
    """The cases of each way to load."""
    pairs = [(tile, case) for tile, given in cases.items() for case in given]
    values = [(tile, *case) if "," in names else (tile, case) for tile, case in pairs]
    return pytest.mark.parametrize(f"tile, {names}", values, indirect=["tile"], ids=str)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel does not write is noticed."""
    empty_like = torch.empty_like

    def poisoned(x: Tensor, **options) -> Tensor:
        return empty_like(x, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned)


@pytest.fixture(autouse=True, scope="module")
def patched_once() -> Iterator[None]:
    """Functions that kernels call are called as Python's are.

    The interpreter goes through all of Triton's language at each such call, to put its own
    functions in place: a third of the time. A launch does so as well; what is left is the language
    as the modules of the functions see it, and that stays, so that once for each is enough.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        if INTERPRETING:
            from triton.runtime import interpreter

            done: set[str] = set()

            def call(function, *given, **named):
                if function.fn.__module__ not in done:
                    done.add(function.fn.__module__)
                    interpreter._patch_lang(function.fn)
                return function.rewrite()(*given, **named)

            monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)

            # It makes integers of a condition on scalars, which Triton 3.9's takes for no mask.
            store = interpreter.InterpreterBuilder.create_masked_store

            def masked_store(self, pointers, value, mask, *rest):
                if isinstance(mask, interpreter.TensorHandle):  # of a descriptor it is an array
                    mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
                return store(self, pointers, value, mask, *rest)

            monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", masked_store)
        yield


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter keeps bfloat16 as its bits, and would multiply those."""
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen(operand):
        if operand.dtype.scalar.name != "bf16":
            return operand
        data = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def create_widened_dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_widened_dot)
    return None


def sum_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products of a loop are added to a sum each, as on Blackwell."""
    from mhf_compiler.lowering.kernels import launch

    monkeypatch.setattr(launch, "capability", lambda device: (10, 0))


@pytest.mark.usefixtures("tile")
class TestKernels:
    __test__ = INTERPRETING

    @loaded_by(
        "absent",
        {
            "descriptors": [(), ("u", "r", *BIASES), ("k_bias",)],
            "pointers": [(), ("r",), ("u", "u_bias"), BIASES, ("v_bias", "r")],
        },
    )
    def test_matches_the_definition(self, absent: tuple[str, ...]) -> None:
        check(make(SHAPE, absent=absent))

    def test_groups_of_heads(self) -> None:
        check(make(SHAPE._replace(B=1, H=4, G=2, E=3, f=8)))

    @loaded_by(
        "activation, absent",
        {
            "descriptors": [(name, ()) for name in ACTIVATIONS],
            "pointers": [(name, ("u", "u_bias")) for name in ACTIVATIONS],
        },
    )
    def test_activation(self, activation: str, absent: tuple[str, ...]) -> None:
        check(make(SMALL, absent=absent), activation)

    def test_what_u_scale_makes_small_fits_into_float16(self) -> None:
        """The product of both branches, 320 * 320, would not: `out_scale` comes too late."""
        from mhf_compiler.lowering.kernels import dispatch

        q = torch.full((1, 16, 1, 16), 5.0).half()
        k, v = torch.full((1, 1, 16, 16), 4.0).half(), torch.full((1, 1, 16, 16), 2**-4).half()
        out = torch.empty_like(q)
        for scale, fits in (("u_scale", True), ("out_scale", False)):
            dispatch.forward(Problem(q, k, k, v, activation="relu", **{scale: 1e-3}), out)
            assert bool(out.isfinite().all()) is fits
            if fits:
                torch.testing.assert_close(out, torch.full_like(out, 102.4), rtol=2e-3, atol=0)

    # In 16 bits, pointers to columns are those of tiles that are transposed once they are loaded.
    @pytest.mark.parametrize(
        ("hidden", "dtype"),
        [(21, torch.float32), (24, torch.float32), (21, torch.float16)],
        ids=["misaligned", "aligned", "float16"],
    )
    def test_weights_stored_by_columns(self, hidden: int, dtype: torch.dtype) -> None:
        tensors = make(SHAPE._replace(f=hidden), dtype, absent=BIASES)
        for name in ("k", "u", "v"):
            tensors[name] = stored_as(tensors[name], (0, 1, 3, 2))
        check(tensors, tolerance=1e-6 if dtype == torch.float32 else 2e-3)

    def test_packed_weights(self) -> None:
        tensors = make(SMALL)
        packed = torch.randn(1, 2, 2 * SMALL.f, SMALL.d)
        tensors["k"], tensors["u"] = packed.chunk(2, dim=2)
        check(tensors)

    # No descriptor takes the last one, whatever is asked for.
    @loaded_by(
        "order",
        {
            "descriptors": [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)],
            "pointers": [(2, 0, 1, 3), (0, 1, 3, 2)],
        },
    )
    def test_token_layouts(self, order: tuple[int, ...]) -> None:
        tensors = make(SHAPE)
        grad_out = stored_as(torch.randn(2, 19, 2, 24), order)
        for name in ("q", "r"):
            tensors[name] = stored_as(tensors[name], order)
        check(tensors, grad_out=grad_out, out=torch.empty_like(grad_out))

    def test_layouts_may_differ(self) -> None:
        tensors = make(SHAPE)
        tensors["q"] = stored_as(tensors["q"], (2, 1, 0, 3))
        tensors["r"] = stored_as(tensors["r"], (2, 3, 0, 1))
        check(tensors, grad_out=stored_as(torch.randn(2, 19, 2, 24), (0, 2, 1, 3)))

    @pytest.mark.parametrize("length", [1, 16])
    def test_router_with_contiguous_tokens(self, length: int) -> None:
        tensors = make(SHAPE._replace(L=length))
        tensors["r"] = stored_as(tensors["r"], (2, 3, 0, 1))
        check(tensors)

    def test_expanded_tensors(self) -> None:
        tensors = make(SMALL)
        tensors["q"] = torch.randn(1, 17, 1, 8).expand(2, 17, 2, 8)
        tensors["r"] = torch.rand(1, 1, 2, 1).expand(2, 17, 2, 2)
        tensors["v"] = torch.randn(1, 1, 18, 8).expand(1, 2, 18, 8)
        check(tensors, grad_out=torch.tensor(1.0).expand(2, 17, 2, 8))

    def test_other_memory_is_not_written(self) -> None:
        memory = torch.full((2, 21, 3, 28), 7.0)
        inner = (slice(None), slice(1, 20), slice(0, 2), slice(0, 24))
        check(make(SHAPE), out=memory[inner])
        memory[inner] = 7.0
        assert memory.eq(7.0).all()

    @loaded_by(
        "head_dim, hidden",
        {"descriptors": [(16, 16), (33, 1)], "pointers": [(1, 1), (5, 33), (33, 1)]},
    )
    def test_any_width(self, head_dim: int, hidden: int) -> None:
        check(make(SHAPE._replace(B=1, L=3, H=1, d=head_dim, G=1, E=2, f=hidden)))

    @loaded_by(
        "dtype, apart",
        {
            "descriptors": [(torch.float16, False), (torch.bfloat16, True)],
            "pointers": [(torch.float16, True), (torch.bfloat16, False)],
        },
    )
    @pytest.mark.usefixtures("bfloat16_products")
    def test_half_precision(
        self, dtype: torch.dtype, apart: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if apart:
            sum_apart(monkeypatch)
        tensors = make(SHAPE._replace(H=2, G=2), dtype, absent=("v_bias",))
        grad_out = torch.randn(2, 19, 2, 24).to(dtype)
        exact = expected(tensors, grad_out, "silu")
        usual = step(spelled_at_once, tensors, grad_out, **SCALES)
        fused = actual(tensors, grad_out, "silu", torch.empty(2, 19, 2, 24, dtype=dtype))
        assert_as_exact(["out", *present(tensors)], fused, usual, exact)

    @pytest.mark.parametrize("tile", ["pointers"], indirect=True)
    def test_wider_output(self) -> None:
        tensors = make(SMALL, torch.float16)
        check(tensors, out=torch.empty(1, 17, 1, 8), tolerance=2e-3)
        grad_out = torch.randn(1, 17, 1, 8)
        check(tensors, grad_out=grad_out, tolerance=2e-3)

    @pytest.mark.parametrize("tile", ["descriptors"], indirect=True)
    def test_biases_in_float32(self) -> None:
        """Of a network in 16 bits: that of the output has the gradient's sum as exact as it is."""
        tensors = make(SMALL, torch.float16)
        tensors |= {name: make(SMALL)[name] for name in BIASES}
        grad_out = torch.randn(1, 17, 1, 8)
        exact = expected(tensors, grad_out, "silu")
        found = actual(tensors, grad_out, "silu", torch.empty(1, 17, 1, 8))
        for name, x, y in zip(["out", *NAMES], found, exact, strict=True):
            assert relative_error(x, y) < (1e-6 if name == "v_bias" else 2e-3), name

    @loaded_by("needed", {"descriptors": [0, 2, 4, 6], "pointers": [1, 3, 5, 7]})
    def test_single_gradients(self, needed: int) -> None:
        from mhf_compiler.lowering.kernels import dispatch

        tensors = make(SMALL)
        grad_out = torch.randn(1, 17, 1, 8)
        problem = Problem(*(tensors[name] for name in NAMES), activation="gelu", **SCALES)
        gradients = problem.new_gradients([i == needed for i in range(8)])
        dispatch.backward(problem, grad_out, gradients)
        (grad,) = gradients.wanted
        assert relative_error(grad, expected(tensors, grad_out, "gelu")[1 + needed]) < 1e-6

    @loaded_by(
        "routed, B, L, G",
        {
            "descriptors": [(False, 1, 149, 1), (True, 2, 70, 2)],
            "pointers": [(True, 1, 149, 1), (False, 2, 70, 2)],
        },
    )
    def test_parts_of_the_down_biass_gradient(self, routed: bool, B: int, L: int, G: int) -> None:
        """Tokens of a few sub-networks, which several programs share."""
        from mhf_compiler.lowering.kernels import dispatch
        from mhf_compiler.lowering.kernels.plain.backward import parts_of_bias

        steps = 2 // G * -(-B * L // 16)
        assert 1 < parts_of_bias(G * SMALL.E, steps) < steps
        shape = SMALL._replace(B=B, L=L, H=2, G=G)
        tensors = make(shape, absent=() if routed else ("r",))
        grad_out = torch.randn(B, L, 2, shape.d)
        problem = Problem(*(tensors[name] for name in NAMES), **SCALES)
        gradients = problem.new_gradients([name == "v_bias" for name in NAMES])
        dispatch.backward(problem, grad_out, gradients)
        *_, exact = expected(tensors, grad_out, "silu")
        (grad,) = gradients.wanted
        assert relative_error(grad, exact) < 1e-6

    @loaded_by("sizes", {"descriptors": [(0, 5)], "pointers": [(5, 0)]})
    def test_no_tokens(self, sizes: tuple[int, int]) -> None:
        tensors = make(SHAPE._replace(B=sizes[0], L=sizes[1]))
        out = torch.empty(*sizes, 2, 24)
        results = actual(tensors, torch.empty(*sizes, 2, 24), "silu", out)
        assert all(x.eq(0).all() for x in results[1:])


def cut_in_turn(name: str, values: list[tuple[str, Any]]) -> pytest.MarkDecorator:
    """Cases of the one thing and of the other: what is cut meets each of them somewhere."""
    return pytest.mark.parametrize(f"cut, {name}", values, indirect=["cut"], ids=str)


# Heads wider than any tile, two to a group; hidden units ragged against tiles of 32.
WIDE = SHAPE._replace(H=4, d=264, G=2, f=37)


class TestBatchedProducts:
    """PyTorch's products of wide heads, and the kernels between them."""

    __test__ = INTERPRETING

    ABSENT = (
        (),
        ("r",),
        ("u", "u_bias"),
        ("u", "r", *BIASES),
        ("k_bias", "v_bias"),
        ("v_bias", "r"),
    )

    @pytest.fixture(params=["at once", "groups", "rows"])
    def cut(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        """All groups of heads at once, one after the other, or their rows in pieces."""
        if request.param == "groups":
            families.cut_into_groups(monkeypatch)
        if request.param == "rows":
            families.cut_into_rows(monkeypatch, fewest=32)
        return request.param

    @pytest.mark.parametrize("absent", ABSENT, ids=str)
    def test_matches_the_definition(self, absent: tuple[str, ...]) -> None:
        check(make(WIDE, absent=absent), "gelu")

    def test_cut_into_chunks(self, cut: str) -> None:
        from mhf_compiler.lowering.kernels.batched import passes

        tensors = make(WIDE)
        sizes = Problem(*(tensors[name] for name in NAMES)).sizes
        expected = {"at once": (2, 76), "groups": (1, 76), "rows": (1, 32)}[cut]
        for kernel in ("forward", "backward"):
            assert passes.batched_chunk(kernel, sizes)[:2] == expected
        check(tensors, "gelu_tanh")

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activation(self, activation: str) -> None:
        check(make(WIDE._replace(B=1, H=1, G=1, f=18)), activation)

    @pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)])
    def test_token_layouts(self, order: tuple[int, ...]) -> None:
        tensors = make(WIDE)
        grad_out = stored_as(torch.randn(2, 19, 4, 264), order)
        for name in ("q", "r"):
            tensors[name] = stored_as(tensors[name], order)
        check(tensors, grad_out=grad_out, out=torch.empty_like(grad_out))

    def test_layouts_may_differ(self) -> None:
        tensors = make(WIDE)
        tensors["q"] = stored_as(tensors["q"], (2, 1, 0, 3))
        tensors["r"] = stored_as(tensors["r"], (2, 3, 0, 1))
        check(tensors, grad_out=stored_as(torch.randn(2, 19, 4, 264), (0, 2, 1, 3)))

    @cut_in_turn("networks", [("at once", 2), ("groups", 1), ("rows", 2)])
    def test_weights_stored_by_columns(self, networks: int, cut: str) -> None:
        tensors = make(WIDE._replace(E=networks))
        for name in ("k", "u", "v"):
            tensors[name] = stored_as(tensors[name], (0, 1, 3, 2))
        check(tensors)

    def test_packed_weights(self) -> None:
        tensors = make(WIDE)
        tensors["k"], tensors["u"] = torch.randn(2, 2, 2 * WIDE.f, WIDE.d).div(16).chunk(2, dim=2)
        check(tensors)

    def test_expanded_tensors(self) -> None:
        tensors = make(WIDE)
        tensors["q"] = torch.randn(1, 19, 1, 264).expand(2, 19, 4, 264)
        tensors["r"] = torch.rand(1, 1, 4, 1).expand(2, 19, 4, 2)
        tensors["v"] = torch.randn(1, 1, 37, 264).expand(2, 2, 37, 264)
        check(tensors, grad_out=torch.tensor(1.0).expand(2, 19, 4, 264))

    def test_other_memory_is_not_written(self) -> None:
        memory = torch.full((2, 21, 5, 270), 7.0)
        inner = (slice(None), slice(1, 20), slice(0, 4), slice(0, 264))
        check(make(WIDE), out=memory[inner])
        memory[inner] = 7.0
        assert memory.eq(7.0).all()

    @cut_in_turn(
        "dtype",
        [("at once", torch.bfloat16), ("groups", torch.float16), ("rows", torch.bfloat16)],
    )
    def test_half_precision(self, dtype: torch.dtype, cut: str) -> None:
        tensors = problems.make(WIDE, dtype, router_dtype=torch.float32, scaled=True)
        grad_out = torch.randn(2, 19, 4, 264).to(dtype)
        exact = expected(tensors, grad_out, "silu")
        usual = step(spelled_at_once, tensors, grad_out, **SCALES)
        fused = actual(tensors, grad_out, "silu", torch.empty_like(grad_out))
        assert_as_exact(["out", *present(tensors)], fused, usual, exact)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_routers_of_another_dtype(self, dtype: torch.dtype) -> None:
        tensors = make(WIDE)
        assert tensors["r"] is not None
        tensors["r"] = tensors["r"].to(dtype)
        check(tensors, tolerance=1e-6 if dtype == torch.float64 else 1e-3)

    @pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
    def test_an_output_of_another_dtype_is_rounded_once(self, wide: torch.dtype) -> None:
        tensors = problems.make(WIDE, torch.float16, ("v_bias",), scaled=True)
        grad_out = torch.randn(2, 19, 4, 264).to(wide)
        out = torch.empty(2, 19, 4, 264, dtype=wide)
        exact = expected(tensors, grad_out, "silu")
        actual(tensors, grad_out, "silu", out)
        narrow = torch.empty_like(out, dtype=torch.float16)
        actual(tensors, grad_out, "silu", narrow)
        # Of the hidden units' rounding alone, or of the result's.
        error = relative_error(out, exact[0])
        assert error < (4e-4 if wide == torch.float32 else 4e-3)
        assert error < relative_error(narrow, exact[0]) or wide == torch.bfloat16

    @pytest.mark.parametrize(
        ("needed", "products"),
        [*zip(NAMES, (5, 4, 3, 3, 4, 3, 2, 0), strict=True)],
    )
    def test_single_gradients(
        self, needed: str, products: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By no other products than it needs."""
        from mhf_compiler.lowering.kernels import dispatch
        from mhf_compiler.lowering.kernels.batched import passes

        calls = []
        multiply = passes.multiply

        def counted(*tensors: Tensor, **scales: float) -> None:
            calls.append(scales)
            multiply(*tensors, **scales)

        monkeypatch.setattr(passes, "multiply", counted)
        tensors = make(WIDE)
        grad_out = torch.randn(2, 19, 4, 264)
        problem = Problem(*(tensors[name] for name in NAMES), activation="gelu", **SCALES)
        gradients = problem.new_gradients([name == needed for name in NAMES])
        dispatch.backward(problem, grad_out, gradients)
        (grad,) = gradients.wanted
        exact = expected(tensors, grad_out, "gelu")[1 + NAMES.index(needed)]
        assert relative_error(grad, exact) < 1e-6
        assert len(calls) == products

    @pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
    def test_no_tokens(self, sizes: tuple[int, int]) -> None:
        tensors = make(WIDE._replace(B=sizes[0], L=sizes[1]))
        out = torch.empty(*sizes, 4, 264)
        results = actual(tensors, torch.empty(*sizes, 4, 264), "silu", out)
        assert all(x.eq(0).all() for x in results[1:])

    @cut_in_turn(
        "order",
        [
            *(("at once", order) for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2))),
            *(("groups", order) for order in ((0, 1, 2, 3), (2, 0, 1, 3))),
            *(("rows", order) for order in ((0, 2, 1, 3), (0, 1, 3, 2))),
        ],
    )
    def test_results_over_what_they_are_computed_from(
        self, order: tuple[int, ...], cut: str
    ) -> None:
        overwriting = TestOverwriting()
        overwriting.check_forward(make(WIDE), order)
        overwriting.check_backward(make(WIDE), order)

    def test_nothing_is_recorded_by_autograd(self) -> None:
        """The overload of compiled graphs reaches the kernels with gradients enabled."""
        from mhf_compiler.lowering.kernels import dispatch

        tensors = make(WIDE)
        for x in tensors.values():
            if x is not None:
                x.requires_grad_()
        problem = Problem(*(tensors[name] for name in NAMES), **SCALES)
        out = torch.empty(2, 19, 4, 264)
        dispatch.forward(problem, out)
        assert not out.requires_grad
        gradients = problem.new_gradients([True] * 8)
        dispatch.backward(problem, torch.ones_like(out), gradients)
        assert not any(x.requires_grad for x in gradients.wanted)
        out.mul_(2)  # no tensor of inference mode
        (out * torch.ones((), requires_grad=True)).sum().backward()

    def test_in_inference_mode(self) -> None:
        with torch.inference_mode():
            tensors = make(WIDE)
            assert tensors["q"] is not None
            problem = Problem(*(tensors[name] for name in NAMES), **SCALES)
            out = torch.full_like(tensors["q"], float("nan"))
        from mhf_compiler.lowering.kernels import dispatch

        dispatch.forward(problem, out)
        assert out.isfinite().all()


class TestParts:
    """Tiles whose hidden units are cut among several programs."""

    __test__ = INTERPRETING

    @pytest.mark.parametrize(
        ("parts", "absent"), [(2, ()), (3, ("u", "u_bias", "r")), (100, ())], ids=str
    )
    def test_forward(
        self, parts: int, absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mhf_compiler.lowering.kernels import dispatch
        from mhf_compiler.lowering.tiles import Tile

        tile = Tile(16, 16, 4, 2, descriptors=True, parts=parts)
        monkeypatch.setattr(dispatch, "portable", lambda *_, **__: tile)
        tensors = make(SHAPE, absent=absent)
        out = torch.full((2, 19, 2, 24), float("nan"))
        dispatch.forward(Problem(*(tensors[name] for name in NAMES), **SCALES), out)
        grad_out = torch.zeros_like(out)
        assert relative_error(out, expected(tensors, grad_out, "silu")[0]) < 1e-6

    # Rows of 24 are whole shares of what a program of the sum adds; rows of 9 are not.
    @pytest.mark.parametrize(("tokens", "d"), [(1, 9), (5, 24), (16, 24), (35, 9)])
    def test_one_head(self, tokens: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its 66 tiles of hidden units go to as many programs."""
        from mhf_compiler.lowering.kernels import dispatch
        from mhf_compiler.lowering.tiles import Tile

        tile = Tile(16, 16, 4, 2, descriptors=True, parts=128)
        monkeypatch.setattr(dispatch, "portable", lambda *_, **__: tile)
        empty = torch.empty
        monkeypatch.setattr(
            torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(float("nan"))
        )
        tensors = make(SHAPE._replace(B=1, L=tokens, H=1, d=d, G=1, E=22, f=40))
        out = torch.full((1, tokens, 1, d), float("nan"))
        dispatch.forward(Problem(*(tensors[name] for name in NAMES), **SCALES), out)
        assert relative_error(out, expected(tensors, out, "silu")[0]) < 1e-6

    # The kernel steps over the whole tiles, and over parts, each by itself.
    @pytest.mark.parametrize(("whole", "parts"), [(0, 11), (1, 2), (1, 128), (3, 300)])
    def test_only_cut_tiles_are_written(self, whole: int, parts: int) -> None:
        """Up to more parts than are loaded at once, of the tiles of two heads of 40 tokens."""
        from mhf_compiler.lowering.kernels.operands import token_axes
        from mhf_compiler.lowering.kernels.splitting import Split, add_parts

        out = torch.full((1, 40, 2, 24), float("nan"))
        split, tiles = Split(whole, parts), 6
        partial = split.workspace(tiles, 16, out)
        assert partial is not None
        partial.normal_()
        of_tiles = partial.view(tiles - whole, parts, 16, 24)
        of_tiles[2 - whole % 3 :: 3, :, 8:] = float("nan")  # beyond the last token
        add_parts(partial, out, token_axes(out), split, tiles, 0.5)
        sums = 0.5 * of_tiles.sum(1)
        exact = torch.full((tiles, 16, 24), float("nan"))
        exact[whole:] = sums
        exact = exact.view(2, 48, 24)[:, :40].transpose(0, 1)
        torch.testing.assert_close(out[0], exact, equal_nan=True)


class TestOverwriting:
    """Results in the memory of what they are computed from: the same bits as elsewhere."""

    __test__ = INTERPRETING

    ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2))

    @pytest.mark.usefixtures("tile")
    @loaded_by("order", {"descriptors": [*ORDERS], "pointers": [ORDERS[0], ORDERS[2]]})
    def test_forward(self, order: tuple[int, ...]) -> None:
        self.check_forward(make(SHAPE), order)

    @pytest.mark.parametrize(("parts", "order"), [(2, ORDERS[1]), (100, ORDERS[0])], ids=str)
    def test_parts(
        self, order: tuple[int, ...], parts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mhf_compiler.lowering.kernels import dispatch
        from mhf_compiler.lowering.tiles import Tile

        tile = Tile(16, 16, 4, 2, descriptors=True, parts=parts)
        monkeypatch.setattr(dispatch, "portable", lambda *_, **__: tile)
        self.check_forward(make(SHAPE), order)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_chosen_tiles(self, shape: Shape) -> None:
        self.check_forward(make(shape), (0, 1, 2, 3))
        self.check_backward(make(shape), (0, 1, 2, 3))

    @pytest.mark.usefixtures("tile")
    @loaded_by(
        "order, absent",
        {
            "descriptors": [*((order, ()) for order in ORDERS), (ORDERS[0], ("u", "u_bias"))],
            "pointers": [(ORDERS[0], ()), (ORDERS[2], ()), (ORDERS[0], ("r",))],
        },
    )
    def test_backward(self, order: tuple[int, ...], absent: tuple[str, ...]) -> None:
        self.check_backward(make(SHAPE, absent=absent), order)

    def check_forward(self, tensors: Tensors, order: tuple[int, ...]) -> None:
        from mhf_compiler.lowering.kernels import dispatch

        q = tensors["q"] = stored_as(tensors["q"], order)
        problem = Problem(*(tensors[name] for name in NAMES), **SCALES)
        out = torch.full_like(q, float("nan"))
        dispatch.forward(problem, out)
        dispatch.forward(problem, q.detach())
        assert q.equal(out)

    def check_backward(self, tensors: Tensors, order: tuple[int, ...]) -> None:
        from mhf_compiler.lowering.kernels import dispatch

        q = tensors["q"] = stored_as(tensors["q"], order)
        inputs = [tensors[name] for name in NAMES]
        problem = Problem(*inputs, **SCALES)
        grad_out = stored_as(torch.randn(q.shape), order)
        needs = [x is not None for x in inputs]
        elsewhere = problem.new_gradients(needs)
        dispatch.backward(problem, grad_out, elsewhere)
        found = problem.new_gradients(needs, q=grad_out.detach())
        dispatch.backward(problem, grad_out, found)
        assert found.q.data_ptr() == grad_out.data_ptr()
        for x, y in zip(found.wanted, elsewhere.wanted, strict=True):
            assert x.equal(y)


class TestChosenTiles:
    __test__ = INTERPRETING

    @pytest.mark.parametrize("shape", SHAPES)
    def test_chosen_tiles(self, shape: Shape) -> None:
        check(make(shape))


@pytest.fixture
def comparing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels are compared as on a card; those that passed are listed."""
    from mhf_compiler.lowering.kernels import verdicts

    passed: list[str] = []
    agree = verdicts._judge

    def judge(claim, *rest):
        right = agree(claim, *rest)
        passed.extend([claim.kernel] * right)
        return right

    monkeypatch.setattr(verdicts, "_compares", lambda device: True)
    monkeypatch.setattr(verdicts, "_path", lambda claim: None)
    monkeypatch.setattr(verdicts, "_judge", judge)
    # Of what could not be compared.
    monkeypatch.setattr(verdicts.log, "warning", lambda text, *rest: pytest.fail(text % rest))
    verdicts.forget()
    yield passed
    verdicts.forget()


@pytest.mark.usefixtures("bfloat16_products")
class TestComparisons:
    """Each kernel passes its own before a first launch, and a wrong one does not."""

    __test__ = INTERPRETING

    @loaded_by(
        "dtype, absent",
        {
            "descriptors": [(torch.float16, ())],
            "pointers": [(torch.bfloat16, ("u", "u_bias", "r")), (torch.float32, ())],
        },
    )
    @pytest.mark.usefixtures("tile")
    def test_network(
        self, dtype: torch.dtype, absent: tuple[str, ...], comparing: list[str]
    ) -> None:
        tensors = make(SHAPE, dtype, absent)
        tensors["v"] = stored_as(tensors["v"], (0, 1, 3, 2))
        grad_out = torch.randn(2, 19, 2, 24).to(dtype)
        actual(tensors, grad_out, "gelu", torch.empty(2, 19, 2, 24, dtype=dtype))
        assert comparing == ["forward", "dv", "dk_du", "dq"]

    @pytest.mark.parametrize("tile", ["descriptors"], indirect=True)
    @pytest.mark.usefixtures("tile")
    def test_one_wrong_tile_is_noticed(
        self, comparing: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mhf_compiler.lowering.kernels import dispatch
        from mhf_compiler.lowering.kernels.verdicts import WrongKernelError

        run_dq = dispatch.run_dq

        def wrong(problem, grad_out, gradients, tile):
            run_dq(problem, grad_out, gradients, tile)
            gradients.q[:, :16].mul_(0.5)

        monkeypatch.setattr(dispatch, "run_dq", wrong)
        tensors = make(SMALL, torch.float16)
        problem = Problem(*(tensors[name] for name in NAMES), **SCALES)
        gradients = problem.new_gradients([True, *[False] * 7])
        with (
            pytest.warns(RuntimeWarning, match="'dq' does not compute"),
            pytest.raises(WrongKernelError),
        ):
            dispatch.backward(problem, torch.randn(1, 17, 1, 8).half(), gradients)
        assert not comparing

    @pytest.mark.parametrize(
        ("dtype", "weights"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
    )
    def test_router(self, dtype: torch.dtype, weights: torch.dtype, comparing: list[str]) -> None:
        from mhf_compiler.lowering.kernels.plain import norm_router, router

        q, weight = torch.randn(1, 9, 2, 8).to(dtype), torch.randn(2, 8, 3).to(weights)
        grad = torch.randn(1, 9, 2, 3)
        out = torch.empty_like(grad)
        router.forward(q, weight, out)
        router.backward(grad, q, weight, [True, False])
        router.backward_onto(q.clone(), grad, q, weight, True)
        formula = Formula(1e-6, False, "normalised", 0.0, 0.0, dtype)
        normed = NormedRouter(torch.rand(8), weight, formula)
        norm_router.norm_and_route(q, normed, torch.empty(1, 9, 2, 3, dtype=dtype))
        assert comparing == ["router", "router backward", "router backward", "norm and route"]


class TestSums:
    """What float32 loses of each addition is added with the next product."""

    __test__ = INTERPRETING

    def test_many_small_products_are_not_lost(self) -> None:
        import triton
        import triton.language as tl

        from mhf_compiler.lowering.kernels.plain.sums import add_product, no_carry

        @triton.jit
        def kernel(x, y, add_product: tl.constexpr, no_carry: tl.constexpr):
            at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
            unit, small = tl.load(x + at), tl.load(x + 256 + at)
            total, carry = unit, no_carry(16, 16, True)
            for _ in tl.range(0, 256):
                total, carry = add_product(total, carry, unit, small, True, "ieee")
            tl.store(y + at, total)

        unit = torch.eye(16)
        y = torch.empty(16, 16)
        kernel[(1,)](torch.stack([unit, 2.0**-26 * unit]), y, add_product, no_carry)
        assert torch.equal(y, (1 + 2.0**-18) * unit)


class TestActivations:
    """By themselves, in float32, where nothing is rounded to 16 bits afterwards."""

    __test__ = INTERPRETING

    @staticmethod
    def run(function: Any, x: Tensor, name: str, approximate: bool) -> list[Tensor]:
        """What a function of the kernels computes: one result or two."""
        import triton
        import triton.language as tl

        results = [torch.empty_like(x) for _ in range(2)]

        @triton.jit
        def kernel(x, y, slope, f: tl.constexpr, NAME: tl.constexpr, APPROXIMATE: tl.constexpr,
                   BOTH: tl.constexpr):  # fmt: skip
            i = tl.arange(0, 2048)
            if BOTH:
                value, other = f(tl.load(x + i), NAME, APPROXIMATE)
                tl.store(slope + i, other)
            else:
                value = f(tl.load(x + i), NAME, APPROXIMATE)
            tl.store(y + i, value)

        kernel[(1,)](x, *results, function, name, approximate, "slope" in function.__name__)
        return results

    @pytest.mark.parametrize("approximate", [False, True])
    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_values_and_slopes(self, name: str, approximate: bool) -> None:
        """The interpreter's tanh is exact, so that only gelu's polynomial errs."""
        from mhf_compiler.lowering.kernels import activations

        x = torch.linspace(-9.5, 9.5, 2048)
        exact = x.double().requires_grad_()
        value = ACTIVATIONS[name].function(exact)
        (slope,) = torch.autograd.grad(value.sum(), exact)
        errs = name == "gelu" and approximate
        (alone, _) = self.run(activations.activate, x, name, approximate)
        both = self.run(activations.activate_with_slope, x, name, approximate)
        assert (alone - value).abs().max() < (2.7e-5 if errs else 1e-5 if name == "relu2" else 3e-6)
        assert both[0].sub(value).abs().max() < (2.7e-5 if errs else 1e-5)
        assert both[1].sub(slope).abs().max() < (1.2e-4 if errs else 3e-6)

    @pytest.mark.parametrize("approximate", [False, True])
    @pytest.mark.parametrize("name", ["silu", "gelu"])
    def test_of_halves(self, name: str, approximate: bool) -> None:
        from mhf_compiler.lowering.kernels import activations

        x = torch.linspace(-9.5, 9.5, 2048)
        (found, _) = self.run(activations.activate_twice, x / 2, name, approximate)
        error = (found - ACTIVATIONS[name].function(x.double())).abs().max()
        assert error < (2.7e-5 if name == "gelu" else 3e-6)

    def test_gelu_of_large_arguments(self) -> None:
        """Its polynomial ends where it would turn round."""
        from mhf_compiler.lowering.kernels import activations

        x = torch.linspace(8, 40, 1024)
        x = torch.cat([-x, x])
        for function, argument in ((activations.activate, x), (activations.activate_twice, x / 2)):
            (found, _) = self.run(function, argument, "gelu", True)
            assert (found - x.clamp(min=0)).abs().max() < 1e-5

    def test_tanh_errs_to_neither_side(self) -> None:
        """Near zero a series takes over: where it ends, it errs by less than float32 rounds."""
        from mhf_compiler.lowering.kernels.activations import activate

        x = torch.linspace(0.23, 0.2499, 2048)
        (y, _) = self.run(activate, x, "tanh", False)
        exact = x.double().tanh()
        error = (y - exact) / exact
        assert error.abs().max() < 4e-7
        assert error.mean().abs() < 5e-8


@pytest.mark.usefixtures("bfloat16_products", "poison")
class TestRouterProduct:
    """Every number is cut into parts that fit bfloat16; what is lost is what float32 loses."""

    __test__ = INTERPRETING

    # Every pair of two of the three.
    @pytest.mark.parametrize(
        ("dtype", "weights", "groups", "apart"),
        [
            (torch.bfloat16, torch.float32, 1, True),
            (torch.bfloat16, torch.bfloat16, 2, False),
            (torch.bfloat16, torch.float16, 1, False),
            (torch.float16, torch.float32, 2, True),
            (torch.float16, torch.bfloat16, 1, True),
            (torch.float16, torch.float16, 2, False),
        ],
        ids=str,
    )
    def test_matches_the_definition(
        self,
        dtype: torch.dtype,
        weights: torch.dtype,
        groups: int,
        apart: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from mhf_compiler.lowering.kernels.plain import router

        if apart:
            sum_apart(monkeypatch)
        torch.manual_seed(0)
        q = torch.randn(2, 70, 2, 24).to(dtype)
        weight = torch.randn(groups, 24, 5).to(weights)
        grad = torch.randn(2, 70, 2, 5)
        out = torch.full((2, 2, 70, 5), float("nan")).transpose(1, 2)  # by heads
        router.forward(q, weight, out)
        dq, dw = router.backward(grad, q, weight, [True, True])

        wide = [q.double().requires_grad_(), weight.double().requires_grad_()]
        exact = torch.einsum("blhd,hde->blhe", wide[0], wide[1].repeat_interleave(2 // groups, 0))
        exact_dq, exact_dw = torch.autograd.grad(exact, wide, grad.double())
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        # The interpreter cuts where a GPU rounds to bfloat16: one unit instead of half of one.
        unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
        assert (dq.double() - exact_dq).abs().max() <= unit * exact_dq.abs().max()
        rounded = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[weights]
        assert (dw.double() - exact_dw).abs().max() <= rounded * exact_dw.abs().max()

    @pytest.mark.parametrize("d", [64, 96])
    def test_columns_are_divided_between_programs(self, d: int) -> None:
        """One program for 64 of them; sequences do not follow each other."""
        from mhf_compiler.lowering.kernels.plain import router

        torch.manual_seed(0)
        q, weight = torch.randn(2, 75, 2, d)[:, :70].half(), torch.randn(2, d, 3)
        grad = torch.randn(2, 75, 2, 3)[:, :70]
        dq, dw = router.backward(grad, q, weight, [True, True])
        exact_dq = torch.einsum("blhe,hde->blhd", grad.double(), weight.double())
        exact_dw = torch.einsum("blhe,blhd->hde", grad.double(), q.double())
        assert (dq.double() - exact_dq).abs().max() <= 2.0**-10 * exact_dq.abs().max()
        assert (dw.double() - exact_dw).abs().max() <= 1e-6 * exact_dw.abs().max()

    @pytest.mark.parametrize("needs", [[True, False], [False, True]], ids=str)
    def test_one_gradient_alone(self, needs: list[bool]) -> None:
        from mhf_compiler.lowering.kernels.plain import router

        q, weight = torch.randn(1, 9, 2, 8).half(), torch.randn(2, 8, 3)
        grad = torch.randn(1, 9, 2, 3)
        both = router.backward(grad, q, weight, [True, True])
        (one,) = router.backward(grad, q, weight, needs)
        assert torch.equal(one, both[needs.index(True)])

    @pytest.mark.parametrize("needs_weight", [False, True])
    def test_a_gradient_is_added_to_what_is_there(self, needs_weight: bool) -> None:
        from mhf_compiler.lowering.kernels.plain import router

        torch.manual_seed(0)
        q, weight = torch.randn(2, 70, 2, 24).half(), torch.randn(2, 24, 3)
        grad, there = torch.randn(2, 70, 2, 3), torch.randn(2, 70, 2, 24).half()
        alone, dw = router.backward(grad, q, weight, [True, True])
        onto = there.clone()
        found = router.backward_onto(onto, grad, q, weight, needs_weight)
        # Alone, the part was rounded before it could be added.
        torch.testing.assert_close(onto, there + alone, rtol=2e-3, atol=2e-3)
        assert found is not None and found.equal(dw) if needs_weight else found is None


@pytest.mark.usefixtures("poison")
class TestCutRouter:
    """The parts of a router's weights, which make them again, and zeros around them."""

    __test__ = INTERPRETING

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [5, 64, 96])
    def test_parts(self, head_dim: int, dtype: torch.dtype) -> None:
        from mhf_compiler.lowering.kernels.plain.router import cut_router, parts_of

        torch.manual_seed(0)
        weight = torch.randn(3, 5, head_dim).to(dtype).transpose(1, 2)
        parts = cut_router(weight).unflatten(1, (parts_of(dtype), 32))  # (G, parts, E, d)
        assert parts.dtype == torch.bfloat16
        # The interpreter cuts where a GPU rounds to bfloat16: a bit is lost with each part.
        unit = {torch.float32: 2.0**-21, torch.bfloat16: 0.0, torch.float16: 0.0}[dtype]
        made = parts.double().sum(1)[:, :5, :head_dim].transpose(1, 2)
        torch.testing.assert_close(made, weight.double(), rtol=unit, atol=0.0)
        assert parts[:, :, 5:].eq(0).all()
        assert parts[..., head_dim:].eq(0).all()


@pytest.mark.usefixtures("bfloat16_products", "poison")
class TestNormedForward:
    """Where there is no kernel that does all of it, two follow each other in the same memory."""

    __test__ = INTERPRETING

    def test_matches_the_operator(self) -> None:
        from mhf_compiler.lowering.kernels import dispatch
        from mhf_compiler.lowering.ops import norm_network

        torch.manual_seed(0)
        q, scale, router = torch.randn(2, 9, 2, 16).half(), torch.rand(16), torch.randn(2, 16, 3)
        weights = [torch.randn(2, 3, 24, 16).half() / 4 for _ in range(3)]
        constants = (1e-6, True, "normalised", 0.5, 0.25, torch.float32, "silu", 1.0, 0.5, 2.0)
        expected, found = q.clone(), q.clone()
        op = torch.ops.mhf_compiler.normed_multi_head_ffn_over_query
        op(expected, scale, router, *weights, *constants)
        compute = dispatch.normed_forward
        norm_network._normed_forward(compute, found, scale, router, *weights, *constants)
        torch.testing.assert_close(found, expected, rtol=2.0**-8, atol=2e-3)


@pytest.mark.usefixtures("bfloat16_products", "poison")
class TestNormAndRoute:
    """The norm rounds once or twice; the weights are those of the queries that were written."""

    __test__ = INTERPRETING

    def check(
        self,
        q: Tensor,
        norm_weight: Tensor | None,
        weight: Tensor,
        r: Tensor,
        routing: str = "normalised",
        rounds_first: bool = False,
        sum_floor: float = 1e-20,
        sum_eps: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        from mhf_compiler.lowering.kernels.plain import norm_router

        exact = problems.normed(q, norm_weight, norm_eps)
        formula = Formula(norm_eps, rounds_first, routing, sum_floor, sum_eps, r.dtype)
        norm_router.norm_and_route(q, NormedRouter(norm_weight, weight, formula), r)
        # The interpreter cuts where a GPU rounds to bfloat16: one unit instead of half of one.
        unit = 2.0**-7 if q.dtype == torch.bfloat16 else 2.0**-10
        allowed = unit * (3 if rounds_first else 1)
        torch.testing.assert_close(q.double(), exact, rtol=allowed, atol=1e-6)
        expected = problems.routed(q, weight, routing, sum_floor, sum_eps)
        rounded = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[r.dtype]
        torch.testing.assert_close(r.double(), expected, rtol=rounded, atol=1e-5)

    # Every pair of two of the three, the widest heads in every combination.
    @pytest.mark.parametrize(
        ("dtype", "weights", "head_dim"),
        [
            *((torch.bfloat16, torch.float32, d) for d in (5, 64, 128)),
            *((torch.bfloat16, torch.bfloat16, d) for d in (24, 96, 128)),
            *((torch.float16, torch.float32, d) for d in (24, 96, 128)),
            *((torch.float16, torch.bfloat16, d) for d in (5, 64, 128)),
        ],
        ids=str,
    )
    def test_matches_the_definition(
        self, dtype: torch.dtype, weights: torch.dtype, head_dim: int
    ) -> None:
        torch.manual_seed(0)
        q = 3 * torch.randn(2, 70, 2, head_dim)
        r = torch.full((2, 5, 2, 70), float("nan")).permute(2, 3, 0, 1).to(dtype)
        weight = torch.randn(2, head_dim, 5) / head_dim**0.5
        self.check(q.to(dtype), torch.rand(head_dim).to(weights), weight.to(weights), r)

    def test_a_norms_weight_may_be_a_column(self) -> None:
        torch.manual_seed(0)
        q, weight = torch.randn(1, 9, 2, 24).half(), torch.randn(2, 24, 5)
        self.check(q, torch.rand(24, 3)[:, 1], weight, torch.empty(1, 9, 2, 5))

    @pytest.mark.parametrize("processors", [1, 2])
    def test_a_program_goes_on_to_further_tokens(
        self, processors: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mhf_compiler.lowering.kernels.plain import norm_router

        monkeypatch.setattr(norm_router, "multiprocessors", lambda device: processors)
        torch.manual_seed(0)
        q, weight = torch.randn(2, 170, 3, 24).bfloat16(), torch.randn(3, 24, 5)
        self.check(q, torch.rand(24), weight, torch.full((2, 170, 3, 5), float("nan")))

    def test_the_operator_runs_the_kernel(self) -> None:
        """As on a GPU: it passes on what it is given, in the order of the kernel's parameters."""
        from mhf_compiler.lowering.kernels.plain import norm_router as kernels
        from mhf_compiler.lowering.ops import norm_router

        torch.manual_seed(0)
        q, scale, weight = torch.randn(1, 9, 2, 8).half(), torch.rand(8), torch.randn(2, 8, 3)
        constants = (1e-6, True, "normalised", 0.5, 0.25, torch.bfloat16, [2, 3, 0, 1])
        expected_q = q.clone()
        expected = torch.ops.mhf_compiler.norm_and_route(expected_q, scale, weight, *constants)
        r = norm_router._norm_and_route(kernels.norm_and_route, q, scale, weight, *constants)
        assert r.dtype is expected.dtype
        assert r.stride() == expected.stride()
        torch.testing.assert_close(q, expected_q, rtol=2.0**-9, atol=1e-6)
        torch.testing.assert_close(r, expected, rtol=2.0**-7, atol=1e-3)

    # A norm's weight meets the routing nowhere, but the order of rounding and the epsilon.
    @pytest.mark.parametrize(
        ("scaled", "options"),
        [
            ("not at all", {"routing": "none"}),
            ("by heads", {"routing": "sigmoid"}),
            ("alike", {"sum_floor": 0.0, "sum_eps": 0.5}),
            ("by heads", {"sum_floor": 2.0}),
            ("not at all", {"norm_eps": 0.25}),
            ("by heads", {"norm_eps": 0.25}),
            ("not at all", {"rounds_first": True}),
            ("alike", {"rounds_first": True}),
            ("by heads", {"rounds_first": True}),
        ],
        ids=str,
    )
    def test_other_formulas(self, scaled: str, options: dict) -> None:
        torch.manual_seed(0)
        q, weight = torch.randn(1, 33, 4, 8).bfloat16(), torch.randn(2, 8, 17)
        scale = {"not at all": None, "alike": torch.rand(8), "by heads": torch.rand(4, 8)}[scaled]
        self.check(q, scale, weight, torch.full((1, 33, 4, 17), float("nan")), **options)

    def test_other_memory_is_not_written(self) -> None:
        memory = torch.full((2, 40, 3, 30), 7.0).half()
        inner = (slice(None), slice(1, 39), slice(0, 2), slice(3, 27))
        memory[inner] = torch.randn(2, 38, 2, 24).half()
        r = torch.full((2, 40, 2, 6), 7.0)
        self.check(memory[inner], None, torch.randn(2, 24, 5), r[:, :38, :, :5])
        memory[inner], r[:, :38, :, :5] = 7.0, 7.0
        assert memory.eq(7.0).all()
        assert r.eq(7.0).all()

    def test_what_is_not_a_number_stays_in_its_token(self) -> None:
        from mhf_compiler.lowering.kernels.plain import norm_router

        q, weight = torch.randn(1, 4, 1, 16).bfloat16(), torch.randn(1, 16, 3)
        q[0, 1, 0, 5] = float("nan")
        r = torch.zeros(1, 4, 1, 3)
        formula = Formula(1e-6, False, "normalised", 0.0, 0.0, r.dtype)
        norm_router.norm_and_route(q, NormedRouter(None, weight, formula), r)
        expected = torch.tensor([False, True, False, False])
        assert torch.equal(q.isnan().all(-1).flatten(), expected)
        assert torch.equal(r.isnan().all(-1).flatten(), expected)


class TestPackaged:
    """The kernels of a package of AOTInductor's, whose strides are parameters of their own.

    What Inductor would be told to launch is launched at once.
    """

    __test__ = INTERPRETING

    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mhf_compiler.lowering.kernels import packaged

        monkeypatch.setattr(packaged, "wrap_triton", lambda kernel: kernel)

    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize("absent", [(), ("u", "u_bias", "r"), BIASES], ids=str)
    def test_network(
        self, parts: int, absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mhf_compiler.lowering.kernels import packaged
        from mhf_compiler.lowering.tiles import Tile

        tile = Tile(16, 16, 4, 2, descriptors=False, parts=parts)
        monkeypatch.setattr(packaged, "_tile", lambda *_: tile)
        tensors = make(SHAPE, absent=absent)
        tensors["q"] = stored_as(tensors["q"], (2, 0, 1, 3))
        tensors["v"] = stored_as(tensors["v"], (0, 1, 3, 2))
        order = (2, 0, 1, 3)
        given = [tensors[name] for name in NAMES]
        out = packaged.network(*given, "gelu", *SCALES.values(), order, None)
        wide = {name: None if x is None else x.double() for name, x in tensors.items()}
        exact = multi_head_ffn_reference(**wide, activation="gelu", **SCALES, out_order=order)
        assert out.stride() == exact.stride()
        assert relative_error(out, exact) < 1e-6

    @pytest.mark.usefixtures("bfloat16_products")
    def test_router(self) -> None:
        from mhf_compiler.lowering.kernels import packaged

        q = stored_as(torch.randn(2, 19, 4, 24).bfloat16(), (2, 0, 1, 3))
        weight = torch.randn(2, 3, 24).transpose(1, 2)
        out = packaged.router(q, weight, (2, 3, 0, 1))
        wide = weight.double().repeat_interleave(2, dim=0)
        exact = torch.einsum("blhd,hde->blhe", q.double(), wide)
        assert out.stride() == stored_as(exact, (2, 3, 0, 1)).stride()
        assert relative_error(out, exact) < 1e-6
