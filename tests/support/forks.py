"""Programs in processes of their own, forked from one that has imported PyTorch to save its time.

To import PyTorch and its compiler takes a fresh interpreter five seconds. What PyTorch reads from
the environment when it is imported has to be a setting of its modules ``config`` instead; this
package, of which the first process knows nothing, is imported by each program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

_SERVER = Path(__file__).parent / "fork_server.py"


@dataclass
class Program:
    """A script with its arguments.

    Args:
        path: of the script.
        arguments: those it is called with.
        environment: variables to set.
        settings: of PyTorch, by name: ``torch._dynamo.config.repro_after``.
        modules: those that have been imported when it begins.
        path_last: folders to import from at last; that of the script comes first.
        cwd: the folder to run in; None: that of the script.
    """

    path: Path
    arguments: Sequence[Any] = ()
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    modules: Sequence[str] = ()
    path_last: Sequence[Path] = ()
    cwd: Path | None = None

    def request(self, stdout: str, stderr: str) -> dict[str, Any]:
        return {
            "argv": [str(self.path), *map(str, self.arguments)],
            "environment": self.environment,
            "settings": self.settings,
            "modules": self.modules,
            "path_last": [*map(str, self.path_last)],
            "cwd": str(self.cwd or self.path.parent),
            "stdout": stdout,
            "stderr": stderr,
        }


def run_together(programs: Sequence[Program]) -> list[CompletedProcess[str]]:
    """Run programs at the same time, and wait for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/out_{at}", f"{folder}/error_{at}") for at in range(len(programs))]
        requests = [each.request(*two) for each, two in zip(programs, files, strict=True)]
        server = _server(os.getpid())
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(requests) + "\n")
        server.stdin.flush()
        ended = json.loads(server.stdout.readline())
        return [
            CompletedProcess(request["argv"], code, *(Path(name).read_text() for name in names))
            for request, code, names in zip(requests, ended, files, strict=True)
        ]


def run_script(path: Path, *arguments: Any, **how: Any) -> CompletedProcess[str]:
    """Run one program; what can be said further is that of ``Program``."""
    (done,) = run_together([Program(path, arguments, **how)])
    return done


def run_code(code: str, *arguments: Any, **how: Any) -> CompletedProcess[str]:
    """Run a program by its text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(code)
        return run_script(path, *arguments, **how)


@cache
def _server(process: int) -> subprocess.Popen[str]:
    """That of a process: one that has been forked does not share its parent's."""
    # A fork has none of its parent's threads, and would wait for Inductor's for ever.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # -P: the modules of this folder are not to be imported by their bare names.
    return subprocess.Popen(
        [sys.executable, "-P", str(_SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
