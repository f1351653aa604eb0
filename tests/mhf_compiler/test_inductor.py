"""The rewriting as passes of Inductor's own: as under the back end, next to passes of users."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as config
from support.inductor import NO_CPP, no_caches
from support.networks import ProjectedHeads
from torch import Tensor, fx, nn
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import mhf_compiler
from mhf_compiler import MhfCompilerWarning, NotAnalysedError, OptionError, compat, inductor
from mhf_compiler.compat import counters

H, d = ProjectedHeads.H, ProjectedHeads.d
PRE_GRAD, POST_GRAD = "pre_grad_custom_pass", "post_grad_custom_post_pass"
OP, OVER_QUERY = "multi_head_ffn", "multi_head_ffn_over_query"
takes_lists = hasattr(custom_graph_pass, "get_custom_graph_passes")


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, H * d)


def options_for_inductor(**options: Any) -> dict[str, Any]:
    return mhf_compiler.inductor_options({"rewrite": "always", "strict": True, **NO_CPP, **options})


def infer(model: Any = None, given: dict[str, Any] | None = None, **how: Any) -> Counter[str]:
    """Compile with Inductor in inference, compare with the model, and count.

    Args:
        model: what is compiled; a network by default.
        given: the options for Inductor; ours alone by default.
        how: further arguments of ``torch.compile``.
    """
    model, x = model or ProjectedHeads(), tokens()
    how = {"options": options_for_inductor() if given is None else given} | how
    with torch.no_grad(), no_caches():
        torch.testing.assert_close(torch.compile(model, **how)(x), model(x))
    return counted()


def train(model: Any, network: nn.Module, off_by: float = 1e-5, **how: Any) -> Counter[str]:
    """Compile a training step of ``model``, compare the gradients of ``network``, and count."""
    found = []
    with no_caches():
        for call in (torch.compile(model, **how), model):
            call(tokens()).square().sum().backward()
            found.append([p.grad for p in network.parameters()])
            network.zero_grad(set_to_none=True)
    torch.testing.assert_close(*found, rtol=off_by, atol=off_by)
    return counted()


def counted() -> Counter[str]:
    return Counter(counters["flashmhf"])


# What they do.


def test_inference_is_as_under_the_back_end():
    network = ProjectedHeads()
    counts = infer(network)
    assert counts["sites_rewritten"] == counts[OVER_QUERY] == counts["graphs"] == 1
    counters.clear()
    options = {"rewrite": "always", "strict": True} | NO_CPP
    assert infer(network, backend="flashmhf", options=options) == counts


def test_training_is_as_under_the_back_end():
    network = ProjectedHeads()
    counts = train(network, network, options=options_for_inductor())
    assert counts["sites_rewritten"] == counts["multi_head_ffn_backward_over_gradient"] == 1
    assert counts[OVER_QUERY] == 0  # the backward pass reads the queries
    torch.compiler.reset()
    counters.clear()
    options = {"rewrite": "always", "strict": True} | NO_CPP
    assert train(network, network, backend="flashmhf", options=options) == counts


def test_a_checkpoint_is_rewritten_under_the_modes_of_its_call():
    network = ProjectedHeads()

    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(network, x, use_reentrant=False).float()

    seen = Watching()
    options = options_for_inductor(**{PRE_GRAD: seen})
    counts = train(model, network, 0.05, options=options)
    assert counts["sites_rewritten"] == counts["graphs"] == 1
    inner, outer = seen.graphs  # Inductor goes through the inner graph first
    assert OP not in inner
    assert "checkpoint" in outer


def test_a_dynamic_length_stays_dynamic():
    network = ProjectedHeads()
    compiled = torch.compile(network, dynamic=True, options=options_for_inductor())
    with torch.no_grad(), no_caches():
        for length in (6, 9, 13):
            x = torch.randn(2, length, H * d)
            torch.testing.assert_close(compiled(x), network(x))
    assert counted()["graphs"] == counted()["sites_rewritten"] == 1


def test_they_can_be_set_for_every_model():
    with config.patch(options_for_inductor()):
        assert infer(given={})[OVER_QUERY] == 1


def test_what_is_found_is_logged_and_dumped(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    with caplog.at_level(logging.INFO, logger="mhf_compiler"):
        infer(given=options_for_inductor(dump_dir=tmp_path))
    assert any(f": {OVER_QUERY}" in line for line in caplog.messages)
    report = (tmp_path / "graph_0" / "report.txt").read_text()
    assert "1 MH-FFN rewritten" in report
    assert f": {OVER_QUERY}\n" in report


def test_options_of_ours_are_obeyed():
    assert infer(given=options_for_inductor(rewrite="never"))["sites_rewritten"] == 0


def test_the_pass_is_disabled_by_its_name():
    with config.patch(disabled_passes="flashmhf"):
        assert infer()["sites_rewritten"] == 0


# What they are.


def test_they_are_inductors_settings():
    given = {"max_autotune": True, "mode": "reduce-overhead", "rewrite": "always"}
    settings = mhf_compiler.inductor_options(given)
    assert settings["max_autotune"] is True
    assert settings["triton.cudagraphs"] is True
    assert set(settings) <= set(torch._inductor.list_options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewrit": "always"}, "the nearest is 'rewrite'"),
        ({"rewrite": "sometimes"}, "allowed: auto, always, never"),
        ({"fallback": "eager"}, "option 'fallback' is 'eager'; allowed .* 'inductor'"),
    ],
)
def test_options_that_they_do_not_take(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        mhf_compiler.inductor_options(options)


def ours(name: str = PRE_GRAD, **options: Any) -> Any:
    found = mhf_compiler.inductor_options(options)[name]
    return found[0] if takes_lists else found


@pytest.mark.parametrize("name", [PRE_GRAD, POST_GRAD])
def test_their_keys_name_the_package_and_the_options(name: str, monkeypatch: pytest.MonkeyPatch):
    one, same, other = ours(name), ours(name), ours(name, rewrite="never")
    assert one.uuid() == same.uuid()
    assert one.uuid() != other.uuid()
    assert pickle.loads(pickle.dumps(one)) == one == same != other
    monkeypatch.setattr(inductor, "package_hash", lambda: "another version")
    assert ours(name).uuid() != one.uuid()
    assert ours(PRE_GRAD).uuid() != ours(POST_GRAD).uuid()


def test_equal_options_compile_once():
    network, x = ProjectedHeads(), tokens()
    with torch.no_grad(), no_caches():
        for _ in range(2):
            torch.compile(network, options=options_for_inductor())(x)
    assert counters["stats"]["unique_graphs"] == 1


def test_inductors_cache_tells_options_apart():
    """What is found again is counted again: the pass runs before the cache is asked."""
    network, x = ProjectedHeads(), tokens()
    hits = []
    with fresh_cache(), torch.no_grad():
        for rewrite in ("always", "always", "never"):
            torch.compiler.reset()
            counters.clear()
            compiled = torch.compile(network, options=options_for_inductor(rewrite=rewrite))
            torch.testing.assert_close(compiled(x), network(x))
            hits.append(counters["inductor"]["fxgraph_cache_hit"])
            assert counters["inductor"]["fxgraph_cache_bypass"] == 0
            assert counted()["sites_rewritten"] == (rewrite == "always")
    assert hits == [0, 1, 0]


# Passes of users.


class Watching(CustomGraphPass):
    """A pass of the user's."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(str(graph))

    def uuid(self) -> str:
        return "watching"


