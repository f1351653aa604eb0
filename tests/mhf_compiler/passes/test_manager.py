"""Which passes run after autograd: those of users, ours, and what becomes of one that fails."""

from __future__ import annotations

import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from support.inductor import NO_CPP, no_caches
from support.networks import ProjectedHeads
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import mhf_compiler
from mhf_compiler.compat import counters
from mhf_compiler.errors import MhfCompilerWarning
from mhf_compiler.options import Options
from mhf_compiler.passes import manager
from mhf_compiler.passes.manager import PASSES, run_passes, with_post_grad_passes
from mhf_compiler.passes.outcome import Fusion, Obstacle
from mhf_compiler.substitution.graph import PASS

H, d = ProjectedHeads.H, ProjectedHeads.d
MODEL = inspect.getfile(ProjectedHeads)
OVER_QUERY = "multi_head_ffn_over_query"
OVER_GRADIENT = "multi_head_ffn_backward_over_gradient"


def infer(module: nn.Module | None = None, **options: Any) -> Counter[str]:
    """Compile in inference, compare with eager, and count."""
    module, x = module or ProjectedHeads(), torch.randn(2, 6, H * d)
    options = {"rewrite": "always", "strict": True} | NO_CPP | options
    with torch.no_grad(), no_caches():
        found = torch.compile(module, backend="flashmhf", options=options)(x)
        torch.testing.assert_close(found, module(x))
    return Counter(counters["flashmhf"])


def train(**options: Any) -> Counter[str]:
    """Compile a training step and count."""
    module, x = ProjectedHeads(), torch.randn(2, 6, H * d)
    options = {"rewrite": "always", "strict": True} | NO_CPP | options
    with no_caches():
        torch.compile(module, backend="flashmhf", options=options)(x).square().sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    for one, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)
    return Counter(counters["flashmhf"])


# What they tell.


@pytest.mark.parametrize("layers", [1, 3])
def test_each_layer_is_counted(layers: int):
    counts = infer(nn.Sequential(*(ProjectedHeads() for _ in range(layers))))
    assert counts[OVER_QUERY] == layers
    assert counts["normed_multi_head_ffn_over_query_declined.NO_NORM_AND_ROUTE"] == layers
    assert counts["normed_multi_head_ffn_over_query"] == 0


def test_forward_and_backward_are_counted():
    counts = train()
    assert counts[OVER_GRADIENT] == 1
    assert counts[f"{OVER_QUERY}_declined.READ_LATER"] == 1


def test_log_lines_name_the_line_of_the_model(caplog: pytest.LogCaptureFixture):
    line = next(
        number
        for number, text in enumerate(Path(MODEL).read_text().splitlines(), 1)
        if "return self.outputs(torch.einsum" in text
    )
    with caplog.at_level(logging.INFO, logger="mhf_compiler"):
        infer()
    assert f"fused: {MODEL}:{line}: {OVER_QUERY}" in caplog.messages
    sentence = Obstacle.NO_NORM_AND_ROUTE.sentence
    declined = f"normed_multi_head_ffn_over_query: NO_NORM_AND_ROUTE: {sentence}"
    assert f"not fused: {MODEL}:{line}: {declined}" in caplog.messages


def test_dumped_reports_have_them(tmp_path: Path):
    infer(dump_dir=tmp_path)
    text = (tmp_path / "graph_0" / "report.txt").read_text()
    assert f": {OVER_QUERY}\n" in text
    assert f": {OVER_QUERY}<" in (tmp_path / "graph_0" / "report.html").read_text()
    (graph,) = json.loads((tmp_path / "graph_0" / "report.json").read_text())["graphs"]
    (fused,) = (fusion for fusion in graph["fusions"] if fusion["obstacle"] is None)
    assert fused["op"] == OVER_QUERY
    assert fused["location"]["file"] == MODEL


def test_a_report_that_cannot_be_completed_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mhf_compiler.compilation.announce_fusions", fail)
    with pytest.warns(MhfCompilerWarning, match="model is not affected: OSError: disk full"):
        counts = infer(strict=False)
    assert counts[OVER_QUERY] == counts["failures"] == 1


