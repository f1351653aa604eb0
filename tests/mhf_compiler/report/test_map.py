"""The map: which layers there are, and what became of each."""

from dataclasses import replace

import pytest

from mhf_compiler import SiteReport
from mhf_compiler.patterns import Kind, Reason
from mhf_compiler.report import GraphReport, Module, Work
from mhf_compiler.report.map import Row, map_of

WORK = Work(64, False, 1e9, 1e6, 512.0, rewritten=0.002, original=0.008)
FOUND = SiteReport(module="ffn", module_class="Heads", work=WORK)
MISSED = SiteReport(module="ffn", module_class="Heads", reason=Reason(Kind.DIFFERENT_QUERIES))


def at(path: str | None, site: SiteReport = FOUND) -> SiteReport:
    return replace(site, module=path)


def graph(paths: str, *rewritten: SiteReport, declined: tuple[SiteReport, ...] = ()) -> GraphReport:
    """A graph with modules of these paths."""
    modules = [Module(path, "Class") for path in paths.split()]
    return GraphReport("", "", rewritten=[*rewritten], declined=[*declined], modules=modules)


def drawn(rows: list[Row]) -> list[str]:
    """``layer: block block``, rewritten in brackets, declined with a mark."""
    marks = {"rewritten": "[{}]", "declined": "!{}", "ordinary": "-{}", "other": "{}"}
    return [
        f"{row.path}: {' '.join(marks[block.kind].format(block.name) for block in row.blocks)}"
        for row in rows
    ]


LAYER = "{0} {0}.norm {0}.attention {0}.attention.qkv {0}.ffn {0}.ffn.in_proj"


def test_a_model_is_its_layers_and_a_layer_its_modules():
    paths = f"embedding {LAYER.format('layers.0')} {LAYER.format('layers.1')} head"
    rows = map_of(
        [graph(paths, at("layers.0.ffn"), declined=(at("layers.1.ffn", MISSED),))],
    )
    assert drawn(rows) == [
        ": embedding",
        "layers.0: norm attention [ffn]",
        "layers.1: norm attention !ffn",
        ": head",
    ]
    norm, _, found = rows[1].blocks
    assert (norm.path, norm.module_class, norm.site) == ("layers.0.norm", "Class", None)
    assert found.site is not None
    assert (rows[1].original, rows[1].rewritten, rows[1].hidden_bytes) == (0.008, 0.002, 512.0)
    assert rows[2].original is None


@pytest.mark.parametrize(
    ("paths", "found", "expected"),
    [
        # Layers come in their order, whatever graph they are in.
        ("l.1 l.1.f l.0 l.0.f l.10", ["l.1.f", "l.0.f"], ["l.0: [f]", "l.1: [f]", "l.10: Class"]),
        # A list in a layer is no list of layers if it has one network.
        ("l.0.e.0 l.0.e.1 l.1.e.0", ["l.0.e.0", "l.1.e.0"], ["l.0: [e.0] e.1", "l.1: [e.0]"]),
        ("s.0.b.0 s.0.b.1", ["s.0.b.0", "s.0.b.1"], ["s.0.b.0: [Class]", "s.0.b.1: [Class]"]),
        # Without lists: all in one row; the model itself, or what is no module, after its parts.
        ("norm mixer mixer.ffn", ["mixer.ffn"], [": norm [mixer.ffn]"]),
        ("norm", [None], [": norm [Heads]"]),
        ("", [None], [": [Heads]"]),
        # A module that has one network itself, and one in a module of its own.
        ("a.norm a.ffn", ["a", "a.ffn"], [": a.norm [a.ffn] [a]"]),
        ("norm ffn", [], []),
    ],
)
def test_rows_and_blocks(paths: str, found: list[str | None], expected: list[str]):
    assert drawn(map_of([graph(paths, *map(at, found))])) == expected


def test_a_network_is_a_block_however_often_it_is_called_or_compiled():
    once = graph("ffn", at("ffn"), at("ffn"), at("ffn"))
    (row,) = map_of([once, once])
    (block,) = row.blocks
    assert block.times == 3
    assert row.hidden_bytes == 3 * 512.0
    (shared,) = map_of([graph("a b", replace(FOUND, runs=("a", "b")))])
    assert [one.path for one in shared.blocks] == ["a", "b"]


def test_what_decides_a_near_miss_may_be_a_layer_of_pytorchs_in_the_network():
    """The network is around it; but the layer of a list is more than a network."""
    linear = replace(MISSED, module_class="Linear")
    rows = map_of(
        [
            graph(
                "l.0.ffn.down l.1.down",
                declined=(at("l.0.ffn.down", linear), at("l.1.down", linear)),
            )
        ]
    )
    assert drawn(rows) == ["l.0: !ffn", "l.1: !down"]


def test_times_are_known_for_all_networks_of_a_row_or_not_at_all():
    unknown = replace(FOUND, module="l.0.b", work=replace(WORK, original=None))
    (row,) = map_of([graph("l.0.a l.0.b", at("l.0.a"), unknown)])
    assert row.original is None
    assert row.rewritten == 0.004
