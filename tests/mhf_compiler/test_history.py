"""The report of what was compiled: kept without what it is about, and given to who asks for it."""

from __future__ import annotations

import gc
import json
import pickle
import weakref

import pytest
import torch
from support.networks import Heads
from torch import fx, nn

import mhf_compiler
from mhf_compiler import MhfCompilerWarning, Report, history
from mhf_compiler.compat import counters

OPTIONS = {"rewrite": "always", "fallback": "eager"}


def tokens(length: int = 6) -> torch.Tensor:
    return torch.randn(2, length, 32)


def test_what_was_compiled_is_reported_without_tracing_it():
    model = nn.Sequential(Heads(), nn.LayerNorm(32), Heads())
    assert mhf_compiler.compilation_report().graphs == []
    torch.compile(model, backend="flashmhf", options=OPTIONS)(tokens())
    graphs = counters["flashmhf"]["graphs"]
    report = mhf_compiler.compilation_report()
    assert [site.module for site in report.rewritten] == ["0", "2"]
    assert str(report).startswith("2 MH-FFNs rewritten, 0 declined, in 1 graph\n  {0,2}: 2 of 3 ")
    assert counters["flashmhf"]["graphs"] == graphs == 1
    torch.compiler.reset()
    assert mhf_compiler.compilation_report().graphs == []


@pytest.mark.parametrize("how", ["back end", "passes"])
def test_every_reset_forgets_the_reports(how: str):
    given = {"backend": "flashmhf", "options": OPTIONS}
    if how == "passes":
        given = {"options": mhf_compiler.inductor_options({"rewrite": "always"})}
    run = torch.compile(Heads(), **given)
    for _ in range(3):
        with torch.no_grad():
            run(tokens())
        assert len(mhf_compiler.compilation_report().graphs) == 1
        torch.compiler.reset()  # after which Dynamo does not know the back end any more
        assert mhf_compiler.compilation_report().graphs == []


def test_what_is_explained_was_not_compiled():
    mhf_compiler.explain(Heads(), options=OPTIONS)(tokens())
    assert mhf_compiler.compilation_report().graphs == []


def test_the_option_receives_the_report_of_each_graph():
    received: list[Report] = []
    options = OPTIONS | {"report": received.append}
    run = torch.compile(Heads(), backend="flashmhf", options=options, dynamic=False)
    for length in (6, 6, 7):
        run(tokens(length))
    assert [len(report.rewritten) for report in received] == [1, 1]


def test_passes_of_inductors_report_as_well():
    received: list[Report] = []
    options = mhf_compiler.inductor_options({"rewrite": "always", "report": received.append})
    with torch.no_grad():
        torch.compile(Heads(), options=options)(tokens())
    assert len(mhf_compiler.compilation_report().rewritten) == 1
    (report,) = received
    # Filled by the passes after autograd, or None if Inductor found the graph in its cache.
    assert report.graphs[0] is mhf_compiler.compilation_report().graphs[0]


def test_who_receives_a_report_cannot_break_the_compilation():
    def fails(report: Report) -> None:
        raise OSError("no space left")

    with pytest.warns(MhfCompilerWarning, match="no space left"):
        torch.compile(Heads(), backend="flashmhf", options=OPTIONS | {"report": fails})(tokens())
    assert counters["flashmhf"]["failures.report"] == 1


def test_a_report_keeps_nothing_else_alive():
    graphs: list[weakref.ref[fx.GraphModule]] = []
    model = Heads()
    parameter = weakref.ref(model.gate)

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(weakref.ref(gm))
        return mhf_compiler.flashmhf(gm, inputs, options=OPTIONS)

    torch.compile(model, backend=backend)(tokens())
    kept = mhf_compiler.compilation_report()
    torch.compiler.reset()
    del model
    gc.collect()
    assert [one() for one in graphs] == [None]
    assert parameter() is None
    assert pickle.loads(pickle.dumps(kept)) == kept
    assert json.loads(kept.to_json()) == kept.to_dict()


def test_only_the_last_graphs_are_kept(monkeypatch: pytest.MonkeyPatch):
    reports = [mhf_compiler.GraphReport(str(number), "") for number in range(100)]
    for report in reports:
        history.keep(report, None)
    assert mhf_compiler.compilation_report().graphs == reports[-64:]
    monkeypatch.setattr(history, "_MOST_CODE", 30)
    long = mhf_compiler.GraphReport("x" * 20, "y" * 6)
    history.keep(long, None)
    assert mhf_compiler.compilation_report().graphs == [*reports[-2:], long]
