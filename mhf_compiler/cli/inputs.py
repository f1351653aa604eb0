"""From the words of a command line to objects: models by factory, tensors by dtype and shape."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TENSOR = re.compile(r"(?:(?P<name>\w+)=)?(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\]")
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


class GivenError(ValueError):
    """An object that was named cannot be made; the message is one line for the user."""


@dataclass(frozen=True)
class TensorSpec:
    """Specification of a tensor, such as ``float32[2,16,768]`` or ``mask=bool[2,16]``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str | None = None  # of the argument that it is passed as

    def make(self, device: torch.device) -> Tensor:
        """Random numbers; zeros for integers, which are valid as any index."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, device=device).to(self.dtype)
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def parse_tensor(text: str) -> TensorSpec:
    """Read ``dtype[sizes]`` or ``name=dtype[sizes]``."""
    found = _TENSOR.fullmatch(text.strip())
    if found is None:
        raise GivenError(f"input {text!r} must be dtype[sizes], such as float32[2,16,768]")
    if found["dtype"] not in _DTYPES:
        near = difflib.get_close_matches(found["dtype"], _DTYPES, n=1, cutoff=0.0)[0]
        raise GivenError(f"input {text!r} has no dtype of torch; the nearest is {near}")
    sizes = [size.strip() for size in found["sizes"].split(",") if found["sizes"].strip()]
    if not all(sizes):
        raise GivenError(f"input {text!r} has an empty size")
    return TensorSpec(_DTYPES[found["dtype"]], tuple(map(int, sizes)), found["name"])


def make_inputs(
    specs: Iterable[str], device: torch.device
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The model's arguments, and its named arguments."""
    parsed = [parse_tensor(text) for text in specs]
    positional = tuple(spec.make(device) for spec in parsed if spec.name is None)
    return positional, {spec.name: spec.make(device) for spec in parsed if spec.name is not None}


def find_device(name: str) -> torch.device:
    """The device of a name, if it exists."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise GivenError(f"device {name!r} must be cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise GivenError(f"device {name!r} must be cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GivenError(f"device {name!r}: torch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GivenError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def make_model(name: str, device: torch.device) -> Callable[..., Any]:
    """The model that ``package.module:factory`` returns, or is itself."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise GivenError(f"model {name!r} must be package.module:factory")
    found = _imported(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise GivenError(f"model {name!r}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise GivenError(
            f"model {name!r} is of type {type(found).__name__}, must be a factory or a module"
        )
    if not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:
            raise GivenError(f"model {name!r}: the factory raised {one_line(error)}") from error
    if not callable(found):
        made = type(found).__name__
        raise GivenError(f"model {name!r}: the factory returned a {made}, not a module")
    return found.to(device) if isinstance(found, nn.Module) else found


def one_line(error: BaseException) -> str:
    """An error as its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _imported(name: str) -> Any:
    if "" not in sys.path:  # a console script does not search the current folder
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise GivenError(f"cannot import {name!r}: {one_line(error)}") from error
