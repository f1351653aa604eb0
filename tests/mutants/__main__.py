"""Break the checks and the gradients one at a time, and print what no test noticed.

    python -m tests.mutants --record        which tests run what, which is kept; then every change
    python -m tests.mutants                 every change, by the record; --list prints them only
    python -m tests.mutants --on TEST       every change, on these tests alone and without a record

Exits with 1 if a change survives that equivalent.py does not explain.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from random import Random

import pytest

from .equivalent import EQUIVALENT
from .points import KERNELS, ROOT, Mutant, mutants
from .reach import RECORD, RECORD_INTERPRETED, TESTS, TESTS_INTERPRETED, Reach, Recorder
from .results import CAUGHT, OPEN, Results, name_in, rows
from .running import Outcome, Server
from .sharing import Crew

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
#: seconds of computing after which given tests do not end
_LONG = 3600
OUTCOMES = ROOT / "build" / "mutants" / "outcomes.tsv"
OUTCOMES_INTERPRETED = OUTCOMES.with_stem("outcomes_interpreted")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="START",
        help="changes that begin so: patterns/checks.py, or patterns/checks.py:check_router",
    )
    parser.add_argument("--limit", type=int, help="a random sample of so many")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--tests",
        type=int,
        default=400 if INTERPRETING else 16,  # which term of a kernel a test reaches is not known
        help="about so many are run at most, for a change",
    )
    parser.add_argument("--survivors", action="store_true", help="those that nothing has caught")
    parser.add_argument("--list", action="store_true", help="print the changes, run nothing")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes, each of which has a part of the tests"
    )
    parser.add_argument(
        "--minutes", type=float, default=1440, help="stop after so many; what is known is kept"
    )
    parser.add_argument("--on", nargs="+", metavar="TEST", help="run these tests for each, and all")
    parser.add_argument(
        "--record", nargs="*", metavar="TEST", help="first record what these tests reach; none: all"
    )
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Mutant]:
    """The changes that the options ask for, but for those that are known to change nothing."""
    found = [mutant for mutant in mutants(options.only) if mutant.name not in EQUIVALENT]
    if options.survivors:
        known = [*rows(OUTCOMES), *rows(OUTCOMES_INTERPRETED)]
        caught = {name_in(row) for row in known if row["state"] == CAUGHT}
        found = [mutant for mutant in found if mutant.name not in caught]
    if options.limit is not None and options.limit < len(found):
        kept = set(Random(options.seed).sample(range(len(found)), options.limit))
        found = [mutant for i, mutant in enumerate(found) if i in kept]
    return found


def show(mutant: Mutant, state: str, outcome: Outcome) -> None:
    print(f"{mutant.path}:{mutant.line} {mutant.function}  [{outcome.seconds:.1f} s] {state}")
    if state == CAUGHT:
        print(f"    by {outcome.by}", flush=True)
    else:
        print(f"    {mutant.before}\n    {mutant.after}")
        print(
            f"    {len(outcome.passed)} tests pass, {outcome.alike} read their graphs as before, "
            f"{outcome.left} are left out",
            flush=True,
        )


def warm_up(crew: Crew, tests: list[str], recorder: Recorder | None) -> None:
    """Run tests as they are, and save what they reach, now and then."""
    start = saved = time.monotonic()
    for ran in crew.warm_up(tests):
        if time.monotonic() > saved + 30:
            saved = time.monotonic()
            print(f"{ran} of {len(tests)} tests ran", flush=True)
            if recorder is not None:
                recorder.save()
    if recorder is not None:
        recorder.save()
    print(f"{len(crew.owner)} tests ran in {time.monotonic() - start:.0f} s", flush=True)


def run_all(todo: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """Run the tests for each change, print what happens, and return the survivors."""
    until = time.monotonic() + 60 * options.minutes
    file = RECORD_INTERPRETED if INTERPRETING else RECORD
    recorder = None if options.record is None else Recorder(file)
    results = Results(OUTCOMES_INTERPRETED if INTERPRETING else OUTCOMES, todo)

    def work(server: Server) -> None:
        tests = list(server.items)
        if recorder is None:
            reach = Reach(file)
            needed = {test for mutant in todo for test in reach.tests_for(mutant)}
            tests = [test for test in tests if test in needed]
        with Crew(server, recorder, todo, options.jobs, until) as crew:
            warm_up(crew, tests, recorder)
            if not todo:
                return
            if recorder is not None:
                reach = Reach(file)
            ranked = [[t for t in reach.tests_for(m) if t in server.items] for m in todo]
            results.begin([len(tests) for tests in ranked])
            limit = -(-options.tests // options.jobs)
            for number, outcome in crew.ask(ranked, reach.seconds, limit):
                if results.state(number) != CAUGHT:
                    results.add(number, outcome)
                    if results.state(number) in (CAUGHT, OPEN):
                        show(todo[number], results.state(number), results.outcomes[number])
            results.write()
        for number, mutant in enumerate(todo):
            if results.state(number) not in (CAUGHT, OPEN):
                show(mutant, results.state(number), results.outcomes[number])
        print(results.by_file())

    files = options.record or (TESTS_INTERPRETED if INTERPRETING else TESTS)
    collect(files, Server(work), *([] if recorder is None else [recorder]))
    return results.survivors()


def run_on(todo: list[Mutant], tests: list[str]) -> list[Mutant]:
    """Run all of the given tests for each change, and return those that they do not notice."""
    found = [Outcome() for _ in todo]

    def work(server: Server) -> None:
        server.freeze()
        for number, mutant in enumerate(todo):
            found[number] = outcome = server.run(mutant, list(server.items), sys.maxsize, _LONG)
            show(mutant, CAUGHT if outcome.by else OPEN, outcome)

    collect(tests, Server(work))
    caught = [number for number, outcome in enumerate(found) if outcome.by]
    results = Results(OUTCOMES, [todo[number] for number in caught])
    results.begin([1 for _ in caught])
    for place, number in enumerate(caught):
        results.add(place, found[number])
    results.write()
    return [mutant for mutant, outcome in zip(todo, found, strict=True) if not outcome.by]


def collect(tests: Sequence[str], *plugins: object) -> None:
    """Let pytest collect tests, and one of the plugins do with them what it does.

    Raises:
        SystemExit: they cannot be collected.
    """
    selected = ["-q", "-s", "-p", "no:cacheprovider", "--tb=short", "-m", "not gpu"]
    status = pytest.main([*selected, *tests], plugins=list(plugins))
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"the tests could not be collected: {status!r}")


def main() -> int:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # What a changed program fails on is no example to try again.
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(RECORD.parent / "hypothesis")
    found = chosen(options)
    if options.list:
        for mutant in found:
            print(
                f"{mutant.path}:{mutant.line} {mutant.function}: {mutant.before} -> {mutant.after}"
            )
        print(f"{len(found)} changes")
        return 0
    if options.on:
        return int(bool(run_on(found, options.on)))
    mine = [mutant for mutant in found if mutant.path.startswith(KERNELS) is INTERPRETING]
    wanted = mine or options.record is not None
    survivors = run_all(mine, options) if wanted else []
    status = int(bool(survivors))
    if len(mine) < len(found) and not INTERPRETING:  # Triton decides at its import
        command = [sys.executable, "-m", "tests.mutants", *sys.argv[1:]]
        status |= subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    return status


if __name__ == "__main__":
    sys.exit(main())
