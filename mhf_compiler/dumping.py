"""``dump_dir``: a folder with every graph as a program that runs, and its report.

index.md                 a line for each graph
graph_0/before.py        the graph as Dynamo gave it, with inputs of the example's shapes
graph_0/after.py         the graph as it went on
graph_0/compare.py       runs both on equal inputs and prints how far they are apart
graph_0/site_0.py        the op at the sizes of one site, against its specification
graph_0/report.txt       the report; also .json and .html
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .compat import size_hint
from .report import Argument, GraphReport, Report, SiteReport

_INDEX = """# Graphs

In the order of compilation. `python graph_N/compare.py` runs a graph before and after.

| graph | nodes | rewritten | declined | of |
|---|---|---|---|---|
"""
_TENSOR = '''
def tensor(shape, stride, dtype, device):
    """Small random numbers, or zeros where they are whole, laid out as the example was."""
    made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return made.normal_(std=0.3) if dtype.is_floating_point else made.zero_()
'''
_COMPARE = '''"""Run a graph before and after its rewriting on equal inputs, and compare."""

import copy

import torch

import after
import before

torch.manual_seed(0)
arguments, old, new = before.inputs(), before.module(), after.module()
new.load_state_dict(old.state_dict())
with torch.no_grad():
    expected = old(*copy.deepcopy(arguments))
    found = new(*copy.deepcopy(arguments))
for number, (a, b) in enumerate(zip(expected, found, strict=True)):
    if isinstance(a, torch.Tensor) and a.is_floating_point():
        scale = max(a.abs().max().item(), 1e-30)
        print(f"output {number}: relative difference {(a - b).abs().max().item() / scale:.2e}")
'''
_SITE = '''"""{place}

{formula}
"""

import torch

from mhf_compiler import multi_head_ffn
from mhf_compiler.lowering import multi_head_ffn_reference
{tensor}

torch.manual_seed(0)
{arguments}
constants = {constants}
with torch.no_grad():
    found = multi_head_ffn({call}, **constants)
    expected = multi_head_ffn_reference({call}, **constants)
scale = max(expected.abs().max().item(), 1e-30)
print(f"relative difference {{(found - expected).abs().max().item() / scale:.2e}}")
'''
_NAMES = {
    "Q": "q",
    "K": "k",
    "U": "u",
    "V": "v",
    "R": "r",
    "bK": "k_bias",
    "bU": "u_bias",
    "bV": "v_bias",
}
_MANY = 64  # for a dynamic size of a site


def dump(report: GraphReport, gm: fx.GraphModule, folder: Path) -> None:
    """Write one graph, after its rewriting, into a new folder inside ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    place = _new_folder(folder)
    (place / "before.py").write_text(program(report.before, gm))
    (place / "after.py").write_text(program(report.after, gm))
    (place / "compare.py").write_text(_COMPARE)
    for number, site in enumerate(report.rewritten):
        (place / f"site_{number}.py").write_text(site_program(site))
    whole = Report([report])
    (place / "report.txt").write_text(f"{whole}\n")
    whole.to_json(place / "report.json")
    whole.to_html(place / "report.html")
    _add_to_index(folder / "index.md", place.name, report)


def program(code: str, gm: fx.GraphModule) -> str:
    """A graph as a program that runs by itself."""
    return "\n".join(
        [
            '"""A graph from Dynamo, with inputs of the shapes that it was compiled for."""\n',
            "import torch",
            "from torch import device, fx, inf, nan  # noqa: F401  (names that a graph may use)\n",
            "import mhf_compiler.lowering  # noqa: F401  (defines the op)\n",
            _TENSOR,
            "\n" + code.strip() + "\n\n",
            "def inputs():",
            "    return [",
            *(f"        {_example(node)}," for node in gm.graph.nodes if node.op == "placeholder"),
            "    ]\n\n",
            "def module():",
            "    made = GraphModule()",
            *(f"    {line}" for line in _attributes(gm)),
            "    return made\n\n",
            'if __name__ == "__main__":',
            "    torch.manual_seed(0)",
            "    print(module()(*inputs()))",
            "",
        ]
    )


def site_program(site: SiteReport) -> str:
    """The op at the sizes of a site, compared with its specification."""
    given = {_NAMES[a.role]: _argument(a, site) for a in site.arguments if a.role in _NAMES}
    k_scale, u_scale, out_scale = site.scales
    constants = {
        "activation": site.activation,
        "k_scale": k_scale,
        "u_scale": u_scale,
        "out_scale": out_scale,
    }
    lines = [f"{name} = {text}" for name, text in {"u": "None", "r": "None", **given}.items()]
    named = [f"{name}={name}" for name in given if name.endswith("_bias")]
    return _SITE.format(
        place=f"{site.place}.",
        formula=site.formula,
        tensor=_TENSOR,
        arguments="\n".join(lines),
        constants=constants,
        call=", ".join(["q", "k", "u", "v", "r", *named]),
    )


def _new_folder(folder: Path) -> Path:
    """The first that is not there yet, also beside those of another process."""
    number = 0
    while True:
        try:
            (folder / f"graph_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder / f"graph_{number}"


def _add_to_index(path: Path, name: str, report: GraphReport) -> None:
    if not path.exists():
        path.write_text(_INDEX)
    sites = [*report.rewritten, *report.declined]
    of = ", ".join(dict.fromkeys(site.module or str(site.location) for site in sites)) or "nothing"
    counts = f"{report.operations} | {len(report.rewritten)} | {len(report.declined)}"
    with path.open("a") as file:
        file.write(f"| [{name}]({name}/report.html) | {counts} | {of} |\n")


def _example(node: fx.Node) -> str:
    """An input like the example, in Python."""
    return _made(node.meta.get("example_value", node.meta.get("val")))


def _made(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = tuple(size_hint(size) for size in value.shape)
        stride = tuple(size_hint(step) for step in value.stride())
        return f"tensor({shape}, {stride}, {value.dtype}, {str(value.device)!r})"
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return repr(size_hint(value))
    return repr(value)


def _argument(argument: Argument, site: SiteReport) -> str:
    shape = tuple(size if isinstance(size, int) else _MANY for size in argument.shape)
    stride = torch.empty(shape, device="meta").stride()
    return f"tensor({shape}, {stride}, torch.{argument.dtype}, {site.device!r})"


def _attributes(gm: fx.GraphModule) -> Iterator[str]:
    """What the graph reads from its module: tensors, and the graphs of higher-order operations."""
    names = {str(node.target): None for node in gm.graph.nodes if node.op == "get_attr"}
    for name in names:
        value = getattr(gm, name, None)
        if isinstance(value, fx.GraphModule):
            # Into the instance itself, or the class of that name inside GraphModule would hide it.
            yield f"made.__dict__[{name!r}] = fx.symbolic_trace(GraphModule.{name}())"
        elif isinstance(value, torch.Tensor):
            yield f"made.register_buffer({name!r}, {_made(value)})"
