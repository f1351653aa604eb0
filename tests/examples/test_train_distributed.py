"""The example trains on several devices, and goes on from what others have written."""

import re
from pathlib import Path

from support.ranks import run_as_torchrun_does

SCRIPT = Path(__file__).parents[2] / "examples" / "train_distributed.py"
TINY = (
    *("--layers", "1", "--heads", "2", "--head-dim", "16", "--sub-networks", "2"),
    *("--hidden", "16", "--batch", "4", "--length", "32", "--log-every", "1"),
)


def train(*arguments: str) -> str:
    """What two processes print."""
    return run_as_torchrun_does(SCRIPT, 2, *TINY, *arguments)


def steps(printed: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+): loss 5\.", printed, re.MULTILINE)]


def test_it_stops_and_resumes(tmp_path: Path):
    """With FSDP, and then with heads on both devices: of the moments, too."""
    folder = ("--backend", "eager", "--checkpoint", str(tmp_path))
    first = train("--parallel", "fsdp", "--steps", "2", *folder)
    assert steps(first) == [1, 2]
    assert "resumed" not in first
    then = train("--parallel", "tp", "--steps", "4", *folder)
    assert f"resumed at step 2 from {tmp_path}" in then
    assert steps(then) == [3, 4]


def test_networks_are_rewritten():
    printed = train("--parallel", "tp", "--steps", "2", "--rewrite", "always")
    assert re.findall(r"(\d+) tokens/s, (\d+) rewritten", printed)[-1][1] == "1"
