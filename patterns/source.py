"""Where in the user's source a node comes from."""

from __future__ import annotations

import os
import re

import torch
from torch import fx

from .site import Location

_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$')
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_INSTALLED = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)


def locate(node: fx.Node) -> Location | None:
    """The innermost line of the user's own code that ``node`` was traced from.

    If all of it is in installed packages, the innermost line outside of PyTorch.
    """
    lines = (node.meta.get("stack_trace") or "").splitlines()
    own: Location | None = None
    installed: Location | None = None
    for position, text in enumerate(lines):
        frame = _FRAME.match(text)
        if frame is None or frame["file"].startswith(_TORCH):
            continue
        code = lines[position + 1].strip() if position + 1 < len(lines) else ""
        found = Location(frame["file"], int(frame["line"]), frame["function"], code)
        if any(folder in found.file for folder in _INSTALLED):
            installed = found
        else:
            own = found
    return own or installed
