"""How text of a model goes into what is written: one function for each format.

Names of modules and parameters, paths of files, lines of source and constants come from outside.
None of it may end a comment, a cell, a label or a line. HTML is escaped by the template
(``page.html``), and values in JSON and Python by ``json.dumps`` and ``repr``.
"""

from __future__ import annotations

import re


def visible(text: object) -> str:
    """As one line of text: what cannot be printed, newlines among it, as Python would write it."""
    return "".join(c if c.isprintable() else _spelled(c) for c in str(text))


def visible_lines(text: str) -> str:
    r"""As lines of text or of a program: the same, but for newlines and tabs.

    Python takes a lone ``\r`` for the end of a line, and with it for that of a comment.
    """
    return "\n".join(
        line
        if line.isprintable()  # nearly all are, and graphs have many
        else "".join(c if c.isprintable() or c == "\t" else _spelled(c) for c in line)
        for line in text.split("\n")
    )


def python_comment(text: str) -> str:
    """As a comment of Python's, a line for each line."""
    return "\n".join(f"# {visible(line)}" for line in text.splitlines())


def python_constant(value: object) -> str:
    """As an expression of Python's; None for what is no plain number or text."""
    plain = isinstance(value, (bool, int, float, complex, str, bytes))
    return repr(value) if plain else "None"


def markdown_cell(text: str) -> str:
    """As a cell of a table in Markdown, which shows it as it is."""
    escaped = re.sub(r"([\\`*_{}\[\]()<>#+!|&~-])", r"\\\1", text)
    return "".join(c if c.isprintable() else " " for c in escaped)


def dot_string(text: str) -> str:
    r"""As a string of Graphviz's, where newlines stay; ``\N`` and the like mean nothing there."""
    shown = "\n".join(visible(line) for line in text.split("\n"))
    escaped = shown.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _spelled(character: str) -> str:
    return ascii(character)[1:-1]
