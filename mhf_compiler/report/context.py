"""What a report is of: the model, its inputs, the machine and the versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_MOST_INPUTS = 8


@dataclass(frozen=True)
class Context:
    """What was explained or compiled, when, and with what.

    Attributes:
        model: class of the model, name of a function; None where that is not known.
        inputs: what it was called with: ``"tokens: int64[2, 256]"``.
        training: whether the module is in training mode; None for what is no module.
        gradients: whether gradients were recorded; None where the call is not known.
        options: those that are not the defaults, in words.
        device: the name of the card, or the processor; None if there is no tensor.
        versions: of Python, PyTorch, Triton where it is installed, and this package.
        date: when, in the local time zone.
    """

    model: str | None = None
    inputs: tuple[str, ...] = ()
    training: bool | None = None
    gradients: bool | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""


def context_of(
    model: Any = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Context:
    """What is known of a call of a model.

    Args:
        model: a module or function; None if it is not known.
        args: its arguments.
        kwargs: its named arguments.
        options: those that differ from the defaults.
        device: another one than that of its tensors, for which it is explained.
    """
    named = dict(kwargs or {})
    inputs = [_described(value) for value in args]
    inputs += [f"{name}: {_described(value)}" for name, value in named.items()]
    more = len(inputs) - _MOST_INPUTS
    inputs = [*inputs[:_MOST_INPUTS], f"and {more} more"] if more > 0 else inputs
    return Context(
        model=None if model is None else _name_of(model),
        inputs=tuple(inputs),
        training=model.training if isinstance(model, nn.Module) else None,
        gradients=None if model is None else torch.is_grad_enabled(),
        options={name: str(value) for name, value in (options or {}).items()},
        device=device or _device(chain(_tensors([*args, *named.values()]), _parameters(model))),
        versions=_versions(),
        date=datetime.now().astimezone().isoformat(" ", "minutes"),
    )


def _name_of(model: Any) -> str:
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns
    if isinstance(model, nn.Module):
        return type(model).__name__
    return str(getattr(model, "__qualname__", type(model).__name__))


def _described(value: Any) -> str:
    """A tensor by dtype and shape, numbers and words as they are, all else by its class."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= _MOST_INPUTS:
        return f"({', '.join(map(_described, value))})"
    return type(value).__name__


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


def _parameters(model: Any) -> Iterator[Tensor]:
    if isinstance(model, nn.Module):
        yield from model.parameters()


def _device(tensors: Iterable[Tensor]) -> str | None:
    device = next((tensor.device for tensor in tensors), None)
    if device is None:
        return None
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU ({platform.machine()}, {threads} thread{'' if threads == 1 else 's'})"
    return str(device)


def _versions() -> dict[str, str]:
    from .. import __version__

    found = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    with suppress(PackageNotFoundError):
        found["Triton"] = version("triton")
    return {**found, "mhf_compiler": __version__}
