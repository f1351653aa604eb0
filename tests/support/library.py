"""The ops as a C++ library, built once for all tests of a run."""

import fcntl
import os
from pathlib import Path

import pytest

import mhf_compiler

__all__ = ["ops_library"]


@pytest.fixture(scope="session")
def ops_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its path, as ``build_ops`` returns it. Processes of one run share it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "ops"
    folder.mkdir(exist_ok=True)
    library = folder / "lib" / "libmhf_compiler_ops.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            assert mhf_compiler.build_ops(folder) == library
    return library
