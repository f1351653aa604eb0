"""The example is a plain PyTorch model whose runs can be repeated to the byte."""

import ast
import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.forks import run_script

SCRIPT = Path(__file__).parents[2] / "examples" / "byte_lm.py"


@pytest.fixture(scope="module")
def byte_lm() -> ModuleType:
    for package in ("matplotlib", "psutil", "rich", "tqdm"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("byte_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["byte_lm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def size(byte_lm: ModuleType):
    return dataclasses.replace(
        byte_lm.SIZES["demo"],
        d_model=32,
        layers=2,
        attention_heads=2,
        ffn_heads=2,
        sub_networks=3,
        hidden=8,
        batch=2,
        length=24,
    )


def test_the_script_does_not_know_the_compiler() -> None:
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        assert not any(name.split(".")[0] == "mhf_compiler" for name in names)


def test_the_model_is_causal(byte_lm: ModuleType, size) -> None:
    torch.manual_seed(0)
    model = byte_lm.ByteLM(size)
    tokens = torch.randint(256, (2, size.length))
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15], after[:, 15])


def test_the_ffn_is_the_papers_formula(byte_lm: ModuleType, size) -> None:
    """Against the sum over sub-networks written in one piece, in float64."""
    torch.manual_seed(0)
    ffn = byte_lm.MultiHeadFFN(size)
    x = torch.randn(2, 5, size.d_model)
    double = {name: value.double() for name, value in ffn.state_dict().items()}
    q = (x.double() @ double["in_proj.weight"].T).view(2, 5, 2, 16)
    q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)
    scores = torch.einsum("blhd,hde->blhe", q, double["router"]).sigmoid()
    r = scores / scores.sum(-1, keepdim=True)
    k, u, v = (double[f"{name}_weight"].view(2, 3, 8, 16) for name in ("gate", "up", "down"))
    gate, up = (torch.einsum("blhd,hefd->blhef", q, weight) for weight in (k, u))
    hidden = gate * gate.sigmoid() * up
    out = torch.einsum("blhef,hefd,blhe->blhd", hidden, v, r)
    expected = out.flatten(2) @ double["out_proj.weight"].T
    torch.testing.assert_close(ffn(x).double(), expected, rtol=1e-4, atol=1e-6)


def test_routing_stays_in_float32_under_autocast(byte_lm: ModuleType, size) -> None:
    torch.manual_seed(0)
    ffn = byte_lm.MultiHeadFFN(size)
    q = torch.randn(2, 5, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        routed = ffn.route(q.bfloat16())
        assert ffn(torch.randn(2, 5, size.d_model)).dtype == torch.bfloat16
    assert routed.dtype == torch.float32
    torch.testing.assert_close(routed, ffn.route(q.bfloat16()))
    torch.testing.assert_close(routed.sum(-1), torch.ones(2, 5, 2))


def test_the_model_overfits_one_batch(byte_lm: ModuleType, size) -> None:
    torch.manual_seed(0)
    model = byte_lm.ByteLM(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, targets = next(byte_lm.batches(byte_lm.load_text()[0], 2, size.length, seed=0))
    losses = []
    for _ in range(40):
        loss = byte_lm.cross_entropy(model(tokens), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(256.0).log().item(), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_text_and_batches_are_the_same_every_time(byte_lm: ModuleType) -> None:
    (train, held_out), (again, held_out_again) = byte_lm.load_text(), byte_lm.load_text()
    assert torch.equal(train, again)
    assert torch.equal(held_out, held_out_again)

    def first(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(itertools.islice(byte_lm.batches(train, 3, 16, seed), 4))

    for (tokens, targets), (tokens_again, _) in zip(first(7), first(7), strict=True):
        assert torch.equal(tokens, tokens_again)
        assert tokens.shape == targets.shape == (3, 16)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert not torch.equal(first(7)[0][0], first(8)[0][0])


def test_sampling_continues_the_prompt(byte_lm: ModuleType, size) -> None:
    torch.manual_seed(0)
    model = byte_lm.ByteLM(size)
    text = byte_lm.sample(model, b"def ", 50, size.length, torch.device("cpu"))
    assert text.startswith(b"def ")
    assert len(text) == size.length  # no more than the window holds


def run(byte_lm: ModuleType, backend: str, losses: list[float], sites: int = 0):
    return byte_lm.Run(
        backend=backend,
        losses=losses,
        held_out_loss=1.0,
        steps_per_second=1.0,
        compile_seconds=0.0,
        peak_bytes=0,
        step_tensor_bytes=0,
        sites_rewritten=sites,
        sample="",
    )


def test_the_verdict_names_what_is_wrong(byte_lm: ModuleType) -> None:
    eager = run(byte_lm, "eager", [2.0, 1.0])
    assert byte_lm.verdict([eager, run(byte_lm, "flashmhf", [2.0, 1.001], sites=3)], 0.005) == []
    (apart,) = byte_lm.verdict([eager, run(byte_lm, "inductor", [2.1, 1.0])], 0.005)
    assert "1.00e-01" in apart
    (unused,) = byte_lm.verdict([eager, run(byte_lm, "flashmhf", [2.0, 1.0])], 0.005)
    assert "no multi-head FFN" in unused
    (broken,) = byte_lm.verdict([eager, run(byte_lm, "inductor", [2.0, float("nan")])], 0.005)
    assert "not finite" in broken


def test_the_command_line_writes_figures_and_a_plot(byte_lm: ModuleType, tmp_path: Path) -> None:
    """The figures come from a process of their own."""
    options = ["--device", "cpu", "--steps", "2", "--batch", "2", "--length", "32"]
    done = run_script(SCRIPT, "--backends", "eager", *options, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "eager" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["runs"][0]["losses"]) == 2
    assert figures["environment"]["torch"] == torch.__version__
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
