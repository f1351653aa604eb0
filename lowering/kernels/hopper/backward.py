"""What the backward kernels for Hopper have in common, in Gluon.

The same kernels as in `plain/backward.py`, by the same formulas, with explicit control of what
plain Triton leaves to the compiler: a warp that only moves tiles, two warpgroups that only compute,
and which operands of a product lie in registers.

    backward_query.py     mhf_hopper_backward_dq_kernel     dQ and dR
    backward_weights.py   mhf_hopper_backward_dv_kernel     dV
                          mhf_hopper_backward_dk_du_kernel  dK and dU
                          mhf_hopper_backward_dk_dv_kernel  dK and dV without a gate

A warpgroup's instruction multiplies 64 rows, and with both operands in shared memory it reads them
about as fast as shared memory can give. So each warpgroup has 64 rows of its own, keeps in
registers the operand that does not change where there is room, and feeds the products of hidden
units straight from its registers. While one warpgroup is at its activations, the other has the
matrix units.

They take networks of 16-bit data and heads up to 128 wide, in any layout that a tensor descriptor
takes. Everything else goes to the plain kernels, and so does the gradient of V's bias. Heads
narrower than 64 are computed as 64 columns, of which the descriptors fill the ones that are not
there with zeros; products that sum over them stop at a power of two in the kernels of dQ and of dK
and dV. Biases are read through pointers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...problem import Problem
from ...tiles import Tile, padded_width
from ..operands import Operand
from .compat import async_load, async_store

CONSUMERS = gl.constexpr(2)  # warpgroups that compute; one more warp moves tiles
ROWS = gl.constexpr(64)  # of a consumer's tile: tokens in the kernel of dQ, else hidden units
REGISTERS = gl.constexpr(240)  # of a consumer's thread
COLUMNS_AT_LEAST = 64  # the narrowest tile: what one swizzled row of shared memory holds


@dataclass(frozen=True)
class Constants:
    """All that a kernel is compiled for: sizes, the network, and how tiles are cut and stored.

    One argument stands for all of them, and is passed on whole: each attribute of it is a constant.
    There are fields alone, no properties: Triton knows a compiled kernel by their values. A string
    has to be named a constant before it is passed on by itself (Triton 3.6).
    """

    E: int  # sub-networks
    F: int  # hidden units of each
    D: int  # width of a head
    HEADS_PER_GROUP: int
    ACTIVATION: str
    K_SCALE: float
    U_SCALE: float
    OUT_SCALE: float
    BS: int  # rows of the tiles that stream past: hidden units in the kernel of dQ, else tokens
    BD: int
    BC: int  # columns of a head's, of which there may be fewer than in a tile
    STAGES: int
    LAYOUTS: tuple[str | None, ...]  # of the weights, in the order K, U, V: "rows" or "columns"
    # The same by name, and of the weights' gradients. None for what is not there, as U of a network
    # without a gate.
    K: str | None = None
    U: str | None = None
    V: str | None = None
    dK: str | None = None
    dU: str | None = None
    dV: str | None = None


@gluon.jit
def matrix(buffer, COLUMNS: gl.constexpr):
    """A tile in shared memory, [1, 1, rows, columns] as it was copied, as a matrix [rows, BD]."""
    tile = buffer.reshape([buffer.shape[2], buffer.shape[3]])
    return tile.permute((1, 0)) if COLUMNS else tile


@gluon.jit
def head_columns(tile, C: gl.constexpr):
    """A matrix [rows, BD] without the columns that a narrow head does not have: [rows, BC]."""
    return tile.slice(0, C.BC, dim=1) if C.BC < C.BD else tile


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The buffer after `stage`, and the parity of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load_tile(descriptor, outer, inner, first, bar, buffer, COLUMNS: gl.constexpr):
    """Start the copy of a tile from row `first` on; `bar` is signalled when it has arrived."""
    if COLUMNS:
        async_load(descriptor, [outer, inner, 0, first], bar, buffer)
    else:
        async_load(descriptor, [outer, inner, first, 0], bar, buffer)


@gluon.jit
def store_tile(descriptor, outer, inner, first, value, buffer, COLUMNS: gl.constexpr):
    """Round `value` [rows, BD] and store it through `buffer`; waits until the copy is done."""
    matrix(buffer, COLUMNS).store(value.to(descriptor.dtype))
    fence_async_shared()
    if COLUMNS:
        async_store(descriptor, [outer, inner, 0, first], buffer)
    else:
        async_store(descriptor, [outer, inner, first, 0], buffer)
    tma.store_wait(0)


def constants(
    problem: Problem, tile: Tile, streamed: int, operands: dict[str, Operand]
) -> Constants:
    groups, sub_networks, hidden, head_dim = problem.k.shape
    weights = ("K", "U", "V", "dK", "dU", "dV")
    present = {name: x for name, x in operands.items() if x.argument is not None}
    layouts = {name: present[name].layout for name in weights if name in present}
    return Constants(
        E=sub_networks,
        F=hidden,
        D=head_dim,
        HEADS_PER_GROUP=problem.q.shape[2] // groups,
        ACTIVATION=problem.activation,
        K_SCALE=problem.k_scale,
        U_SCALE=problem.u_scale,
        OUT_SCALE=problem.out_scale,
        BS=streamed,
        BD=tile.padded_width(head_dim),
        BC=padded_width(head_dim),
        STAGES=tile.stages,
        LAYOUTS=tuple(layout for name, layout in layouts.items() if len(name) == 1),
        **layouts,
    )


def gluon_arguments(operands: dict[str, Operand]) -> dict[str, Any] | None:
    """The operands as Gluon takes them; None if one has no tiles."""
    arguments: dict[str, Any] = {}
    for name, operand in operands.items():
        x = operand.argument
        if isinstance(x, Tensor):
            return None
        arguments[name] = x and TensorDescriptor(
            x.base,
            x.shape,
            x.strides,
            x.block_shape,
            _shared_layout(tuple(x.block_shape), x.base.dtype.itemsize),
        )
    return arguments


def bias_arguments(**biases: Tensor | None) -> dict[str, Any]:
    """Biases and their gradients, (G, E, f) or (G, E, d), through pointers."""
    arguments: dict[str, Any] = dict(biases)
    for name, x in biases.items():
        arguments[f"{name}_strides"] = None if x is None else x.stride()
    return arguments


@lru_cache
def _shared_layout(block: tuple[int, ...], itemsize: int) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory: swizzled for the matrix units, or a plain row of R."""
    swizzle = 128 if block[-2] > 1 else 0
    return gl.NVMMASharedLayout(swizzle, 8 * itemsize, rank=len(block))
