"""Functional calls of ops that mutate an argument, inserted into a graph after autograd.

The passes run just before Inductor decides what is written in place. They insert calls of mutating
ops in the functional form that PyTorch has for them, so that Inductor copies what it finds another
reader of.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import fx

from ..compat import auto_functionalized, no_fake_mode, set_example
from ..errors import kernel_failed
from ..patterns import locate
from .memory import unit_view_of


def runs(what: str, node: fx.Node, trial_run: Callable[..., None], *arguments: Any) -> bool:
    """Try whether a kernel runs on this machine, and warn if it does not.

    The result is cached, so that it is tried once for all layers that are alike.
    """
    error = _error_of(trial_run, *arguments)
    if error is not None:
        kernel_failed(what, locate(node), error)
    return error is None


@cache
def _error_of(trial_run: Callable[..., None], *arguments: Any) -> Exception | None:
    try:
        with no_fake_mode():
            trial_run(*arguments)
    except Exception as error:
        return error.with_traceback(None)  # whose frames would hold tensors
    return None


def call_over(graph: fx.Graph, old: fx.Node, op: Any, arguments: dict[str, Any]) -> fx.Node:
    """The functional form of a call of an op that mutates an argument."""
    call = graph.call_function(auto_functionalized, (op,), arguments)
    _copy_origin(old, call)
    set_example(call)
    return call


def replace_by_item(old: fx.Node, call: fx.Node, index: int) -> fx.Node:
    """Let the readers of a node read an item of what a call returns."""
    item = item_of(old, call, index)
    item.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(item)
    return item


def item_of(old: fx.Node, call: fx.Node, index: int) -> fx.Node:
    """An item of what a call returns, with the source line of a node."""
    item = old.graph.call_function(operator.getitem, (call, index))
    _copy_origin(old, item)
    item.meta["val"] = call.meta["val"][index]
    return item


def replace_with_views(old: fx.Node, new: fx.Node) -> None:
    """Let the readers of a node read another, and update the fake tensors of its views."""
    views, seen = [], [old]
    while seen:
        node = seen.pop(0)
        found = [reader for reader in node.users if unit_view_of(reader) is node]
        views += found
        seen += found
    old.replace_all_uses_with(new)
    for view in views:
        set_example(view)


def viewed(node: fx.Node, views: Sequence[fx.Node]) -> fx.Node:
    """Apply a chain of views to another node."""
    for view in views:
        new = node.graph.call_function(view.target, (node, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
        _copy_origin(view, new)
        set_example(new)
        node = new
    return node


def _copy_origin(old: fx.Node, new: fx.Node) -> None:
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
