"""How tests that compile through Inductor stay fast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch._functorch.config as functorch
import torch._inductor.config as config

#: Options under which Inductor calls PyTorch's kernels where it would write C++, whose compilation
#: takes three of a test's four seconds. Passes get the same graph. For tests of what passes find
#: and decline; what Inductor itself makes of a rewritten graph needs its C++.
NO_CPP = {"fallback_by_default": True}
#: The same as settings of a process, see forks.py.
NO_CPP_AT_ALL = {f"torch._inductor.config.{name}": value for name, value in NO_CPP.items()}


@contextmanager
def no_caches() -> Iterator[None]:
    """Inductor compiles again the graphs that another test has compiled.

    Not ``force_disable_caches``, under which it would compile its C++ again as well, which takes
    longer than all the rest.
    """
    with config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
