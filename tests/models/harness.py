"""Runs a whole model eagerly and compiled, compares them, and counts what was replaced.

``assert_same_steps`` is the proof that a rewritten model is the model: outputs and every gradient.
Models are made in float64 wherever they can be, so that the bound is one of rounding alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhf_compiler.compat import counters

#: rewrites whatever is proved, and lets every failure through
OPTIONS = {"rewrite": "always", "fallback": "aot_eager", "strict": True}

Model = Callable[..., Any]


@dataclass(frozen=True)
class Tally:
    """What the back end counted since the last ``forget``."""

    sites: int = 0
    declined: int = 0
    failures: int = 0


def tally() -> Tally:
    counted = counters["flashmhf"]
    names = ("sites_rewritten", "sites_declined", "failures")
    return Tally(*(counted[name] for name in names))


def replaced() -> int:
    """How many sites were rewritten, nothing having failed.

    For models whose attention some versions of PyTorch take apart: what is left of it is looked at
    and declined.
    """
    assert counters["flashmhf"]["failures"] == 0
    return counters["flashmhf"]["sites_rewritten"]


def graphs_compiled() -> int:
    return counters["stats"]["unique_graphs"]


def forget() -> None:
    """Nothing is compiled and nothing counted."""
    torch.compiler.reset()
    counters.clear()


def flashmhf(model: Model, **how: Any) -> Model:
    """``model`` compiled; ``options`` are added to those above, the rest is for torch.compile."""
    options = OPTIONS | how.pop("options", {})
    return torch.compile(model, backend="flashmhf", options=options, **how)


def assert_same_steps(
    model: nn.Module, *inputs: Any, compiler: Callable[[nn.Module], Model] = flashmhf
) -> None:
    """A compiled copy of ``model`` gives the results and the gradients that ``model`` gives.

    ``compiler`` makes the copy into what is called. In evaluation mode there are no gradients.
    """
    twin = copy.deepcopy(model)
    found = step(compiler(twin), twin, inputs)
    assert_close(found, step(model, model, inputs))


def step(call: Model, model: nn.Module, inputs: Iterable[Any]) -> dict[str, Tensor]:
    """One call, and one backward pass in training: results, and gradients by name.

    Args:
        call: what is called.
        model: whose parameters it trains.
        inputs: its arguments.
    """
    given = [_leaf(x, model.training) for x in inputs]
    with torch.set_grad_enabled(model.training):
        results = list(tensors_in(call(*given)))
    if model.training:
        loss(results).backward()
    leaves = dict(model.named_parameters()) | {f"input {i}": x for i, x in enumerate(given)}
    seen = {f"result {i}": result.detach() for i, result in enumerate(results)}
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor) and leaf.grad is not None:
            seen[f"gradient of {name}"] = leaf.grad
            leaf.grad = None
    return seen


def loss(results: Iterable[Tensor]) -> Tensor:
    """A scalar that every element of the results moves by another amount."""
    total: Any = 0
    for result in results:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        total = total + (result * weights.to(result.dtype)).sum()
    return total


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors, each within its precision; bounds are relative to its largest element."""
    assert list(found) == list(expected)
    for name, reference in expected.items():
        bound = 1e4 if reference.dtype == torch.float64 else 30
        bound *= torch.finfo(reference.dtype).eps * float(reference.abs().max())
        torch.testing.assert_close(
            found[name],
            reference,
            rtol=0,
            atol=bound,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a result, whatever holds them."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from tensors_in(part)


def _leaf(x: Any, training: bool) -> Any:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    return x.detach().clone().requires_grad_(training)
