"""What is looked at in a graph, and what is said of networks that are apart."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import call, graph_of
from support.values import a_value
from torch import Tensor, fx, nn

from mhf_compiler.patterns import Kind, Reason, find_sites, recognise
from mhf_compiler.patterns.canonical import INPUT, CanonicalCopy, Value
from mhf_compiler.patterns.checks import TWO_DIMENSIONS
from mhf_compiler.patterns.recognise import _PROJECTED as PROJECTED
from mhf_compiler.patterns.recognise import (
    Findings,
    NearMiss,
    _adds_to,
    _anchors,
    _as_loops_or_ordinary,
    _best,
    _is_unfinished,
    _keeps_form,
    _left_out,
    _may_be_activation,
    _meeting,
    _near_miss,
    _not_summed,
    _parts_apart,
    _parts_of_one,
    _path,
    _projections_of,
    _summed_apart,
    _sums_after,
    _try,
    _views_of_its_node,
)
from mhf_compiler.patterns.tracer import trace

aten = torch.ops.aten
T, H, d, f = 6, 4, 8, 5


class Ffn(nn.Module):
    """Weights of four networks; ``compute`` says what becomes of them."""

    def __init__(self, compute: Callable[[Ffn, Tensor], Any]) -> None:
        super().__init__()
        self.compute = compute
        self.up, self.down = (nn.Parameter(torch.randn(s)) for s in ((H, d, f), (H, f, d)))

    def plain(self, x: Tensor, e: int) -> Tensor:
        """One network of (T, d)."""
        return (x @ self.up[e]).relu() @ self.down[e]

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def found(compute: Callable[[Ffn, Tensor], Any]) -> Findings:
    return find_sites(graph_of(Ffn(compute), torch.randn(T, d)))


def said(findings: Findings) -> list[Kind | Any]:
    return [miss.reason.kind for miss in findings.near_misses]


class Traced:
    """The copy of a function of two tensors (T, T), its values by the names of nodes."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.gm = graph_of(function, torch.randn(T, T), torch.randn(T, T))
        self.copy = trace(self.gm)
        self.values = {node.name: value for node, value in self.copy.value_of.items()}

    def __getitem__(self, name: str) -> Value:
        return self.values[name]


# Near-misses, and where they are.


def at_line(number: int) -> dict[str, str]:
    return {"stack_trace": f'  File "/model.py", line {number}, in forward\n    y = x @ w'}


@pytest.mark.parametrize(
    ("has_node", "node_has_line", "line"), [(True, True, 2), (True, False, 1), (False, False, 1)]
)
def test_a_near_miss_is_where_its_reason_is_or_else_where_the_network_is(
    has_node: bool, node_has_line: bool, line: int
):
    copy = Traced(lambda x, y: (x @ y).sin())
    node, value = copy["sin"].origin, copy["matmul"]
    value.origin.meta |= at_line(1)
    node.meta |= at_line(2) if node_has_line else {}
    reason = Reason(Kind.PLAIN_FFN, "", node if has_node else None)
    location = _near_miss(reason, value).location
    assert location is not None
    assert location.line == line


# What may be a network.


def test_a_graph_that_cannot_have_a_network_is_not_read():
    """Nothing is said either of what could not be read."""
    findings = find_sites(graph_of(lambda x, w: (x @ w).detach_(), *torch.randn(2, T, T)))
    assert findings.copy is None
    assert findings.unreadable is None


