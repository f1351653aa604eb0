"""Where an op finds the name of its layer: in the comment in front of its call."""

import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mhf_compiler.lowering.ops.profiled import _call_at, mark_of

CALL = "buf8 = torch.ops.mhf_compiler.multi_head_ffn.compiled(buf3, arg1_1, None, arg2_1)"
NODES = "# Topologically Sorted Source Nodes:"


def name_at(folder: Path, *lines: str) -> tuple[bool, str | None]:
    """What is found of the last of the lines."""
    file = folder / "code.py"
    file.write_text("\n".join(lines) + "\n")
    _call_at.cache_clear()
    return _call_at(str(file), len(lines))


@pytest.mark.parametrize("layer", ["layers.0.ffn", "layers.{0-2,5}.ffn,head", "ffn"])
def test_the_layer_is_read_from_the_comment(tmp_path: Path, layer: str):
    comment = (
        f"    {NODES} [linear, {mark_of('multi_head_ffn_1', layer)}, flatten], Original ATen: [x]"
    )
    found = name_at(tmp_path, comment, f"    {CALL}")
    assert found == (True, f"mhf_compiler::multi_head_ffn of {layer}")


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([], id="no comment"),
        pytest.param([f"{NODES} [linear, multi_head_ffn], Original ATen: []"], id="no layer"),
        pytest.param([f"{NODES} [multi_head_ffn of ], Original ATen: []"], id="empty"),
        pytest.param([f"{NODES} [multi_head_ffn of a]", "buf3 = other(buf2)"], id="another's"),
        pytest.param(["# Unsorted Source Nodes: [one of a, two of b]"], id="which of two"),
        pytest.param([f"{NODES} [one of a, two of ]"], id="an argument's"),
    ],
)
def test_a_call_that_nothing_is_known_of_has_no_name(tmp_path: Path, lines: list[str]):
    assert name_at(tmp_path, *lines, CALL) == (True, None)


def test_the_last_node_is_the_one_that_is_called(tmp_path: Path):
    comment = f"{NODES} [multi_head_ffn of a, view, multi_head_ffn_1 of b], Original ATen: []"
    assert name_at(tmp_path, comment, CALL) == (True, "mhf_compiler::multi_head_ffn of b")


def test_only_calls_of_our_ops_are_looked_at(tmp_path: Path):
    comment = f"{NODES} [multi_head_ffn of a], Original ATen: []"
    assert name_at(tmp_path, comment, "buf9 = extern_kernels.mm(buf8, arg3_1)") == (False, None)


@pytest.mark.parametrize("layer", ["a module", "names[0]", ""])
def test_a_name_that_would_not_be_read_again_is_left_out(layer: str):
    assert mark_of("multi_head_ffn", layer) == "multi_head_ffn of "


def test_code_is_looked_at_while_a_profiler_runs_only(monkeypatch: pytest.MonkeyPatch):
    looked: list[object] = []
    common = sys.modules["mhf_compiler.lowering.ops.common"]
    monkeypatch.setattr(common, "range_of_layer", lambda: looked.append(1) or torch.no_grad())
    q, k, v = torch.randn(1, 3, 2, 4), torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4)
    op = torch.ops.mhf_compiler.multi_head_ffn
    op.compiled(q, k, None, v)
    assert not looked
    with profile(activities=[ProfilerActivity.CPU]):
        op.compiled(q, k, None, v)
        op(q, k, None, v)
    assert len(looked) == 1
