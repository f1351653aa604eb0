"""Inside activation checkpointing: the function, the module wrapper, and what is saved."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mhf_compiler
from models.harness import OPTIONS, Tally, assert_same_steps, flashmhf, tally
from models.networks import LAYERS, Tower, tokens

NAMES = ("loop", "packed")


class Checkpointed(Tower):
    """Each block is computed again in the backward pass."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args)
        self.how = {"use_reentrant": False} | others

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, **self.how)


def test_the_function():
    assert_same_steps(Checkpointed(LAYERS, NAMES).double(), tokens())
    assert tally() == Tally(sites=2 * LAYERS)


def test_the_function_in_inference():
    assert_same_steps(Checkpointed(1, NAMES).double().eval(), tokens())
    assert tally() == Tally(sites=2)


def test_without_keeping_the_random_state():
    assert_same_steps(Checkpointed(1, NAMES, preserve_rng_state=False).double(), tokens())
    assert tally() == Tally(sites=2)


class CheckpointedNetworks(Tower):
    """Only some of the blocks, and a function instead of a module."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if block is self.blocks[0]:
            return block(x)
        return checkpoint(lambda y: block(y) * 0.5, x, use_reentrant=False)


def test_some_of_the_layers():
    assert_same_steps(CheckpointedNetworks(LAYERS, NAMES).double(), tokens())
    assert tally() == Tally(sites=2 * LAYERS)


def test_the_module_wrapper():
    model = Tower(LAYERS, NAMES).double()
    for position, block in enumerate(model.blocks):
        model.blocks[position] = checkpoint_wrapper(
            block, checkpoint_impl=CheckpointImpl.NO_REENTRANT
        )
    assert_same_steps(model, tokens())
    assert tally() == Tally(sites=2 * LAYERS)


def test_the_wrapper_applied_to_networks():
    """As training frameworks do it: wrapped wherever a module suits a function."""
    model = Tower(1, NAMES).double()
    networks = {id(part) for block in model.blocks for part in block.parts[1:]}
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=checkpoint_wrapper,
        check_fn=lambda module: id(module) in networks,
    )
    assert_same_steps(model, tokens())
    assert tally() == Tally(sites=2)


def _keep_results_of_the_op(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.mhf_compiler.multi_head_ffn.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpointing_by_the_name_of_the_op():
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_results_of_the_op)
    assert_same_steps(Checkpointed(1, NAMES, context_fn=contexts).double(), tokens())
    assert tally() == Tally(sites=2)


class Nested(Checkpointed):
    """Checkpoints inside of checkpoints."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_one_checkpoint_inside_another():
    assert_same_steps(Nested(LAYERS, NAMES).double(), tokens())
    assert tally() == Tally(sites=2 * LAYERS)


def test_the_backward_pass_computes_the_op_again():
    """The wrapped network's hidden units are not kept: its input is."""
    model, x = Checkpointed(1).double(), tokens().requires_grad_()
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = flashmhf(model)(x)
    activations = [shape for shape in saved if shape[:2] == x.shape[:2]]
    assert activations == [tuple(x.shape)]
    out.sum().backward()
    assert tally() == Tally(sites=1)


def test_explain_looks_inside():
    report = mhf_compiler.explain(Checkpointed(2, NAMES).double(), options=OPTIONS)(tokens())
    assert len(report.rewritten) == 4
    assert report.graph_after.count("multi_head_ffn.default(") == 4
