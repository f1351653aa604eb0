"""Processes that share the tests: each runs its own, and asks them about every change.

They divide the tests and not the changes: most changes are reached by most tests, so that each of
the processes would have to run nearly all of them before its first change.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby, pairwise
from multiprocessing.connection import Connection, wait
from typing import Any

from .points import Mutant
from .reach import Recorder
from .running import READING, Outcome, Server

_FORK = multiprocessing.get_context("fork")

#: so many tests of a file are taken at a time
_PART = 6
#: the first eight tests of every change are asked before any others, and so on
_ROUNDS = (0, 8, 64, 512, sys.maxsize)
#: how many times as long as without a change its tests may compute, and how many seconds more
_SLOWER, _MORE = 10, READING + 5


class Crew:
    """Processes forked from one that has collected all tests.

    Args:
        server: has collected the tests.
        recorder: notes what tests reach; None: nothing is recorded.
        todo: the changes.
        jobs: how many processes.
        until: when all has to end, by ``time.monotonic``.
    """

    def __init__(
        self, server: Server, recorder: Recorder | None, todo: list[Mutant], jobs: int, until: float
    ) -> None:
        self.server = server
        self.recorder = recorder
        self.todo = todo
        self.jobs = jobs
        self.until = until
        self.taken = _FORK.Value("i", 0)
        self.caught = _FORK.Array("b", max(len(todo), 1), lock=False)
        self.ends: list[Connection] = []
        self.processes: list[Any] = []
        #: which process has run a test
        self.owner: dict[str, Connection] = {}

    def __enter__(self) -> Crew:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.terminate()
        self.folder.cleanup()

    def warm_up(self, tests: list[str]) -> Iterator[int]:
        """Run tests as they are, each in one of the processes, and say how many have run."""
        files = [list(found) for _, found in groupby(tests, lambda test: test.split("::")[0])]
        parts = [found[i : i + _PART] for found in files for i in range(0, len(found), _PART)]
        for _ in range(self.jobs):
            mine, its = _FORK.Pipe()
            process = _FORK.Process(target=self._serve, args=(its, parts))
            process.start()
            its.close()
            self.ends.append(mine)
            self.processes.append(process)
        for end, (part, reached) in self._said():
            self.owner |= dict.fromkeys(part, end)
            if self.recorder is not None:
                self.recorder.known |= reached
            yield len(self.owner)

    def ask(
        self, ranked: list[list[str]], seconds: dict[str, float], limit: int
    ) -> Iterator[tuple[int, Outcome]]:
        """What tests make of each change, by its number; several times for most of them.

        Args:
            ranked: the tests of each change, the most telling ones first.
            seconds: what tests take.
            limit: as of ``Server.run``, for each process.
        """
        if time.monotonic() > self.until:
            return  # some do not listen yet
        orders: dict[Connection, list[tuple[int, list[str], int]]] = {e: [] for e in self.ends}
        for start, stop in pairwise(_ROUNDS):
            found = []  # place of the first test, number of the change, tests, process
            for number, tests in enumerate(ranked):
                mine: dict[Connection, list[int]] = {}
                for place, test in enumerate(tests[start:stop]):
                    if test in self.owner:
                        mine.setdefault(self.owner[test], []).append(place)
                found += [(places[0], number, places, end) for end, places in mine.items()]
            for _, number, places, end in sorted(found, key=lambda item: item[:2]):
                tests = [ranked[number][start + place] for place in places]
                longest = _MORE + _SLOWER * sum(seconds.get(test, 0.0) for test in tests)
                orders[end].append((number, tests, int(longest)))
        for end, order in orders.items():
            end.send((limit, order))
        for _, told in self._said():
            yield told

    def _said(self) -> Iterator[tuple[Connection, Any]]:
        """What the processes say, until all have said that they are done or time is up."""
        busy = list(self.ends)
        while busy and (left := self.until - time.monotonic()) > 0:
            for end in wait(busy, left):
                assert isinstance(end, Connection)
                try:
                    said = end.recv()
                except EOFError:
                    print("a process ended, and nothing asks its tests any more", flush=True)
                    self.ends.remove(end)
                    self.owner = {t: owner for t, owner in self.owner.items() if owner is not end}
                    said = None
                if said is None:
                    busy.remove(end)
                else:
                    yield end, said

    def _serve(self, end: Connection, parts: list[list[str]]) -> None:
        # pytest's folders for tests are numbered, which processes would get in each other's way at
        os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(dir=self.folder.name)
        while (part := self._take(parts)) is not None:
            self.server.warm_up(part)
            known = {} if self.recorder is None else self.recorder.known
            passed = [test for test in part if test in self.server.items]
            end.send((passed, {test: known[test] for test in part if test in known}))
        if self.recorder is not None:
            self.recorder.end()
        self.server.freeze()
        end.send(None)
        limit, order = end.recv()
        for number, tests, seconds in order:
            if not self.caught[number]:
                outcome = self.server.run(self.todo[number], tests, limit, seconds)
                self.caught[number] |= bool(outcome.by)
                end.send((number, outcome))
        end.send(None)

    def _take(self, parts: list[list[str]]) -> list[str] | None:
        with self.taken.get_lock():
            self.taken.value += 1
            place = self.taken.value - 1
        return parts[place] if place < len(parts) else None
