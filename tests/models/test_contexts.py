"""Ways to call a compiled model: graph breaks, functional calls, parts of models, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from corpus.cases import H, d, f
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state

import mhf_compiler
from models.harness import (
    OPTIONS,
    Model,
    Tally,
    assert_close,
    assert_same_steps,
    flashmhf,
    graphs_compiled,
    loss,
    step,
    tally,
)
from models.networks import BATCH, LAYERS, LENGTH, WIDTH, LoopFFN, Tower, tokens

NAMES = ("loop", "packed")


# Graph breaks.


class Breaking(Tower):
    """A graph break in front of each block."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return block(x)


class Printing(Tower):
    """Python that looks at data in the middle of the model."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x) if x.sum().item() < float("inf") else x


@pytest.mark.parametrize("model", [Breaking, Printing])
def test_graph_breaks_between_layers(model: type[Tower]):
    """How Dynamo cuts the model is its own affair; what it cuts is rewritten everywhere."""
    tower = model(LAYERS, NAMES).double()
    assert_same_steps(tower, tokens())
    assert tally() == Tally(sites=tally().sites)
    report = mhf_compiler.explain(tower, options=OPTIONS)(tokens())
    assert "silu(" in report.graph_before
    assert "silu(" not in report.graph_after


class Unrolled(Tower):
    """One break between two blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


def test_a_graph_break_makes_two_graphs():
    assert_same_steps(Unrolled(2, NAMES).double(), tokens())
    assert graphs_compiled() == 2
    assert tally() == Tally(sites=4)


class BreakingInside(nn.Module):
    """A graph break between the projections up and the projection down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(H, *s)) for s in ((d, f), (f, d)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x.unflatten(-1, (H, d)).transpose(1, 2) @ self.up).relu()
        torch._dynamo.graph_break()
        return (hidden @ self.down).transpose(1, 2).flatten(2)


def test_a_graph_break_inside_a_network_leaves_it_alone():
    """Neither graph holds a whole network."""
    assert_same_steps(BreakingInside().double(), tokens())
    assert graphs_compiled() == 2
    assert tally().sites == 0


def test_the_whole_model_as_one_graph():
    compiler: Any = lambda model: flashmhf(model, fullgraph=True)  # noqa: E731
    assert_same_steps(Tower(LAYERS, NAMES).double(), tokens(), compiler=compiler)
    assert tally() == Tally(sites=2 * LAYERS)


# Parts of a model.


def test_one_layer_compiled():
    model, x = Tower(3, NAMES).double(), tokens()
    twin = copy.deepcopy(model)
    twin.blocks[1].compile(backend="flashmhf", options=OPTIONS)
    assert_close(step(twin, twin, [x]), step(model, model, [x]))
    assert tally() == Tally(sites=2)


def test_a_network_that_two_models_share():
    """One compiled module, called in two places."""
    model, x = Tower(1, NAMES).double(), tokens()
    block = flashmhf(model.blocks[0])
    torch.testing.assert_close(block(block(x)), model(model(x)))
    assert tally() == Tally(sites=2 * graphs_compiled())


def test_a_method_compiled():
    model, x = Tower(1, NAMES).double(), tokens()
    expected = model(x)
    model.forward = flashmhf(model.forward)  # type: ignore[method-assign]
    torch.testing.assert_close(model(x), expected)
    assert tally() == Tally(sites=2)


# Functional calls and transforms.


def test_functional_call():
    """Parameters come in as arguments; gradients by ``torch.func.grad`` of the whole."""
    model, x = Tower(1, NAMES).double(), tokens()
    state = {name: p.detach() for name, p in model.named_parameters()}

    def objective(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss([functional_call(model, state, (x,))])

    torch.testing.assert_close(flashmhf(objective)(state, x), objective(state, x))
    assert tally() == Tally(sites=2)


class Head(nn.Module):
    """One head's SwiGLU, a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, f), nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, q: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(q)) * self.up(q))


