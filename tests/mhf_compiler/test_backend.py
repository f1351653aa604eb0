"""The back end: what it counts, what it does when something fails, and what it leaves alone."""

import copy
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks
from support.forks import run_code
from support.inductor import NO_CPP, no_caches
from support.networks import HEADS, Heads
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mhf_compiler.compat
import mhf_compiler.lowering.cost
import mhf_compiler.lowering.workload
import mhf_compiler.patterns.canonical
import mhf_compiler.substitution.graph
from mhf_compiler import MhfCompilerWarning
from mhf_compiler.compat import counters
from mhf_compiler.lowering.cost import Estimate
from mhf_compiler.options import parse_options
from mhf_compiler.patterns import Unreadable
from mhf_compiler.substitution.emit import EditError
from mhf_compiler.substitution.graph import rewrite_graph

ALWAYS = {"rewrite": "always", "fallback": "eager"}


class Unpaired(Heads):
    """The halves of the projections belong to different heads: a near-miss."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        hidden = F.silu(q @ self.gate) * (q.flip(1) @ self.up)
        return (hidden @ self.down).transpose(1, 2).flatten(2)


class WithoutHeads(nn.Module):
    """Nothing to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).sin()


class Breaking(nn.Module):
    """Two MH-FFNs with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Heads(), Heads()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        torch._dynamo.graph_break()
        return x + self.second(x)


def tokens() -> Tensor:
    return torch.randn(2, 6, 32)


def tallied() -> dict[str, int]:
    names = ("graphs", "sites_rewritten", "sites_declined", "failures")
    return {name: counters["flashmhf"][name] for name in names}


def run(model: Callable[[Tensor], Tensor], **options: Any) -> None:
    """Compile a model, run it once and compare."""
    x = tokens()
    compiled = torch.compile(model, backend="flashmhf", options=ALWAYS | options)
    torch.testing.assert_close(compiled(x), model(x))


# What is counted.


@pytest.mark.parametrize(
    ("model", "graphs", "rewritten", "declined"),
    [
        (Heads, 1, 1, 0),
        (Unpaired, 1, 0, 1),
        (WithoutHeads, 1, 0, 0),
        (Breaking, 2, 2, 0),
        (lambda: nn.Sequential(Heads(), Unpaired(), Heads()), 1, 2, 1),
    ],
    ids=["one", "near-miss", "none", "graph break", "several"],
)
def test_counters(
    model: Callable[[], nn.Module], graphs: int, rewritten: int, declined: int
) -> None:
    run(model())
    assert tallied() == {
        "graphs": graphs,
        "sites_rewritten": rewritten,
        "sites_declined": declined,
        "failures": 0,
    }


def test_a_graph_is_compiled_once_for_many_calls():
    compiled = torch.compile(Heads(), backend="flashmhf", options=ALWAYS)
    for _ in range(3):
        compiled(tokens())
    assert tallied()["graphs"] == 1


@pytest.mark.parametrize(
    ("rewrite", "pays", "rewritten", "declined"),
    [
        ("always", True, 1, 0),
        ("always", False, 1, 0),
        ("auto", True, 1, 0),
        ("auto", False, 0, 1),
        ("never", True, 0, 0),
        ("never", False, 0, 0),
    ],
)
def test_rewrite(
    rewrite: str, pays: bool, rewritten: int, declined: int, monkeypatch: pytest.MonkeyPatch
):
    estimate = Estimate(1.0, 2.0) if pays else Estimate(2.0, 1.0)
    monkeypatch.setattr(mhf_compiler.lowering.cost, "estimate", lambda workload: estimate)
    run(Heads(), rewrite=rewrite)
    assert tallied()["sites_rewritten"] == rewritten
    assert tallied()["sites_declined"] == declined


# When something fails.


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a bug in the compiler")


@pytest.mark.parametrize("part", ["find_sites", "rewrite"])
def test_a_failure_leaves_the_graph_as_it_is_with_one_warning(
    part: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mhf_compiler.substitution.graph, part, _broken)
    with pytest.warns(MhfCompilerWarning, match="RuntimeError: a bug in the compiler") as caught:
        run(Heads())
    assert len([w for w in caught if w.category is MhfCompilerWarning]) == 1
    assert tallied()["failures"] == 1
    assert tallied()["sites_rewritten"] == 0


@pytest.mark.parametrize("part", ["find_sites", "rewrite"])
def test_strict_lets_a_failure_through(part: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mhf_compiler.substitution.graph, part, _broken)
    with pytest.raises(Exception, match="a bug in the compiler"):
        run(Heads(), strict=True)
    assert tallied()["failures"] == 1


STAGES = [  # every place where the back end calls what is ours, except for the passes
    # What only tells is at the end.
    "substitution.graph.inner_graphs",
    "substitution.graph.find_sites",
    "substitution.graph.decide",
    "substitution.graph.find_router_products",
    "substitution.graph.rewrite",
    "substitution.guard.check",
    "substitution.graph._describe",
    "compilation.with_post_grad_passes",
    "compat.tell_inductor_of",
    "passes.manager.fix_layouts",
    "compilation.announce_fusions",
    "substitution.graph.graph_break",
    "substitution.graph.announce",
    "debug.dump.dump",
]
_ONLY_REPORTING = STAGES[-4:]
_IN_INDUCTOR = STAGES[-6:-3]
AOT = {"fallback": "aot_eager"}


@pytest.fixture(params=STAGES)
def broken_stage(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """A part of the back end that raises, and the options with which it is called."""
    module, _, name = request.param.rpartition(".")
    monkeypatch.setattr(importlib.import_module(f"mhf_compiler.{module}"), name, _broken)
    with no_caches():
        yield {"fallback": "inductor"} | NO_CPP if request.param in _IN_INDUCTOR else AOT


def test_no_failure_reaches_the_user(broken_stage: dict[str, Any], tmp_path: Path):
    model = nn.Sequential(Heads(), Unpaired(), Heads())
    with pytest.warns(MhfCompilerWarning, match="RuntimeError: a bug in the compiler") as caught:
        run(model, dump_dir=tmp_path, **broken_stage)
    assert len([w for w in caught if w.category is MhfCompilerWarning]) == 1
    causes = [name for name in counters["flashmhf"] if name.startswith("failures.")]
    assert tallied()["failures"] == len(causes) == 1  # Inductor puts errors into one of its own


def test_every_failure_is_raised_under_strict(
    request: pytest.FixtureRequest, broken_stage: dict[str, Any], tmp_path: Path
):
    """Except for one that changes nothing of what is compiled."""
    if request.node.callspec.params["broken_stage"] in _ONLY_REPORTING:
        raises: Any = pytest.warns(MhfCompilerWarning, match="the compiled model is not affected")
    else:
        raises = pytest.raises(Exception, match="a bug in the compiler")
    with raises:
        run(Heads(), dump_dir=tmp_path, strict=True, **broken_stage)


class Checkpointed(nn.Module):
    """A network in a graph of its own, and one around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Heads(), Heads()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def test_graphs_inside_are_restored_too(monkeypatch: pytest.MonkeyPatch):
    """The inner graph is rewritten before the outer one, where the fault is."""
    whole, calls = mhf_compiler.substitution.graph.rewrite, []

    def rewrite(*given: Any, **how: Any) -> Any:
        calls.append(given)
        return whole(*given, **how) if len(calls) == 1 else _broken()

    monkeypatch.setattr(mhf_compiler.substitution.graph, "rewrite", rewrite)
    reports: list[Any] = []

    def collect(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        before = gm.print_readable(print_output=False)
        reports.append(rewrite_graph(gm, parse_options(None, ALWAYS)))
        assert gm.print_readable(print_output=False) == before
        return gm.forward

    with pytest.warns(MhfCompilerWarning):
        torch.compile(Checkpointed(), backend=collect)(tokens())
    assert len(calls) == 2
    (report,) = reports
    assert report.rewritten == []
    assert [one.reason.kind for one in report.unread] == [Unreadable.COMPILER_FAULT]


def test_one_cause_is_told_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mhf_compiler.substitution.graph, "find_sites", _broken)
    with pytest.warns(MhfCompilerWarning) as caught:
        run(Breaking())
    assert len([w for w in caught if w.category is MhfCompilerWarning]) == 1
    assert tallied()["failures"] == 2


