"""Transforms of torch.func, in the compiled code and around it: eager's results, and a reason.

Around compiled code Dynamo leaves everything to eager. In it, a network is rewritten where the
transform leaves its output in one piece, as a ``vmap`` over the batch does, and is declined else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
)
from torch.utils._pytree import tree_leaves, tree_map

import mhf_compiler
from mhf_compiler.compat import counters
from mhf_compiler.patterns import Kind
from models.harness import OPTIONS, flashmhf, forget, tally

MODELS, B, L, H, d, f = 2, 3, 4, 2, 5, 6

Weights = dict[str, Tensor]
Network = Callable[[Weights, Tensor], Tensor]


def weights(*models: int) -> Weights:
    shapes = {"gate": (H, d, f), "up": (H, d, f), "down": (H, f, d)}
    return {name: normal(*models, *shape) for name, shape in shapes.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def network(w: Weights, x: Tensor) -> Tensor:
    """Gated heads: (..., H * d) to the same."""
    q = x.unflatten(-1, (H, d))
    gate, up = (torch.einsum("...hd,hdf->...hf", q, w[name]) for name in ("gate", "up"))
    return torch.einsum("...hf,hfd->...hd", F.silu(gate) * up, w["down"]).flatten(-2)


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype)).sin().sum()


class Program:
    """A function of weights and inputs that calls a network, with arguments for it.

    Args:
        of: makes it of a network.
        sites: how many are rewritten where the whole function is compiled.
        reasons: why the others are not.
        models: whether it takes the weights of several models, and inputs for each of them.
    """

    def __init__(
        self,
        of: Callable[[Network], Callable[[Weights, Tensor], Any]],
        sites: int = 0,
        reasons: tuple[Kind, ...] = (Kind.FUNCTION_TRANSFORM,),
        models: tuple[bool, bool] = (False, False),
    ) -> None:
        self.of, self.sites, self.reasons, self.models = of, sites, reasons, models

    def arguments(self) -> tuple[Weights, Tensor]:
        several, inputs = self.models
        w = weights(MODELS) if several else weights()
        return w, normal(*((MODELS,) if inputs else ()), B, L, H * d)


def value_and_gradient(n: Network) -> Callable[[Weights, Tensor], Any]:
    def objective(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        y = n(w, x)
        return loss(y), y

    return grad_and_value(objective, has_aux=True)


def pulled_back(n: Network) -> Callable[[Weights, Tensor], Any]:
    def both(w: Weights, x: Tensor) -> Any:
        y, pull_back = vjp(n, w, x)
        return y, pull_back(y.cos())

    return both


def pushed_forward(n: Network) -> Callable[[Weights, Tensor], Any]:
    return lambda w, x: jvp(lambda x: n(w, x), (x,), (x.cos(),))


def pushed_forward_by_weights(n: Network) -> Callable[[Weights, Tensor], Any]:
    return lambda w, x: jvp(lambda w: n(w, x), (w,), (tree_map(torch.cos, w),))


def of_something_else(n: Network) -> Callable[[Weights, Tensor], Any]:
    return lambda w, x: jvp(lambda s: (n(w, x), s.sin()), (x.sum(),), (x.new_ones(()),))


def of_a_factor(n: Network) -> Callable[[Weights, Tensor], Any]:
    return lambda w, x: jacfwd(lambda s: n(w, s * x))(torch.ones((), dtype=x.dtype))


def second_derivative(n: Network) -> Callable[[Weights, Tensor], Any]:
    slope = grad(lambda x, w: loss(n(w, x)))
    return lambda w, x: grad(lambda x: slope(x, w).square().sum())(x)


def times_the_hessian(n: Network) -> Callable[[Weights, Tensor], Any]:
    return lambda w, x: jvp(grad(lambda x: loss(n(w, x))), (x,), (x.cos(),))


def objective_of(n: Network) -> Callable[[Weights, Tensor], Tensor]:
    return lambda w, x: loss(n(w, x))


#: no node of the graph holds the whole of what several models give
_MODELS = (Kind.TOKEN_DEPENDENT_WEIGHTS,)
_FORWARD = (Kind.FUNCTION_TRANSFORM, Kind.UNPAIRED_BRANCHES)

PROGRAMS = {
    "grad of the weights": Program(lambda n: grad(objective_of(n))),
    "grad of the input": Program(lambda n: grad(objective_of(n), argnums=1)),
    "grad_and_value": Program(value_and_gradient),
    "vjp": Program(pulled_back),
    "jvp of the input": Program(pushed_forward, reasons=_FORWARD),
    "jvp of the weights": Program(pushed_forward_by_weights, reasons=_FORWARD),
    "jvp of what a network does not read": Program(of_something_else),
    "jacrev": Program(lambda n: lambda w, x: jacrev(lambda x: n(w, x).sum((0, 1)))(x)),
    "jacfwd": Program(of_a_factor),
    "grad of grad": Program(second_derivative),
    "jvp of grad": Program(times_the_hessian, reasons=_FORWARD),
    "vmap over the batch": Program(lambda n: torch.vmap(n, (None, 0)), sites=1, reasons=()),
    "vmap over tokens": Program(lambda n: torch.vmap(n, (None, 1), 1), sites=1, reasons=()),
    "vmap over models": Program(
        lambda n: torch.vmap(n, (0, None)), reasons=_MODELS, models=(True, False)
    ),
    "vmap over models and inputs": Program(torch.vmap, reasons=_MODELS, models=(True, True)),
    "vmap over models and the batch": Program(
        lambda n: torch.vmap(torch.vmap(n, (None, 0)), (0, None)),
        reasons=_MODELS,
        models=(True, False),
    ),
    "gradients for each sample": Program(lambda n: torch.vmap(grad(objective_of(n)), (None, 0))),
    "gradients for each model": Program(
        lambda n: torch.vmap(grad_and_value(objective_of(n))), models=(True, True)
    ),
    "grad of vmap": Program(lambda n: grad(objective_of(torch.vmap(n, (None, 0))))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_inside_of_the_compiled_code(name: str):
    program = PROGRAMS[name]
    arguments = program.arguments()
    run = program.of(network)
    torch.testing.assert_close(flashmhf(run, fullgraph=True)(*arguments), run(*arguments))
    assert tally().failures == 0
    assert tally().sites == program.sites
    assert {kind for kind in Kind if counters["flashmhf"][f"declined.{kind.name}"]} <= set(
        program.reasons
    )
    assert bool(tally().declined) == bool(program.reasons)


@pytest.mark.parametrize("name", PROGRAMS)
def test_around_the_compiled_code(name: str):
    program = PROGRAMS[name]
    arguments = program.arguments()
    found = program.of(flashmhf(network))(*arguments)
    torch.testing.assert_close(found, program.of(network)(*arguments))
    assert tally().failures == 0


@pytest.mark.parametrize("name", ["grad_and_value", "vmap over the batch", "grad of vmap"])
def test_what_a_transform_returns_is_differentiated(name: str):
    """By ordinary autograd, from outside: second derivatives where the transform has the first."""
    program = PROGRAMS[name]
    seen = []
    for compiled in (False, True):
        torch.manual_seed(0)
        w, x = program.arguments()
        given = [*w.values(), x]
        for tensor in given:
            tensor.requires_grad_()
        run = program.of(network)
        results = (flashmhf(run) if compiled else run)(w, x)
        total: Any = sum(y.square().sum() for y in tree_leaves(results))
        seen.append(torch.autograd.grad(total, given))
    torch.testing.assert_close(*seen)
    assert tally().sites == program.sites


# Modules: as users of torch.func call them.


class Heads(nn.Module):
    """The same network, as a module."""

    def __init__(self) -> None:
        super().__init__()
        for name, weight in weights().items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        return network(dict(self.named_parameters()), x)


def test_an_ensemble_of_modules():
    """``stack_module_state``; each member is what it is by itself."""
    members = [Heads() for _ in range(MODELS)]
    state, _ = stack_module_state(members)  # type: ignore[arg-type]
    skeleton, x = Heads().to("meta"), normal(B, L, H * d)

    def ensemble(state: Weights, x: Tensor) -> Tensor:
        return torch.vmap(lambda s: functional_call(skeleton, s, (x,)))(state)

    expected = torch.stack([member(x) for member in members])
    torch.testing.assert_close(flashmhf(ensemble)(state, x), expected)
    assert tally().failures == 0
    forget()
    compiled = [flashmhf(member) for member in members]  # one by one they are rewritten
    torch.testing.assert_close(torch.stack([member(x) for member in compiled]), expected)
    assert tally().sites == MODELS  # by one graph


def test_a_training_step_in_functions():
    """``grad`` of a ``functional_call`` of a compiled module, and all of it compiled."""
    model, x = Heads(), normal(B, L, H * d)
    state = {name: weight.detach() for name, weight in model.named_parameters()}

    def step(state: Weights, x: Tensor) -> Weights:
        gradients = grad(lambda s: loss(functional_call(model, s, (x,))))(state)
        return {name: state[name] - 0.1 * g for name, g in gradients.items()}

    expected = step(state, x)
    torch.testing.assert_close(flashmhf(step)(state, x), expected)
    model.compile(backend="flashmhf", options=OPTIONS)
    torch.testing.assert_close(step(state, x), expected)
    assert tally().failures == 0


def test_the_report_names_the_network_and_not_its_backward_pass():
    report = mhf_compiler.explain(grad(objective_of(network)), options=OPTIONS)(
        weights(), normal(B, L, H * d)
    )
    (miss,) = report.declined
    assert miss.reason.kind is Kind.FUNCTION_TRANSFORM
    assert miss.location is not None
    assert 'w["down"]' in (miss.location.code or "")


def test_another_activation_is_told_before_the_transform():
    """What has to be changed anyway is the reason."""

    def other(w: Weights, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        hidden = F.elu(torch.einsum("blhd,hdf->blhf", q, w["gate"]))
        return torch.einsum("blhf,hfd->blhd", hidden, w["down"])

    flashmhf(grad(objective_of(other)))(weights(), normal(B, L, H * d))
    assert counters["flashmhf"]["declined.UNKNOWN_ACTIVATION"] == tally().declined == 1
