"""How tests that compile through Inductor stay fast."""

from contextlib import AbstractContextManager

import torch._inductor.config as config

#: Options under which Inductor calls PyTorch's kernels where it would write C++, whose compilation
#: takes three of a test's four seconds. Passes get the same graph. For tests of what passes find
#: and decline; what Inductor itself makes of a rewritten graph needs its C++.
NO_CPP = {"fallback_by_default": True}


def no_caches() -> AbstractContextManager[None]:
    """Inductor compiles again what another test has compiled.

    In a fresh cache folder it would compile the headers of its C++ again as well, which takes as
    long as all the rest.
    """
    return config.patch(force_disable_caches=True)
