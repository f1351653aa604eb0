"""From the words of a command line to objects: models by factory, tensors by dtype and shape."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lowering.device import find_card

_TENSOR = re.compile(r"(?:(?P<name>\w+)=)?(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\]")
#: torch's names, aliases such as ``long`` among them, and what others say
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)} | {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "i32": torch.int32,
    "i64": torch.int64,
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
    dtype = find_dtype(found["dtype"], f"input {text!r}")
    sizes = [size.strip() for size in found["sizes"].split(",") if found["sizes"].strip()]
    if not all(sizes):
        raise GivenError(f"input {text!r} has an empty size")
    return TensorSpec(dtype, tuple(map(int, sizes)), found["name"])


def find_dtype(name: str, where: str) -> torch.dtype:
    """The dtype of a name, which is that of torch's or an alias."""
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        near = difflib.get_close_matches(name, _DTYPES, n=1, cutoff=0.0)[0]
        raise GivenError(f"{where} has no dtype of torch; the nearest is {near}")
    return _DTYPES[name]


def parse_assignments(texts: Iterable[str], option: str) -> dict[str, Any]:
    """Read ``name=value``; a value that is no literal of Python's is text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise GivenError(f"{option} {text!r} must be name=value, such as layers=12")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


def make_inputs(
    specs: Iterable[str], device: torch.device
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The model's arguments, and its named arguments."""
    parsed = [parse_tensor(text) for text in specs]
    positional = tuple(spec.make(device) for spec in parsed if spec.name is None)
    return positional, {spec.name: spec.make(device) for spec in parsed if spec.name is not None}


def find_device(name: str) -> torch.device:
    """The device of a name, if it exists; of a card that is only assumed, the meta device."""
    if _names_card(name):
        try:
            find_card(name)
        except ValueError as error:
            raise GivenError(str(error)) from None
        return torch.device("meta")
    allowed = "cpu, cuda or cuda:N; for explain also meta or a card such as cuda:h100"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise GivenError(f"device {name!r} must be {allowed}") from None
    if device.type not in ("cpu", "cuda", "meta"):
        raise GivenError(f"device {name!r} must be {allowed}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GivenError(f"device {name!r}: torch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GivenError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def assumed_card(name: str) -> str | None:
    """The name of a device, if it is that of a card that need not be there."""
    return name if _names_card(name) else None


def _names_card(name: str) -> bool:
    kind, colon, card = name.partition(":")
    return kind == "cuda" and bool(colon) and not card.isdecimal()


def make_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The model that ``package.module:factory`` or ``file.py:factory`` returns, or is itself."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise GivenError(
            f"model {name!r} must be package.module:factory or file.py:factory{_corrected(name)}"
        )
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
            with device if device.type == "meta" else nullcontext():
                found = found(**(arguments or {}))
        except Exception as error:
            missing = isinstance(error, TypeError) and "missing" in str(error)
            hint = "; --factory-arg name=value passes an argument" if missing else ""
            raise GivenError(
                f"model {name!r}: the factory raised {with_line(error)}{hint}"
            ) from error
    elif arguments:
        raise GivenError(f"model {name!r} is a module, which takes no --factory-arg")
    if not callable(found):
        made = type(found).__name__
        raise GivenError(f"model {name!r}: the factory returned a {made}, not a module")
    return found.to(device, dtype) if isinstance(found, nn.Module) else found


def _corrected(name: str) -> str:
    """What was meant by a name without a colon, if the last dot stands for it."""
    module_name, dot, factory = name.rpartition(".")
    if not dot or factory == "py":
        return ""
    try:
        known = hasattr(_imported(module_name), factory)
    except GivenError:
        return ""
    return f"; is it {module_name}:{factory}?" if known else ""


def run_model(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run a model, which knows best what is wrong with its arguments."""
    try:
        model(*args, **kwargs)
    except Exception as error:
        raise GivenError(f"the model raised {with_line(error)}") from error


def with_line(error: BaseException) -> str:
    """An error in one line, with the last line of it that is not in a package's code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_installed(frame.filename)]
    if not own:
        return one_line(error)
    return f"{one_line(error)}, at {own[-1].filename}:{own[-1].lineno}"


def _is_installed(file: str) -> bool:
    """Whether a file is of Python, of this package, or of one that is installed."""
    folders = {"site-packages", "dist-packages"}
    known = (Path(__file__).parents[1], Path(sysconfig.get_paths()["stdlib"]))
    path = Path(file)
    return (
        file.startswith("<")
        or not folders.isdisjoint(path.parts)
        or any(path.is_relative_to(folder) for folder in known)
    )


def one_line(error: BaseException) -> str:
    """An error as its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _imported(name: str) -> Any:
    """A module by its name, or by its file."""
    file = Path(name if name.endswith(".py") else f"{name}.py")
    try:
        if name.endswith(".py") or ("/" in name and file.is_file()):
            return _imported_file(file)
        if "" not in sys.path:  # a console script does not search the current folder
            sys.path.insert(0, "")
        return importlib.import_module(name)
    except GivenError:
        raise
    except Exception as error:
        known = [path.stem for path in Path().glob("*.py")]
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        near = difflib.get_close_matches(name, known, n=1) if missing else []
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise GivenError(f"cannot import {name!r}: {with_line(error)}{hint}") from error


def _imported_file(file: Path) -> Any:
    """The module in a file, which can import its neighbours."""
    if not file.is_file():
        raise GivenError(f"cannot import {str(file)!r}: there is no such file")
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if file.stem in sys.modules:  # an installed package may have that name
        loaded = getattr(sys.modules[file.stem], "__file__", None)
        if loaded is not None and Path(loaded) == file.resolve():
            return sys.modules[file.stem]
    spec = importlib.util.spec_from_file_location(file.stem, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
