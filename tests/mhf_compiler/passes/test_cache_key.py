"""What stands for the package in the keys of PyTorch's caches: all that may change what runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import mhf_compiler
from mhf_compiler.lowering import device
from mhf_compiler.options import Options
from mhf_compiler.passes import cache_key
from mhf_compiler.passes.manager import _FOR_TRAINING, PASSES

ROOT = Path(__file__).parents[3]


def key(options: Options | None = None, passes: tuple[str, ...] = _FOR_TRAINING) -> object:
    return cache_key.cache_key(options or Options(), passes)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What a process finds out once, it finds out in each of these tests."""
    for known in (cache_key.package_hash, cache_key.sources):
        known.cache_clear()
    yield
    for known in (cache_key.package_hash, cache_key.sources):
        known.cache_clear()


def test_nothing_changes_and_the_key_is_the_same():
    assert key() is not None
    assert key() == key(Options(dump_dir=Path("elsewhere")))  # where it is told changes nothing


OPTIONS = (Options(rewrite="always"), Options(strict=True), Options(verify=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_changes_the_key(options: Options):
    assert key(options) not in (None, key())


def test_the_passes_change_the_key():
    """In training fewer of them run."""
    assert key(passes=tuple(PASSES)) not in (None, key())


def test_the_version_changes_the_key(monkeypatch: pytest.MonkeyPatch):
    before = key()
    cache_key.package_hash.cache_clear()
    monkeypatch.setattr(cache_key, "__version__", "9.9.9")
    assert key() not in (None, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_the_key(dtype: torch.dtype):
    with torch.autocast("cpu", dtype):
        inside = key()
    with torch.autocast("cpu", torch.bfloat16 if dtype is torch.float16 else torch.float16):
        assert inside not in (None, key())
    assert inside not in (None, key())


def test_the_default_dtype_changes_the_key():
    before = key()
    torch.set_default_dtype(torch.float64)
    try:
        assert key() not in (None, before)
    finally:
        torch.set_default_dtype(torch.float32)


CARD = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)


@pytest.fixture
def with_cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The key on a machine with these cards."""

    def key_with(*cards: SimpleNamespace) -> object:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: cards[place])
        return key()

    return key_with


@pytest.mark.parametrize(
    "change", [{"name": "NVIDIA H100"}, {"major": 10}, {"minor": 3}, {"multi_processor_count": 78}]
)
def test_the_card_changes_the_key(with_cards: Callable[..., object], change: dict[str, object]):
    other = SimpleNamespace(**vars(CARD) | change)
    keys = [with_cards(), with_cards(CARD), with_cards(other), with_cards(CARD, other)]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_more_cards_of_a_kind_do_not(with_cards: Callable[..., object]):
    assert with_cards(CARD) == with_cards(CARD, CARD)


def test_tritons_interpreter_changes_the_key(
    with_cards: Callable[..., object], monkeypatch: pytest.MonkeyPatch
):
    """On it, the passes leave out what Hopper's kernels do."""
    before = with_cards(CARD)
    monkeypatch.setattr(cache_key, "interpreted", lambda: True)
    assert with_cards(CARD) not in (None, before)


# Sources.


def test_every_source_is_part_of_the_key():
    expected = {
        path.resolve()
        for folder in ("mhf_compiler", "patterns", "lowering")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    }
    assert set(cache_key.sources().values()) == expected
    assert "mhf_compiler/lowering/ops/network.py" in cache_key.sources()
    assert "mhf_compiler/patterns/recognise.py" in cache_key.sources()


@pytest.fixture
def of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The hash of a package of these files, by name and text."""

    def hash_of(**texts: str) -> str:
        found = {}
        for name, text in texts.items():
            found[name] = tmp_path / name
            found[name].write_text(text)
        monkeypatch.setattr(cache_key, "sources", lambda: found)
        cache_key.package_hash.cache_clear()
        return cache_key.package_hash()

    yield hash_of
    cache_key.package_hash.cache_clear()
    monkeypatch.undo()


def test_each_change_of_a_source_changes_the_hash(of_files: Callable[..., str]):
    same = of_files(a="x = 1", b="y = 1")
    assert of_files(a="x = 1", b="y = 1") == same
    others = [
        of_files(a="x = 2", b="y = 1"),
        of_files(a="x = 1"),
        of_files(a="x = 1", b="y = 1", c=""),
        of_files(a="x = 1", c="y = 1"),  # renamed
        of_files(a="y = 1", b="x = 1"),  # exchanged
        of_files(a="x = 1b", b="y = 1"),
        of_files(a="x =", b=" 1y = 1"),  # moved from one into the other
    ]
    assert len({same, *others}) == 1 + len(others)


# What is not known is not cached.


def test_a_source_that_changed_after_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What runs may be older than what is there now."""
    changed = tmp_path / "network.py"
    changed.write_text("")
    found = {**cache_key.sources(), "network.py": changed}
    monkeypatch.setattr(cache_key, "sources", lambda: found)
    monkeypatch.setattr(cache_key, "IMPORTED_AT", time.time() + 10)
    assert key() is not None
    monkeypatch.setattr(cache_key, "IMPORTED_AT", changed.stat().st_mtime - 10)
    with caplog.at_level("INFO", "mhf_compiler"):
        assert key() is None
    assert "network.py has changed" in caplog.text
    # An installer may give a file the time at which it was written elsewhere.
    os.utime(changed, (0, 0))
    assert key() is None
    monkeypatch.undo()


def test_a_module_without_a_source(monkeypatch: pytest.MonkeyPatch):
    """Of a package that lies in an archive, say."""
    monkeypatch.setitem(sys.modules, "mhf_compiler.added", ModuleType("mhf_compiler.added"))
    assert key() is None


def test_without_any_source(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_key, "sources", dict)
    assert key() is None


def test_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise OSError("no such card")

    monkeypatch.setattr(cache_key, "cards", broken)
    assert key() is None


def test_the_import_is_older_than_the_modules():
    """Taken before most of the package is read."""
    loaded = Path(mhf_compiler.__file__).stat()
    assert loaded.st_mtime < cache_key.IMPORTED_AT <= time.time()


def test_cards_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.cards() == ()
