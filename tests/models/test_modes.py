"""Autocast and grad modes around, inside and between inner graphs: each place has its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.cases import H, d, f
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mhf_compiler
from mhf_compiler.patterns import Kind
from models.harness import flashmhf, tally

Place = Callable[[], AbstractContextManager[Any]]
Activation = Callable[[Tensor], Tensor]

AUTOCAST: dict[str, Place] = {
    "nothing": nullcontext,
    "on": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "off": lambda: torch.autocast("cpu", enabled=False),
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
}
GRAD: dict[str, Place] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
}


def network(q: Tensor, k: Tensor, u: Tensor, v: Tensor, act: Activation = F.silu) -> Tensor:
    hidden = act(torch.einsum("blhd,hdf->blhf", q, k)) * torch.einsum("blhd,hdf->blhf", q, u)
    return torch.einsum("blhf,hfd->blhd", hidden, v)


def clamped(q: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """A relu without gradients; with them it is none."""
    return network(q, k, u, v, lambda x: x.clamp(min=0))


def checkpointed(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def _doubled(q: Tensor, *weights: Tensor) -> Tensor:
    return (q * 2).float()


def chosen(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return torch.cond(args[0].sum() < 1e9, lambda *a: function(*a).contiguous(), _doubled, args)


def called(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return function(*args)


INSIDE = {"checkpoint": checkpointed, "cond": chosen, "call": called}


def arguments(training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (2, 6, H, d), (H, d, f), (H, d, f), (H, f, d)
    tensors = [torch.randn(shape) * 0.5 for shape in shapes]
    tensors[1][..., 0] = 0  # a gate that starts at the kink
    return [x.requires_grad_(training) for x in tensors]


def assert_same(
    model: Callable[..., Tensor], around: Place, training: bool = True, strict: bool = True
) -> None:
    """Values, dtypes and gradients of the compiled model are those of the model."""
    seen = []
    for call in (model, flashmhf(model, options={"strict": strict})):
        given = arguments(training)
        with around():
            result = call(*given)
        if result.requires_grad:
            (
                result.float() * torch.linspace(-1, 1, result.numel()).view(result.shape)
            ).sum().backward()
        seen.append([result.detach(), *(x.grad for x in given)])
    for plain, found in zip(*seen, strict=True):
        assert (plain is None) == (found is None)
        if plain is not None and found is not None:
            assert plain.dtype == found.dtype
            low = any(x.dtype != torch.float32 for x in seen[0] if x is not None)
            bound = (3e-2 if low else 1e-5) * float(plain.abs().max()) + 1e-6
            torch.testing.assert_close(found, plain, rtol=0, atol=bound)


def places(modes: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """All modes around all others: in a checkpoint, and in a branch and a plain call by turns."""
    for (i, outer), (j, inner) in itertools.product(enumerate(modes), repeat=2):
        yield "checkpoint", outer, inner
        yield ("cond", "call")[(i + j) % 2], outer, inner


@pytest.mark.parametrize(("inside", "outer", "inner"), list(places(AUTOCAST)))
def test_autocast(inside: str, outer: str, inner: str):
    """Around the call of the compiled model, and around the inner graph."""

    def model(*args: Tensor) -> Tensor:
        with AUTOCAST[inner]():
            return INSIDE[inside](lambda *a: network(*a).float(), *args)

    in_force = inner if inner != "nothing" else outer
    if in_force in ("on", "float16"):
        assert_rounds_like(model, AUTOCAST[outer])
    else:
        assert_same(model, AUTOCAST[outer])
    assert tally().sites == 1
    assert tally().failures == 0


def assert_rounds_like(model: Callable[..., Tensor], around: Place) -> None:
    """In low precision the compiled model is as far from float32 as the model is, roughly."""
    seen = []
    for call in (model, flashmhf(model)):
        given = arguments(training=True)
        with around():
            result = call(*given)
        if result.requires_grad:
            result.square().sum().backward()
        seen.append([result.detach(), *(x.grad for x in given)])
    for plain, found in zip(*seen, strict=True):
        assert plain is not None
        assert found is not None
        assert plain.dtype == found.dtype
        torch.testing.assert_close(found, plain, rtol=0, atol=4e-2 * float(plain.abs().max()))


@pytest.mark.parametrize(("inside", "outer", "inner"), list(places(GRAD)))
def test_grad_modes(inside: str, outer: str, inner: str):
    """A clamp is a relu exactly where no gradients are recorded."""

    def model(*args: Tensor) -> Tensor:
        with GRAD[inner]():
            return INSIDE[inside](clamped, *args)

    in_force = inner if inner != "nothing" else outer
    # The gradients of a branch with these strides PyTorch does not compile, with any back end.
    assert_same(model, GRAD[outer], training=inside != "cond")
    assert tally().sites == (1 if in_force == "no_grad" else 0)


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="no back end compiles it, and PyTorch's process is broken"
)
@pytest.mark.parametrize("inside", ["checkpoint", "call"])
def test_inference_mode_inside(inside: str):
    """PyTorch compiles no views of outside tensors there, of which the op needs some."""

    def model(*args: Tensor) -> Tensor:
        with torch.inference_mode():
            y = INSIDE[inside](clamped, *args)
        return y.clone()

    assert_same(model, nullcontext, training=False, strict=False)
    assert tally().sites == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_network_under_inference_mode_inside_is_a_near_miss(dtype: torch.dtype | None):
    """Composite operations are read there as elsewhere, and autocast is seen."""

    def model(q: Tensor, *weights: Tensor) -> Tensor:
        with torch.inference_mode():
            return clamped(q, *weights)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        report = mhf_compiler.explain(model, options={"rewrite": "always"})(*arguments(False))
    (miss,) = report.declined
    assert miss.reason.kind is Kind.INFERENCE_REGION
    assert miss.location.file == __file__


def test_inference_mode_outside():
    def model(*args: Tensor) -> Tensor:
        return checkpointed(clamped, *args)

    assert_same(model, torch.inference_mode, training=False)
    assert tally().sites == 1


def test_modes_that_change_inside_an_inner_graph():
    """Each of two networks in one checkpoint has the mode that is in force where it stands."""

    def both(q: Tensor, *weights: Tensor) -> Tensor:
        with torch.no_grad():
            first = clamped(q, *weights)
        return first + clamped(q * 2, *weights)

    def model(*args: Tensor) -> Tensor:
        return checkpointed(both, *args)

    assert_same(model, nullcontext)
    assert tally().sites == 1


def test_checkpoints_inside_each_other_under_other_modes():
    def inner(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return checkpointed(network, *args)

    def model(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpointed(inner, *args)

    assert_same(model, nullcontext)
    assert tally().sites == 1


def test_the_modes_are_afterwards_what_they_were():
    def model(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
            return checkpointed(network, *args)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        flashmhf(model)(*arguments(training=False))
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
