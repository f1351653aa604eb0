"""Triton's names that differ between its versions, and defaults of its that we do not take."""

import re

from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma

#: the tensor copy engine's copies: `async_copy_…` before Triton 3.8, and gone from 3.9 on
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

#: (buffer, dtype, shape, layout): a buffer of shared memory as another one. Private before 3.9.
reinterpret = (
    getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret
)

#: Options of every launch. From Triton 3.10 on, products and sums are fused only if asked for.
OPTIONS = {"enable_fp_fusion": True}


def assembler(capability: tuple[int, int]) -> str:
    """The assembler that Triton uses for a card, with its version."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    major, minor = capability
    told = get_ptxas_version(10 * major + minor)
    found = re.search(r"V[\d.]+", told)
    return f"ptxas {found[0] if found else told}"
