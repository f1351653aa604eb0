"""Tests under a change: a process for each, forked from one that has collected all tests.

The parent imports PyTorch, the package and the tests, once, and runs one test for each file of
tests that it needs first, so that what PyTorch starts up with is paid for. A child puts the changed
function's code in the place of the old one's, empties the caches of the package, and runs tests
until one fails. So a change costs what its tests do.
"""

from __future__ import annotations

import functools
import gc
import linecache
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import pytest

from .graphs import KeptGraph, kept_graphs
from .points import ROOT, Mutant

#: seconds in which the tests of a change have to end, unless one fails before
TIMEOUT = 120
#: seconds of computing for reading graphs
READING = 15
_PACKAGE = "mhf_compiler"


@dataclass(frozen=True)
class Outcome:
    """What became of a change.

    Attributes:
        caught: whether anything went wrong with it.
        by: the test that failed, or what else happened.
        seconds: what it took.
    """

    caught: bool
    by: str
    seconds: float


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
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def warm_up(self, tests: list[str]) -> None:
        """Run tests as they are, so that PyTorch has started whatever they need; keep their graphs.

        A test that fails is not run again.
        """
        for test, following in zip(tests, [*tests[1:], None], strict=True):
            with kept_graphs() as graphs:
                self._run(self.items[test], following and self.items[following])
            if self.failed:
                print(f"{test} fails without a change")
                del self.items[test]
                self.failed = ""
                continue
            for graph in graphs:
                graph.said = graph.read()
            once = {graph.said: graph for graph in graphs}  # explained and compiled: the same
            self.graphs[test] = [graph for graph in once.values() if graph.read() == graph.said]
        self.memory = Memory()

    def _run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def run(self, mutant: Mutant, tests: list[str], limit: int) -> Outcome:
        """Run tests with the change in a process of its own, up to the first that fails.

        Those whose graphs it reads as before are not run. Of those whose graphs it reads in another
        way, and of those without any, at most ``limit`` are.
        """
        start = time.monotonic()
        self.log.seek(0)
        self.log.truncate()
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            os._exit(self._child(mutant, [t for t in tests if t in self.items], limit))
        status = _wait(process, start + TIMEOUT)
        seconds = time.monotonic() - start
        if status is None:
            return Outcome(True, f"no end after {TIMEOUT} s", seconds)
        if os.WIFSIGNALED(status):
            return Outcome(True, signal.Signals(os.WTERMSIG(status)).name, seconds)
        self.log.seek(0)
        said = self.log.read()
        if os.WEXITSTATUS(status) == _BROKEN:
            raise RuntimeError(f"{mutant.name}:\n{said[-2000:]}")
        return Outcome(status != 0, said.rpartition("OUTCOME ")[2].strip(), seconds)

    def _child(self, mutant: Mutant, tests: list[str], limit: int) -> int:
        os.setsid()
        for stream in (1, 2):
            os.dup2(self.log.fileno(), stream)
        try:
            self.memory.change(mutant)
        except BaseException as error:
            print(repr(error), flush=True)
            return _BROKEN
        until = time.process_time() + READING
        alike = ran = 0
        different: list[str] = []
        try:
            for test in tests:
                graphs = self.graphs.get(test, [])
                if graphs:
                    if time.process_time() > until or len(different) >= limit:
                        continue
                    if all(graph.read() == graph.said for graph in graphs):
                        alike += 1
                        continue
                    different.append(test)
                elif ran >= limit:
                    continue
                else:
                    ran += 1
                self._run(self.items[test], None)
                if self.failed:
                    break
        except BaseException as error:  # a fork returns nowhere
            self.failed = repr(error)
        said = self.failed or (
            f"{ran} tests pass, and the graphs of {alike} others are read as before; "
            f"those of {', '.join(different) or 'none'} are not, and pass, too"
        )
        print(f"\nOUTCOME {said}", flush=True)
        return int(bool(self.failed))


_BROKEN = 99


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
