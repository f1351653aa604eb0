"""Families of kernels, left out for tests of the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mhf_compiler.lowering import tiles


@contextmanager
def without_products() -> Iterator[None]:
    """Tiles of Triton's take what PyTorch's batched products would take as well."""
    from mhf_compiler.lowering.kernels.replay import forget_repeats

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(tiles._FAMILIES, "batched", {})
        tiles.specialised.cache_clear()
        forget_repeats()
        yield
    tiles.specialised.cache_clear()
    forget_repeats()
