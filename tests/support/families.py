"""Families of kernels: left out for tests of the others, or with their work cut into pieces."""

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


def cut_into_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched products take one group of heads after the other."""
    from mhf_compiler.lowering.kernels.batched import passes
    from mhf_compiler.lowering.tiles import batched_chunk

    monkeypatch.setattr(passes, "batched_chunk", lambda *of: batched_chunk(*of)._replace(groups=1))


def cut_into_rows(monkeypatch: pytest.MonkeyPatch, fewest: int = 128) -> None:
    """And of a group, `fewest` rows after the others."""
    monkeypatch.setattr(tiles, "MOST_BYTES", 1)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", fewest)