def test_a_product_over_its_own_operand_is_looked_at_if_it_reads_hidden_units():
    """What it computes is not known: it may read what it has written."""

    def over(hidden: Callable[[Tensor], Tensor], used: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def compute(x: Tensor, w: Tensor) -> Tensor:
            h = hidden(x @ w)
            torch.mm(h, w, out=h)
            return h if used else x

        return compute

    def looked_at(hidden: Callable[[Tensor], Tensor], used: bool) -> int:
        with torch.no_grad():
            gm = graph_of(over(hidden, used), torch.randn(T, T), torch.randn(T, T))
            return find_sites(gm).looked_at

    assert looked_at(torch.relu, True) == 1
    assert looked_at(torch.relu, False) == 0
    assert looked_at(torch.neg, True) == 0


def test_a_network_that_nothing_reads_is_not_looked_at():
    def compute(m: Ffn, x: Tensor) -> Tensor:
        m.plain(x, 0)
        return m.plain(x, 1)

    assert found(compute).looked_at == 1


def test_an_unknown_result_of_hidden_units_is_no_product():
    def compute(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w @ w).relu()
        return call(h, unknown, h)

    gm = graph_of(compute, torch.randn(T, T), torch.randn(T, T))
    (node,) = gm.graph.find_nodes(op="call_function", target=unknown)
    node.meta["val"] = torch.randn(T, T)
    assert find_sites(gm).looked_at == 0


def unknown(hidden: Tensor) -> Tensor:
    raise NotImplementedError


def test_tokens_that_are_weighed_by_tokens_are_attended_to():
    """Though a projection has the logits: with weights instead, it would be a network."""

    def looked_at(values: Callable[[Ffn, Tensor], Tensor]) -> int:
        return found(lambda m, x: (x @ m.up[0]).softmax(-1) @ values(m, x)).looked_at

    assert looked_at(lambda m, x: m.down[0]) == 1
    assert looked_at(lambda m, x: x[:f]) == 0


def test_a_convolution_over_several_places_is_a_projection_too():
    """Though none that is read: what activates it and projects it again is told so."""

    def compute(x: Tensor, w: Tensor) -> Tensor:
        kernel = w[:, :, None].expand(T, T, 3)
        return F.conv1d(F.conv1d(x[None], kernel).relu(), kernel)

    findings = find_sites(graph_of(compute, *torch.randn(2, T, T)))
    assert findings.looked_at == 1
    assert said(findings) == [Kind.UNKNOWN_OPERATION]


OWN = SimpleNamespace(namespace="theirs", tags=())


@pytest.mark.parametrize(
    ("shapes", "projected", "may_be"),
    [
        ([(T, d)], [True], True),
        ([(T, d), (T, d)], [True, True], True),
        ([(T, 2 * d)], [True], True),
        ([(T, 3 * d)], [True], False),
        ([(T, d), (d,)], [True, True], False),
        ([(T, d), (T, d)], [True, False], False),
        ([(T, d), (2 * T, d)], [True, True], False),
        ([(T, d)] * 3, [True] * 3, False),
        ([], [], False),
    ],
    ids=[
        "one",
        "two",
        "packed",
        "three times as wide",
        "scaled",
        "with other tokens",
        "rows",
        "three",
        "none",
    ],
)
def test_an_op_of_projections_may_be_an_activation(
    shapes: list[tuple[int, ...]], projected: list[bool], may_be: bool
):
    operands = [a_value(aten.mm.default, shape=shape) for shape in shapes]
    flags = {v: PROJECTED for v, yes in zip(operands, projected, strict=True) if yes}
    assert _may_be_activation(a_value(OWN, *operands, shape=(T, d)), flags) is may_be


def test_an_operation_of_pytorch_is_an_activation_if_it_is_known_to_be_one():
    projection = a_value(aten.mm.default, shape=(T, d))
    flipped = a_value(aten.flip.default, projection, shape=(T, d))
    assert not _may_be_activation(flipped, {projection: PROJECTED})


@pytest.mark.parametrize("merged", [1, 2], ids=["nothing is summed", "two are summed"])
def test_a_sum_over_one_place_leaves_hidden_units_what_they_are(merged: int):
    """So that what they are multiplied with next is looked at, and told what is wrong with them."""

    def weighed(m: Ffn, x: Tensor) -> Tensor:
        hidden = (x @ m.up[0]).relu()[:, None]
        units = (hidden * x[:, :merged, None].sigmoid()).sum(1)
        return units.detach() @ m.down[0]

    assert (Kind.GRADIENTS_CUT in said(found(weighed))) is (merged == 1)


@pytest.mark.parametrize(
    ("op", "shape", "keeps"),
    [
        (aten.flip.default, (T, d), True),
        (aten.amax.default, (1, d), True),
        (aten.flip.default, (2 * T, d), False),
        (aten.flip.default, (T, 1), False),
        (aten.flip.default, (d,), False),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (T, d), False),
        (aten.native_batch_norm.default, (T, d), False),
        (OWN, (T, d), False),
    ],
    ids=[
        "all of it",
        "a row",
        "more rows",
        "no features",
        "no tokens",
        "attention",
        "batch norm",
        "their own",
    ],
)
def test_an_operation_of_a_projection_keeps_its_form(op: Any, shape: tuple[int, ...], keeps: bool):
    projection = a_value(aten.mm.default, shape=(T, d))
    assert _keeps_form(a_value(op, projection, shape=shape), {projection: PROJECTED}) is keeps


