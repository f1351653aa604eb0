"""What happens when something goes wrong: the warning, how it is counted, and when it is raised.

Three kinds, and one rule for each (docs/reliability.md):

- What the user chose, or the model is, is no fault: a site is declined with its reason.
- A fault of ours leaves the graph as it was. It is counted by its cause, and warned of or, under
  ``strict``, raised: ``fault``.
- A fault in telling what happened never changes what is compiled: ``only_reporting``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .patterns import Location


class MhfCompilerWarning(UserWarning):
    """Something was left in its original spelling."""


def fault(cause: str, message: str, error: Exception, *, strict: bool = False) -> None:
    """Count a fault of ours, and warn of it.

    Args:
        cause: what it is counted as, next to all ``failures``.
        message: what failed, and what is done instead.
        error: what was raised.
        strict: raise ``error`` instead of warning.
    """
    count_failure(cause)
    if strict:
        raise error
    warnings.warn(f"{message}: {_named(error)}", MhfCompilerWarning, stacklevel=3)


@contextmanager
def only_reporting(what: str) -> Iterator[None]:
    """Warn if ``what`` cannot be told, and go on: what is compiled does not depend on it."""
    try:
        yield
    except Exception as error:
        count_failure("report")
        warnings.warn(
            f"{what} could not be written; the compiled model is not affected: {_named(error)}",
            MhfCompilerWarning,
            stacklevel=4,
        )


def count_failure(cause: str) -> None:
    """Count a failure by its cause. Where PyTorch has no counters, nothing is counted."""
    try:
        from .compat import counters
    except (ImportError, AttributeError):
        return
    counters["flashmhf"]["failures"] += 1
    counters["flashmhf"][f"failures.{cause}"] += 1


def warn_of_failure(what: str, location: Location | None, error: Exception | str) -> None:
    """Warn that a kernel failed its trial run, and count the failure."""
    place = "an unknown place" if location is None else str(location)
    warnings.warn(
        f"the kernel for {what} at {place} failed; it is left as it was: {error}",
        MhfCompilerWarning,
        stacklevel=2,
    )
    count_failure("kernel")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
