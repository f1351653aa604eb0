"""A fixed slice of the random programs. ``make fuzz`` runs as many as one likes."""

from random import Random

import pytest

from .check import Verdict, check, check_same
from .mutations import mutants
from .programs import KINDS, generate

PROGRAMS = range(40, 64)
MUTANTS = range(100, 112)
SETTLED = (Verdict.FOUND, Verdict.ORDINARY, Verdict.BY_DESIGN)


@pytest.mark.parametrize("seed", PROGRAMS)
def test_random_programs_are_found_and_compute_the_same(seed: int):
    outcome = check(generate(seed))
    assert outcome.verdict in SETTLED, outcome.explained


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_each_kind(kind: str):
    """The kind is drawn by random numbers of its own: the spelling is that of the seed."""
    outcome = check(generate(2, kind))
    assert outcome.verdict in SETTLED, outcome.explained


@pytest.mark.parametrize("seed", MUTANTS)
def test_mutants_compute_the_same_whatever_is_made_of_them(seed: int):
    program = generate(seed)
    for mutant, _ in zip(mutants(program, Random(seed)), range(2), strict=False):
        outcome = check_same(mutant.program)
        assert outcome.verdict not in (Verdict.WRONG, Verdict.CRASHED), outcome.detail


def test_a_seed_is_one_program():
    assert generate(7).runnable() == generate(7).runnable()
    assert generate(7).source != generate(8).source


def test_a_program_is_a_module_that_can_be_pasted(tmp_path):
    text = generate(3).runnable()
    compile(text, str(tmp_path / "program.py"), "exec")
    assert 'if __name__ == "__main__":' in text
