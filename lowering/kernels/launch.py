"""From tensors to a launch: the problem, its constants, and the call that every kernel shares."""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..tiles import Tile
from .loads import DESCRIPTOR_ALIGNMENT, Operand, TokenAxes


class Problem(NamedTuple):
    """The inputs of the op, under the names of its schema."""

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (G, E, f, d)
    u: Tensor | None  # (G, E, f, d)
    v: Tensor  # (G, E, f, d)
    r: Tensor | None  # (B, L, H, E)
    k_bias: Tensor | None  # (G, E, f)
    u_bias: Tensor | None  # (G, E, f)
    v_bias: Tensor | None  # (G, E, d)
    activation: str
    k_scale: float
    u_scale: float
    out_scale: float

    def scalars(self, axes: TokenAxes, tile: Tile) -> dict[str, Any]:
        """The kernel parameters that are not operands."""
        groups, networks, hidden, width = self.k.shape
        return {
            "B": axes.batch,
            "L": axes.length,
            "E": networks,
            "F": hidden,
            "D": width,
            "HEADS_PER_GROUP": self.q.shape[2] // groups,
            "ACTIVATION": self.activation,
            "K_SCALE": self.k_scale,
            "U_SCALE": self.u_scale,
            "OUT_SCALE": self.out_scale,
            "APPROXIMATE": allows_approximation(self.q.dtype),
            # Not TF32, even where PyTorch allows it: products of tiles cut their operands where the
            # library rounds them, and err four times as much.
            "PRECISION": "ieee",
            "COMPENSATED": self.q.dtype == torch.float32,
            "BM": tile.tokens,
            "BF": tile.hidden,
            "BD": tile.padded_width(width),
        }


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that tiles are chosen for."""
    if device.type == "cuda" and torch.version.hip is not None:
        return 8, 6  # AMD counts its cards otherwise; these are the most modest choices
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return 9, 0  # Triton's interpreter, which runs any choice


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel that takes a whole multiprocessor run at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132  # an H100's


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; it decides so at its import."""
    return triton.knobs.runtime.interpret


@lru_cache
def allows_approximation(dtype: torch.dtype) -> bool:
    """Whether the kernels may use `tanh.approx`: 16-bit data, on NVIDIA hardware."""
    return dtype.itemsize == 2 and torch.version.hip is None and not interpreted()


def early_launch(device: torch.device, wanted: bool = True) -> dict[str, Any]:
    """What launches a kernel while the one before it still runs, if `wanted` and possible there.

    Such a kernel (programmatic dependent launch) calls `gdc_wait` in all of its programs before it
    touches memory: it returns when the kernel before it has ended and its results can be seen, with
    those of all that this one had waited for. With `gdc_launch_dependents` it lets the next kernel
    start before it ends itself, if that one is launched so.
    """
    early = wanted and not interpreted() and capability(device)[0] >= 9
    return {"EARLY": early} | ({"launch_pdl": True} if early else {})


def launch(
    kernel: Any,
    programs: int,
    tile: Tile,
    device: torch.device,
    operands: Mapping[str, Operand],
    scalars: Mapping[str, Any],
) -> None:
    """Run `programs` programs of `kernel` on `device`, which need not be the current one.

    An operand named X fills the parameters X, X_strides and, where its layout may vary, X_layout.
    """
    arguments = dict(scalars)
    for name, operand in operands.items():
        arguments[name] = operand.argument
        arguments[f"{name}_strides"] = operand.strides
        if operand.layout is not None:
            arguments[f"{name}_layout"] = operand.layout
    start(kernel, programs, tile, device, arguments)


def start(
    kernel: Any, programs: int, tile: Tile, device: torch.device, arguments: Mapping[str, Any]
) -> None:
    """`launch`, with every parameter of the kernel already under its name."""
    with _on(device):
        compiled = kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)
    record = getattr(_thread, "record", None)
    if record is not None:
        record.append((compiled, programs, [arguments.get(name) for name in kernel.arg_names]))


class _Step(NamedTuple):
    """A launch to be repeated: a compiled kernel, and where its parameters come from."""

    compiled: Any
    programs: int
    arguments: list[Any]  # in the kernel's order, without what the slots fill
    slots: list[tuple[int, int, Any]]  # position, number of the tensor, descriptor to copy if any


class _Steps(NamedTuple):
    launches: list[_Step]
    workspaces: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]