NAMES = [
    PRE_GRAD,
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    POST_GRAD,
]


@pytest.mark.parametrize("globally", [False, True])
def test_every_pass_of_the_users_runs(globally: bool):
    """All see our op; those after autograd do so before it writes over a dead buffer."""
    passes = {name: Watching() for name in NAMES}
    with config.patch(passes if globally else {}):
        counts = infer(given=options_for_inductor(**({} if globally else passes)))
    assert counts["sites_rewritten"] == counts[OVER_QUERY] == 1
    for one in passes.values():
        (graph,) = one.graphs
        assert OP in graph
        assert OVER_QUERY not in graph


@pytest.mark.skipif(not takes_lists, reason="this PyTorch takes one pass")
@pytest.mark.parametrize("name", [PRE_GRAD, POST_GRAD])
def test_several_passes_of_the_users_run(name: str):
    """Also mere functions, which Inductor has no key for."""
    seen: list[int] = []
    given = [lambda graph: seen.append(1), Watching(), lambda graph: seen.append(2)]
    counts = infer(given=options_for_inductor(**{name: given}))
    assert counts["sites_rewritten"] == counts[OVER_QUERY] == 1
    assert seen == [1, 2]
    assert len(given[1].graphs) == 1
    assert len(given) == 3


def test_where_pytorch_takes_one_pass_it_is_all_of_them(monkeypatch: pytest.MonkeyPatch):
    """Before torch 2.13; that a later one takes such a pass as well makes this a test."""
    monkeypatch.delattr(custom_graph_pass, "get_custom_graph_passes", raising=False)
    watching = {PRE_GRAD: Watching(), POST_GRAD: Watching()}
    settings = options_for_inductor(**watching)
    assert all(isinstance(settings[name], CustomGraphPass) for name in watching)
    assert settings[PRE_GRAD].uuid() is not None
    function = options_for_inductor(**{PRE_GRAD: lambda graph: None})
    assert function[PRE_GRAD].uuid() is None
    again = options_for_inductor(**{name: settings[name] for name in watching})
    assert again == settings
    monkeypatch.undo()
    counts = infer(given=settings)
    assert counts["sites_rewritten"] == counts[OVER_QUERY] == 1
    for one in watching.values():
        (graph,) = one.graphs
        assert OP in graph
        assert OVER_QUERY not in graph


