"""Repeated calls: their launches are recorded once, and then only get new addresses.

Describing the tensors, choosing tiles and specialising the kernels takes the host several hundred
microseconds a call, and depends on nothing but the constants and the tensors' shapes, strides,
dtypes and alignments. `repeat` runs a call the first time, while `record` writes down what it
launches, and later puts the addresses of the tensors at hand in the places of the first ones.

The contract: between `repeat` and its end, a call may launch kernels on the tensors that `repeat`
was given, and allocate workspaces, which are allocated again each time. Nothing else is repeated,
so a call that does anything else says so (`leave_unrepeated`); it may repeat its own launches.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compat import current_stream, launch_compiled
from .operands import DESCRIPTOR_ALIGNMENT


class _Address(int):
    """An address, which Triton takes for a pointer or for the tensor of a descriptor."""

    __slots__ = ()

    def data_ptr(self) -> int:
        return self


class _Slot(NamedTuple):
    """A parameter of a kernel that a tensor's address goes to, alone or in a descriptor."""

    position: int
    tensor: int  # its number: the call's tensors, and the workspaces after them
    prototype: Any  # a descriptor without its tensor; None for a pointer
    descriptors: dict[int, Any]  # by address: weights and workspaces keep theirs


class _Step(NamedTuple):
    """A launch to be repeated: a compiled kernel, and where its parameters come from."""

    compiled: Any
    programs: int
    arguments: list[Any]  # in the kernel's order, without what the slots fill
    slots: list[_Slot]


class _Steps(NamedTuple):
    launches: list[_Step]
    workspaces: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]


_MOST_REPEATS = 1024
_MOST_DESCRIPTORS = 64  # of a slot
_repeats: dict[Hashable, _Steps] = {}
# its launches: those recorded since `repeat` began; context_of: the device it last got one of
_thread = threading.local()


def record(compiled: Any, programs: int, arguments: list[Any]) -> None:
    """Record a launch, if it is part of a call that may be repeated."""
    launches = getattr(_thread, "launches", None)
    if launches is not None:
        launches.append((compiled, programs, arguments))


@contextmanager
def unrecorded() -> Iterator[None]:
    """Launches that are no part of the call that is being recorded, if one is."""
    launches = getattr(_thread, "launches", None)
    _thread.launches = None
    try:
        yield
    finally:
        _thread.launches = launches


def leave_unrepeated() -> None:
    """Run the call that is being recorded, if one is, as a whole each time."""
    _thread.launches = None


def repeat(what: Hashable, tensors: Sequence[Tensor | None], run: Callable[[], None]) -> None:
    """Call `run`, or repeat what it launched for `what` and tensors that look the same.

    The first of the tensors must be there.
    """
    first = tensors[0]
    assert first is not None
    device = first.device
    if device.type != "cuda":
        run()
        return
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    # All of the tensors that a choice of kernels may depend on.
    likeness = [
        None if x is None else (x.shape, x.stride(), x.dtype, address % DESCRIPTOR_ALIGNMENT == 0)
        for x, address in zip(tensors, addresses, strict=True)
    ]
    key = (what, device, *likeness)
    steps = _repeats.get(key)
    if steps is None:
        _run_recorded(key, tensors, run)
        return
    workspaces = [  # kept until all is launched
        torch.empty_strided(shape, strides, dtype=dtype, device=device)
        for shape, strides, dtype in steps.workspaces
    ]
    addresses += [x.data_ptr() for x in workspaces]
    with current_device(device):
        stream = current_stream(device)
        for step in steps.launches:
            launch_compiled(step.compiled, step.programs, stream, _arguments(step, addresses))


def _run_recorded(key: Hashable, tensors: Sequence[Tensor | None], run: Callable[[], None]) -> None:
    """Call `run`, and keep what it launches."""
    present = [id(x) for x in tensors if x is not None]
    if len(set(present)) < len(present):  # which place of a tensor an address goes to is not known
        run()
        return
    _thread.launches = []
    try:
        run()
        launches = _thread.launches
        steps = None if launches is None else _steps(launches, tensors)
    finally:
        _thread.launches = None
    if steps is not None:
        if len(_repeats) >= _MOST_REPEATS:
            _repeats.clear()
        _repeats[key] = steps


def _arguments(step: _Step, addresses: Sequence[int]) -> list[Any]:
    """The arguments of a launch on tensors at these addresses."""
    arguments = step.arguments.copy()
    for position, number, prototype, descriptors in step.slots:
        found: Any = (address := addresses[number])
        if prototype is not None:
            found = descriptors.get(address)
            if found is None:
                if len(descriptors) >= _MOST_DESCRIPTORS:
                    descriptors.clear()
                found = descriptors[address] = _described(prototype, _Address(address))
        arguments[position] = found
    return arguments


def recorded(run: Callable[[], object]) -> Callable[[], None]:
    """Call `run`, and return what launches the same on the same tensors, almost without the host.

    For timing alone: it keeps the tensors, and repeats nothing of `run` but the launches.
    """
    launches: list[tuple[Any, int, list[Any]]] = []
    _thread.launches = launches
    try:
        run()
    finally:
        _thread.launches = None

    def again() -> None:
        for compiled, programs, arguments in launches:
            compiled[(programs, 1, 1)](*arguments)

    return again


def forget_repeats() -> None:
    """Make the next calls choose their kernels again."""
    _repeats.clear()


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
            slots.append(_Slot(position, numbers[id(x)], prototype, {}))
        launches.append(_Step(compiled, programs, arguments, slots))
    return _Steps(launches, [(x.shape, x.stride(), x.dtype) for x in workspaces])


def _described(prototype: Any, x: _Address | None) -> Any:
    """A descriptor like `prototype` of other memory, which has been found to suit it."""
    descriptor = object.__new__(type(prototype))
    descriptor.__dict__.update(prototype.__dict__)
    descriptor.base = x
    return descriptor


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """`device` as the current one, with its context."""
    if device.type != "cuda":
        return nullcontext()
    if device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    # A thread begins without a context, autograd's too. Triton brings it with a kernel that it
    # loads or launches, but encodes tensor descriptors before that.
    if getattr(_thread, "context_of", None) != device:
        torch.cuda.set_device(device)
        _thread.context_of = device
    return nullcontext()
