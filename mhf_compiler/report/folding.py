"""Loops in a picture: of operations that repeat, the first and the last, and between them how many.

A loop over 22 sub-networks reaches the graph as 22 times the same operations, one after the other:

    einsum silu einsum mul add | einsum silu einsum mul add | ...

Such repetitions are found by what the operations are and by what they read: something of their own
round, of the round before, or of outside of the loop. Loops in loops are found from the inside.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .values import ALIKE, RegionNode

_FEWEST = 4  # rounds of a loop that is worth it
_NUMBER = re.compile(r"(?<![\w.])\d+\.\d*|\d+")  # a constant, or a place in a list
_TRIED = 8  # lengths of a round for each beginning


def folded(nodes: Sequence[RegionNode]) -> list[RegionNode]:
    """Operations, each before its readers, with the rounds of long loops as one node."""
    current = list(nodes)
    while True:
        shorter = _folded_once(current)
        if len(shorter) == len(current):
            return current
        current = shorter


@dataclass(frozen=True)
class _Loop:
    """Equal rounds: from where on, how many operations each, how many."""

    start: int
    length: int
    rounds: int


class _Sequence:
    """The operations among some nodes, with what makes two of them equal."""

    def __init__(self, nodes: Sequence[RegionNode]) -> None:
        # Parameters and inputs all come first in a graph, so they are in no round.
        self.nodes = [node for node in nodes if node.inputs or " = " in node.call]
        self.place = {node.name: at for at, node in enumerate(self.nodes)}
        self.labels = [_label(node) for node in self.nodes]
        outside = {node.name: _label(node) for node in nodes if node.name not in self.place}
        self.label_of = outside | dict(zip(self.place, self.labels, strict=True))

    def loops(self) -> list[_Loop]:
        """From left to right, the shortest rounds first."""
        places: dict[object, list[int]] = defaultdict(list)
        for at, label in enumerate(self.labels):
            places[label].append(at)
        rank = {at: number for found in places.values() for number, at in enumerate(found)}
        loops, at = [], 0
        while at < len(self.nodes):
            same = places[self.labels[at]]
            later = same[rank[at] + 1 : rank[at] + 1 + _TRIED]
            tried = (self._loop(at, other - at) for other in later)
            loop = next((one for one in tried if one.rounds >= _FEWEST), None)
            if loop is not None:
                loops.append(loop)
                at += loop.length * loop.rounds
            else:
                at += 1
        return loops

    def _loop(self, start: int, length: int) -> _Loop:
        at = start
        while at + length < len(self.nodes) and self._alike(at, length, start):
            at += 1
        return _Loop(start, length, (at - start) // length + 1)

    def _alike(self, at: int, length: int, start: int) -> bool:
        """Whether an operation and the one a round later do the same with the same."""
        one, other = self.nodes[at], self.nodes[at + length]
        if self.labels[at] != self.labels[at + length] or len(one.inputs) != len(other.inputs):
            return False
        for read, later in zip(one.inputs, other.inputs, strict=True):
            here, there = self.place.get(read, -1), self.place.get(later, -1)
            outside = here < start
            if outside and there < start:
                if read != later and self.label_of.get(read) != self.label_of.get(later):
                    return False
            elif outside:  # the first round reads what there was before, the second its result
                if at >= start + length or there >= start + length:
                    return False
            elif there - here != length:
                return False
        return True


def _folded_once(nodes: Sequence[RegionNode]) -> list[RegionNode]:
    """The nodes without the rounds of loops between the first and the last."""
    sequence = _Sequence(nodes)
    left_out: dict[str, str] = {}  # a node -> the one that stands for it
    texts: dict[str, str] = {}  # of those
    last_read = {source: at for at, node in enumerate(sequence.nodes) for source in node.inputs}
    for loop in sequence.loops():
        second, last = loop.start + loop.length, loop.start + loop.length * (loop.rounds - 1)
        rounds = [node.name for node in sequence.nodes[second:last]]
        # It has the name of the last one that is read afterwards, as its readers call it.
        name = ([one for one in rounds if last_read.get(one, -1) >= last] or rounds)[-1]
        left_out |= dict.fromkeys(rounds, name)
        texts[name] = f"… {loop.rounds - 2} alike …"
    sources: dict[str, dict[str, None]] = defaultdict(dict)  # of each node that is shown
    for node in nodes:
        name = left_out.get(node.name, node.name)
        sources[name] |= {left_out.get(source, source): None for source in node.inputs}
    # Parameters of those rounds alone are left out with them.
    shown = {source for name in sources if name not in texts for source in sources[name]}
    inside = {source for name in texts for source in sources[name]}
    dropped = inside - shown - sequence.place.keys()
    found: dict[str, RegionNode] = {}
    for node in nodes:
        name = left_out.get(node.name, node.name)
        read = tuple(one for one in sources[name] if one != name and one not in dropped)
        if node.name in left_out:
            found.setdefault(name, RegionNode(name, texts[name], ALIKE, read))
        elif node.name not in dropped:
            found[name] = replace(node, inputs=read)
    return [*found.values()]


def _label(node: RegionNode) -> tuple[str | None, str]:
    """What it does, without its own name, the names of what it reads, and indices."""
    text = node.call.removeprefix(f"{node.name} = ")
    for source in sorted(node.inputs, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(source)}(?![\w.])", "·", text)
    operation, bracket, arguments = text.partition("(") if node.inputs else ("", "", text)
    return node.role, f"{operation}{bracket}{_NUMBER.sub(_index, arguments)}"


def _index(number: re.Match[str]) -> str:
    return number[0] if "." in number[0] else "#"
