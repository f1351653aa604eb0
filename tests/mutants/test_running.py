"""What a change has to find in memory."""

import gc

from mhf_compiler.patterns import axes

from .points import ROOT
from .running import Memory


def test_functions_are_found_that_the_garbage_collector_no_longer_looks_at() -> None:
    gc.freeze()  # as the setting of the tests does once they are collected
    functions = Memory().functions
    assert functions[str(ROOT / "patterns" / "axes.py"), "run_length"] == [axes.run_length]
