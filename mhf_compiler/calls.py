"""Which modules of a model the calls of its graphs belong to.

Where a model is compiled in parts, layers of one class share a graph, which is called once for each
of them, and names in it begin at the layer. The tensors that a call is given say which layer it is:
they are parameters and buffers of the model, whose names are the keys of its state dict.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from .compat import source_name
from .report.describe import readable, shortened
from .report.paths import common_start
from .report.values import GraphReport, Module, Operation, RegionNode, SiteReport


class Names:
    """The names of a model's parameters, buffers and modules; none of a plain function."""

    def __init__(self, model: Callable[..., Any]) -> None:
        module = _module_of(model)
        self.of_tensors: dict[int, list[str]] = {}
        self.classes: dict[str, str] = {}
        if module is None:
            return
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self.of_tensors.setdefault(id(tensor), []).append(name)
        modules = module.named_modules(remove_duplicate=False)
        self.classes = {path: type(one).__name__ for path, one in modules}

    def of(self, tensor: Any, name: str) -> str | None:
        """Of a tensor, that of its names which ends most like the name that a graph has for it."""
        found = self.of_tensors.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return max(found, key=lambda one: len(_common_end(one, name))) if found else None


def _module_of(model: Any) -> nn.Module | None:
    """The module that is called, under wrappers that call nothing else."""
    while isinstance(model, functools.partial):
        model = model.func
    model = getattr(model, "__self__", model)
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns
    return model if isinstance(model, nn.Module) else None


def _common_end(one: str, other: str) -> list[str]:
    return common_start([one.split(".")[::-1], other.split(".")[::-1]])


@dataclass
class Calls:
    """The calls of one graph.

    Attributes:
        report: of the graph.
        names: of the model.
        seen: for each call, the graph's names of the model's tensors, and the model's own.
    """

    report: GraphReport
    names: Names
    seen: list[dict[str, str]] = field(default_factory=list)

    def followed(self, gm: fx.GraphModule, *, first: bool = True) -> Callable[..., Any]:
        """Run a graph, or a part of it, and note what it is given; the first part is a new call."""
        inputs = [
            readable(source_name(node) or str(node.target))
            for node in gm.graph.find_nodes(op="placeholder")
        ]

        def run(*given: Any) -> Any:
            found = {
                name: key
                for name, tensor in zip(inputs, given, strict=False)
                if (key := self.names.of(tensor, name)) is not None
            }
            if first or not self.seen:
                self.seen.append(found)
            else:
                self.seen[-1] |= found
            return gm.forward(*given)

        return run

    def write(self) -> None:
        """Write the model's own names into the report, and the modules of all calls."""
        report = self.report
        report.calls = len(self.seen)
        if not self.seen:
            return
        calls = [_Call(found, self.names.classes) for found in self.seen]
        report.rewritten[:] = [_renamed(site, calls) for site in report.rewritten]
        report.declined[:] = [_renamed(site, calls) for site in report.declined]
        report.ordinary[:] = [_renamed(site, calls) for site in report.ordinary]
        report.products[:] = [calls[0].operation(one) for one in report.products]
        paths = [call.module(one.path) for call in calls for one in report.modules]
        kinds = [one.module_class for _ in calls for one in report.modules]
        known = {path: kind for path, kind in zip(paths, kinds, strict=True) if path is not None}
        report.modules[:] = [Module(path, kind) for path, kind in known.items()]


class _Call:
    """From the names of a graph to those of the model, for one call."""

    def __init__(self, tensors: Mapping[str, str], classes: Mapping[str, str]) -> None:
        self.tensors, self.classes = tensors, classes
        roots = Counter(_roots(name, key) for name, key in tensors.items())
        self.here, self.root = roots.most_common(1)[0][0] if roots else ("", "")

    def module(self, path: str | None) -> str | None:
        """The path of a module in the model, None for the model itself."""
        rest = [] if path is None else path.split(".")
        here = self.here.split(".") if self.here else []
        if rest[: len(here)] != here:
            return path
        return ".".join([*filter(None, [self.root]), *rest[len(here) :]]) or None

    def of(self, site: SiteReport) -> str | None:
        """The module of a site; where its weights are if that is the model, or no module at all."""
        found = self.module(site.module)
        names = [name for one in site.arguments for name in one.tensors]
        weights = [self.tensors[name].split(".") for name in names if name in self.tensors]
        if found is not None or not weights:
            return found
        parents = common_start(name[:-1] for name in weights)
        return ".".join(parents or (weights[0] if len(weights[0]) > 1 else [])) or None

    def text(self, text: str) -> str:
        """A text with the model's names of its tensors."""
        return re.sub(r"[\w.]*\w", lambda found: self.tensors.get(found[0], found[0]), text)

    def operation(self, operation: Operation) -> Operation:
        module = None if operation.module is None else self.module(operation.module)
        return replace(operation, call=self.text(operation.call), module=module)


def _roots(name: str, key: str) -> tuple[str, str]:
    """What two names of one tensor begin with, where they end alike."""
    parts, others = name.split("."), key.split(".")
    alike = len(_common_end(name, key))
    return ".".join(parts[: len(parts) - alike]), ".".join(others[: len(others) - alike])


def _renamed(site: SiteReport, calls: Sequence[_Call]) -> SiteReport:
    """A site in the model's names of the first call, with the modules of all calls."""
    first = calls[0]
    module = first.of(site)
    arguments = []
    for argument in site.arguments:
        tensors = tuple(first.tensors.get(name, name) for name in argument.tensors)
        given = argument.location is None and tensors != argument.tensors
        name = shortened(tensors) if given else argument.name
        arguments.append(replace(argument, name=name, tensors=tensors))
    return replace(
        site,
        module=module,
        module_class=site.module_class or first.classes.get(module or ""),
        runs=tuple(call.of(site) for call in calls),
        reason=site.reason and replace(site.reason, detail=first.text(site.reason.detail)),
        arguments=tuple(arguments),
        operation=site.operation and first.operation(site.operation),
        region=tuple(_region(site.region, first)),
    )


def _region(nodes: Iterable[RegionNode], call: _Call) -> Iterable[RegionNode]:
    for node in nodes:
        yield replace(node, call=call.text(node.call))
