"""Sites in the words of the model's author: names, modules, formulas, and what decided."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.positive import POSITIVE
from models.workloads import changed
from torch import Tensor, nn

import mhf_compiler
import mhf_compiler.lowering.cost
import mhf_compiler.lowering.tiles
from mhf_compiler import SiteReport
from mhf_compiler.lowering.cost import Estimate
from mhf_compiler.lowering.summary import kernels_of
from mhf_compiler.lowering.tiles import MANY_TOKENS, Sizes
from mhf_compiler.lowering.workload import Workload
from mhf_compiler.patterns import Kind
from mhf_compiler.report.describe import readable

ALWAYS = {"rewrite": "always"}


class FFN(nn.Module):
    """Routed and gated, with every bias, two weights apart in modules of their own."""

    def __init__(self, biased: bool = True) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(4, 3, 5, 8)) for _ in range(3))
        self.gate_bias = nn.Parameter(torch.randn(4, 3, 5)) if biased else 0.0

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8))
        r = self.router(q).sigmoid()  # the router
        k = 0.5 * torch.einsum("blhd,hefd->blhef", q, self.gate) + self.gate_bias
        hidden = F.gelu(k) * torch.einsum("blhd,hefd->blhef", q, self.up)
        hidden = r[..., None] * hidden
        return torch.einsum("blhef,hefd->blhd", hidden, self.down).flatten(2)


class Tower(nn.Module):
    """Two layers."""

    def __init__(self, network: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([network() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def explain(model: nn.Module, x: Tensor | None = None) -> mhf_compiler.Report:
    x = torch.randn(2, 6, 32) if x is None else x
    return mhf_compiler.explain(model, options=ALWAYS)(x)


def names(site: SiteReport) -> dict[str, str]:
    return {argument.role: argument.name for argument in site.arguments}


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['ffn']._parameters['gate']", "ffn.gate"),
        ("L['self'].layers.0", "layers.0"),
        ("L['self']._modules['layers']._modules['0']._buffers['table']", "layers.0.table"),
        ("L['fn']._modules['0']._parameters['up']", "0.up"),
        ("L['x']", "x"),
        ("L['args'][0]", "args.0"),
        ("G['WEIGHT']", "WEIGHT"),
        ("L['self']", "self"),
        ("model.__closure__[0].cell_contents", "model.__closure__.0.cell_contents"),
    ],
)
def test_sources_of_dynamo_as_the_author_writes_them(source: str, name: str):
    assert readable(source) == name


def test_every_layer_has_its_own_module_and_parameters():
    first, second = explain(Tower(FFN)).rewritten
    assert (first.module, first.module_class) == ("layers.0", "FFN")
    assert (second.module, second.module_class) == ("layers.1", "FFN")
    for number, site in enumerate((first, second)):
        named = names(site)
        assert named["K"] == f"layers.{number}.gate"
        assert named["U"] == f"layers.{number}.up"
        assert named["V"] == f"layers.{number}.down"
        assert named["bK"] == f"layers.{number}.gate_bias"


def test_computed_arguments_have_their_variable_and_line():
    (site,) = explain(FFN()).rewritten
    by_role = {argument.role: argument for argument in site.arguments}
    assert by_role["R"].name == "r"
    assert by_role["R"].location is not None
    assert by_role["R"].location.line == line_of("# the router")
    assert by_role["Q"].location is None
    assert by_role["K"].shape == (4, 3, 5, 8)
    assert by_role["K"].dtype == "float32"


def test_the_formula_has_every_scale_bias_and_index():
    (site,) = explain(FFN()).rewritten
    expected = "sum over e of R[e] * (gelu(0.5 * Q K[e]^T + bK[e]) * (Q U[e]^T)) V[e]"
    assert site.formula == expected
    assert [argument.role for argument in site.arguments] == ["Q", "K", "U", "V", "R", "bK"]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("VmapOverHeads", "(silu(Q K^T) * (Q U^T)) V"),
        ("GroupedConvolution", "(silu(Q K^T + bK) * (Q U^T + bU)) V + bV"),
    ],
)
def test_formulas_of_other_spellings(name: str, formula: str):
    case = POSITIVE[name]
    (site,) = mhf_compiler.explain(case.build(), options=ALWAYS)(*case.inputs()).rewritten
    assert site.formula == formula


def test_stacked_weights_are_named_by_their_parts():
    case = POSITIVE["ListOfHeads-cat"]
    model = nn.Sequential(case.build())
    (site,) = mhf_compiler.explain(model, options=ALWAYS)(*case.inputs()).rewritten
    assert names(site)["V"] == "0.heads.0.down.weight ... 0.heads.3.down.weight (4 tensors)"
    assert (site.module, site.module_class) == ("0", "ListOfHeads")
    assert any("copies 3 of its weights" in text for text in site.lowered)


class Nested(nn.Module):
    """Two heads, each a list of three networks, each of them a module."""

    class Network(nn.Module):
        def __init__(self, gated: bool) -> None:
            super().__init__()
            self.gate, self.down = nn.Linear(16, 5, bias=False), nn.Linear(5, 16, bias=False)
            self.up = nn.Linear(16, 5, bias=False) if gated else None

        def forward(self, q: Tensor) -> Tensor:
            hidden = F.silu(self.gate(q))
            return self.down(hidden if self.up is None else hidden * self.up(q))

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleList(self.Network(gated) for _ in range(3)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = zip(self.heads, x.chunk(2, -1), strict=True)
        return torch.cat([sum(network(q) for network in networks) for networks, q in heads], -1)


@pytest.mark.parametrize(
    ("build", "pieces", "copied"),
    [
        (FFN, (1, 1, 1), 0),
        (POSITIVE["ListOfHeads-cat"].build, (4, 4, 4), 3),
        (lambda: Nested(gated=True), (6, 6, 6), 3),
        (lambda: Nested(gated=False), (6, 1, 6), 2),
    ],
    ids=["together", "heads", "nested", "not gated"],
)
def test_the_cost_model_is_told_how_many_modules_weights_lie_in(
    build: Callable[[], nn.Module],
    pieces: tuple[int, int, int],
    copied: int,
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[Workload] = []

    def estimate(workload: Workload) -> Estimate:
        told.append(workload)
        return Estimate(1.0, 1.0)

    monkeypatch.setattr(mhf_compiler.lowering.cost, "estimate", estimate)
    explain(build())
    (workload,) = told
    assert (workload.pieces, workload.copied) == (pieces, copied)


def test_casts_keep_the_name_of_the_parameter():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (site,) = explain(FFN(biased=False)).rewritten
    assert names(site)["V"] == "down"


# Work.


def test_work_is_counted_by_hand():
    (site,) = explain(FFN().requires_grad_(False)).rewritten
    work = site.work
    assert work is not None
    assert (work.tokens, work.dynamic) == (12, False)
    assert work.flops == 3 * 2 * 12 * 4 * 3 * 5 * 8
    assert work.hidden_bytes == 12 * 4 * 3 * 5 * 4
    assert work.bytes == 4 * (2 * 12 * 32 + 3 * 4 * 3 * 5 * 8 + 12 * 4 * 3)
    assert work.rewritten is not None
    assert work.original is not None


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_dynamic_sizes_are_marked_and_counted_for_many_tokens(dims: tuple[int, ...]):
    x = torch.randn(2, 6, 32)
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    (site,) = explain(FFN(), x).rewritten
    assert site.work is not None
    assert site.work.dynamic
    assert site.work.tokens == MANY_TOKENS
    assert [isinstance(site.arguments[0].shape[dim], str) for dim in (0, 1)] == [
        dim in dims for dim in (0, 1)
    ]


DYNAMIC = {"tokens": MANY_TOKENS, "dynamic": True}


def workload(**changes: Any) -> Workload:
    sizes = Sizes(
        tokens=8 * 4096,
        heads=16,
        groups=16,
        head_dim=128,
        sub_networks=22,
        hidden=256,
        gated=True,
        routed=True,
        biased=(False, False, False),
        dtype=torch.bfloat16,
    )
    w = Workload(sizes, "silu", torch.bfloat16, torch.device("cuda"), training=False)
    return changed(w, **changes)


@pytest.mark.parametrize(
    ("card", "changes", "kernel"),
    [
        ((9, 0), {}, "forward kernel for Hopper: 128 tokens x 64 hidden units, 3 stages"),
        ((9, 0), {"head_dim": 32}, "forward kernel for Hopper: 192 tokens x 64 hidden units"),
        ((9, 0), {"tokens": 8}, "forward kernel: 16 tokens x 64 hidden units"),
        ((8, 0), {}, "forward kernel: 128 tokens x 64 hidden units, 8 warps, 2 stages"),
        ((8, 0), DYNAMIC, "forward kernel: 128 tokens x 64 hidden units, 8 warps"),
        (
            (9, 0),
            {"head_dim": 512, "sub_networks": 1, "tokens": 2048},
            "forward pass by PyTorch's batched products: 16 of 16 heads at a time",
        ),
        (
            (8, 0),
            {"dtype": torch.float32, "heads": 32},
            "forward pass by PyTorch's batched products: 2 of 32 heads, "
            "2944 of their 65536 rows at a time",
        ),
    ],
)
def test_the_kernel_that_sizes_select(
    card: tuple[int, int],
    changes: dict[str, Any],
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("triton")
    from mhf_compiler.lowering import summary

    monkeypatch.setattr(summary, "capability", lambda device: card)
    monkeypatch.setattr(summary, "interpreted", lambda: False)
    op, forward = kernels_of(workload(**changes))
    assert op == "torch.ops.mhf_compiler.multi_head_ffn"
    assert forward.startswith(kernel)


HOPPERS = (
    "backward kernel for Hopper of dQ and dR: 128 tokens x 64 hidden units, 3 stages",
    "backward kernel for Hopper of dV: 64 tokens x 128 hidden units, 4 stages",
    "backward kernel for Hopper of dK and dU: 64 tokens x 128 hidden units, 3 stages",
)
NARROW = (
    "backward kernel for Hopper of dQ and dR: 128 tokens x 64 hidden units, 5 stages",
    "backward kernel for Hopper of dV: 128 tokens x 128 hidden units, 4 stages",
    "backward kernel for Hopper of dK and dU: 64 tokens x 128 hidden units, 3 stages",
)
UNGATED = (
    "backward kernel for Hopper of dQ and dR: 128 tokens x 64 hidden units, 3 stages",
    "backward kernel for Hopper of dK and dV: 64 tokens x 128 hidden units, 4 stages",
)
AMPERES = (
    "backward kernel of dQ and dR: 64 tokens x 32 hidden units, 4 warps, 2 stages",
    "backward kernel of dV: 64 tokens x 128 hidden units, 8 warps, 2 stages",
    "backward kernel of dK and dU: 64 tokens x 64 hidden units, 8 warps, 2 stages",
)


@pytest.mark.parametrize(
    ("card", "changes", "expected"),
    [
        ((9, 0), {}, HOPPERS),
        ((9, 0), DYNAMIC, HOPPERS),
        ((9, 0), {"head_dim": 32}, NARROW),
        ((9, 0), {"biased": (False, False, True)}, HOPPERS),
        ((9, 0), {"biased": (True, True, False)}, HOPPERS),
        ((9, 0), {"routed": False}, (HOPPERS[0].replace(" and dR", ""), *HOPPERS[1:])),
        ((9, 0), {"gated": False}, UNGATED),
        ((9, 0), {"gated": False, "head_dim": 256}, ()),  # products of PyTorch's
        ((8, 0), {}, AMPERES),
        ((8, 0), DYNAMIC, AMPERES),
    ],
)
def test_the_backward_kernels_that_sizes_select(
    card: tuple[int, int],
    changes: dict[str, Any],
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("triton")
    from mhf_compiler.lowering import summary

    monkeypatch.setattr(summary, "capability", lambda device: card)
    monkeypatch.setattr(summary, "interpreted", lambda: False)
    sentences = kernels_of(workload(training=True, **changes))
    found = [text for text in sentences if text.startswith("backward kernel ")]
    assert tuple(text.removesuffix(" (where strides allow it)") for text in found) == expected
    assert all(("Hopper" in text) == ("strides" in text) for text in found)
    assert not any("backward kernel" in text for text in kernels_of(workload(**changes)))


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 512}, {"head_dim": 256, "tokens": 512}, {"dtype": torch.float32, "tokens": 200}],
)
def test_hoppers_own_backward_kernels_are_not_promised_in_vain(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton")
    from mhf_compiler.lowering import summary

    monkeypatch.setattr(summary, "capability", lambda device: (9, 0))
    found = kernels_of(workload(training=True, **changes))
    assert len([text for text in found if text.startswith("backward kernel of d")]) == 3


@pytest.mark.parametrize(
    "changes", [{"head_dim": 256}, {"dtype": torch.float32}, {"head_dim": 320}]
)
def test_a_backward_pass_by_products_is_one_sentence(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton")
    from mhf_compiler.lowering import summary

    monkeypatch.setattr(summary, "capability", lambda device: (9, 0))
    monkeypatch.setattr(summary, "interpreted", lambda: False)
    found = [text for text in kernels_of(workload(training=True, **changes)) if "backward" in text]
    assert len(found) == 2  # that hidden units are computed again is the other
    assert found[1].startswith("backward pass by PyTorch's batched products: 1 of 16 heads, ")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, {"tokens": 100}])
def test_the_kernels_that_are_said_are_those_that_run(shape: dict[str, Any]):
    """Hopper's own have names of their own in a profile."""
    from mhf_compiler.lowering.workload import trial_run

    w = workload(training=True, heads=2, groups=2, sub_networks=2, **shape)
    trial_run(w)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        trial_run(w)
    ran = " ".join(event.key for event in profiled.key_averages())
    said = [text for text in kernels_of(w) if text.startswith("backward kernel ")]
    for kernel, text in zip(("dq", "dv", "dk_du"), said, strict=True):
        assert (f"mhf_hopper_backward_{kernel}_kernel" in ran) == ("for Hopper" in text), kernel


