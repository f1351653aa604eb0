"""The map of a model: its layers from the input to the output, and in each what became of it.

    layers.0   attention_norm  attention  ffn_norm  [ffn]
    layers.1   attention_norm  attention  ffn_norm  [ffn]

A module in which there are networks is shown by what is in it, down to the modules of the networks;
all others are one block each. A row is a member of a list, of the innermost list that has several
members with networks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from .values import GraphReport, SiteReport


@dataclass(frozen=True)
class Block:
    """A module, or one network in it.

    Attributes:
        path: of the module; empty for the model itself.
        name: the path below that of the row.
        kind: ``"rewritten"``, ``"declined"``, ``"ordinary"``, or ``"other"`` for what is no FFN.
        module_class: class of the module; empty if it is unknown.
        site: the network; None for what is none.
        times: how often the module runs it.
    """

    path: str
    name: str
    kind: str = "other"
    module_class: str = ""
    site: SiteReport | None = None
    times: int = 1


@dataclass(frozen=True)
class Row:
    """Blocks that belong to one layer.

    Attributes:
        path: of the layer; empty for what is in no list.
        blocks: in the order of the graph.
    """

    path: str
    blocks: tuple[Block, ...]

    @property
    def original(self) -> float | None:
        """Estimated seconds of its rewritten networks in the original spelling."""
        return self._sum("original")

    @property
    def rewritten(self) -> float | None:
        """Estimated seconds of the same as ops."""
        return self._sum("rewritten")

    @property
    def hidden_bytes(self) -> float | None:
        """Of hidden units that are not stored."""
        return self._sum("hidden_bytes")

    def _sum(self, name: str) -> float | None:
        works = [
            (block.site.work, block.times)
            for block in self.blocks
            if block.kind == "rewritten" and block.site is not None
        ]
        known = [
            getattr(work, name) * times
            for work, times in works
            if work is not None and getattr(work, name) is not None
        ]
        return sum(known) if len(known) == len(works) > 0 else None


@dataclass
class _Module:
    """A module with those in it, and the networks that belong to it."""

    path: str
    module_class: str = ""
    parts: dict[str, _Module] = field(default_factory=dict)
    networks: list[Block] = field(default_factory=list)

    def below(self, path: str) -> _Module:
        """The module at a path, which is made if it is not there."""
        here = self
        for part in path.split(".") if path else []:
            inner = f"{here.path}.{part}" if here.path else part
            here = here.parts.setdefault(part, _Module(inner))
        return here

    def has_networks(self) -> bool:
        """Whether it, or a module in it, has some."""
        return bool(self.networks) or any(part.has_networks() for part in self.ordered())

    def ordered(self) -> list[_Module]:
        """The modules in it: those of a list by number, others as they come."""
        if all(part.isdecimal() for part in self.parts):
            return [self.parts[part] for part in sorted(self.parts, key=int)]
        return [*self.parts.values()]


def map_of(graphs: Sequence[GraphReport]) -> list[Row]:
    """The rows of the map; none if there are no networks."""
    model = _Module("")
    for graph in graphs:
        for module in graph.modules:
            model.below(module.path).module_class = module.module_class
    for block in _networks(graphs):
        model.below(_around(block)).networks.append(block)
    if not model.has_networks():
        return []
    rows = groupby(_blocks(model, ""), key=lambda found: found[0])
    return [Row(path, tuple(_named(block, path) for _, block in blocks)) for path, blocks in rows]


def _around(block: Block) -> str:
    """The path of a network's module: around a layer of PyTorch's, which is one operation of it."""
    outer, _, _ = block.path.rpartition(".")
    is_layer = outer.rpartition(".")[2].isdecimal()
    inside = block.kind != "rewritten" and hasattr(torch.nn, block.module_class)
    return outer if inside and outer and not is_layer else block.path


def _networks(graphs: Sequence[GraphReport]) -> Iterator[Block]:
    """Each network of each module once, also if several graphs have it."""
    most: Counter[tuple[object, ...]] = Counter()
    first: dict[tuple[object, ...], Block] = {}
    for graph in graphs:
        here: Counter[tuple[object, ...]] = Counter()
        kinds = {
            "rewritten": graph.rewritten,
            "declined": graph.declined,
            "ordinary": graph.ordinary,
        }
        for kind, sites in kinds.items():
            for site in sites:
                for path, number in site.called:
                    key: tuple[object, ...] = (path, kind, site.location, site.formula, number)
                    here[key] += 1
                    name = site.module_class or ""
                    first.setdefault(key, Block(path or "", "", kind, name, site))
        most |= here
    times: Counter[tuple[object, ...]] = Counter()
    for key in first:
        times[key[:-1]] += most[key]
    for key, block in first.items():
        if key[:-1] in times:  # networks without names of their own are one block
            yield replace(block, times=times.pop(key[:-1]))


def _blocks(module: _Module, layer: str) -> Iterator[tuple[str, Block]]:
    """What is in a module, or the module itself, each with the path of its layer."""
    if not module.has_networks():
        yield layer, Block(module.path, "", module_class=module.module_class)
        return
    inner = [part for part in module.ordered() if part.has_networks()]
    if inner or not module.path:
        for part in module.ordered():
            numbered = part.path.rpartition(".")[2].isdecimal()
            is_layer = numbered and (len(inner) > 1 or not layer)
            yield from _blocks(part, part.path if is_layer else layer)
    for one in module.networks:
        name = module.module_class or one.module_class
        yield layer, replace(one, path=module.path, module_class=name)


def _named(block: Block, layer: str) -> Block:
    """A block with its name below a layer."""
    name = block.path.removeprefix(layer).removeprefix(".")
    name = name or block.module_class or "the model"
    return replace(block, name=name)
