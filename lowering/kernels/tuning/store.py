"""What tuning found: rows that stand in for those of tiles.py, in memory and in a folder of files.

Launches look in memory alone. The folder is read only on behalf of a model that is compiled for
tuned kernels, so what any other run computes does not depend on what lies on a disk. A class for
which the shipped row is the fastest is kept too, as None: it need not be timed again.

There is one file for each class, so that processes that tune at once need no lock: the first to
write a class decides it for all, and they add in the same order. Its name is a hash of all that the
times depend on: the class, the card, Triton's version and the kernels' source.
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

from ...tiles import Kernel, Row
from ..launch import Problem, capability, forget_repeats

MANY_TOKENS = 8192  # beyond this, more tokens prefer no other tile

log = logging.getLogger(__name__)


class Class(NamedTuple):
    """The problems of one kernel that share a row: equal but for the exact number of tokens."""

    kernel: Kernel
    tokens: int  # rounded
    heads: int
    groups: int
    networks: int
    hidden: int
    width: int
    gated: bool
    routed: bool
    biased: tuple[bool, bool, bool]
    activation: str
    dtype: torch.dtype
    card: str
    capability: tuple[int, int]


def rounded(tokens: int | None) -> int:
    """The most tokens of a class; None stands for a number that is not known yet."""
    if tokens is None or tokens >= MANY_TOKENS:
        return MANY_TOKENS
    return max(16, 1 << (tokens - 1).bit_length())


def class_of(kernel: Kernel, problem: Problem) -> Class:
    batch, length, heads, width = problem.q.shape
    groups, networks, hidden, _ = problem.k.shape
    return Class(
        kernel=kernel,
        tokens=rounded(batch * length),
        heads=heads,
        groups=groups,
        networks=networks,
        hidden=hidden,
        width=width,
        gated=problem.u is not None,
        routed=problem.r is not None,
        biased=(
            problem.k_bias is not None,
            problem.u_bias is not None,
            problem.v_bias is not None,
        ),
        activation=problem.activation,
        dtype=problem.q.dtype,
        card=card(problem.q.device),
        capability=capability(problem.q.device),
    )


@lru_cache
def card(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type


_rows: dict[Class, Row | None] = {}


def row_for(kernel: Kernel, problem: Problem) -> Row | None:
    """The row that proved faster than the shipped one, if there is one."""
    return _rows.get(class_of(kernel, problem)) if _rows else None


def row_of(cls: Class) -> Row | None:
    return _rows.get(cls)


def recall(cls: Class, folder: Path | None) -> bool:
    """Whether the class was tuned before; from now on, launches use what was found."""
    if cls not in _rows and folder is not None and (path := _path(cls, folder)).exists():
        found = _read(path)
        if found is not None:
            _use(cls, found[0])
    return cls in _rows


def keep(cls: Class, row: Row | None, folder: Path | None) -> None:
    """Use a row from now on, and in later processes; or the one that another process kept first."""
    if folder is not None:
        try:
            row = _write(_path(cls, folder), cls, row)
        except OSError as error:
            log.warning("what tuning found is not kept on disk: %s", error)
    _use(cls, row)


def forget() -> None:
    """Make the next calls run with the shipped rows."""
    _rows.clear()
    forget_repeats()


def _use(cls: Class, row: Row | None) -> None:
    _rows[cls] = row
    forget_repeats()


def _path(cls: Class, folder: Path) -> Path:
    depends_on = (*cls, triton.__version__, _kernels_hash())
    return folder / f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]}.json"


@lru_cache
def _kernels_hash() -> str:
    """Of the kernels' source, the shipped rows and the rules of tuning included."""
    sources = sorted(Path(__file__).parents[2].rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def _read(path: Path) -> tuple[Row | None] | None:
    """The row in a file, which may be None; or None where nothing can be made of the file."""
    try:
        row = json.loads(path.read_text())["row"]
        if row is None:
            return (None,)
        tokens, hidden, warps, stages = (size for size in row if type(size) is int and size > 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("what tuning found is not readable in %s: %s", path, error)
        return None
    return ((tokens, hidden, warps, stages),)


def _write(path: Path, cls: Class, row: Row | None) -> Row | None:
    """Write a file whole or not at all, unless there is one; the row that it holds then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = cls._asdict() | {"triton": triton.__version__}
    text = json.dumps({"about": about, "row": row}, indent=1, default=str)
    whole = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        whole.write_text(text)
        os.link(whole, path)
    except FileExistsError:
        found = _read(path)
        if found is not None:
            return found[0]
        whole.replace(path)  # nobody can read it
    finally:
        whole.unlink(missing_ok=True)
    return row
