"""``assert_rewritten``: passes where it should, and fails with the reasons."""

import pytest
import torch
from corpus.near_miss import NEAR_MISSES
from corpus.positive import POSITIVE
from torch import nn

import mhf_compiler
from mhf_compiler import OptionError, assert_rewritten
from mhf_compiler.lowering.cost import Estimate
from mhf_compiler.patterns import Kind

FOUND, MISSED = POSITIVE["Bmm"], NEAR_MISSES["DifferentQueries"]


@pytest.mark.parametrize("sites", [None, 1])
def test_a_rewritten_model_passes(sites: int | None):
    report = assert_rewritten(FOUND.build(), FOUND.inputs(), sites=sites)
    assert len(report.rewritten) == 1


@pytest.mark.parametrize("sites", [None, 1])
def test_a_near_miss_fails_with_its_reason_and_remedy(sites: int | None):
    with pytest.raises(AssertionError) as caught:
        assert_rewritten(MISSED.build(), MISSED.inputs(), sites=sites)
    message = str(caught.value)
    assert "to be rewritten, got 0\n" in message
    assert Kind.DIFFERENT_QUERIES.sentence in message
    assert Kind.DIFFERENT_QUERIES.remedy in message
    assert "near_miss.py:" in message


def test_too_few_and_too_many_fail():
    for sites in (0, 2):
        with pytest.raises(AssertionError, match=f"expected {sites} MH-FFNs .* got 1"):
            assert_rewritten(FOUND.build(), FOUND.inputs(), sites=sites)


def test_none_at_all_can_be_asked_for():
    assert_rewritten(nn.Linear(8, 8), (torch.randn(2, 8),), sites=0)


def test_named_arguments():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = FOUND.build()

        def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
            return self.network(x * scale)

    assert_rewritten(Scaled(), FOUND.inputs(), {"scale": 2.0}, sites=1)


def test_it_does_not_depend_on_the_cost_model_unless_asked(monkeypatch: pytest.MonkeyPatch):
    slower = Estimate(rewritten=2.0, original=1.0)
    monkeypatch.setattr("mhf_compiler.lowering.cost.estimate", lambda workload: slower)
    assert_rewritten(FOUND.build(), FOUND.inputs())
    with pytest.raises(AssertionError, match="would not be faster"):
        assert_rewritten(FOUND.build(), FOUND.inputs(), options={"rewrite": "auto"})


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="args is a Tensor, must be a tuple or a list"):
        assert_rewritten(FOUND.build(), *FOUND.inputs())
    with pytest.raises(ValueError, match="sites is -1, must be None or at least 0"):
        assert_rewritten(FOUND.build(), FOUND.inputs(), sites=-1)
    with pytest.raises(OptionError, match="rewrite"):
        mhf_compiler.assert_rewritten(FOUND.build(), FOUND.inputs(), options={"rewrite": "no"})
