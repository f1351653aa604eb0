"""Does a PyTorch release still show us the graphs that we know?

How many sites each of ten well-known modules must give, and whether every private name is there. A
release that changes how a module is traced, or that renames what compat.py needs, fails here with
the module or the name. Run this file first with a new release or a nightly build:

    pytest tests/test_canary.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.networks import FFNS, WIDTH, ffn
from support.private_names import missing
from torch import Tensor, nn

import mhf_compiler

LAYERS = 2
Model = Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]


def spelling(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two layers of a network that the tests of whole models use."""
    return nn.ModuleList([ffn(name) for _ in range(LAYERS)]), (torch.randn(2, 5, WIDTH),)


def llama_with_heads() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Hugging Face's Llama, each of its MLPs replaced by the paper's layer."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    for layer in model.model.layers:
        layer.mlp = ffn("loop")
    return functools.partial(model, use_cache=False), (torch.randint(61, (2, 7)),)


def experts_of_llama4() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Hugging Face's experts of Llama 4 as they are: one head for each expert."""
    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = llama4.Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    layers = nn.ModuleList([llama4.Llama4TextExperts(config) for _ in range(LAYERS)])
    return layers, (torch.randn(24, 16),)


MODULES: dict[str, Model] = {
    **{name: functools.partial(spelling, name) for name in FFNS},
    "transformers: Llama with heads": llama_with_heads,
    "transformers: Llama 4's experts": experts_of_llama4,
}


@pytest.mark.parametrize("name", MODULES)
def test_every_layer_is_found(name: str):
    model, inputs = MODULES[name]()
    run = model
    if isinstance(model, nn.ModuleList):
        run = nn.Sequential(*model)
    torch.compiler.reset()
    report = mhf_compiler.explain(run, options={"rewrite": "always"})(*inputs)
    assert len(report.rewritten) == LAYERS, f"torch {torch.__version__}, {name}: {report}"


def test_every_private_name_is_there():
    """What is gone has a new name or a new place: see mhf_compiler/compat.py."""
    gone = missing()
    assert not gone, f"torch {torch.__version__} lacks {', '.join(gone)}"


def test_a_private_name_that_is_gone_is_named():
    source = "import torch\ndef f():\n    return torch._C._no_such_name, torch._C._functorch"
    assert missing(source) == ["torch._C._no_such_name"]
    assert missing("from torch._guards import tracing, _none") == ["torch._guards:_none"]
