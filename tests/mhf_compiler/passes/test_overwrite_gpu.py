"""The memory that a compiled FFN takes on a GPU, in tensors of the size of its queries."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from mhf_compiler.passes.manager import PASSES

pytestmark = pytest.mark.gpu

B, L, H, E, d, f = 2, 4096, 8, 16, 128, 32
QUERY = B * L * H * d * 2  # bytes


class FFN(nn.Module):
    """As in the paper: a router in float32 and sub-networks, between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = (nn.Linear(H * d, H * d, bias=False) for _ in range(2))
        self.router = nn.Parameter(torch.randn(H, d, E) / d**0.5)
        self.gate, self.up = (nn.Parameter(torch.randn(H, E, f, d) / d**0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, E, f, d) / f**0.5)
        self.to("cuda", torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inputs(x).unflatten(-1, (H, d))
        r = torch.einsum("blhd,hde->blhe", q.float(), self.router.float()).sigmoid().to(q.dtype)
        gate = torch.einsum("blhd,hefd->blhef", q, self.gate)
        up = torch.einsum("blhd,hefd->blhef", q, self.up)
        down = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, self.down)
        return self.outputs((down * r.unsqueeze(-1)).sum(3).flatten(2))


def peak(run: Callable[[], object]) -> float:
    """What a second run allocates at most beyond what there was, in queries."""
    run()
    torch.cuda.synchronize()
    gc.collect()  # frames of the compilation hold the results of the first run, in cycles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / QUERY


def peaks(
    monkeypatch: pytest.MonkeyPatch, make_run: Callable[[], Callable[[], object]]
) -> tuple[float, float]:
    """The peaks of what is compiled with the pass, and without it."""
    found = []
    for run_pass in (PASSES["mhf_overwrite"], lambda graph: []):
        monkeypatch.setitem(PASSES, "mhf_overwrite", run_pass)
        torch.compiler.reset()
        with fresh_cache():
            found.append(peak(make_run()))
    return found[0], found[1]


def test_inference_takes_two_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries, whose memory the result takes, and the output."""
    torch.manual_seed(0)
    module, x = FFN(), torch.randn(B, L, H * d, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        right = module(x)

    def make_run() -> Callable[[], object]:
        model = torch.compile(module, backend="flashmhf", options={"rewrite": "always"})
        with torch.no_grad():
            assert (model(x) - right).norm() <= 2e-2 * right.norm()
        return torch.no_grad()(lambda: model(x))

    reused, elsewhere = peaks(monkeypatch, make_run)
    assert reused <= 2.1
    assert reused <= elsewhere - 0.1  # the queries, the result and R, an eighth of them, at once


def test_training_saves_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the queries takes the memory of that of the result."""
    torch.manual_seed(0)
    module = FFN()
    x = torch.randn(B, L, H * d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves, grad = [x, *module.parameters()], torch.randn_like(x)
    right = torch.autograd.grad(module(x), leaves, grad)

    def make_run() -> Callable[[], object]:
        model = torch.compile(module, backend="flashmhf", options={"rewrite": "always"})
        step = lambda: torch.autograd.grad(model(x), leaves, grad)  # noqa: E731
        for found, exact in zip(step(), right, strict=True):
            assert (found - exact).norm() <= 3e-2 * exact.norm()
        return step

    reused, elsewhere = peaks(monkeypatch, make_run)
    assert reused <= elsewhere - 0.7
