"""Modes: whether gradients are recorded, and what autocast casts to, at each operation.

A graph switches them by nodes of its own. A graph inside a higher-order operation, such as a
checkpoint, contains no such nodes: its modes are those at its call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mhf_compiler.compat import HigherOrderOperator, functorch_depth, leave_functorch_levels

from .reasons import Unreadable
from .repeats import autocast_dtype

#: functions by which Dynamo's graphs switch modes
_SWITCHES = frozenset(
    {
        "_enter_autocast",
        "_exit_autocast",
        "_enter_inference_mode",
        "_exit_inference_mode",
        "_set_grad_enabled",
    }
)
#: functions that enter and leave a level of ``vmap``
_LEVELS = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes at one place of a graph."""

    grad: bool
    autocast: tuple[torch.dtype | None, ...]  # for each type of device; None where it is off
    inference: bool

    @classmethod
    def now(cls) -> Modes:
        """The current modes."""
        autocast = tuple(map(autocast_dtype, _DEVICES))
        return cls(torch.is_grad_enabled(), autocast, torch.is_inference_mode_enabled())

    @classmethod
    def of(cls, grad: bool, autocast: Mapping[str, torch.dtype]) -> Modes:
        """Gradients recorded or not, and what autocast casts to where it is on."""
        return cls(grad, tuple(map(autocast.get, _DEVICES)), torch.is_inference_mode_enabled())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run under these modes. For inference, gradients are off, so that results stay usable."""
        grad = torch.is_grad_enabled()
        before = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _DEVICES
        }
        try:
            torch.set_grad_enabled(self.grad)
            for device, dtype in zip(_DEVICES, self.autocast, strict=True):
                torch.set_autocast_enabled(device, dtype is not None)
                if dtype is not None:
                    torch.set_autocast_dtype(device, dtype)
            yield
        finally:
            torch.set_grad_enabled(grad)
            for device, (enabled, dtype) in before.items():
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


@dataclass(frozen=True, slots=True)
class _InferenceRegion:
    """What was before a region of ``torch.inference_mode``."""

    inference: bool
    grad: bool


class Switches:
    """Runs the nodes of a graph that switch modes, and restores the modes at the end.

    A graph may end, and an analysis fail, in the middle of a region. In a region of
    ``torch.inference_mode`` gradients are off, and no more: there, composite operations would
    not be decomposed, and autocast would not be seen.

    Attributes:
        inference: whether the nodes that follow are in such a region, or all of them.
    """

    def __init__(self) -> None:
        self._open: list[Any] = []
        self.inference = torch.is_inference_mode_enabled()

    def __enter__(self) -> Switches:
        self._grad = torch.is_grad_enabled()
        self._depth = functorch_depth()
        return self

    def __exit__(self, *_: object) -> None:
        leave_functorch_levels(self._depth)
        for region in reversed(self._open):
            region.__exit__(None, None, None)
        torch.set_grad_enabled(self._grad)

    def run(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        """Run a node that ``switches_modes``, and remember the region that it opens or closes."""
        name = _name(node)
        if name == "_enter_inference_mode":
            region = _InferenceRegion(self.inference, torch.is_grad_enabled())
            self.inference = bool(args[0])
            torch.set_grad_enabled(not self.inference)
            return region
        if name == "_exit_inference_mode":
            self.inference = args[0].inference
            torch.set_grad_enabled(args[0].grad)
            return None
        result = node.target(*args)  # type: ignore[operator]
        if name.startswith("_enter"):
            self._open.append(result)
        elif name.startswith("_exit"):
            self._open = [region for region in self._open if region is not args[0]]
        return result


def switches_modes(node: fx.Node) -> bool:
    """Whether a node enters or leaves a region of autocast, gradients or a transform."""
    return node.op == "call_function" and _name(node) in _SWITCHES


def inner_graphs(gm: fx.GraphModule) -> list[tuple[fx.GraphModule, Modes | Unreadable]]:
    """The graphs that higher-order operations of this graph call, in the order of the calls.

    Each comes with the modes of its calls, or with the reason why it cannot be read: there are
    several modes or they are unknown, a call is in a region of ``torch.inference_mode`` that this
    graph enters, or inside of ``vmap``, where the graph shows less dimensions than there are.
    """
    outside = torch.is_inference_mode_enabled()
    found: dict[fx.GraphModule, Modes | Unreadable] = {}
    env: dict[fx.Node, Any] = {}
    levels = 0
    with Switches() as switches:
        for node in gm.graph.nodes:
            if switches_modes(node):
                args = fx.node.map_arg(node.args, lambda argument: env[argument])
                env[node] = switches.run(node, args)
            elif isinstance(node.target, HigherOrderOperator):
                for place, child in called_graphs(gm, node):
                    modes: Modes | Unreadable | None = _modes_inside(
                        node, place, switches.inference
                    )
                    if levels:
                        modes = Unreadable.INSIDE_VMAP
                    elif not isinstance(modes, Modes) or modes.inference != outside:
                        modes = Unreadable.SEVERAL_MODES
                    if found.setdefault(child, modes) != modes:
                        found[child] = Unreadable.SEVERAL_MODES
            else:
                levels += _LEVELS.get(_name(node), 0)
    return list(found.items())


def called_graphs(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[int, fx.GraphModule]]:
    """The graphs that a call is given, with their places among its arguments."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            child = getattr(gm, str(argument.target), None)
            if isinstance(child, fx.GraphModule):
                yield node.args.index(argument) if argument in node.args else -1, child


def _modes_inside(node: fx.Node, place: int, inference: bool) -> Modes | None:
    """The modes inside the graph of a higher-order operation, called under the current ones."""
    name = str(node.target)
    modes = replace(Modes.now(), inference=inference)
    if name == "wrap_with_set_grad_enabled":
        return replace(modes, grad=bool(node.args[0]))
    if name == "wrap_with_autocast":
        device, dtype, enabled = node.args[:3]
        if device not in _DEVICES:
            return modes
        if not isinstance(dtype, torch.dtype):
            dtype = torch.get_autocast_dtype(str(device))
        new = list(modes.autocast)
        new[_DEVICES.index(device)] = dtype if enabled else None
        return replace(modes, autocast=tuple(new))
    if name == "autograd_function_apply":
        # Its forward graph records no gradients. Its backward graph runs whenever, and wherever,
        # the gradients are computed.
        return replace(modes, grad=False) if place == 0 else None
    return modes


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