def test_the_order_of_a_projection_is_none():
    projection = a_value(aten.mm.default, shape=(T, d))
    order = a_value(aten.argsort.default, projection, shape=(T, d), dtype=torch.int64)
    assert not _keeps_form(order, {projection: PROJECTED})


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (x @ w).relu() @ w,
        lambda x, w: (x @ w).relu().t() @ w,
        lambda x, w: F.layer_norm((x @ w).relu(), [T]) @ w,
    ],
    ids=["an activation", "a view", "a norm"],
)
def test_what_hidden_units_are_made_of(function: Callable[[Tensor, Tensor], Tensor]):
    copy = Traced(function)
    (projection,) = _projections_of(copy["matmul_1"])
    assert projection is copy["matmul"]


# The way up from an anchor.


def test_a_product_is_read_again_for_the_output_that_it_is_added_to():
    output, other = a_value(aten.mm.default), a_value(aten.mm.default)
    product = a_value(aten.addmm.default, output, a_value(INPUT), a_value(INPUT))
    assert _adds_to(product, frozenset({output}))
    assert not _adds_to(product, frozenset({other}))
    assert not _adds_to(a_value(aten.add.Tensor, output, other), frozenset({output}))


class Accumulated(nn.Module):
    """Networks of one activation, weighed and summed, and those of another, which are added."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(s)) for s in ((H, d, f), (H, f, d)))
        self.route = nn.Parameter(torch.randn(d, 2))

    def outputs(self, x: Tensor, activate: Callable[[Tensor], Tensor], *ours: int) -> Tensor:
        return torch.stack([activate(x @ self.up[e]) @ self.down[e] for e in ours], 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ self.route).sigmoid()[:, None]
        first = torch.bmm(weights, self.outputs(x, torch.relu, 0, 1))
        return torch.baddbmm(first, weights, self.outputs(x, F.silu, 2, 3))


def test_a_product_that_is_a_site_is_not_read_again():
    """Each of its sub-networks leads to it, and it is added to another site's output."""
    findings = find_sites(graph_of(Accumulated(), torch.randn(T, d)))
    assert [site.output.op for site in findings.sites] == [aten.bmm.default, aten.baddbmm.default]


def test_the_lowest_of_equally_telling_reasons_is_told():
    low, high = a_value(aten.mm.default), a_value(aten.add.Tensor)
    reasons = {low: Reason(Kind.MUTATION), high: Reason(Kind.ROUNDING_CAST, "to float16")}
    told = _best([low, high], frozenset(), CanonicalCopy(), {**reasons}, frozenset())
    assert told is reasons[low]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Value]:
    """The candidates that are read as sites from now on."""
    roots: list[Value] = []
    read_output = recognise.read_output

    def counting(root: Value, *given: Any, **options: Any) -> Any:
        roots.extend([] if "without_dropout" in options else [root])
        return read_output(root, *given, **options)

    monkeypatch.setattr(recognise, "read_output", counting)
    return roots


def test_only_what_repeats_queries_is_read_once_more(monkeypatch: pytest.MonkeyPatch):
    roots = reads(monkeypatch)
    assert found(lambda m, x: m.plain(x, 0)).sites == []
    assert len(roots) == len({*roots}) > 0
    roots.clear()
    assert found(lambda m, x: m.plain(x.repeat(2, 1), 0)).sites == []
    assert len(roots) > len({*roots})


def test_queries_that_heads_share_are_read_from_before_they_were_repeated():
    def shared(m: Ffn, x: Tensor) -> Tensor:
        q = x.repeat(H, 1).view(H, T, d)
        return torch.bmm(torch.bmm(q, m.up).relu(), m.down).transpose(0, 1)

    (site,) = found(shared).sites
    assert site.query.value.op == INPUT


