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


class NotAnalysedError(RuntimeError):
    """A graph could not be analysed, so nothing in it is rewritten; raised under ``strict``."""


_warned: set[tuple[str, ...]] = set()


def warn_once(*cause: str) -> None:
    """Give a warning, unless the same was given since ``torch.compiler.reset``.

    Args:
        cause: the parts of the message, which are joined by colons.
    """
    if first_time(*cause):
        warnings.warn(": ".join(cause), MhfCompilerWarning, stacklevel=3)


def first_time(*cause: str) -> bool:
    """Whether this was not asked before, since ``torch.compiler.reset``."""
    known = cause in _warned
    _warned.add(cause)
    return not known


def forget_warnings() -> None:
    """Let every cause be warned of again."""
    _warned.clear()


def fault(cause: str, message: str, error: Exception, *, strict: bool = False) -> None:
    """Count a fault of ours, and warn of it once.

    Args:
        cause: what it is counted as, in addition to ``failures``.
        message: what failed, and what is done instead.
        error: what was raised.
        strict: raise ``error`` instead of warning.
    """
    count_failure(cause)
    if strict:
        raise error
    warn_once(message, type(error).__name__, str(error))


@contextmanager
def only_reporting(what: str) -> Iterator[None]:
    """Warn if ``what`` cannot be written, and go on: what is compiled does not depend on it."""
    try:
        yield
    except Exception as error:
        count_failure("report")
        message = f"{what} could not be written; the compiled model is not affected"
        warn_once(message, type(error).__name__, str(error))


def count_failure(cause: str) -> None:
    """Count a failure by its cause. Where PyTorch has no counters, nothing is counted."""
    try:
        from .compat import counters
    except (ImportError, AttributeError):
        return
    counters["flashmhf"]["failures"] += 1
    counters["flashmhf"][f"failures.{cause}"] += 1


def kernel_failed(
    what: str, location: Location | None, error: Exception, *, strict: bool = False
) -> None:
    """Count that a kernel failed its trial run; warn of it, or raise ``error`` under ``strict``."""
    place = "an unknown place" if location is None else str(location)
    message = f"the kernel for {what} at {place} failed; it is left as it was"
    fault("kernel", message, error, strict=strict)