def test_an_ensemble_of_heads():
    """``stack_module_state`` outside, ``vmap`` of ``functional_call`` inside the compiled code."""
    heads = [[Head().double() for _ in range(H)] for _ in range(LAYERS)]
    stacks = [stack_module_state(models)[0] for models in heads]  # type: ignore[arg-type]
    template = copy.deepcopy(heads[0][0]).to("meta")

    def head(state: dict[str, Tensor], q: Tensor) -> Tensor:
        return functional_call(template, state, (q,))

    def model(stacks: list[dict[str, Tensor]], x: Tensor) -> Tensor:
        for stack in stacks:
            q = x.unflatten(-1, (H, d))
            x = x + torch.vmap(head, in_dims=(0, 2), out_dims=2)(stack, q).flatten(2)
        return x

    def loop(x: Tensor) -> Tensor:
        for models in heads:
            q = x.unflatten(-1, (H, d)).unbind(2)
            x = x + torch.cat([m(part) for m, part in zip(models, q, strict=True)], -1)
        return x

    x = tokens()
    found, expected = flashmhf(model)(stacks, x), loop(x)
    torch.testing.assert_close(found, expected)
    assert tally() == Tally(sites=LAYERS)
    weights = [p for stack in stacks for p in stack.values()]
    gradients = torch.autograd.grad(loss([found]), weights)
    loss([expected]).backward()
    for name, gradient in zip([n for s in stacks for n in s], gradients, strict=True):
        assert gradient.shape[0] == H, name
    by_name = {(n, name): g for (n, name), g in zip(_keys(stacks), gradients, strict=True)}
    for (n, name), gradient in by_name.items():
        own = torch.stack([m.get_parameter(name).grad for m in heads[n]])  # type: ignore[misc]
        torch.testing.assert_close(gradient, own)


def _keys(stacks: list[dict[str, Tensor]]) -> list[tuple[int, str]]:
    return [(n, name) for n, stack in enumerate(stacks) for name in stack]


def test_gradients_for_each_sample():
    """``torch.func`` inside of the compiled code. Rewritten or not, the results hold."""
    model, x = LoopFFN().double(), tokens()
    state = {name: p.detach() for name, p in model.named_parameters()}

    def objective(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, state, (x[None],)).square().sum()

    for_each = torch.vmap(grad(objective), in_dims=(None, 0))
    torch.testing.assert_close(flashmhf(for_each)(state, x), for_each(state, x))
    assert tally().failures == 0


# Training loops.


def _train(call: Callable[..., Any], model: nn.Module, wrap: Any, **how: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **how)
    update = wrap(optimizer.step)
    losses = []
    for number in range(4):
        torch.manual_seed(number)
        value = loss([call(tokens())]) ** 2
        value.backward()
        update()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("compiled_step", [False, True], ids=["eager step", "compiled step"])
