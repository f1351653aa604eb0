"""Every test starts with nothing compiled, nothing counted, and the same random numbers."""

from collections.abc import Iterator

import pytest
import torch

from mhf_compiler.compat import counters
from mhf_compiler.errors import forget_warnings


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    forget_warnings()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
