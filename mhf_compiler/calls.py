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

from .report.describe import name_of_input, shortened
from .report.paths import common_start, without_numbers
from .report.values import GraphReport, Module, Operation, RegionNode, SiteReport


class Names:
    """The names of a model's parameters, buffers and modules; none of a plain function."""

    def __init__(self, model: Callable[..., Any] | None) -> None:
        module = None if model is None else _module_of(model)
        self.of_tensors: dict[int, list[str]] = {}
        self.classes: dict[str, str] = {}
        self.all: set[str] = set()
        if module is None:
            return
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self.of_tensors.setdefault(id(tensor), []).append(name)
                self.all.add(name)
        modules = module.named_modules(remove_duplicate=False)
        self.classes = {path: type(one).__name__ for path, one in modules}

    def of(self, given: Mapping[str, int]) -> dict[str, str]:
        """The names of tensors that one call of a graph, or one network, is given.

        A tensor that several layers share has several. It gets that of the layer which most of the
        tensors belong to, and then the one that ends most like the name that the graph has for it.

        Args:
            given: the addresses of tensors by the names that the graph has for them.
        """
        found = {name: self.of_tensors.get(address, []) for name, address in given.items()}
        votes = Counter(
            roots for name, keys in found.items() for roots in {_roots(name, key) for key in keys}
        )
        return {
            name: max(keys, key=lambda key: (votes[_roots(name, key)], len(_common_end(key, name))))
            for name, keys in found.items()
            if keys
        }


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
        inputs = [name_of_input(node) for node in gm.graph.find_nodes(op="placeholder")]

        def run(*given: Any) -> Any:
            tensors = zip(inputs, given, strict=False)
            found = self.names.of({name: id(x) for name, x in tensors if isinstance(x, Tensor)})
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


def write_absent(graphs: Sequence[Calls], names: Names) -> None:
    """Write into reports which layers no graph has, next to those of the rewritten networks.

    A layer may have several names, share tensors with others, or be called through its tensors
    alone. To be called after the calls of all graphs are written.
    """
    rewritten = [calls for calls in graphs if calls.report.rewritten]
    if not all(calls.seen and all(calls.seen) for calls in rewritten):
        return  # which layers these calls were of is not known
    given = {key for calls in graphs for seen in calls.seen for key in seen.values()}
    called = {module.path for calls in graphs for module in calls.report.modules}

    def is_absent(path: str) -> bool:
        within = f"{path}."
        if any(f"{one}.".startswith(within) for one in called):
            return False
        tensors = names.of_tensors.values()
        own = [{*keys} for keys in tensors if all(key.startswith(within) for key in keys)]
        return not all(given & keys for keys in own)

    for calls in rewritten:
        paths = {path for site in calls.report.rewritten for path in site.modules if path}
        alike = {(without_numbers(path), names.classes.get(path)) for path in paths}
        calls.report.absent[:] = [
            Module(path, kind)
            for path, kind in names.classes.items()
            if (without_numbers(path), kind) in alike and is_absent(path)
        ]


@dataclass(frozen=True)
class Network:
    """One network that a compiled graph was called for.

    Attributes:
        number: the same wherever it is called.
        given: the addresses of the parameters among its weights, by their names where the report of
            the graph has a site's first call.
        module: of the network, in the names of the graph.
    """

    number: int
    given: Mapping[str, int]
    module: str | None


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


def in_all_calls(site: SiteReport, given: Sequence[Mapping[str, str]]) -> SiteReport:
    """A site of a graph inside of another, in the names of the outer graph.

    Args:
        site: in the names of the inner graph.
        given: for each call of the inner graph: its names of what it is given, and the outer ones.
    """
    if not given:
        return site
    first = given[0]
    named = _renamed(replace(site, runs=()), [_Call(first, {})])
    calls = [
        _Call({first[name]: other for name, other in one.items() if name in first}, {})
        for one in given
    ]
    found = _renamed(replace(named, runs=()), calls)
    return found if len(given) > 1 else replace(found, runs=())


def in_calls_seen(
    report: GraphReport, networks: Sequence[Sequence[Network]], names: Names
) -> GraphReport:
    """A copy of the report of a compiled graph, of the networks that it was called for.

    Args:
        report: of the graph.
        networks: of each site; none of a site that was not followed.
        names: of the model. What it does not know keeps the names of the graph.
    """
    rewritten: list[SiteReport] = []
    modules: dict[str, str] = {}
    for site, seen in zip(report.rewritten, networks, strict=True):
        if not seen:
            rewritten.append(site)
            continue
        # Arguments have the names of the first, which should be a network of this model.
        seen = sorted(seen, key=lambda one: not names.of(one.given))
        calls = [_call_of(one, site, names) for one in seen]
        runs = [
            call.of(replace(site, module=one.module)) for call, one in zip(calls, seen, strict=True)
        ]
        found = _renamed(replace(site, runs=()), calls[:1])
        numbers = tuple(one.number for one in seen)
        rewritten.append(replace(found, runs=tuple(runs), networks=numbers))
        for call in calls:
            named = {call.module(one.path): one.module_class for one in report.modules}
            modules |= {path: kind for path, kind in named.items() if path is not None}
    kept = [Module(*one) for one in modules.items()] or report.modules
    return replace(report, rewritten=rewritten, modules=kept)


def _call_of(network: Network, site: SiteReport, names: Names) -> _Call:
    """The names of one network: all tensors whose names begin as those of the known parameters."""
    found = names.of(network.given)
    if not found:
        return _Call({}, names.classes)
    call = _Call(found, names.classes)
    tensors = {name: call.module(name) for one in site.arguments for name in one.tensors}
    known = {name: moved for name, moved in tensors.items() if moved in names.all and moved}
    return _Call({**known, **found}, names.classes)


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
        runs=tuple(call.of(replace(site, module=run)) for call in calls for run in site.modules),
        reason=site.reason and replace(site.reason, detail=first.text(site.reason.detail)),
        arguments=tuple(arguments),
        operation=site.operation and first.operation(site.operation),
        region=tuple(_region(site.region, first)),
    )


def _region(nodes: Iterable[RegionNode], call: _Call) -> Iterable[RegionNode]:
    for node in nodes:
        yield replace(node, call=call.text(node.call))
