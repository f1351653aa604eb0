"""For how many layers a compiled graph is called.

Where Dynamo compiles layers one by one, it compiles the first and calls that graph for the others,
too: their parameters are inputs. Nothing is compiled then, so the calls are what is looked at. A
network is known by all parameters among its weights together, and those by their addresses, since
layers may share some of them:

    compiled(x, shared.gate, layers.0.up, ...)     known: it was compiled for this
    compiled(y, shared.gate, layers.1.up, ...)     not seen before: one more network
    compiled(x, shared.gate, layers.0.up, ...)     seen

A call looks up the addresses of four parameters. None is kept alive, and none gets a weak
reference, Python's or PyTorch's, which ``torch.utils.swap_tensors`` would refuse; whether one is
gone, its storage says. Networks count as many as have been there at the same time, so that
parameters which are made anew for each call are not one more network each time. Those that are
given other memory around each call look the same. Weights that are no parameters do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
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
from .report.values import GraphReport, SiteReport
from .substitution.regions import Given, calls_in

_Addresses = tuple[int, ...]


@dataclass(frozen=True)
class _Weights:
    """The parameters of one network, at one call of the graph that has it.

    Attributes:
        inputs: of the whole graph, in which they are given; none if no weight is a parameter.
        names: what the report of the graph calls each of them, in the names of the first call.
    """

    inputs: tuple[str, ...]
    names: tuple[str, ...]


@dataclass
class _Seen:
    """A network that the graph was called for: the inputs, and what was given in them."""

    inputs: tuple[str, ...]
    given: dict[str, int]
    storages: list[StorageWeakRef]

    def is_gone(self) -> bool:
        return any(one.expired() for one in self.storages)


class Followed:
    """The networks that a compiled graph, or one of the parts that DDP makes of it, is called for.

    Attributes:
        weights: of each site of the report, at each call of the inner graph that has it, or at one.
        seen: the networks by the addresses of their parameters, in the order in which they came.
        counted: how many networks are counted.
    """

    def __init__(self, gm: fx.GraphModule, sites: Sequence[tuple[fx.GraphModule, Site]]) -> None:
        calls = calls_in(gm) if sites else {}
        self.weights = [[*_weights(site, calls.get(module, []))] for module, site in sites]
        inputs = [one.inputs for calls in self.weights for one in calls if one.inputs]
        self._networks = Counter(inputs)  # that are given in these inputs
        self._at_once = len(inputs)  # networks of one call
        self.counted = len(inputs)
        self.seen: dict[_Addresses, _Seen] = {}
        self._open = [*self._networks]
        self._lock = Lock()

    def calls_of(self, compiled: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
        """What is compiled of the graph, or of a part of it, with its calls followed.

        A network is followed in the first part that takes the first of its weights, by those that
        this part takes. What is no function is left as it is: it may be something that PyTorch
        saves. So is what can be saved as a whole.
        """
        places = {node.name: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        here = {
            inputs: {name: places[name] for name in inputs if name in places}
            for inputs in self._open
            if inputs[0] in places
        }
        saved = getattr(compiled, "serialize", None) is not None
        if not here or saved or not isinstance(compiled, (FunctionType, MethodType)):
            return compiled
        self._open = [inputs for inputs in self._open if inputs not in here]
        known: set[_Addresses] = set()
        note = self._note
        a, b, c, d = _looked_at([[*one.values()] for one in here.values()])

        def run(*given: Any) -> Any:
            looked_at = (id(given[a]), id(given[b]), id(given[c]), id(given[d]))
            if looked_at not in known:
                note(given, here, known, looked_at)
            return compiled(*given)

        return run

    def _note(
        self,
        given: Sequence[Any],
        here: dict[tuple[str, ...], dict[str, int]],
        known: set[_Addresses],
        looked_at: _Addresses,
    ) -> None:
        if is_tracing():  # Dynamo runs the parts of a graph on fake tensors
            return
        with only_reporting("a count of networks"), self._lock:
            for addresses, one in [*self.seen.items()]:
                if one.is_gone():
                    del self.seen[addresses]
                    known.clear()
            # One at addresses that a dead one had until now is seen at its next call.
            known.add(looked_at)
            for inputs, places in here.items():
                tensors = {name: given[place] for name, place in places.items()}
                parameters = {k: x for k, x in tensors.items() if isinstance(x, nn.Parameter)}
                if not parameters:
                    known.discard(looked_at)
                    continue
                at = {name: id(x) for name, x in parameters.items()}
                if (key := (*at.values(),)) not in self.seen:
                    storages = [*map(weak_storage, parameters.values())]
                    self.seen[key] = _Seen(inputs, at, storages)
            there = sum(self._networks[one.inputs] for one in self.seen.values())
            if there > self.counted:
                # As if the graph had been compiled for each of the layers.
                graphs = -(-there // self._at_once) - -(-self.counted // self._at_once)
                counters["flashmhf"]["graphs"] += graphs
                counters["flashmhf"]["sites_rewritten"] += there - self.counted
                self.counted = there


def _looked_at(networks: Sequence[Sequence[int]]) -> list[int]:
    """The four places that every call looks at.

    All, if there are no more. Of a graph that has many networks, those of the first and the last:
    a layer, or a model, that has others of its own and shares these with one that was seen is not
    worth the time.
    """
    places = [*dict.fromkeys(place for network in networks for place in network)]
    if len(networks) > 1 and len(places) > 4:
        places = [
            *dict.fromkeys(one[end] for one in (networks[0], networks[-1]) for end in (0, -1))
        ]
    last = len(places) - 1
    return [places[round(number * last / 3)] for number in range(4)]


def in_calls(
    report: GraphReport, followed: Followed, names: Names, numbers: dict[Hashable, int]
) -> GraphReport:
    """The report of a graph, of all networks that it was called for by now.

    Args:
        report: of the graph.
        followed: its calls.
        names: of the model.
        numbers: of all networks by the addresses of their parameters; new ones are added.
    """
    seen = [*followed.seen.items()]
    if not seen or len(followed.weights) != len(report.rewritten):
        return report
    networks = [
        [*_networks(site, weights, seen, numbers)]
        for site, weights in zip(report.rewritten, followed.weights, strict=True)
    ]
    return in_calls_seen(report, networks, names)


def _networks(
    site: SiteReport,
    weights: Sequence[_Weights],
    seen: Sequence[tuple[_Addresses, _Seen]],
    numbers: dict[Hashable, int],
) -> Iterator[Network]:
    """The networks that one site was called for, once for each call; none if none was followed."""
    found = False
    calls = [*zip(weights, site.modules, strict=False)]
    for addresses, one in seen:
        for weight, module in calls:
            if weight.inputs == one.inputs:
                named = zip(weight.inputs, weight.names, strict=True)
                given = {name: one.given[i] for i, name in named if i in one.given}
                number = numbers.setdefault(addresses, len(numbers))
                found = True
                yield Network(number, given, module)
    for weight, module in calls if found else ():
        if not weight.inputs:
            yield Network(numbers.setdefault(weight, len(numbers)), {}, module)


def _weights(site: Site, calls: Sequence[Given]) -> Iterator[_Weights]:
    """The parameters among the weights of a site, at each call of the graph that has it."""
    nodes = [*inputs_of_weights(site)]
    for call in calls:
        given = {node: call[node.name] for node in nodes if node.name in call}
        given = {node: one for node, one in given.items() if _is_parameter(one)}
        first = [calls[0].get(node.name, one) for node, one in given.items()]
        inputs = (one.name for one in given.values())
        yield _Weights((*inputs,), (*map(name_of_input, first),))


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(example_of(node), nn.Parameter)
