"""PyTorch's caches of compiled graphs from process to process: what is found again, what is not.

A copy of the package is compiled with, so that its sources can be changed between processes. Each
process costs a second or more, so there are few, and each is asked several things; what belongs to
the key is tested by itself in passes/test_cache_key.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.forks import run_script

import mhf_compiler

ROOT = Path(__file__).parents[2]

#: what each process runs, with steps after it
BEGIN = """
import contextlib, json, pathlib, torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch._dynamo.utils import counters
from mhf_compiler.passes import cache_key

cache_key._COARSE = 0  # seconds: the copy may have been made right before this process
torch.manual_seed(0)
ARTIFACTS = pathlib.Path("artifacts")
found = {}

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *s) / 4) for s in ((8, 5), (5, 8)))

    def forward(self, x):
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return ((q @ self.up).relu() @ self.down).transpose(1, 2).flatten(2)

class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Heads()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)

def first_step(name, model, training=True, modes=contextlib.nullcontext, dynamic=None, **options):
    "Compile as a new process would, and write down where the result came from."
    torch.compiler.reset()
    counters.clear()
    # Without C++, whose compiler takes most of the time; as it is cached, too.
    options = {"rewrite": "always", "fallback_by_default": True} | options
    compiled = torch.compile(model, backend="flashmhf", options=options, dynamic=dynamic)
    x = torch.randn(2, 6, 32)
    gradients = []
    with torch.set_grad_enabled(training), modes():
        for one in (model, compiled):
            result = one(x)
            if training:
                gradients.append(torch.autograd.grad(result.float().sum(), [*model.parameters()]))
    assert counters["flashmhf"]["sites_rewritten"] == 1
    aot = {name.rpartition("_")[2]: n for name, n in counters["aot_autograd"].items()}
    graphs = {name.rpartition("_")[2]: n for name, n in counters["inductor"].items()}
    found[name] = {
        "aot": [name for name in ("hit", "miss", "bypass") if aot.get(name)],
        "inductor": [name for name in ("hit", "miss", "bypass") if graphs.get(name)],
        "ratio": [float((b / a).nanmedian()) for a, b in zip(*gradients)] if training else None,
    }

MODELS = {
    "training": (Heads(), {}),
    "inference": (Heads(), {"training": False}),
    "autocast": (Heads(), {"modes": lambda: torch.autocast("cpu", torch.bfloat16)}),
    "a checkpoint": (Checkpointed(), {}),
    "any number of tokens": (Heads(), {"dynamic": True}),
}

def first_steps(*names):
    for name in names:
        model, how = MODELS[name]
        first_step(name, model, **how)
"""
END = """
print(json.dumps(found))
"""


class Machine:
    """Processes that share a folder of caches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = Path(mhf_compiler.__file__).parent
        parts = [source, *(ROOT / part for part in ("patterns", "lowering"))]
        for part in parts if source == ROOT / "mhf_compiler" else [source]:
            inside = Path("package", "mhf_compiler", "" if part == source else part.name)
            shutil.copytree(part, folder / inside, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, steps: str, package: str = "package", caches: str = "caches") -> dict[str, Any]:
        """What a new process writes down."""
        script = self.folder / package / "script.py"  # which finds the package next to it
        script.write_text(BEGIN + steps + END)
        done = run_script(
            script,
            environment={"TORCHINDUCTOR_CACHE_DIR": str(self.folder / caches)},
            # To build what runs on a CPU would take most of the time.
            settings={"torch._inductor.config.cpp.cxx": ["none"]},
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(found, dict)
        return found

    def changed(self, file: str, old: str, new: str) -> str:
        """The name of another package, which differs from the first in one place."""
        name = "changed " + file.replace("/", " ")
        shutil.copytree(self.folder / "package", self.folder / name)
        path = self.folder / name / "mhf_compiler" / file
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        return name


ALL = ("training", "inference", "autocast", "a checkpoint", "any number of tokens")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One on which a process has compiled everything."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    found = machine.run(
        f"first_steps(*{ALL})\n"
        "artifacts, known = torch.compiler.save_cache_artifacts()\n"
        "ARTIFACTS.write_bytes(artifacts)\n"
        "found['saved'] = sorted(known.artifacts)\n"
    )
    assert {"aot_autograd", "inductor"} <= set(found.pop("saved"))
    assert set(found) == set(ALL)
    assert all(came_from(one) == ("miss", "miss") for one in found.values())
    return machine


def came_from(found: dict[str, Any]) -> tuple[str, str]:
    (aot,), (inductor,) = found["aot"], found["inductor"]
    return aot, inductor


LATER = f"""
first_steps(*{ALL})
heads = MODELS["training"][0]
first_step("an option of the back end's", heads, strict=True)
first_step("an option of Inductor's", heads, epilogue_fusion=False)
first_step("another fallback", heads, fallback="aot_eager")
first_step("a pass of the user's", heads, post_grad_custom_post_pass=lambda graph: None)
first_step("float16", heads, modes=lambda: torch.autocast("cpu", torch.float16))
cards = cache_key.cards
cache_key.cards = lambda: (('another card', 9, 0, 132),)
cache_key.interpreted = lambda: False
first_step("another card", heads)
cache_key.cards = cards
first_step("nothing", heads)
pathlib.Path(cache_key.__file__).touch()
first_step("a source after its import", heads)
"""


def test_a_later_process(machine: Machine):
    found = machine.run(LATER)
    for name in (*ALL, "nothing"):
        assert came_from(found[name]) == ("hit", "hit"), name
    for name in ("an option of the back end's", "an option of Inductor's", "float16"):
        assert came_from(found[name]) == ("miss", "miss"), name
    assert came_from(found["another card"]) == ("miss", "miss")
    for name in ("a pass of the user's", "a source after its import"):
        assert came_from(found[name]) == ("bypass", "bypass"), name
    assert found["another fallback"]["aot"] == found["another fallback"]["inductor"] == []


def test_artifacts_carry_both_caches(machine: Machine):
    """To a machine whose caches are empty."""
    load = "torch.compiler.load_cache_artifacts(ARTIFACTS.read_bytes())\n"
    found = machine.run(f"{load}first_steps('training', 'inference')", caches="others")
    assert [*map(came_from, found.values())] == [("hit", "hit")] * 2


SAVED = "grad_out, *ctx.saved_tensors,"
CHANGES = {
    "the version": ("__init__.py", f'"{mhf_compiler.__version__}"', '"9.9.9"'),
    "a source": ("lowering/ops/network.py", SAVED, f"2 * {SAVED}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_package_does_not_find_what_this_one_has_compiled(machine: Machine, change: str):
    """The source that is changed is what the backward graph is traced from."""
    package = machine.changed(*CHANGES[change])
    found = machine.run("first_steps('training')", package)["training"]
    assert came_from(found) == ("miss", "miss")
    assert found["ratio"] == pytest.approx([2, 2] if change == "a source" else [1, 1], rel=1e-3)
