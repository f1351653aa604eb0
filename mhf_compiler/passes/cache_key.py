"""The key under which Inductor caches what our passes have worked on."""

from __future__ import annotations

import importlib.util
from functools import cache
from hashlib import sha256
from pathlib import Path

from .. import __version__

_FOLDERS = ("mhf_compiler", "mhf_compiler.patterns", "mhf_compiler.lowering")
_SUFFIXES = (".py", ".cpp", ".h")


@cache
def package_hash() -> str:
    """A hash of the version and of every source file of the package.

    What a pass does depends on more than its own file: on the ops, on when a kernel pays, on what
    recognition left in the graph. A list of files would have to be kept, and be forgotten once.
    """
    digest = sha256(__version__.encode())
    for path in sources():
        digest.update(f"\0{path.name}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sources() -> list[Path]:
    """Every source file; the folders are found without importing what is in them."""
    found: set[Path] = set()
    for name in _FOLDERS:
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            found |= {path.resolve() for path in Path(folder).rglob("*") if path.is_file()}
    return sorted(path for path in found if path.suffix in _SUFFIXES)