def test_explain_says_that_they_did_not_run():
    report = mhf_compiler.explain(ProjectedHeads(), options={"rewrite": "always"})(
        torch.randn(2, 6, 32)
    )
    assert report.graphs[0].fusions is None
    assert "After autograd\n  no pass has run" in str(report)


def test_the_trace_has_them(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, str] = {}

    def keep(name: str, encoding: str, payload: Callable[[], str]) -> None:
        seen[name] = payload()

    monkeypatch.setattr("mhf_compiler.report.logs.trace_artifact", keep)
    infer()
    found = json.loads(seen["flashmhf_fusions_json"])
    assert [fusion["op"] for fusion in found["fusions"] if not fusion["obstacle"]] == [OVER_QUERY]
    assert found["notes"] == []


# Switches.


def test_no_switch_is_part_of_another():
    """Inductor disables a pass whose name is a part of what is disabled."""
    names = [PASS, *PASSES]
    assert not any(one in other for one in names for other in names if one != other)


def test_a_pass_is_disabled_by_its_name(tmp_path: Path):
    with inductor.patch(disabled_passes="mhf_overwrite"):
        counts = infer(dump_dir=tmp_path)
    assert counts["sites_rewritten"] == 1
    assert counts[OVER_QUERY] == counts[f"{OVER_QUERY}_declined"] == counts["failures"] == 0
    assert "'mhf_overwrite' is disabled" in (tmp_path / "graph_0" / "report.txt").read_text()


def test_passes_are_timed():
    torch._dynamo.utils.reset_frame_count()
    infer()
    timed = torch._dynamo.utils.compilation_time_metrics
    assert all(f"pass.post_grad_passes.{name}" in timed for name in PASSES)