def test_to_add_them_twice_is_to_add_them_once():
    with config.patch(options_for_inductor(rewrite="never")):
        counts = infer(given=options_for_inductor())
    assert counts["graphs"] == counts["sites_rewritten"] == counts[OVER_QUERY] == 1


def test_the_back_end_does_without_them():
    watching = Watching()
    with config.patch(options_for_inductor(**{PRE_GRAD: watching})):
        options = {"rewrite": "always"} | NO_CPP
        counts = infer(backend="flashmhf", options=options)
    assert counts["graphs"] == counts["sites_rewritten"] == counts[OVER_QUERY] == 1
    assert counts["failures"] == 0
    assert len(watching.graphs) == 1


# What goes wrong.


def test_a_fault_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch):
    """Also one after the rewriting."""
    monkeypatch.setattr(compat, "tell_inductor_of", fail)
    watching = Watching()
    with pytest.warns(MhfCompilerWarning, match="compiled as it is: RuntimeError: a fault"):
        counts = infer(given=options_for_inductor(strict=False, **{PRE_GRAD: watching}))
    assert counts["failures"] == counts["failures.rewrite"] == 1
    assert counts["sites_rewritten"] == 0
    assert OP not in watching.graphs[0]


def test_a_fault_outside_of_the_rewriting_is_none_of_the_users(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "tracing_context", fail)
    with pytest.warns(MhfCompilerWarning, match="RuntimeError: a fault"):
        counts = infer(given=options_for_inductor(strict=False))
    assert counts["failures"] == 1


def fail(*arguments: Any) -> None:
    raise RuntimeError("a fault")


def test_strict_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "tell_inductor_of", fail)
    with pytest.raises(Exception, match="a fault"):
        infer()


def test_strict_raises_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    def unreadable(*arguments: Any, **how: Any) -> None:
        raise NotAnalysedError("a mystery")

    monkeypatch.setattr("mhf_compiler.compilation.rewrite_graph", unreadable)
    with pytest.raises(Exception, match="a mystery"):
        infer()


def test_without_the_pass_after_autograd_nothing_is_rewritten():
    """It fixes strides, without which results may be wrong."""
    settings = options_for_inductor(strict=False)
    settings[POST_GRAD] = Watching()
    with pytest.warns(MhfCompilerWarning, match="has lost the pass that fixes strides"):
        counts = infer(given=settings)
    assert counts["sites_rewritten"] == 0
    assert counts["failures.rewrite"] == 1


def test_a_graph_that_dynamo_did_not_make_is_left_alone(caplog: pytest.LogCaptureFixture):
    gm = fx.symbolic_trace(ProjectedHeads())
    before = str(gm.graph)
    with caplog.at_level(logging.INFO, logger="mhf_compiler"):
        ours(rewrite="always", strict=True)(gm.graph)
    assert str(gm.graph) == before
    assert "Dynamo did not make it" in caplog.text
    assert counted()["graphs"] == 1


def test_parts_of_ddps_buckets_are_told_of(monkeypatch: pytest.MonkeyPatch):
    """They are rewritten one by one, and a network that a bucket cuts is not seen."""
    monkeypatch.setattr(compat, "is_part_of_buckets", lambda gm: True)
    with pytest.warns(MhfCompilerWarning, match="set torch._dynamo.config.optimize_ddp = False"):
        counts = infer(given=options_for_inductor(strict=False))
    assert counts["sites_rewritten"] == counts["failures.buckets"] == 1
