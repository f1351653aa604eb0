"""Gluon's names that differ between Triton's versions."""

from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma

#: the tensor copy engine's copies: `async_copy_…` before Triton 3.8, and gone from 3.9 on
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

#: (buffer, dtype, shape, layout): a buffer of shared memory as another one. Private before 3.9.
reinterpret = (
    getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret
)