# Graphs that are not analysed.


class SwitchedOff(Heads):
    """Takes the gradient off a tensor in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2) + x.exp().detach_()


def test_a_program_that_is_not_analysed():
    """It is no failure: it is counted by its reason, told once, and listed first."""
    with pytest.warns(MhfCompilerWarning, match="SWITCHED_GRADIENT") as caught:
        run(SwitchedOff())
    assert len([w for w in caught if w.category is MhfCompilerWarning]) == 1
    assert tallied()["failures"] == 0
    assert counters["flashmhf"]["unread"] == counters["flashmhf"]["unread.SWITCHED_GRADIENT"] == 1
    with pytest.warns(MhfCompilerWarning):
        report = mhf_compiler.explain(SwitchedOff(), options=ALWAYS)(tokens())
    with pytest.raises(Exception, match="SWITCHED_GRADIENT"):
        run(SwitchedOff(), strict=True)
    (unread,) = report.unread
    assert unread.location is not None
    assert "detach_()" in unread.location.code
    assert str(report).splitlines()[2] == "Not analysed"
    assert report.to_dict()["graphs"][0]["unread"][0]["reason"]["kind"] == "SWITCHED_GRADIENT"
    with (
        pytest.warns(MhfCompilerWarning),
        pytest.raises(AssertionError, match="1 graphs were not analysed"),
    ):
        mhf_compiler.assert_rewritten(SwitchedOff(), (tokens(),))


READING = [
    ("tracer._Tracer", "_begin"),
    ("tracer._Tracer", "_end"),
    ("recorder.Recorder", "record"),
    ("memory.Memory", "read"),
    ("memory.Memory", "finish"),
]


@pytest.mark.parametrize(("where", "method"), READING)
def test_a_fault_while_a_graph_is_read_is_no_property_of_the_program(
    where: str, method: str, monkeypatch: pytest.MonkeyPatch
):
    module, _, name = where.partition(".")
    reader = getattr(importlib.import_module(f"mhf_compiler.patterns.{module}"), name)
    monkeypatch.setattr(reader, method, _broken)
    with pytest.warns(MhfCompilerWarning, match="a bug in the compiler"):
        run(Heads())
    assert tallied()["failures"] == 1
    torch.compiler.reset()
    with pytest.raises(Exception, match="a bug in the compiler"):
        run(Heads(), strict=True)
    with (
        pytest.warns(MhfCompilerWarning),
        pytest.raises(AssertionError, match="the compiler itself failed"),
    ):
        mhf_compiler.assert_rewritten(Heads(), (tokens(),), sites=0)


def test_strict_is_content_with_near_misses():
    """What is not proved is not a failure."""
    run(Unpaired(), strict=True)
    assert tallied()["failures"] == 0


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of every graph that reaches the fallback."""
    seen: list[str] = []
    compile_graph = mhf_compiler.compat.compile_graph

    def spy(name: str, gm: torch.fx.GraphModule, *others: Any) -> Any:
        seen.append(gm.code)
        return compile_graph(name, gm, *others)

    monkeypatch.setattr(mhf_compiler.compat, "compile_graph", spy)
    return seen


