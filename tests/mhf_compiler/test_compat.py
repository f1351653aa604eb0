"""The C++ library in Inductor's cache: one that is damaged is not loaded, but built again."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._inductor.utils import fresh_cache

from mhf_compiler.compat import load_cpp

SOURCE = 'extern "C" int answer() { return 42; }'


def _without_symbol(library: Path) -> bytes:
    return library.read_bytes().replace(b"answer", b"reply!")


DAMAGE: dict[str, Callable[[Path], bytes]] = {
    "truncated": lambda library: library.read_bytes()[:2000],
    "empty": lambda library: b"",
    "zeroed": lambda library: bytes(len(library.read_bytes())),
    "without its symbol": _without_symbol,
}


@pytest.mark.parametrize("noted", [True, False], ids=["with checksum", "without checksum"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_library_is_built_again(damage: Callable[[Path], bytes], noted: bool):
    with fresh_cache():
        library = Path(load_cpp(SOURCE)._name)
        damaged = damage(library)
        library.unlink()  # and not overwritten: this process has loaded it
        library.write_bytes(damaged)
        if not noted:
            Path(f"{library}.sha256").unlink()
            os.utime(library, (0, 0))
        assert load_cpp(SOURCE).answer() == 42
        assert library.read_bytes() != damaged


def test_a_library_is_built_once():
    with fresh_cache():
        library = Path(load_cpp(SOURCE)._name)
        built = library.stat().st_mtime_ns
        assert load_cpp(SOURCE).answer() == 42
        assert library.stat().st_mtime_ns == built
