"""``python -m tests.fuzz --number 500 --seed 0``: many random programs and their mutants.

The exit status says whether recall and results are as they must be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .programs import generate
from .runner import Summary, run, write_failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--number", type=int, default=500, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed")
    parser.add_argument("--mutants", type=int, default=1, help="how many of each program")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", type=Path, help="write failing programs into this folder")
    parser.add_argument("--program", type=int, metavar="SEED", help="print one program, no more")
    options = parser.parse_args()
    if options.program is not None:
        print(generate(options.program).runnable())
        return 0
    seeds = range(options.seed, options.seed + options.number)
    summary = Summary(list(run(seeds, options.mutants, options.workers)))
    print(summary)
    if options.write is not None:
        write_failures(summary, options.write)
    return 0 if summary.passed else 1


if __name__ == "__main__":
    sys.exit(main())
