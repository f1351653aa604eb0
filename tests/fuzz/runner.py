"""Many programs: checked in parallel, counted, and the failing ones written down.

Each seed is one program, which must be found, and mutants of it, which must compute the same as
without the back end.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .check import Outcome, Verdict, check, check_same
from .mutations import mutants
from .programs import generate

RECALL = 0.98  # of the programs, at least
_TRIES = 8  # mutants that do not run, before a seed is given up
_NO_RESULT = (
    *(Verdict.INVALID, Verdict.UNCAPTURED, Verdict.DYNAMO),
    *(Verdict.ORDINARY, Verdict.BY_DESIGN),
)
_BROKEN = (Verdict.WRONG, Verdict.CRASHED, Verdict.MISWRITTEN, Verdict.INVALID)


@dataclass(frozen=True)
class Finding:
    """One program or mutant, and what became of it."""

    seed: int
    mutation: str  # "" for the program itself
    outcome: Outcome

    @property
    def label(self) -> str:
        return f"seed {self.seed}" + (f", mutant: {self.mutation}" if self.mutation else "")

    @property
    def group(self) -> str:
        """What it is counted under in the summary."""
        reasons = " + ".join(self.outcome.reasons)
        kind = "mutant " if self.mutation else ""
        return f"{kind}{self.outcome.verdict.value}{': ' if reasons else ''}{reasons}"

    @property
    def failed(self) -> bool:
        """Whether it belongs into a report of failures."""
        verdict = self.outcome.verdict
        if self.mutation:
            return verdict in (Verdict.WRONG, Verdict.CRASHED, Verdict.UNSEEN)
        return verdict is Verdict.INVALID or verdict not in (Verdict.FOUND, *_NO_RESULT)


def check_seed(seed: int, count: int) -> list[Finding]:
    """The program of a seed and ``count`` of its mutants, checked."""
    program = generate(seed)
    findings = [Finding(seed, "", check(program))]
    endless = mutants(program, Random(seed))
    for _ in range(_TRIES * count):
        if len(findings) > count:
            break
        mutant = next(endless)
        outcome = check_same(mutant.program)
        if outcome.verdict not in _NO_RESULT:
            findings.append(Finding(seed, mutant.name, outcome))
    return findings


def _start() -> None:
    """Set up a process that checks many programs.

    Tracing makes so many objects that the collector would take a fourteenth of the time, nearly all
    of it for what the imports have made.
    """
    torch.set_num_threads(1)
    torch.backends.opt_einsum.enabled = False  # or a seed's program depends on what is installed
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def run(seeds: Sequence[int], count: int, workers: int) -> Iterator[Finding]:
    """Check seeds in parallel, in their order, with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start)
    with Progress(*columns, console=Console(stderr=True)) as progress, pool:
        bar = progress.add_task("programs", total=len(seeds))
        for found in pool.map(check_seed, seeds, [count] * len(seeds), chunksize=2):
            progress.advance(bar)
            yield from found


@dataclass
class Summary:
    """What a run comes to."""

    findings: list[Finding]

    @property
    def programs(self) -> list[Finding]:
        return [f for f in self.findings if not f.mutation and f.outcome.verdict not in _NO_RESULT]

    @property
    def mutants(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.mutation]

    @property
    def recall(self) -> float:
        found = sum(f.outcome.verdict is Verdict.FOUND for f in self.programs)
        return found / max(len(self.programs), 1)

    @property
    def broken(self) -> list[Finding]:
        """Wrong results and crashes; an invalid program is the generator's own mistake."""
        return [f for f in self.findings if f.outcome.verdict in _BROKEN]

    @property
    def passed(self) -> bool:
        return self.recall >= RECALL and not self.broken

    def failures(self) -> dict[str, list[Finding]]:
        """Failures by verdict and reason, the shortest program first."""
        groups: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            if finding.failed:
                groups[finding.group].append(finding)
        for group in groups.values():
            group.sort(key=lambda f: len(f.outcome.program.source))
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def __str__(self) -> str:
        lines = [
            f"{len(self.programs)} programs, recall {self.recall:.1%} (at least {RECALL:.0%})",
            f"{len(self.mutants)} mutants: {_counted(self.mutants)}",
            f"{len(self.broken)} wrong results, crashes and invalid programs (none allowed)",
        ]
        for group, findings in self.failures().items():
            first = findings[0]
            lines += [
                "",
                f"{len(findings)} x {group}",
                f"  for one, {first.label}: {first.outcome.detail}",
                *(f"  {line}" for line in first.outcome.explained.splitlines()),
                "",
                *(f"    {line}" for line in _body(first.outcome.program.source)),
            ]
        return "\n".join(lines)


def _counted(findings: list[Finding]) -> str:
    counts = Counter(finding.group for finding in findings)
    return ", ".join(f"{count} {group}" for group, count in counts.most_common())


def _body(source: str) -> list[str]:
    """The source without its title and imports."""
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("H, E"))
    return lines[start:]


def write_failures(summary: Summary, folder: Path, each: int = 3) -> None:
    """The shortest failing programs of each group as runnable files, and a table of contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("fuzz_*.py"):
        old.unlink()
    contents = ["# Failing programs", "", f"{summary}".split("\n\n")[0], ""]
    for group, findings in summary.failures().items():
        contents += [f"## {len(findings)} x {group}", ""]
        for finding in findings[:each]:
            name = f"fuzz_{finding.seed}{'_mutant' if finding.mutation else ''}.py"
            (folder / name).write_text(finding.outcome.program.runnable())
            contents.append(f"- `{name}` ({finding.label}) {finding.outcome.detail}")
            contents += [f"    - {line}" for line in finding.outcome.explained.splitlines()]
        contents.append("")
    (folder / "SUMMARY.md").write_text("\n".join(contents))
