"""What tuning found: rows that stand in for those of tiles.py, in memory and in a folder of files.

Launches look in memory alone. The folder is read only on behalf of a model that is compiled for
tuned kernels, so what any other run computes does not depend on files. A key for
which the shipped row is the fastest is kept too, as None: it need not be timed again.

There is one file for each key, so that processes that tune at once need no lock: the first to write
a row decides it for all, and they add in the same order. Its name is a hash of all that the times
depend on: the key, the card, Triton's version and the kernels' source.
"""

import hashlib
import json
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ... import tiles
from ...problem import Problem
from ...tiles import MANY_TOKENS, Kernel, Row, Sizes
from ..replay import forget_repeats

_MOST_STAGES = 5

log = logging.getLogger(__name__)


class TuningKey(NamedTuple):
    """The problems of one kernel that share a row: equal but for the exact number of tokens."""

    kernel: Kernel
    sizes: Sizes  # tokens rounded
    activation: str
    card: str

    @classmethod
    def of(cls, kernel: Kernel, sizes: Sizes, activation: str, device: torch.device) -> "TuningKey":
        rounded_sizes = sizes._replace(tokens=rounded(sizes.tokens))
        return cls(kernel, rounded_sizes, activation, card(device))


def rounded(tokens: int) -> int:
    """The most tokens of a key."""
    return MANY_TOKENS if tokens >= MANY_TOKENS else max(16, 1 << (tokens - 1).bit_length())


@lru_cache
def card(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type


_rows: dict[TuningKey, Row | None] = {}


def row_for(kernel: Kernel, problem: Problem) -> Row | None:
    """The row that proved faster than the shipped one, if there is one."""
    if not _rows:
        return None
    return row_of(TuningKey.of(kernel, problem.sizes, problem.activation, problem.q.device))


def row_of(key: TuningKey) -> Row | None:
    return _rows.get(key)


def recall(key: TuningKey, folder: Path | None) -> bool:
    """Whether the key was tuned before; from now on, launches use what was found."""
    if key not in _rows and folder is not None:
        found = _read(_path(key, folder))
        if found is not None:
            _use(key, found[0])
    return key in _rows


def keep(key: TuningKey, row: Row | None, folder: Path | None) -> None:
    """Use a row from now on, and in later processes; or the one that another process kept first."""
    if folder is not None:
        try:
            row = _write(_path(key, folder), key, row)
        except OSError as error:
            log.warning("what tuning found is not kept on disk: %s", error)
    _use(key, row)


def forget() -> None:
    """Make the next calls run with the shipped rows."""
    _rows.clear()
    forget_repeats()


def _use(key: TuningKey, row: Row | None) -> None:
    _rows[key] = row
    forget_repeats()


def _path(key: TuningKey, folder: Path) -> Path:
    depends_on = (key, triton.__version__, kernels_hash())
    return folder / f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]}.json"


@lru_cache
def kernels_hash() -> str:
    """Of the kernels' source, the shipped rows and the rules of tuning included."""
    sources = [Path(tiles.__file__), *sorted(Path(__file__).parents[1].rglob("*.py"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def is_sensible(row: Row) -> bool:
    """Whether tuning would try a row: nothing else is written to a file, or taken from one."""
    tokens, hidden, warps, stages = row
    sizes = all(16 <= size <= 256 for size in (tokens, hidden))
    return sizes and warps in (4, 8) and 2 <= stages <= _MOST_STAGES


def _read(path: Path) -> tuple[Row | None] | None:
    """``(row,)``, where row is None if the shipped one won; None if the file is unreadable."""
    try:
        row = json.loads(path.read_text())["row"]
        if row is None:
            return (None,)
        tokens, hidden, warps, stages = (size for size in row if type(size) is int)
        if not is_sensible((tokens, hidden, warps, stages)):
            raise ValueError(f"{row} is no row that tuning would try")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("what tuning found is not readable in %s: %s", path, error)
        return None
    return ((tokens, hidden, warps, stages),)


def _write(path: Path, key: TuningKey, row: Row | None) -> Row | None:
    """Write a file whole or not at all, unless there is one; the row that it holds then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = key._asdict() | {"sizes": key.sizes._asdict(), "triton": triton.__version__}
    text = json.dumps({"about": about, "row": row}, indent=1, default=str)
    whole = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        whole.write_text(text)
        os.link(whole, path)
    except FileExistsError:
        found = _read(path)
        if found is not None:
            return found[0]
        whole.replace(path)  # it is unreadable
    finally:
        whole.unlink(missing_ok=True)
    return row
