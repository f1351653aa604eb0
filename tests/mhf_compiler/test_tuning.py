"""Tuning happens under max-autotune alone, for sites that are rewritten, once."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.near_miss import NEAR_MISSES
from corpus.positive import POSITIVE

import mhf_compiler.compat
import mhf_compiler.lowering.workload
from mhf_compiler.compat import cache_folder
from mhf_compiler.lowering.tiles import Sizes
from mhf_compiler.lowering.workload import Workload
from mhf_compiler.report.logs import progress

FOUND, MISSED = POSITIVE["Bmm"], NEAR_MISSES["DifferentQueries"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tuned and what was tried, in order."""
    made: list[str] = []

    def tune(workload: Workload, folder: Path | None, say: Callable[[str], None]) -> None:
        assert workload.sizes.heads == 4
        assert type(torch.ones(1)) is torch.Tensor  # to be timed, tensors have to be real
        made.append("tune")

    def trial_run(workload: Workload) -> None:
        made.append("try")

    monkeypatch.setattr(mhf_compiler.lowering.workload, "tune", tune)
    monkeypatch.setattr(mhf_compiler.lowering.workload, "trial_run", trial_run)
    return made


def compile_and_run(case: Any, **options: Any) -> None:
    given = {"rewrite": "always", "fallback": "eager", **options}
    torch.compile(case.build(), backend="flashmhf", options=given)(*case.inputs())


@pytest.mark.parametrize(
    "options",
    [{"mode": "max-autotune"}, {"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True}],
    ids=str,
)
def test_an_accepted_site_is_tuned_and_then_tried(options: dict[str, Any], calls: list[str]):
    compile_and_run(FOUND, **options)
    assert calls == ["tune", "try"]


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=str)
def test_nobody_else_waits(options: dict[str, Any], calls: list[str]):
    compile_and_run(FOUND, **options)
    assert calls == ["try"]


def test_nothing_is_tuned_for_what_is_declined(calls: list[str]):
    compile_and_run(MISSED, mode="max-autotune")
    compile_and_run(FOUND, mode="max-autotune", rewrite="never")
    assert calls == []


def test_on_a_cpu_there_is_nothing_to_tune(monkeypatch: pytest.MonkeyPatch):
    tuning = pytest.importorskip("mhf_compiler.lowering.kernels.tuning.search")
    monkeypatch.setattr(tuning, "tune", lambda *arguments: pytest.fail("asked to tune"))
    compile_and_run(FOUND, mode="max-autotune")


def test_nothing_is_timed_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch):
    tuning = pytest.importorskip("mhf_compiler.lowering.kernels.tuning.search")
    monkeypatch.setattr(tuning, "tune", lambda *arguments: pytest.fail("asked to tune"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    sizes = Sizes(64, 4, 4, 32, 1, 64, True, False, (False,) * 3, torch.bfloat16)
    cuda = torch.device("cuda")
    workload = Workload(sizes, "silu", torch.bfloat16, cuda, training=False)
    mhf_compiler.lowering.workload.tune(workload, None, print)


def test_results_lie_beside_inductors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path / "flashmhf"
    with torch._inductor.config.patch(force_disable_caches=True):
        assert cache_folder() is None


# The line that is shown meanwhile.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_line_is_written_over_and_cleared(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress() as say:
        say("tuning forward for 16 heads x 128: 7 of 12")
        assert terminal.getvalue().endswith("flashmhf: tuning forward for 16 heads x 128: 7 of 12")
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert "\n" not in terminal.getvalue()


def test_elsewhere_it_is_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    with caplog.at_level(logging.INFO, "mhf_compiler"), progress() as say:
        say("tuning forward")
    assert caplog.messages == ["tuning forward"]
    assert not capsys.readouterr().err


def test_what_was_tuned_before_shows_nothing(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress():
        pass
    assert not terminal.getvalue()
