"""A float32 router through the back end: the same numbers, and no float32 copy of the queries."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler.lowering.ops import router

B, L, H, E, d, f = 2, 16, 4, 3, 16, 32
ROOT = Path(__file__).parents[3]


class FlashMHF(nn.Module):
    """Norm, router and sub-networks between two projections, in bfloat16."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.inputs, self.outputs = (nn.Linear(H * d, H * d, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(d)
        self.router = nn.Parameter(torch.randn(H, d, E) / d**0.5)
        self.bias = nn.Parameter(torch.randn(H, E)) if bias else None
        self.gate, self.up = (nn.Parameter(torch.randn(H, E, f, d) / d**0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, E, f, d) / f**0.5)
        self.bfloat16()

    def route(self, q: Tensor) -> Tensor:
        logits = torch.einsum("blhd,hde->blhe", q.float(), self.router.float())
        logits = logits if self.bias is None else logits + self.bias.float()
        r = logits.sigmoid()
        return r / r.sum(-1, keepdim=True).clamp_min(1e-20)

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.inputs(x).unflatten(-1, (H, d)))
        r = self.route(q)
        out = torch.zeros_like(q, dtype=torch.float32)
        for e in range(E):
            gate = torch.einsum("blhd,hfd->blhf", q, self.gate[:, e])
            up = torch.einsum("blhd,hfd->blhf", q, self.up[:, e])
            down = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down[:, e])
            out += r[..., e, None] * down
        return self.outputs(out.to(q.dtype).flatten(2))


class Shared(FlashMHF):
    """One nn.Linear in float32 routes every head."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(d, E)

    def route(self, q: Tensor) -> Tensor:
        return self.linear(q.float()).softmax(-1)


class Twice(FlashMHF):
    """The same logits are read by the router and returned."""

    def forward(self, x: Tensor) -> Any:
        q = self.norm(self.inputs(x).unflatten(-1, (H, d)))
        logits = torch.einsum("blhd,hde->blhe", q.float(), self.router.float())
        gate = torch.einsum("blhd,hefd->blhef", q, self.gate)
        up = torch.einsum("blhd,hefd->blhef", q, self.up)
        hidden = F.silu(gate) * up * logits.softmax(-1).to(q.dtype).unsqueeze(-1)
        return torch.einsum("blhef,hefd->blhd", hidden, self.down), logits.square().mean()


def run(model: Callable[..., Any], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, and the gradients of their sum."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    outs = list(out) if isinstance(out, tuple) else [out]
    sum(o.float().square().sum() for o in outs).backward()
    return [*outs, x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def calls(report: mhf_compiler.Report) -> str:
    return "\n".join(graph.after for graph in report.graphs)


@pytest.mark.parametrize("make", [FlashMHF, lambda: FlashMHF(bias=True), Shared, Twice])
@pytest.mark.parametrize("dynamic", [False, True])
def test_results_and_gradients_are_the_same(make: Callable[[], nn.Module], dynamic: bool):
    module, x = make(), torch.randn(B, L, H * d).bfloat16()
    options = {"rewrite": "always", "strict": True, "fallback": "aot_eager"}
    compiled = torch.compile(module, backend="flashmhf", options=options, dynamic=dynamic)
    found, expected = run(compiled, module, x), run(module, module, x)
    exact = copy.deepcopy(module).float()
    exacts = run(exact, exact, x.float())
    assert torch._dynamo.utils.counters["flashmhf"]["sites_rewritten"] == 1
    for one, plain, reference in zip(found, expected, exacts, strict=True):
        assert one.dtype is plain.dtype
        assert one.stride() == plain.stride()
        allowed = 2 * (plain - reference).norm() + 1e-3 * reference.norm()
        assert (one - reference).norm() <= allowed


def test_the_queries_are_not_widened_and_the_report_says_so():
    module, x = FlashMHF(), torch.randn(B, L, H * d).bfloat16()
    report = mhf_compiler.explain(module, options={"rewrite": "always"})(x)
    assert "router_product" in calls(report)
    assert "= q.float()" not in calls(report)
    (site,) = report.rewritten
    assert "the router's product reads q in bfloat16, without a copy" in site.lowered


def test_logits_lie_as_kernels_read_them_where_rows_of_tokens_are_aligned():
    for length, order in ((L, "out_order = [2, 3, 0, 1]"), (L + 1, "out_order = [2, 0, 1, 3]")):
        x = torch.randn(B, length, H * d).bfloat16()
        report = mhf_compiler.explain(FlashMHF(), options={"rewrite": "always"})(x)
        assert order in calls(report)


def test_a_router_of_float32_queries_stays():
    module, x = FlashMHF().float(), torch.randn(B, L, H * d)
    report = mhf_compiler.explain(module, options={"rewrite": "always"})(x)
    assert report.rewritten
    assert "router_product" not in calls(report)


def test_a_network_that_stays_keeps_its_router():
    module, x = FlashMHF(), torch.randn(B, L, H * d).bfloat16()
    report = mhf_compiler.explain(module, options={"rewrite": "never"})(x)
    assert "router_product" not in calls(report)


def test_a_product_whose_kernel_fails_stays(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(router, "trial_run", fail)
    module, x = FlashMHF(), torch.randn(B, L, H * d).bfloat16()
    with pytest.warns(match=r"the product before a router at .*no such instruction"):
        report = mhf_compiler.explain(module, options={"rewrite": "always"})(x)
    assert report.rewritten
    assert "router_product" not in calls(report)


@pytest.mark.filterwarnings("error")
def test_for_a_card_that_is_not_there_no_kernel_is_tried():
    with torch.device("meta"):
        model, x = FlashMHF(), torch.empty(B, L, H * d, dtype=torch.bfloat16)
    report = mhf_compiler.explain(model, device="cuda:h100", options={"rewrite": "always"})(x)
    (site,) = report.rewritten
    assert "the router's product reads q in bfloat16, without a copy" in site.lowered


def test_the_queries_are_computed_once():
    """The norm's result is written for the first of its readers, and read by the second."""
    code = """
import torch
from torch._inductor.utils import run_and_get_code
from tests.mhf_compiler.substitution.test_router import FlashMHF, H, d
model = torch.compile(FlashMHF(), backend="flashmhf", options={"rewrite": "always"})
with torch.no_grad():
    _, (code,) = run_and_get_code(model, torch.randn(2, 16, H * d).bfloat16())
product, network = (
    next(line for line in code.splitlines() if f"mhf_compiler.{op}.compiled(" in line)
    for op in ("router_product", "multi_head_ffn_over_query")
)
query = [line.split(".compiled(")[1].split(",")[0] for line in (product, network)]
assert query[0] == query[1], query
"""
    # In a process of its own: Inductor learns about an op from the first call that it lowers.
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
