"""From sites and near-misses to the values of a report, in the words of the model's author.

A graph says ``l_self_modules_ffn_parameters_gate_``, its author says ``ffn.gate``. Names come from
where Dynamo found each input, module paths from the stack of modules that each node was traced in,
and lines from its stack of frames. The formula uses the paper's letters; the list of arguments maps
them to the model's names.
"""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import fx

from ..compat import Interruption, names_of_self, reason_of_graph_break, source_name
from ..patterns import (
    STACK,
    Affine,
    Location,
    NearMiss,
    Reason,
    RouterProduct,
    Site,
    Size,
    TensorView,
    Value,
    is_product_call,
    locate,
    modules_around,
)
from .folding import folded
from .values import (
    Argument,
    GraphBreak,
    GraphReport,
    Module,
    Operation,
    RegionNode,
    SiteReport,
    UnreadGraph,
    Work,
)

if TYPE_CHECKING:
    from ..lowering.cost import Estimate
    from ..lowering.workload import Workload

#: role of a site -> its letter, in the order of the formula
_LETTERS = {
    "query": "Q",
    "gate": "K",
    "up": "U",
    "down": "V",
    "gate_bias": "bK",
    "up_bias": "bU",
    "down_bias": "bV",
    "residual": "X",
}
_WEIGHTS = tuple(role for role in _LETTERS if role not in ("query", "residual"))
_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<function>.+)_at_\d+")
_MOST_NAMES = 3
_MOST_FOLLOWED = 20_000  # operations of a region, of which many may be rounds of a loop
_MOST_NODES = 160  # of a region without those; a larger picture is unreadable
_MOST_AROUND = 24  # neighbours of an operation


def site_report(
    site: Site,
    workload: Workload,
    estimate: Estimate | None,
    reason: Reason | None = None,
    products: Sequence[RouterProduct] = (),
) -> SiteReport:
    """A proved site: rewritten with the products before its router, or declined with a reason."""
    from ..lowering.summary import kernels_of

    module, module_class = _module_of_site(site)
    return SiteReport(
        heads=site.heads,
        groups=site.groups,
        head_dim=site.head_dim,
        sub_networks=site.sub_networks,
        hidden=site.hidden,
        activation=site.activation,
        gated=site.gated,
        routed=site.routed,
        location=site.location,
        reason=_without_node(reason),
        module=module,
        module_class=module_class,
        formula=formula(site),
        arguments=tuple(_arguments(site)),
        lowered=() if reason is not None else (*kernels_of(workload), *map(_product, products)),
        work=_work(workload, estimate),
        region=_region(site),
        scales=(site.gate_scale, site.up_scale, site.out_scale),
        device=f"cuda:{card.name}" if (card := workload.card) and card.name else str(site.device),
    )


def _product(product: RouterProduct) -> str:
    dtype = str(product.query.value.dtype).removeprefix("torch.")
    return f"the router's product reads {name_of(product.query.value)} in {dtype}, without a copy"


def near_miss_report(miss: NearMiss) -> SiteReport:
    """A candidate that was not proved: the operation that decided it, and its down projection."""
    node = miss.reason.node or miss.anchor.origin
    stack = _modules(node)
    module, module_class = stack[-1] if stack else (None, None)
    return SiteReport(
        location=miss.location,
        reason=_without_node(miss.reason),
        module=module,
        module_class=module_class,
        operation=operation(node),
        region=_around(node),
    )


def unfollowed_products(name: str, products: Sequence[fx.Node]) -> str:
    """A note on matrix products of tensors of a class that defines its own operations."""
    number = f"{len(products)} matrix product{'s' if len(products) > 1 else ''}"
    first = locate(products[0]) or "an unknown line"
    what = f"of tensors of the class {name}, which defines its own operations"
    return f"{number} {what}, not looked into: the first is at {first}"


def unread_graph(reason: Reason) -> UnreadGraph:
    """A graph that was not analysed, with the line of the operation that is to blame."""
    where = None if reason.node is None else locate(reason.node)
    return UnreadGraph(replace(reason, node=None), where)


def modules_of(gm: fx.GraphModule) -> list[Module]:
    """The modules whose operations are in a graph, in their order, without the model itself."""
    found = {path: kind for node in gm.graph.nodes for path, kind in _modules(node)}
    return [Module(path, kind) for path, kind in found.items() if path not in names_of_self()]


def operation(node: fx.Node) -> Operation:
    """A node as a report shows it: its call, source line and innermost module."""
    stack = _modules(node)
    return Operation(node.name, _call(node), locate(node), stack[-1][0] if stack else None)


