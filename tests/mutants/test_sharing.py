"""Several processes, with a server that only says what it was asked; and what is kept of it."""

import os
import time
from collections import Counter

import pytest

from .points import mutants
from .results import CAUGHT, CUT_OFF, OPEN, UNREACHED, Results, rows
from .running import Outcome
from .sharing import Crew

TESTS = [f"tests/test_{name}.py::test_{i}" for name in "ab" for i in range(20)]


class Server:
    """Knows the tests; the one that is called ``deadly`` ends its process, ``catching`` fails."""

    def __init__(self, catching: str = "", deadly: str = "") -> None:
        self.items = dict.fromkeys(TESTS)
        self.catching = catching
        self.deadly = deadly

    def warm_up(self, tests: list[str]) -> None:
        if self.deadly in tests:
            os._exit(1)
        time.sleep(0.01)  # so that no process takes all of them

    def freeze(self) -> None:
        pass

    def run(self, mutant: str, tests: list[str], limit: int, seconds: int) -> Outcome:
        caught = self.catching if self.catching in tests else ""
        return Outcome(caught, passed=tuple(f"{mutant} {test}" for test in tests))


def asked(server: Server, minutes: float = 1) -> list[tuple[int, Outcome]]:
    with Crew(server, None, ["x", "y"], 3, time.monotonic() + 60 * minutes) as crew:
        assert sum(1 for _ in crew.warm_up(TESTS))
        return list(crew.ask([TESTS, TESTS[:4]], {}, 16))


def test_every_test_is_asked_once_about_every_change_that_reaches_it():
    found = Counter(test for _, outcome in asked(Server()) for test in outcome.passed)
    assert found == Counter([*(f"x {test}" for test in TESTS), *(f"y {t}" for t in TESTS[:4])])


def test_what_is_caught_is_not_asked_of_the_tests_of_later_rounds():
    asked_about_x = [o for number, o in asked(Server(catching=TESTS[0])) if number == 0]
    assert any(outcome.by for outcome in asked_about_x)
    assert sum(len(outcome.passed) for outcome in asked_about_x) < len(TESTS)


def test_a_process_that_ends_takes_its_tests_along(capsys):
    found = Counter(t for _, outcome in asked(Server(deadly=TESTS[-1])) for t in outcome.passed)
    assert 0 < len(found) < len(TESTS) + 4
    assert "a process ended" in capsys.readouterr().out


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path / "outcomes.tsv", mutants(["patterns/checks.py"])[:4])
    results.begin([3, 3, 3, 0])
    results.add(0, Outcome("test_it"))
    results.add(1, Outcome(alike=1, passed=("test_it",)))
    results.add(1, Outcome(left=1))
    results.add(2, Outcome(passed=("test_it", "test_that")))
    results.write()
    return results


def test_the_table_says_what_became_of_each_change(results):
    states = [CAUGHT, OPEN, CUT_OFF, UNREACHED]
    assert [results.state(number) for number in range(4)] == states
    assert Counter(row["state"] for row in rows(results.file)) == Counter(states)
    assert "| `patterns/checks.py` | 4 | 1 | 1 | 1 | 1 |" in results.by_file()


def test_what_the_table_says_of_other_changes_stays(results):
    other = Results(results.file, mutants(["patterns/axes.py"])[:1])
    other.begin([0])
    assert Counter(row["path"] for row in rows(results.file)) == {
        "patterns/checks.py": 4,
        "patterns/axes.py": 1,
    }
