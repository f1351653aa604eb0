"""For how many layers a compiled graph is called.

Where Dynamo compiles layers one by one, it compiles the first and calls that graph for the others,
too: their parameters are inputs. Nothing is compiled then, so the calls are what is looked at. A
network is known by one parameter of its weights, and that by its address:

    compiled(x, layers.0.gate, layers.0.up, ...)     known: it was compiled for this
    compiled(y, layers.1.gate, layers.1.up, ...)     not seen before: one more network
    compiled(x, layers.0.gate, layers.0.up, ...)     seen

A call looks up two numbers. No parameter is kept alive, and none gets
a weak reference, which ``torch.utils.swap_tensors`` would refuse; whether one is gone, its storage
says. Networks count as many as have been there at the same time, so that parameters which are made
anew for each call are not one more network each time. Weights that are no parameters do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from types import FunctionType, MethodType
from typing import Any

from torch import fx, nn

from .calls import Names, Network, in_calls_seen
from .compat import StorageWeakRef, counters, example_of, is_tracing, weak_storage
from .errors import only_reporting
from .patterns import Site
from .report.describe import inputs_of_weights, name_of_input
from .report.values import GraphReport
from .substitution.regions import calls_in


@dataclass(frozen=True)
class _Weight:
    """One parameter by which the networks of a site are told apart.

    Attributes:
        name: what the report of the graph calls it.
        inputs: the inputs that it is given in, one for each call of the inner graph that has the
            site, or one; None where that is no parameter.
    """

    name: str
    inputs: tuple[str | None, ...]


@dataclass
class _Seen:
    """A parameter that the graph was called with."""

    input: str
    storage: StorageWeakRef


class Followed:
    """The networks that a compiled graph, or one of the parts that DDP makes of it, is called for.

    Attributes:
        weights: of each site of the report; None where no weight is a parameter.
        seen: the parameters by their addresses, in the order in which they came.
        counted: how many networks are counted.
    """

    def __init__(self, gm: fx.GraphModule, sites: Sequence[tuple[fx.GraphModule, Site]]) -> None:
        calls = calls_in(gm) if sites else {}
        self.weights = [_weight(site, calls.get(module, [])) for module, site in sites]
        inputs = [name for one in self.weights if one is not None for name in one.inputs if name]
        self._sites = Counter(inputs)  # of each input
        self._at_once = len(inputs)  # networks of one call
        self.counted = len(inputs)
        self.seen: dict[int, _Seen] = {}
        self._open = set(inputs)
        self._lock = Lock()

    def calls_of(self, compiled: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
        """What is compiled of the graph, or of a part of it, with its calls followed.

        An input that several parts take is followed in the first of them. What is no function is
        left as it is: it may be something that PyTorch saves. So is what can be saved as a whole.
        """
        places = {
            place: node.name
            for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))
            if node.name in self._open
        }
        saved = getattr(compiled, "serialize", None) is not None
        if not places or saved or not isinstance(compiled, (FunctionType, MethodType)):
            return compiled
        self._open -= {*places.values()}
        seen, note = self.seen, self._note
        # Of a graph that has many networks, the first and the last: a layer, or a model, that has
        # all others of its own and shares these two with one that was seen is not worth the time.
        first, last = min(places), max(places)

        def run(*given: Any) -> Any:
            if id(given[first]) not in seen or id(given[last]) not in seen:
                note(given, places)
            return compiled(*given)

        return run

    def _note(self, given: Sequence[Any], places: dict[int, str]) -> None:
        if is_tracing():  # Dynamo runs the parts of a graph on fake tensors
            return
        with only_reporting("a count of networks"), self._lock:
            for address, one in [*self.seen.items()]:
                if one.storage.expired():
                    del self.seen[address]
            for place, name in places.items():
                parameter = given[place]
                # One at an address that a dead one had until now is seen at its next call.
                if id(parameter) not in self.seen and isinstance(parameter, nn.Parameter):
                    self.seen[id(parameter)] = _Seen(name, weak_storage(parameter))
            there = sum(self._sites[one.input] for one in self.seen.values())
            if there > self.counted:
                # As if the graph had been compiled for each of the layers.
                graphs = -(-there // self._at_once) - -(-self.counted // self._at_once)
                counters["flashmhf"]["graphs"] += graphs
                counters["flashmhf"]["sites_rewritten"] += there - self.counted
                self.counted = there


def in_calls(
    report: GraphReport, followed: Followed, names: Names, numbers: dict[int, int]
) -> GraphReport:
    """The report of a graph, of all networks that it was called for by now.

    Args:
        report: of the graph.
        followed: its calls.
        names: of the model.
        numbers: of all networks by the addresses of their parameters; new ones are added.
    """
    seen = {address: one.input for address, one in [*followed.seen.items()]}
    if not seen or len(followed.weights) != len(report.rewritten):
        return report
    networks = [
        [
            Network(
                numbers.setdefault(address, len(numbers)),
                address,
                weight.name,
                site.modules[weight.inputs.index(name)],
            )
            for address, name in seen.items()
            if name in weight.inputs
        ]
        if weight is not None
        else []
        for site, weight in zip(report.rewritten, followed.weights, strict=True)
    ]
    return in_calls_seen(report, networks, names)


def _weight(site: Site, calls: Sequence[dict[str, fx.Node]]) -> _Weight | None:
    """The first parameter among the weights of a site."""
    for node in inputs_of_weights(site):
        given = [call.get(node.name) for call in calls]
        inputs = [one.name if one is not None and _is_parameter(one) else None for one in given]
        if given and given[0] is not None and inputs[0] is not None:
            return _Weight(name_of_input(given[0]), tuple(inputs))
    return None


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(example_of(node), nn.Parameter)
