"""Where in the user's source a node comes from."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from .products import is_product_call
from .site import Location, RouterProduct, Site

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


def modules_around(site: Site | RouterProduct) -> dict[str, tuple[str, Any]]:
    """The innermost modules that contain all products of a site, as a node's ``nn_module_stack``.

    Views before and after them may be outside.
    """
    replaced = {value.origin for value in site.replaces} if isinstance(site, Site) else set()
    products = [node for node in replaced if is_product_call(node)] or [site.output_node]
    stacks = [(node.meta.get("nn_module_stack") or {}).items() for node in products]
    levels = zip(*stacks, strict=False)
    return dict(level[0] for level in takewhile(_is_one_module, levels))


def _is_one_module(level: tuple[tuple[str, tuple[str, Any]], ...]) -> bool:
    return len({path for _, (path, _) in level}) == 1
