"""Tiles timed on the card, for those who ask for it: rows near the shipped one, and other cards'.

A row is taken when it is faster than the shipped one by more than noise, twice, and when its
results are the shipped one's but for the order of addition. One that does not compile, does not fit
or fails otherwise is left out. Where Hopper's own kernel takes a problem there is nothing to tune.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from ...tiles import Kernel, Row, Tile, choose, shipped_rows
from .. import run_hopper
from ..launch import Problem, recorded
from ..loads import token_axes, tokens_innermost
from ..plain.backward import run_down, run_query, run_up
from ..plain.forward import run_forward
from . import store as tuned
from .store import Class

Say = Callable[[str], None]
Run = Callable[[Tile], Sequence[Tensor]]  # runs a kernel, and returns what it filled

_GAIN = 0.97  # of the shipped row's time; what takes longer may be noise
_DIFFERENCE = 0.01  # of results that are equal but for the order of addition, at most
_MOST_STAGES = 5
_WARM_UP, _TIME = 5, 50  # milliseconds for one tile

log = logging.getLogger(__name__)


def on_card(run: Callable[[], None]) -> float:
    """The median time of a run, with a cold cache, as weights are found by the layer before."""
    return triton.testing.do_bench(run, warmup=_WARM_UP, rep=_TIME, return_mode="median")


def tune(
    classes: Sequence[Class],
    trial: Callable[[], Mapping[Kernel, Run]],
    folder: Path | None,
    say: Say,
    clock: Callable[[Callable[[], None]], float] = on_card,
) -> None:
    """Find the fastest row of each class, unless that was done before; it raises nothing.

    Args:
        classes: one for each kernel that will be used.
        trial: makes tensors for these classes, and returns the kernels that plain Triton has to run
            on them. Called when there is something to time.
        folder: where results are kept, if anywhere.
        say: is told what is being timed.
        clock: times a run.
    """
    left = [cls for cls in classes if not tuned.recall(cls, folder)]
    if not left:
        return
    try:
        runs = trial()
        for cls in left:
            run = runs.get(cls.kernel)
            row = None if run is None else _fastest_row(cls, run, say, clock)
            tuned.keep(cls, row, folder)
    except Exception as error:
        log.warning("tuning failed, the shipped tiles are used: %s", error)
        for cls in left:  # once is enough: not for each layer of a model
            if not tuned.recall(cls, None):
                tuned.keep(cls, None, None)


def candidates(cls: Class) -> dict[Tile, Row]:
    """Tiles to time, each with the row that it comes from; the shipped one first."""
    itemsize = cls.dtype.itemsize
    shipped, *others = shipped_rows(
        cls.kernel, width=cls.width, itemsize=itemsize, capability=cls.capability
    )
    tokens, hidden, warps, stages = shipped
    few = max(2, stages // 2)  # what a larger tile leaves room for
    rows = [
        shipped,
        (tokens, hidden, warps, stages + 1),
        (tokens, hidden, warps, stages - 1),
        (tokens, hidden, warps * 2, stages),
        (tokens, hidden, warps // 2, stages),
        (tokens, hidden * 2, warps, few),
        (tokens, hidden // 2, warps, stages),
        (tokens * 2, hidden, warps, few),
        (tokens // 2, hidden, warps, stages),
        (tokens // 2, hidden, warps // 2, stages),
        *others,
    ]
    tiles: dict[Tile, Row] = {}
    for row in rows:
        if not _sensible(row):
            continue
        tile = choose(
            cls.kernel,
            tokens=cls.tokens,
            heads=cls.heads,
            hidden=cls.hidden,
            width=cls.width,
            itemsize=itemsize,
            capability=cls.capability,
            row=row,
        )
        tiles.setdefault(tile, row)
    return tiles


def _sensible(row: Row) -> bool:
    tokens, hidden, warps, stages = row
    sizes = all(16 <= size <= 256 for size in (tokens, hidden))
    return sizes and warps in (4, 8) and 2 <= stages <= _MOST_STAGES


def _fastest_row(
    cls: Class, run: Run, say: Say, clock: Callable[[Callable[[], None]], float]
) -> Row | None:
    """The row to use in place of the shipped one, if there is one."""
    tiles = candidates(cls)
    shipped, *others = tiles
    expected = [x.clone() for x in run(shipped)]

    def time(tile: Tile) -> float:
        results: list[Tensor] = []
        again = recorded(lambda: results.extend(run(tile)))
        if not all(map(_agree, results, expected)):
            raise ArithmeticError("its results are not those of the shipped tile")
        return clock(again)

    what = f"tuning {cls.kernel} for {cls.heads} heads x {cls.width}"
    say(f"{what}: 1 of {len(tiles)}")
    times = {shipped: time(shipped)}
    for number, tile in enumerate(others, 2):
        say(f"{what}: {number} of {len(tiles)}")
        try:
            times[tile] = time(tile)
        except Exception as error:
            log.debug("%s left out: %s", tile, error)
    best = min(times, key=times.__getitem__)
    if times[best] > _GAIN * times[shipped] or time(best) > _GAIN * time(shipped):
        log.info("%s: the shipped %s stays", what, shipped)
        return None
    log.info("%s: %s in place of %s, %.3g of its time", what, best, shipped,
             times[best] / times[shipped])  # fmt: skip
    return tiles[best]


def _agree(result: Tensor, expected: Tensor) -> bool:
    difference = torch.linalg.vector_norm(result.float() - expected.float())
    return bool(difference <= _DIFFERENCE * torch.linalg.vector_norm(expected.float()))


def plain_runs(
    problem: Problem, out: Tensor, grad_out: Tensor, kernels: Sequence[Kernel]
) -> dict[Kernel, Run]:
    """Those of the kernels that plain Triton has to run on these tensors."""
    prepared = problem
    if problem.r is not None:  # as `backward` has it
        merged = token_axes(problem.q, grad_out).merged
        prepared = problem._replace(r=tokens_innermost(problem.r, merged))
    runs: dict[Kernel, Run] = {}
    for kernel in kernels:
        if kernel == "forward":
            if not run_hopper(kernel, problem, out):
                runs[kernel] = _filling([out], lambda tile: run_forward(problem, out, tile))
        else:
            run = _backward_run(kernel, prepared, grad_out)
            if run is not None:
                runs[kernel] = run
    return runs


def _backward_run(kernel: Kernel, problem: Problem, grad_out: Tensor) -> Run | None:
    q, k, u, v, r, k_bias, u_bias, _ = (
        None if x is None else torch.empty_like(x) for x in problem[:8]
    )
    if kernel == "query":
        if run_hopper(kernel, problem, grad_out, q, r):
            return None
        return _filling([q, r], lambda tile: run_query(problem, grad_out, q, r, tile))
    if kernel == "down":
        assert v is not None
        if run_hopper(kernel, problem, grad_out, v):
            return None
        return _filling([v], lambda tile: run_down(problem, grad_out, v, tile))
    if run_hopper(kernel, problem, grad_out, k, u):
        return None
    up = (k, u, k_bias, u_bias)
    return _filling(up, lambda tile: run_up(problem, grad_out, *up, tile))


def _filling(outputs: Sequence[Tensor | None], launch: Callable[[Tile], None]) -> Run:
    """A run after which what was not written is not a number."""
    present = [x for x in outputs if x is not None]

    def run(tile: Tile) -> Sequence[Tensor]:
        for x in present:
            x.fill_(float("nan"))
        launch(tile)
        return present

    return run
