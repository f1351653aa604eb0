"""The reports of the graphs that this process has compiled, so that nothing is traced again.

They are plain values, which keep neither graphs nor tensors alive, and only so many are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from .calls import Names
from .compat import reset_with_dynamo
from .errors import only_reporting
from .followed import Followed, in_calls
from .report import GraphReport, Report
from .report.context import context_of

_MOST_GRAPHS = 64
_MOST_CODE = 32 * 2**20  # characters, of all graphs before and after

_kept: deque[tuple[GraphReport, Followed | None]] = deque(maxlen=_MOST_GRAPHS)


def compilation_report(model: Callable[..., Any] | None = None) -> Report:
    """What the back end did to the graphs that it has compiled, without tracing them again.

        model(x)  # compiled by backend="flashmhf", or with inductor_options()
        print(mhf_compiler.compilation_report(model))

    Unlike that of ``explain``, it is of what was compiled: it knows what the passes after autograd
    did, and which modules are in a graph. A graph that the back end has compiled for one layer, and
    Dynamo has called for others, counts the networks of all. A model that is compiled again, for
    other sizes, has its networks in two graphs.

    Args:
        model: the model that was compiled, or of which layers were: names of modules are then those
            in this model. Without it, they are the names in the module that Dynamo has compiled.

    Returns:
        A report of the last 64 graphs since ``torch.compiler.reset``, fewer if their code is longer
        than 32 MB. Reports of graphs that are compiled later are not added to it.
    """
    names = Names(model)
    numbers: dict[Hashable, int] = {}
    graphs = [
        report if followed is None else in_calls(report, followed, names, numbers)
        for report, followed in [*_kept]
    ]
    return Report(graphs, context=context_of(model))


def keep(
    report: GraphReport,
    receive: Callable[[Report], object] | None,
    followed: Followed | None = None,
) -> None:
    """Keep the report of a graph, and hand it to whoever has asked for it by the option."""
    from .backend import flashmhf

    reset_with_dynamo(flashmhf)
    _kept.append((report, followed))
    while len(_kept) > 1 and sum(len(one.before) + len(one.after) for one, _ in _kept) > _MOST_CODE:
        _kept.popleft()
    if receive is not None:
        with only_reporting("a report, to the option 'report',"):
            receive(Report([report]))


def forget() -> None:
    """Forget all reports."""
    _kept.clear()