def test_the_views_that_a_node_has_returned_of_its_product():
    product = Traced(lambda x, w: torch.einsum("ab,cb->ca", x, w))
    (contraction,) = (value for value in product.copy.values if value.op is aten.bmm.default)
    *lower, highest = _views_of_its_node(contraction, product.copy)
    assert highest is product["einsum"]
    assert lower[0].source is contraction


def test_a_product_inside_of_what_its_node_computes_has_no_views_of_it():
    cell = Traced(lambda x, w: torch.rnn_relu_cell(x, x, w, x, w[0], x[0]))
    products = [value for value in cell.copy.values if value.op is aten.addmm.default]
    assert len(products) == 2
    assert [_views_of_its_node(product, cell.copy) for product in products] == [[], []]


def test_networks_that_only_a_dead_operation_merges_are_apart():
    def dead(m: Ffn, x: Tensor) -> tuple[Tensor, ...]:
        outs = [m.plain(x, h) for h in range(H)]
        torch.stack(outs)
        torch.stack([y.sin() for y in outs])
        return tuple(outs)

    findings = found(dead)
    assert findings.sites == []
    assert said(findings) == [Kind.PLAIN_FFN] * H


MEETING: dict[str, tuple[Callable[[Tensor, Tensor], Any], str | None]] = {
    "merged": (lambda x, y: torch.cat([(x @ y)[:, :3], (x @ y)[:, 3:]], 1).sin(), "cat"),
    "added": (lambda x, y: ((x @ y)[:, :3] + (x @ y)[:, 3:]).sin(), "add"),
    "scaled first": (lambda x, y: (2 * (x @ y)[:, :3] + (x @ y)[:, 3:].neg()).sin(), "add"),
    "and again": (lambda x, y: ((x @ y)[:, :3] + (x @ y)[:, 3:] + (x @ y)[:, :3]).sin(), "add_1"),
    "only one": (lambda x, y: (x @ y)[:, :3].sin(), "getitem"),
    "another operation": (lambda x, y: (x @ y)[:, :3].sin() + (x @ y)[:, 3:], None),
    "one is returned": (lambda x, y: ((p := (x @ y)[:, :3]) + (x @ y)[:, 3:], p), None),
    "two results": (lambda x, y: ((x @ y)[:, :3].neg(), (x @ y)[:, 3:].neg()), None),
    "sizes": (lambda x, y: ((x @ y).sin(), torch.zeros_like((x @ y)[:, :3])), "sin"),
    "sizes of a cast": (lambda x, y: ((x @ y).sin(), torch.zeros_like((x @ y).double())), "sin"),
}


@pytest.mark.parametrize(("function", "where"), MEETING.values(), ids=MEETING)
def test_where_all_that_is_read_of_a_value_meets(
    function: Callable[[Tensor, Tensor], Any], where: str | None
):
    copy = Traced(function)
    between: set[Value] = set()
    meeting = _meeting(copy["matmul"], copy.copy, between)
    assert meeting is (None if where is None else copy[where])
    assert meeting not in between
    assert where is None or all(copy["matmul"] in value.ancestors() for value in between)


def test_a_buffer_that_is_written_into_another_one_is_finished():
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        inner = x.new_zeros(T, T)
        inner[:3].copy_(x[:3])
        inner[3:].copy_(y[3:])
        outer = x.new_zeros(2 * T, T)
        outer[:T].copy_(inner)
        return inner, outer

    copy = Traced(function).copy
    first, second = (v for v in copy.values if v.op == "scatter" and v.shape == (T, T))
    assert _is_unfinished(first)
    assert not _is_unfinished(second)
    assert not _is_unfinished(first.source)  # nothing was written to it before


# Networks that are apart, and what keeps them so.


def merged_after_a_sine(outs: list[Tensor]) -> Tensor:
    return torch.stack([y.sin() for y in outs])


def test_one_network_that_is_merged_with_something_else_is_no_loop():
    alone = found(lambda m, x: merged_after_a_sine([m.plain(x, 0), x]))
    assert said(alone) == [Kind.PLAIN_FFN]


