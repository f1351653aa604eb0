"""Every test starts with nothing compiled and nothing counted."""

from collections.abc import Iterator

import pytest
import torch

from mhf_compiler.compat import counters


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