def matrix_products(gm: fx.GraphModule) -> list[Operation]:
    """Every matrix product of a graph, each a possible down projection."""
    return [operation(node) for node in gm.graph.nodes if is_product_call(node)]


def graph_break(gm: fx.GraphModule) -> GraphBreak | None:
    """Why Dynamo ended this graph, if the model continues after it."""
    found = reason_of_graph_break(gm)
    if found is None:
        return None
    text, frame = found
    if frame is None:
        return GraphBreak(_shortened_reason(text))
    place = Location(frame.filename, frame.lineno or 0, _function(frame.name), frame.line or "")
    return GraphBreak(_shortened_reason(text), place)


def breaks_without_graph(
    noted: Sequence[Interruption], graphs: Sequence[GraphReport]
) -> list[GraphBreak]:
    """What Dynamo noted besides the ends of graphs: each place once, skipped functions first."""
    ends = {one.graph_break.location for one in graphs if one.graph_break is not None}
    found: dict[tuple[str, int], GraphBreak] = {
        (place.file, place.line): GraphBreak("", place) for place in ends if place is not None
    }
    known = len(found)
    for one in noted:
        if (one.file, one.line) not in found:
            code = linecache.getline(one.file, one.line).strip()
            place = Location(one.file, one.line, _function(one.function), code)
            skipped = one.skipped and _function(one.skipped)
            found[one.file, one.line] = GraphBreak(_shortened_reason(one.reason), place, skipped)
    return [*found.values()][known:]


def _shortened_reason(text: str) -> str:
    """Dynamo's words without its links and what is of use to its developers alone."""
    return text.split("For more details about")[0].split("\n\n")[0].strip()


def _function(name: str) -> str:
    """The name of a function in the source, also of what Dynamo has made of its rest."""
    resumed = _RESUMED.fullmatch(name)
    return resumed["function"] if resumed else name


# The formula and its names.


def formula(site: Site) -> str:
    """What the site computes for one token of one head, over the roles of its arguments."""
    at = "[e]" if site.sub_networks > 1 or site.routed else ""

    def affine(scale: float, product: str, bias: TensorView | None, name: str) -> str:
        text = product if scale == 1.0 else f"{scale:g} * {product}"
        return text if bias is None else f"{text} + {name}{at}"

    gate = affine(site.gate_scale, f"Q K{at}^T", site.gate_bias, "bK")
    hidden = f"{site.activation}({gate})"
    if site.gated:
        up = affine(site.up_scale, f"Q U{at}^T", site.up_bias, "bU")
        hidden = f"({hidden} * ({up}))"
    out = affine(1.0, f"{hidden} V{at}", site.down_bias, "bV")
    if at:
        routers = [f"{_letter(role)}[e]" for role in site.views() if role.startswith("router")]
        term = f"({out})" if site.down_bias is not None else out
        out = f"sum over e of {' * '.join([*routers, term])}"
    out = out if site.out_scale == 1.0 else f"{site.out_scale:g} * ({out})"
    return out if site.residual is None else f"{out} + X"


def _letter(role: str) -> str:
    if role.startswith("router"):
        return "R" if role == "router0" else f"R{int(role.removeprefix('router')) + 1}"
    return _LETTERS[role]


def _arguments(site: Site) -> Iterator[Argument]:
    order = [*_LETTERS]
    views = site.views()
    for role in sorted(views, key=lambda role: order.index(role) if role in order else 3.5):
        view = views[role]
        value = _before_views(view.value)
        computed = value.op != STACK and bool(value.operands)
        yield Argument(
            role=_letter(role),
            name=name_of(value),
            shape=tuple(size if isinstance(size, int) else str(size) for size in view.shape),
            dtype=str(view.value.dtype).removeprefix("torch."),
            location=locate(value.origin) if computed else None,
            tensors=tuple(_names_of(value)),
            part=_part(view),
            copied_bytes=_copied_bytes(role, view),
        )


def _part(view: TensorView) -> str:
    """Which part of its tensor a view shows, as slices; empty for all, and for what is no slice."""
    value = view.value
    if value.op == STACK or _before_views(value).shape != value.shape:
        return ""
    shown = [_slice(form, size) for form, size in zip(view.index, value.shape, strict=True)]
    while shown and shown[-1] == ":":
        shown.pop()
    return "" if None in shown or not shown else f"[{', '.join(map(str, shown))}]"


