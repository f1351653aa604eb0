"""Graphs that were exported before they are compiled: ATen operations instead of the author's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import mhf_compiler
from models.harness import OPTIONS, Tally, assert_close, flashmhf, replaced, step, tally
from models.networks import FFNS, LENGTH, Tower, tokens

strict = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
NAMES = ("loop", "packed")


def assert_same(program: ExportedProgram, model: nn.Module, *inputs: Tensor) -> None:
    """The compiled program gives the results of the model, and its gradients in training."""
    twin = program.module()
    found = _named_alike(step(flashmhf(twin), model, inputs))
    assert_close(found, _named_alike(step(model, model, inputs)))


def _named_alike(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(seen.items()))


@strict
def test_every_spelling(strict: bool):
    names = spellings(strict)
    model, x = Tower(1, names).double().eval(), tokens()
    assert_same(export(model, (x,), strict=strict), model, x)
    assert tally() == Tally(sites=len(names))


def test_every_spelling_in_core_aten():
    """After ``run_decompositions`` there are no linears, einsums or in-place updates."""
    names = spellings(strict=True)
    model, x = Tower(1, names).double().eval(), tokens()
    assert_same(export(model, (x,), strict=True).run_decompositions(), model, x)
    assert replaced() == len(names)


def spellings(strict: bool) -> list[str]:
    """PyTorch exports ``vmap`` in strict mode only."""
    return [name for name in FFNS if strict or name != "vmap"]


@strict
def test_an_exported_program_is_trained(strict: bool):
    """Parameters of the exported module are those of the model, so gradients arrive there."""
    model, x = Tower(1, NAMES).double(), tokens()
    assert_same(export(model, (x,), strict=strict), model, x)
    assert tally() == Tally(sites=2)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "core ATen"])
def test_dynamic_shapes(decomposed: bool):
    model = Tower(1, NAMES).double().eval()
    shapes = {"x": {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=64)}}
    program = export(model, (tokens(),), dynamic_shapes=shapes)
    if decomposed:
        program = program.run_decompositions()
    call = flashmhf(program.module(), dynamic=True)
    for batch, length in [(2, LENGTH), (3, LENGTH + 4), (7, 11)]:
        x = tokens(batch, length)
        with torch.no_grad():
            torch.testing.assert_close(call(x), model(x))
    assert replaced() == 2


def test_saved_and_loaded(tmp_path: Any):
    model, x = Tower(1, NAMES).double().eval(), tokens()
    torch.export.save(export(model, (x,)), tmp_path / "tower.pt2")
    program = torch.export.load(tmp_path / "tower.pt2")
    with torch.no_grad():
        torch.testing.assert_close(flashmhf(program.module())(x), model(x))
    assert tally() == Tally(sites=2)


def test_a_rewritten_graph_is_no_obstacle_to_export():
    """The op itself can be exported, as a custom op can."""
    q, weights = torch.randn(2, 5, 4, 8), [torch.randn(4, 3, 5, 8) for _ in range(3)]

    class Direct(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return mhf_compiler.multi_head_ffn(q, *weights)

    program = export(Direct(), (q,))
    torch.testing.assert_close(program.module()(q), Direct()(q))
    assert "mhf_compiler.multi_head_ffn" in program.graph_module.code


def test_explain():
    model, x = Tower(2, NAMES).double().eval(), tokens()
    module = export(model, (x,)).module()
    report = mhf_compiler.explain(module, options=OPTIONS)(x)
    assert len(report.rewritten) == 4
    assert report.declined == []
