"""The programs for a GPU run on a CPU as well, and a wrong value fails them."""

from pathlib import Path

import pytest
import torch

from . import gpu


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_program_is_compiled_and_right(mode: str, tmp_path: Path):
    small = (
        seed
        for seed in range(10_000)
        for sizes, use in [gpu.draw(seed)]
        if use.mode == mode and sizes.sub_networks > 1 and use.batch * use.length < 10
        if sizes.heads * sizes.sub_networks * sizes.hidden * sizes.head_dim < 50_000
    )
    (lock := tmp_path / "lock").touch()
    finding = gpu.check(next(small), "cpu", lock)
    assert not finding.error
    assert not finding.reasons


def test_a_seed_is_one_program_and_six_share_a_network():
    assert gpu.draw(7) == gpu.draw(7)
    networks = {gpu.draw(seed)[0] for seed in range(6 * 20)}
    assert len(networks) <= 20
    assert len({gpu.draw(seed)[1] for seed in range(6)}) == 6


def test_a_wrong_value_is_seen():
    sizes, use = gpu.draw(0)
    exact = torch.randn(100)
    eager = exact * (1 + 1e-4)
    gpu._compare([eager], [eager], [exact], [0.0], sizes, use)
    with pytest.raises(AssertionError, match="value 0 has error"):
        gpu._compare([exact * 1.1], [eager], [exact], [0.0], sizes, use)
    with pytest.raises(AssertionError, match="value 0 has infinities or NaN"):
        gpu._compare([exact * float("nan")], [eager], [exact], [0.0], sizes, use)


def test_one_wrong_token_and_other_bits_are_seen():
    sizes, use = gpu.draw(0)
    exact = torch.randn(4, 1000, 64)
    eager = exact * (1 + 2e-3)
    wrong = eager.clone()
    wrong[2, 7] *= 1.1  # a thousandth of the error that all may have
    gpu._compare([eager], [eager], [exact], [0.0], sizes, use)
    with pytest.raises(AssertionError, match="token 2007 has error"):
        gpu._compare([wrong], [eager], [exact], [0.0], sizes, use)
    with pytest.raises(AssertionError, match="value 0 differs from run to run"):
        gpu._compare_bits([wrong], [eager])


def test_errors_of_eager_on_other_inputs_are_allowed_too():
    sizes, use = gpu.draw(0)
    exact = torch.randn(100)
    other = (0.1 * exact).norm().item()
    gpu._compare([exact * 1.15], [exact], [exact], [other], sizes, use)
    with pytest.raises(AssertionError, match="value 0 has error"):
        gpu._compare([exact * 1.3], [exact], [exact], [other], sizes, use)