_MOST_REPEATS = 1024
_repeats: dict[Hashable, _Steps] = {}
_thread = threading.local()  # its record: what `start` has launched since `repeat` began


def repeat(what: Hashable, tensors: Sequence[Tensor | None], run: Callable[[], None]) -> None:
    """Call `run`, or repeat what it launched when it was last called for `what` and such tensors.

    Describing the tensors, choosing tiles and specialising the kernels takes the host several
    hundred microseconds a call, and depends on nothing but `what` and the tensors' shapes, strides,
    dtypes and alignments. So the launches are written down the first time; later calls only put
    their own addresses in. `run` may do two things with tensors: launch kernels on `tensors`, and
    allocate workspaces, which are allocated again each time.
    """
    present = [x for x in tensors if x is not None]
    device = present[0].device
    # One tensor in two places is not written down: other calls may have two there.
    if device.type != "cuda" or len({id(x) for x in present}) < len(present):
        run()
        return
    key = (what, device, *map(_likeness, tensors))
    steps = _repeats.get(key)
    if steps is None:
        _thread.record = []
        try:
            run()
            steps = _steps(_thread.record, tensors)
        finally:
            _thread.record = None
        if steps is not None:
            if len(_repeats) >= _MOST_REPEATS:
                _repeats.clear()
            _repeats[key] = steps
        return
    memory = [*tensors]
    for shape, strides, dtype in steps.workspaces:
        memory.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))
    with _on(device):
        for step in steps.launches:
            arguments = step.arguments.copy()
            for position, number, prototype in step.slots:
                x = memory[number]
                arguments[position] = x if prototype is None else _described(prototype, x)
            step.compiled[(step.programs, 1, 1)](*arguments)


def recorded(run: Callable[[], object]) -> Callable[[], None]:
    """Call `run`, and return what launches the same on the same tensors, almost without the host.

    For timing alone: it keeps the tensors, and what `run` did beside launching is not done again.
    """
    record: list[tuple[Any, int, list[Any]]] = []
    _thread.record = record
    try:
        run()
    finally:
        _thread.record = None

    def again() -> None:
        for compiled, programs, arguments in record:
            compiled[(programs, 1, 1)](*arguments)

    return again


def forget_repeats() -> None:
    """Make the next calls choose their kernels anew."""
    _repeats.clear()


def _likeness(x: Tensor | None) -> Hashable:
    """All of a tensor that a choice of kernels may depend on."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.data_ptr() % DESCRIPTOR_ALIGNMENT == 0


def _steps(
    record: list[tuple[Any, int, list[Any]]], tensors: Sequence[Tensor | None]
) -> _Steps | None:
    """What was launched, with slots for the tensors and workspaces; None where memory is shared."""
    numbers = {id(x): number for number, x in enumerate(tensors) if x is not None}
    taken = {x.untyped_storage().data_ptr() for x in tensors if x is not None}
    workspaces: list[Tensor] = []
    launches = []
    for compiled, programs, values in record:
        arguments, slots = values.copy(), []
        for position, value in enumerate(values):
            x = value if isinstance(value, Tensor) else getattr(value, "base", None)
            if x is None:
                continue
            if id(x) not in numbers:
                storage = x.untyped_storage().data_ptr()
                if storage in taken:
                    return None
                taken.add(storage)
                numbers[id(x)] = len(tensors) + len(workspaces)
                workspaces.append(x)
            prototype = None if x is value else _described(value, None)
            arguments[position] = None  # keeps no tensor alive
            slots.append((position, numbers[id(x)], prototype))
        launches.append(_Step(compiled, programs, arguments, slots))
    return _Steps(launches, [(x.shape, x.stride(), x.dtype) for x in workspaces])


def _described(prototype: Any, x: Tensor | None) -> Any:
    """A descriptor like `prototype` for another tensor, which has been found to suit it."""
    descriptor = object.__new__(type(prototype))
    descriptor.__dict__.update(prototype.__dict__)
    descriptor.base = x
    return descriptor


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """`device` as the current one, with its context."""
    if device.type != "cuda":
        return nullcontext()
    if device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    # A thread begins without a context, autograd's too. Triton brings it with a kernel that it
    # loads or launches, but encodes tensor descriptors before that.
    torch.cuda.set_device(device)
    return nullcontext()
