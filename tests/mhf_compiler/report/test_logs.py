"""What is said while a graph is compiled: counters, log lines, artifacts; and how to silence it."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.near_miss import NEAR_MISSES
from corpus.positive import POSITIVE
from support.networks import HEADS
from torch import nn

import mhf_compiler
from mhf_compiler.compat import counters
from mhf_compiler.lowering.cost import Estimate

OPTIONS = {"rewrite": "always", "fallback": "eager"}
FOUND, MISSED = POSITIVE["Bmm"], NEAR_MISSES["DifferentQueries"]


def run(model: nn.Module, *inputs: Any, backend: Any = "flashmhf") -> None:
    torch.compile(model, backend=backend, options=OPTIONS)(*inputs)


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What is logged, whatever else listens."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("mhf_compiler")
    level = log.level
    log.addHandler(handler)
    yield records
    log.removeHandler(handler)
    log.setLevel(level)


def test_a_line_for_each_site_and_near_miss(lines: list[logging.LogRecord]):
    logging.getLogger("mhf_compiler").setLevel(logging.INFO)
    run(FOUND.build(), *FOUND.inputs())
    run(MISSED.build(), *MISSED.inputs())
    rewritten, declined = (record.getMessage() for record in lines)
    assert rewritten.startswith("rewritten: ")
    assert "positive.py:" in rewritten
    assert "4 heads of width 8" in rewritten
    assert declined.startswith("declined: ")
    assert "near_miss.py:" in declined
    assert "DIFFERENT_QUERIES: the gate and the up projection read different inputs" in declined
    assert all("\n" not in text for text in (rewritten, declined))


def test_details_and_graphs_at_debug(lines: list[logging.LogRecord]):
    logging.getLogger("mhf_compiler").setLevel(logging.DEBUG)
    run(FOUND.build(), *FOUND.inputs())
    text = "\n".join(record.getMessage() for record in lines)
    assert "formula     (silu(Q K^T) * (Q U^T)) V" in text
    assert "before:\nclass GraphModule" in text
    assert "multi_head_ffn.default(" in text.split("after:\n")[1]


def test_nothing_to_rewrite_is_said_with_what_was_looked_at(lines: list[logging.LogRecord]):
    logging.getLogger("mhf_compiler").setLevel(logging.DEBUG)
    run(nn.Linear(8, 8), torch.randn(2, 8))
    first, second = (record.getMessage() for record in lines)
    assert first.startswith("nothing to rewrite among")
    assert second.startswith("looked at ")
    assert "linear(" in second


class Small(nn.Module):
    """Two networks that are not worth the op, and an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([FOUND.build(), FOUND.build()])

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_that_is_left_as_it_is_is_told_once(
    lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
):
    verdict = Estimate(rewritten=2.0, original=1.0)
    monkeypatch.setattr("mhf_compiler.lowering.cost.estimate", lambda workload: verdict)
    auto = {"rewrite": "auto", "fallback": "eager"}
    for length in (5, 6):  # two graphs
        x = FOUND.inputs()[0][:, :length]
        torch.compile(Small(), backend="flashmhf", options=auto, dynamic=False)(x)
    (line,) = lines
    assert line.levelname == "WARNING"
    assert line.getMessage() == (
        "flashmhf left all 2 candidates for MH-FFNs as they are: 2 DOES_NOT_PAY. "
        "print(mhf_compiler.compilation_report()) says why; "
        "TORCH_LOGS=-mhf_compiler silences this line."
    )
    assert len(mhf_compiler.compilation_report().declined) == 4


@pytest.mark.parametrize("options", [OPTIONS, {"rewrite": "never", "fallback": "eager"}])
def test_a_choice_of_the_user_is_not_told(lines: list[Any], options: dict[str, Any]):
    model = MISSED if options["rewrite"] == "always" else FOUND
    torch.compile(model.build(), backend="flashmhf", options=options)(*model.inputs())
    assert lines == []


