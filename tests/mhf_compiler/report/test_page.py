"""The page and the pictures: what is on them, that they need nothing else, and how they behave."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.near_miss import NEAR_MISSES
from corpus.positive import POSITIVE
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler import Report
from mhf_compiler.report import Argument, GraphReport, Module, SiteReport
from mhf_compiler.report.dot import DrawingError, Frame, dot_source, frames, render
from mhf_compiler.report.groups import Group, grouped
from mhf_compiler.report.page import nearby, notebook, overview, page

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
    for expected in (
        nearby(str(site.location)),
        f"{site.sub_networks} x {site.hidden}",
        nearby(str(miss.location)),
    ):
        assert f"<td>{expected}</td>" in shown
    assert f"<td>{escape(str(miss.reason))}</td>" in shown
    assert overview([]) == ""


def test_a_page_holds_everything_and_asks_for_nothing(report: Report, tmp_path: Path):
    path = tmp_path / "report.html"
    report.to_html(path)
    text = path.read_text()
    links = Links(text)
    assert all(wanted.startswith("#") for wanted in links.wanted)  # from the map to the cards
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
        "<dd><span>Model</span></dd>",
        f"<span>PyTorch {torch.__version__}</span>",
    ):
        assert expected in text, expected


def test_what_a_model_says_is_no_markup():
    note = "<script>alert(1)</script>"
    assert note not in page([GraphReport(note, "&amp;", notes=[note])])


def test_paths_of_files_are_those_from_the_working_directory(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (site,) = report.rewritten
    assert site.location is not None
    folder = Path(site.location.file).parent
    monkeypatch.chdir(tmp_path)
    assert str(folder) in page(report.graphs)
    monkeypatch.chdir(folder)
    assert str(folder) not in page(report.graphs)
    assert nearby(f"/other{folder}/a.py and {folder}/b.py") == f"/other{folder}/a.py and b.py"
    packages = "/env/lib/python3.12/site-packages/torch/nn/functional.py:3 in rms_norm"
    assert nearby(packages) == "torch/nn/functional.py:3 in rms_norm"


def test_a_notebook_has_the_map_and_the_overview(report: Report):
    shown = notebook(report.graphs)
    assert Links(shown).open == []
    assert Links(shown).wanted == []
    for expected in (overview(report.graphs), 'class="mhf-block mhf-rewritten"', ".mhf-map {"):
        assert expected in shown
    assert "<script" not in shown


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
    assert re.search(r'label="R: \w+ = \w+"', source)  # it is computed outside
    assert 'label="einsum(blhd,hedf->blhef)"' in source  # edges say of what
    assert 'label="silu"' in source
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


def test_one_site_is_drawn_by_its_number(report: Report, tmp_path: Path):
    report.draw(tmp_path / "all.dot")
    report.draw(tmp_path / "one.dot", site=0)
    drawn = {name: (tmp_path / f"{name}.dot").read_text() for name in ("all", "one")}
    assert drawn["all"].count("subgraph") == 3
    assert drawn["one"].count("subgraph") == 2
    assert "offends" not in drawn["one"]
    for site in (1, -1):
        with pytest.raises(DrawingError, match=f"site is {site}, must be in 0 to 0"):
            report.draw(tmp_path / "p.svg", site=site)
    with pytest.raises(DrawingError, match="site is 0, but no MH-FFN was rewritten"):
        Report().draw(tmp_path / "p.svg", site=0)


def test_a_picture_of_several_layers_has_the_names_that_they_share():
    argument = Argument("K", "layers.0.ffn.gate", (2, 3), "float32")
    site = SiteReport(module="layers.0.ffn", activation="silu", arguments=(argument,))
    (after,) = frames(Group(site, ("layers.0.ffn", "layers.1.ffn")))
    assert calls(after)["K"] == "gate\n(2, 3)"
    (alone,) = frames(Group(site, ("layers.0.ffn",)))
    assert calls(alone)["K"] == "layers.0.ffn.gate\n(2, 3)"


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
    with pytest.raises(DrawingError, match=r"needs Graphviz's program dot.*p\.dot -o .*p\.svg"):
        report.draw(tmp_path / "p.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["p.dot"]
    report.draw(tmp_path / "wanted.dot")  # needs no program
    assert (tmp_path / "p.dot").read_text() == (tmp_path / "wanted.dot").read_text()
    text = page(report.graphs)
    assert "<svg" not in text
    assert "drawing needs Graphviz" in text
    assert "apt install graphviz" in text
    for listed in ("K  found.gate\n", "out  multi_head_ffn(silu)", "offends  einsum_1 = einsum("):
        assert listed in text, listed


def test_without_graphviz_only_files_of_ours_are_overwritten(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "theirs.dot").write_text("digraph {}")
    for name in ("theirs", "ours", "ours"):
        with pytest.raises(DrawingError, match="apt install graphviz") as raised:
            report.draw(tmp_path / f"{name}.png")
        assert ("ours.dot" in str(raised.value)) == (name == "ours")
    assert (tmp_path / "theirs.dot").read_text() == "digraph {}"


def test_what_cannot_be_drawn_is_said(report: Report, tmp_path: Path):
    with pytest.raises(DrawingError, match=r"must end in \.svg, \.png"):
        report.draw(tmp_path / "p.jpeg")
    with pytest.raises(DrawingError, match="nothing to draw"):
        Report().draw(tmp_path / "p.svg")


# In a browser.


@pytest.fixture(scope="module")
def tower(report: Report) -> str:
    """The page of twelve layers, one of them declined, with names that no line can hold."""
    (site,), (miss,) = report.rewritten, report.declined
    paths = [f"layers.{n}.feed_forward" for n in range(12)]
    long = "a" * 300
    modules = [Module(path.replace("feed_forward", one), long) for path in paths for one in PARTS]
    code = "\n".join(f"x{n} = f({n}, '{long}')" for n in range(60))
    graph = GraphReport(
        code,
        code.replace("x30 = f", "x30 = g").replace("x50 = f", "x50 = g"),
        rewritten=[replace(site, module=path, module_class=long, runs=()) for path in paths[1:]],
        declined=[replace(miss, module=paths[0], runs=())],
        modules=modules,
        notes=[long],
    )
    return page([graph], context=report.context)


PARTS = ("attention_norm", "attention", "feed_forward_norm", "feed_forward")

#: What is found in a page; ``press`` is a key that is pressed somewhere.
DRIVER = """<script>
  const log = {}, press = (key, where = document.activeElement, more = {}) =>
    where.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
  const wide = [...document.querySelectorAll("body *")].filter(one => {
    const at = one.getBoundingClientRect();
    const shortened = one.closest(".mhf-name, .mhf-layer");
    return at.width && !shortened && (at.right > innerWidth + 1 || at.left < -1);
  });
  log.width = innerWidth;
  log.sideways = document.documentElement.scrollWidth > innerWidth;
  log.wide = wide.map(one => one.outerHTML.slice(0, 60));
  log.titles = [...document.querySelectorAll("h1, h2, h3, figcaption")].filter(one => {
    const at = one.getBoundingClientRect();
    return !at.height || at.left < 0 || at.right > innerWidth;
  }).length;
  log.pictures = [...document.querySelectorAll(".picture")].filter(one =>
    one.firstElementChild.getBoundingClientRect().right > one.getBoundingClientRect().right).length;
  log.background = getComputedStyle(document.body).backgroundColor;
  log.text = getComputedStyle(document.body).color;
  const frames = [...document.querySelectorAll(".pictures")][0].querySelectorAll("figure");
  const [left, right] = [...frames].map(one => one.getBoundingClientRect());
  log.beside = right.left >= left.right && Math.abs(left.top - right.top) < 1;
  BEHAVIOUR
  document.title = JSON.stringify(log);
