"""Batch and length that change: no lost match, no recompilation beyond that without the back end.

Which sizes become symbols is Dynamo's decision, and so is the number of graphs. The yardstick is
the number that another back end gets for the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.inductor import NO_CPP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.harness import (
    Model,
    Tally,
    assert_close,
    flashmhf,
    forget,
    graphs_compiled,
    step,
    tally,
)
from models.networks import BATCH, FFNS, LENGTH, Tower, ffn, tokens

NAMES = [name for name in FFNS if name != "vmap"]
if torch.__version__ >= (2, 13):  # before, Dynamo itself fails on vmap with symbolic sizes
    NAMES.append("vmap")

LONGER = [(BATCH, LENGTH), (BATCH, LENGTH + 4), (BATCH, LENGTH + 9)]
LARGER = [(BATCH, LENGTH), (BATCH + 1, LENGTH), (BATCH + 4, LENGTH)]
BOTH = [(BATCH, LENGTH), (BATCH + 1, LENGTH + 2), (BATCH + 3, LENGTH), (BATCH, LENGTH + 8)]
ONES = [(BATCH, LENGTH), (1, LENGTH), (BATCH, 1), (1, 1)]


class Checkpointed(Tower):
    """Each block is computed again in the backward pass."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)


def aot_eager(model: nn.Module, **how: Any) -> Model:
    return torch.compile(model, backend="aot_eager", **how)


def graphs_for(
    model: nn.Module,
    compiler: Callable[..., Model],
    sizes: Sequence[tuple[int, int]],
    mark: Sequence[int] = (),
    **how: Any,
) -> int:
    """How many graphs are compiled for inputs of these sizes; our calls are compared with eager.

    ``mark`` names the dimensions that are marked as dynamic.
    """
    forget()
    compiled = compiler(model, **how)

    def call(x: Tensor) -> Tensor:
        for dim in mark:
            torch._dynamo.mark_dynamic(x, dim)
        return compiled(x)

    for batch, length in sizes:
        x = tokens(batch, length, next(model.parameters()).dtype)
        if compiler is flashmhf:
            assert_close(step(call, model, [x]), step(model, model, [x]))
        else:  # it is there for the number of its graphs
            with torch.set_grad_enabled(model.training):
                call(x.requires_grad_(model.training))
    return graphs_compiled()


def assert_no_more_graphs(model: nn.Module, networks: int, *args: Any, **how: Any) -> int:
    """As many graphs as another back end compiles, with all networks replaced in each."""
    alone = graphs_for(model, aot_eager, *args, **how)
    assert graphs_for(model, flashmhf, *args, **how) == alone
    assert tally() == Tally(sites=alone * networks)
    return alone


# Sizes that Dynamo finds to be dynamic when they change.


@pytest.mark.parametrize("sizes", [LONGER, LARGER, ONES], ids=["length", "batch", "sizes of one"])
def test_every_size(sizes: Sequence[tuple[int, int]]):
    assert_no_more_graphs(Tower(1, ["packed", "bmm"]).double(), 2, sizes)


@pytest.mark.parametrize("mode", ["eval", "checkpointed"])
def test_every_mode(mode: str):
    make = Checkpointed if mode == "checkpointed" else Tower
    model = make(1, ["einsum"]).double().train(mode != "eval")
    assert_no_more_graphs(model, 1, BOTH[:2])


# Sizes that are said to be dynamic.


def test_every_spelling():
    """A marked size that something fixes is an error in Dynamo, so nothing here fixes one."""
    model = Tower(1, NAMES).double()
    assert assert_no_more_graphs(model, len(NAMES), BOTH[:3], mark=(0, 1)) == 1


@pytest.mark.parametrize("mark", [(0,), (1,)], ids=["batch", "length"])
def test_one_marked_size_needs_one_graph(mark: tuple[int, ...]):
    names = ["packed", "grouped conv"]
    model = Tower(1, names).double()
    sizes = {(0,): LARGER, (1,): LONGER}[mark]
    assert assert_no_more_graphs(model, len(names), sizes, mark=mark) == 1


def test_all_sizes_dynamic():
    model = Tower(1, ["packed", "bmm"]).double()
    assert assert_no_more_graphs(model, 2, BOTH, dynamic=True) == 1


@pytest.mark.parametrize("name", ["einsum", "bmm"])
def test_batch_and_length_of_one_symbol(name: str):
    """Equal sizes have one symbol, so that a reshape makes sizes such as s**2 // s."""
    model = Tower(1, [name]).double()
    assert assert_no_more_graphs(model, 1, [(3, 3), (5, 5)], dynamic=True) == 1


def test_no_sizes_dynamic():
    model = Tower(1, ["einsum"]).double()
    assert assert_no_more_graphs(model, 1, LONGER, dynamic=False) == len(LONGER)


# Through Inductor.


def test_inductor_compiles_no_more_graphs():
    model = ffn("einsum").double()
    alone = graphs_for(model, inductor, BOTH)
    assert graphs_for(model, flashmhf, BOTH, options={"fallback": "inductor"}) == alone
    assert tally() == Tally(sites=alone)


def inductor(model: nn.Module, **how: Any) -> Model:
    return torch.compile(model, backend="inductor", options=NO_CPP, **how)


class HeadsOutermost(nn.Module):
    """Queries and router lie head by head in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(shape) / 4)
            for shape in [(4, 2, 8, 6), (4, 2, 8, 6), (4, 2, 6, 8)]
        )
        self.router = nn.Parameter(torch.randn(4, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2).contiguous().transpose(1, 2)
        shares = torch.einsum("blhd,hde->blhe", q, self.router).sigmoid()
        shares = shares / shares.sum(-1, keepdim=True)
        y = torch.zeros_like(q, dtype=torch.float32)
        for e in range(2):
            gate = torch.einsum("blhd,hdf->blhf", q, self.gate[:, e]).relu()
            hidden = gate * torch.einsum("blhd,hdf->blhf", q, self.up[:, e])
            part = torch.einsum("blhf,hfd->blhd", hidden, self.down[:, e])
            y = y + shares[..., e, None].float() * part.float()
        return x + y.to(x.dtype).flatten(2)


@pytest.mark.parametrize("dim", [0, 1], ids=["one token each", "one sequence"])
def test_what_is_saved_for_the_backward_graph_fixes_no_size(dim: int):
    """Its strides include those of the dimension of one."""
    model = HeadsOutermost().bfloat16()
    sizes = [(7, 1), (11, 1)] if dim == 0 else [(1, 7), (1, 11)]
    options = {"fallback": "inductor", **NO_CPP}
    assert graphs_for(model, flashmhf, sizes, mark=(dim,), options=options) == 1
    assert tally() == Tally(sites=1)
