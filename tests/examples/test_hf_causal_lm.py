"""The example for Hugging Face: training by its Trainer, checkpoints, generation.

Those tests that need the Trainer are skipped where accelerate is not installed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inductor import NO_CPP, no_caches
from torch import Tensor

import mhf_compiler
from mhf_compiler import compat
from mhf_compiler.compat import counters

transformers = pytest.importorskip("transformers", minversion="5")

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = {"rewrite": "always", "fallback": "aot_eager", "strict": True}
LAYERS, HEADS, NETWORKS, HIDDEN, WIDTH = 2, 3, 2, 5, 8
ONE_LAYER = {"num_hidden_layers": 1}  # where two would tell no more


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for package in ("matplotlib", "psutil", "rich", "tqdm"):
        pytest.importorskip(package)
    load("byte_lm")
    return load("hf_causal_lm")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def config_of(example: ModuleType, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 256,
        "hidden_size": HEADS * WIDTH,
        "intermediate_size": NETWORKS * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,  # so that all parts of the model matter
        "bos_token_id": None,
        "eos_token_id": None,
        "mhffnmoe_num_heads": HEADS,
        "mhffnmoe_num_experts": NETWORKS,
    }
    return example.FlashMHFConfig(**sizes | changes)


def model_of(example: ModuleType, **changes: Any) -> Any:
    return example.FlashMHFForCausalLM(config_of(example, **changes))


def rewritten() -> int:
    assert counters["flashmhf"]["failures"] == 0
    return counters["flashmhf"]["sites_rewritten"]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(256, (batch, length))


# Training.


def trainer_of(example: ModuleType, model: Any, folder: Path, **settings: Any) -> Any:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    text = example.Windows(example.load_text()[0], length=12)
    return transformers.Trainer(model, arguments, train_dataset=text)


@pytest.mark.parametrize("recompute", [False, True])
def test_two_steps_of_the_trainer(example: ModuleType, tmp_path: Path, recompute: bool):
    """Losses and weights are those of eager training; each layer's network is rewritten."""
    model = model_of(example).double()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="flashmhf", options=OPTIONS)
    settings = {"gradient_checkpointing": recompute}
    losses = []
    for each in (model, compiled):
        trainer = trainer_of(example, each, tmp_path, **settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0])
    assert len(losses[0]) == 2
    torch.testing.assert_close(compiled.state_dict(), model.state_dict(), rtol=1e-6, atol=1e-8)
    assert rewritten() == LAYERS * graphs() > 0


def test_training_in_bfloat16(example: ModuleType, tmp_path: Path):
    """The Trainer wraps the model's forward in autocast."""
    model = model_of(example, **ONE_LAYER)
    model.compile(backend="flashmhf", options=OPTIONS)
    trainer = trainer_of(example, model, tmp_path, bf16=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] < 10
    assert rewritten() == graphs() > 0


def test_accelerate_knows_no_back_end_but_its_own(example: ModuleType, tmp_path: Path):
    """The day this fails, docs/hugging-face.md has a simpler way to tell of."""
    settings = {"torch_compile_backend": "flashmhf"}
    with pytest.raises(ValueError, match="FLASHMHF"):
        trainer_of(example, model_of(example), tmp_path, **settings)


def test_the_trainer_compiles_with_passes_of_inductors(example: ModuleType, tmp_path: Path):
    """``torch_compile`` names Inductor and takes no options: they are set for the process."""
    options = mhf_compiler.inductor_options({"rewrite": "always"}) | NO_CPP
    with torch._inductor.config.patch(options), no_caches():
        trainer = trainer_of(example, model_of(example, **ONE_LAYER), tmp_path, torch_compile=True)
        trainer.train()
    assert rewritten() == graphs() > 0


