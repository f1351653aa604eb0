"""Paths of modules in one expression, and in a sentence that says of how many."""

from itertools import product

import pytest

from mhf_compiler.report.paths import compressed, coverage


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], ""),
        (["ffn"], "ffn"),
        (["layers.3.ffn"], "layers.3.ffn"),
        ([f"layers.{n}.ffn" for n in range(24)], "layers.{0-23}.ffn"),
        ([f"layers.{n}.ffn" for n in (0, 1, 2, 5, 8, 9)], "layers.{0-2,5,8,9}.ffn"),
        ([f"{n}.ffn" for n in range(3)], "{0-2}.ffn"),
        (
            [f"{a}.stages.{b}.{c}" for a, b, c in product((0, 2), range(3), range(2))],
            "{0,2}.stages.{0-2}.{0,1}",
        ),
        (["a.0.0", "a.0.1", "a.1.0"], "a.0.{0,1}, a.1.0"),
        (["layers.1.x", "layers.1.y", "layers.2.x"], "layers.{1,2}.x, layers.1.y"),
        (["blocks.01", "blocks.02"], "blocks.01, blocks.02"),  # names, not places in a list
    ],
)
def test_numbers_are_ranges(paths: list[str], text: str):
    assert compressed(paths) == text


LAYERS = [f"layers.{n}" for n in range(24)]


def test_layers_in_no_graph_count():
    counts = {f"{layer}.ffn": 1 for layer in LAYERS[1:22]}
    (one,) = coverage(counts, LAYERS[:22], ["layers.22.ffn", "layers.23.ffn", "others.0.ffn"])
    where = "layers.{1-21}.ffn: 21 of 24 layers"
    assert str(one) == f"{where} (not layers.0; layers.{{22,23}} are in no graph)"


@pytest.mark.parametrize(
    ("counts", "known", "sentences"),
    [
        ({f"{layer}.ffn": 1 for layer in LAYERS}, LAYERS, ["layers.{0-23}.ffn: all 24 layers"]),
        (
            {f"{layer}.ffn": 1 for layer in LAYERS[1:]},
            LAYERS,
            ["layers.{1-23}.ffn: 23 of 24 layers (not layers.0)"],
        ),
        ({"layers.2.ffn": 1}, LAYERS[:3], ["layers.2.ffn: 1 of 3 layers (not layers.{0,1})"]),
        ({"ffn": 3}, ["ffn", "norm"], ["ffn: 3 times"]),
        ({"ffn": 1}, ["ffn"], ["ffn"]),
        ({"layers.0": 2, "layers.1": 2}, [], ["layers.{0,1}: all 2 layers, 2 times each"]),
        ({"layers.0": 2, "layers.1": 1}, [], ["layers.{0,1}: all 2 layers, several times"]),
        ({"0.ffn": 1, "1.ffn": 1}, ["0", "1", "2"], ["{0,1}.ffn: 2 of 3 modules (not 2)"]),
        # A list in a list has no name of its own; what holds others of the networks is not missing.
        (
            {"0.b.0.0": 1, "0.b.0.1": 1, "0.b.1.0": 1, "0.b.1.1": 1, "1": 1},
            ["0", "1"],
            ["0.b.{0,1}.{0,1}: all 4 modules", "1"],
        ),
    ],
)
def test_a_sentence_says_of_how_many(
    counts: dict[str, int], known: list[str], sentences: list[str]
):
    assert [str(one) for one in coverage(counts, known)] == sentences
