"""The figures in the documentation are those that were measured, and `auto` is what it is today."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import grid, results
from mhf_compiler.lowering.cost import estimate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results" / "README.md"
AUTO = {(True, True): "both", (True, False): "inference", (False, False): "neither"}


def measured(name: str) -> list[dict[str, Any]]:
    return results.read(ROOT / "benchmarks" / "results" / f"{name}.json")[1]


def table(page: Path, header: str, number: int = 0) -> list[list[str]]:
    """The rows of the numbered table whose header begins so."""
    found = re.findall(
        rf"^\| {re.escape(header)}.*\n\|[-|]*\n((?:\|.*\n)+)", page.read_text(), re.M
    )
    rows = found[number].replace("**", "").splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def same(shown: str, exact: float) -> bool:
    """Whether a number is shown to as many digits as it has."""
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - exact) <= 0.5001 * 10**-digits


@pytest.mark.parametrize(
    ("page", "header"),
    [
        (ROOT / "README.md", "one FFN of the paper's 1.3B model on an H200"),
        (ROOT / "docs" / "index.md", "one FFN of the paper's 1.3B model on an H200"),
        (PAGE, "| forward, ms | peak, MiB |"),
    ],
    ids=["README", "index", "benchmarks"],
)
def test_the_whole_ffn(page: Path, header: str):
    exact = {(row["contender"], row["phase"]): row for row in measured("h200_ffn")}
    for name, *cells in table(page, header):
        name = re.sub(r" over sub-networks| `?einsum`?| of the same size", "", name)
        forward, training = (exact[name, phase] for phase in ("forward", "training"))
        wanted = [x[key] for x in (forward, training) for key in ("ms", "peak_mib")]
        assert all(map(same, cells, wanted)), name


@pytest.mark.parametrize(
    ("page", "header"),
    [(PAGE, "tokens | flashmhf, loop, us"), (RESULTS, "tokens | flashmhf, loop")],
    ids=["benchmarks", "results"],
)
def test_decoding(page: Path, header: str):
    exact = {(row["B"], row["contender"]): row["ms"] * 1e3 for row in measured("h200_ffn-tokens")}
    names = "flashmhf, loop", "flashmhf, batched", "Inductor, loop", "Inductor, batched"
    rows = table(page, header)
    assert len(rows) == 6
    for tokens, *cells in rows:
        for name, cell in zip((*names, "SwiGLU, Inductor"), cells, strict=True):
            assert same(cell, exact[int(tokens), name]), (tokens, name)


@pytest.mark.parametrize(
    "page", [PAGE, ROOT / "docs" / "kernels.md"], ids=["benchmarks", "kernels"]
)
def test_decoding_with_the_op_alone(page: Path):
    rows = measured("h200_kernels-tokens")
    exact = {row["B"]: row for row in rows if row["contender"] == "forward, as called"}
    (_, *times), (_, *rates) = table(page, "tokens | 1 | 4 | 16 | 64 | 128 | 256 |")
    assert all(map(same, times, (row["ms"] * 1e3 for row in exact.values())))
    assert all(map(same, rates, (row["gb_per_s"] for row in exact.values())))


@pytest.mark.parametrize("page", [PAGE, RESULTS], ids=["benchmarks", "results"])
def test_small_steps(page: Path):
    exact: dict[tuple[int, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in measured("h200_ffn-steps"):
        shape = row["B"], row["L"], row["H"], row["d"]
        exact.setdefault(shape, {})[row["launched"], row["contender"]] = row
    rows = table(page, "tokens, heads x width")
    assert len(rows) == len(exact)
    for sizes, *cells in rows:
        here = exact[tuple(map(int, re.split(r" x |, ", sizes)))]
        rivals = "Inductor, loop", "flashmhf, loop"
        wanted = [here[how, name]["ms"] for how in ("calls", "CUDA graphs") for name in rivals]
        wanted += [here["calls", name]["peak_mib"] for name in rivals]
        assert all(same(*pair) for pair in zip(cells, wanted, strict=True)), sizes


def test_whole_models():
    mib = {"GiB": 1024, "MiB": 1}
    rows = measured("h200_blocks") + measured("h200_blocks-training")
    exact = {(row["phase"], row["L"], row["contender"]): row for row in rows}
    shown = table(PAGE, "| FlashMHF, flashmhf | SwiGLU, Inductor")
    assert len(shown) == 3
    for case, *cells in shown:
        phase, length = re.fullmatch(r"(inference|training).*, 8 x (\d+) tokens", case).groups()
        for name, cell in zip(
            ("FlashMHF, flashmhf", "SwiGLU, Inductor", "SwiGLU, eager"), cells, strict=True
        ):
            row = exact[phase, int(length), name]
            time, peak, unit = re.fullmatch(r"(\d+) ms, ([\d.]+) (\w+)", cell).groups()
            assert same(time, row["ms"]), (case, name)
            assert same(peak, row["peak_mib"] / mib[unit]), (case, name)


def test_a_network_for_each_token():
    exact: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measured("h200_per-token"):
        case = f"{row['T']} x {row['d']}, {row['f']}, {row['B']}, {row['phase']}"
        exact.setdefault(case, {})[row["contender"]] = row
    rows = table(PAGE, "tokens x width, hidden units, batch")
    assert len(rows) == len(exact)
    for case, *cells in rows:
        here = exact[case]
        rivals = here["flashmhf always"], here["Inductor"]
        wanted = [row["busy_us"] for row in (*rivals, here["products alone"])]
        wanted += [row[key] for key in ("ms", "peak_mib") for row in rivals]
        assert all(same(*pair) for pair in zip(cells, wanted, strict=True)), case


@pytest.mark.parametrize(
    ("number", "name", "device", "dtype", "weights"),
    [
        (0, "h200_grid", "cuda:63", "bfloat16", "together"),
        (1, "h200_grid", "cuda:63", "bfloat16", "separate"),
        (2, "cpu_grid", "cpu", "float32", "together"),
    ],
    ids=["h200", "a module for each head", "cores"],
)
def test_the_network_alone(
    number: int,
    name: str,
    device: str,
    dtype: str,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
):
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: h200)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # as where the CPU's was measured
    about = {"weights": weights, "dtype": dtype}
    points = [row for row in measured(name) if about.items() <= row.items()]
    points = [row for row in points if row["B"] < 64]  # steps of 64 sequences are not shown
    for sizes, tokens, *cells, auto in table(PAGE, "heads x width, sub-networks x hidden", number):
        shape = tuple(map(int, re.split(r" x |, ", sizes)))
        here = [
            row
            for row in points
            if (row["H"], row["d"], row["E"], row["f"]) == shape
            and row["B"] * row["L"] == int(tokens)
        ]
        pays, shown = [], []
        for phase in ("forward", "training"):
            (op,) = (x for x in here if x["phase"] == phase and x["contender"] == "op")
            rivals = [x for x in here if x["phase"] == phase and x["contender"] != "op"]
            best = min(rivals, key=lambda row: float(row["ms"]))
            pays.append(estimate(grid.workload(op, device)).pays)
            shown.append([best["ms"], op["ms"]])
        shown.append([best["peak_mib"], op["peak_mib"]])
        for cell, exact in zip(cells, shown, strict=True):
            assert all(map(same, cell.split(", "), exact)), (sizes, tokens, cell)
        assert auto == AUTO[pays[0], pays[1]], (sizes, tokens)
