"""Calls of our ops in a compiled graph go to the overloads that check nothing.

Their arguments were checked when the graph was made, over fake tensors, and gradients were taken
before. The check and the dispatch keys of autograd would take the host longer than a launch.

A package that is made ahead of time keeps the ops that the documentation names.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..compat import auto_functionalized, packages_ahead_of_time
from .memory import calls_our_op

__all__ = ["call_without_checks"]


def call_without_checks(graph: fx.Graph) -> None:
    """Let every call of our ops, and every functional form of one, name the op's own overload."""
    if packages_ahead_of_time():
        return
    for node in graph.nodes:
        if not calls_our_op(node):
            continue
        if node.target is auto_functionalized:
            op, *others = node.args
            node.args = (_compiled(op), *others)
        else:
            node.target = _compiled(node.target)


def _compiled(op: Any) -> Any:
    return getattr(op, "overloadpacket", op).compiled
