"""The layer's name around a call of an op, in a profile.

An op's schema has no place for a name, and the host has no time for one: a call from Inductor's
code takes it from there, where a comment in front of each call says what the call is made of. The
passes after autograd write the layer into it:

    # Topologically Sorted Source Nodes: [linear, multi_head_ffn of layers.0.ffn], ...
    buf8 = torch.ops.mhf_compiler.multi_head_ffn.compiled(...)

It is read while a profiler runs, and once for each line. A call that nothing is known of is in no
range: of code in C++, of a package, of another back end.
"""

import linecache
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch.profiler import record_function

__all__ = ["is_profiled", "mark_of", "range_of_layer"]

#: Whether a profiler records this thread; asking takes some 50 ns. Not by way of compat.py, which
#: loads Dynamo: to import the ops loads little.
is_profiled = getattr(torch._C._autograd, "_profiler_enabled", lambda: False)

_CALL = re.compile(r"torch\.ops\.mhf_compiler\.(\w+)\.compiled\(")
_NODES = re.compile(r"(Topologically Sorted|Unsorted) Source Nodes: \[([^\]]*)\]")
_READABLE = re.compile(r"[^\s\]]+")
_DEPTH = 4  # frames between an op and the code that calls it, at most


def mark_of(node: str, layer: str) -> str:
    """What a comment says of a node that calls an op; of no layer if a name would not be read."""
    return f"{node} of {layer if _READABLE.fullmatch(layer) else ''}"


def range_of_layer() -> AbstractContextManager[Any]:
    """A range of the profiler's, if the code that called the op says which layer it computes.

    Its name begins as the op's in the profile: ``mhf_compiler::multi_head_ffn of layers.0.ffn``.
    """
    name = _name_by(sys._getframe(1))
    return nullcontext() if name is None else record_function(name)


def _name_by(frame: FrameType | None) -> str | None:
    for _ in range(_DEPTH):
        if frame is None:
            break
        called, name = _call_at(frame.f_code.co_filename, frame.f_lineno)
        if called:
            return name
        frame = frame.f_back
    return None


@lru_cache(maxsize=4096)
def _call_at(file: str, line: int) -> tuple[bool, str | None]:
    """Whether a line of Inductor's code calls an op, and the name of the range around it.

    The comment names the nodes in the order of the graph, those that made the arguments among them:
    the last of ours is the one that is called.
    """
    call = _CALL.search(linecache.getline(file, line))
    if call is None:
        return False, None
    while (comment := linecache.getline(file, line := line - 1).strip()).startswith("#"):
        nodes = _NODES.search(comment)
        named = [node for node in nodes[2].split(", ") if " of " in node] if nodes else []
        if nodes and named:
            layer = named[-1].partition(" of ")[2]
            known = layer and (len(named) == 1 or nodes[1] != "Unsorted")
            return True, f"mhf_compiler::{call[1]} of {layer}" if known else None
    return True, None
