"""PyTorch's batched product, into memory of any strides, in the factors' dtype or in float32."""

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, *, scale: float = 1.0, keep: float = 0.0) -> None:
    """`out = keep * out + scale * a @ b`, summed in float32 and rounded once.

    With `keep=0` the contents of `out` are not read. It has the dtype of `a` and `b`, or float32.
    """
    if out.dtype == a.dtype and keep == 0.0 and scale == 1.0:
        torch.bmm(a, b, out=out)  # without the copy of `out` that the other one makes
    elif out.dtype == a.dtype:
        out.baddbmm_(a, b, beta=keep, alpha=scale)
    elif a.device.type == "cuda" and torch.version.hip is None:
        torch.baddbmm(out, a, b, out.dtype, beta=keep, alpha=scale, out=out)
    else:  # only NVIDIA's library has products whose results are wider than their factors
        torch.baddbmm(out, a.float(), b.float(), beta=keep, alpha=scale, out=out)