def dynamo_graphs(model: Callable[[Tensor], Tensor]) -> list[str]:
    """The code of every graph that Dynamo gives to a back end."""
    seen: list[str] = []

    def collect(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append(gm.code)
        return gm.forward

    torch.compiler.reset()
    torch.compile(model, backend=collect)(tokens())
    torch.compiler.reset()
    return seen


@pytest.mark.parametrize("part", ["find_sites", "rewrite"])
def test_the_graph_is_untouched_after_a_failure(
    part: str, monkeypatch: pytest.MonkeyPatch, compiled_graphs: list[str]
):
    model = nn.Sequential(Heads(), Heads())
    graphs = dynamo_graphs(model)
    monkeypatch.setattr(mhf_compiler.substitution.graph, part, _broken)
    with pytest.warns(MhfCompilerWarning):
        run(model)
    assert compiled_graphs == graphs


def test_a_site_that_cannot_be_expressed_is_declined_and_the_others_rewritten(
    monkeypatch: pytest.MonkeyPatch,
):
    whole = mhf_compiler.substitution.graph.rewrite

    def rewrite(graph: torch.fx.Graph, sites: Any, copy: Any, **how: Any) -> torch.fx.Graph:
        if len(sites) == 3:
            error = EditError("it is in the way")
            error.site = sites[1]
            raise error
        return whole(graph, sites, copy)

    monkeypatch.setattr(mhf_compiler.substitution.graph, "rewrite", rewrite)
    run(nn.Sequential(Heads(), Heads(), Heads()), strict=True)
    assert tallied() == {"graphs": 1, "sites_rewritten": 2, "sites_declined": 1, "failures": 0}


def test_a_kernel_that_cannot_run_leaves_its_site_in_the_original_spelling(
    monkeypatch: pytest.MonkeyPatch, compiled_graphs: list[str]
):
    """Under strict it is an error, as every fault of ours."""
    model = Heads()
    graphs = dynamo_graphs(model)

    def trial_run(workload: Any) -> None:
        raise RuntimeError("out of resources: shared memory\nand a long story")

    monkeypatch.setattr(mhf_compiler.lowering.workload, "trial_run", trial_run)
    line = next(
        n
        for n, text in enumerate(Path(networks.__file__).read_text().splitlines(), 1)
        if "(hidden @ self.down)" in text
    )
    with pytest.warns(
        MhfCompilerWarning, match=f"{networks.__file__}:{line} failed.*out of resources"
    ):
        run(model)
    assert compiled_graphs == graphs
    assert tallied() == {"graphs": 1, "sites_rewritten": 0, "sites_declined": 1, "failures": 1}
    assert counters["flashmhf"]["failures.kernel"] == 1
    torch.compiler.reset()
    with pytest.raises(Exception, match="out of resources"):
        run(model, strict=True)


def test_the_kernel_of_each_site_is_tried_by_itself(monkeypatch: pytest.MonkeyPatch):
    tried: list[int] = []

    def trial_run(workload: Any) -> None:
        tried.append(workload.sizes.heads)
        if len(tried) == 1:
            raise RuntimeError("only the first does not run")

    monkeypatch.setattr(mhf_compiler.lowering.workload, "trial_run", trial_run)
    with pytest.warns(MhfCompilerWarning):
        run(nn.Sequential(Heads(), Heads()))
    assert tried == [4, 4]
    assert tallied()["sites_rewritten"] == 1


# Models without an MH-FFN.


@pytest.mark.parametrize("model", [WithoutHeads, Unpaired])
def test_the_fallback_gets_dynamos_own_graph(
    model: Callable[[], nn.Module], compiled_graphs: list[str]
):
    module = model()
    graphs = dynamo_graphs(module)
    run(module)
    assert compiled_graphs == graphs


def test_inductor_generates_the_same_code_as_without_the_back_end():
    model, x = WithoutHeads(), tokens()
    with torch.no_grad(), no_caches():
        found: dict[str, list[str]] = {}
        for backend in ("inductor", "flashmhf"):
            torch.compiler.reset()
            _, codes = run_and_get_code(torch.compile(model, backend=backend), x)
            found[backend] = [re.sub("# AOT ID: .*", "", code) for code in codes]
    assert len(found["inductor"]) == 1
    assert found["flashmhf"] == found["inductor"]


# How it is called.

BY_NAME = f"""
import sys, torch
from torch import nn
{HEADS}
assert "flashmhf" in torch.compiler.list_backends()
assert "mhf_compiler" not in sys.modules
model, x = Heads(), torch.randn(4, 6, 8)
options = {{"fallback": "eager", "rewrite": "always"}}
out = torch.compile(model, backend="flashmhf", options=options)(x)
torch.testing.assert_close(out, model(x))
print(torch._dynamo.utils.counters["flashmhf"]["sites_rewritten"])
"""


def test_by_name_alone_in_a_new_process(tmp_path: Path):
    done = run_code(BY_NAME, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"


@pytest.mark.parametrize("fallback", ["eager", "aot_eager", "inductor"])
def test_every_fallback_agrees_with_eager(fallback: str):
    model, x = Heads(), tokens()
    compiled = torch.compile(model, backend="flashmhf", options=ALWAYS | {"fallback": fallback})
    torch.testing.assert_close(compiled(x), model(x))
    parameters = list(model.parameters())
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert tallied()["sites_rewritten"] == 1


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.mark.parametrize("fallback", ["eager", "aot_eager"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("prepare", [nn.Module.eval, _frozen], ids=["parameters", "frozen"])
def test_inference(fallback: str, context: Any, prepare: Callable[[nn.Module], nn.Module]):
    with context():
        run(prepare(Heads()), fallback=fallback, strict=True)
    assert tallied()["sites_rewritten"] == 1


def test_forward_mode_keeps_the_original_spelling():
    """A tangent comes out as in eager; what was rewritten before refuses to lose it."""
    model, x, direction = Heads(), tokens(), tokens()
    options = ALWAYS | {"fallback": "aot_eager"}
    _, expected = torch.func.jvp(model, (x,), (direction,))
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        out = torch.compile(model, backend="flashmhf", options=options)(dual)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)
        assert counters["flashmhf"]["declined.FORWARD_MODE"] == 1
    torch.compiler.reset()
    compiled = torch.compile(model, backend="flashmhf", options=options)
    compiled(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        compiled(forward_ad.make_dual(x, direction))


class MovingBias(Heads):
    """A bias that is moved after its use. Eager saves no bias; the op computes with it again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(4, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        out = (F.silu(q @ self.gate + self.bias) * (q @ self.up)) @ self.down
        with torch.no_grad():
            self.bias.mul_(0.9)
        return out.transpose(1, 2).flatten(2)


def test_a_bias_that_the_forward_pass_moves():
    """It stays in its original spelling where gradients are recorded, and only there."""
    model, x = MovingBias(), tokens()
    compiled = torch.compile(copy.deepcopy(model), backend="flashmhf", options=ALWAYS)
    model(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for expected, found in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert counters["flashmhf"]["declined.MUTATION"] == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert counters["flashmhf"]["sites_rewritten"] == 1


def test_some_parameters_frozen():
    """What needs gradients gets them, what is frozen gets none."""
    model, x = Heads(), tokens()
    model.up.requires_grad_(False)
    compiled = torch.compile(model, backend="flashmhf", options=ALWAYS)
    compiled(x).sum().backward()
    assert model.up.grad is None
    found = model.gate.grad, model.down.grad
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(found, (model.gate.grad, model.down.grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"options": {"mode": "reduce-overhead"}},
        {"mode": "reduce-overhead"},
        {"options": {"triton.cudagraphs": True}},
    ],
    ids=["option", "argument", "setting"],
)
def test_modes_reach_inductor(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    given: list[dict[str, Any]] = []

    def compile_fx(gm: torch.fx.GraphModule, example_inputs: Any, config_patches: Any) -> Any:
        given.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, x = Heads(), tokens()
    torch.testing.assert_close(torch.compile(model, backend="flashmhf", **how)(x), model(x))
    assert given == [{"triton.cudagraphs": True}]


#: a parameter (4, 16, 8) of each layout
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(4, 16, 8),
    "transposed": lambda: torch.randn(4, 8, 16).transpose(1, 2),
    "permuted": lambda: torch.randn(8, 16, 4).permute(2, 1, 0),
    "part of a packed tensor": lambda: torch.randn(4, 16, 3, 8)[:, :, 1],
    "slice of a flat vector": lambda: torch.randn(2000)[7 : 7 + 512].view(4, 16, 8),
    "expanded": lambda: torch.randn(1, 16, 8).expand(4, 16, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_leaves_have_the_strides_that_they_have_in_eager(layout: str):
    def network(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8))
        hidden = F.silu(torch.einsum("blhd,hfd->blhf", q, gate))
        hidden = hidden * torch.einsum("blhd,hfd->blhf", q, up)
        return torch.einsum("blhf,hfd->blhd", hidden, down).flatten(-2)

    made = LAYOUTS[layout]
    leaves = [nn.Parameter(x) for x in (torch.randn(6, 2, 32).transpose(0, 1), *_times(3, made))]
    options = {"rewrite": "always", "fallback": "aot_eager", "strict": True}
    run = torch.compile(network, backend="flashmhf", options=options)
    network(*leaves).sum().backward()
    strides = [one.grad.stride() for one in leaves]
    for rounds in range(2):  # the second adds to gradients that are there
        for one in leaves if rounds == 0 else ():
            one.grad = None
        run(*leaves).sum().backward()
        assert [one.grad.stride() for one in leaves] == strides
    assert counters["flashmhf"]["sites_rewritten"] == 1
    # Before autograd's own contract they have those of the arguments, if these are dense.
    for one, gradient in zip(leaves, torch.autograd.grad(run(*leaves).sum(), leaves), strict=True):
        assert gradient.stride() == torch.empty_like(one).stride()


def _times(number: int, made: Callable[[], Tensor]) -> Iterator[Tensor]:
    return (made() for _ in range(number))


def test_reset_drops_cuda_graphs(monkeypatch: pytest.MonkeyPatch):
    """As ``torch.compiler.reset`` does for Inductor."""
    calls: list[str] = []
    monkeypatch.setattr(mhf_compiler.compat, "reset_cuda_graphs", lambda: calls.append("reset"))
    run(Heads())
    torch.compiler.reset()
    assert calls == ["reset"]


def test_nothing_is_said_when_all_goes_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error", MhfCompilerWarning)
        run(Breaking())


# Dumps.


def test_dump_dir_receives_graphs_and_reports(tmp_path: Path):
    """In a folder for each graph; what is in it, test_dumping.py tells."""
    folder = tmp_path / "not" / "yet" / "there"
    run(Breaking(), dump_dir=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["graph_0", "graph_1", "index.md"]
    for report in folder.glob("*/report.txt"):
        assert report.read_text().startswith("1 MH-FFN rewritten, 0 declined, in 1 graph\n")


def test_dump_dir_given_as_text(tmp_path: Path):
    run(WithoutHeads(), dump_dir=str(tmp_path))
    assert (tmp_path / "graph_0" / "report.txt").exists()


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path):
    """The graph is compiled all the same."""
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(MhfCompilerWarning, match="file"):
        run(Heads(), dump_dir=tmp_path / "file")
    assert tallied()["failures"] == 1
