"""Measurements in processes of their own, and the CPU seconds that they take."""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Seconds:
    """CPU seconds of this process, and of those that it has started and that have ended."""

    own: float
    started: float

    @classmethod
    def now(cls) -> "Seconds":
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.process_time(), started.ru_utime + started.ru_stime)

    def since(self, start: "Seconds") -> "Seconds":
        return Seconds(self.own - start.own, self.started - start.started)

    @property
    def all(self) -> float:
        return self.own + self.started


def in_process(module: str, caches: Path, *arguments: object) -> dict[str, float]:
    """What a module writes to the file that is its first argument, with caches in a folder."""
    result = caches / "result.json"
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # workers that live on are in no one's account
    }
    command = [sys.executable, "-m", module, str(result), *map(str, arguments)]
    root = Path(__file__).parents[1]
    subprocess.run(command, cwd=root, env=environment, check=True)
    return json.loads(result.read_text())
