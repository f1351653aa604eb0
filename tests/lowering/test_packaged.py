"""The ops as AOTInductor packages them for a GPU: no GPU needed to see what is in a graph.

Fake tensors on a GPU are traced, and a driver that only pretends to have one lets PyTorch find out
what a kernel writes. test_kernels_interpreted.py and test_kernels_compiled.py run and compile the
same kernels; tests/mhf_compiler/test_packages_gpu.py runs packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.problems import BIASES, Shape, make, relative_error
from torch import Tensor, fx, nn

triton = pytest.importorskip("triton")

from torch._functorch.aot_autograd import aot_export_module  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from mhf_compiler.compat import FakeTensorMode  # noqa: E402
from mhf_compiler.lowering import multi_head_ffn, multi_head_ffn_reference, router_product, summary  # noqa: E402
from mhf_compiler.lowering import problem as problems  # noqa: E402
from mhf_compiler.lowering.kernels import launch, packaged  # noqa: E402
from mhf_compiler.lowering.kernels.plain import router  # noqa: E402
from mhf_compiler.lowering.tiles import Sizes  # noqa: E402
from mhf_compiler.lowering.workload import Workload  # noqa: E402

OPS = torch.ops.mhf_compiler
HOP = torch.ops.higher_order.triton_kernel_wrapper_functional
HOPPER = (9, 0)

needs_compiler = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"
)


@pytest.fixture
def pretended() -> Iterator[None]:
    """A Hopper that is not there, for Triton and for the choice of tiles."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )
    triton.runtime.driver.set_active(driver)
    with pytest.MonkeyPatch.context() as patch:
        for module in (problems, launch, router, summary):
            patch.setattr(module, "capability", lambda device: HOPPER)
        patch.setattr(torch._subclasses.fake_tensor, "init_gpu_context", lambda *device: None)
        yield
    triton.runtime.driver.set_active(None)


def traced(
    call: Callable[..., Tensor], *tensors: Any, packages: bool = True, dynamic: bool = False
) -> fx.Graph:
    """The functional graph that Inductor is given of a call on a GPU.

    Tensors of four dimensions are read as tokens if they are ``dynamic``: their first two sizes.
    """

    class Call(nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor]:
            return (call(*given),)

    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env) as mode:
        sizes = [_symbol(shape_env, name, hint) for name, hint in (("b", 3), ("l", 77))]

        def fake(x: Tensor, tokens: bool) -> Tensor:
            order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
            shape = [*sizes, *x.shape[2:]] if tokens else [*x.shape]
            dense = torch.empty([shape[dim] for dim in order], dtype=x.dtype, device="cuda")
            return dense.permute([order.index(dim) for dim in range(x.dim())])

        given = [fake(x, dynamic and number in (0, 4)) for number, x in enumerate(tensors)]
        with V.set_aot_compilation(packages), torch.no_grad(), mode:
            gm, _ = aot_export_module(Call(), given, trace_joint=False)
    return gm.graph


def _symbol(shape_env: ShapeEnv, name: str, hint: int) -> Any:
    from torch._dynamo.source import ConstantSource

    symbol = shape_env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=hint)


def launches(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=HOP)


def opaque(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if "mhf_compiler" in str(node.target)]


MANY = Shape(B=2, L=1024, H=16, d=64, G=8, E=3, f=128)
FEW = MANY._replace(B=1, L=1)


def network(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    tensors = make(shape, dtype, BIASES)
    return [tensors[name] for name in "qkuvr"]


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_package_launches_the_kernel_itself(dynamic: bool, pretended: None) -> None:
    graph = traced(multi_head_ffn, *network(MANY), dynamic=dynamic)
    (launched,) = launches(graph)
    assert opaque(graph) == []
    assert launched.kwargs["tensors_to_clone"] == ["Out"]  # it is not said to write anything else
    arguments = launched.kwargs["kwargs"]
    assert [arguments[f"Q_{dim}"] for dim in (1, 2, 3)] == [1024, 64, 1]
    assert arguments["BM"] == 128


@needs_compiler
def test_few_tokens_are_cut_in_parts_that_a_second_kernel_adds(pretended: None) -> None:
    graph = traced(multi_head_ffn, *network(FEW))
    first, second = launches(graph)
    assert first.kwargs["tensors_to_clone"] == ["Part"]
    assert second.kwargs["tensors_to_clone"] == ["Out"]
    assert first.kwargs["kwargs"]["PARTS"] == second.kwargs["kwargs"]["PARTS"] == 6


@needs_compiler
def test_the_product_of_a_router(pretended: None) -> None:
    q, weight = torch.empty(2, 77, 4, 32).bfloat16(), torch.empty(2, 32, 3)
    graph = traced(router_product, q, weight)
    assert [node.kwargs["tensors_to_clone"] for node in launches(graph)] == [["Out"]]
    assert opaque(graph) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_batches_products_is_pytorchs_in_a_package(
    dtype: torch.dtype, pretended: None
) -> None:
    """Heads too wide for a tile, and many tokens in float32."""
    shape = MANY._replace(d=64 if dtype is torch.float32 else 320)
    graph = traced(multi_head_ffn, *network(shape, dtype), dynamic=True)
    assert opaque(graph) == launches(graph) == []
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)) == 3


