"""How launches are cut into parts and written down, without a GPU."""

import threading

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from mhf_compiler.lowering.kernels import replay
from mhf_compiler.lowering.kernels.compat import launch_compiled
from mhf_compiler.lowering.kernels.hopper.backward_weights import Parts, plan_parts
from mhf_compiler.lowering.kernels.plain.backward import parts_of_bias
from mhf_compiler.lowering.kernels.replay import _arguments, _Steps, _steps, current_device


@pytest.mark.parametrize(
    ("owners", "steps", "expected"),
    [
        (704, 512, Parts(660, 44, 3)),  # 44 tiles in thirds fill 132 multiprocessors
        (660, 512, Parts(660, 0, 1)),
        (704, 16, Parts(704, 0, 1)),  # too few tokens to share
        (44, 512, Parts(0, 44, 3)),
        (16, 128, Parts(0, 16, 8)),  # alone on the card: as many parts as fill it
        (1, 512, Parts(0, 1, 16)),
        (16, 40, Parts(0, 16, 5)),
        (16, 15, Parts(16, 0, 1)),
    ],
)
def test_plan_parts(owners: int, steps: int, expected: Parts) -> None:
    assert plan_parts(owners, steps, 132) == expected


def test_plan_parts_covers_every_tile() -> None:
    for owners in range(1, 400):
        plan = plan_parts(owners, 512, 132)
        assert plan.whole + plan.shared == owners
        assert plan.programs == plan.whole + plan.shared * plan.parts


@pytest.mark.parametrize(
    ("owners", "steps", "expected"),
    [(352, 4096, 1), (16, 64, 16), (16, 1024, 32), (100, 4096, 5), (1, 8, 2), (1, 7, 1)],
)
def test_parts_of_the_down_biass_gradient(owners: int, steps: int, expected: int) -> None:
    assert parts_of_bias(owners, steps) == expected


def recorded() -> _Steps:
    """One launch, on the second of two arguments, a descriptor of it, and a workspace."""
    x, workspace = torch.zeros(16, 16), torch.zeros(8)
    descriptor = TensorDescriptor.from_tensor(x, [8, 8])
    steps = _steps([("compiled", 3, [x, descriptor, workspace, 5, None])], [None, x])
    assert steps is not None
    return steps


def test_steps_hold_no_tensor() -> None:
    steps = recorded()
    (launch,) = steps.launches
    assert launch.arguments == [None, None, None, 5, None]
    assert [slot[:2] for slot in launch.slots] == [(0, 1), (1, 1), (2, 2)]
    assert steps.workspaces == [(torch.Size([8]), (1,), torch.float32)]


def test_a_launch_gets_the_addresses_of_its_call() -> None:
    (launch,) = recorded().launches
    pointer, described, other, *constants = _arguments(launch, [0, 4096, 512])
    assert (pointer, other, constants) == (4096, 512, [5, None])
    assert type(described) is TensorDescriptor
    assert described.base.data_ptr() == 4096
    assert described.block_shape == [8, 8]
    assert _arguments(launch, [0, 4096, 1024])[1] is described  # made once for an address
    assert _arguments(launch, [0, 8192, 512])[1].base.data_ptr() == 8192


class Compiled:
    """Stands for a kernel that Triton has compiled; notes how it is launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launched: list[object] = []

    def run(self, *arguments: object) -> None:
        self.launched.append(arguments)

    def __getitem__(self, grid: object) -> object:
        return lambda *arguments, stream: self.launched.append((grid, stream, arguments))


def test_a_launch_calls_no_hooks_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled()
    launch_compiled(compiled, 3, 77, [4096, 5])
    assert compiled.launched == [(3, 1, 1, 77, "function", "metadata", None, None, None, 4096, 5)]
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    launch_compiled(compiled, 3, 77, [4096, 5])
    assert compiled.launched[1:] == [((3, 1, 1), 77, (4096, 5))]  # Triton's own call, with hooks


def test_a_view_of_an_argument_is_no_workspace() -> None:
    x = torch.zeros(16)
    assert _steps([("compiled", 1, [x[8:]])], [x]) is None


def test_the_current_device_brings_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread that has run nothing yet, being the current device is not enough."""
    bound = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setattr(replay, "_thread", threading.local())
    for _ in range(2):  # once for a thread
        with current_device(torch.device("cuda", 0)):
            assert bound == [torch.device("cuda", 0)]
    thread = threading.Thread(target=lambda: current_device(torch.device("cuda", 0)))
    thread.start()
    thread.join()
    assert len(bound) == 2
    with current_device(torch.device("cpu")):
        assert len(bound) == 2
