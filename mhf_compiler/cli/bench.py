"""Timings of a model, or of one of its sites by itself, as written and rewritten.

Both ways are compiled by Inductor and differ only in the option ``rewrite``. They take turns, so
that a machine that becomes slower slows both down.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile

from ..debug.accuracy import Difference, compare, tensors_of
from ..debug.extract import Part, cut
from ..explanation import explain, reported
from ..options import parse_options
from ..patterns import Site
from ..report import Report, SiteReport
from ..report.text import headline

WAYS = {"as written": "never", "rewritten": "always"}


class MeasuringError(ValueError):
    """The request cannot be measured; the message is one line."""


@dataclass(frozen=True)
class Times:
    """Seconds of each round, by the way of ``WAYS``.

    Attributes:
        what: ``"forward"`` or ``"forward + backward"``.
        seconds: of each round.
    """

    what: str
    seconds: dict[str, list[float]]

    def median(self, way: str) -> float:
        """The median time of one way, in seconds."""
        return statistics.median(self.seconds[way])

    @property
    def speed_up(self) -> float:
        """How many times faster the rewritten graph is."""
        return self.median("as written") / self.median("rewritten")


class Subject:
    """A model or a part of it, compiled both ways at its first call.

    Args:
        function: the model.
        args: its arguments. If they, or the parameters of the model, require gradients and
            gradients are being recorded, it is trained.
        kwargs: its named arguments.
        options: the back end's, but for ``rewrite``.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs or {}
        torch.compiler.reset()
        self.compiled = {
            way: torch.compile(
                function, backend="flashmhf", options={**(options or {}), "rewrite": rewrite}
            )
            for way, rewrite in WAYS.items()
        }
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
        given = tensors_of([*self.args, *self.kwargs.values()])
        self.leaves = [x for x in (*parameters, *given) if x.requires_grad]

    def times(self, *, training: bool, rounds: int, tick: Callable[[], None]) -> list[Times]:
        """Compile, then time ``rounds`` rounds; ``tick`` is called after each.

        Args:
            training: whether gradients are recorded, and the backward pass is timed with the
                forward pass too.
            rounds: of each pass and each way.
            tick: shows progress.
        """
        found = []
        with torch.set_grad_enabled(training):
            passes = {"forward": False} | ({"forward + backward": True} if training else {})
            for what, backward in passes.items():
                for way in WAYS:  # compiles
                    self._once(way, backward)
                    self._once(way, backward)
                seconds: dict[str, list[float]] = {way: [] for way in WAYS}
                for _ in range(rounds):
                    for way in WAYS:
                        seconds[way].append(self._once(way, backward))
                        tick()
                found.append(Times(what, seconds))
        return found

    def peaks(self, *, training: bool) -> dict[str, int]:
        """Bytes that one call needs at most, beyond what is there before it, by way.

        With ``training``, both passes. Both ways have to be compiled.
        """
        found = {}
        with torch.set_grad_enabled(training):
            for way in WAYS:
                self._forget_gradients()
                found[way] = peak_memory(partial(self._once, way, training))
        return found

    def _forget_gradients(self) -> None:
        for x in self.leaves:
            x.grad = None

    def _once(self, way: str, backward: bool) -> float:
        self._forget_gradients()
        _wait()
        start = time.perf_counter()
        outputs = tensors_of(self.compiled[way](*self.args, **self.kwargs))
        if backward:
            trained = [x for x in outputs if x.requires_grad]
            torch.autograd.backward(trained, [torch.ones_like(x) for x in trained])
        _wait()
        return time.perf_counter() - start


def steps(*, training: bool, rounds: int) -> int:
    """How often ``Subject.times`` ticks."""
    return (1 + training) * rounds * len(WAYS)


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocators hand out at once during a call."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate(size for _, size in found), default=0)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def find_site(
    model: Callable[..., Any], number: int, *args: Any, **kwargs: Any
) -> tuple[SiteReport, Part]:
    """The site with this number in the report of a call of the model.

    Raises:
        MeasuringError: nothing is rewritten, or there is no such site.
    """
    found: list[tuple[fx.GraphModule, Site]] = []
    options = parse_options(None, {"rewrite": "always"})
    report = reported(model, options, args, kwargs, keep=lambda *site: found.append(site))
    check_rewritten(report)
    if not 0 <= number < len(found):
        last = len(found) - 1
        allowed = "the only one is 0" if last == 0 else f"they are numbered 0 to {last}"
        raise MeasuringError(f"there is no site {number}: {allowed}")
    return report.rewritten[number], cut(*found[number])


def check_rewritten(report: Report) -> None:
    """Raise ``MeasuringError`` if nothing was rewritten."""
    if not report.rewritten:
        raise MeasuringError(f"{headline(report.graphs)}: nothing to compare; explain says why")


def check_part(part: Part, inputs: Sequence[Tensor]) -> list[Difference]:
    """Compare the op with the model's spelling: the output, and each gradient that is recorded.

    Raises:
        MeasuringError: the site is not recognised without its surroundings.
    """
    report = explain(part.spelling, options={"rewrite": "always"})(*inputs)
    if len(report.rewritten) != 1:
        raise MeasuringError("the site cannot be taken out of its model: leave out --site")
    rewritten = torch.compile(part.spelling, backend="flashmhf", options={"rewrite": "always"})
    return compare(part.spelling, rewritten, inputs, [given.name for given in part.given])
