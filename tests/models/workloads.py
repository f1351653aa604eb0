"""Workloads for tests, made from one another."""

from dataclasses import replace
from typing import Any

from mhf_compiler.lowering.tiles import Sizes
from mhf_compiler.lowering.workload import Workload


def changed(workload: Workload, **changes: Any) -> Workload:
    """The workload with other fields; those of its sizes are named like its own."""
    sizes = {name: changes.pop(name) for name in Sizes._fields if name in changes}
    return replace(workload, sizes=workload.sizes._replace(**sizes), **changes)
