"""Networks stay whole where DistributedDataParallel's buckets cut a graph.

Dynamo cuts the graph of a model in DDP wherever a bucket of gradients is full, and hands the back
end one part after the other, so that a bucket is sent while the backward pass of the part before is
still running. A network whose weights fill a bucket is cut in the middle, and neither half is one.

So the whole graph is rewritten when its first part arrives, and every part is compiled from the
rewritten graph. The parts stay what they were, and so does the order in which buckets are full,
except that a network belongs to the part that holds its output:

    part 0    h = act(q k)        becomes    part 0    passes q and k on
    part 1    y = h v                        part 1    y = multi_head_ffn(q, k, v)

Dynamo's program around the parts knows nothing of this. It carries h from part 0 to part 1; what it
now carries in that place is a ``_Carried``, which holds q and k. Only what the whole graph returns
is always a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch.fx.passes.split_module import split_module

from .compat import BUCKET, BucketCut, copy_dynamo_metadata, counters, is_tracing
from .errors import warn_once
from .options import Options
from .patterns import Kind, Reason
from .report.logs import announce
from .report.values import GraphReport
from .substitution.graph import Keep, rewrite_graph

_NAME = "flashmhf_name"  # in a node's ``meta``: its name in the graph that was split

Values = dict[str, Any]  # by the name of the node


class CutError(Exception):
    """The rewritten graph does not fit between the parts; the message says why."""


@dataclass
class Part:
    """One part of the rewritten graph, and how it fits in the place of one of the original graph.

    Attributes:
        module: what it computes; None if nothing is left.
        takes: the values that ``module`` takes.
        gives: the values that it returns.
        inputs: what Dynamo's program passes, by the names of the original graph.
        slots: what that program expects to be returned, by the names of the original graph.
        returned: for each slot that the model returns, the value of the rewritten graph.
        carried: for each other slot, the values that later parts need.
        examples: of the values, on fake tensors while the parts are compiled; shared by all parts.
        originals: of the slots in the original graph.
        returned_as: what each result of the whole graph is called in the rewritten graph.
    """

    module: fx.GraphModule | None
    takes: list[str]
    gives: list[str]
    inputs: list[str]
    slots: list[str]
    returned: dict[str, str]
    carried: dict[str, list[str]]
    examples: Values
    originals: Values
    returned_as: dict[str, str]

    def check(self, gm: fx.GraphModule) -> None:
        """Raise if this is not the part that Dynamo gives."""
        inputs = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        (results,) = gm.graph.output_node().args
        if inputs != self.inputs or len(_listed(results)) != len(self.slots):
            raise CutError(
                "a part of a graph is not the one that DDP's buckets cut out: "
                "set torch._dynamo.config.optimize_ddp = False"
            )

    def example_inputs(self, given: Sequence[Any]) -> list[Any]:
        """Examples of what ``module`` takes, from those that Dynamo gives for the part."""
        for name, value in zip(self.inputs, given, strict=True):
            self.examples.setdefault(name, value)
        return [self.examples.get(name) for name in self.takes]

    def place(self, compiled: Callable[..., Any] | None) -> Callable[..., Any]:
        """The compiled module as Dynamo's program calls it."""

        def run(*given: Any) -> tuple[Any, ...]:
            if is_tracing():
                return self._run_on_examples(compiled)
            known: Values = {}
            for name, value in zip(self.inputs, given, strict=True):
                if isinstance(value, _Carried):
                    known.update(value.values)
                else:
                    known[self.returned_as.get(name, name)] = value
            if compiled is not None:
                known.update(zip(self.gives, compiled(*map(known.get, self.takes)), strict=True))
            return tuple(
                known[self.returned[slot]]
                if slot in self.returned
                else _Carried({name: known[name] for name in self.carried[slot]})
                for slot in self.slots
            )

        return run

    def _run_on_examples(self, compiled: Callable[..., Any] | None) -> tuple[Any, ...]:
        """Dynamo runs each part once, as soon as it is compiled, to learn its results' strides."""
        if compiled is not None:
            results = compiled(*map(self.examples.get, self.takes))
            self.examples.update(zip(self.gives, results, strict=True))
        return tuple(
            self.examples.get(self.returned.get(slot, ""), self.originals[slot])
            for slot in self.slots
        )


class _Carried:
    """Values that pass through a place of Dynamo's program where there was a tensor."""

    def __init__(self, values: Values) -> None:
        self.values = values


def rewrite_whole(
    cut: BucketCut, options: Options, keep: Keep | None = None
) -> tuple[fx.GraphModule, GraphReport, list[Part] | None]:
    """Rewrite a copy of the whole graph; ``options`` and ``keep`` as for ``rewrite_graph``.

    Returns:
        The copy, its report, and the parts; None for these if Dynamo's are to be compiled as they
        are, because there is nothing to rewrite or the networks cannot be kept whole.
    """
    for bucket, nodes in enumerate(cut.buckets):
        for node in nodes:
            node.meta[BUCKET] = bucket
    gm = _copied(cut.gm)
    counted = counters["flashmhf"].copy()
    report = rewrite_graph(gm, options, keep)
    if not report.rewritten:
        return gm, report, None
    try:
        return gm, report, fit(cut, gm)
    except CutError as error:
        counters["flashmhf"] = counted
        reason = Reason(Kind.CUT_BY_BUCKETS, str(error))
        report.declined += [replace(site, reason=reason) for site in report.rewritten]
        report.rewritten, report.after = [], report.before
        announce(report)
        warn_once(str(reason), reason.kind.remedy)
        return _copied(cut.gm), report, None


