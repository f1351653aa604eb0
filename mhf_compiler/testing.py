"""For the test suites of models: are their MH-FFNs rewritten, and are the numbers right?

The programs that ``dump_dir`` writes import ``compare`` and ``print_differences`` from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .debug.accuracy import Difference, compare, print_differences
from .explanation import explain
from .options import GivenOptions, as_mapping
from .patterns import Kind, Unreadable
from .report import Report

_FAULTS = (Kind.NOT_VERIFIED, Kind.CHANGED_RESULT, Unreadable.COMPILER_FAULT)

__all__ = ["Difference", "assert_rewritten", "compare", "print_differences"]


def assert_rewritten(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sites: int | None = None,
    verify: bool = False,
    options: GivenOptions | None = None,
) -> Report:
    """Raise ``AssertionError`` unless the MH-FFNs of a model are found and rewritten.

    For a test that a refactoring does not silently lose the op:

        def test_every_layer_is_fused():
            mhf_compiler.assert_rewritten(model, (tokens,), sites=12)

    As ``mhf_compiler.explain`` does, it runs the model once.

    Args:
        model: a module or function.
        args: its arguments.
        kwargs: its named arguments.
        sites: how many MH-FFNs are to be rewritten, one in each layer of a model in which layers
            share a compiled graph; at least one if it is None.
        verify: whether each of them is also compared with its original spelling, on random and on
            extreme numbers, in values and gradients: the option of that name.
        options: the options that ``torch.compile`` would be given. Unlike there, ``rewrite`` is
            ``"always"`` if a dict does not name it: whether it pays depends on the machine that
            runs the test. ``Options`` are taken as they are.

    Returns:
        The report, for further assertions.

    Raises:
        AssertionError: another number was rewritten, one of them computes something else, or the
            compiler failed or, if ``sites`` is None, could not analyse a graph. The message is the
            report with its reasons.
        TypeError: ``args`` is a tensor instead of a sequence of arguments.
        ValueError: ``sites`` is negative.
    """
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"args is a {type(args).__name__}, must be a tuple or a list of the model's arguments"
        )
    if sites is not None and sites < 0:
        raise ValueError(f"sites is {sites}, must be None or at least 0")
    given = {"rewrite": "always"} | as_mapping(options) | ({"verify": True} if verify else {})
    report = explain(model, options=given)(*args, **(kwargs or {}))
    wrong = [site for site in report.declined if site.reason and site.reason.kind in _FAULTS]
    if wrong:
        raise AssertionError(f"{len(wrong)} MH-FFNs would compute something else\n\n{report}")
    unread = [one for one in report.unread if sites is None or one.reason.kind in _FAULTS]
    if unread:
        raise AssertionError(f"{len(unread)} graphs were not analysed\n\n{report}")
    found = report.totals.networks
    if found == 0 if sites is None else found != sites:
        expected = "at least 1 MH-FFN" if sites is None else f"{sites} MH-FFNs"
        raise AssertionError(f"expected {expected} to be rewritten, got {found}\n\n{report}")
    return report
