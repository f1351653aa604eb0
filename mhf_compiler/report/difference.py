"""The code of a graph before and after as one difference, as HTML.

What is equal is folded, except for a few lines around each change, and so is the middle of a long
change. Lines that only give a value another name, and the releases of variables at the ends of
lines, are left out of both: they differ where nothing is computed differently. Parameters are
called as in the model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from html import escape

from .escape import visible_lines

_LONGEST = 24  # lines of a change that are shown as they are
_SHOWN = 10  # of a longer one, at each end
_AROUND = 3  # equal lines that are shown before and after a change
_ALIAS = re.compile(r"^\s*\w+ = \w+$")
_RELEASES = re.compile(r";  (?:\w+ = )+None(?=\s*(?:#.*)?$)")
_NAME = re.compile(r"\b[lL]_self_((?:modules|parameters|buffers)_\w*?)_(?!\w)")
_KINDS = re.compile(r"(?:^|_)(?:modules|parameters|buffers)_")
_PARAMETER = re.compile(r"(?<=\"), (?=\w+: \")")  # between the arguments of a graph


def difference(before: str, after: str) -> str:
    """Two codes as one, with removed and added lines marked."""
    old, new = _lines(before), _lines(after)
    old_shown, new_shown = _coloured(old), _coloured(new)
    parts: list[str] = []
    # autojunk is wanted: lines that repeat, such as those between statements, are bad anchors.
    opcodes = difflib.SequenceMatcher(None, old, new).get_opcodes()
    for number, (what, a, b, c, d) in enumerate(opcodes):
        if what == "equal":
            ends = (number > 0, number + 1 < len(opcodes))
            parts += _equal(new_shown[c:d], *ends)
        else:
            changed = _changed(old_shown[a:b], "del", "removed")
            changed += _changed(new_shown[c:d], "add", "added")
            parts.append(f'<div class="change" tabindex="-1">{changed}</div>')
    return "".join(parts)


def _lines(code: str) -> list[str]:
    lines = _PARAMETER.sub(",\n            ", visible_lines(code)).split("\n")
    shown = (line for line in lines if line.strip() and not _ALIAS.match(line))
    return [_NAME.sub(_named, _RELEASES.sub("", line)) for line in shown]


def _named(found: re.Match[str]) -> str:
    """``ffn.gate`` for ``l_self_modules_ffn_parameters_gate_``."""
    return ".".join(_KINDS.split(found[1])[1:])


def _changed(lines: Sequence[str], kind: str, what: str) -> str:
    """Removed or added lines: of many, the middle is folded."""
    shown = [_line(line, kind) for line in lines]
    if len(shown) <= _LONGEST:
        return "".join(shown)
    return (
        "".join(shown[:_SHOWN])
        + _fold(f"{len(shown) - 2 * _SHOWN} more lines {what}", shown[_SHOWN:-_SHOWN])
        + "".join(shown[-_SHOWN:])
    )


def _equal(lines: Sequence[str], after_change: bool, before_change: bool) -> Iterator[str]:
    """Lines that did not change: all if nothing did, otherwise the middle is folded."""
    first = _AROUND if after_change else 0
    last = len(lines) - (_AROUND if before_change else 0)
    if last - first < 2 or not (after_change or before_change):
        first = last = len(lines)
    yield from (_line(line) for line in lines[:first])
    if first < last:
        yield _fold(f"{last - first} equal lines", [*map(_line, lines[first:last])])
    yield from (_line(line) for line in lines[last:])


def _fold(title: str, lines: Sequence[str]) -> str:
    return f"<details><summary>… {title} …</summary>{''.join(lines)}</details>"


def _line(line: str, kind: str = "") -> str:
    sign = {"del": "- ", "add": "+ ", "": "  "}[kind]
    return f'<span class="line{f" {kind}" if kind else ""}">{sign}{line}\n</span>'


def _coloured(lines: Sequence[str]) -> Sequence[str]:
    """Lines of code, as HTML."""
    try:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
    except ModuleNotFoundError:
        return [*map(escape, lines)]
    lexer, formatter = PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)
    shown = highlight("\n".join(lines), lexer, formatter).split("\n")[: len(lines)]
    # Colouring is dropped if a token spans several lines, since it would be cut.
    whole = len(shown) == len(lines) and all(
        line.count("<span") == line.count("</span>") for line in shown
    )
    return shown if whole else [*map(escape, lines)]


def colours_of_code() -> str:
    """The style of coloured code; nothing where pygments is missing."""
    try:
        from pygments.formatters import HtmlFormatter
    except ModuleNotFoundError:
        return ""
    light, dark = (
        re.sub(r"background: #\w+;?|/\*.*?\*/", "", HtmlFormatter(style=s).get_style_defs(".code"))
        for s in ("default", "github-dark")
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"
