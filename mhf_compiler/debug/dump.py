"""``dump_dir``: a folder with every graph as a program that runs, and its report.

index.md                 a line for each graph
graph_0/before.py        the graph as Dynamo gave it, with inputs of the example's shapes
graph_0/after.py         the graph as it was passed to the compiler
graph_0/compare.py       runs both on equal inputs: do they differ by more than rounding?
graph_0/site_0.py        compares the op, at the sizes of one site, with its specification
graph_0/report.txt       the report; also .json and .html

For a graph that was compiled for training, gradients are compared too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import fx

from ..compat import example_of, size_hint, source_name
from ..report import Argument, GraphReport, Report, SiteReport
from ..report.describe import name_of_input
from ..report.escape import markdown_cell, python_comment, python_constant, visible_lines
from ..report.page import page
from .accuracy import tensors_of

_INDEX = """# Graphs

In the order of compilation. `python graph_N/compare.py` runs a graph before and after.

| graph | nodes | rewritten | declined | of |
|---|---|---|---|---|
"""
_TENSOR = '''
def tensor(shape, stride, dtype, device, requires_grad=False):
    """Small random numbers, or zeros for integers, with the strides of the example."""
    made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if not dtype.is_floating_point:
        return made.zero_()
    return made.normal_(std=0.3).requires_grad_(requires_grad)
'''
_COMPARE = '''"""Run a graph before and after its rewriting on equal inputs, and compare {what}.

Errors are measured against the original graph in float64. Exits with 1 if one is larger than
rounding.
"""

import sys

import torch

import after
import before
from mhf_compiler.testing import compare, print_differences

torch.manual_seed(0)
inputs, old, new = before.inputs(), before.module(), after.module()
new.load_state_dict(old.state_dict())
sys.exit(print_differences(compare(old, new, inputs, before.NAMES)))
'''
_SITE = '''{place}
#
{formula}

"""Compares {what} of the op and of its specification.

