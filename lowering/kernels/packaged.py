"""The ops in a package of AOTInductor's: operations that Inductor compiles and C++ launches.

On a GPU our ops choose and launch their kernels in Python, and a package is to run without. So
while Inductor makes one, each op is spelled as what Inductor can see through: plain Triton's
kernels, called as if they were a user's own (``torch.library.wrap_triton``), and PyTorch's products
where kernels/batched would take those.

All is chosen here, once. Tensors are read through pointers, since descriptors are made in Python at
each launch, and strides are parameters of their own, since Inductor passes no tuples. Where the
number of tokens is dynamic, the tile is that of many, as it is where rewriting is decided on, and
hidden units are not cut in parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from mhf_compiler.compat import statically_known_true

from ..activations import ACTIVATIONS
from ..ops.common import empty_like_in_order
from ..problem import Problem
from ..tiles import MANY_TOKENS, Tile, packaged
from .operands import Operand
from .plain.forward import mhf_forward_kernel, work_of_forward
from .plain.router import mhf_router_kernel
from .plain.router import work_of_forward as work_of_router
from .splitting import SUM_TILE, mhf_add_parts_kernel, work_of_sum

__all__ = ["network", "router"]


def network(*arguments: Any) -> Tensor:
    """`multi_head_ffn`, of arguments that were checked."""
    problem, others = Problem.split(arguments)
    out_order, out_dtype = (*others, None, None)[:2]
    q = problem.q
    out_dtype = out_dtype or q.dtype
    out = empty_like_in_order(q, q.shape, out_order, out_dtype)
    if statically_known_true(out.numel() == 0):
        return out
    tile = _tile(problem, out_dtype)
    if tile is None:
        return _by_products(problem, out_order, out_dtype)
    work = work_of_forward(problem, out, tile)
    _launch(mhf_packaged_forward_kernel, work.programs, tile, work.operands, work.scalars)
    if work.partial is not None:
        programs, operands, scalars = work_of_sum(
            work.partial, out, work.axes, work.split, work.tiles, problem.out_scale
        )
        _launch(mhf_packaged_add_parts_kernel, programs, SUM_TILE, operands, scalars)
    return out


def router(q: Tensor, weight: Tensor, out_order: Sequence[int] | None = None) -> Tensor:
    """`router_product`, of arguments that were checked."""
    if not _are_numbers(q.shape[2:], weight.shape):
        share = q.shape[2] // weight.shape[0]
        wide = weight.float().repeat_interleave(share, dim=0)  # [H, d, E]
        return _in_order((q.float().unsqueeze(-1) * wide).sum(-2), out_order)
    shape = (*q.shape[:3], weight.shape[2])
    out = empty_like_in_order(q, shape, out_order, torch.float32)
    if statically_known_true(out.numel() == 0):
        return out
    programs, tile, operands, scalars = work_of_router(q, weight, out)
    _launch(mhf_packaged_router_kernel, programs, tile, operands, scalars)
    return out


def _tile(problem: Problem, out_dtype: torch.dtype) -> Tile | None:
    """The tile of plain Triton's kernel; None where PyTorch's products are to be used."""
    q, k = problem.q, problem.k
    if not _are_numbers(q.shape[2:], k.shape):  # what the kernel is compiled for
        return None
    dynamic = not _are_numbers(q.shape[:2])
    sizes = problem.sizes
    sizes = sizes._replace(tokens=MANY_TOKENS if dynamic else sizes.tokens)
    return packaged(sizes, out_dtype=out_dtype, dynamic=dynamic)


def _are_numbers(*shapes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for shape in shapes for size in shape)


def _by_products(problem: Problem, order: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
    """The network as matrices of PyTorch's, and elementwise operations between them."""
    q, k, u, v, r, k_bias, u_bias, v_bias, activation, k_scale, u_scale, out_scale = problem
    batch, length, heads, _ = q.shape
    groups, sub_networks, hidden, _ = k.shape

    def of_group(x: Tensor) -> Tensor:  # [B, L, H, c] -> [G, B L H/G, c]
        grouped = x.unflatten(2, (groups, heads // groups))
        return grouped.permute(2, 0, 1, 3, 4).flatten(1, 3)

    tokens = of_group(q)
    weight = None if r is None else of_group(r).float().unsqueeze(-1)  # [G, rows, E, 1]

    def units(weights: Tensor, bias: Tensor | None, scale: float) -> Tensor:  # [G, rows, E, f]
        found = torch.bmm(tokens, weights.flatten(1, 2).mT).float() * scale
        found = found.unflatten(-1, (sub_networks, hidden))
        return found if bias is None else found + bias.float().unsqueeze(1)

    m = ACTIVATIONS[activation].function(units(k, k_bias, k_scale))
    if u is not None:
        m = m * units(u, u_bias, u_scale)
    if weight is not None:
        m = m * weight
    wide = torch.promote_types(q.dtype, dtype)
    units_of_v = m.to(q.dtype).flatten(-2).to(wide)
    out = torch.bmm(units_of_v, v.flatten(1, 2).to(wide)).float()  # [G, rows, d]
    if v_bias is not None:
        biases = v_bias.float().unsqueeze(1)  # [G, 1, E, d]
        out = out + (biases if weight is None else biases * weight).sum(2)
    out = (out * out_scale).to(dtype)
    out = out.unflatten(1, (batch, length, heads // groups)).permute(1, 2, 0, 3, 4)
    return _in_order(out.flatten(2, 3), order)


def _in_order(x: Tensor, order: Sequence[int] | None) -> Tensor:
    """A copy of four dimensions that lie in memory in ``order``."""
    order = (0, 1, 2, 3) if order is None else tuple(order)
    dense = x.permute(order).clone(memory_format=torch.contiguous_format)
    return dense.permute([order.index(dim) for dim in range(4)])


def _launch(
    kernel: Any,
    programs: Any,
    tile: Tile,
    operands: Mapping[str, Operand],
    scalars: Mapping[str, Any],
) -> None:
    """Have Inductor launch `programs` programs of a kernel below.

    An operand named X fills the parameters X, X_0, X_1, .. and, if there is one, X_layout.
    """
    # The strides of absent tensors, which no kernel uses.
    arguments: dict[str, Any] = {name: 0 for name in kernel.arg_names if name[-1].isdigit()}
    arguments |= {name: value for name, value in scalars.items() if name in kernel.arg_names}
    for name, operand in operands.items():
        arguments[name] = operand.argument
        for dim, stride in enumerate(operand.strides or ()):
            arguments[f"{name}_{dim}"] = stride
        if operand.layout is not None:
            arguments[f"{name}_layout"] = operand.layout
    wrap_triton(kernel)[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)


@triton.jit
def mhf_packaged_forward_kernel(
    Q, K, U, V, R, K_bias, U_bias, V_bias, Out, Part,
    Q_0, Q_1, Q_2, Q_3, K_0, K_1, K_2, K_3, U_0, U_1, U_2, U_3, V_0, V_1, V_2, V_3,
    R_0, R_1, R_2, R_3, K_bias_0, K_bias_1, K_bias_2, U_bias_0, U_bias_1, U_bias_2,
    V_bias_0, V_bias_1, V_bias_2, Out_0, Out_1, Out_2, Out_3,
    B, L, PARTS,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    K_SCALE: tl.constexpr, U_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
    APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, COMPENSATED: tl.constexpr,
    Q_layout: tl.constexpr, K_layout: tl.constexpr, U_layout: tl.constexpr,
    V_layout: tl.constexpr, R_layout: tl.constexpr, Out_layout: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`mhf_forward_kernel` with each stride by itself."""
    mhf_forward_kernel(
        Q, K, U, V, R, K_bias, U_bias, V_bias, Out, Part,
        (Q_0, Q_1, Q_2, Q_3), (K_0, K_1, K_2, K_3), (U_0, U_1, U_2, U_3), (V_0, V_1, V_2, V_3),
        (R_0, R_1, R_2, R_3), (K_bias_0, K_bias_1, K_bias_2), (U_bias_0, U_bias_1, U_bias_2),
        (V_bias_0, V_bias_1, V_bias_2), (Out_0, Out_1, Out_2, Out_3), None,
        B, L, PARTS, E, F, D, HEADS_PER_GROUP, ACTIVATION, K_SCALE, U_SCALE, OUT_SCALE,
        APPROXIMATE, PRECISION, COMPENSATED,
        Q_layout, K_layout, U_layout, V_layout, R_layout, Out_layout, BM, BF, BD, False,
    )  # fmt: skip


@triton.jit
def mhf_packaged_add_parts_kernel(
    Part, Out, Out_0, Out_1, Out_2, Out_3, FIRST_TILE, PARTS, B, L,
    D: tl.constexpr, SCALE: tl.constexpr, BM: tl.constexpr,
    TOGETHER: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """`mhf_add_parts_kernel` with each stride by itself."""
    mhf_add_parts_kernel(
        Part, Out, None, (Out_0, Out_1, Out_2, Out_3), FIRST_TILE, PARTS, B, L,
        D, SCALE, BM, TOGETHER, ELEMENTS, False,
    )  # fmt: skip


@triton.jit
def mhf_packaged_router_kernel(
    Q, W, Out, Q_0, Q_1, Q_2, Q_3, W_0, W_1, W_2, Out_0, Out_1, Out_2, Out_3, B, L,
    E: tl.constexpr, D: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    Q_PARTS: tl.constexpr, W_PARTS: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """`mhf_router_kernel` with each stride by itself."""
    mhf_router_kernel(
        Q, W, Out, (Q_0, Q_1, Q_2, Q_3), (W_0, W_1, W_2), (Out_0, Out_1, Out_2, Out_3), B, L,
        E, D, HEADS_PER_GROUP, Q_PARTS, W_PARTS, BM, BE, BD, APART,
    )  # fmt: skip
