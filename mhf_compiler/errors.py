"""The warning that something keeps its original spelling."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .compat import counters

if TYPE_CHECKING:
    from .patterns import Location


class MhfCompilerWarning(UserWarning):
    """Something was left in its original spelling."""


def warn_of_failure(what: str, location: Location | None, error: Exception | str) -> None:
    """Warn that a kernel failed its trial run, and count the failure."""
    place = "an unknown place" if location is None else str(location)
    warnings.warn(
        f"the kernel for {what} at {place} failed; it is left as it was: {error}",
        MhfCompilerWarning,
        stacklevel=2,
    )
    counters["flashmhf"]["failures"] += 1