def test_steps_of_an_optimizer(compiled_step: bool):
    """The optimizer's own step may be compiled by the same back end: it holds no network.

    A compiled step rounds otherwise than an eager one, whatever compiles it.
    """
    model = Tower(1, NAMES).double()
    twin = copy.deepcopy(model)
    ours, theirs = (flashmhf, aot_eager) if compiled_step else (as_it_is, as_it_is)
    found, expected = _train(flashmhf(twin), twin, ours), _train(model, model, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert tally() == Tally(sites=2)


def aot_eager(function: Model) -> Model:
    return torch.compile(function, backend="aot_eager")


def as_it_is(function: Model) -> Model:
    return function


def test_the_whole_training_step_in_one_call():
    """Forward and backward in one compiled function: the break is at ``backward``."""
    model, x = Tower(1, NAMES).double(), tokens()
    twin = copy.deepcopy(model)

    def train(model: nn.Module, x: Tensor) -> Tensor:
        value = loss([model(x)])
        value.backward()
        return value.detach()

    found, expected = flashmhf(train)(twin, x), train(model, x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert tally() == Tally(sites=2)


def test_gradients_accumulate_over_calls():
    model = Tower(1, NAMES).double()
    twin = copy.deepcopy(model)
    inputs = [tokens() for _ in range(3)]
    for call in (flashmhf(twin), model):
        for x in inputs:
            loss([call(x)]).backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert tally() == Tally(sites=2)


def test_compiled_autograd():
    """The backward pass is compiled as well, once, and finds nothing to rewrite in it."""
    model, x = Tower(1, NAMES).double(), tokens()
    twin = copy.deepcopy(model)
    with torch._dynamo.config.patch(compiled_autograd=True):
        found = step(flashmhf(twin), twin, [x])
    assert_close(found, step(model, model, [x]))
    assert tally().sites == 2
    assert tally().failures == 0


@pytest.mark.parametrize("setting", ["specialize_float", "assume_static_by_default"])
def test_settings_of_dynamo(setting: str):
    """Floats as constants; sizes as symbols from the beginning."""
    with torch._dynamo.config.patch({setting: not getattr(torch._dynamo.config, setting)}):
        assert_same_steps(Tower(1, NAMES).double(), tokens())
    assert tally() == Tally(sites=2)


def test_mixed_modes_in_one_graph():
    """A frozen teacher under no_grad and a student that is trained, in one compiled function."""
    model, teacher, x = Tower(1, NAMES).double(), Tower(2, NAMES).double(), tokens()

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = teacher(x)
            return (self.student(x) - target).square()

    assert_same_steps(Distilled(), x)
    assert tally() == Tally(sites=2 + 4)


def _beside(y: Tensor, *weights: Tensor) -> Tensor:
    gate, up, down = weights
    hidden = torch.einsum("blhd,hdf->blhf", y, gate).relu()
    hidden = hidden * torch.einsum("blhd,hdf->blhf", y, up)
    return torch.einsum("blhf,hfd->blhd", hidden, down)


def _of_vjp(x: Tensor, *weights: Tensor) -> Any:
    return torch.func.vjp(lambda y: _beside(y, *weights), x)[0]


def _of_two_vjps(x: Tensor, *weights: Tensor) -> Any:
    return torch.func.vjp(lambda y: _of_vjp(y, *weights), x)[0]


def _of_two_networks_in_vjp(x: Tensor, *weights: Tensor) -> Any:
    """Equal results: each has a storage of its own."""
    return torch.func.vjp(lambda y: (_beside(y, *weights), _beside(y, *weights)), x)[0]


def _as_auxiliary(x: Tensor, *weights: Tensor) -> Any:
    return grad(lambda y: (y.square().sum(), _beside(y, *weights)), has_aux=True)(x)


def _beside_a_teacher(teach: Model) -> Model:
    """A level with a teacher that records no gradients: it has none outside either."""

    def model(x: Tensor, *weights: Tensor) -> Any:
        def both(y: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                taught = teach(y, *weights)
            return taught, y * 2

        return torch.func.vjp(both, x)[0]

    return model


_without_gradients_in_vjp = _beside_a_teacher(_beside)
_around_without_gradients = _beside_a_teacher(_of_vjp)


def _its_gradient(x: Tensor, *weights: Tensor) -> Any:
    result, pull_back = torch.func.vjp(lambda y: _beside(y, *weights), x)
    return result, *pull_back(result)


@pytest.mark.parametrize(
    ("model", "sites"),
    [
        (_of_vjp, 1),
        (_of_two_vjps, 1),
        (_of_two_networks_in_vjp, 1),
        (_as_auxiliary, 1),
        (_its_gradient, 0),
        (_without_gradients_in_vjp, 0),
        (_around_without_gradients, 0),
    ],
)
def test_inside_a_level_of_gradients(model: Model, sites: int):
    """The op inside of a level is what the network was there: a constant, but for those outside."""
    torch.manual_seed(0)
    shapes = (BATCH, LENGTH, H, d), (H, d, f), (H, d, f), (H, f, d)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    seen = []
    for call in (model, flashmhf(model)):
        given = [x.clone().requires_grad_() for x in tensors]
        results = call(*given)
        results = list(results) if isinstance(results, tuple) else [results]
        wanting = [y for y in results if y.requires_grad]
        gradients = torch.autograd.grad(
            sum(y.square().sum() for y in wanting), given, allow_unused=True
        )
        seen.append([len(wanting), *(y.detach() for y in results), *gradients])
    torch.testing.assert_close(*seen)
    assert tally().sites == sites


@pytest.mark.parametrize("model", [_without_gradients_in_vjp, _around_without_gradients])
def test_inside_a_level_of_gradients_where_nothing_wants_one(model: Model):
    shapes = (BATCH, LENGTH, H, d), (H, d, f), (H, d, f), (H, f, d)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(flashmhf(model)(*tensors), model(*tensors))
    assert tally().sites == 1


def test_shapes_used_here_are_all_different():
    """So that a dimension that is taken for another one shows."""
    assert len({BATCH, LENGTH, H, d, WIDTH}) == 5