def test_passes_take_part_in_a_bisection(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.compiler_bisector import CompilerBisector

    asked: list[str] = []

    def disable(backend: str, subsystem: str, name: Callable[[], str] | None = None) -> bool:
        if subsystem == "post_grad_passes" and name is not None:
            asked.append(name())
            return name() == "mhf_overwrite"
        return False

    monkeypatch.setattr(CompilerBisector, "disable_subsystem", staticmethod(disable))
    assert infer()[OVER_QUERY] == 0
    assert set(PASSES) <= set(asked)


def test_layouts_are_fixed_whatever_is_disabled(monkeypatch: pytest.MonkeyPatch):
    """Results may be wrong without; if that fails, the original graph is compiled."""
    fixed: list[torch.fx.Graph] = []
    monkeypatch.setattr(manager, "fix_layouts", fixed.append)
    with inductor.patch(disabled_passes=",".join(PASSES)):
        infer()
    assert len(fixed) == 1

    def fail(graph: torch.fx.Graph) -> None:
        raise RuntimeError("no layouts")

    monkeypatch.setattr(manager, "fix_layouts", fail)
    torch.compiler.reset()
    with pytest.warns(MhfCompilerWarning, match="no layouts"):
        infer(strict=False)
    torch.compiler.reset()
    with pytest.raises(Exception, match="no layouts"):
        infer()


def test_to_disable_all_passes_that_are_added_is_warned_of():
    with (
        inductor.patch(disabled_passes="post_grad_custom_post_pass"),
        pytest.warns(MhfCompilerWarning, match="strides"),
    ):
        infer()


# Passes of users.


class Watching(CustomGraphPass):
    """A pass of the user's, which sees the graph before ours."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(str(graph))

    def uuid(self) -> str:
        return "watching"


NAME = "post_grad_custom_post_pass"


@pytest.mark.parametrize("globally", [False, True])
def test_a_pass_of_the_users_runs_first(globally: bool):
    watching = Watching()
    with inductor.patch({NAME: watching} if globally else {}):
        counts = infer(**({} if globally else {NAME: watching}))
    assert counts[OVER_QUERY] == 1
    assert len(watching.seen) == 1
    assert "multi_head_ffn.default" in watching.seen[0]
    assert "over_query" not in watching.seen[0]


def test_a_function_of_the_users_runs_too():
    """Inductor then caches nothing, as without us."""
    seen = []
    assert infer(**{NAME: lambda graph: seen.append(graph)})[OVER_QUERY] == 1
    assert len(seen) == 1


@pytest.mark.skipif(
    not hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"),
    reason="this PyTorch takes one pass",
)
def test_several_passes_of_the_users_run():
    seen = []
    passes = [lambda graph: seen.append(1), Watching(), lambda graph: seen.append(2)]
    assert infer(**{NAME: passes})[OVER_QUERY] == 1
    assert seen == [1, 2]
    assert len(passes[1].seen) == 1
    assert len(passes) == 3


def test_what_was_compiled_is_found_again():
    """The pass has a name that Inductor's cache takes."""
    module, x = ProjectedHeads(), torch.randn(2, 6, H * d)
    with fresh_cache(), torch.no_grad():
        for _ in range(2):
            torch.compiler.reset()
            compiled = torch.compile(module, backend="flashmhf", options={"rewrite": "always"})
            torch.testing.assert_close(compiled(x), module(x))
        assert counters["inductor"]["fxgraph_cache_bypass"] == 0
        assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_a_graph_without_the_op_is_inductors_alone():
    config: dict[str, Any] = {"max_autotune": False}
    assert (
        with_post_grad_passes(torch.fx.symbolic_trace(nn.Linear(3, 3)), config, Options()) is config
    )


# A pass that fails.


def fails_after(run: Callable[[torch.fx.Graph], list[Fusion]]) -> Callable[..., list[Fusion]]:
    def failing(graph: torch.fx.Graph) -> list[Fusion]:
        run(graph)
        raise RuntimeError("no more")

    return failing


@pytest.mark.parametrize("name", ["mhf_overwrite", "mhf_norm_router"])
def test_what_a_pass_that_fails_has_done_is_undone(name: str, monkeypatch: pytest.MonkeyPatch):
    """And nothing else: the passes after it do theirs."""
    monkeypatch.setitem(PASSES, name, fails_after(PASSES["mhf_overwrite"]))
    with pytest.warns(MhfCompilerWarning, match=f"{name} failed: RuntimeError: no more"):
        counts = infer(strict=False)
    assert counts[OVER_QUERY] == (name == "mhf_norm_router")
    assert counts["failures"] == 1


def test_what_is_known_of_nodes_stays_as_well(monkeypatch: pytest.MonkeyPatch):
    """Inductor notes the strides that results must have at the output node."""
    graph = torch.fx.symbolic_trace(lambda x: (x.sin().cos(), x)).graph
    for number, node in enumerate(graph.nodes):
        node.meta["number"] = number

    def fails(graph: torch.fx.Graph) -> list[Fusion]:
        list(graph.nodes)[1].target = "exp"
        raise RuntimeError("no more")

    monkeypatch.setitem(PASSES, "mhf_overwrite", fails)
    with pytest.warns(MhfCompilerWarning):
        run_passes(["mhf_overwrite"], False, None, graph)
    graph.lint()
    assert [node.target for node in graph.nodes] == ["x", "sin", "cos", "output"]
    assert [node.meta["number"] for node in graph.nodes] == [0, 1, 2, 3]


def test_graphs_for_training_stay_as_they_were(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PASSES, "mhf_overwrite", fails_after(PASSES["mhf_overwrite"]))
    with pytest.warns(MhfCompilerWarning, match="RuntimeError: no more"):
        counts = train(strict=False)
    assert counts[OVER_GRADIENT] == counts[f"{OVER_GRADIENT}_declined"] == 0
    assert counts["failures"] == 2


def test_a_pass_that_fails_raises_if_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PASSES, "mhf_overwrite", fails_after(PASSES["mhf_overwrite"]))
    with pytest.raises(Exception, match="no more"):
        infer()
