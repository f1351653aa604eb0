"""Layers that share a compiled graph count all, and a report has the names of each."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.networks import Heads
from torch import Tensor, fx, nn
from torch.nn import functional as F

import mhf_compiler
from mhf_compiler import Options, compilation
from mhf_compiler.compat import counters

OPTIONS = {"rewrite": "always", "fallback": "aot_eager"}
LAYERS = 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.ffn = Heads()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class Model(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Region(Layer):
    """A layer that Dynamo compiles once for all."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def tokens(length: int = 6) -> Tensor:
    return torch.randn(2, length, 32, requires_grad=True)


def by_layers(model: Model, **how: Any) -> Model:
    for layer in model.layers:
        layer.compile(backend="flashmhf", options=OPTIONS, **how)
    return model


def counted() -> int:
    return counters["flashmhf"]["sites_rewritten"]


def first_lines(report: mhf_compiler.Report, number: int) -> list[str]:
    return str(report).splitlines()[:number]


def test_layers_that_share_a_graph_count_all():
    model = by_layers(Model())
    x = tokens()
    torch.testing.assert_close(model(x), Model.forward(model, x))
    assert counters["flashmhf"]["graphs"] == 4
    assert counted() == LAYERS
    report = mhf_compiler.compilation_report(model)
    assert first_lines(report, 2) == [
        "4 MH-FFNs rewritten, 0 declined, in 1 graph",
        "  layers.{0-3}.ffn: all 4 layers",
    ]
    assert report.totals.networks == report.totals.calls == LAYERS
    (site,) = report.rewritten
    assert site.runs == tuple(f"layers.{number}.ffn" for number in range(LAYERS))
    assert [one.tensors for one in site.arguments if one.role in "KV"] == [
        ("layers.0.ffn.gate",),
        ("layers.0.ffn.down",),
    ]
    assert {one.path for one in report.graphs[0].modules} >= {"layers.3.norm", "layers.3.ffn"}


def test_without_the_model_their_number_is_known():
    by_layers(Model())(tokens())
    report = mhf_compiler.compilation_report()
    assert first_lines(report, 2) == [
        "4 MH-FFNs rewritten, 0 declined, in 1 graph",
        "  ffn: 4 times",
    ]
    assert [site.runs for site in report.rewritten] == [("ffn",) * LAYERS]


def test_graphs_that_divide_the_layers_are_summed_up():
    """The first layer gets an input without gradients, so it has a graph of its own."""
    model = by_layers(Model())
    model(tokens().detach())
    assert counters["flashmhf"]["graphs"] == 4
    assert counted() == LAYERS
    report = mhf_compiler.compilation_report()
    assert report.totals.networks == LAYERS
    graphs = str(report).split("\nGraphs\n")[1].splitlines()
    assert graphs == ["  graph 0: ffn rewritten", "  graph 1: ffn (3 MH-FFNs) rewritten"]
    named = str(mhf_compiler.compilation_report(model))
    assert "graph 1: layers.{1-3}.ffn rewritten" in named


def test_a_layer_that_is_called_again_is_no_other():
    model = by_layers(Model(layers=1))
    x = tokens()
    for _ in range(3):
        x = model(x)
    assert counted() == 1
    with torch.no_grad():
        model.layers[0].ffn.gate.mul_(2)
    model(x)
    assert counted() == 1


def test_other_sizes_count_again_as_graphs_do():
    model = by_layers(Model(), dynamic=False)
    for length in (6, 7, 6, 7):
        model(tokens(length))
    assert counters["flashmhf"]["graphs"] == 8
    assert counted() == 2 * LAYERS
    assert mhf_compiler.compilation_report(model).totals.networks == LAYERS


def test_a_dynamic_number_of_tokens_counts_once():
    model = by_layers(Model(), dynamic=True, fullgraph=True)
    for length in (6, 7, 9):
        model(tokens(length))
    assert counters["flashmhf"]["graphs"] == 4
    assert counted() == LAYERS


def test_in_inference_mode():
    model = by_layers(Model())
    with torch.inference_mode():
        for _ in range(2):
            model(torch.randn(2, 6, 32))
    assert counted() == LAYERS


def test_of_two_networks_in_a_layer_one_may_be_shared():
    shared = Heads()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.own = shared, Heads()

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.shared(x))

    model = by_layers(Model(Two))
    model(tokens())
    assert counted() == LAYERS + 1
    report = mhf_compiler.compilation_report(model)
    assert report.totals.networks == LAYERS + 1
    assert [len(site.runs) for site in report.rewritten] == [1, LAYERS]


SHARED = [("gate",), ("down",), ("gate", "up"), ("up", "down")]