def test_networks_are_of_one_loop():
    def twice(m: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (m.plain(x, e) for e in range(3))
        return merged_after_a_sine([a, b]), merged_after_a_sine([b, c])

    assert said(found(twice)) == [Kind.OPERATION_IN_LOOP, Kind.PLAIN_FFN]


def dropped(m: Ffn, x: Tensor, e: int) -> Tensor:
    """One network that drops hidden units."""
    return F.dropout((x @ m.up[e]).relu(), 0.1) @ m.down[e]


def test_ordinary_networks_that_drop_hidden_units_are_ordinary_but_in_a_loop():
    apart = found(lambda m, x: (dropped(m, x, 0), dropped(m, x, 1)))
    assert said(apart) == [Kind.PLAIN_FFN] * 2
    loop = found(lambda m, x: merged_after_a_sine([dropped(m, x, 0), dropped(m, x, 1)]))
    assert said(loop) == [Kind.DROPOUT_INSIDE] * 2


def test_projections_in_a_site_are_no_near_misses_where_they_read_something_activated():
    def activated(m: Ffn, x: Tensor) -> Tensor:
        x = F.elu(x @ (m.up[0] @ m.down[0]))
        return m.plain(x, 0) + m.plain(x, 1)

    findings = found(activated)
    assert findings.looked_at == 4
    assert len(findings.sites) == 1
    assert findings.near_misses == []


def test_an_ordinary_network_is_ordinary_in_a_transform():
    """That the op does not go there is true, but would not help."""

    def plain(m: Ffn, x: Tensor) -> Tensor:
        return m.plain(x, 0)

    def heads(m: Ffn, x: Tensor) -> Tensor:
        return torch.einsum("htf,hfd->thd", (x @ m.up).relu(), m.down)

    for compute, kind in ((plain, Kind.PLAIN_FFN), (heads, Kind.FUNCTION_TRANSFORM)):
        copy = trace(graph_of(Ffn(compute), torch.randn(T, d)))
        (anchor,) = _anchors(copy)
        path = _path(anchor, copy, set())
        missed = [NearMiss(Reason(Kind.FUNCTION_TRANSFORM), None, anchor)]
        (miss,) = _as_loops_or_ordinary(missed, {anchor: path}, frozenset(path), copy)
        assert miss.reason.kind is kind


def test_an_ordinary_network_in_vmap_is_ordinary_whatever_is_done_with_it_there():
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    mapped = Ffn(lambda m, x: torch.vmap(lambda row: m.plain(row, 0).sin())(x))
    torch.compiler.reset()
    torch.compile(mapped, backend=keep, fullgraph=True)(torch.randn(2, T, d))
    assert said(find_sites(graphs[0])) == [Kind.PLAIN_FFN]


@pytest.mark.parametrize(
    ("levels", "kind"),
    [
        ((), Kind.UNKNOWN_OPERATION),
        ((1,), Kind.FUNCTION_TRANSFORM),
        (None, Kind.FUNCTION_TRANSFORM),
    ],
    ids=["nowhere", "in grad", "in vmap"],
)
def test_an_output_that_no_node_holds_is_read_where_gradients_are_computed(
    levels: tuple[int, ...] | None, kind: Kind
):
    """Below the views of an ``einsum``: a network, but none whose gradients could be given."""

    def heads(m: Ffn, x: Tensor) -> Tensor:
        return torch.einsum("htf,hfd->thd", (x @ m.up).relu(), m.down)

    copy = trace(graph_of(Ffn(heads), torch.randn(T, d)))
    (anchor,) = _anchors(copy)
    copy.levels[anchor.origin] = levels
    reason = _try(anchor, frozenset({anchor}), copy, frozenset())
    assert isinstance(reason, Reason)
    assert reason.kind is kind


def a_site(output: Value, query: Value | None = None) -> Any:
    sizes = dict.fromkeys(("heads", "head_dim", "sub_networks", "hidden"), 2)
    return SimpleNamespace(
        output=output,
        activation="relu",
        gated=False,
        query=SimpleNamespace(value=query or output),
        **sizes,
    )


def after(function: Callable[[Tensor, Tensor], Any]) -> dict[str, str | None]:
    """By the operation of each sum that the first tensor is in: what has been done to it before."""
    copy = Traced(function)
    ways = _sums_after(a_site(copy["x" if "x" in copy.values else "y"]), copy.copy)
    return {str(v.op): None if done is None else str(done.op) for v, done in ways.items()}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: x + y, {"aten.add.Tensor": None}),
        (lambda x, y: x.t() + y, {"aten.add.Tensor": None}),
        (lambda x, y: x.sin() + y, {"aten.add.Tensor": "aten.sin.default"}),
        (lambda x, y: x.sin().cos() + y, {"aten.add.Tensor": "aten.sin.default"}),
        (lambda x, y: x + x.sin(), {"aten.add.Tensor": None}),
        (lambda x, y: x.sum(0), {}),
        (lambda x, y: (x + y, x.sin())[1], {}),
        (lambda x, y: torch.addmm(x, y, y), {"aten.addmm.default": "aten.addmm.default"}),
        (lambda x, y: torch.addmm(y, y, x) + y, {}),
    ],
    ids=[
        "added",
        "a view",
        "an operation",
        "the first of two",
        "the shorter way",
        "over a dimension",
        "dead",
        "by a product",
        "as weights",
    ],
)
def test_sums_that_an_output_is_in(
    function: Callable[[Tensor, Tensor], Any], expected: dict[str, str | None]
):
    assert after(function) == expected


