"""Accuracy check: the error of a rewritten program, and the largest error that counts as rounding.

Errors are measured against the same program in float64. A rewritten program rounds at other places
than the original, so the two differ by rounding. Its error may be at most twice that of plain
PyTorch in the same dtypes, plus one unit in the last place of the largest element, in the narrowest
dtype that the program computes in. If there is no such reference, because random numbers are drawn
or the program does not run in float64, the two are compared with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import TorchDispatchMode, arguments_by_name

_Results = tuple[list[Tensor | None], list[Tensor | None]]  # outputs, gradients of the inputs

_ONE = 1e-30  # instead of a largest element of zero
_CANCELLED = 1e-6  # of the largest gradient: allowed remainder of one that cancels to zero


@dataclass(frozen=True)
class Difference:
    """One output, or one gradient, of two programs.

    Attributes:
        name: such as ``"output 0"`` or ``"gradient of ffn.gate"``.
        error: the largest error of the rewritten program, relative to the largest exact element.
        plain: that of plain PyTorch; None if it was the reference.
        allowed: the largest error that counts as rounding.
    """

    name: str
    error: float
    plain: float | None
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the error counts as rounding."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        plain = "" if self.plain is None else f", of plain PyTorch {self.plain:.2e}"
        text = f"{self.name}: error {self.error:.2e}{plain}, allowed {self.allowed:.2e}"
        return text if self.agrees else f"{text}: MISMATCH"


def compare(
    plain: Callable[..., Any],
    rewritten: Callable[..., Any],
    inputs: Sequence[Any],
    names: Sequence[str] = (),
    *,
    overflows: bool = True,
) -> list[Difference]:
    """Run both on equal inputs; return an entry for each floating output and each gradient.

    Gradients are those of the inputs that require them, for gradients of the outputs that are one
    or minus one. Needs the memory of the plain program in float64.

    Args:
        plain: the reference, run by PyTorch as it is.
        rewritten: the program that should compute the same.
        inputs: the arguments of both, which are not modified.
        names: names of the inputs; their numbers by default.
        overflows: whether what is infinite or NaN by the reference has to be so in the rewritten
            program. An activation that is spelled in parts may overflow where its gradient has
            a limit.
    """
    names = names or [str(number) for number in range(len(inputs))]
    with _Watching() as watched:
        usual = _run(plain, inputs)
    found = _run(rewritten, inputs)
    given = [x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    wide = {watched.narrowest, *given} == {torch.float64}
    # What computes in float64 alone is its own reference.
    exact = None if watched.random else usual if wide else _exact(plain, inputs)
    digits = torch.finfo(watched.narrowest).eps
    outputs = [f"output {number}" for number in range(len(usual[0]))]
    gradients = [f"gradient of {name}" for name in names]
    differences = []
    for which, titles in enumerate((outputs, gradients)):
        rows = zip(titles, (exact or usual)[which], usual[which], found[which], strict=True)
        present = [(title, x, y, z) for title, x, y, z in rows if x is not None and y is not None]
        cancelled = _CANCELLED * max((_largest(x) for _, x, _, _ in present), default=0.0)
        for title, x, y, z in present:
            scale = max(_largest(x), _ONE)
            error = _error(z, x, overflows) / scale
            usual_error = None if exact is None else _error(y, x) / scale
            rounding = math.sqrt(digits) if usual_error is None else 2 * usual_error + digits
            allowed = rounding + cancelled / scale
            differences.append(Difference(title, error, usual_error, allowed))
    return differences


def print_differences(differences: Sequence[Difference]) -> int:
    """Print them and a summary; return the exit code of a program that does nothing else."""
    for difference in differences:
        print(difference)
    wrong = sum(not difference.agrees for difference in differences)
    print(f"{wrong} of {len(differences)} differ by more than rounding" if wrong else "no mismatch")
    return int(wrong > 0)


def seed_generators(number: int) -> None:
    """Seed the generators of the CPU and, where CUDA is in use, of its devices.

    ``torch.manual_seed`` notes its call stack for each device that is not in use, every time.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def _exact(plain: Callable[..., Any], inputs: Sequence[Any]) -> _Results | None:
    """The results in float64; None if the program does not run so, also for lack of memory."""
    try:
        with _InFloat64():
            return _run(plain, [_doubled(x) for x in inputs])
    except RuntimeError:
        return None


