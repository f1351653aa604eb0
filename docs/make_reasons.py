"""Write docs/reasons.md from patterns/reasons.py: ``python docs/make_reasons.py``."""

from pathlib import Path

from mhf_compiler.patterns import Kind, Unreadable

PAGE = Path(__file__).with_name("reasons.md")
HEAD = """# Why a network is declined

<!-- Written by docs/make_reasons.py from patterns/reasons.py; a test compares. -->

Each near-miss in a report has one of these reasons, with the operation that decided it. The names
are those of `reason["kind"]` in JSON, of log lines, and of the counters `declined.NAME`.

| name | what is the matter | what to change |
|---|---|---|
"""
GRAPHS = """
## Why a graph is not analysed

Such a graph is compiled as it is. It is counted by `unread.NAME`, warned of once, and comes first
in the report.

| name | what is the matter | what to change |
|---|---|---|
"""


def page() -> str:
    """The page, a row for each reason."""
    return HEAD + _rows(Kind) + GRAPHS + _rows(Unreadable)


def _rows(kinds: type[Kind] | type[Unreadable]) -> str:
    return "".join(f"| `{kind.name}` | {kind.sentence} | {kind.remedy} |\n" for kind in kinds)


if __name__ == "__main__":
    PAGE.write_text(page())
