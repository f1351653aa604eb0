"""Reports as values: what they sum up and how they are printed."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

import mhf_compiler.report
from mhf_compiler import Report, SiteReport
from mhf_compiler.patterns import Kind, Location, Reason
from mhf_compiler.report import Argument, GraphBreak, GraphReport, Operation, Work
from mhf_compiler.report.groups import grouped

KEYS = Path(__file__).parents[3] / "docs" / "report.md"
HERE = Location("model.py", 12, "forward", "return hidden @ self.down")
SITE = SiteReport(
    heads=4,
    groups=4,
    head_dim=8,
    sub_networks=3,
    hidden=5,
    activation="silu",
    gated=True,
    routed=True,
    location=HERE,
)
MISS = SiteReport(location=HERE, reason=Reason(Kind.DIFFERENT_QUERIES))


def test_a_report_sums_up_its_graphs():
    first = GraphReport(before="a", after="b", rewritten=[SITE, SITE])
    second = GraphReport(before="c", after="c", declined=[MISS])
    report = Report([first, second])
    assert report.rewritten == [SITE, SITE]
    assert report.declined == [MISS]
    assert report.graph_before == "a\n\nc"
    assert report.graph_after == "b\n\nc"


@pytest.mark.parametrize(
    ("rewritten", "declined", "graphs", "line"),
    [
        (0, 0, 1, "0 MH-FFNs rewritten, 0 declined, in 1 graph"),
        (1, 0, 1, "1 MH-FFN rewritten, 0 declined, in 1 graph"),
        (2, 1, 3, "2 MH-FFNs rewritten, 1 declined, in 3 graphs"),
    ],
)
def test_the_first_line_counts(rewritten: int, declined: int, graphs: int, line: str):
    full = GraphReport("", "", rewritten=[SITE] * rewritten, declined=[MISS] * declined)
    report = Report([full, *(GraphReport("", "") for _ in range(graphs - 1))])
    assert str(report).splitlines()[0] == line


def test_a_site_in_one_line():
    assert str(SITE) == "model.py:12: 4 heads of width 8, 3 x 5 hidden units, silu"


def test_a_near_miss_in_one_line():
    assert str(MISS) == "model.py:12: sizes unknown"


def test_a_site_without_a_source_line():
    assert str(SiteReport()) == "unknown source: sizes unknown"
    assert "  unknown  " in str(Report([GraphReport("", "", rewritten=[SiteReport()])]))


def test_columns_are_aligned():
    far = Location("a/long/way/to/model.py", 1234, "forward", "")
    sites = [SITE, SiteReport(**{**vars(SITE), "location": far, "heads": 128, "groups": 2})]
    _, rows = str(Report([GraphReport("", "", rewritten=sites)])).split("Rewritten\n")
    header, *others = rows.split("\n\n")[0].splitlines()
    for name, cells in (
        ("heads", ["4", "128 (2 groups)"]),
        ("hidden units", ["silu(gate) * up"] * 2),
    ):
        column = header.index(name)
        for row, cell in zip(others, cells, strict=True):
            assert row[column:].startswith(cell)
            assert row[column - 1] == " "


@pytest.mark.parametrize("kind", Kind)
def test_every_reason_is_printed_with_its_detail_and_a_remedy(kind: Kind):
    site = SiteReport(location=HERE, reason=Reason(kind, "so it is"))
    text = str(Report([GraphReport("", "", declined=[site])]))
    assert f"{kind.sentence} (so it is)" in text
    assert kind.remedy in text
    assert kind.remedy


def test_notes_are_printed_at_the_end():
    text = str(Report([GraphReport("", "", rewritten=[SITE], notes=["something else"])]))
    assert text.endswith("\n\nsomething else")


# What is known of a site.

WORK = Work(64, False, 2.5e9, 1.25e6, 512.0, 1024.0, rewritten=0.002, original=0.008)
FULL = replace(
    SITE,
    module="layers.0",
    module_class="Heads",
    formula="sum over e of R[e] * (silu(Q K[e]^T) * (Q U[e]^T)) V[e]",
    arguments=(
        Argument("Q", "q_1", (2, "s0", 4, 8), "float32", HERE),
        Argument("K", "layers.0.gate", (4, 3, 5, 8), "float32"),
    ),
    lowered=("the op", "its kernel"),
    work=WORK,
)


def printed(*sites: SiteReport) -> str:
    return str(Report([GraphReport("", "", rewritten=list(sites))]))


def test_a_rewritten_site_is_printed_with_all_that_is_known_of_it():
    text = printed(FULL)
    for row in (
        "module      layers.0 (Heads)",
        f"formula     {FULL.formula}",
        "Q           q_1  (2, s0, 4, 8) float32",
        "K           layers.0.gate  (4, 3, 5, 8) float32",
        "lowered to  the op; its kernel",
        "estimate    2 ms instead of 8 ms (75% less)",
    ):
        assert f"\n    {row}" in text
    assert "2.5 GFLOP and 1.25 MB forward for 64 tokens; 512 B of hidden units" in text
    assert "return hidden @ self.down" in text


def test_more_time_is_not_printed_as_a_saving():
    slower = replace(FULL, work=replace(WORK, rewritten=0.012))
    assert "12 ms instead of 8 ms (50% more)" in printed(slower)


def test_totals_are_of_all_calls_and_rows_of_each():
    """Of a network that is called three times, and of one whose weights are copied."""
    k = replace(FULL.arguments[1], tensors=("up.0", "up.1"), copied_bytes=480.0)
    other = replace(FULL, module="head", activation="gelu", arguments=(k,))
    report = Report([GraphReport("", "", rewritten=[replace(FULL, runs=("ffn",) * 3), other])])
    totals = report.totals
    assert (totals.calls, totals.hidden_bytes, totals.kept_bytes) == (4, 2048.0, 4096.0)
    assert (totals.original, totals.copied_bytes) == (0.032, 480.0)
    text = str(report)
    assert (
        "\n  in all: 2.05 kB of hidden units not stored, 4.1 kB not kept for the backward pass, "
        "an estimated 8 ms instead of 32 ms (75% less), 480 B of weights copied\n"
    ) in text
    assert text.count("estimate    each 2 ms instead of 8 ms") == 1
    assert text.count("estimate    2 ms instead of 8 ms") == 1
    assert "copied      K from 2 tensors (480 B), at every call; to avoid it, keep them in" in text


def test_what_is_declined_says_what_it_takes_and_would_take():
    """Of a network that is called twice, and of a near-miss, which is none that is known."""
    left = replace(FULL, reason=Reason(Kind.DOES_NOT_PAY), runs=("ffn",) * 2, lowered=())
    near_miss = SiteReport(reason=Reason(Kind.DIFFERENT_QUERIES), module="head")
    graph = GraphReport("", "", declined=[left, near_miss])
    text = str(Report([graph]))
    assert "\n  declined (1 of 2): an estimated 16 ms as they are, 4 ms as ops\n" in text
    assert "512 B of hidden units would not" in text
    assert "estimate    each would take 2 ms instead of 8 ms (75% less)" in text
    page = Report([graph])._repr_html_()
    assert "estimated: 8 ms, as an op 2 ms" in page
    assert "16 ms as they are, 4 ms as ops" in page
    alone = str(Report([GraphReport("", "", declined=[near_miss])]))
    assert "estimated" not in alone
    assert "estimate " not in alone


def test_totals_of_an_unknown_device_have_no_times():
    unknown = replace(FULL, work=replace(WORK, rewritten=None, original=None))
    report = Report([GraphReport("", "", rewritten=[FULL, unknown])])
    assert report.totals.rewritten is None
    assert "estimated" not in str(report)


def test_dynamic_numbers_of_tokens_are_marked():
    assert "for 64 tokens (dynamic)" in printed(replace(FULL, work=replace(WORK, dynamic=True)))


def in_layer(number: int) -> SiteReport:
    q, k = FULL.arguments
    name = f"layers.{number}.gate"
    arguments = (replace(q, name=f"q_{number}"), replace(k, name=name, tensors=(name,)))
    return replace(FULL, module=f"layers.{number}", arguments=arguments)


def test_layers_of_one_kind_are_printed_once():
    text = printed(*map(in_layer, range(3)))
    assert text.startswith("3 MH-FFNs rewritten")
    assert text.count("formula") == 1
    assert "module      layers.{0-2} (Heads)" in text
    assert "\n  layers.{0-2}: all 3 layers\n" in text
    assert "modules     layers.0, layers.1, layers.2\n" in text  # which can be searched for


@pytest.mark.parametrize(
    ("modules", "where"),
    [
        (("layers.0", "layers.1"), "layers.{0,1}"),
        (("ffn", "ffn"), "ffn, 2 times"),
        ((None, None, None), "3 times"),
    ],
)
def test_near_misses_of_one_kind_are_printed_once(modules: tuple[str | None, ...], where: str):
    """Their operations differ only in the numbers that the graph gives them."""
    misses = [
        replace(MISS, module=module, operation=Operation(f"mul_{n}", f"mul_{n} = a * b", HERE))
        for n, module in enumerate(modules)
    ]
    text = str(Report([GraphReport("", "", declined=misses)]))
    assert f"{len(modules)} declined" in text
    assert text.count("what to do") == 1
    assert f"module      {where}\n" in text


def test_near_misses_of_different_lines_are_printed_each():
    other = replace(MISS, location=replace(HERE, line=13))
    text = str(Report([GraphReport("", "", declined=[MISS, other])]))
    assert text.count("what to do") == 2


@pytest.mark.parametrize(
    ("order", "numbers"),
    [
        ("aab", ("0, 1", "2")),
        ("aaaab", ("0-3", "4")),
        ("abab", ("0, 2", "1, 3")),
        ("abababababab", ("0, 2, 4, 6 and 2 more", "1, 3, 5, 7 and 2 more")),
    ],
)
def test_sites_are_numbered_in_the_order_of_the_report(order: str, numbers: tuple[str, ...]):
    kinds = {"a": SITE, "b": replace(SITE, activation="gelu")}
    groups = grouped([kinds[kind] for kind in order])
    assert tuple(group.numbered for group in groups) == numbers
    (first, *_) = printed(*(kinds[kind] for kind in order)).split("  source ")[1].splitlines()[1:]
    assert first.startswith(f"  {numbers[0]}  ")


def test_layers_that_differ_are_printed_each():
    assert printed(in_layer(0), replace(in_layer(1), activation="gelu")).count("formula") == 2


def test_an_operation_that_decides_is_printed_with_its_line():
    operation = Operation("mul", "mul = matmul_1.clamp(max=1)", HERE, "layers.0")
    site = replace(MISS, operation=operation)
    text = str(Report([GraphReport("", "", declined=[site])]))
    assert "operation   model.py:12: mul = matmul_1.clamp(max=1)\n" in text


def test_graph_breaks_are_printed_with_their_lines():
    graph = GraphReport("", "", rewritten=[SITE], graph_break=GraphBreak("print was called", HERE))
    text = str(Report([GraphReport("", ""), graph]))
    assert text.endswith("Graph breaks\n  after graph 1, at model.py:12: print was called")


def test_long_lists_of_products_are_cut():
    products = [Operation(f"linear_{n}", f"linear_{n} = linear(x)") for n in range(40)]
    text = str(Report([GraphReport("", "", operations=90, products=products)]))
    assert "linear_0 = linear(x)" in text
    assert text.endswith("\n  and 28 more")


# Other forms.


def full_report() -> Report:
    miss = replace(MISS, operation=Operation("a", "a = b", HERE))
    return Report(
        [
            GraphReport("a", "b", rewritten=[FULL], declined=[miss]),
            GraphReport("c", "c", products=[miss.operation], graph_break=GraphBreak("why", HERE)),
        ]
    )


def test_json_holds_the_whole_report(tmp_path: Path):
    report = full_report()
    text = report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(text)
    assert json.loads(text) == report.to_dict()
    (site,), (miss,) = (report.to_dict()["graphs"][0][key] for key in ("rewritten", "declined"))
    assert site["arguments"][1]["name"] == "layers.0.gate"
    assert site["work"]["flops"] == 2.5e9
    assert site["location"] == {**vars(HERE)}
    assert miss["reason"] == {
        "kind": "DIFFERENT_QUERIES",
        "sentence": Kind.DIFFERENT_QUERIES.sentence,
        "detail": "",
        "remedy": Kind.DIFFERENT_QUERIES.remedy,
    }


def test_every_key_is_documented():
    """The tables of docs/report.md name each field of each value, and no other."""
    text = KEYS.read_text()
    for name, value in vars(mhf_compiler.report).items():
        if is_dataclass(value) and name not in ("Coverage", "Totals"):
            section = text.split(f"### {name}\n")[1].split("\n### ")[0]
            documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
            expected = [entry.name for entry in fields(value)]
            extra = {"Report": ["schema"], "Reason": ["sentence", "detail", "remedy"]}.get(name, [])
            if name == "Reason":
                expected = ["kind"]
            assert sorted(documented) == sorted([*expected, *extra]), name
    assert f"`schema` | {mhf_compiler.report.SCHEMA}" in text


def test_notebooks_and_prompts_show_a_report():
    report = full_report()
    assert repr(report) == "<Report: 1 MH-FFN rewritten, 1 declined, in 2 graphs>"
    shown = report._repr_html_()
    assert shown.startswith("<p><strong>1 MH-FFN rewritten")
    assert shown.count('<table class="overview">') == 2
    assert "return hidden @ self.down" in shown
    assert "<module>" not in Report([GraphReport("", "", notes=["<module>"])])._repr_html_()
