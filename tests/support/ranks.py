"""The processes of one program that has several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .forks import Program, run_together
from .inductor import NO_CPP_AT_ALL

_TESTS = Path(__file__).parents[1]


def run_ranks(program: Path, world: int, folder: Path) -> None:
    """Run ``program RANK WORLD FOLDER`` once for each of ``world`` ranks, at the same time.

    Raises:
        AssertionError: one has failed, with what it raised; or is not done after five minutes.
    """
    how: dict[str, Any] = {
        # It finds this package, too, next to which lies a folder that has the name of the product.
        "modules": ["mhf_compiler"],
        "path_last": [_TESTS],
        "settings": NO_CPP_AT_ALL,  # every rank would compile the same
    }
    _run([Program(program, (rank, world, folder), **how) for rank in range(world)])


def run_as_torchrun_does(script: Path, world: int, *arguments: str) -> str:
    """Run a script once for each of ``world`` ranks, and return what they print.

    As for ``torchrun``, the ranks meet in a store of the process that starts them.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world),
    }
    return _run(
        [
            Program(
                script,
                arguments,
                environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                NO_CPP_AT_ALL,
            )
            for rank in range(world)
        ]
    )


def _run(programs: Sequence[Program]) -> str:
    done = run_together(programs)
    ended, errors = [each.returncode for each in done], [each.stderr for each in done]
    assert ended == [0] * len(programs), "\n".join(errors)
    return "".join(each.stdout for each in done)
