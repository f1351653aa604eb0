"""The example of a ranking model: its data, its score, and that back ends agree."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "ranking.py"
TINY = (
    *("--device", "cpu", "--width", "16", "--hidden", "8", "--batch", "64", "--steps", "4"),
    *("--backends", "eager", "flashmhf", "--fallback", "aot_eager"),
)


@pytest.fixture(scope="module")
def ranking() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranking", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranking"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def test_the_log_is_the_same_every_time(ranking: ModuleType) -> None:
    fields, clicks = ranking.click_log(2000, seed=3)
    again, clicks_again = ranking.click_log(2000, seed=3)
    assert torch.equal(fields, again)
    assert torch.equal(clicks, clicks_again)
    assert not torch.equal(fields, ranking.click_log(2000, seed=4)[0])
    assert (fields.amax(0) < torch.tensor(list(ranking.FIELDS.values()))).all()
    assert torch.equal(fields[:, 2], fields[:, 1] % ranking.FIELDS["category"])
    assert 0.1 < float(clicks.mean()) < 0.5


def test_auc(ranking: ModuleType) -> None:
    clicks = torch.tensor([1.0, 0, 1, 0, 0])
    assert ranking.auc(torch.tensor([5.0, 1, 4, 2, 3]), clicks) == 1
    assert ranking.auc(torch.tensor([1.0, 5, 2, 4, 3]), clicks) == 0
    assert ranking.auc(torch.tensor([5.0, 4, 1, 2, 3]), clicks) == pytest.approx(3 / 6)


@pytest.mark.parametrize("precision", ["fp32", "autocast-bf16"])
def test_back_ends_agree(
    precision: str, ranking: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranking.main([*TINY, "--precision", precision]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^flashmhf .* 4$", printed, re.M), printed  # two blocks; training, then not
    assert "the loss curves coincide" in printed


def test_nothing_rewritten_is_said(ranking: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``auto`` decides for a few tokens on a CPU."""
    assert ranking.main([*TINY, "--rewrite", "auto", "--steps", "2"]) == 1
    assert "flashmhf: nothing rewritten" in capsys.readouterr().out


def test_losses_that_differ_are_said(
    ranking: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter([ranking.Run("eager", [1.0], 0.5, 1, 0), ranking.Run("flashmhf", [1.1], 0.5, 1, 2)])
    monkeypatch.setattr(ranking, "train", lambda *_: next(made))
    assert ranking.main(TINY) == 1
    assert "flashmhf: a loss is off by 1.00e-01" in capsys.readouterr().out