def _slice(form: Affine, size: Size) -> str | None:
    """The coordinates that a form takes in a dimension, as a slice; None if they are none."""
    steps = [(axis.size, step) for axis, step in form.resolved().terms if axis.size != 1]
    numbers = (size, form.offset, *(number for pair in steps for number in pair))
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        return ":" if form.offset == 0 and len(steps) == 1 and steps[0] == (size, 1) else None
    start, last = int(form.offset), int(form.offset)
    step = 0
    for count, stride in sorted(steps, key=lambda pair: pair[1]):
        if step and stride != last - start + step:  # the next run does not begin where one ends
            return None
        step = step or int(stride)
        last += (int(count) - 1) * int(stride)
    if not steps:
        return str(start)
    if step == 1:
        return ":" if (start, last) == (0, size - 1) else f"{start}:{last + 1}"
    return f"{start or ''}::{step}" if last + step >= size else f"{start}:{last + 1}:{step}"


def _copied_bytes(role: str, view: TensorView) -> float:
    """Of the weights that a call copies to have them in one tensor."""
    if role not in _WEIGHTS or view.value.op != STACK or len(view.value.args) < 2:
        return 0.0
    sizes = [size for size in view.shape if isinstance(size, int)]
    return float(math.prod(sizes) * view.value.dtype.itemsize)


def _before_views(value: Value) -> Value:
    """The input under a chain of casts and other operations of one tensor, if there is one."""
    source = value
    while source.op != STACK and len(source.operands) == 1:
        (source,) = source.operands
    return source if not source.operands else value


def inputs_of_weights(site: Site) -> Iterator[fx.Node]:
    """The inputs of the site's graph that its weights are read from, those of the gate first.

    The weights of its router are among them, and what else its arguments are computed from, unless
    the queries are computed from it, too.
    """
    before = {value for value in site.query.value.ancestors() if value.operands}
    views = site.views()
    todo = [views[role].value for role in views if role not in ("query", "residual")][::-1]
    seen = {*before}
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        todo += value.operands[::-1]
        if not value.operands and value.origin.op == "placeholder":
            yield value.origin


def name_of(value: Value) -> str:
    """The model's name for it: the path of a parameter, the variable of a computed value."""
    return shortened([*_names_of(value)])


def shortened(names: Sequence[str]) -> str:
    """The names of stacked tensors as one text; of many, the first and the last."""
    if len(names) > _MOST_NAMES:
        return f"{names[0]} ... {names[-1]} ({len(names)} tensors)"
    return ", ".join(names)


def _names_of(value: Value) -> Iterator[str]:
    """The names of all tensors of a stack, which may be nested; that of any other value."""
    for source in _sources(value):
        yield source.origin.name if source.operands else name_of_input(source.origin)


def _sources(value: Value) -> Iterator[Value]:
    """All tensors of a stack, which may be nested; any other value itself."""
    if value.op == STACK:
        for part in value.args:
            yield from _sources(_before_views(part))
    else:
        yield value


def name_of_input(node: fx.Node) -> str:
    """The model's name for an input of a graph."""
    return readable(source_name(node) or str(node.target))


def readable(source: str) -> str:
    """``ffn.gate`` for ``L['self']._modules['ffn']._parameters['gate']``, as Dynamo has it."""
    return _readable(source, names_of_self())


@lru_cache(maxsize=4096)
def _readable(source: str, selves: tuple[str, ...]) -> str:
    text = re.sub(r"\._(?:modules|parameters|buffers)(?=\[)", "", source)
    text = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", text)
    text = re.sub(r"^[LG]\.", "", text)
    first, dot, rest = text.partition(".")
    return rest if dot and rest and first in selves else text


# Modules and operations.


def _modules(node: fx.Node) -> list[tuple[str, str]]:
    """The modules that a node was traced in, outermost first: path, and name of the class."""
    return _named(node.meta.get("nn_module_stack") or {})


def _named(stack: Mapping[str, tuple[str, Any]]) -> list[tuple[str, str]]:
    modules = stack.values()
    return [(readable(path), getattr(kind, "__name__", str(kind))) for path, kind in modules]


def _module_of_site(site: Site) -> tuple[str | None, str | None]:
    """The innermost module that contains all projections; views may be outside of it."""
    stack = _stack_of_site(site)
    return stack[-1] if stack else (None, None)


def classes_around(site: Site) -> set[str]:
    """The names of the classes of all modules that contain all projections of a site."""
    return {name for _, name in _stack_of_site(site)}


def _stack_of_site(site: Site) -> list[tuple[str, str]]:
    return _named(modules_around(site))


