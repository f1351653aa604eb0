"""The op as a layer for Hugging Face's package `kernels`: writes its repository, and loads it.

    python examples/kernel_layer.py build/flashmhf

A model that marks its network with `use_kernel_forward_from_hub("MultiHeadFFN")`, as below, then
runs the op in its place, compiled or not. Where it runs, this package has to be installed. Needs
`pip install kernels`; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import (
    LocalLayerRepository,
    Mode,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import Tensor, nn

LAYER = '''\
"""A layer that `kernels` puts in place of a module's forward, over the module's own weights."""

from types import SimpleNamespace

from torch import nn

import mhf_compiler


class MultiHeadFFN(nn.Module):
    """Gated networks per head: `gate`, `up` and `down` are (heads, networks, hidden, width)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, q, r):
        return mhf_compiler.multi_head_ffn(q, self.gate, self.up, self.down, r)


layers = SimpleNamespace(MultiHeadFFN=MultiHeadFFN)
'''


def write(folder: Path) -> None:
    """A repository of `kernels`: the same layer for each device."""
    for device in ("cpu", "cuda"):
        variant = folder / "build" / f"torch-{device}"
        variant.mkdir(parents=True, exist_ok=True)
        metadata = {
            "name": "flashmhf",
            "id": f"_flashmhf_{device}",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": device},
        }
        (variant / "__init__.py").write_text(LAYER)
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


@use_kernel_forward_from_hub("MultiHeadFFN")
class Networks(nn.Module):
    """Four heads of three SwiGLUs, as a model's author writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(4, 3, 24, 16) / 4) for _ in "123")

    def forward(self, q: Tensor, r: Tensor) -> Tensor:
        gate, up = (torch.einsum("blhd,hefd->blhef", q, w) for w in (self.gate, self.up))
        hidden = F.silu(gate) * up * r.unsqueeze(-1)
        return torch.einsum("blhef,hefd->blhd", hidden, self.down)


def with_layer(model: nn.Module, folder: Path, device: str) -> nn.Module:
    """A model with the layer in place of what it has marked, for training and torch.compile."""
    mode = Mode.TRAINING | Mode.TORCH_COMPILE
    layer = LocalLayerRepository(folder, layer_name="MultiHeadFFN")
    mapping = {"MultiHeadFFN": {device: {mode: layer}}}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        return kernelize(model, mode=mode, device=device, use_fallback=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the repository")
    folder = parser.parse_args(argv).folder.absolute()
    write(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: nn.Module = Networks().to(device)
    q, r = torch.randn(2, 5, 4, 16, device=device), torch.rand(2, 5, 4, 3, device=device)
    expected = model(q, r)

    model = with_layer(model, folder, device)
    for call in (model, torch.compile(model, backend="aot_eager")):
        torch.testing.assert_close(call(q, r), expected, rtol=1e-4, atol=1e-4)
    print(f"the layer of {folder} agrees: {model(q, r).grad_fn.name()}")


if __name__ == "__main__":
    main()
