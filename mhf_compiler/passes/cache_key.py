"""What stands for this package in the keys of PyTorch's caches of compiled graphs.

AOTAutograd and Inductor each keep what they have compiled under a key of their own: a hash of the
graph, of the settings, and of what the passes that are added to Inductor's call themselves. The
graph shows all that was decided before autograd: what is rewritten, and every constant. It does not
show what is done with it afterwards, which is what this module describes: how the ops are traced
and differentiated, what the passes after autograd find, and for which machine. So what the pass
calls itself is a part of both keys.

What cannot be described must not be cached: then the key is None, and both caches are bypassed.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from .. import __version__
from ..backend import IMPORTED_AT
from ..lowering.device import cards, interpreted
from ..options import Options
from ..patterns import Modes

__all__ = ["cache_key", "package_hash"]

_PACKAGE = "mhf_compiler"
_FOLDERS = (_PACKAGE, f"{_PACKAGE}.patterns", f"{_PACKAGE}.lowering")
_SUFFIXES = (".py", ".cpp", ".h")
_COARSE = 0.1  # seconds: a file system's clock may lag behind the machine's

log = logging.getLogger(__name__)


class _UnknownSourceError(Exception):
    """It is not known which source runs in this process."""


def cache_key(
    options: Options, passes: Sequence[str], layers: Sequence[str] = ()
) -> tuple[str, ...] | None:
    """All that decides what becomes of a rewritten graph, apart from the graph; None if unknown.

    Args:
        options: the back end's. Those of Inductor's own are in its key.
        passes: the names of those that run after autograd.
        layers: the names of those that the ops compute, which comments in the code have.
    """
    try:
        _check_sources()
        return (
            package_hash(),
            repr((options.rewrite, options.strict, options.verify)),
            repr((tuple(passes), tuple(layers))),
            # What the ops are traced under; before torch 2.13 the keys hold not all of it.
            repr((Modes.now(), torch.get_default_dtype())),
            repr(_machine()),
        )
    except Exception as error:
        log.info("nothing is cached of this graph: %s: %s", type(error).__name__, error)
        return None


def _machine() -> tuple[object, ...]:
    """What the choice of kernels depends on, besides sizes: the passes ask for it."""
    found = cards()
    return (found, interpreted()) if found else ()


@cache
def package_hash() -> str:
    """A hash of the version and of every source file of the package.

    What a pass does depends on more than its own file: on the ops, on when a kernel pays, on what
    recognition left in the graph. A list of files would have to be kept, and be forgotten once.
    """
    digest = sha256(__version__.encode())
    for name, path in sources().items():
        digest.update(f"\0{name}\0{sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


@cache
def sources() -> dict[str, Path]:
    """Every source file, by its place; the folders are found without importing what is in them."""
    found: dict[str, Path] = {}
    for name in _FOLDERS:
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in _SUFFIXES and path.is_file():
                    place = Path(name.replace(".", "/"), path.relative_to(folder)).as_posix()
                    found.setdefault(place, path.resolve())
    return dict(sorted(found.items()))


def _check_sources() -> None:
    """Check that what runs here is what ``package_hash`` reads.

    Modules are imported one after the other. After an upgrade in between, some of them would be old
    ones, under the hash of the new.

    Raises:
        _UnknownSourceError: a source is newer than the import of the package, or a module has none.
    """
    known = set(sources().values())
    for path in known:
        status = path.stat()
        if max(status.st_mtime, status.st_ctime) > IMPORTED_AT - _COARSE:
            raise _UnknownSourceError(f"{path} has changed since this process imported the package")
    for name, module in list(sys.modules.items()):
        if name == _PACKAGE or name.startswith(f"{_PACKAGE}."):
            file = getattr(module, "__file__", None)
            if file is None or _resolved(file) not in known:
                raise _UnknownSourceError(f"the source of the module {name} is not known")


@cache
def _resolved(file: str) -> Path:
    return Path(file).resolve()