</script></body>"""


def browse(path: Path, text: str, width: int, dark: bool, behaviour: str = "") -> dict[str, Any]:
    """What the driver finds in a page."""
    assert CHROMIUM is not None
    driver = DRIVER.replace("BEHAVIOUR", behaviour)
    path.write_text(text.replace("</body>", driver))
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-background-networking", f"--user-data-dir={path.parent / 'profile'}"),
        *(f"--window-size={width},900", f"--blink-settings=preferredColorScheme={int(not dark)}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    log: dict[str, Any] = json.loads(unescape(found[1]))
    return log


@needs_chromium
@needs_dot
def test_a_narrow_window_shows_all_of_it_in_the_dark(tower: str, tmp_path: Path):
    """Nothing is wider than the window, and the picture after is below the one before."""
    found = browse(tmp_path / "report.html", tower, 500, dark=True)
    assert found["width"] == 500
    assert not found["sideways"]
    assert found["wide"] == []
    assert found["titles"] == found["pictures"] == 0
    assert not found["beside"]
    assert brightness(found["background"]) < 60 < 180 < brightness(found["text"])


BEHAVIOUR = """
  // Search: a slash goes to the field, Enter from place to place, Escape empties it.
  press("/");
  log.box = document.activeElement === box;
  box.value = "Different Inputs";
  box.dispatchEvent(new Event("input"));
  log.first = count.textContent;
  box.value = "x50 = g";
  box.dispatchEvent(new Event("input"));
  const graph = document.querySelector("details.graph");
  log.code = [count.textContent, places[0].toString(), graph.open];
  box.value = "f(5, ";
  box.dispatchEvent(new Event("input"));
  log.folded = places[0].startContainer.parentElement.closest(".code details").open;
  box.value = "feed_forward";
  box.dispatchEvent(new Event("input"));
  const total = places.length;
  press("Enter");
  log.next = total > 2 && count.textContent === `2 of ${total}`;
  press("Enter", box, {shiftKey: true});
  press("Enter", box, {shiftKey: true});
  log.round = count.textContent === `${total} of ${total}`;
  press("n");
  log.typed = change;
  press("Escape");
  log.empty = [count.textContent, places.length, document.activeElement === box];
  // Code: n and p go from change to change.
  log.changes = ["n", "n", "n", "p"].map(key => {
    press(key);
    return changes.indexOf(document.activeElement);
  });
  // The map: one stop, arrows, a name that is shown where the focus is.
  log.stops = blocks.filter(one => one.tabIndex === 0).length;
  blocks[0].focus();
  for (const key of ["Down", "Right", "Right", "Right", "Right"]) press(`Arrow${key}`);
  const tip = document.activeElement.querySelector(".mhf-tip");
  log.tip = [getComputedStyle(tip).display, tip.firstElementChild.textContent.slice(0, 21)];
  log.tipInside = tip.getBoundingClientRect().right <= innerWidth;
  log.card = document.querySelector(document.activeElement.getAttribute("href")).className;
  // A picture in full size.
  document.querySelector(".picture").click();
  log.zoom = [dialog.open, full.querySelectorAll("svg").length];
  dialog.close();
  const stops = [...document.querySelectorAll("summary, button, input")];
  log.reached = stops.every(one => one.tabIndex === 0);