def boundary(site: Site) -> dict[Value, str]:
    """The values that the op's arguments are read from, each with its letter in the formula."""
    letters: dict[Value, str] = {}
    for role, view in site.views().items():
        for value in _parts(_before_views(view.value)):
            letters.setdefault(value, _letter(role))
    return letters


def _region(site: Site) -> tuple[RegionNode, ...]:
    """The nodes from the arguments to the output, in the order of the graph, loops folded."""
    roles = {site.output_node: "out"}
    for role, view in site.views().items():
        for value in _parts(_before_views(view.value)):
            letters = roles.get(value.origin, "").split(", ")
            if letters != ["out"] and _letter(role) not in letters:
                roles[value.origin] = ", ".join([*filter(None, letters), _letter(role)])
    found: set[fx.Node] = set()
    todo = [site.output_node, *(value.origin for value in site.replaces)]
    while todo and len(found) <= _MOST_FOLLOWED:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [] if roles.get(node, "out") != "out" else node.all_input_nodes
    if len(found) > _MOST_FOLLOWED:
        return ()
    ends = {node for node, role in roles.items() if role != "out"}
    region = folded([*_region_nodes(site.output_node.graph, found, roles, ends)])
    return tuple(region) if len(region) <= _MOST_NODES else ()


def _around(offending: fx.Node) -> tuple[RegionNode, ...]:
    """The operations nearest to one: its users, and the operands of it and of those."""
    found = {offending: True}  # in order of distance -> whether it depends on the offending one
    edge = [offending]
    while edge and len(found) < _MOST_AROUND:
        near = {node: False for reader in edge for node in reader.all_input_nodes}
        near |= {reader: True for node in edge if found[node] for reader in node.users}
        edge = [node for node in near if node not in found and node.op != "output"]
        edge = edge[: _MOST_AROUND - len(found)]
        found |= {node: near[node] for node in edge}
    return tuple(_region_nodes(offending.graph, {*found}, {offending: "offends"}, set()))


def _region_nodes(
    graph: fx.Graph, nodes: set[fx.Node], roles: dict[fx.Node, str], ends: set[fx.Node]
) -> Iterator[RegionNode]:
    """Nodes as values, in the order of the graph; ``ends`` are shown without what they read."""
    for node in graph.nodes:
        if node in nodes:
            yield RegionNode(
                name=node.name,
                call=_shown(node) if node.op in ("placeholder", "get_attr") else _call(node),
                role=roles.get(node),
                inputs=() if node in ends else tuple(n.name for n in node.all_input_nodes),
            )


def _parts(value: Value) -> list[Value]:
    """A tensor of the graph, or those that are stacked."""
    return [_before_views(part) for part in value.args] if value.op == STACK else [value]


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def _call(node: fx.Node) -> str:
    arguments = [_shown(argument) for argument in node.args]
    named = [f"{key}={_shown(argument)}" for key, argument in node.kwargs.items()]
    if node.op == "call_method" and arguments:
        subject, *arguments = arguments
        return f"{node.name} = {subject}.{node.target}({', '.join(arguments + named)})"
    return f"{node.name} = {_target(node)}({', '.join(arguments + named)})"


def _shown(argument: object) -> str:
    if isinstance(argument, fx.Node) and argument.op in ("placeholder", "get_attr"):
        return name_of_input(argument)
    return str(argument)


def _without_node(reason: Reason | None) -> Reason | None:
    """The reason without its node, so that a report does not keep its graph alive."""
    return None if reason is None else replace(reason, node=None)


# Work.


def _work(workload: Workload, estimate: Estimate | None) -> Work:
    s = workload.sizes
    projections = 3 if s.gated else 2
    weights = projections * math.prod(s.weight_shape)
    routers = s.tokens * s.heads * s.sub_networks if s.routed else 0
    ends = s.tokens * s.heads * s.head_dim * (s.dtype.itemsize + workload.out_dtype.itemsize)
    units = s.tokens * s.heads * s.sub_networks * s.hidden
    known = estimate is not None and estimate.original > 0
    return Work(
        tokens=s.tokens,
        dynamic=workload.dynamic,
        flops=2.0 * projections * units * s.head_dim,
        bytes=float(ends + (weights + routers) * s.dtype.itemsize),
        hidden_bytes=float(units * s.dtype.itemsize),
        kept_bytes=float((projections - 1) * units * s.dtype.itemsize * workload.training),
        rewritten=estimate.rewritten if estimate is not None and known else None,
        original=estimate.original if estimate is not None and known else None,
    )
