"""The example of a layer for the package `kernels`: a folder, and nothing from the Hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("kernels")

EXAMPLE = Path(__file__).parents[2] / "examples" / "kernel_layer.py"


def test_a_model_runs_the_layer_of_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives the results of the model, and its gradients are those of the op."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("kernel_layer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main([str(tmp_path)])
    assert "agrees: GeneratedBackwardFor_mhf_compiler_multi_head_ffn" in capsys.readouterr().out