Exits with 1 if an error is larger than rounding.
"""

import sys

import torch

from mhf_compiler import multi_head_ffn
from mhf_compiler.testing import compare, print_differences
from mhf_compiler.lowering import multi_head_ffn_reference

{tensor}

torch.manual_seed(0)
inputs = {{
{arguments}
}}
constants = {constants}


def op(*given):
    return multi_head_ffn(**dict(zip(inputs, given)), **constants)


def specification(*given):
    return multi_head_ffn_reference(**dict(zip(inputs, given)), **constants)


sys.exit(print_differences(compare(specification, op, [*inputs.values()], [*inputs])))
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


def dump(report: GraphReport, gm: fx.GraphModule, folder: Path) -> Path:
    """Write one graph, after its rewriting, into a new folder inside ``folder``; return that."""
    folder.mkdir(parents=True, exist_ok=True)
    place, training = _new_folder(folder), _is_trained(gm)
    _write(place / "before.py", program(report.before, gm, training))
    _write(place / "after.py", program(report.after, gm, training))
    _write(place / "compare.py", _COMPARE.format(what=_compared(training)))
    for number, site in enumerate(report.rewritten):
        _write(place / f"site_{number}.py", site_program(site, training))
    dump_report(report, place)
    _add_to_index(folder / "index.md", place.name, report)
    return place


def dump_report(report: GraphReport, place: Path) -> None:
    """Write the report of one graph; again when more is known of it."""
    whole = Report([report])
    _write(place / "report.txt", f"{whole}\n")
    _write(place / "report.json", f"{whole.to_json()}\n")
    _write(place / "report.html", page(whole.graphs))


def program(code: str, gm: fx.GraphModule, training: bool = False) -> str:
    """A graph as a program that runs by itself; for training, its inputs require gradients."""
    inputs = gm.graph.find_nodes(op="placeholder")
    return "\n".join(
        [
            '"""A graph from Dynamo, with inputs of the shapes that it was compiled for."""\n',
            "import torch",
            "from torch import device, fx, inf, nan  # noqa: F401  (names that a graph may use)\n",
            "import mhf_compiler.lowering  # noqa: F401  (defines the op)\n",
            _TENSOR,
            "\n" + visible_lines(code.strip()) + "\n\n",
            "NAMES = [",
            *(f"    {name_of_input(node)!r}," for node in inputs),
            "]\n\n",
            "def inputs():",
            "    return [",
            *(
                f"        {_made(example_of(node), training and _may_train(node))},"
                for node in inputs
            ),
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


def site_program(site: SiteReport, training: bool = False) -> str:
    """The op at the sizes of a site, compared with its specification."""
    tensors = {
        _NAMES[a.role]: _argument(a, site, training) for a in site.arguments if a.role in _NAMES
    }
    k_scale, u_scale, out_scale = site.scales
    constants = {
        "activation": site.activation,
        "k_scale": k_scale,
        "u_scale": u_scale,
        "out_scale": out_scale,
    }
    inputs = {"q": "", "k": "", "u": "None", "v": "", "r": "None", **tensors}
    return _SITE.format(
        place=python_comment(f"{site.place}."),
        formula=python_comment(site.formula or ""),
        what=_compared(training),
        tensor=_TENSOR,
        arguments="\n".join(f"    {name!r}: {text}," for name, text in inputs.items()),
        constants=constants,
    )


def _write(path: Path, text: str) -> None:
    """Write a file in place of what is there, never through a symbolic link."""
    with _opened(path, os.O_TRUNC) as file:
        file.write(text)


def _opened(path: Path, how: int) -> TextIO:
    """Open a file for writing, or create it. A symbolic link in its place is an error."""
    flags = os.O_WRONLY | os.O_CREAT | how | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8")


def _compared(training: bool) -> str:
    return "results and gradients" if training else "results"


def _is_trained(gm: fx.GraphModule) -> bool:
    """Whether the compiled graph has a backward pass."""
    examples = (example_of(node) for node in gm.graph.find_nodes(op="placeholder"))
    return torch.is_grad_enabled() and any(
        x.requires_grad for example in examples for x in tensors_of(example)
    )


def _may_train(node: fx.Node) -> bool:
    """Whether an input may require gradients, as all do except the buffers of modules."""
    return "_buffers[" not in (source_name(node) or "")


def _new_folder(folder: Path) -> Path:
    """The first that does not exist yet; other processes may create some, too."""
    number = 0
    while True:
        try:
            (folder / f"graph_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder / f"graph_{number}"


def _add_to_index(path: Path, name: str, report: GraphReport) -> None:
    sites = [*report.rewritten, *report.declined]
    of = ", ".join(dict.fromkeys(site.module or str(site.location) for site in sites)) or "nothing"
    counts = f"{report.operations} | {len(report.rewritten)} | {len(report.declined)}"
    with _opened(path, os.O_APPEND) as file:
        if os.fstat(file.fileno()).st_size == 0:
            file.write(_INDEX)
        file.write(f"| [{name}]({name}/report.html) | {counts} | {markdown_cell(of)} |\n")


def _made(value: Any, requires_grad: bool = False) -> str:
    """An input like the example, in Python."""
    if isinstance(value, torch.Tensor):
        shape = tuple(size_hint(size) for size in value.shape)
        stride = tuple(size_hint(step) for step in value.stride())
        return _tensor(shape, stride, value.dtype, value.device, requires_grad)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return python_constant(size_hint(value))
    return python_constant(value)


def _argument(argument: Argument, site: SiteReport, requires_grad: bool) -> str:
    shape = tuple(size if isinstance(size, int) else _MANY for size in argument.shape)
    stride = torch.empty(shape, device="meta").stride()
    return _tensor(shape, stride, f"torch.{argument.dtype}", site.device, requires_grad)


def _tensor(shape: Any, stride: Any, dtype: Any, device: Any, requires_grad: bool) -> str:
    trained = ", requires_grad=True" if requires_grad else ""
    return f"tensor({shape}, {stride}, {dtype}, {str(device)!r}{trained})"


def _attributes(gm: fx.GraphModule) -> Iterator[str]:
    """Attributes that the graph reads: tensors, and the graphs of higher-order operations."""
    names = {str(node.target): None for node in gm.graph.nodes if node.op == "get_attr"}
    for name in names:
        value = getattr(gm, name, None)
        if isinstance(value, fx.GraphModule):
            # In the instance's dict, since the class of that name would shadow it.
            yield f"made.__dict__[{name!r}] = fx.symbolic_trace(GraphModule.{name}())"
        elif isinstance(value, torch.Tensor):
            yield f"made.register_buffer({name!r}, {_made(value)})"
