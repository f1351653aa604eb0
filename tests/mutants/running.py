"""Tests under a change: a process for each, forked from one that has collected all tests.

The parent has imported PyTorch, the package and the tests, and run its tests as they are, so that
what PyTorch starts up with is paid for. A child puts the changed function's code in the place of
the old one's, empties the caches of the package, and runs tests until one fails. So a change costs
what its tests do.
"""

from __future__ import annotations

import functools
import gc
import json
import linecache
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import CodeType, FunctionType
from typing import Any

import pytest

from .graphs import KeptGraph, kept_graphs
from .points import ROOT, Mutant

#: seconds that the tests of a change have at least
TIMEOUT = 120
#: seconds of computing for reading graphs
READING = 15
_PACKAGE = "mhf_compiler"


@dataclass(frozen=True)
class Outcome:
    """What tests made of a change.

    Attributes:
        by: the test that failed, or what else happened to the process; empty if nothing did.
        alike: how many tests have graphs that are read as before, so that they were not run.
        passed: the tests that were run and pass; those with graphs read them differently.
        left: how many tests there was no time for.
        seconds: what it took.
    """

    by: str = ""
    alike: int = 0
    passed: tuple[str, ...] = ()
    left: int = 0
    seconds: float = 0.0

    def __add__(self, other: Outcome) -> Outcome:
        """Of more tests, asked in another process."""
        return Outcome(
            self.by or other.by,
            self.alike + other.alike,
            self.passed + other.passed,
            self.left + other.left,
            self.seconds + other.seconds,
        )


def clear_caches() -> None:
    """Forget what functions of the package have cached."""
    for cache in _caches():
        cache.cache_clear()


def _caches() -> list[Any]:
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) is functools._lru_cache_wrapper
        and f"{thing.__module__}.".startswith(f"{_PACKAGE}.")
    ]


class Memory:
    """What a change has to find in memory, found once: its functions, and the caches.

    What is in memory then is never looked at by the garbage collector again: a child would copy
    every page of it.
    """

    def __init__(self) -> None:
        gc.unfreeze()  # what the tests' own setting has frozen: it would not be seen
        gc.collect()
        self.caches = _caches()
        self.functions: dict[tuple[str, str], list[FunctionType]] = {}
        for thing in gc.get_objects():
            if type(thing) is FunctionType and thing.__code__.co_filename.startswith(f"{ROOT}/"):
                key = thing.__code__.co_filename, thing.__code__.co_qualname
                self.functions.setdefault(key, []).append(thing)
        gc.freeze()

    def change(self, mutant: Mutant) -> None:
        """Give the changed function its new code, wherever it is referred to.

        Triton's interpreter reads the source of a kernel when it first runs it: from here on, this.
        """
        path = str(ROOT / mutant.path)
        lines = mutant.text.splitlines(keepends=True)
        linecache.cache[path] = (len(mutant.text), None, lines, path)  # without a time: kept
        new = _code_of(compile(mutant.text, path, "exec", dont_inherit=True), mutant.function)
        found = self.functions.get((path, mutant.function), [])
        assert found, f"{mutant.function} is not in memory"
        for function in found:
            function.__code__ = new
        for cache in self.caches:
            cache.cache_clear()


def _code_of(module: CodeType, name: str) -> CodeType:
    todo = [module]
    while todo:
        for constant in todo.pop().co_consts:
            if isinstance(constant, CodeType):
                if constant.co_qualname == name:
                    return constant
                todo.append(constant)
    raise LookupError(name)


class Server:
    """A pytest plugin that runs the tests of each change in place of all tests.

    Args:
        work: called with this server once all tests are collected.
    """

    def __init__(self, work: Callable[[Server], None]) -> None:
        self.work = work
        self.failed = ""
        self.graphs: dict[str, list[KeptGraph]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def warm_up(self, tests: list[str]) -> None:
        """Run tests as they are, so that PyTorch has started whatever they need; keep their graphs.

        A test that fails is not run again. ``freeze`` has to follow the last of them.
        """
        for test, following in zip(tests, [*tests[1:], None], strict=True):
            with kept_graphs() as graphs:
                self._run(self.items[test], self.items[following] if following else None)
            if self.failed:
                print(f"{test} fails without a change")
                del self.items[test]
                self.failed = ""
                continue
            for graph in graphs:
                graph.said = graph.read()
            once = {graph.key(): graph for graph in graphs}  # explained and compiled: the same
            self.graphs[test] = [graph for graph in once.values() if graph.read() == graph.said]

    def freeze(self) -> None:
        """Get ready for changes."""
        self.memory = Memory()

    def _run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def run(self, mutant: Mutant, tests: list[str], limit: int, seconds: int) -> Outcome:
        """Run tests with the change in a process of its own, up to the first that fails.

        Those whose graphs it reads as before are not run. Of those whose graphs it reads in another
        way, and of those without any, at most ``limit`` are. What computes for longer than
        ``seconds`` counts as noticed, and so does what has no end after twice that, or TIMEOUT.
        """
        start = time.monotonic()
        sys.stdout.flush()
        with tempfile.TemporaryFile("w+") as log:
            process = os.fork()
            if process == 0:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
                os._exit(self._child(mutant, tests, limit, log.fileno()))
            longest = max(TIMEOUT, 2 * seconds)
            status = _wait(process, start + longest)
            log.seek(0)
            said = log.read()
        took = time.monotonic() - start
        if status is None:
            return Outcome(f"no end after {longest} s", seconds=took)
        if os.WIFSIGNALED(status):
            return Outcome(signal.Signals(os.WTERMSIG(status)).name, seconds=took)
        if os.WEXITSTATUS(status) == _BROKEN:
            print(f"cannot be made: {mutant.name}:\n{said[-2000:]}", flush=True)
            return Outcome(left=len(tests), seconds=took)
        outcome = said.rpartition(_TOLD)[2]
        if _TOLD not in said:
            return Outcome("the process ended", seconds=took)
        told = json.loads(outcome)
        return Outcome(told["by"], told["alike"], tuple(told["passed"]), told["left"], took)

    def _child(self, mutant: Mutant, tests: list[str], limit: int, log: int) -> int:
        os.setsid()
        for stream in (1, 2):
            os.dup2(log, stream)
        try:
            self.memory.change(mutant)
        except BaseException as error:
            print(repr(error), flush=True)
            return _BROKEN
        until = time.process_time() + READING
        alike = left = 0
        different: list[str] = []
        others: list[str] = []
        try:
            for test in tests:
                graphs = self.graphs.get(test, [])
                ran = different if graphs else others
                if len(ran) >= limit or (graphs and time.process_time() > until):
                    left += 1
                    continue
                if graphs and all(graph.read() == graph.said for graph in graphs):
                    alike += 1
                    continue
                ran.append(test)
                self._run(self.items[test], None)
                if self.failed:
                    break
        except BaseException as error:  # a fork returns nowhere
            self.failed = repr(error)
        outcome = Outcome(self.failed, alike, (*different, *others), left)
        print(f"\n{_TOLD}{json.dumps(asdict(outcome))}", flush=True)
        return 0


_BROKEN = 99
_TOLD = "OUTCOME "


def _wait(process: int, until: float) -> int | None:
    """The exit status; None if time is up, and the process and what it started are ended then."""
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None