"""


@needs_chromium
@needs_dot
def test_a_wide_window_has_pictures_side_by_side_and_keys_reach_everything(
    tower: str, tmp_path: Path
):
    found = browse(tmp_path / "report.html", tower, 1300, False, BEHAVIOUR)
    assert not found["sideways"]
    assert found["wide"] == []
    assert found["titles"] == found["pictures"] == 0
    assert found["beside"]
    assert brightness(found["text"]) < 60 < 240 < brightness(found["background"])

    assert found["box"]
    assert found["first"] == "1 of 1"
    assert found["code"] == ["1 of 1", "x50 = g", True]  # what it is in unfolds
    assert found["folded"]
    assert found["next"]
    assert found["round"]
    assert found["typed"] == -1  # in the field, n is a letter
    assert found["empty"] == ["", 0, False]
    assert found["changes"] == [0, 1, 0, 1]

    assert found["stops"] == 1
    assert found["tip"] == ["block", "layers.1.feed_forward"]
    assert found["tipInside"]
    assert found["card"] == "card rewritten"
    assert found["zoom"] == [True, 1]
    assert found["reached"]


def brightness(colour: str) -> float:
    """Of ``rgb(1, 2, 3)``, from 0 to 255."""
    parts = [int(part) for part in re.findall(r"\d+", colour)[:3]]
    return sum(parts) / 3
