"""Break the checks and the gradients one at a time, and print what no test noticed.

    python -m tests.mutants --record        which tests run what, which is kept; then every change
    python -m tests.mutants                 every change, by the record; --list prints them only

Exits with 1 if a change survives that equivalent.py does not explain.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from random import Random

import pytest

from .equivalent import EQUIVALENT
from .points import KERNELS, ROOT, Mutant, mutants
from .reach import RECORD, RECORD_INTERPRETED, TESTS, TESTS_INTERPRETED, Reach, Recorder
from .running import Outcome, Server

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
SURVIVORS = ROOT / "build" / "mutants" / "survivors"


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
        "--tests", type=int, default=16, help="at most so many that compile no graph, for a change"
    )
    parser.add_argument("--survivors", action="store_true", help="those of the last run again")
    parser.add_argument("--list", action="store_true", help="print the changes, run nothing")
    parser.add_argument(
        "--record", nargs="*", metavar="TEST", help="first record what these tests reach; none: all"
    )
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Mutant]:
    """The changes that the options ask for, but for those that are known to change nothing."""
    found = [mutant for mutant in mutants(options.only) if mutant.name not in EQUIVALENT]
    if options.survivors:
        last = {line for file in SURVIVORS.glob("*.txt") for line in file.read_text().splitlines()}
        found = [mutant for mutant in found if mutant.name in last]
    if options.limit is not None and options.limit < len(found):
        kept = set(Random(options.seed).sample(range(len(found)), options.limit))
        found = [mutant for i, mutant in enumerate(found) if i in kept]
    return found


def show(mutant: Mutant, outcome: Outcome) -> None:
    word = f"caught by {outcome.by}" if outcome.caught else f"SURVIVED: {outcome.by}"
    print(f"{mutant.path}:{mutant.line} {mutant.function}  [{outcome.seconds:.1f} s] {word}")
    if not outcome.caught:
        print(f"    {mutant.before}\n    {mutant.after}")
    sys.stdout.flush()


def keep(survivors: list[Mutant]) -> None:
    """Write down what survived, for --survivors."""
    SURVIVORS.mkdir(parents=True, exist_ok=True)
    file = SURVIVORS / ("interpreted.txt" if INTERPRETING else "compiled.txt")
    file.write_text("".join(f"{mutant.name}\n" for mutant in survivors))


def run_all(todo: list[Mutant], limit: int, recorded: list[str] | None) -> list[Mutant]:
    """Run the tests for each change, print what happens, and return the survivors."""
    file = RECORD_INTERPRETED if INTERPRETING else RECORD
    recorder = None if recorded is None else Recorder(file)
    survivors: list[Mutant] = []

    def work(server: Server) -> None:
        if recorder is not None:
            server.warm_up(list(server.items))
            recorder.end()
        reach = Reach(file)
        tests = {mutant: reach.tests_for(mutant) for mutant in todo}
        if recorder is None:
            needed = {test for found in tests.values() for test in found}
            server.warm_up([test for test in server.items if test in needed])
        start, total = time.monotonic(), Counter(mutant.path for mutant in todo)
        for mutant in todo:
            outcome = server.run(mutant, tests[mutant], limit)
            show(mutant, outcome)
            if not outcome.caught:
                survivors.append(mutant)
                keep(survivors)
        lost = Counter(mutant.path for mutant in survivors)
        for path, count in total.items():
            print(f"{path}: {count - lost[path]} of {count} caught")
        seconds = (time.monotonic() - start) / max(len(todo), 1)
        print(f"{len(todo) - len(survivors)} of {len(todo)} caught, {seconds:.1f} s each")

    options = ["-q", "-s", "-p", "no:cacheprovider", "--tb=short", "-m", "not gpu"]
    files = recorded or (TESTS_INTERPRETED if INTERPRETING else TESTS)
    plugins = [Server(work), *([] if recorder is None else [recorder])]
    status = pytest.main([*options, *files], plugins=plugins)
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"the tests could not be collected: {status!r}")
    return survivors


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
    mine = [mutant for mutant in found if mutant.path.startswith(KERNELS) is INTERPRETING]
    wanted = mine or options.record is not None
    survivors = run_all(mine, options.tests, options.record) if wanted else []
    status = int(bool(survivors))
    if len(mine) < len(found) and not INTERPRETING:  # Triton decides at its import
        command = [sys.executable, "-m", "tests.mutants", *sys.argv[1:]]
        status |= subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    return status


if __name__ == "__main__":
    sys.exit(main())
