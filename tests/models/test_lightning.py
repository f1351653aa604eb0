"""Under Lightning: its Trainer and Fabric call a compiled model as they call any other.

Lightning is not among the packages that ``make`` installs: CONTRIBUTING.md says how to run this.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.harness import OPTIONS, flashmhf, graphs_compiled, replaced
from models.networks import Tower, tokens

lightning = pytest.importorskip("lightning")

STEPS = 2


class Module(lightning.LightningModule):
    """A model, and how it is trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        loss = self(batch).square().mean()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def model() -> nn.Module:
    return Tower(1, ("loop", "packed")).double()


def batches() -> DataLoader[Any]:
    return DataLoader([*torch.cat([tokens() for _ in range(STEPS)])], batch_size=2)


@pytest.mark.parametrize("compiled", ["the model inside", "the module in place", "the module"])
def test_trainer(compiled: str, tmp_path: Path):
    """Losses and weights are those of eager training, whatever is compiled."""
    eager = Module(model())
    module: Any = copy.deepcopy(eager)
    inner = module.model
    if compiled == "the model inside":
        module.model = flashmhf(inner)
    elif compiled == "the module in place":
        module.compile(backend="flashmhf", options=OPTIONS)
    else:
        module = flashmhf(module)
    data = batches()
    for each in (eager, module):
        lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(each, data)
    torch.testing.assert_close(module.losses, eager.losses)
    torch.testing.assert_close(inner.state_dict(), eager.model.state_dict())
    assert len(eager.losses) == STEPS
    assert replaced() == 2 * graphs_compiled() > 0


def test_fabric():
    """It takes the compiled model apart, wraps the model, and compiles the wrapper the same way."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    eager = model()
    twin = copy.deepcopy(eager)
    losses: list[list[Tensor]] = []
    data = batches()
    for each, call in ((eager, eager), (twin, flashmhf(twin))):
        wrapped, optimizer = fabric.setup(call, torch.optim.SGD(each.parameters(), lr=1e-2))
        losses.append([])
        for x in fabric.setup_dataloaders(data):
            loss = wrapped(x).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(twin.state_dict(), eager.state_dict())
    assert replaced() == 2