@pytest.mark.parametrize("names", SHARED, ids="_".join)
def test_layers_that_share_some_weights_count_all(names: tuple[str, ...]):
    model = by_layers(Model())
    for layer in model.layers[1:]:
        for name in names:
            setattr(layer.ffn, name, getattr(model.layers[0].ffn, name))
    x = tokens()
    for _ in range(2):
        torch.testing.assert_close(model(x), Model.forward(model, x))
    assert counters["flashmhf"]["graphs"] == LAYERS
    assert counted() == LAYERS
    explained = mhf_compiler.explain(model, options=OPTIONS)(x)
    for report in (mhf_compiler.compilation_report(model), explained):
        assert first_lines(report, 2) == [
            "4 MH-FFNs rewritten, 0 declined, in 1 graph",
            "  layers.{0-3}.ffn: all 4 layers",
        ]


def test_layers_that_share_all_but_a_router_count_all():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.down = gate, down
            self.router = nn.Parameter(torch.randn(4, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 8))
            router = torch.einsum("blhd,hde->blhe", q, self.router).sigmoid()
            hidden = F.silu(torch.einsum("blhd,hefd->blhef", q, self.gate))
            y = torch.einsum("blhef,hefd->blhed", hidden, self.down)
            return (y * router[..., None]).sum(3).flatten(2)

    gate, down = (nn.Parameter(torch.randn(4, 3, 16, 8) / 4) for _ in range(2))
    model = by_layers(Model(Routed))
    model(tokens())
    assert counted() == LAYERS
    report = mhf_compiler.compilation_report(model)
    assert first_lines(report, 2)[1] == "  layers.{0-3}: all 4 layers"


def test_one_module_at_several_places_counts_once():
    model = Model(layers=1)
    model.layers.extend([model.layers[0]] * 3)
    model.layers[0].compile(backend="flashmhf", options=OPTIONS)
    model(tokens())
    assert counted() == 1


def test_of_many_weights_four_are_looked_at():
    experts = [f"experts_{number}" for number in range(9)]

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in experts:
                setattr(self, name, Heads())

        def forward(self, x: Tensor) -> Tensor:
            return sum(getattr(self, name)(x) for name in experts)

    model = by_layers(Model(Experts))
    for layer in model.layers[1:]:
        for name in experts[:-1]:
            setattr(layer, name, getattr(model.layers[0], name))
    model(tokens())
    assert counted() == LAYERS


def network(x: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, 8))
    hidden = F.silu(torch.einsum("blhd,hfd->blhf", heads, gate))
    return torch.einsum("blhf,hfd->blhd", hidden, down).flatten(-2)


def weights(kind: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [kind(torch.randn(4, 16, 8)) for _ in range(2)]


def test_weights_that_are_no_parameters_do_not_count():
    run = torch.compile(network, backend="flashmhf", options=OPTIONS)
    kept = [weights(torch.Tensor.requires_grad_) for _ in range(5)]
    for one in kept:
        run(tokens(), *one)
    assert counters["flashmhf"]["graphs"] == counted() == 1


def test_parameters_that_are_made_anew_do_not_count_up():
    run = torch.compile(network, backend="flashmhf", options=OPTIONS)
    for _ in range(20):
        run(tokens(), *weights(nn.Parameter))
    assert counters["flashmhf"]["graphs"] == 1
    assert counted() <= 2  # the old ones may be there until the new ones have their names
    kept = [weights(nn.Parameter) for _ in range(5)]
    for one in [*kept, *kept]:
        run(tokens(), *one)
    assert counted() == 5


def test_nothing_is_kept_alive_and_another_model_takes_the_place():
    model = by_layers(Model())
    model(tokens())
    gone = [weakref.ref(one) for one in model.parameters()]
    del model
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)
    other = by_layers(Model())
    for _ in range(2):  # a first parameter at an address that is free again is seen by the second
        other(tokens())
    assert counters["flashmhf"]["graphs"] == 4
    assert counted() == LAYERS
    report = mhf_compiler.compilation_report(other)
    assert first_lines(report, 2)[1] == "  layers.{0-3}.ffn: all 4 layers"


def test_parameters_that_were_seen_can_be_swapped():
    """PyTorch refuses to swap what has weak references, its own ones, too."""
    model = by_layers(Model())
    model(tokens())
    for parameter in model.layers[1].parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.randn_like(parameter)))
    model(tokens())
    assert counted() == LAYERS


def test_two_models_at_the_same_time_count_both():
    first, second = by_layers(Model()), by_layers(Model(layers=2))
    first(tokens())
    second(tokens())
    assert counters["flashmhf"]["graphs"] == 6
    assert counted() == LAYERS + 2
    (site,) = mhf_compiler.compilation_report(second).rewritten
    assert site.runs[:2] == ("layers.0.ffn", "layers.1.ffn")
    assert len(site.runs) == LAYERS + 2


def test_a_reset_forgets_what_was_seen():
    model = by_layers(Model())
    model(tokens())
    torch.compiler.reset()
    counters.clear()
    model(tokens())
    assert counted() == LAYERS
    assert mhf_compiler.compilation_report().totals.networks == LAYERS


