"""The page and the pictures: what is on them, that they need nothing else, and how they behave."""

import itertools
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from corpus.near_miss import NEAR_MISSES
from corpus.positive import POSITIVE
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler import Report
from mhf_compiler.report import Argument, GraphReport, SiteReport
from mhf_compiler.report.dot import DrawingError, Frame, dot_source, frames, render
from mhf_compiler.report.groups import Group, grouped
from mhf_compiler.report.page import difference, overview, page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Model(nn.Module):
    """A site, a graph break, a near-miss."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.missed = (
            POSITIVE["RouterOnHidden"].build(),
            NEAR_MISSES["DifferentQueries"].build(),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.found(x)
        torch._dynamo.graph_break()
        return found, self.missed(x)


@pytest.fixture(scope="module")
def report() -> Report:
    inputs = POSITIVE["RouterOnHidden"].inputs()
    return mhf_compiler.explain(Model(), options={"rewrite": "always"})(*inputs)


class Links(HTMLParser):
    """What a page asks for, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.wanted: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.wanted += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_overview_has_a_row_for_each_line_of_source(report: Report):
    shown = overview(report.graphs)
    assert Links(shown).open == []
    assert shown.count("<tr>") == 4  # two headers, a site, a near-miss
    (site,), (miss,) = report.rewritten, report.declined
    for expected in (site.location, f"{site.sub_networks} x {site.hidden}", miss.location):
        assert f"<td>{expected}</td>" in shown
    assert f"<td>{escape(str(miss.reason))}</td>" in shown
    assert overview([]) == ""


def test_a_page_holds_everything_and_asks_for_nothing(report: Report, tmp_path: Path):
    path = tmp_path / "report.html"
    report.to_html(path)
    text = path.read_text()
    links = Links(text)
    assert links.wanted == []
    assert links.open == []
    assert "url(" not in text
    assert "@import" not in text
    for expected in (
        "1 MH-FFN rewritten, 1 declined, in 2 graphs",
        "positive.py:",
        "found.gate",
        "the gate and the up projection read different inputs",
        "feed both projections of a head from the same query",
        "Ends with a graph break",
        "prefers-color-scheme: dark",
    ):
        assert expected in text, expected


def test_what_a_model_says_is_no_markup():
    note = "<script>alert(1)</script>"
    assert note not in page([GraphReport(note, "&amp;", notes=[note])])


def test_differences_are_marked_line_by_line():
    text = re.sub(
        r"</?span(?! class=\"(add|del)).*?>", "", difference("a = 1\nb = 2", "a = 1\nc = 3")
    )
    plain = re.sub(
        r"<.*?>", "", text.replace('<span class="del">', "DEL").replace("<span class", "ADD")
    )
    assert "  a = 1\n" in plain
    assert "DEL- b = 2" in plain
    assert "+ c = 3" in plain


def test_code_is_shown_where_pygments_is_missing(report: Report, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "pygments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pygments", None)
    monkeypatch.setitem(sys.modules, "pygments.formatters", None)
    assert "torch.ops.mhf_compiler.multi_head_ffn.default(" in page(report.graphs)


# Pictures.


def test_the_region_leads_from_the_arguments_to_the_output(report: Report):
    (site,) = report.rewritten
    names = {node.name for node in site.region}
    assert {node.role for node in site.region} >= {"Q", "K", "U", "V", "R", "out"}
    assert all(source in names for node in site.region for source in node.inputs)
    assert all(not node.inputs for node in site.region if node.role in ("Q", "K", "U", "V", "R"))
    assert any("einsum" in node.call for node in site.region)
    assert not any("sigmoid" in node.call for node in site.region)  # that makes R


def frames_of(report: Report) -> dict[str, Frame]:
    """By what they show: before, after, and the kind of what was declined."""
    groups = [*grouped(report.rewritten), *grouped(report.declined)]
    return {f.title.rpartition(": ")[2]: f for group in groups for f in frames(group)}


def calls(frame: Frame) -> dict[str, str]:
    return {node.role: node.call for node in frame.nodes if node.role}


def test_a_region_in_graphvizs_language(report: Report):
    before = frames_of(report)["before"]
    source = dot_source([before])
    assert source.startswith("digraph sites {")
    assert 'label="K: found.gate" fillcolor="#ffb703"' in source
    assert source.count(" -> ") == sum(len(node.inputs) for node in before.nodes)


def test_after_it_the_op_reads_the_arguments(report: Report):
    after = frames_of(report)["after"]
    assert calls(after)["K"] == "found.gate\n(4, 3, 5, 8)"
    assert calls(after)["out"] == "multi_head_ffn(silu)"
    (op,) = (node for node in after.nodes if node.role == "out")
    assert op.inputs == ("Q", "K", "U", "V", "R")


