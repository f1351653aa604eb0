"""The changes that mutation testing makes, on sources of a few lines."""

import ast
import json

from .equivalent import EQUIVALENT
from .points import mutants, mutants_of
from .reach import Reach

CHECKS = """
def check(a, b, c):
    if not a or (b and c):
        raise Declined("no")
    if a == b:
        return None
    return f"{a == b}"
"""
TERMS = """
def backward(m, y, slope):
    m *= y
    m.mul_(slope)
    return m * y - slope
"""


def changes(path: str, source: str) -> set[tuple[str, str]]:
    return {(mutant.before, mutant.after) for mutant in mutants_of(path, source)}


def test_checks_lose_clauses_and_comparisons_and_what_they_raise():
    assert changes("patterns/checks.py", CHECKS) == {
        ("not a or (b and c)", "((not a))"),
        ("not a or (b and c)", "((b and c))"),
        ("b and c", "((b))"),
        ("b and c", "((c))"),
        ('raise Declined("no")', "pass"),
        ("a == b", "True"),
        ("return None", "pass"),
    }


def test_gradients_lose_terms():
    assert changes("lowering/activations.py", TERMS) == {
        ("m *= y", "pass"),
        ("m.mul_(slope)", "pass"),
        ("m * y", "(m)"),
        ("m * y", "(y)"),
        ("m * y - slope", "(m * y)"),
    }


def test_every_change_is_a_program():
    for mutant in mutants([])[::10]:
        ast.parse(mutant.text)


def test_what_is_called_equivalent_is_still_there():
    assert EQUIVALENT.keys() <= {mutant.name for mutant in mutants([])}


def test_tests_that_a_change_can_fail_come_beyond_the_condition_first_and_the_quick_ones(tmp_path):
    (mutant,) = (m for m in mutants_of("patterns/checks.py", CHECKS) if m.after == "((not a))")
    assert mutant.decisive == "check: b and c is True"
    decisive = [mutant.statement, mutant.decisive]
    reached = {
        "slow": (2, decisive),
        "quick": (1, decisive),
        "declined": (3, [*decisive, mutant.beyond]),
        "undecided": (1, [mutant.statement, "check: b and c is False"]),
        "elsewhere": (1, ["other: pass"]),
    }
    record = tmp_path / "reach.json"
    record.write_text(
        json.dumps({test: {"seconds": s, "reached": keys} for test, (s, keys) in reached.items()})
    )
    assert Reach(record).tests_for(mutant) == ["declined", "quick", "slow"]
