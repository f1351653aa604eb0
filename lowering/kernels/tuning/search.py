"""Tiles timed on the card, under max-autotune: rows near the shipped one, and other cards'.

A row is taken when it is faster than the shipped one by more than noise, twice, and when its
results are the shipped one's but for the order of addition. One that does not compile, does not fit
or fails otherwise is left out. Where Hopper's own kernel takes a problem there is nothing to tune.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from ...problem import Gradients, Problem
from ...tiles import Kernel, Row, Tile, portable, shipped_rows
from ..dispatch import specialised_backward, specialised_forward
from ..operands import token_axes, tokens_innermost
from ..plain.backward import run_dk_du, run_dq, run_dv
from ..plain.forward import run_forward
from ..replay import recorded
from ..verdicts import FILLS
from . import store
from .store import TuningKey

Say = Callable[[str], None]
Run = Callable[[Tile], Sequence[Tensor]]  # runs a kernel, and returns what it filled

_BACKWARD: dict[Kernel, tuple[Callable[..., None], tuple[str, ...]]] = {  # and what each fills
    "dq": (run_dq, ("q", "r")),
    "dv": (run_dv, ("v",)),
    "dk_du": (run_dk_du, ("k", "u", "k_bias", "u_bias")),
}
_GAIN = 0.97  # of the shipped row's time; what takes longer may be noise
_DIFFERENCE = 0.01  # of results that are equal but for the order of addition, at most
_WARM_UP, _TIME = 5, 50  # milliseconds for one tile

log = logging.getLogger(__name__)


def on_card(run: Callable[[], None]) -> float:
    """The median time of a run, with a cold cache, as weights are found by the layer before."""
    return triton.testing.do_bench(run, warmup=_WARM_UP, rep=_TIME, return_mode="median")


def tune(
    keys: Sequence[TuningKey],
    trial: Callable[[], Mapping[Kernel, Run]],
    folder: Path | None,
    say: Say,
    clock: Callable[[Callable[[], None]], float] = on_card,
) -> None:
    """Find the fastest row of each key, unless that was done before; it raises nothing.

    Args:
        keys: one for each kernel that will be used.
        trial: makes tensors for these keys, and returns the kernels that plain Triton has to run
            on them. Called when there is something to time.
        folder: where results are kept, if anywhere.
        say: receives a line about what is being timed.
        clock: times a run.
    """
    left = [key for key in keys if not store.recall(key, folder)]
    if not left:
        return
    try:
        runs = trial()
        for key in left:
            run = runs.get(key.kernel)
            row = None if run is None else _fastest_row(key, run, say, clock)
            store.keep(key, row, folder)
    except Exception as error:
        log.warning("tuning failed, the shipped tiles are used: %s", error)
        for key in left:  # once is enough: not for each layer of a model
            if not store.recall(key, None):
                store.keep(key, None, None)


def candidates(key: TuningKey) -> dict[Tile, Row]:
    """Tiles to time, each with the row that it comes from; the shipped one first."""
    shipped, *others = shipped_rows(key.kernel, key.sizes)
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
        if not store.is_sensible(row):
            continue
        tiles.setdefault(portable(key.kernel, key.sizes, row), row)
    return tiles


def _fastest_row(
    key: TuningKey, run: Run, say: Say, clock: Callable[[Callable[[], None]], float]
) -> Row | None:
    """The row to use in place of the shipped one, if there is one."""
    tiles = candidates(key)
    shipped, *others = tiles
    expected = [x.clone() for x in run(shipped)]

    def time(tile: Tile) -> float:
        results: list[Tensor] = []
        again = recorded(lambda: results.extend(run(tile)))
        if not all(map(_agree, results, expected)):
            raise ArithmeticError("its results are not those of the shipped tile")
        return clock(again)

    what = f"tuning {key.kernel} for {key.sizes.heads} heads x {key.sizes.head_dim}"
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
    runs: dict[Kernel, Run] = {}
    if "forward" in kernels and not specialised_forward(problem, out):
        runs["forward"] = _filling([out], partial(run_forward, problem, out))
    if problem.r is not None:  # as `backward` has it
        merged = token_axes(problem.q, grad_out).merged
        problem = problem._replace(r=tokens_innermost(problem.r, merged))
    if {"dv", "dk_du"} <= set(kernels):  # the card's family may have one kernel in their place
        gradients = problem.new_gradients([name in FILLS["dk_dv"] for name in Gradients._fields])
        if specialised_backward("dk_dv", problem, grad_out, gradients):
            kernels = [kernel for kernel in kernels if kernel not in ("dv", "dk_du")]
    for kernel in kernels:
        if kernel in _BACKWARD:
            launch, names = _BACKWARD[kernel]
            gradients = problem.new_gradients([name in names for name in Gradients._fields])
            if not specialised_backward(kernel, problem, grad_out, gradients):
                filled = partial(launch, problem, grad_out, gradients)
                runs[kernel] = _filling(gradients.wanted, filled)
    return runs


def _filling(outputs: Sequence[Tensor], launch: Callable[[Tile], None]) -> Run:
    """A run after which what was not written is not a number."""

    def run(tile: Tile) -> Sequence[Tensor]:
        for x in outputs:
            x.fill_(float("nan"))
        launch(tile)
        return outputs

    return run
