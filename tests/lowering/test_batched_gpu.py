"""The op by PyTorch's batched products, on a GPU: errors, layouts, memory, graphs, determinism.

Errors are held to the rule of twice, as in test_kernels_gpu.py.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import families, problems
from support.problems import BIASES, NAMES, Shape, Tensors, present, spelled, step, stored_as
from torch import Tensor

from mhf_compiler.lowering.problem import Problem

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)
SCALES = {"k_scale": 1.3, "u_scale": 0.7, "out_scale": 0.9}
SHAPE = Shape(B=2, L=333, H=4, d=512, G=4, E=1, f=1024)
ROUTED = SHAPE._replace(d=320, E=3, f=171)


def make(
    shape: Shape = SHAPE, dtype: torch.dtype = torch.bfloat16, absent: tuple[str, ...] = ()
) -> Tensors:
    return problems.make(
        shape, dtype, absent, router_dtype=torch.float32, scaled=True, device="cuda"
    )


def problem_of(tensors: Tensors, activation: str = "gelu") -> Problem:
    return Problem(*(tensors[name] for name in NAMES), activation, **SCALES)


def by_products(problem: Problem, out_dtype: torch.dtype | None = None) -> bool:
    """Whether both passes are chosen to be theirs."""
    from mhf_compiler.lowering.tiles import backward_kernels, select

    forward = select("forward", problem.sizes, out_dtype=out_dtype).family
    return forward == "batched" and backward_kernels(problem.sizes) == ("backward",)


def fused(problem: Problem, grad_out: Tensor, out: Tensor | None = None) -> list[Tensor]:
    from mhf_compiler.lowering.kernels import dispatch

    out = torch.empty_like(problem.q) if out is None else out
    dispatch.forward(problem, out.fill_(float("nan")))
    gradients = problem.new_gradients([x is not None for x in problem.tensors])
    for x in gradients.wanted:
        x.fill_(float("nan"))
    dispatch.backward(problem, grad_out, gradients)
    return [out, *gradients.wanted]


def check(
    tensors: Tensors,
    grad_out: Tensor | None = None,
    out: Tensor | None = None,
    activation: str = "gelu",
) -> None:
    q = tensors["q"]
    assert q is not None
    if grad_out is None:
        grad_out = torch.randn(q.shape, device="cuda").to(q.dtype)
    problem = problem_of(tensors, activation)
    assert by_products(problem)
    options = {"activation": activation, **SCALES}
    exact = step(spelled, tensors, grad_out, torch.float64, **options)
    usual = step(spelled, tensors, grad_out, **options)
    values = fused(problem, grad_out, out)
    problems.assert_as_exact(["out", *present(tensors)], values, usual, exact)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Starts from exact float32 products, and puts the switch back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["groups", "rows"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One group of heads after the other, or a group's rows in pieces."""
    if request.param == "groups":
        families.cut_into_groups(monkeypatch)
    else:
        families.cut_into_rows(monkeypatch)
    return request.param


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("d", [320, 512, 768, 1536])
def test_widths(d: int, dtype: torch.dtype) -> None:
    check(make(SHAPE._replace(d=d), dtype, ("u", "r", "u_bias")))
    check(make(SHAPE._replace(d=d, f=300, E=2), dtype))


@pytest.mark.parametrize("d", [16, 64, 100, 128, 256])
def test_narrower_heads_in_float32(d: int) -> None:
    check(make(ROUTED._replace(d=d), torch.float32))


@pytest.mark.parametrize("absent", [(), ("u", "u_bias")], ids=str)
@pytest.mark.parametrize("d", [160, 256])
def test_the_backward_pass_of_narrower_heads(d: int, absent: tuple[str, ...]) -> None:
    from mhf_compiler.lowering.tiles import backward_kernels

    tensors = make(ROUTED._replace(d=d, L=600), absent=absent)
    q = tensors["q"]
    assert q is not None
    problem = problem_of(tensors)
    assert backward_kernels(problem.sizes) == ("backward",)
    grad_out = torch.randn_like(q)
    options = {"activation": "gelu", **SCALES}
    exact = step(spelled, tensors, grad_out, torch.float64, **options)
    usual = step(spelled, tensors, grad_out, **options)
    problems.assert_as_exact(["out", *present(tensors)], fused(problem, grad_out), usual, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "absent",
    [("r",), ("r", *BIASES), ("u", "u_bias"), ("u", "r", *BIASES), BIASES, ("v_bias",)],
    ids=str,
)
def test_optional_inputs(absent: tuple[str, ...], dtype: torch.dtype) -> None:
    check(make(ROUTED, dtype, absent))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2", "tanh"])
