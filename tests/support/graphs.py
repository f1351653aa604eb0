"""Graphs that Dynamo has not seen: all of a function is in them, what nothing reads as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mhf_compiler.compat import FakeTensorMode


def graph_of(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """The graph of a function or a module of tensors like the examples."""
    gm = fx.symbolic_trace(function)
    mode = FakeTensorMode()
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, example in zip(placeholders, examples, strict=True):
        node.meta["val"] = mode.from_tensor(example)
    return gm


def dynamic_graph_of(
    function: Callable[..., Any], *examples: Tensor
) -> tuple[fx.GraphModule, ShapeEnv]:
    """The same with a symbol for every size, and what knows the symbols."""
    gm = fx.symbolic_trace(function)
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, example in zip(placeholders, examples, strict=True):
        node.meta["val"] = mode.from_tensor(example)
    return gm, shape_env


def call(x: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """A node that calls a function, in the graph of a tensor, where tracing would run it."""
    assert isinstance(x, fx.Proxy)
    return x.tracer.create_proxy("call_function", function, args, {})


def records_gradients(x: Tensor, mode: bool) -> None:
    """From here on in the graph of a tensor."""
    call(x, torch._C._set_grad_enabled, mode)