def test_outside_of_a_package_the_op_stays_one(pretended: None) -> None:
    graph = traced(multi_head_ffn, *network(MANY), packages=False)
    assert launches(graph) == []
    assert [node.target for node in opaque(graph)] == [OPS.multi_head_ffn.default]


def test_on_the_cpu_the_op_stays_one() -> None:
    class Call(nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor]:
            return (multi_head_ffn(*given),)

    with V.set_aot_compilation(True), torch.no_grad():
        gm, _ = aot_export_module(Call(), network(MANY), trace_joint=False)
    assert [node.target for node in opaque(gm.graph)] == [OPS.multi_head_ffn.default]


@needs_compiler
def test_what_a_kernel_reads_is_written_once_with_the_strides_of_the_graph(pretended: None) -> None:
    """Under any views, as ``fix_layouts`` does for calls of our ops."""

    def call(x: Tensor, *others: Tensor) -> Tensor:
        return multi_head_ffn((x * 2).unflatten(-1, (16, 64)), *others)

    q, *others = network(MANY)
    graph = traced(call, q.flatten(2), *others)
    (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    marked = [node for node in graph.nodes if node.meta.get("inductor_realize_to_strides")]
    assert marked == [product]


@needs_compiler
def test_without_tokens_nothing_is_launched(pretended: None) -> None:
    graph = traced(multi_head_ffn, *network(MANY._replace(L=0)))
    assert opaque(graph) == launches(graph) == []


# The products, which run on any device.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absent", [(), BIASES, ("u", "u_bias", "r"), ("r",)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_products_are_the_network(
    dtype: torch.dtype, absent: tuple[str, ...], activation: str
) -> None:
    tensors = make(Shape(B=2, L=5, H=4, d=8, G=2, E=3, f=6), dtype, absent)
    scales = {"k_scale": 1.3, "u_scale": 0.7, "out_scale": 0.9}
    order, wide = (2, 0, 1, 3), torch.float32
    problem = problems.Problem(**tensors, activation=activation, **scales)
    found = packaged._by_products(problem, order, wide)
    options: dict[str, Any] = {"activation": activation, "out_order": order, "out_dtype": wide}
    expected = multi_head_ffn_reference(**tensors, **scales, **options)
    assert found.stride() == expected.stride()
    error = relative_error(found, expected.double())
    assert error < (1e-6 if dtype is torch.float32 else 1e-2)


def test_a_router_of_unknown_heads_is_a_product_in_float32() -> None:
    q, weight = torch.randn(2, 5, 4, 8).bfloat16(), torch.randn(2, 8, 3)
    order = (2, 3, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packaged, "_are_numbers", lambda *shapes: False)
        found = packaged.router(q, weight, order)
    expected = router_product(q, weight, order)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


# The report.


@pytest.mark.parametrize(
    ("head_dim", "tokens", "dynamic", "said"),
    [
        (128, 32768, False, "plain Triton's kernel, 128 tokens x 64 hidden units in place of"),
        (128, 8192, True, "plain Triton's kernel, 128 tokens x 64 hidden units in place of"),
        (128, 1, False, "plain Triton's kernel, 16 tokens x 64 hidden units, 8 programs to a tile"),
        (512, 4096, False, "PyTorch's products, which Inductor compiles, with all hidden units"),
    ],
)
def test_the_report_says_what_a_package_has(
    head_dim: int, tokens: int, dynamic: bool, said: str, pretended: None
) -> None:
    sizes = Sizes(
        tokens, 16, 16, head_dim, 22, 256, True, True, (False, False, False), torch.bfloat16
    )
    workload = Workload(
        sizes, "silu", torch.bfloat16, torch.device("cuda"), training=False, dynamic=dynamic
    )
    (sentence,) = summary.packaged_as(workload)
    package = replace(workload, sizes=sizes._replace(packaged=True))
    assert summary.kernels_of(package) == (summary.kernels_of(workload)[0], sentence)
    assert sentence.startswith(f"in a package of AOTInductor's: {said}")
    assert sentence.endswith("in place of Hopper's") is (tokens >= 256 and head_dim < 256)
