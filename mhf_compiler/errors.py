"""The warning that something keeps its original spelling, and how it is given."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .compat import counters

if TYPE_CHECKING:
    from .patterns import Location


class MhfCompilerWarning(UserWarning):
    """Something was left in its original spelling."""


_told: set[tuple[str, ...]] = set()


def warn_once(*cause: str) -> None:
    """Give a warning, unless the same was given since ``torch.compiler.reset``.

    Args:
        cause: the parts of the message, which are joined by colons.
    """
    if cause not in _told:
        _told.add(cause)
        warnings.warn(": ".join(cause), MhfCompilerWarning, stacklevel=3)


def forget_warnings() -> None:
    """Let every cause be told again."""
    _told.clear()


def raise_or_warn(what: str, error: Exception, strict: bool) -> None:
    """Count a fault of the compiler by its cause; raise it if told so, otherwise warn once."""
    tally = counters["flashmhf"]
    tally["failures"] += 1
    tally[f"failures.{type(error).__name__}"] += 1
    if strict:
        raise error
    warn_once(what, type(error).__name__, str(error))


def warn_of_failure(what: str, location: Location | None, error: Exception | str) -> None:
    """Warn that a kernel failed its trial run, and count the failure."""
    place = "an unknown place" if location is None else str(location)
    warn_once(f"the kernel for {what} at {place} failed; it is left as it was", str(error))
    counters["flashmhf"]["failures"] += 1