def test_scales_and_the_residual_are_shown_where_they_are():
    """The residual is added after the op, which is called with the scales."""
    arguments = tuple(Argument(role, role.lower(), (2, 3), "float32") for role in ("Q", "K", "X"))
    site = SiteReport(activation="gelu", arguments=arguments, scales=(0.5, 1.0, 2.0))
    (after,) = frames(Group(site, (None,)))
    named = {node.name: node for node in after.nodes}
    assert named["op"].call == "multi_head_ffn(gelu, k_scale=0.5, out_scale=2)"
    assert named["op"].inputs == ("Q", "K")
    assert (named["out"].role, named["out"].inputs) == ("out", ("op", "X"))


def test_what_offends_is_marked_among_what_is_around(report: Report):
    around = frames_of(report)["declined, DIFFERENT_QUERIES"]
    assert "einsum_1 = einsum(" in calls(around)["offends"]
    shown = " ".join(node.call for node in around.nodes)
    for near in ("missed.gate", "missed.up", "missed.down", "layer_norm", "silu"):
        assert near in shown, near
    (marked,) = (line for line in dot_source([around]).splitlines() if "offends: " in line)
    assert "penwidth=4" in marked


def test_what_is_around_is_what_it_is_made_of_and_what_is_made_of_it():
    """Not the other readers of the same input, nor more than can be read."""
    missed = NEAR_MISSES["DifferentQueries"]
    models = nn.ModuleList(missed.build() for _ in range(30))
    explained = mhf_compiler.explain(lambda x: [model(x) for model in models])(*missed.inputs())
    for number, miss in enumerate(explained.declined):
        weights = [node.call for node in miss.region if node.call.endswith((".gate", ".up"))]
        assert weights, number
        assert all(f".{number}." in name for name in weights), weights
        assert len(miss.region) <= 24


@needs_dot
def test_frames_stand_one_under_the_other(report: Report):
    source = dot_source([*frames_of(report).values()])
    drawn = render(source, "dot").decode()
    boxes = re.findall(r'cluster_\d \{\s*graph \[bb="[\d.]+,([\d.]+),[\d.]+,([\d.]+)"', drawn)
    assert len(boxes) == 3
    for (low, _), (_, high) in itertools.pairwise(boxes):
        assert float(low) > float(high)


@needs_dot
@pytest.mark.parametrize(("name", "start"), [("p.svg", b"<?xml"), ("p.png", b"\x89PNG")])
def test_pictures_are_drawn(report: Report, name: str, start: bytes, tmp_path: Path):
    report.draw(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@needs_dot
def test_the_page_has_pictures_before_and_after_and_of_what_offends(report: Report):
    text = page(report.graphs)
    for named in ("before", "after", "declined, DIFFERENT_QUERIES"):
        assert re.search(rf'<svg role="img" aria-label="[^"]*: {named}"', text), named
    assert text.count("<svg") == 3


def test_without_graphviz_drawing_says_so_and_the_page_lists(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DrawingError, match="needs Graphviz's program dot"):
        report.draw(tmp_path / "p.svg")
    text = page(report.graphs)
    assert "<svg" not in text
    for listed in ("K  found.gate\n", "out  multi_head_ffn(silu)", "offends  einsum_1 = einsum("):
        assert listed in text, listed


def test_what_cannot_be_drawn_is_said(report: Report, tmp_path: Path):
    with pytest.raises(DrawingError, match=r"must end in \.svg, \.png"):
        report.draw(tmp_path / "p.jpeg")
    with pytest.raises(DrawingError, match="nothing to draw"):
        Report().draw(tmp_path / "p.svg")


# In a browser.


def browse(path: Path, *options: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    done = subprocess.run(
        [*command, offline, *options, path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


@needs_chromium
def test_search_hides_what_does_not_match(report: Report, tmp_path: Path):
    """By keyboard: a slash goes to the field, Escape empties it."""
    path = tmp_path / "report.html"
    driver = """<script>
      const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
      press("/");
      const log = [document.activeElement === box];
      box.value = "Different Inputs";
      box.dispatchEvent(new Event("input"));
      log.push(sections.filter(section => !section.hidden).length, count.textContent);
      press("Escape");
      log.push(sections.filter(section => section.hidden).length);
      log.push([...document.querySelectorAll("summary")].every(found => found.tabIndex === 0));
      document.title = JSON.stringify(log);
    </script></body>"""
    path.write_text(page(report.graphs).replace("</body>", driver))
    found = re.search(r"<title>(.*?)</title>", browse(path, "--dump-dom"))
    assert found is not None
    assert found[1] == '[true,1,"1 of 4 shown",0,true]'


@needs_chromium
def test_dark_and_light_are_readable(report: Report, tmp_path: Path):
    """The background follows the reader's setting."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "report.html"
    report.to_html(path)
    corners = []
    for number in (0, 1):  # dark, light
        shot = tmp_path / f"{number}.png"
        browse(path, f"--blink-settings=preferredColorScheme={number}", f"--screenshot={shot}")
        corners.append(image.open(shot).convert("L").getpixel((3, 3)))
    assert corners[0] < 60
    assert corners[1] > 240
