"""Every test starts with nothing compiled, nothing counted, and the same random numbers."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.guards

from mhf_compiler.compat import counters
from mhf_compiler.errors import forget_warnings


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and several processes share the cores
    torch.compiler.reset()
    forget_warnings()
    counters.clear()
    torch.manual_seed(0)
    with mock.patch.object(
        torch._dynamo.guards, "profile_guard_manager", latency_of_guards, create=True
    ):
        yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


def latency_of_guards(*of: Any) -> float:
    """Dynamo measures it once a graph, for its log, and empties the processor's caches before."""
    return 0.0
