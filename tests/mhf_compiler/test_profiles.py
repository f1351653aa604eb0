"""In a profile each call of an op is in a range with the name of its layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.inductor import NO_CPP, no_caches
from support.networks import ProjectedHeads
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

import mhf_compiler
from mhf_compiler.compat import counters

H, d, f = ProjectedHeads.H, ProjectedHeads.d, ProjectedHeads.f
OPTIONS = {"rewrite": "always", "strict": True, **NO_CPP}
FORWARD, BACKWARD = "multi_head_ffn", "multi_head_ffn_backward_over_gradient"


class Heads(nn.Module):
    """Heads alone, whose result is merged where they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = (nn.Parameter(torch.randn(H, *s) / 4) for s in ((d, f), (f, d)))

    def forward(self, q: Tensor) -> Tensor:
        hidden = torch.einsum("blhd,hdf->blhf", q, self.gate).relu()
        return torch.einsum("blhf,hfd->blhd", hidden, self.down)


class Tower(nn.Module):
    """Layers one after the other, called by `call`."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ProjectedHeads() for _ in range(3))
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.call(layer, x)
        return x


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, H * d)


def ranges(step: Callable[[], Any]) -> list[str]:
    """The ranges with names of layers in the second of two steps, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    for event in events:
        if " of " in event.name:  # within the op's own
            assert event.cpu_parent.name == event.name.partition(" of ")[0]
    ours = [event.name for event in events if event.name.startswith("mhf_compiler::")]
    return [name.removeprefix("mhf_compiler::") for name in ours if " of " in name]


def training(model: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    return lambda: model(tokens()).sum().backward()


def inference(model: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: model(tokens()))


def layers(op: str, *names: str) -> list[str]:
    return [f"{op} of {name}" for name in names]


@pytest.mark.parametrize("how", ["back end", "passes"])
def test_layers_have_their_names_forward_and_backward(how: str):
    given = (
        {"backend": "flashmhf", "options": OPTIONS}
        if how == "back end"
        else {"options": mhf_compiler.inductor_options(OPTIONS)}
    )
    names = [f"layers.{i}" for i in range(3)]
    with no_caches():
        found = ranges(training(torch.compile(Tower(), **given)))
    assert found == layers(FORWARD, *names) + layers(BACKWARD, *reversed(names))


def test_the_ops_of_passes_have_names_in_inference():
    with no_caches():
        found = ranges(inference(torch.compile(Tower(), backend="flashmhf", options=OPTIONS)))
    assert found == layers("multi_head_ffn_over_query", "layers.0", "layers.1", "layers.2")


def test_a_network_is_named_by_its_module_where_views_are_outside_of_it():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Heads(), Heads()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x.unflatten(-1, (H, d))).flatten(2).sin()
            return self.second(y.unflatten(-1, (H, d))).flatten(2).sin()

    with no_caches():
        found = ranges(training(torch.compile(Two(), backend="flashmhf", options=OPTIONS)))
    forward, backward = found[:2], found[2:]
    assert forward == layers(FORWARD, "first", "second")
    assert [name.partition(" of ")[2] for name in backward] == ["second", "first"]


def test_a_graph_that_layers_share_has_the_names_of_all():
    @torch.compiler.nested_compile_region
    def region(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    with no_caches():
        model = torch.compile(Tower(region), backend="flashmhf", options=OPTIONS)
        found = ranges(inference(model))
    assert found == layers("multi_head_ffn_over_query", *3 * ["layers.{0-2}"])


def test_layers_that_are_compiled_one_by_one_have_the_name_within_the_layer():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ProjectedHeads()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.ffn(x)

    model = nn.Sequential(Block(), Block())
    with no_caches():
        for block in model:
            block.compile(backend="flashmhf", options=OPTIONS)
        found = ranges(inference(model))
    assert found == layers("multi_head_ffn_over_query", "ffn", "ffn")


@pytest.mark.parametrize("how", ["back end", "passes"])
def test_code_from_a_cache_is_never_that_of_other_names(how: str):
    class One(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.add_module(name, ProjectedHeads())

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.name)(x)

    given = (
        {"backend": "flashmhf", "options": OPTIONS}
        if how == "back end"
        else {"options": mhf_compiler.inductor_options(OPTIONS)}
    )
    with fresh_cache():
        for name in ("left", "right", "left"):
            torch.compiler.reset()
            counters.clear()
            found = ranges(training(torch.compile(One(name), **given)))
            assert found == layers(FORWARD, name) + layers(BACKWARD, name)
    hits = (
        counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    )
    assert hits, "nothing was found in a cache, so nothing was tested"


def test_nothing_is_named_where_inductor_looks_for_a_graph_before_it_is_rewritten():
    config = torch._inductor.config
    if not hasattr(config, "pre_grad_pass_timing"):
        pytest.skip("this PyTorch runs the passes before autograd before it looks into its cache")
    options = mhf_compiler.inductor_options(OPTIONS) | {"pre_grad_pass_timing": "late"}
    with no_caches():
        assert ranges(inference(torch.compile(Tower(), options=options))) == []
