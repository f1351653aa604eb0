"""Whether a kernel computes what it should on this card: it is compared with PyTorch once.

Compilers and assemblers have made wrong code of right kernels, for one card and without an error.
So before a kernel is launched for the first time it computes a small problem: the same constants,
widths, tile and way to store weights, on few tokens of one group of heads. PyTorch computes the
same in float64. A kernel that differs by more than rounding is not used: plain Triton's takes the
place of a family's, and in place of plain Triton's there is an error, which leaves a model that is
being compiled as it was.

Verdicts are kept in memory and in files, one for each claim, whose names are hashes of all that the
machine code depends on: the claim, the card, the versions of Triton and of its assembler, and the
kernels' source. Nothing is compared while a CUDA graph is captured, since that waits for the card.
"""

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..cpu import blocked
from ..device import capability, interpreted
from ..problem import Gradients, NormedRouter, Problem
from ..tiles import Kernel, Sizes, refuse, refuse_none
from .compat import assembler
from .replay import forget_repeats, unrecorded
from .tuning.store import card, kernels_hash

__all__ = [
    "FILLS",
    "SWITCH",
    "Few",
    "Results",
    "WrongKernelError",
    "forget",
    "lies",
    "random_on",
    "small_router",
    "trusts",
    "trusts_network",
]

#: an environment variable: 0 leaves out all comparisons
SWITCH = "MHF_COMPILER_CHECK_KERNELS"

#: what each kernel of the backward pass fills
FILLS: dict[Kernel, tuple[str, ...]] = {
    "backward": Gradients._fields,
    "dq": ("q", "r"),
    "dv": ("v",),
    "dk_du": ("k", "u", "k_bias", "u_bias"),
    "dk_dv": ("k", "v", "k_bias"),
}
_TOLERANCE = {2: 0.05, 4: 1e-4}  # of the largest row, by the bytes of an element
_RAGGED = 16  # tokens after the last whole tile

#: what a kernel wrote, in the dtype whose rounding is allowed, and what PyTorch did
Results = list[tuple[Tensor, Tensor]]

log = logging.getLogger(__name__)


class WrongKernelError(RuntimeError):
    """A kernel does not compute on this card what it should, and no other can take its place."""

    def __init__(self, kernel: str) -> None:
        super().__init__(
            f"the kernel {kernel!r}, as Triton {triton.__version__} compiles it, does not compute "
            "on this card what its definition says. Another version of Triton may be right; "
            "mhf_compiler.lowering.multi_head_ffn_reference computes without kernels"
        )


class Claim(NamedTuple):
    """That a kernel is right on a card, for all problems that are `about` the same."""

    family: str
    kernel: str
    about: Hashable
    card: str
    capability: tuple[int, int]


_verdicts: dict[Claim, bool] = {}


def trusts(
    family: str,
    kernel: str,
    about: Hashable,
    device: torch.device,
    compare: Callable[[], Results | None],
) -> bool:
    """Whether a kernel may be launched.

    Args:
        family: its folder.
        kernel: its name there.
        about: all else that its machine code depends on.
        device: where.
        compare: runs it on a small problem, and returns its results with PyTorch's; None if it
            does not run at all.
    """
    if not _compares(device):
        return True
    claim = Claim(family, kernel, about, card(device), capability(device))
    if claim not in _verdicts:
        _verdicts[claim] = True  # for the kernel's own launch
        _verdicts[claim] = _judge(claim, compare)
        if not _verdicts[claim]:
            _refuse(claim)
    return _verdicts[claim]


def forget() -> None:
    """Make the next calls compare again what no file has a verdict on."""
    _verdicts.clear()
    refuse_none()
    forget_repeats()


def _compares(device: torch.device) -> bool:
    if device.type != "cuda" or interpreted():
        return False
    if os.environ.get(SWITCH) == "0":
        return False
    return not torch.cuda.is_current_stream_capturing()


def _judge(claim: Claim, compare: Callable[[], Results | None]) -> bool:
    path = _path(claim)
    right = None if path is None else _read(path)
    if right is None:
        try:
            with unrecorded(), torch.no_grad():
                results = compare()
                right = None if results is None else all(_agree(*pair) for pair in results)
        except Exception as error:  # the launch itself will say what is wrong
            log.warning("%s %s could not be compared: %s", claim.family, claim.kernel, error)
        if right is None:
            return True
        if path is not None:
            _write(path, claim, right)
    return right