def test_activations(activation: str) -> None:
    check(make(ROUTED), activation=activation)


@pytest.mark.parametrize("L", [1, 7, 64, 1000])
@pytest.mark.parametrize("B", [1, 3])
def test_lengths(B: int, L: int) -> None:
    check(make(SHAPE._replace(B=B, L=L)))


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_weights(groups: int) -> None:
    check(make(ROUTED._replace(G=groups)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chunks(dtype: torch.dtype, cut: str) -> None:
    check(make(ROUTED, dtype))
    check(make(SHAPE._replace(G=2), dtype, ("u", "u_bias")))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("shape", [SHAPE, ROUTED], ids=["whole", "ragged"])
def test_layouts(order: tuple[int, ...], shape: Shape) -> None:
    """Tokens and R with other axes contiguous, weights stored by columns, tokens odd in number."""
    tensors = make(shape)
    for name in ("q", "r"):
        tensors[name] = stored_as(tensors[name], order)
    for name in ("k", "u", "v"):
        tensors[name] = stored_as(tensors[name], (0, 1, 3, 2))
    assert tensors["q"] is not None
    grad_out = stored_as(torch.randn_like(tensors["q"]), order)
    check(tensors, grad_out, out=torch.empty_like(grad_out))


def test_layouts_of_models_need_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads next to each other in tokens, and packed gate and up projections."""
    tensors = make(absent=BIASES)
    q = tensors["q"]
    assert q is not None
    tensors["k"], tensors["u"] = torch.cat([tensors["k"], tensors["u"]], 2).chunk(2, dim=2)
    problem, grad_out = problem_of(tensors), torch.randn_like(q)
    fused(problem, grad_out)  # loads the kernels
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        from mhf_compiler.lowering.kernels import dispatch

        out = torch.empty_like(q)
        dispatch.forward(problem, out)
    names = [event.key for event in profiled.key_averages()]
    copies = [name for name in names if "copy" in name.lower() or "memcpy" in name.lower()]
    assert copies == []


def test_expanded_inputs() -> None:
    tensors = make(ROUTED)
    tensors["r"] = torch.rand(4, 3, device="cuda").expand(2, 333, 4, 3)
    check(tensors, grad_out=torch.ones((), device="cuda").bfloat16().expand(2, 333, 4, 320))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_output_in_float32_is_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    tensors = make(SHAPE, dtype, BIASES)
    assert tensors["q"] is not None
    out = torch.empty(tensors["q"].shape, device="cuda")
    grad_out = torch.randn(out.shape, device="cuda")
    check(tensors, grad_out, out=out)
    assert not out.to(dtype).float().equal(out)
    narrow = fused(problem_of(tensors), grad_out.to(dtype))[0]
    difference = (out.to(dtype).double() - narrow.double()).norm() / narrow.double().norm()
    assert difference < 2**-9


def test_tf32_follows_the_setting_of_pytorch() -> None:
    tensors = make(SHAPE, torch.float32)
    problem = problem_of(tensors)
    grad_out = torch.randn_like(problem.q)
    exact = step(spelled, tensors, grad_out, torch.float64, activation="gelu", **SCALES)
    errors = {}
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        values = fused(problem, grad_out)
        errors[allowed] = [
            problems.relative_error(x, y) for x, y in zip(values, exact, strict=True)
        ]
        usual = step(spelled, tensors, grad_out, activation="gelu", **SCALES)
        problems.assert_as_exact(["out", *present(tensors)], values, usual, exact)
    assert all(error < 5e-6 for error in errors[False])
    if torch.cuda.get_device_capability()[0] >= 8:
        assert errors[True][0] > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("groups", [4, 2])
def test_results_over_what_they_are_computed_from(
    groups: int, order: tuple[int, ...], dtype: torch.dtype
) -> None:
    ops = torch.ops.mhf_compiler
    tensors = make(ROUTED._replace(G=groups), dtype)
    tensors["q"] = stored_as(tensors["q"], order)
    inputs: Any = [tensors[name] for name in NAMES]
    grad_out = stored_as(torch.randn_like(inputs[0]), order)
    constants = ("silu", 1.0, 1.0, 1.0)
    needs = [True] * 8
    out = ops.multi_head_ffn(*inputs, *constants, order)
    gradients = ops.multi_head_ffn_backward(grad_out, *inputs, *constants, needs)
    for _ in range(3):  # kernels between the products are written down, and repeated
        place = grad_out.clone()
        others = ops.multi_head_ffn_backward_over_gradient(place, *inputs, *constants, needs)
        for x, right in zip([place, *others], gradients, strict=True):
            assert x.equal(right)
        q = inputs[0].clone()
        ops.multi_head_ffn_over_query(q, *inputs[1:], *constants)
        assert q.equal(out)


def test_same_bits_each_time() -> None:
    problem = problem_of(make(SHAPE._replace(B=4, L=1000)))
    grad_out = torch.randn_like(problem.q)
    first, second, third = (fused(problem, grad_out) for _ in range(3))
    for x, y, z in zip(first, second, third, strict=True):
        assert x.isfinite().all()
        assert x.equal(y)
        assert x.equal(z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_in_a_cuda_graph(dtype: torch.dtype) -> None:
    from mhf_compiler.lowering.kernels import dispatch

    problem = problem_of(make(ROUTED, dtype))
    grad_out = torch.randn_like(problem.q)
    expected = [x.clone() for x in fused(problem, grad_out)]
    out = torch.empty_like(problem.q)
    gradients = problem.new_gradients([True] * 8)

    def run() -> None:
        dispatch.forward(problem, out)
        dispatch.backward(problem, grad_out, gradients)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(2):
        for x in (out, *gradients.wanted):
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for x, y in zip([out, *gradients.wanted], expected, strict=True):
            assert x.equal(y)


def test_on_another_stream_and_thread() -> None:
    problem = problem_of(make(ROUTED))
    grad_out = torch.randn_like(problem.q)
    expected = fused(problem, grad_out)

    def elsewhere() -> list[Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # work that is launched on the other stream comes first
            results = fused(problem, grad_out)
        stream.synchronize()
        return results

    torch.cuda.synchronize()
    with ThreadPoolExecutor(max_workers=1) as thread:
        results = thread.submit(elsewhere).result()
    assert all(x.equal(y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_is_bounded(dtype: torch.dtype, gated: bool) -> None:
    """By a chunk's hidden units: those of all heads would take 2 GiB a product in 16 bits."""
    from mhf_compiler.lowering.kernels import dispatch
    from mhf_compiler.lowering.tiles import MOST_BYTES

    shape = Shape(B=1, L=32768, H=8, d=512, G=8, E=1, f=4096)
    problem = problem_of(make(shape, dtype, ("r",) if gated else ("u", "u_bias", "r")))
    grad_out = torch.randn_like(problem.q)
    out = torch.empty_like(grad_out)
    gradients = problem.new_gradients([x is not None for x in problem.tensors])

    def run() -> None:
        dispatch.forward(problem, out)
        dispatch.backward(problem, grad_out, gradients)

    run()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    scratch = torch.cuda.max_memory_allocated() - before
    sums = 3 * shape.f * shape.d * 4  # of one group's weights, in float32, and those of its biases
    assert scratch <= 1.25 * MOST_BYTES + sums + 64 * 2**20  # and the library's workspace


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    from mhf_compiler.lowering import multi_head_ffn

    tensors = make(SHAPE._replace(B=shape[0], L=shape[1]))
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
    out = multi_head_ffn(**leaves)
    assert out.numel() == 0
    out.sum().backward()
    assert all(leaves[name].grad.eq(0).all() for name in ("k", "u", "v", *BIASES))


def test_a_step_of_training_through_the_op() -> None:
    from mhf_compiler.lowering import multi_head_ffn, multi_head_ffn_reference

    tensors = make(SHAPE, torch.float32)
    grad_out = torch.randn_like(tensors["q"])
    found = step(multi_head_ffn, tensors, grad_out, activation="gelu")
    exact = step(multi_head_ffn_reference, tensors, grad_out, torch.float64, activation="gelu")
    for name, x, y in zip(["out", *NAMES], found, exact, strict=True):
        assert problems.relative_error(x, y) < 5e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_of_the_caller_does_not_reach_the_products(dtype: torch.dtype) -> None:
    """The overload of compiled graphs does not switch it off."""
    from mhf_compiler.lowering.kernels import dispatch

    problem = problem_of(make(ROUTED, dtype))
    grad_out = torch.randn_like(problem.q)
    expected = fused(problem, grad_out)
    with torch.autocast("cuda", torch.float16):
        found = fused(problem, grad_out)
        out = torch.empty_like(problem.q)
        dispatch.forward(problem, out)
    for x, y in zip([*found, out], [*expected, expected[0]], strict=True):
        assert x.dtype == y.dtype
        assert x.equal(y)