def test_checkpointing_by_the_models_own_switch(example: ModuleType):
    model = model_of(example).double()
    expected = gradients_of(model, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.compile(backend="flashmhf", options=OPTIONS)
    torch.testing.assert_close(gradients_of(model, model), expected)
    assert rewritten() == LAYERS


def gradients_of(call: Any, model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    data = tokens()
    model.zero_grad()
    call(data, labels=data, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# Checkpoints and generation.


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_saved_is_loaded(example: ModuleType, tmp_path: Path, compiled: bool):
    """A model that is compiled in place has the keys of one that is not."""
    model, data = model_of(example).eval(), tokens()
    expected = model(data).logits
    if compiled:
        model.compile(backend="flashmhf", options=OPTIONS)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.mhffnmoe_num_experts == NETWORKS
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded.eval()(data).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_it_writes_what_the_eager_model_writes(example: ModuleType, cache: str):
    model, prompt = model_of(example, **ONE_LAYER).double().eval(), tokens(batch=1)
    how = {"max_new_tokens": 6, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(prompt, do_sample=False, **how)
    model.compile(backend="flashmhf", options=OPTIONS)
    assert model.generate(prompt, do_sample=False, **how).tolist() == expected.tolist()
    assert len(set(expected[0].tolist())) > 2
    assert rewritten() == graphs() > 0


def test_weights_shared_by_groups_of_heads(example: ModuleType):
    model = model_of(example, **ONE_LAYER, mhffnmoe_num_heads=6, mhffnmoe_num_kuv_heads=3).double()
    expected = gradients_of(model, model)
    torch.testing.assert_close(
        gradients_of(torch.compile(model, backend="flashmhf", options=OPTIONS), model), expected
    )
    assert rewritten() == 1


def test_the_script(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """From the report to the text, with nothing in place of Inductor."""
    pytest.importorskip("accelerate")
    monkeypatch.setattr(compat, "compile_graph", lambda name, gm, *others: gm.forward)
    sizes = {"layers": 1, "steps": 2, "batch": 2, "length": 16, "written": 3}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    example.main([*options, "--recompute", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "MH-FFNs" in printed
    assert example.PROMPT.decode() in printed
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mhffnmoe"


# What the paper's authors publish: configurations, and the names and shapes of the weights.

#: of their repository's configuration for 128M parameters, as it stands there
PUBLISHED: dict[str, Any] = {
    "_name_or_path": None,
    "architectures": ["MHFFNMoEForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "model_type": "mhffnmoe",
    "num_attention_heads": 12,
    "num_hidden_layers": 10,
    "num_key_value_heads": 12,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 50432,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rope_theta": 10000.0,
    "mhffnmoe_num_heads": 8,
    "mhffnmoe_num_kuv_heads": 8,
    "mhffnmoe_num_experts": 8,
    "mhffnmoe_skip_linear": False,
    "mhffnmoe_apply_dot_scaling": False,
    "mhffnmoe_apply_final_scaling": False,
    "mhffnmoe_custom_init": True,
    "mhffnmoe_init_wself_identity": False,
    "mhffnmoe_apply_rmsnorm": False,
    "mhffnmoe_init_w_self_gain": 0.707,
    "mhffnmoe_init_w_self_2_gain": 0.707,
    "mhffnmoe_init_gate_gain": 1.0,
    "mhffnmoe_init_up_gain": 1.0,
    "mhffnmoe_init_down_gain": 1.0,
    "mhffnmoe_init_router_gain": 1.0,
}
#: what their configurations of 350M and 1.3B parameters have in place of it
LARGER = [
    {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 20,
        "tie_word_embeddings": False,
        "mhffnmoe_num_experts": 11,
        "mhffnmoe_apply_rmsnorm": True,
    },
    {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 20,
        "tie_word_embeddings": False,
        "mhffnmoe_num_heads": 16,
        "mhffnmoe_num_kuv_heads": 16,
        "mhffnmoe_num_experts": 22,
        "mhffnmoe_apply_rmsnorm": True,
    },
]


def layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors; tied embeddings are saved once."""
    model, hidden = config["hidden_size"], config["intermediate_size"]
    heads, networks = config["mhffnmoe_num_heads"], config["mhffnmoe_num_experts"]
    columns = model // heads * config["mhffnmoe_num_kuv_heads"]
    layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{letter}_proj.weight": (model, model) for letter in "qkvo"},
        "mlp.w_self.weight": (model, model),
        "mlp.w_self_2.weight": (model, model),
        "mlp.q_norm.weight": (heads, model // heads),
        **{f"mlp.{name}_weight": (hidden, columns) for name in ("gate", "up", "down")},
        "mlp.router": (heads, model // heads, networks),
        "input_layernorm.weight": (model,),
        "post_attention_layernorm.weight": (model,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], model),
        "model.norm.weight": (model,),
    }
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], model)
    return shapes


@pytest.mark.parametrize("change", [{}, *LARGER], ids=["128M", "350M", "1.3B"])
def test_the_published_configurations(example: ModuleType, change: dict[str, Any]):
    """Weights have the names and shapes that the authors' models have."""
    published = PUBLISHED | change
    config = example.FlashMHFConfig.from_dict(published)
    with torch.device("meta"):
        model = example.FlashMHFForCausalLM(config)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == layout(published)
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("normalised", [False, True])
def test_a_checkpoint_in_their_layout(example: ModuleType, tmp_path: Path, normalised: bool):
    """Random weights by their names: all are read, and the first network is their formula."""
    from safetensors.torch import save_file

    small = PUBLISHED | {
        "hidden_size": HEADS * WIDTH,
        "intermediate_size": NETWORKS * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "mhffnmoe_num_heads": HEADS,
        "mhffnmoe_num_kuv_heads": HEADS,
        "mhffnmoe_num_experts": NETWORKS,
        "mhffnmoe_apply_rmsnorm": normalised,
    }
    weights = {name: torch.randn(shape) / 4 for name, shape in layout(small).items()}
    (tmp_path / "config.json").write_text(json.dumps(small))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading.values()), loading

    mlp = {name: weights[f"model.layers.0.mlp.{name}"].double() for name in NETWORK}
    x = torch.randn(2, 7, HEADS * WIDTH)
    expected = formula(mlp, x.double(), normalised)
    torch.testing.assert_close(
        model.model.layers[0].mlp(x).double(), expected, rtol=1e-4, atol=1e-5
    )
    mhf_compiler.assert_rewritten(model, (tokens() % 61,), sites=LAYERS, options=OPTIONS)


NETWORK = (
    *("w_self.weight", "w_self_2.weight", "q_norm.weight"),
    *("gate_weight", "up_weight", "down_weight", "router"),
)


def formula(weights: dict[str, Tensor], x: Tensor, normalised: bool) -> Tensor:
    """A weight's rows go through the sub-networks one after the other, its columns by head."""
    q = (x @ weights["w_self.weight"].T).unflatten(-1, (HEADS, WIDTH))
    if normalised:
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-5) * weights["q_norm.weight"]
    r = torch.einsum("blhd,hde->blhe", q, weights["router"]).sigmoid()
    r = r / r.sum(-1, keepdim=True)
    out = torch.zeros_like(q)
    for h in range(HEADS):
        for e in range(NETWORKS):
            rows, columns = slice(e * HIDDEN, (e + 1) * HIDDEN), slice(h * WIDTH, (h + 1) * WIDTH)
            k, u, v = (weights[f"{name}_weight"][rows, columns] for name in ("gate", "up", "down"))
            y = (F.silu(q[:, :, h] @ k.T) * (q[:, :, h] @ u.T)) @ v
            out[:, :, h] += r[:, :, h, e, None] * y
    return out.flatten(2) @ weights["w_self_2.weight"].T


@pytest.mark.parametrize("name", ["skip_linear", "apply_dot_scaling", "apply_final_scaling"])
def test_settings_that_no_published_configuration_has(example: ModuleType, name: str):
    """They are refused where they are switched on: the results would be others."""
    with pytest.raises(ValueError, match=name):
        example.FlashMHFConfig.from_dict(PUBLISHED | {f"mhffnmoe_{name}": True})
