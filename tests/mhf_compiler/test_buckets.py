"""Networks in DistributedDataParallel, whose buckets cut Dynamo's graph: they are kept whole.

The weights of every network here are larger than a bucket, so that without care each is cut.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.inductor import NO_CPP
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mhf_compiler
import mhf_compiler.buckets
import mhf_compiler.compat
from mhf_compiler import DeclineKind, MhfCompilerWarning
from mhf_compiler.compat import counters

ALWAYS = {"rewrite": "always", "fallback": "aot_eager", "strict": True}
LAYERS = 2


class Layer(nn.Module):
    """A linear layer and a SwiGLU for each of four heads: a weight is larger than a bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)
        self.gate, self.up = (nn.Parameter(torch.randn(4, 2100, 32) / 6) for _ in range(2))
        self.down = nn.Parameter(torch.randn(4, 2100, 32) / 50)

    def network(self, x: Tensor) -> Tensor:
        q = self.linear(x).unflatten(-1, (4, 32))
        gate, up = (torch.einsum("blhd,hfd->blhf", q, w) for w in (self.gate, self.up))
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.network(x)


class Tower(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class AllStates(Tower):
    """Every layer's result is returned, as Transformers do with output_hidden_states."""

    def forward(self, x: Tensor) -> Any:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class Checkpointed(Tower):
    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Autocast(Tower):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = super().forward(x)
        return x.float()


class Routed(Layer):
    """Three sub-networks, one after the other, which are weighted by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 3)
        del self.gate, self.up, self.down
        self.gates, self.ups, self.downs = (
            nn.ParameterList(torch.randn(4, 2100, 32) / scale for _ in range(3))
            for scale in (6, 6, 50)
        )

    def network(self, x: Tensor) -> Tensor:
        q = self.linear(x).unflatten(-1, (4, 32))
        weights = self.router(q).sigmoid()
        out = torch.zeros_like(q)
        for e, (gate, up, down) in enumerate(zip(self.gates, self.ups, self.downs, strict=True)):
            hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate))
            hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up)
            out = out + weights[..., e, None] * torch.einsum("blhf,hfd->blhd", hidden, down)
        return out.flatten(2)


class Buffered(Layer):
    """Counts its calls in a buffer, in place, in the middle of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.network(x) * self.calls


class WithoutNetworks(Layer):
    """Two products with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        del self.up

    def network(self, x: Tensor) -> Tensor:
        q = self.linear(x).unflatten(-1, (4, 32))
        hidden = torch.einsum("blhd,hfd->blhf", q, self.gate)
        return torch.einsum("blhf,hfd->blhd", hidden, self.down).flatten(2)


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def step(model: Callable[..., Any], parameters: nn.Module, x: Tensor) -> list[Tensor]:
    """Results and gradients of a training step."""
    parameters.zero_grad(set_to_none=True)
    out = tensors(model(x))
    sum(y.square().mean() for y in out).backward()
    return [
        *(y.detach() for y in out),
        *(p.grad for p in parameters.parameters() if p.grad is not None),
    ]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of operations in every part that is compiled."""
    seen: list[int] = []
    compile_graph = mhf_compiler.compat.compile_graph

    def spy(name: str, gm: torch.fx.GraphModule, *others: Any) -> Any:
        seen.append(len(gm.graph.nodes))
        return compile_graph(name, gm, *others)

    monkeypatch.setattr(mhf_compiler.compat, "compile_graph", spy)
    return seen


def wrapped(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=1)


def check(model: nn.Module, tolerance: dict[str, float] | None = None, **options: Any) -> None:
    """Compare two training steps with those of the plain module."""
    ddp, x = wrapped(model), torch.randn(2, 5, 128)
    compiled = torch.compile(ddp, backend="flashmhf", options=ALWAYS | options)
    for _ in range(2):
        found, expected = step(compiled, ddp, x), step(model, model, x)
        torch.testing.assert_close(found, expected, **tolerance or {"rtol": 1e-4, "atol": 1e-5})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tower": Tower,
    "all states": AllStates,
    "checkpointed": Checkpointed,
    "routed": lambda: Tower(Routed),
    "buffered": lambda: Tower(Buffered),
}


# The fallback gets the same parts; one that traces nothing is given what each kind returns.
@pytest.mark.parametrize(
    ("name", "fallback"),
    [*((name, "aot_eager") for name in MODELS), ("all states", "eager"), ("buffered", "eager")],
)
def test_every_network_is_kept_whole(name: str, fallback: str):
    check(MODELS[name](), fallback=fallback)
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS
    assert counters["flashmhf"]["graphs"] == 1


def test_under_autocast():
    check(Autocast(), {"rtol": 2e-2, "atol": 2e-2})
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS


def test_through_inductor():
    check(Tower(), fallback="inductor", **NO_CPP)
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS


