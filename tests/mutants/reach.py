"""Which tests run which statements, recorded once and kept in build/.

The modules are imported with a call in front of every statement. Tracing would do without, but
calls Python back for all of PyTorch, too.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from .loading import Replacing
from .points import FILES, KERNELS, ROOT, Mutant, functions, key_of, statements, value_key
from .running import clear_caches

RECORD = ROOT / "build" / "mutants" / "reach.json"
RECORD_INTERPRETED = RECORD.with_stem("reach_interpreted")

#: what reads graphs is tested by these, and the gradients of the CPU
TESTS = (
    "tests/patterns",
    "tests/mhf_compiler/substitution",
    "tests/fuzz/test_fuzz.py",
    *(f"tests/models/test_{name}.py" for name in ("unknowns", "modes", "side_effects", "contexts")),
    *(
        f"tests/models/test_{name}.py"
        for name in ("out_arguments", "checkpointing", "dynamic", "overwritten")
    ),
    "tests/lowering/test_cpu.py",
    "tests/lowering/test_reference.py",
)
#: and the kernels' gradients by these
TESTS_INTERPRETED = ("tests/lowering/test_kernels_interpreted.py",)

_REACHED, _WAS = "__reached__", "__was__"


class _Instrument(ast.NodeTransformer):
    """Puts a call in front of every statement of a function, and around parts of conditions."""

    def __init__(self, name: str, function: ast.FunctionDef) -> None:
        self.name = name
        self.keys = {node: key_of(name, node) for node in statements(function)}  # as they are now

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, [new for old in block for new in self._pair(old)])
        return node

    def _pair(self, statement: ast.stmt) -> list[ast.stmt]:
        call = ast.parse(f"{_REACHED}({self.keys[statement]!r})").body[0]
        for node in ast.walk(call):
            ast.copy_location(node, statement)
        return [call, statement]

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        keys = [self._value_keys(value) for value in node.values]
        super().generic_visit(node)
        node.values = [self._watched(v, key) for v, key in zip(node.values, keys, strict=True)]
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        keys = self._value_keys(node)
        super().generic_visit(node)
        return self._watched(node, keys)

    def _value_keys(self, expression: ast.expr) -> tuple[str, str]:
        return value_key(self.name, expression, False), value_key(self.name, expression, True)

    def _watched(self, expression: ast.expr, keys: tuple[str, str]) -> ast.expr:
        call = ast.parse(f"{_WAS}({keys!r}, 0)", mode="eval").body
        assert isinstance(call, ast.Call)
        for node in ast.walk(call):
            ast.copy_location(node, expression)
        call.args[1] = expression
        return call


#: asking others for their truth may do something: a symbolic one adds a guard
_PLAIN = (bool, int, float, str, list, tuple, dict, set, frozenset, type(None))


def _is_jitted(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def instrumented(path: str) -> ast.Module | None:
    """A file's syntax tree with the calls in it; None for files that nothing is changed in."""
    if path not in FILES:
        return None
    tree = ast.parse((ROOT / path).read_text())
    for name, function in functions(tree):
        if not _is_jitted(function):
            _Instrument(name, function).visit(function)
    return tree


