"""Values of a canonical copy that no graph was traced for: few graphs have such ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mhf_compiler.patterns.axes import contiguous_strides
from mhf_compiler.patterns.canonical import Value


def a_value(op: Any, *args: Any, **attributes: Any) -> Value:
    """A value of an operation, by default of shape (4, 6) in float32, with gradients recorded."""
    given: dict[str, Any] = {
        "kwargs": {},
        "shape": (4, 6),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "origin": attributes.pop("origin", None) or fx.Graph().placeholder("x"),
        "step": 0,
        "requires_grad_mode": True,
    } | attributes
    strides = tuple(contiguous_strides(given["shape"]))
    return Value(op=op, args=args, **{"strides": strides} | given)