class Packed(nn.Module):
    """Gate and up projection in one parameter, cut after the product; all in one if ``w``."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]] | None) -> None:
        super().__init__()
        self.cut = cut
        self.w = nn.Parameter(torch.randn(4, 8, 10) if cut else torch.randn(3, 4, 8, 5))
        self.down = nn.Parameter(torch.randn(4, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        if self.cut is None:
            gate, up, down = self.w
            return (F.silu(q @ gate) * (q @ up)) @ down.mT
        gate, up = self.cut(q @ self.w)
        return (F.silu(gate) * up) @ self.down


@pytest.mark.parametrize(
    ("cut", "parts"),
    [
        (None, {"K": "w[0]", "U": "w[1]", "V": "w[2]"}),
        (lambda y: y.chunk(2, -1), {"K": "w[:, :, 0:5]", "U": "w[:, :, 5:10]", "V": "down"}),
        (lambda y: (y[..., ::2], y[..., 1::2]), {"K": "w[:, :, ::2]", "U": "w[:, :, 1::2]"}),
    ],
)
def test_packed_weights_are_shown_by_their_slices(cut: Any, parts: dict[str, str]):
    report = mhf_compiler.explain(Packed(cut), options={"rewrite": "always"})(torch.randn(2, 6, 32))
    (site,) = report.rewritten
    found = {one.role: f"{one.name}{one.part}" for one in site.arguments}
    assert parts.items() <= found.items()
    assert all(
        f"{role}           {name}  (4, 1, 5, 8)" in str(report) for role, name in parts.items()
    )
    roles = [node.role for node in site.region if node.call == "w"]
    assert roles == ["K, U, V" if cut is None else "K, U"]


def test_a_tuned_tile_is_said(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from mhf_compiler.lowering import summary
    from mhf_compiler.lowering import workload as workloads
    from mhf_compiler.lowering.kernels.tuning import store

    for module in (summary, workloads):
        monkeypatch.setattr(module, "capability", lambda device: (8, 0))
    store.keep(workloads.tuning_key("forward", workload()), (64, 128, 4, 3), None)
    try:
        _, forward = kernels_of(workload())
    finally:
        store.forget()
    assert forward == "forward kernel: 64 tokens x 128 hidden units, 4 warps, 3 stages, tuned"


def test_training_is_said():
    on_cpu = workload(device=torch.device("cpu"), training=True)
    assert any("backward pass" in text for text in kernels_of(on_cpu))


# Near-misses, and models without any.


class Clamped(FFN):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8))
        k = torch.einsum("blhd,hefd->blhef", q, self.gate)
        hidden = F.silu(k).clamp(max=1)  # offends
        return torch.einsum("blhef,hefd->blhd", hidden, self.down).flatten(2)


def test_the_operation_that_decides_has_its_own_line_and_module():
    miss, other = explain(Tower(Clamped)).declined
    assert miss.reason is not None
    assert miss.reason.kind is Kind.UNKNOWN_ACTIVATION
    assert miss.reason.node is None  # a report keeps no graph alive
    assert (miss.module, other.module) == ("layers.0", "layers.1")
    assert miss.operation is not None
    assert "clamp(max=1)" in miss.operation.call
    assert miss.operation.location is not None
    assert miss.operation.location.line == line_of("# offends")


def test_what_was_looked_at_in_a_model_without_a_network():
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.LayerNorm(32))
    (graph,) = explain(model).graphs
    (product,) = graph.products
    assert product.call == "input_1 = linear(args.0, 0.weight, 0.bias)"
    assert product.module == "0"


def test_no_list_where_something_was_found():
    (graph,) = explain(FFN()).graphs
    assert graph.products == []


class Printing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FFN(), FFN()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()  # first break
        x = self.second(x)
        torch._dynamo.graph_break()  # second break
        return x.sin()


def test_every_graph_break_has_its_reason_and_line():
    report = explain(Printing())
    assert len(report.graphs) == 3
    first, second = report.graph_breaks
    for found, text in ((first, "# first break"), (second, "# second break")):
        assert "graph_break()" in found.reason
        assert found.location is not None
        assert (found.location.line, found.location.function) == (line_of(text), "forward")
    assert report.graphs[2].graph_break is None


def test_the_model_itself_is_no_module_of_its_graph():
    """Whatever Dynamo calls it, as it does where the model's class is one of PyTorch's."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    (graph,) = mhf_compiler.explain(model)(torch.zeros(2, 4)).graphs
    assert [one.path for one in graph.modules] == ["0", "1"]