def test_threads():
    model = by_layers(Model(layers=16))
    model.layers[0](tokens())
    barrier = threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        model(tokens())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters["flashmhf"]["graphs"] == 16
    assert counted() == 16


def test_a_region_counts_at_each_of_its_calls():
    model = Model(Region)
    run = torch.compile(model, backend="flashmhf", options=OPTIONS)
    x = tokens()
    torch.testing.assert_close(run(x), model(x))
    assert counters["flashmhf"]["graphs"] == 1
    assert counted() == LAYERS
    for report in (mhf_compiler.compilation_report(), mhf_compiler.compilation_report(model)):
        assert first_lines(report, 2) == [
            "4 MH-FFNs rewritten, 0 declined, in 1 graph",
            "  layers.{0-3}.ffn: all 4 layers",
        ]


def test_explain_counts_the_calls_of_a_region():
    report = mhf_compiler.assert_rewritten(Model(Region), (tokens(),), sites=LAYERS)
    assert first_lines(report, 2)[1] == "  layers.{0-3}.ffn: all 4 layers"
    names = {name for site in report.rewritten for one in site.arguments for name in one.tensors}
    assert any(name.endswith(".ffn.gate") for name in names)
    assert not any("_parameters_" in name for name in names)


class Again(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return x


def test_a_region_that_one_module_calls_again_is_called_again():
    model = Again(Region)
    run = torch.compile(model, backend="flashmhf", options=OPTIONS)
    explained = mhf_compiler.explain(model, options=OPTIONS)(tokens())
    counters.clear()
    for _ in range(2):
        run(tokens())
    assert counted() == 3
    for report in (mhf_compiler.compilation_report(model), explained):
        assert first_lines(report, 2)[1] == "  layer.ffn: 3 times"
        assert (report.totals.networks, report.totals.calls) == (1, 3)


def test_a_call_of_a_region_whose_weights_are_computed_is_not_lost():
    @torch.compiler.nested_compile_region
    def heads(x: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        return network(x, gate, down)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.down = (nn.Parameter(torch.randn(4, 16, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return heads(heads(x, self.gate, self.down), self.gate * 2, self.down * 2)

    model = Both()
    run = torch.compile(model, backend="flashmhf", options=OPTIONS)
    run(tokens())
    assert counted() == 2
    assert mhf_compiler.compilation_report(model).totals.calls == 2


class Ordinary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Unknown(Heads):
    """Heads with an activation that the op does not have."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        hidden = F.softplus(q @ self.gate) * (q @ self.up)
        return (hidden @ self.down).transpose(1, 2).flatten(2)


def test_what_is_declined_or_ordinary_in_a_region_counts_at_each_call():
    model = Model(lambda: nn.Sequential(Ordinary(), Unknown()))
    torch.compile(model, backend="flashmhf", options=OPTIONS)(tokens())
    tally = counters["flashmhf"]
    assert tally["ordinary"] == tally["sites_declined"] == LAYERS
    assert tally["declined.UNKNOWN_ACTIVATION"] == LAYERS
    explained = mhf_compiler.explain(model, options=OPTIONS)(tokens())
    for report in (explained, mhf_compiler.compilation_report(model)):
        assert first_lines(report, 2) == [
            "0 MH-FFNs rewritten, 4 declined, in 1 graph",
            "  4 ordinary FFNs, left to Inductor: layers.{0-3}.0.down",
        ]
    again = mhf_compiler.explain(Again(Unknown), options=OPTIONS)(tokens())
    assert [site.runs for site in again.declined] == [("layer",) * 3]


def test_a_graph_without_networks_is_what_the_fallback_has_compiled(
    monkeypatch: pytest.MonkeyPatch,
):
    returned: list[Callable[..., Any]] = []

    def compiled(name: str, gm: fx.GraphModule, *others: Any) -> Callable[..., Any]:
        returned.append(gm.forward)
        return returned[-1]

    monkeypatch.setattr(compilation.compat, "compile_graph", compiled)
    given: list[Callable[..., Any]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        given.append(compilation.compile_graph_of_dynamo(gm, inputs, Options(rewrite="always")))
        return given[-1]

    torch.compile(nn.Linear(32, 32), backend=backend)(tokens())
    assert given == returned
    torch.compile(Heads(), backend=backend)(tokens())
    assert given[-1] != returned[-1]


def test_what_pytorch_can_save_is_handed_on_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """Ahead of time, and in caches, a compiled graph is saved; a function of ours cannot be."""

    def compiled(*_: Any) -> Callable[..., Any]:
        def run(*given: Tensor) -> tuple[Tensor]:
            return (given[0],)

        run.serialize = lambda: b""  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr(compilation.compat, "compile_graph", compiled)
    given: list[Callable[..., Any]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        given.append(compilation.compile_graph_of_dynamo(gm, inputs, Options(rewrite="always")))
        return given[-1]

    torch.compile(Heads(), backend=backend)(tokens())
    assert hasattr(given[0], "serialize")
