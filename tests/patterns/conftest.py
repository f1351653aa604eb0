"""What the tests of the recogniser share."""

from collections.abc import Iterator

import pytest
import torch

from mhf_compiler.compat import counters


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