class _Backward(TorchDispatchMode):
    """Counts the networks whose backward pass has run."""

    networks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.networks += func is torch.ops.mhf_compiler.multi_head_ffn_backward.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("optimize_ddp", [True, False])
def test_a_bucket_is_sent_during_the_backward_pass(optimize_ddp: bool):
    """As Dynamo's parts are for; a graph that is not cut computes all gradients first."""
    ddp, backward, sent = wrapped(Tower()), _Backward(), []

    def send(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(backward.networks)
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, send)
    with torch._dynamo.config.patch(optimize_ddp=optimize_ddp):
        compiled = torch.compile(ddp, backend="flashmhf", options=ALWAYS)
        for _ in range(2):  # DDP has one bucket only until it has seen a backward pass
            out = compiled(torch.randn(2, 5, 128))
            backward.networks = 0
            sent.clear()
            with backward:
                out.sum().backward()
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS
    assert min(sent) == (1 if optimize_ddp else LAYERS)
    assert max(sent) == LAYERS


def test_a_dynamic_number_of_tokens():
    model = Tower()
    ddp = wrapped(model)
    compiled = torch.compile(ddp, backend="flashmhf", options=ALWAYS, dynamic=True)
    for length in (5, 7, 9):
        x = torch.randn(2, length, 128)
        found, expected = step(compiled, ddp, x), step(model, model, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["flashmhf"]["graphs"] == 1


def test_inference():
    model = Tower().eval()
    compiled = torch.compile(wrapped(model), backend="flashmhf", options=ALWAYS)
    x = torch.randn(2, 5, 128)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS


def test_without_networks_dynamos_parts_are_compiled(parts: list[int]):
    check(Tower(WithoutNetworks))
    assert counters["flashmhf"]["sites_rewritten"] == 0
    assert len(parts) > 1


def test_layers_that_share_the_parts_of_a_graph_count_all():
    """Dynamo compiles the layers of ``nn.Sequential`` in DDP one by one, each in two parts."""
    model = nn.Sequential(*(Layer() for _ in range(4)))
    compiled = torch.compile(wrapped(model), backend="flashmhf", options=ALWAYS)
    for _ in range(2):
        compiled(torch.randn(2, 5, 128))
    assert counters["flashmhf"]["graphs"] == 4  # two of them, one of which is used for three layers
    assert counters["flashmhf"]["sites_rewritten"] == 4
    report = mhf_compiler.compilation_report(compiled)
    assert [site.runs for site in report.rewritten] == [
        ("module.0",),
        ("module.1", "module.2", "module.3"),
    ]


def test_explain_looks_at_the_whole_graph():
    report = mhf_compiler.explain(wrapped(Tower()), options=ALWAYS)(torch.randn(2, 5, 128))
    assert len(report.graphs) == 1
    assert len(report.rewritten) == LAYERS


# Where they cannot be kept whole.


def test_networks_that_do_not_fit_between_the_parts_are_declined(monkeypatch: pytest.MonkeyPatch):
    def does_not_fit(*args: Any) -> Any:
        raise mhf_compiler.buckets.CutError("part 1 of 4 does not get q")

    monkeypatch.setattr(mhf_compiler.buckets, "fit", does_not_fit)
    with pytest.warns(MhfCompilerWarning, match="optimize_ddp = False.*bucket_cap_mb"):
        check(Tower())
    assert counters["flashmhf"]["sites_rewritten"] == 0
    assert counters["flashmhf"][f"declined.{DeclineKind.CUT_BY_BUCKETS.name}"] == LAYERS


def test_a_cut_that_cannot_be_seen_is_said(monkeypatch: pytest.MonkeyPatch):
    """As where PyTorch has changed: each part is looked at by itself, and the loss is no secret."""
    monkeypatch.setattr(mhf_compiler.compat, "bucket_cut", lambda: None)
    model, x = Tower(), torch.randn(2, 5, 128)
    compiled = torch.compile(wrapped(model), backend="flashmhf", options=ALWAYS | {"strict": False})
    with pytest.warns(MhfCompilerWarning, match="optimize_ddp = False.*bucket_cap_mb") as caught:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len([w for w in caught if w.category is MhfCompilerWarning]) == 1
    assert counters["flashmhf"]["failures.buckets"] == 1


def test_a_fault_leaves_dynamos_parts_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(mhf_compiler.buckets, "fit", broken)
    model, x = Tower(), torch.randn(2, 5, 128)
    options = ALWAYS | {"strict": False}
    compiled = torch.compile(wrapped(model), backend="flashmhf", options=options)
    with pytest.warns(MhfCompilerWarning, match="RuntimeError: a bug"):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["flashmhf"]["sites_rewritten"] == 0
    assert counters["flashmhf"]["failures"] == 1


# Two processes.


def test_two_processes(tmp_path: Path):
    run_ranks(Path(__file__).parent / "bucketed.py", 2, tmp_path)