def _refuse(claim: Claim) -> None:
    """Warn of a wrong kernel, and forget calls that were recorded with it, as in a capture."""
    forget_repeats()
    compiled_by = f"Triton {triton.__version__}, {assembler(claim.capability)}"
    warnings.warn(
        f"the {claim.family} kernel {claim.kernel!r} does not compute what it should on "
        f"{claim.card} ({compiled_by}); it is not used",
        RuntimeWarning,
        stacklevel=2,
    )


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether no row differs by more than rounding; one with a NaN does."""
    tolerance = _TOLERANCE[found.element_size()]
    difference = torch.linalg.vector_norm(found.double() - expected.double(), dim=-1)
    size = torch.linalg.vector_norm(expected.double(), dim=-1)
    return bool(difference.max() <= tolerance * size.max())


# The network's kernels.


def trusts_network(
    family: str, kernel: Kernel, run: Callable[..., Any], tile: Any, problem: Problem, *tensors: Any
) -> bool:
    """`trusts` for a kernel that `run` launches on a problem and what else it takes, and a tile."""
    sizes = problem.sizes
    if kernel == "dq":
        sizes = sizes._replace(routed=tensors[1].r is not None)  # as it was selected
    few = Few.of(sizes, tile)
    kind = sizes._replace(tokens=few.tokens, heads=few.heads, groups=1)
    layouts = tuple(map(lies, problem.tensors))
    about = (tile, kind, layouts, problem.constants, _taken(kernel, *tensors))

    def compare() -> Results | None:
        results = _COMPARE[kernel](few, few.of_problem(problem), run, tile, *tensors)
        if family == "batched" and results is not None:
            # Products may round to TF32, as PyTorch is set; no setting is changed for a comparison.
            results = [(found.bfloat16(), expected) for found, expected in results]
        return results

    right = trusts(family, kernel, about, problem.q.device, compare)
    if not right:
        refuse(family, kernel, sizes)
    return right


def _taken(kernel: Kernel, *tensors: Any) -> Hashable:
    """What a kernel takes besides the problem, as far as its code depends on it."""
    like = lies(tensors[0])
    if kernel == "forward":
        return like
    if kernel == "normed_forward":
        norm, weight, formula = tensors[1]
        norm = None if norm is None else (norm.dtype, norm.dim())
        return like, norm, weight.dtype, formula
    return like, tuple(map(lies, tensors[1]))


def lies(x: Tensor | None) -> Hashable:
    """The dtype of a tensor, and the order in which its dimensions lie in memory."""
    return None if x is None else (x.dtype, *_order(x))


def _order(x: Tensor) -> list[int]:
    """The dimensions from outermost to innermost."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim))