class Recorder:
    """A pytest plugin that notes for every test what it reached, and how long it took.

    Whatever it records has to be imported after it was made.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.reached: set[str] = set()
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.passed = True
        setattr(builtins, _REACHED, self.reached.add)
        setattr(builtins, _WAS, self.was)
        sys.meta_path.insert(0, Replacing(instrumented))

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

    def was(self, keys: tuple[str, str], value: Any) -> Any:
        """Note whether a value is true, and return it."""
        if isinstance(value, _PLAIN):
            self.reached.add(keys[bool(value)])
        else:
            self.reached.update(keys)
        return value

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed = self.passed and not (report.failed or report.skipped)

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.known))

    def end(self) -> None:
        """Note nothing any more."""
        setattr(builtins, _REACHED, lambda key: None)
        setattr(builtins, _WAS, lambda keys, value: value)


class Reach:
    """The record: which tests to run for a change."""

    def __init__(self, file: Path) -> None:
        record = json.loads(file.read_text())
        self.seconds: dict[str, float] = {test: at["seconds"] for test, at in record.items()}
        reached: dict[str, set[str]] = {test: set(at["reached"]) for test, at in record.items()}
        #: changed function -> test -> the number of its way through it and what it calls
        self.ways: dict[tuple[str, str], dict[str, int]] = {}
        self.by_statement: dict[str, set[str]] = {}
        #: function -> test -> what it reaches there
        self.by_function: dict[str, dict[str, set[str]]] = {}
        for test, keys in reached.items():
            for key in keys:
                self.by_statement.setdefault(key, set()).add(test)
                function = self.by_function.setdefault(key.split(": ")[0], {})
                function.setdefault(test, set()).add(key)
        # Tests that go where few others do, for the time that they take.
        worth = {
            test: sum(1 / len(self.by_statement[key]) for key in keys) / (self.seconds[test] + 0.3)
            for test, keys in reached.items()
        }
        ranked = sorted(worth, key=lambda test: (-worth[test], test))
        self.rank = {test: place for place, test in enumerate(ranked)}

    def tests_for(self, mutant: Mutant) -> list[str]:
        """Tests that run the changed statement, the most telling ones first.

        Where a clause or a comparison changes, those alone in which it had the value that decides;
        if there are none, no test can notice. Some go beyond the condition that is changed, others
        do not. Both are taken in turns, and in turns from those that take the same way through the
        function and what it calls, too: first the ones that go where few others do.

        In code that is newer than the record, they are those that run its function; in a kernel,
        those that run a function of its file that is not one.
        """
        if mutant.path.startswith(KERNELS):
            found = self._around(mutant)
        elif mutant.statement in self.by_statement:
            found = self.by_statement.get(mutant.decisive or mutant.statement, set())
        else:
            found = set(self.by_function.get(mutant.function, ()))
        beyond = found & self.by_statement.get(mutant.beyond, set())
        ways = self._ways(mutant)
        first, second = (self._by_turns(tests, ways) for tests in (beyond, found - beyond))
        turns = zip_longest(first, second)
        return [test for turn in turns for test in turn if test is not None]

    def _ways(self, mutant: Mutant) -> dict[str, int]:
        """Tests that go the same way through the changed function and those that it may call."""
        known = self.ways.get((mutant.path, mutant.function))
        if known is not None:
            return known
        names = _names(dict(functions(ast.parse(mutant.text)))[mutant.function])
        reached = [
            tests
            for function, tests in self.by_function.items()
            if function == mutant.function or function.rpartition(".")[2] in names
        ]
        numbers: dict[frozenset[str], int] = {}
        ways: dict[str, int] = {}
        for test in set().union(*reached):
            way = frozenset().union(*(tests.get(test, ()) for tests in reached))
            ways[test] = numbers.setdefault(way, len(numbers))
        return self.ways.setdefault((mutant.path, mutant.function), ways)

    def _by_turns(self, tests: set[str], ways: dict[str, int]) -> list[str]:
        found: dict[int | None, list[str]] = {}
        for test in sorted(tests, key=self.rank.__getitem__):
            found.setdefault(ways.get(test), []).append(test)
        turns = zip_longest(*found.values())
        return [test for turn in turns for test in turn if test is not None]

    def _around(self, mutant: Mutant) -> set[str]:
        hosts = [
            (name, function)
            for name, function in functions(ast.parse((ROOT / mutant.path).read_text()))
            if not _is_jitted(function)
        ]
        mine = [name for name, function in hosts if mutant.function in _names(function)]
        found: set[str] = set()
        for name in mine or [name for name, _ in hosts]:
            found |= self.by_function.get(name, {}).keys()
        return found or set(self.seconds)


def _names(function: ast.FunctionDef) -> set[str]:
    nodes = list(ast.walk(function))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return (
        names | {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {function.name}
    )
