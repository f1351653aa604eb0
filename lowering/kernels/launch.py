"""From operands to a launch: the constants of a kernel, and the call that every kernel shares."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from ..device import capability, interpreted
from ..problem import Problem
from ..tiles import BatchedTile, Tile
from .compat import OPTIONS
from .operands import Operand, TokenAxes
from .replay import current_device, record


def parameters(problem: Problem, axes: TokenAxes, tile: Tile) -> dict[str, Any]:
    """The parameters of a kernel that are not operands."""
    groups, sub_networks, hidden, head_dim = problem.k.shape
    return {
        "B": axes.batch,
        "L": axes.length,
        "E": sub_networks,
        "F": hidden,
        "D": head_dim,
        "HEADS_PER_GROUP": problem.q.shape[2] // groups,
        "ACTIVATION": problem.activation,
        "K_SCALE": problem.k_scale,
        "U_SCALE": problem.u_scale,
        "OUT_SCALE": problem.out_scale,
        "APPROXIMATE": allows_approximation(problem.q.dtype),
        # Not TF32, even where PyTorch allows it: products of tiles cut their operands where the
        # library rounds them, and err four times as much.
        "PRECISION": "ieee",
        "COMPENSATED": problem.q.dtype == torch.float32,
        "BM": tile.tokens,
        "BF": tile.hidden,
        "BD": tile.padded_width(head_dim),
    }


@lru_cache
def allows_approximation(dtype: torch.dtype) -> bool:
    """Whether the kernels may use `tanh.approx`: 16-bit data, on NVIDIA hardware."""
    return dtype.itemsize == 2 and torch.version.hip is None


def early_launch(device: torch.device, wanted: bool = True) -> dict[str, Any]:
    """Options that launch a kernel while the one before it runs, if `wanted` and possible.

    Such a kernel (programmatic dependent launch) calls `gdc_wait` in all of its programs before it
    touches memory: it returns when the kernel before it has ended and its results can be seen, with
    those of all that this one had waited for. With `gdc_launch_dependents` it lets the next kernel
    start before it ends itself, if that one is launched so.
    """
    early = wanted and not interpreted() and capability(device)[0] >= 9
    return {"EARLY": early} | ({"launch_pdl": True} if early else {})


def sums_lie_apart(device: torch.device) -> bool:
    """Whether two products of a loop, added to one sum, are to have a sum of their own each.

    Blackwell's matrix units (not those of its consumer cards) add in tensor memory. Before 3.9
    Triton moves a sum of two products through registers between them, and may do so before the
    first product has ended. On other cards a second sum only takes registers.
    """
    return capability(device)[0] in (10, 11)


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
    start(kernel, programs, tile, device, arguments)


def start(
    kernel: Any,
    programs: int,
    tile: Tile | BatchedTile,
    device: torch.device,
    arguments: Mapping[str, Any],
) -> None:
    """`launch`, with every parameter of the kernel already under its name."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **OPTIONS}
    with current_device(device):
        compiled = kernel[(programs,)](**arguments, **options)
    record(compiled, programs, [arguments.get(name) for name in kernel.arg_names])
