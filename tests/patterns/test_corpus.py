"""The corpus: what is found in each model, and that the compiled model computes the same."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.cases import TOKENS, B, Case, E, H, L, d
from corpus.harness import OPTIONS, assert_compiled_right
from corpus.near_miss import NEAR_MISSES
from corpus.positive import POSITIVE, Einsum
from torch import nn

import mhf_compiler
from mhf_compiler import SiteReport
from mhf_compiler.compat import counters

CORPUS = Path(__file__).parents[1] / "corpus"

positive = pytest.mark.parametrize("case", POSITIVE.values(), ids=POSITIVE)
near_miss = pytest.mark.parametrize("case", NEAR_MISSES.values(), ids=NEAR_MISSES)

# Of complex numbers in modules, which PyTorch calls new.
pytestmark = pytest.mark.filterwarnings("ignore:Complex modules")


def assert_points_into(file: str, sites: list[SiteReport]) -> None:
    """Every location is a line of the model's source, or of what models share."""
    for site in sites:
        assert site.location is not None
        assert site.location.file in (str(CORPUS / file), str(CORPUS / "cases.py"))
        lines = Path(site.location.file).read_text().splitlines()
        assert lines[site.location.line - 1].strip() in site.location.code


@positive
def test_every_site_is_found_and_computes_the_same(case: Case):
    report = assert_compiled_right(case)
    found = [asdict(site) for site in report.rewritten]
    assert [
        {name: site[name] for name in expected}
        for site, expected in zip(found, case.sites, strict=True)
    ] == list(case.sites)
    assert report.declined == []
    assert_points_into("positive.py", report.rewritten)
    assert counters["flashmhf"]["sites_rewritten"] == len(case.sites)


@pytest.mark.parametrize("name", ["RouterInsideLastEinsum", "RouterByEinsum"])
def test_einsums_contracted_in_another_order(name: str, monkeypatch: pytest.MonkeyPatch):
    """As where opt_einsum is installed, which is asked for the cheapest order."""
    pytest.importorskip("opt_einsum")
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", True)
    monkeypatch.setattr(torch.backends.opt_einsum, "strategy", "optimal")
    assert len(assert_compiled_right(POSITIVE[name]).rewritten) == 1


@pytest.mark.parametrize("name", [n for n in POSITIVE if n.startswith("RepeatedQueries")])
def test_repetitions_of_symbolic_sizes(name: str):
    case = POSITIVE[name]
    (x,) = case.inputs()
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    options = OPTIONS | {"verify": True}
    report = mhf_compiler.explain(case.build(), options=options)(x.requires_grad_())
    assert report.declined == []
    assert [site.sub_networks for site in report.rewritten] == [E]


@near_miss
def test_near_misses_are_declined_with_the_reason_and_compute_the_same(case: Case):
    # AOTAutograd is left out: it would trace, and train, what stays Dynamo's graph.
    report = assert_compiled_right(case, fallback="eager")
    left = [*report.declined, *report.ordinary]
    assert_points_into("near_miss.py", left)
    if not case.either:
        assert report.rewritten == []
        assert counters["flashmhf"]["sites_rewritten"] == 0
        assert sorted(s.reason.kind.name for s in left if s.reason) == sorted(
            kind.name for kind in case.kinds
        )


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_there_is_one_site_a_layer(layers: int):
    model = nn.Sequential(*(Einsum() for _ in range(layers)))
    report = mhf_compiler.explain(model, options=OPTIONS)(torch.randn(TOKENS))
    assert len(report.rewritten) == layers
    assert report.declined == []


# More spellings are trained with such sizes in tests/models/test_dynamic.py.
@pytest.mark.parametrize("name", ["Published-heads first", "RouterOnHidden"])
def test_dynamic_batch_and_length(name: str):
    """Sizes that change cost no more graphs than without the back end, and are rewritten."""
    case = POSITIVE[name]
    model = nn.Sequential(nn.Linear(H * d, H * d), case.build())
    batches = [torch.randn(B + n, L + 5 * n, H * d) for n in range(3)]

    def graphs(**how: Any) -> int:
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(model, dynamic=True, **how)
        for x in batches:
            y = compiled(x)
            if how["backend"] == "flashmhf":
                torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        return counters["stats"]["unique_graphs"]

    alone = graphs(backend="aot_eager")
    assert graphs(backend="flashmhf", options=OPTIONS) == alone
    assert counters["flashmhf"]["sites_rewritten"] == alone * len(case.sites)
    assert counters["flashmhf"]["sites_declined"] == 0
