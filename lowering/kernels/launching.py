"""From tensors to a launch: the problem, its constants, and the call that every kernel shares."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .loads import Operand, TokenAxes
from .tiles import Tile, padded_width


class Problem(NamedTuple):
    """The inputs of the op, under the names of its schema."""

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (G, E, f, d)
    u: Tensor | None  # (G, E, f, d)
    v: Tensor  # (G, E, f, d)
    r: Tensor | None  # (B, L, H, E)
    k_bias: Tensor | None  # (G, E, f)
    u_bias: Tensor | None  # (G, E, f)
    v_bias: Tensor | None  # (G, E, d)
    activation: str
    k_scale: float
    u_scale: float
    out_scale: float

    def scalars(self, axes: TokenAxes, tile: Tile) -> dict[str, Any]:
        """The kernel parameters that are not operands."""
        groups, networks, hidden, width = self.k.shape
        return {
            "B": axes.batch,
            "L": axes.length,
            "E": networks,
            "F": hidden,
            "D": width,
            "HEADS_PER_GROUP": self.q.shape[2] // groups,
            "ACTIVATION": self.activation,
            "K_SCALE": self.k_scale,
            "U_SCALE": self.u_scale,
            "OUT_SCALE": self.out_scale,
            "APPROXIMATE": allows_approximation(self.q.dtype),
            # Not TF32, even where PyTorch allows it: products of tiles cut their operands where the
            # library rounds them, and err four times as much.
            "PRECISION": "ieee",
            "COMPENSATED": self.q.dtype == torch.float32,
            "BM": tile.tokens,
            "BF": tile.hidden,
            "BD": padded_width(width),
        }


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that tiles are chosen for."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return 9, 0  # Triton's interpreter, which runs any choice


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel that takes a whole multiprocessor run at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132  # an H100's


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; it decides so at its import."""
    return triton.knobs.runtime.interpret


@lru_cache
def allows_approximation(dtype: torch.dtype) -> bool:
    """Whether the kernels may use `tanh.approx`: 16-bit data, on NVIDIA hardware."""
    return dtype.itemsize == 2 and torch.version.hip is None and not interpreted()


def launch(
    kernel: Any,
    programs: int,
    tile: Tile,
    device: torch.device,
    operands: Mapping[str, Operand],
    scalars: Mapping[str, Any],
) -> None:
    """Run `programs` programs of `kernel` on `device`, which need not be the current one.

    An operand named X fills the parameters X, X_strides and, where its layout may vary, X_layout.
    """
    arguments = dict(scalars)
    for name, operand in operands.items():
        arguments[name] = operand.argument
        arguments[f"{name}_strides"] = operand.strides
        if operand.layout is not None:
            arguments[f"{name}_layout"] = operand.layout
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)
