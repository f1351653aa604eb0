"""What Triton does not document, and defaults of its that we do not take.

Gluon's names are in hopper/compat.py: other cards do not load it.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

#: Options of every launch. From Triton 3.10 on, products and sums are fused only if asked for.
OPTIONS = {"enable_fp_fusion": True}


def assembler(capability: tuple[int, int]) -> str:
    """The assembler that Triton uses for a card, with its version."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    major, minor = capability
    told = get_ptxas_version(10 * major + minor)
    found = re.search(r"V[\d.]+", told)
    return f"ptxas {found[0] if found else told}"


def current_stream(device: torch.device) -> int:
    """The handle of the stream that launches on a device go to."""
    return int(driver.active.get_current_stream(device.index))


def launch_compiled(compiled: Any, programs: int, stream: int, arguments: Sequence[Any]) -> None:
    """Launch a kernel that was compiled and launched before, on the current device.

    Triton's own call looks up the device and the stream, and calls both chains of hooks even where
    they are empty, which takes the host longer than all the rest.
    """
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if any(getattr(hook, "calls", hook) for hook in hooks):  # a profiler of Triton's listens
        compiled[(programs, 1, 1)](*arguments, stream=stream)
        return
    function, metadata = compiled.function, compiled.packed_metadata
    compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