class Few(NamedTuple):
    """A few tokens of the heads of one group, in memory that looks like that of all heads."""

    tokens: int
    heads: int

    @classmethod
    def of(cls, sizes: Sizes, tile: Any) -> "Few":
        tokens = min(sizes.tokens, 2 * tile.tokens + _RAGGED)
        if tokens < sizes.tokens and sizes.tokens % 16:
            tokens += 1  # Triton makes other code of multiples of 16
        return cls(tokens, sizes.heads // sizes.groups)

    def of_tokens(self, x: Tensor, random: Callable[..., Tensor]) -> Tensor:
        """Numbers in place of x (B, L, H, c)."""
        shape = (1, self.tokens, *x.shape[2:])
        return _in_order(x, shape, random)[:, :, : self.heads]

    def of_weights(self, x: Tensor, random: Callable[..., Tensor]) -> Tensor:
        """Numbers in place of x (G, ...)."""
        return _in_order(x, (1, *x.shape[1:]), random) / math.sqrt(x.shape[-1])

    def of_problem(self, problem: Problem) -> Problem:
        """Random numbers in place of all tensors."""
        random = random_on(problem.q.device)
        tensors: dict[str, Any] = {
            name: (self.of_tokens if name in ("q", "r") else self.of_weights)(x, random)
            for name, x in problem.named_tensors.items()
            if x is not None
        }
        scales = ("k_scale", "u_scale", "out_scale")
        given: dict[str, Any] = {name: getattr(problem, name) for name in scales}
        given = {name: x if 2**-6 < abs(x) < 2**6 else 0.5 for name, x in given.items()}
        return problem._replace(**tensors, **given)

    def of_gradients(self, gradients: Gradients, filled: Sequence[str]) -> Gradients:
        """What is not a number in place of those that a kernel fills."""
        return Gradients(
            **{
                name: (self.of_tokens if name in ("q", "r") else self.of_weights)(x, _nothing(x))
                for name, x in gradients._asdict().items()
                if x is not None and name in filled
            }
        )


def _in_order(x: Tensor, shape: Sequence[int], make: Callable[..., Tensor]) -> Tensor:
    """A tensor of another shape whose dimensions lie in memory in the order of those of x."""
    order = _order(x)
    made = make(x.dtype, *(shape[dim] for dim in order))
    return made.permute([order.index(dim) for dim in range(x.dim())])


def _nothing(x: Tensor) -> Callable[..., Tensor]:
    def nothing(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=x.device)

    return nothing


def random_on(device: torch.device) -> Callable[..., Tensor]:
    """Makes normal numbers of a dtype and shape, by a generator of its own."""
    generator = torch.Generator(device).manual_seed(0)

    def random(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return random


def _wide(problem: Problem) -> Problem:
    """The same numbers in float64."""
    tensors = problem.named_tensors.items()
    wide: dict[str, Any] = {name: x.double() for name, x in tensors if x is not None}
    return problem._replace(**wide)


def _compare_forward(
    few: Few, problem: Problem, run: Callable[..., Any], tile: Any, like: Tensor
) -> Results | None:
    out = few.of_tokens(like, _nothing(like))
    if run(problem, out, tile) is False:
        return None
    expected = torch.empty(out.shape, dtype=torch.float64, device=out.device)
    blocked.forward(_wide(problem), expected)
    return [(out.to(problem.q.dtype), expected)]


def _compare_backward(
    filled: Sequence[str],
    few: Few,
    problem: Problem,
    run: Callable[..., Any],
    tile: Any,
    like: Tensor,
    wanted: Gradients,
) -> Results | None:
    grad_out = few.of_tokens(like, random_on(like.device))
    gradients = few.of_gradients(wanted, filled)
    if run(problem, grad_out, gradients, tile) is False:
        return None
    wide = _wide(problem)
    expected = wide.new_gradients([x is not None for x in gradients])
    blocked.backward(wide, grad_out.double(), expected)
    found = [gradient.to(problem.q.dtype) for gradient in gradients.wanted]
    return list(zip(found, expected.wanted, strict=True))


def _compare_normed_forward(
    few: Few,
    problem: Problem,
    run: Callable[..., Any],
    tile: Any,
    like: Tensor,
    router: NormedRouter,
) -> Results | None:
    from ..ops.norm_router import norm_and_route_on_cpu

    small = small_router(router, problem.q)
    q = problem.q.clone()
    r = q.new_empty((*q.shape[:3], small.weight.shape[2]), dtype=router.formula.r_dtype)
    norm_and_route_on_cpu(q, small, r)
    expected = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    blocked.forward(_wide(problem._replace(q=q, r=r)), expected)
    if run(problem, problem.q, small, tile) is False:
        return None
    return [(problem.q, expected)]


def small_router(router: NormedRouter, q: Tensor) -> NormedRouter:
    """Random numbers in place of a norm and a router, for the heads of one group, those of q."""
    random = random_on(q.device)
    norm, weight = router.norm_weight, router.weight
    if norm is not None:
        norm = 1 + random(norm.dtype, *q.shape[4 - norm.dim() :]) / 4
    few = Few(q.shape[1], q.shape[2])
    return router._replace(norm_weight=norm, weight=few.of_weights(weight, random))


_COMPARE: dict[Kernel, Callable[..., Results | None]] = {
    "forward": _compare_forward,
    "normed_forward": _compare_normed_forward,
    **{name: partial(_compare_backward, filled) for name, filled in FILLS.items()},
}


# Files.


def _path(claim: Claim) -> Path | None:
    from mhf_compiler.compat import cache_folder

    folder = cache_folder()
    if folder is None:
        return None
    depends_on = (claim, triton.__version__, assembler(claim.capability), kernels_hash())
    return (
        folder / "verdicts" / f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]}.json"
    )


def _read(path: Path) -> bool | None:
    """The verdict; None if there is none, or the file is unreadable."""
    try:
        right = json.loads(path.read_text())["right"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("a verdict on a kernel is not readable in %s: %s", path, error)
        return None
    return right if isinstance(right, bool) else None


def _write(path: Path, claim: Claim, right: bool) -> None:
    """Write a file whole or not at all."""
    text = json.dumps({"about": claim._asdict(), "right": right}, indent=1, default=str)
    whole = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(text)
        whole.replace(path)
    except OSError as error:
        log.warning("a verdict on a kernel is not kept on disk: %s", error)
