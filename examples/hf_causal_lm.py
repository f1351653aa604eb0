"""A FlashMHF language model for Hugging Face transformers, trained by its Trainer.

The model is transformers' Llama with the multi-head FFN of the paper (arXiv 2512.06989) in each
layer, in plain PyTorch. Settings and weights have the names that the paper's authors gave them in
their own code, so that ``from_pretrained`` reads their checkpoints. The script trains a small model
on the bytes of Python's standard library, saves it, loads it again and lets it write::

    pip install '.[demo,hf]'
    python examples/hf_causal_lm.py --steps 200

The compiler is in three lines: the import, ``explain``, which says what is going to be rewritten,
and ``model.compile(backend="flashmhf")``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from byte_lm import PROMPT, VOCABULARY, load_text
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import initialization

import mhf_compiler


class FlashMHFConfig(transformers.LlamaConfig):
    """Llama's settings, and those of the multi-head FFN.

    ``intermediate_size`` counts the hidden units of one head, all sub-networks together.
    """

    model_type = "mhffnmoe"
    mhffnmoe_num_heads: int = 4
    mhffnmoe_num_kuv_heads: int | None = None  # heads that have weights; others share them
    mhffnmoe_num_experts: int = 1  # sub-networks of a head
    mhffnmoe_apply_rmsnorm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mhffnmoe_num_kuv_heads is None:
            self.mhffnmoe_num_kuv_heads = self.mhffnmoe_num_heads
        # What the authors' code can do as well, and none of their configurations asks for.
        unused = "skip_linear", "apply_dot_scaling", "apply_final_scaling"
        for name in (*unused, "disable_original_mlp_rmsnorm"):
            if kwargs.get(f"mhffnmoe_{name}"):
                raise ValueError(f"mhffnmoe_{name} has to be False, got True")
        super().__post_init__(**kwargs)


class HeadwiseRMSNorm(nn.Module):
    """RMS normalisation of each head by itself, in float32: q [B, L, H, d]."""

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.eps = eps

    def forward(self, q: Tensor) -> Tensor:
        wide = q.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(q.dtype)


class MultiHeadFFN(nn.Module):
    """H heads of width d, each with E gated sub-networks of f hidden units: x [B, L, H * d]."""

    def __init__(self, config: FlashMHFConfig) -> None:
        super().__init__()
        self.heads, self.sub_networks = config.mhffnmoe_num_heads, config.mhffnmoe_num_experts
        self.groups = config.mhffnmoe_num_kuv_heads or self.heads
        model, d = config.hidden_size, config.hidden_size // self.heads
        self.w_self = nn.Linear(model, model, bias=config.mlp_bias)
        self.w_self_2 = nn.Linear(model, model, bias=config.mlp_bias)
        self.q_norm = HeadwiseRMSNorm(self.heads, d, config.rms_norm_eps)
        self.normalised = config.mhffnmoe_apply_rmsnorm
        self.router = nn.Parameter(torch.empty(self.heads, d, self.sub_networks))
        self.gate_weight, self.up_weight, self.down_weight = (
            nn.Parameter(torch.empty(config.intermediate_size, self.groups * d)) for _ in range(3)
        )

    def by_head(self, weight: Tensor) -> Tensor:
        """[E * f, G * d] as [H, E, f, d]: rows lie by sub-network, columns by head."""
        weight = weight.unflatten(0, (self.sub_networks, -1)).unflatten(-1, (self.groups, -1))
        return weight.permute(2, 0, 1, 3).repeat_interleave(self.heads // self.groups, dim=0)

    def route(self, q: Tensor) -> Tensor:
        """How much each sub-network counts, [B, L, H, E]; float32 whatever the model's dtype."""
        with torch.autocast(q.device.type, enabled=False):
            r = torch.einsum("blhd,hde->blhe", q.float(), self.router.float()).sigmoid()
            return r / r.sum(-1, keepdim=True).clamp_min(1e-20)

    def forward(self, x: Tensor) -> Tensor:
        q = self.w_self(x).unflatten(-1, (self.heads, -1))  # [B, L, H, d]
        q = self.q_norm(q) if self.normalised else q
        r = self.route(q)
        gate_weight, up_weight = self.by_head(self.gate_weight), self.by_head(self.up_weight)
        down_weight = self.by_head(self.down_weight)
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        for e in range(self.sub_networks):
            gate = torch.einsum("blhd,hfd->blhf", q, gate_weight[:, e])
            up = torch.einsum("blhd,hfd->blhf", q, up_weight[:, e])
            y = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, down_weight[:, e])
            out = out + r[..., e, None] * y
        return self.w_self_2(out.to(q.dtype).flatten(2))


class FlashMHFModel(transformers.LlamaModel):
    """Llama's embedding, attention and cache, with a multi-head FFN in each layer."""

    config_class = FlashMHFConfig

    def __init__(self, config: FlashMHFConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = MultiHeadFFN(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MultiHeadFFN):
            for weight in module.parameters(recurse=False):
                initialization.normal_(weight, std=self.config.initializer_range)


class FlashMHFForCausalLM(transformers.LlamaForCausalLM):
    """The model with a head that predicts the next token."""

    config_class = FlashMHFConfig

    def __init__(self, config: FlashMHFConfig) -> None:
        super().__init__(config)
        self.model = FlashMHFModel(config)
        self.post_init()


transformers.AutoConfig.register("mhffnmoe", FlashMHFConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(FlashMHFConfig, FlashMHFForCausalLM, exist_ok=True)


class Windows(Dataset[dict[str, Tensor]]):
    """Stretches of a text, one after the other; the model shifts the labels by itself."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.tokens = text[: len(text) // length * length].long().view(-1, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[number], "labels": self.tokens[number]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--recompute", action="store_true", help="checkpoint each layer")
    parser.add_argument("--written", type=int, default=100, help="bytes to generate in the end")
    parser.add_argument("--out", type=Path, default=Path("runs/hf_causal_lm"))
    options = parser.parse_args(arguments)

    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": options.layers, "mhffnmoe_num_experts": 4}
    sizes |= {"vocab_size": VOCABULARY, "eos_token_id": None}
    model = FlashMHFForCausalLM(FlashMHFConfig(**sizes))
    text = Windows(load_text()[0], options.length)
    print(mhf_compiler.explain(model)(text.tokens[: options.batch]))

    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.compile(backend="flashmhf")
    settings = transformers.TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=2e-3,
        logging_steps=10,
        report_to="none",
    )
    transformers.Trainer(model, settings, train_dataset=text).train()
    model.save_pretrained(options.out)

    model = transformers.AutoModelForCausalLM.from_pretrained(options.out).eval()
    model.compile(backend="flashmhf")
    how = {"cache_implementation": "static", "disable_compile": True}  # by generate, with Inductor
    tokens = model.generate(torch.tensor([list(PROMPT)]), max_new_tokens=options.written, **how)
    print(bytes(tokens[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