@pytest.mark.parametrize(
    "function",
    [lambda x, y: x.sin() + y, lambda x, y: x + y.sin()],
    ids=["the first", "the second"],
)
def test_sub_networks_are_told_what_keeps_them_apart(function: Callable[[Tensor, Tensor], Tensor]):
    copy = Traced(function)
    sites = [a_site(copy[name], query=copy["x"]) for name in ("x", "y")]
    ((outputs, miss),) = _summed_apart(sites, copy.copy)
    assert outputs == {copy["x"], copy["y"]}
    assert miss.reason.kind is Kind.SUMMED_APART
    assert miss.reason.detail == "sin"


def told(
    function: Callable[[Tensor, Tensor], Tensor], reason: Reason, **differs: Any
) -> Reason | None:
    """What is said of two sites that one operation puts together, which is none for a reason.

    The second of them may differ.
    """
    copy = Traced(function)
    x, y = (a_site(copy[name], query=copy["x"]) for name in ("x", "y"))
    vars(y).update(differs)
    (whole,) = copy.copy.reads[copy.gm.graph.output_node()].values()
    above = {x.output: [whole], y.output: [whole]}
    parts = list(_parts_of_one([x, y], above, {whole: reason}))
    return parts[0][1].reason if parts else None


def test_parts_of_one_network_are_told_why_they_are_apart():
    merged, summed = (lambda x, y: torch.cat([x, y])), (lambda x, y: x + y)
    two = Reason(Kind.TOKEN_DEPENDENT_WEIGHTS, TWO_DIMENSIONS, None)
    assert told(merged, two) is None
    assert told(summed, two) is two
    unequal = Reason(Kind.UNEQUAL_HEADS, "", None)
    assert told(merged, unequal) is unequal
    assert told(summed, unequal) is None
    unknown = told(merged, Reason(Kind.UNKNOWN_OPERATION, "sin", None))
    assert unknown is not None
    assert (unknown.kind, unknown.detail) == (Kind.OPERATION_IN_LOOP, "sin")
    unnamed = told(summed, Reason(Kind.UNKNOWN_OPERATION, "", None))
    assert unnamed is not None
    assert (unnamed.kind, unnamed.detail) == (Kind.SUMMED_APART, "add.Tensor")


def test_a_sum_that_grows_in_a_loop_is_one_network_where_only_its_memory_is_overwritten():
    """All sub-networks but the last are a site then, of other sizes than the last."""
    summed = lambda x, y: x + y  # noqa: E731
    overwritten, unknown = (Reason(k, "", None) for k in (Kind.MUTATION, Kind.UNKNOWN_OPERATION))
    assert told(summed, overwritten, sub_networks=1) is overwritten
    assert told(summed, unknown, sub_networks=1) is None
    assert told(summed, overwritten, activation="silu") is None


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x, y: x + y, True),
        (lambda x, y: x.t(), False),
        (lambda x, y: x.bfloat16(), False),
    ],
    ids=["added", "a view", "a cast"],
)
def test_what_another_precision_leaves_out_is_computed_with_the_output(
    function: Callable[[Tensor, Tensor], Tensor], told: bool
):
    copy = Traced(function)
    (value,) = copy.copy.reads[copy.gm.graph.output_node()].values()
    site = a_site(copy["x"])
    reason = Reason(Kind.ROUNDING_CAST)
    left_out = list(_left_out([site], {site.output: [value]}, {value: reason}))
    assert [miss.reason for _, miss in left_out] == ([reason] if told else [])


