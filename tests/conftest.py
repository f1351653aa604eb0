"""Tests marked `gpu` are skipped where there is no CUDA device, unless one is required.

What tests share is made importable, as the packages `support`, `corpus` and `models`, and so are
the benchmarks, which have tests. Not through `sys.path`: next to them lie folders that have the
name of the product.
"""

import gc
import importlib.util
import logging
import os
import sys
from pathlib import Path

import pytest

# OpenMP's threads sleep while they wait. They would spin, and two processes of tests that each have
# a thread for every core would spend most of their time in that. Read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

TESTS = Path(__file__).parent

# An einsum of three operands contracts them from left to right, unless opt_einsum happens to be
# installed: the programs of the tests are the same everywhere.
torch.backends.opt_einsum.enabled = False

# pytest listens to loggers that do not propagate, and for a listener of this one every graph is
# printed several times.
logging.getLogger("torch.__trace").propagate = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail instead of skipping the gpu tests where there is no CUDA device",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    if config.getoption("--require-gpu"):
        raise pytest.UsageError("--require-gpu: torch sees no CUDA device")
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not a word in the id of a parameter
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What importing PyTorch made lives on: to look for garbage in it takes a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def make_importable(folder: Path) -> None:
    name = folder.name
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


for package in ("support", "corpus", "models"):
    make_importable(TESTS / package)
make_importable(TESTS.parent / "benchmarks")