def _error(found: Tensor | None, exact: Tensor, overflows: bool = True) -> float:
    """The largest difference; infinite if the shapes differ, or only one is not finite.

    Without ``overflows`` the exact one may be infinite by itself.
    """
    if found is None or found.shape != exact.shape:
        return math.inf
    found, finite = found.double(), exact.isfinite()
    same = torch.equal(finite, found.isfinite())
    if not (same if overflows else bool(found.isfinite()[finite].all())):
        return math.inf
    return float(torch.where(finite, found - exact, 0.0).abs().max()) if found.numel() else 0.0


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _run(function: Callable[..., Any], inputs: Sequence[Any]) -> _Results:
    """The outputs and the gradients; None for integers, and for what has no gradient."""
    given = [_copied(x) for x in inputs]
    seed_generators(0)
    outputs = list(tensors_of(function(*(_passed(x) for x in given))))
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    gradients: dict[int, Tensor | None] = {}
    trained = [x for x in outputs if x.requires_grad]
    if leaves and trained:
        weights = [_weights(x, number) for number, x in enumerate(trained)]
        found = torch.autograd.grad(trained, leaves, weights, allow_unused=True)
        gradients = {id(x): g for x, g in zip(leaves, found, strict=True)}
    wanted = [_gradient(x, gradients) if trained else None for x in given]
    return [x.detach() if x.is_floating_point() else None for x in outputs], wanted


def _gradient(x: Any, gradients: dict[int, Tensor | None]) -> Tensor | None:
    """None for what needs no gradient; zeros for what the outputs do not depend on."""
    if id(x) not in gradients:
        return None
    found = gradients[id(x)]
    return torch.zeros_like(x) if found is None else found


def _weights(output: Tensor, salt: int) -> Tensor:
    """Odd eighths from -7/8 to 7/8, which every dtype holds exactly.

    A hash of the position, since drawing them would make the program count as random. All its bits
    have to depend on all of the position's: weights that alternate cancel the gradient of a router.
    """
    mixed = torch.arange(salt, salt + output.numel(), device=output.device)
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 16)) % 8
    return mixed.view(output.shape).to(output.dtype) * 0.25 - 0.875


def _copied(x: Any) -> Any:
    """A leaf with a storage of its own and the strides of ``x``."""
    if not isinstance(x, Tensor):
        return x
    if 0 in x.stride():  # expanded: it cannot be written to
        return x.detach().requires_grad_(x.requires_grad)
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.copy_(x.detach()).requires_grad_(x.requires_grad)


def _passed(x: Any) -> Any:
    """What the program is given: not the leaf itself, which must not be written to."""
    if isinstance(x, Tensor) and x.requires_grad:
        made = x.clone()
        return made if made.stride() == x.stride() else x
    return x


def _doubled(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors_of(tree.values())
    elif isinstance(tree, Iterable) and not isinstance(tree, str):
        for part in tree:
            yield from tensors_of(part)


class _Watching(TorchDispatchMode):
    """Sees the narrowest dtype that a program computes in, and whether it draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.random = False
        self.narrowest = torch.float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.random |= _draws(func, args, kwargs or {})
        results = func(*args, **(kwargs or {}))
        for x in tensors_of(results):
            if x.is_floating_point():
                self.narrowest = max(self.narrowest, x.dtype, key=lambda t: torch.finfo(t).eps)
        return results


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers; a dropout of nothing, or outside training, does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = arguments_by_name(func, args, kwargs)
    return given.get("train") is not False and 0.0 not in (given.get("p"), given.get("dropout_p"))


class _InFloat64(TorchDispatchMode):
    """Runs every operation of a program in float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return _widened(func(*_widened(args), **kwargs))


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor):
        narrow = value.is_floating_point() and value.dtype is not torch.float64
        return value.double() if narrow else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_widened, value))
    return value