def test_silent_by_default(lines: list[logging.LogRecord]):
    run(FOUND.build(), *FOUND.inputs())
    assert lines == []


TORCH_LOGS = f"""
import torch
from torch import nn
{HEADS}
options = {{"fallback": "eager", "rewrite": "always"}}
torch.compile(Heads(), backend="flashmhf", options=options)(torch.randn(4, 6, 8))
"""


def test_the_variables_of_torch_turn_it_on(tmp_path: Path):
    """``TORCH_LOGS`` by the name of the package, ``TORCH_TRACE`` as for Dynamo's own artifacts."""
    script = tmp_path / "script.py"
    script.write_text(TORCH_LOGS)
    wanted = {"TORCH_LOGS": "mhf_compiler", "TORCH_TRACE": str(tmp_path / "trace")}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "rewritten: " in done.stderr
    (trace,) = (tmp_path / "trace").iterdir()
    written = trace.read_text()
    for name in ("flashmhf_before", "flashmhf_after", "flashmhf_report", "flashmhf_report_json"):
        assert f'"name": "{name}"' in written


def test_artifacts_hold_the_graphs_and_the_report(monkeypatch: pytest.MonkeyPatch):
    found: dict[str, str] = {}

    def keep(name: str, encoding: str, payload: Any) -> None:
        found[name] = payload()

    monkeypatch.setattr("mhf_compiler.report.logs.trace_artifact", keep)
    run(FOUND.build(), *FOUND.inputs())
    assert "multi_head_ffn" not in found["flashmhf_before"]
    assert "multi_head_ffn" in found["flashmhf_after"]
    (graph,) = json.loads(found["flashmhf_report_json"])["graphs"]
    assert len(graph["rewritten"]) == 1


def test_reasons_are_counted_by_kind():
    first, second = MISSED.build(), MISSED.build()
    torch.compile(lambda x: (first(x), second(x)), backend="flashmhf", options=OPTIONS)(
        *MISSED.inputs()
    )
    assert counters["flashmhf"]["declined.DIFFERENT_QUERIES"] == 2
    assert counters["flashmhf"]["sites_declined"] == 2


# The pass among Inductor's.


def test_the_pass_is_timed():
    torch._dynamo.utils.compilation_time_metrics.clear()
    run(FOUND.build(), *FOUND.inputs())
    assert torch._dynamo.utils.compilation_time_metrics["pass.pre_grad_passes.flashmhf"]


def test_the_pass_is_disabled_by_name():
    with torch._inductor.config.patch(disabled_passes="flashmhf"):
        report = mhf_compiler.explain(FOUND.build(), options={"rewrite": "always"})(*FOUND.inputs())
    assert report.rewritten == []
    assert "the pass 'flashmhf' is disabled" in str(report)
    assert "None of the" not in str(report)  # nothing was looked at


@pytest.mark.parametrize(("most", "rewritten"), [(-1, 0), (0, 1)])
def test_the_pass_takes_part_in_a_bisection(
    most: int, rewritten: int, monkeypatch: pytest.MonkeyPatch
):
    from torch._inductor import compiler_bisector

    bisector = compiler_bisector.CompilerBisector
    if not hasattr(bisector, "reset_counters"):
        pytest.skip("this PyTorch cannot start a bisection twice in one process")
    values = {
        "TORCH_BISECT_BACKEND": "inductor",
        "TORCH_BISECT_SUBSYSTEM": "pre_grad_passes",
        "TORCH_BISECT_MAX": str(most),
    }
    monkeypatch.setattr(bisector, "bisection_enabled", True)
    monkeypatch.setattr(compiler_bisector, "get_env_val", values.get)
    bisector.reset_counters()
    with torch._inductor.config.patch(
        {"test_configs.bisect_keep_custom_backend_for_inductor": True}
    ):
        run(FOUND.build(), *FOUND.inputs(), backend=mhf_compiler.flashmhf)
    assert counters["flashmhf"]["sites_rewritten"] == rewritten