# Parts of one batched product.


SEVERAL_SUMS = (Kind.ESCAPING_INTERMEDIATE, "its parts are in several sums")
RETURNED = (Kind.ESCAPING_INTERMEDIATE, "a part is returned")
SINE = (Kind.UNKNOWN_OPERATION, "sin")
PARTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[Kind, str] | None]] = {
    "in two sums": (lambda x, y: (x[0] + x[1], x[2] + x[3]), SEVERAL_SUMS),
    "one is returned": (lambda x, y: (x[0] + x[1], x[2]), RETURNED),
    "one is projected": (
        lambda x, y: (x[:2] + x[2:4], x[4:] @ y),
        (Kind.ESCAPING_INTERMEDIATE, "a part is read by mm"),
    ),
    "one is changed": (lambda x, y: x[0] + x[1].sin(), SINE),
    "normalised": (lambda x, y: x * x.sin(), None),
    "neither summed nor merged": (
        lambda x, y: torch.maximum(x[0], x[1]),
        (Kind.UNKNOWN_OPERATION, "maximum"),
    ),
    "subtracted": (lambda x, y: (x[0] - x[1], x[2]), None),
    "each with something else": (lambda x, y: (x[0] + y[0], x[1] + y[1]), None),
    "merged": (lambda x, y: torch.stack([x[1], x[0]]), None),
}


@pytest.mark.parametrize(("function", "told"), PARTS.values(), ids=PARTS)
def test_why_parts_that_are_put_together_are_not_all(
    function: Callable[[Tensor, Tensor], Any], told: tuple[Kind, str] | None
):
    copy = Traced(function)
    reason = _parts_apart(copy["x"], copy.copy)
    assert (None if reason is None else (reason.kind, reason.detail)) == told


# The operation between sub-networks and their later sum.


def not_summed(
    function: Callable[[Tensor, Tensor], Any], path: list[str], *reasons: Reason
) -> str | None:
    copy = Traced(function)
    reason = _not_summed([copy[name] for name in path], list(reasons), copy.copy)
    return None if reason is None else reason.detail


OFFENCE = Reason(Kind.UNKNOWN_OPERATION, "cos", None)
UNNAMED = Reason(Kind.UNKNOWN_OPERATION, "", None)


@pytest.mark.parametrize(
    ("function", "path", "reasons", "expected"),
    [
        (lambda x, y: x.sin().sum(0), ["x"], [], "sin"),
        (lambda x, y: x.sin().cos().sum(0), ["x"], [], "sin"),
        (lambda x, y: (x * 2).sin().sum(0), ["x"], [], "sin"),
        (lambda x, y: x.sum(0), ["x", "sum_1"], [OFFENCE], "cos"),
        (lambda x, y: x.sum(0), ["x", "sum_1"], [], None),
        (lambda x, y: x.sum(0), ["x", "sum_1"], [UNNAMED], None),
        (lambda x, y: (x @ y).sin().sum(0), ["x"], [OFFENCE], None),
        (lambda x, y: (x.sin(), x.sin().sum(0)), ["x"], [], None),
        (lambda x, y: x.sin()[0] * 2, ["x"], [], None),
    ],
    ids=[
        "an operation",
        "the first of two",
        "after a scale",
        "summed already",
        "nothing",
        "nothing with a name",
        "another product",
        "returned before",
        "a view of less",
    ],
)
def test_what_stands_between_sub_networks_and_their_sum(
    function: Callable[[Tensor, Tensor], Any],
    path: list[str],
    reasons: list[Reason],
    expected: str | None,
):
    assert not_summed(function, path, *reasons) == expected


def test_hidden_units_may_be_viewed():
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y).relu().reshape(2 * T, T // 2) @ y[: T // 2]

    gm = graph_of(function, torch.randn(T, T), torch.randn(T, T))
    assert find_sites(gm).looked_at == 1
