"""Inside Hugging Face transformers: a causal LM made from a config, its MLPs replaced by MH-FFNs.

Nothing is downloaded: weights are random, tokens are numbers.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mhf_compiler
from mhf_compiler.patterns import Kind
from models.harness import (
    OPTIONS,
    assert_same_steps,
    flashmhf,
    graphs_compiled,
    replaced,
    tally,
)
from models.networks import WIDTH, ffn

transformers = pytest.importorskip("transformers")

VOCABULARY = 61


def language_model(layers: int, name: str = "loop", **config: Any) -> Any:
    """A Llama whose feed-forward networks are MH-FFNs."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            **config,
        )
    )
    for layer in model.model.layers:
        layer.mlp = ffn(name)
    return model.double()


def prompt(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def logits_of(model: Any) -> Any:
    """The model as a function of tokens, without its cache."""
    return lambda tokens: model(tokens, use_cache=False).logits


# Every pair of a spelling with training or inference; numbers of layers as they come.
@pytest.mark.parametrize(
    ("layers", "training", "name"),
    [(1, True, "loop"), (2, False, "loop"), (2, True, "packed"), (1, False, "packed")],
)
def test_forward_and_training_step(layers: int, training: bool, name: str):
    model = language_model(layers, name).train(training)
    assert_same_steps(
        _Logits(model), prompt(), compiler=lambda twin: logits_of(flashmhf(twin.model))
    )
    assert replaced() == layers


class _Logits(torch.nn.Module):
    """The logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return logits_of(self.model)(tokens)


def test_the_models_own_loss():
    """With labels and padding, as a trainer calls it."""
    model, tokens = language_model(1), prompt()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    twin = copy.deepcopy(model)
    losses = [call(**batch).loss for call in (flashmhf(twin), model)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert replaced() == 1


def test_a_few_steps_of_an_optimizer():
    model = language_model(1)
    twin = copy.deepcopy(model)
    batches = [prompt() for _ in range(3)]
    losses = [_train(call, of, batches) for call, of in ((flashmhf(twin), twin), (model, model))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-6, atol=1e-9)
    assert replaced() == 1


def _train(call: Any, model: Any, batches: list[Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for tokens in batches:
        loss = call(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reentrant", [False])
def test_its_gradient_checkpointing(reentrant: bool):
    model = language_model(2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_steps(
        _Logits(model), prompt(), compiler=lambda twin: logits_of(flashmhf(twin.model))
    )
    assert replaced() == 2


def test_each_layer_compiled_by_itself():
    """As transformers' users compile large models: one graph serves all layers."""
    model = language_model(3).eval()
    tokens = prompt()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        for layer in model.model.layers:
            layer.compile(backend="flashmhf", options=OPTIONS)
        torch.testing.assert_close(model(tokens, use_cache=False).logits, expected)
    assert graphs_compiled() == 1
    assert replaced() == 3


# generate().


@pytest.mark.parametrize(("layers", "cache"), [(2, "dynamic"), (1, "static"), (1, "none")])
def test_generate_with_a_compiled_forward(layers: int, cache: str):
    model, tokens = language_model(layers).eval(), prompt()
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    how |= {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    if cache == "static":
        how["disable_compile"] = True  # of its own, with another back end
    expected = model.generate(tokens, **how)
    model.forward = flashmhf(model.forward)
    found = model.generate(tokens, **how)
    assert found.tolist() == expected.tolist()
    assert replaced() == layers * graphs_compiled() > 0


def test_generate_that_compiles_by_itself():
    """``CompileConfig`` names the back end that generate uses for decoding with a static cache."""
    model, tokens = language_model(2).eval(), prompt()
    how: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "cache_implementation": "static",
    }
    expected = model.generate(tokens, **how, disable_compile=True)
    config = transformers.CompileConfig(
        backend="flashmhf", mode=None, options=OPTIONS, fullgraph=False
    )
    config._compile_all_devices = True
    found = model.generate(tokens, **how, compile_config=config)
    assert found.tolist() == expected.tolist()
    assert replaced() >= 2


# The kernel mapping: ``kernelize`` puts an op from the Hub in place of a layer's forward method.


@torch.library.custom_op("mhf_tests::silu_and_mul", mutates_args=())
def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@torch.library.custom_op("mhf_tests::heads_mlp", mutates_args=())
def heads_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    q = x.unflatten(-1, (gate_up.shape[0], -1)).transpose(1, 2)
    return (silu_and_mul(q @ gate_up) @ down).transpose(1, 2).flatten(2)


@silu_and_mul.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@heads_mlp.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


class SiluAndMul(torch.nn.Module):
    """A layer that the mapping knows: the halves of gate and up projection."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


class PackedHeads(torch.nn.Module):
    """Heads with one product for gate and up projection."""

    def __init__(self, heads: int = 4, hidden: int = 6) -> None:
        super().__init__()
        width = WIDTH // heads
        self.heads, self.act = heads, SiluAndMul()
        self.gate_up = torch.nn.Parameter(torch.randn(heads, width, 2 * hidden) / 2)
        self.down = torch.nn.Parameter(torch.randn(heads, hidden, width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return (self.act(q @ self.gate_up) @ self.down).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("replaced_part", ["nothing", "the activation", "the network"])
def test_layers_that_the_kernel_mapping_has_replaced(replaced_part: str):
    """An op of somebody else's inside the network is the reason; in place of it, it is the network.

    The mapping sets the ``forward`` of each layer of a class, as here.
    """
    model, tokens = language_model(2).eval(), prompt()
    for layer in model.model.layers:
        mlp = layer.mlp = PackedHeads().double()
        if replaced_part == "the activation":
            mlp.act.forward = silu_and_mul
        elif replaced_part == "the network":
            mlp.forward = lambda x, mlp=mlp: heads_mlp(x, mlp.gate_up, mlp.down)
    with torch.no_grad():
        expected = logits_of(model)(tokens)
        torch.testing.assert_close(logits_of(flashmhf(model))(tokens), expected)
        assert replaced() == (2 if replaced_part == "nothing" else 0)
        report = mhf_compiler.explain(model, options=OPTIONS)(tokens, use_cache=False)
    reasons = [miss.reason for miss in report.declined if "silu_and_mul" in miss.reason.detail]
    assert [one.kind for one in reasons] == [Kind.UNKNOWN_OPERATION] * len(reasons)
    assert len(reasons) == (2 if replaced_part == "the activation" else 0)


LAYERS_OF_A_FOLDER = """
from types import SimpleNamespace

import torch
from torch import nn


class SiluAndMul(nn.Module):
    can_torch_compile = has_backward = True

    def forward(self, x):
        return torch.ops.mhf_tests.silu_and_mul(x)


class PackedHeads(nn.Module):
    can_torch_compile = has_backward = True

    def forward(self, x):
        return torch.ops.mhf_tests.heads_mlp(x, self.gate_up, self.down)


layers = SimpleNamespace(SiluAndMul=SiluAndMul, PackedHeads=PackedHeads)
"""


@pytest.mark.parametrize("layer", [SiluAndMul, PackedHeads])
def test_the_kernel_mapping_itself(layer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As ``use_kernels=True`` calls it, with a folder in place of a repository of the Hub."""
    kernels = pytest.importorskip("kernels")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "build" / "torch-cpu"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(LAYERS_OF_A_FOLDER)
    metadata = {"name": "mlps", "id": "_mlps_cpu", "version": 1, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    monkeypatch.setattr(layer, "kernel_layer_name", layer.__name__, raising=False)

    model, tokens = language_model(2).eval(), prompt()
    for block in model.model.layers:
        block.mlp = PackedHeads().double()
    with torch.no_grad():
        expected = logits_of(model)(tokens)
        mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
        found = kernels.LocalLayerRepository(tmp_path, layer_name=layer.__name__)
        with kernels.use_kernel_mapping(
            {layer.__name__: {"cpu": {mode: found}}}, inherit_mapping=False
        ):
            model = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
        torch.testing.assert_close(logits_of(flashmhf(model))(tokens), expected)
    assert replaced() == 0
    report = mhf_compiler.explain(model, options=OPTIONS)(tokens, use_cache=False)
    reasons = {miss.reason.kind for miss in report.declined if "silu_and" in miss.reason.detail}
    assert reasons == ({Kind.UNKNOWN_OPERATION} if layer is SiluAndMul else set())


def test_explain():
    report = mhf_compiler.explain(language_model(2), options=OPTIONS)(prompt(), use_cache=False)
    assert len(report.rewritten) == 2


def test_its_own_mlp_is_an_ordinary_network():
    """Without an MH-FFN nothing is rewritten, and each MLP is reported as what it is."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).double()
    assert_same_steps(
        _Logits(model), prompt(), compiler=lambda twin: logits_of(flashmhf(twin.model))
    )
    assert (replaced(), tally().declined) == (0, 0)
    report = mhf_compiler.explain(logits_of(model))(prompt())
    assert [site.reason.kind for site in report.ordinary] == [Kind.PLAIN_FFN] * 2
