"""What MkDocs cannot know by itself: where the package lies, and pages outside of this folder.

The three parts are folders next to each other in the repository, so the reference is read from a
folder of links that lays them out as an installation does. ``CONTRIBUTING.md`` and ``CHANGELOG.md``
lie above this folder: they become pages, and the links that lead to them in the repository lead
there. In tables, long names in code may be broken where they have a joint, so that no table is
wider than a phone.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FOLDERS = {"mhf_compiler": ".", "patterns": "patterns", "lowering": "lowering"}
ABOVE = ("CONTRIBUTING.md", "CHANGELOG.md")

_links = TemporaryDirectory(prefix="mhf_compiler_docs_")  # until MkDocs ends


@event_priority(100)  # before the plugin reads it
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    package = Path(_links.name) / "mhf_compiler"
    for folder, target in FOLDERS.items():
        for source in (ROOT / folder).rglob("*.py"):  # in a folder that is a link, none is found
            link = package / target / source.relative_to(ROOT / folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(source)
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers.setdefault("python", {})["paths"] = [_links.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in ABOVE:
        files.append(File.generated(config, name.lower(), content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    names = "|".join(map(re.escape, ABOVE))
    return re.sub(rf"\]\(\.\./({names})", lambda link: f"]({link[1].lower()}", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def with_breaks(code: re.Match[str]) -> str:
        return re.sub(r"(?<=[_.=(/,\]])(?=\w)", "<wbr>", code[0])

    def of_a_table(table: re.Match[str]) -> str:
        return re.sub(r"(?<=<code>)[^<]*", with_breaks, table[0])

    return re.sub(r"<table>.*?</table>", of_a_table, html, flags=re.DOTALL)
