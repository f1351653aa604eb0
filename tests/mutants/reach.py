"""Which tests run which statements, recorded once and kept in build/.

The modules are imported with a call in front of every statement. Tracing would do without, but
calls Python back for all of PyTorch, too.
"""

from __future__ import annotations

import ast
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .loading import Replacing
from .running import clear_caches
from .points import FILES, KERNELS, ROOT, Mutant, functions, key_of

RECORD = ROOT / "build" / "mutants" / "reach.json"
RECORD_INTERPRETED = RECORD.with_stem("reach_interpreted")

#: what reads graphs is tested by these, and the gradients of the CPU
TESTS = (
    "tests/patterns",
    "tests/mhf_compiler/rewrite",
    "tests/fuzz/test_fuzz.py",
    *(f"tests/models/test_{name}.py" for name in ("unknowns", "modes", "side_effects", "contexts")),
    *(f"tests/models/test_{name}.py" for name in ("out_arguments", "checkpointing", "dynamic")),
    "tests/lowering/test_cpu.py",
    "tests/lowering/test_reference.py",
)
#: and the kernels' gradients by these
TESTS_INTERPRETED = ("tests/lowering/test_kernels_interpreted.py",)

_NAME = "__reached__"


class _Instrument(ast.NodeTransformer):
    """Puts a call of `_NAME` in front of every statement of a function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, [new for old in block for new in self._pair(old)])
        return node

    def _pair(self, statement: ast.stmt) -> list[ast.stmt]:
        call = ast.parse(f"{_NAME}({key_of(self.name, statement)!r})").body[0]
        for node in ast.walk(call):
            ast.copy_location(node, statement)
        return [call, statement]


def _is_jitted(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def instrumented(path: str) -> ast.Module | None:
    """A file's syntax tree with the calls in it; None for files that nothing is changed in."""
    if path not in FILES:
        return None
    tree = ast.parse((ROOT / path).read_text())
    keys = {}  # before anything is inserted
    for name, function in functions(tree):
        keys[function] = name
    for function, name in keys.items():
        if not _is_jitted(function):
            _Instrument(name).visit(function)
    return tree


class _Recorder:
    """A pytest plugin that notes for every test what it reached, and how long it took."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.reached: set[str] = set()
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.saved = time.monotonic()
        self.passed = True

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        clear_caches()
        self.reached.clear()
        self.passed = True
        start = time.monotonic()
        yield
        self.known.pop(item.nodeid, None)
        if self.passed:
            self.known[item.nodeid] = {
                "seconds": round(time.monotonic() - start, 3),
                "reached": sorted(self.reached),
            }
        if time.monotonic() > self.saved + 60:
            self.save()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed = self.passed and not (report.failed or report.skipped)

    def pytest_sessionfinish(self) -> None:
        self.save()

    def save(self) -> None:
        self.saved = time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.known))


def record(tests: list[str], file: Path) -> int:
    """Run tests, and add what they reach to the record. Returns pytest's exit status."""
    recorder = _Recorder(file)
    import builtins

    setattr(builtins, _NAME, recorder.reached.add)
    sys.meta_path.insert(0, Replacing(instrumented))
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu", "--durations=5"]
    return int(pytest.main([*options, *tests], plugins=[recorder]))


class Reach:
    """The record: which tests to run for a change."""

    def __init__(self, file: Path) -> None:
        record = json.loads(file.read_text())
        self.seconds: dict[str, float] = {test: at["seconds"] for test, at in record.items()}
        self.by_statement: dict[str, set[str]] = {}
        self.by_function: dict[str, set[str]] = {}
        for test, at in record.items():
            for key in at["reached"]:
                self.by_statement.setdefault(key, set()).add(test)
                self.by_function.setdefault(key.split(": ")[0], set()).add(test)

    def some_of_each_file(self) -> list[str]:
        """The quickest test of each file that reaches anything."""
        best: dict[str, str] = {}
        for test in sorted(self.seconds, key=lambda test: self.seconds[test]):
            best.setdefault(test.split("::")[0], test)
        return list(best.values())

    def tests_for(self, mutant: Mutant, limit: int) -> list[str]:
        """Tests that run the changed statement; those beyond a condition first, then quick ones.

        In code that is newer than the record, those that run its function; in a kernel, those that
        run a function of its file that is not one.
        """
        if mutant.path.startswith(KERNELS):
            found = self._around(mutant)
        else:
            found = self.by_statement.get(mutant.statement) or self.by_function.get(
                mutant.function, set()
            )
        quick = sorted(found, key=lambda test: (self.seconds[test], test))
        beyond = [test for test in quick if test in self.by_statement.get(mutant.beyond, ())]
        if len(beyond) < len(quick):
            rest = [test for test in quick if test not in set(beyond)]
            share = max(limit // 2, limit - len(rest))
            chosen = beyond[:share]
            return chosen + rest[: limit - len(chosen)]
        return quick[:limit]

    def _around(self, mutant: Mutant) -> set[str]:
        hosts = [
            (name, function)
            for name, function in functions(ast.parse((ROOT / mutant.path).read_text()))
            if not _is_jitted(function)
        ]
        mine = [name for name, function in hosts if mutant.function in _names(function)]
        found: set[str] = set()
        for name in mine or [name for name, _ in hosts]:
            found |= self.by_function.get(name, set())
        return found or set(self.seconds)


def _names(function: ast.FunctionDef) -> set[str]:
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} | {function.name}
