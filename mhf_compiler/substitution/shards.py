"""Sites over DTensors: the op must leave them where they were, and send no more around.

DTensor gives each operation the placements that it computes on, and sends tensors between devices
where they lie otherwise. So the site as the model spells it, and what would be written in its
place, are both run over fake DTensors that are placed as Dynamo knows, forward and backward. The
results and the gradients of all arguments have to be placed alike, and the op must not need a
collective that the original does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import (
    Collectives,
    FakeTensorMode,
    device_mesh,
    dtensor_of,
    example_of,
    local_tensor,
    no_tracing_context,
    place_numbers,
    placements,
    redistributed,
)
from ..debug.extract import Sizes, Spelling
from ..patterns import RESHAPES, CanonicalCopy, Site, Value, uncast
from .verify import arguments, replacement

_Outcome = tuple[dict[str, Any], dict[str, int]]  # placements and collectives, by name


def objection(gm: fx.GraphModule, site: Site, copy: CanonicalCopy) -> str | None:
    """Why the op cannot take the place of a site over DTensors; None if it can, or has none.

    Args:
        gm: the graph in which the site was found.
        site: the site.
        copy: what the graph computes.

    Raises:
        EditError: the site cannot be written into a graph.
    """
    if device_mesh(example_of(site.output_node)) is None:
        return None
    from ..lowering.ops import know_dtensor

    know_dtensor()
    if torch.__version__ < "2.13" and not _weights_are_cut(site, copy):  # as versions, not as text
        # Gradients of the operations that einsum is made of are placed otherwise than einsum's own,
        # unless their weights are cut.
        return f"torch {torch.__version__} places gradients in ways of its own, 2.13 is needed"
    sizes = Sizes(gm)
    original = Spelling(site, dict.fromkeys(arguments(site), ""), sizes)
    with no_tracing_context(), FakeTensorMode(), torch.autocast(site.device.type, enabled=False):
        try:
            given = [_given(value, site, copy, sizes) for value in original.inputs]
            were = _outcomes(original, given, site)
            would = _outcomes(replacement(site, copy, original.inputs, sizes), given, site)
        except Exception as error:
            first, *_ = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {first}"
    for (placed_before, sent_before), (placed, sent) in zip(were, would, strict=True):
        for name, before in placed_before.items():
            if placed[name] != before:
                return f"{name} was placed {before}, would be {placed[name]}"
        for name, count in sent.items():
            if count > sent_before.get(name, 0):
                return f"{name} would be needed {count} times instead of {sent_before.get(name, 0)}"
    return None


def _given(value: Value, site: Site, copy: CanonicalCopy, sizes: Sizes) -> Tensor:
    """A leaf that looks like a value of the graph, with numbers for dynamic sizes.

    Raises:
        ValueError: it is not known how the value is placed.
    """
    example = _example(value, site, copy)
    if device_mesh(example) is None or example.dtype is not value.dtype:
        raise ValueError(f"it is not known how {value.origin} is placed")
    local = local_tensor(example)
    shape, strides = sizes.known(tuple(local.shape)), sizes.known(local.stride())
    made = torch.empty_strided(shape, strides, dtype=local.dtype, device=local.device)
    whole = dtensor_of(made, example, sizes.known).reshape(sizes.known(value.shape))
    return whole.detach().requires_grad_(example.requires_grad)


def _example(value: Value, site: Site, copy: CanonicalCopy) -> Any:
    """What a node that holds a value, or a view of it, looks like; None if none does."""
    position = copy.positions[site.output_node]
    # Of a linear layer, only a view of its product is held.
    views = [view for view in value.readers if view.op in RESHAPES]
    holders = (copy.holder_at(one, position) for one in (value, *views))
    holder = next((node for node in holders if node is not None), None)
    return None if holder is None else example_of(holder)


def _weights_are_cut(site: Site, copy: CanonicalCopy) -> bool:
    """Whether all weights are cut along every dimension of the mesh."""
    weights = [view.value for view in (site.gate, site.up, site.down) if view is not None]
    places = [place_numbers(_example(uncast(value), site, copy)) for value in weights]
    return all(found and all(isinstance(place, int) for place in found) for found in places)


def _outcomes(
    function: Callable[..., Tensor], given: Sequence[Tensor], site: Site
) -> list[_Outcome]:
    """What a function does forward, and backward from gradients that are placed as its result, or
    whole.
    """
    with torch.set_grad_enabled(site.output.requires_grad_mode):
        with Collectives() as sent:
            result = function(*given)
        found: list[_Outcome] = [({"the result": placements(result)}, sent.counts)]
        wanted = [x for x in given if x.requires_grad]
        if not result.requires_grad:
            return found
        whole = [None] * len(placements(result))
        as_placed = [None if place == "sum" else place for place in place_numbers(result) or whole]
        for places in (as_placed, whole):
            grad = redistributed(torch.empty_like(result.detach()), whole)
            grad = redistributed(grad, places)
            with Collectives() as sent:
                gradients = torch.autograd.grad(
                    result, wanted, grad, retain_graph=True, allow_unused=True
                )
            placed = {
                f"the gradient of argument {number}": None if x is None else placements(x)
                for number, x in enumerate(gradients)
            }
            found.append((placed, sent.counts))
    return found