def fit(cut: BucketCut, rewritten: fx.GraphModule) -> list[Part]:
    """The parts of the rewritten graph, one for each of Dynamo's, in the order in which they run.

    Raises:
        CutError: a part would need a value that does not reach it.
    """
    ours = _split(rewritten)
    nodes = {node.name: node for node in cut.gm.graph.nodes}
    returned_as = _results(cut.gm, rewritten)
    examples: Values = {}
    parts = [
        Part(
            module=half.module,
            takes=half.takes,
            gives=half.gives,
            inputs=then.takes,
            slots=then.gives,
            returned={slot: returned_as[slot] for slot in then.gives if slot in returned_as},
            carried={slot: [] for slot in then.gives if slot not in returned_as},
            examples=examples,
            originals={slot: nodes[slot].meta.get("example_value") for slot in then.gives},
            returned_as=returned_as,
        )
        for bucket, then in _split(_copied(cut.gm)).items()
        for half in [ours.get(bucket, _Half())]
    ]
    _carry(parts)
    return parts


def _carry(parts: Sequence[Part]) -> None:
    """Decide what each slot carries, and check that each part gets what it needs."""
    brings: dict[str, set[str]] = {}  # by slot
    for number, part in enumerate(parts):
        known: set[str] = set()
        for name in part.inputs:
            known |= brings.get(name, {part.returned_as.get(name, name)})
        missing = [name for name in part.takes if name not in known]
        known |= {*part.gives}
        missing += [name for name in part.returned.values() if name not in known]
        if missing:
            raise CutError(f"part {number} of {len(parts)} does not get {', '.join(missing)}")
        needed = {
            name
            for later in parts[number + 1 :]
            for name in (*later.takes, *later.returned.values())
        }
        brings |= {slot: {name} for slot, name in part.returned.items()}
        for slot in part.carried:
            part.carried[slot] = sorted(known & needed)
            brings[slot] = known & needed


def _results(original: fx.GraphModule, rewritten: fx.GraphModule) -> dict[str, str]:
    """What each of the graph's results is called in the rewritten graph."""
    before, after = (_listed(gm.graph.output_node().args[0]) for gm in (original, rewritten))
    names: dict[str, str] = {}
    for old, new in zip(before, after, strict=True):
        if not (isinstance(old, fx.Node) and isinstance(new, fx.Node)):
            continue
        if names.setdefault(old.name, new.name) != new.name:
            raise CutError(f"{old.name} is returned twice, in different memory")
    return names


@dataclass
class _Half:
    """One part of a split graph: its module and the names of what it takes and gives."""

    module: fx.GraphModule | None = None
    takes: list[str] = field(default_factory=list)
    gives: list[str] = field(default_factory=list)


def _split(gm: fx.GraphModule) -> dict[int, _Half]:
    """Split a graph as ``DDPOptimizer`` does: by bucket, in the order in which the parts run."""
    sources = {}
    for node in gm.graph.nodes:
        node.meta[_NAME] = node.name
        if node.op == "placeholder":
            sources[node.name] = getattr(node, "_dynamo_source", None)
    split = split_module(gm, None, lambda node: node.meta[BUCKET])  # type: ignore[arg-type]
    parts = {}
    for call in split.graph.find_nodes(op="call_module"):
        module = split.get_submodule(str(call.target))
        assert isinstance(module, fx.GraphModule)
        output = module.graph.output_node()
        results = _listed(output.args[0])
        output.args = (tuple(results),)
        module.recompile()
        inputs = module.graph.find_nodes(op="placeholder")
        for node in inputs:
            node._dynamo_source = sources.get(node.meta[_NAME])
        module.meta = gm.meta
        for name in ("_param_name_to_source", "_source_to_user_stacks"):
            if hasattr(gm, name):
                setattr(module, name, getattr(gm, name))
        names = [[node.meta[_NAME] for node in nodes] for nodes in (inputs, results)]
        parts[int(str(call.target).removeprefix("submod_"))] = _Half(module, *names)
    return parts


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy down to the graphs of higher-order operations, over the same tensors."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    output = graph.output(graph.graph_copy(gm.graph, nodes))
    output.meta.update(gm.graph.output_node().meta)
    for old, new in nodes.items():
        copy_dynamo_metadata(old, new)
    attributes = {
        str(node.target): _attribute(gm, str(node.target))
        for node in gm.graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    copied = fx.GraphModule(attributes, graph)
    copied.meta = dict(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(copied):
            setattr(copied, name, value)
    return copied


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name)
    return _copied(value) if isinstance(value, fx.GraphModule) else value


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]
