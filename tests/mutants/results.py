"""What is known of each change, written down while more is found out."""

from __future__ import annotations

import csv
import time
from collections import Counter
from pathlib import Path

from .points import Mutant, mutants
from .running import Outcome

#: seconds after which it is written down again
_OFTEN = 10
#: a change is one of these; cut off: not all of its tests had a turn
STATES = CAUGHT, OPEN, CUT_OFF, UNREACHED = "caught", "open", "cut off", "unreached"
_COLUMNS = (
    *("state", "path", "line", "function", "before", "after"),
    *("by", "tests", "alike", "left", "passed", "seconds"),
)


class Results:
    """The outcome of every change, as a table with a line for each.

    Args:
        file: where the table goes; what it says of other changes stays.
        todo: the changes.
    """

    def __init__(self, file: Path, todo: list[Mutant]) -> None:
        self.file = file
        self.todo = todo
        self.outcomes = [Outcome() for _ in todo]
        others = {mutant.name for mutant in mutants([])} - {mutant.name for mutant in todo}
        self.others = [row for row in rows(file) if name_in(row) in others]

    def begin(self, tests: list[int]) -> None:
        """Say how many tests there are for each change."""
        self.tests = tests
        self.write()

    def add(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] += outcome
        if time.monotonic() > self.written + _OFTEN:
            self.write()

    def state(self, number: int) -> str:
        """Whether a change was caught; else whether its tests had a turn, or it has none."""
        outcome = self.outcomes[number]
        if outcome.by:
            return CAUGHT
        if not self.tests[number]:
            return UNREACHED
        had_a_turn = outcome.alike + len(outcome.passed) + outcome.left
        return OPEN if had_a_turn == self.tests[number] else CUT_OFF

    def survivors(self) -> list[Mutant]:
        return [mutant for i, mutant in enumerate(self.todo) if self.state(i) != CAUGHT]

    def write(self) -> None:
        self.written = time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = [_COLUMNS, *(row.values() for row in self._rows())]
        self.file.write_text("".join("\t".join(line) + "\n" for line in lines))

    def by_file(self) -> str:
        """How many changes of each file are in which state, of all that the table knows."""
        found = Counter((row["path"], row["state"]) for row in self._rows())
        lines = [f"| | changes | {' | '.join(STATES)} |", "|---" * (len(STATES) + 2) + "|"]
        for path in dict.fromkeys(path for path, _ in found):
            counts = [found[path, state] for state in STATES]
            lines.append(f"| `{path}` | {sum(counts)} | {' | '.join(map(str, counts))} |")
        return "\n".join(lines)

    def _rows(self) -> list[dict[str, str]]:
        found = list(self.others)
        for i, (mutant, outcome) in enumerate(zip(self.todo, self.outcomes, strict=True)):
            cells = (
                *(self.state(i), mutant.path, mutant.line, mutant.function),
                *(mutant.before, mutant.after, outcome.by, self.tests[i], outcome.alike),
                *(outcome.left, "; ".join(outcome.passed), f"{outcome.seconds:.1f}"),
            )
            texts = [" ".join(str(cell).split()) for cell in cells]
            found.append(dict(zip(_COLUMNS, texts, strict=True)))
        return sorted(found, key=lambda row: (row["path"], int(row["line"])))


def rows(file: Path) -> list[dict[str, str]]:
    """What a table says; nothing if there is none."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def name_in(row: dict[str, str]) -> str:
    """The name of the change that a row is about."""
    return f"{row['path']}:{row['function']}: {row['before']}  ->  {row['after']}"
