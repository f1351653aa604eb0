"""Reports as values: what they sum up and how they are printed."""

import pytest

from mhf_compiler import Report, SiteReport
from mhf_compiler.patterns import Kind, Location, Reason
from mhf_compiler.report import GraphReport

HERE = Location("model.py", 12, "forward", "return hidden @ self.down")
SITE = SiteReport(
    heads=4,
    kuv_heads=4,
    head_dim=8,
    experts=3,
    expert_dim=5,
    activation="silu",
    gated=True,
    has_gate=True,
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
    sites = [SITE, SiteReport(**{**vars(SITE), "location": far, "heads": 128, "kuv_heads": 2})]
    _, rows = str(Report([GraphReport("", "", rewritten=sites)])).split("Rewritten\n")
    header, *others = rows.splitlines()
    for name, cells in (("heads", ["4", "128 (2 kuv)"]), ("hidden units", ["silu(gate) * up"] * 2)):
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
