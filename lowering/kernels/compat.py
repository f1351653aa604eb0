"""What Triton does not document, and defaults of its that we do not take.

Gluon's names are in hopper/compat.py: other cards do not load it.
"""

import re

#: Options of every launch. From Triton 3.10 on, products and sums are fused only if asked for.
OPTIONS = {"enable_fp_fusion": True}


def assembler(capability: tuple[int, int]) -> str:
    """The assembler that Triton uses for a card, with its version."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    major, minor = capability
    told = get_ptxas_version(10 * major + minor)
    found = re.search(r"V[\d.]+", told)
    return f"ptxas {found[0] if found else told}"
