"""The documentation says what the code says."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mhf_compiler import Options
from mhf_compiler.options import _CHOICES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def table_of(text: str, heading: str) -> dict[str, str]:
    """The rows of the first table after a heading, by their first cell."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))


def test_every_reason_is_listed_as_it_is():
    """Update the page with ``python docs/make_reasons.py``."""
    spec = importlib.util.spec_from_file_location("make_reasons", DOCS / "make_reasons.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / "reasons.md").read_text() == script.page()


def test_every_option_is_listed_with_its_values_and_default():
    rows = table_of((DOCS / "options.md").read_text(), "Options")
    options = {entry.name: entry for entry in fields(Options) if entry.name != "inductor"}
    assert set(rows) == set(options)
    for name, row in rows.items():
        _, values, default, _ = (cell.strip() for cell in f"|{row}".split("|"))
        assert default == (
            "none" if options[name].default is None else f"`{options[name].default}`"
        )
        if name in _CHOICES:
            assert re.findall(r"`(\w+)`", values) == list(_CHOICES[name])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text()):
        goal = (page.parent / target) if target else page
        assert goal.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor[1:] in slugs, anchor


def test_the_index_names_every_page():
    text = (DOCS / "index.md").read_text()
    for page in PAGES:
        assert page.name == "index.md" or f"({page.name})" in text, page.name
