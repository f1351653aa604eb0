"""Draw ``docs/images/before-after.svg`` from the report of a network: needs Graphviz.

``Report.draw`` puts its frames one below the other, with shapes and operands; on a page this one
has to be readable at half of the width.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhf_compiler
from mhf_compiler.report.dot import COLOURS
from mhf_compiler.report.values import RegionNode, SiteReport

PICTURE = Path(__file__).parent / "images" / "before-after.svg"
#: and the name of the result: edges show them
OPERANDS = r"^\w+ = |\(\w+(, \w+)*\)$|(, \w+)+(?=\)$)"
HEAD = """
graph [ranksep=0.3 nodesep=0.15 bgcolor=transparent fontname="sans-serif" fontcolor="#808080"]
node [shape=box style="filled,rounded" fontname=monospace fontsize=11 height=0.35]
edge [color="#808080" arrowsize=0.7]
"""


class MultiHeadFFN(nn.Module):
    """Four heads of width 32, each with a routed sum of three gated sub-networks."""

    def __init__(self) -> None:
        super().__init__()
        shape = (4, 3, 64, 32)  # heads, sub-networks, hidden units, width
        self.gate, self.up, self.down = (nn.Parameter(torch.zeros(shape)) for _ in range(3))
        self.router = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, H, d]
        r = self.router(x).sigmoid()
        gate, up = (torch.einsum("blhd,hefd->blhef", x, w) for w in (self.gate, self.up))
        hidden = F.silu(gate) * up
        out = torch.einsum("blhef,hefd->blhed", hidden, self.down)
        return torch.einsum("blhe,blhed->blhd", r, out)


def source() -> str:
    """The picture in Graphviz's language."""
    report = mhf_compiler.explain(MultiHeadFFN(), options={"rewrite": "always"})(
        torch.zeros(2, 64, 4, 32)
    )
    (site,) = report.rewritten
    before = frame("as the model is written", site.region)
    after = frame("as it runs", rewritten(site))
    return "\n".join(["digraph {", HEAD, *before, *after, "}"])


def rewritten(site: SiteReport) -> Iterator[RegionNode]:
    """The op and its arguments."""
    for argument in site.arguments:
        yield RegionNode(argument.role, argument.name, argument.role, ())
    roles = tuple(argument.role for argument in site.arguments)
    yield RegionNode("op", "multi_head_ffn", "out", roles)


def frame(title: str, nodes: Iterable[RegionNode]) -> Iterator[str]:
    nodes = list(nodes)
    yield f'subgraph "cluster {title}" {{ color="#808080" label="{title}"'
    for node in nodes:
        call = re.sub(OPERANDS, "", node.call)
        text = f"{node.role}: {call}" if node.role else call
        colour = COLOURS.get(node.role or "", "#e5e5e5")
        yield f'"{title} {node.name}" [label="{text}" fillcolor="{colour}"]'
        for name in node.inputs:
            if any(other.name == name for other in nodes):
                yield f'"{title} {name}" -> "{title} {node.name}"'
    yield "}"


if __name__ == "__main__":
    program = shutil.which("dot")
    if program is None:
        raise SystemExit("drawing needs Graphviz's program dot")
    drawn = subprocess.run(
        [program, "-Tsvg"], input=source(), capture_output=True, text=True, check=True
    )
    PICTURE.write_text(drawn.stdout)
