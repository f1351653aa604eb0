"""Processes of one program, forked from one that has imported PyTorch to save its time."""

from __future__ import annotations

import multiprocessing
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

_IMPORTED = (
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "mhf_compiler.compilation",
    "mhf_compiler.lowering.ops",
    "mhf_compiler.patterns",
)

# Source, since the processes cannot import this module before their path has been set: what lies
# next to the program, as for any script, and this package.
_START = """
import gc, runpy, sys, traceback
gc.freeze()
gc.set_threshold(100_000, 20, 20)
sys.argv = {argv!r}
sys.path += {path!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except BaseException:
    with open({error!r}, "w") as file:
        traceback.print_exc(file=file)
    raise
"""


def run_ranks(program: Path, world: int, folder: Path) -> None:
    """Run ``program RANK WORLD FOLDER`` once for each of ``world`` ranks, at the same time.

    Raises:
        AssertionError: one has failed, with what it raised; or is not done after five minutes.
    """
    processes = []
    for rank in range(world):
        argv = [str(argument) for argument in (program, rank, world, folder)]
        path = [str(program.parent), str(Path(__file__).parents[1])]
        error = str(folder / f"error_{rank}.txt")
        source = _START.format(argv=argv, path=path, error=error)
        processes.append(_server().Process(target=exec, args=(source, {}), daemon=True))
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()
    errors = [file.read_text() for file in sorted(folder.glob("error_*.txt"))]
    assert [process.exitcode for process in processes] == [0] * world, "\n".join(errors)


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    return context
