"""A model may call its modules, parameters and files anything: none of it is code anywhere."""

import ast
import dataclasses
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.positive import POSITIVE
from torch import fx

import mhf_compiler
import mhf_compiler.report.logs
from mhf_compiler import DeclineKind, GraphReport, Location, Reason, Report, SiteReport
from mhf_compiler.debug import dump
from mhf_compiler.report.context import Context
from mhf_compiler.report.dot import Frame, dot_source
from mhf_compiler.report.escape import (
    dot_string,
    markdown_cell,
    python_comment,
    python_constant,
    visible,
    visible_lines,
)
from mhf_compiler.report.logs import announce
from mhf_compiler.report.page import notebook, page
from mhf_compiler.report.values import Argument, GraphBreak, Module, Operation, RegionNode

HOSTILE = [
    "'\"; raise SystemExit(7)  # ",
    '"""; raise SystemExit(7)  # """',
    "\nraise SystemExit(7)\n",
    "\r\x0braise SystemExit(7)",
    "\\N{nothing} \\x \\",
    "a|b | c",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[link](javascript:alert(1)) `code` **",
    "\x1b[31mred\x1b]0;title\x07",
    "\u2028raise SystemExit(7)\ud800",
    "\x00zero",
    "多头 ñ",
    "long" * 5000,
]


@pytest.fixture(scope="module")
def plain_site() -> SiteReport:
    model = POSITIVE["RouterOnHidden"]
    (site,) = mhf_compiler.explain(model.build(), options={"rewrite": "always"})(
        *model.inputs()
    ).rewritten
    return site


@pytest.fixture(params=HOSTILE, ids=lambda name: ascii(name[:20]))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def report(name: str, plain_site: SiteReport) -> GraphReport:
    """A graph in which everything that can have a name has this one."""
    location = Location(f"/{name}/model.py", 3, name, name)
    line = name.replace("\n", " ")  # torch writes the path of a file on one line
    region = (RegionNode(name, name, "Q", ()), RegionNode(f"{name}2", name, None, (name,)))
    site = dataclasses.replace(
        plain_site,
        module=name,
        module_class=name,
        location=location,
        formula=f"{name} @ {name}",
        region=region,
        arguments=tuple(
            Argument(**(dataclasses.asdict(a) | {"name": name})) for a in plain_site.arguments
        ),
    )
    operation = Operation(name, location)
    declined = dataclasses.replace(
        site, reason=Reason(DeclineKind.DIFFERENT_QUERIES, name), operation=operation
    )
    return GraphReport(
        before=f"# File: {line}:3 in f, code: {line}\nx = 1",
        after=f"# File: {line}:3 in f, code: {line}\nx = 2",
        rewritten=[site],
        declined=[declined],
        notes=[name],
        modules=[Module(name, name), Module(f"{name}.{name}", name)],
        products=[operation],
        graph_break=GraphBreak("reason", location),
    )


def unprintable(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c not in "\n\t"}


def test_text(name: str, report: GraphReport):
    """Nothing that a terminal obeys, and no line that the model wrote."""
    text = str(Report([report]))
    assert not unprintable(text)
    assert not re.search(r"^\s*raise SystemExit", text, re.MULTILINE)


def test_logs_and_traces(
    report: GraphReport, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    traced: dict[str, str] = {}

    def keep(name: str, encoding: str, payload: Any) -> None:
        traced[name] = payload()

    monkeypatch.setattr(mhf_compiler.report.logs, "trace_artifact", keep)
    with caplog.at_level(logging.DEBUG, "mhf_compiler"):
        announce(report)
    assert caplog.records
    for record in caplog.records:
        message = record.getMessage()
        assert not unprintable(message)
        assert record.levelno == logging.DEBUG or "\n" not in message
    for what in ("flashmhf_before", "flashmhf_after"):
        assert not unprintable(traced[what])
    json.loads(traced["flashmhf_report_json"])


def test_json(name: str, report: GraphReport):
    """Names are not changed here: JSON can hold them all."""
    kept = json.loads(Report([report]).to_json())
    assert kept["graphs"][0]["rewritten"][0]["module"] == name


class _Tags(HTMLParser):
    """The elements of a page, and the attributes that run scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [key for key, _ in attrs if key.startswith("on")]


def test_html(name: str, report: GraphReport):
    context = Context(name, (name,), options={name: name}, device=name, versions={name: name})
    html = page([report], context=context)
    html.encode()
    found = _Tags(html)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert not found.handlers
    assert not unprintable(html)


def test_notebook(report: GraphReport):
    found = _Tags(notebook([report]))
    assert not {"script", "img"} & {*found.tags}
    assert not found.handlers
    assert not unprintable(notebook([report]))


def test_dot(name: str, report: GraphReport):
    """Outside of strings there is nothing of the model."""
    region = report.rewritten[0].region
    source = dot_source([Frame(name, region)])
    assert not unprintable(source)
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "S", source)
    assert '"' not in outside
    assert "raise" not in outside
    assert re.fullmatch(r"[\w\s\[\]{}=;,>./\-]*", outside)


def test_markdown(report: GraphReport, tmp_path: Path):
    dump._add_to_index(tmp_path / "index.md", "graph_0", report)
    *_, row = (tmp_path / "index.md").read_text(encoding="utf-8").split("\n")[:-1]
    assert row.startswith("| [graph_0](graph_0/report.html) |")
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert not re.search(r"(?<!\\)[<`](?!graph_0)", row)


def test_programs(report: GraphReport, plain_site: SiteReport):
    """A program has the same statements whatever the names are."""
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    for given, usual in [
        (dump.program(report.before, gm), dump.program("# File: a\nx = 1", gm)),
        (dump.site_program(report.rewritten[0]), dump.site_program(plain_site)),
    ]:
        given.encode()
        assert ast.dump(ast.parse(given.replace("\r", "\n"))) == ast.dump(ast.parse(usual))


def test_each_format(name: str):
    assert "\n" not in visible(name)
    assert visible(visible(name)) == visible(name)
    assert not unprintable(visible_lines(name))
    assert all(line.startswith("# ") for line in python_comment(name).split("\n"))
    assert ast.literal_eval(python_constant(name)) == name
    assert not re.search(r"(?<!\\)\|", markdown_cell(name))
    assert re.fullmatch(r'"(?:[^"\\]|\\.)*"', dot_string(name))


def test_an_object_of_the_models_is_no_constant():
    class Hostile:
        def __repr__(self) -> str:
            return "exit(7)"

    assert python_constant(Hostile()) == "None"
    assert python_constant(float("inf")) == "inf"  # a name that the program has
