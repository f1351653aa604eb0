"""Along which dimension of each parameter the heads of a network lie."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from support.values import a_value
from torch import Tensor, fx, nn

from mhf_compiler.patterns import STACK, find_heads, find_sites
from mhf_compiler.patterns.axes import Affine, Axis, Index, axis_form, product
from mhf_compiler.patterns.canonical import COPY, INPUT, OPAQUE, Value
from mhf_compiler.patterns.heads import (
    _heads_in_output,
    _inputs,
    _of_input,
    _operands,
    _output_projections,
    _piece,
    _summed_over_heads,
)

H, E, d, f = 4, 3, 8, 5
D = H * d


class Network(nn.Module):
    """Routed sub-networks, with ways to make queries and routers, and to project the output."""

    def __init__(self, query: Callable, route: Callable, project: Callable) -> None:
        super().__init__()
        self.ways = (query, route, project)
        self.gate, self.down = (nn.Parameter(torch.randn(H, E, f, d)) for _ in range(2))
        self.into, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.inside = nn.Linear(D, D)
        self.shared, self.all = nn.Linear(d, E), nn.Linear(D, H * E)
        self.router = nn.Parameter(torch.randn(H, d, E))
        self.norm, self.narrow = nn.LayerNorm(D), nn.LayerNorm(d)
        self.gains = nn.Parameter(torch.randn(H, d))
        self.heads = nn.ParameterList(torch.randn(d, E) for _ in range(H))

    def forward(self, x: Tensor) -> Tensor:
        query, route, project = self.ways
        q = query(self, x)
        hidden = torch.einsum("blhd,hefd->blhef", q, self.gate).relu()
        r = route(self, q)[..., None]
        return project(self, torch.einsum("blhef,hefd->blhd", hidden * r, self.down))


def projected(m: Any, x: Tensor) -> Tensor:
    return m.into(x).unflatten(-1, (H, d))


def routed(m: Any, q: Tensor) -> Tensor:
    return torch.einsum("blhd,hde->blhe", q, m.router).sigmoid()


def merged(m: Any, y: Tensor) -> Tensor:
    return m.out(y.flatten(2))


def top_two(m: Any, q: Tensor) -> Tensor:
    logits = torch.einsum("blhd,hde->blhe", q, m.router)
    values, indices = logits.topk(2, dim=-1)
    return torch.zeros_like(logits).scatter(-1, indices, values.softmax(-1))


def found(query: Callable, route: Callable, project: Callable) -> dict[str, tuple[Any, int]]:
    """The dimension, and the number of blocks, of each parameter, by its name."""
    heads: dict[str, tuple[Any, int]] = {}
    model = Network(query, route, project)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        (site,) = find_sites(gm).sites
        for one in find_heads(site):
            kind = (one.dim, one.count)
            heads[names[id(inputs[one.value.origin])]] = ("alone", 1) if one.alone else kind
        return gm.forward

    torch.compile(model, backend=collect, fullgraph=True)(torch.randn(2, 6, D))
    return heads


WEIGHTS = {"gate": (0, H), "down": (0, H)}
INTO = {"into.weight": (0, H), "into.bias": (0, H)}
ROUTER = {"router": (0, H)}
OUT = {"out.weight": (1, H)}


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ((projected, routed, merged), INTO | ROUTER | OUT),
        ((projected, lambda m, q: m.shared(q).softmax(-1), merged), INTO | OUT),
        ((projected, top_two, merged), INTO | ROUTER | OUT),
        (
            (projected, lambda m, q: m.all(q.flatten(2)).unflatten(-1, (H, E)).sigmoid(), merged),
            INTO | OUT | {"all.weight": (0, H), "all.bias": (0, H)},
        ),
        (
            # a norm over all heads mixes them, its gains lie along them
            (lambda m, x: m.norm(m.into(x)).unflatten(-1, (H, d)), routed, merged),
            ROUTER | OUT | {"norm.weight": (0, H), "norm.bias": (0, H)},
        ),
        (
            (lambda m, x: m.narrow(projected(m, x)) * m.gains, routed, merged),
            INTO | ROUTER | OUT | {"gains": (0, H)},
        ),
        (
            # heads are the inner part of the features, and no blocks
            (lambda m, x: m.into(x).unflatten(-1, (d, H)).transpose(2, 3), routed, merged),
            ROUTER | OUT | {"into.weight": (None, 1), "into.bias": (None, 1)},
        ),
        (
            (projected, routed, lambda m, y: m.out(y.transpose(2, 3).flatten(2))),
            INTO | ROUTER,
        ),
        ((projected, routed, lambda m, y: y.sum(2)), INTO | ROUTER),
    ],
    ids=[
        *("einsum", "shared router", "top two", "router of all heads", "norm of all heads"),
        *("norm of each head", "heads inside", "heads inside the output", "summed"),
    ],
)
def test_parameters_with_heads(ways: tuple[Callable, ...], expected: dict):
    assert found(*ways) == WEIGHTS | expected


def test_a_parameter_of_one_head():
    def of_each(m: Any, q: Tensor) -> Tensor:
        return torch.einsum("blhd,hde->blhe", q, torch.stack(list(m.heads))).sigmoid()

    assert found(projected, of_each, merged) == WEIGHTS | INTO | OUT | {
        f"heads.{head}": ("alone", 1) for head in range(H)
    }


def doubled(m: Any, x: Tensor) -> Tensor:
    """Read on more ways than could be followed one by one."""
    q = projected(m, x)
    for _ in range(40):
        q = q + q
    return q


def test_each_tensor_is_walked_through_once():
    assert found(doubled, routed, merged) == WEIGHTS | INTO | ROUTER | OUT


def widened(m: Any, y: Tensor, times: int) -> Tensor:
    flat = y.flatten(2)
    for _ in range(times):
        flat = flat.double().float()
    return m.out(flat)


def test_an_output_may_be_cast_before_its_projection():
    assert found(projected, routed, lambda m, y: widened(m, y, 1)) == (
        WEIGHTS | INTO | ROUTER | OUT
    )


@pytest.mark.parametrize(("times", "out"), [(2, OUT), (20, {})])
def test_an_output_that_something_else_reads_is_projected_soon(times: int, out: dict):
    ways = projected, routed, lambda m, y: (widened(m, y, times), y.sum())
    assert found(*ways) == WEIGHTS | INTO | ROUTER | out


# Values by themselves.

aten = torch.ops.aten
FOUR, ROWS, COLUMNS = Axis(4), Axis(4), Axis(6)
INDEX = axis_form(ROWS), axis_form(COLUMNS)


def test_a_parameter_is_told_of_for_each_way_it_is_read():
    x = a_value(INPUT, shape=(4, 4))
    both = a_value(aten.add.Tensor, x, a_value(aten.t.default, x, shape=(4, 4)), shape=(4, 4))
    told = list(_inputs("gate", both, (axis_form(FOUR), axis_form(ROWS)), [FOUR]))
    assert sorted(one.dim for one in told if one.dim is not None) == [0, 1]


@pytest.mark.parametrize(
    ("index", "heads", "expected"),
    [
        ((axis_form(FOUR), axis_form(COLUMNS)), [FOUR], (0, 4)),
        ((axis_form(FOUR), axis_form(COLUMNS)), [Axis(1), FOUR], (0, 4)),
        ((axis_form(FOUR), axis_form(FOUR)), [FOUR], (None, 1)),
        ((Affine(((FOUR, 2),)), axis_form(COLUMNS)), [FOUR], (None, 1)),
    ],
    ids=["rows", "and one", "rows and columns", "each second row"],
)
def test_heads_lie_along_one_dimension(index: Index, heads: list[Axis], expected: Any):
    told = _of_input("gate", a_value(INPUT), index, heads)
    assert (told.dim, told.count) == expected


def test_heads_of_a_dynamic_number_are_no_blocks():
    axis = Axis(sympy.Symbol("n", integer=True, positive=True))
    value = a_value(INPUT, shape=(axis.size, 6))
    assert _of_input("gate", value, (axis_form(axis), axis_form(COLUMNS)), [axis]).dim is None


def test_parts_that_are_merged_again_are_no_pieces():
    x = a_value(INPUT)
    halves = [a_value(aten.slice.Tensor, x, 0, start, start + 2, shape=(2, 6)) for start in (0, 2)]
    assert _piece(a_value(aten.cat.default, halves), INDEX) == ()
    others = [a_value(INPUT, shape=(2, 6)) for _ in range(2)]
    (piece,) = _piece(a_value(aten.cat.default, others), INDEX)
    assert piece.axes()
    stacked = a_value(STACK, *others, shape=(2, 2, 6))
    assert _piece(stacked, (axis_form(FOUR), *INDEX)) == (axis_form(FOUR),)


def read(op: Any, *args: Any, index: Index = INDEX, **given: Any) -> list[tuple[Value, Index]]:
    return _operands(a_value(op, *args, **given), index)


X = a_value(INPUT)


def test_what_keeps_elements_in_place_is_walked_through():
    for op in (aten.sin.default, aten.hardswish.default, aten.relu.default):
        assert read(op, X) == [(X, INDEX)]
    assert read(COPY, X, dtype=torch.float64) == [(X, INDEX)]
    assert read(STACK, X, X, index=(axis_form(FOUR), *INDEX)) == [(X, INDEX)] * 2


def test_what_mixes_elements_is_walked_through_along_other_dimensions():
    row = (axis_form(ROWS),)
    for op, args in ((aten.sum.dim_IntList, ([1],)), (aten._softmax.default, (1, False))):
        kept = row if op is aten.sum.dim_IntList else INDEX
        ((value, index),) = read(op, X, *args, index=kept, shape=(4, 6)[: len(kept)])
        assert value is X
        assert index[0] == INDEX[0]
        assert index[1] != INDEX[1]


@pytest.mark.parametrize(
    ("op", "args", "index"),
    [
        (OPAQUE, (X,), INDEX),
        (aten.var.correction, (X, [1]), INDEX[:1]),
        (aten.nonzero.default, (X,), INDEX),
        (aten._softmax.default, (a_value(INPUT, shape=()), 0, False), ()),
    ],
    ids=["not known", "several dimensions", "none", "a number"],
)
def test_the_walk_ends_where_nothing_is_known(op: Any, args: tuple[Any, ...], index: Index):
    assert read(op, *args, index=index, shape=(4, 6)[: len(index)]) == []


HEADS, WIDTH = Axis(4), Axis(8)


@pytest.mark.parametrize(
    ("dims", "form", "size"),
    [
        ((HEADS, WIDTH), axis_form(Axis(32)), 4),
        ((HEADS, WIDTH), Affine(((Axis(8), 1),), 4), None),
        ((Axis(4), HEADS), axis_form(Axis(16)), None),
    ],
    ids=["heads and width", "across two heads", "width and heads"],
)
def test_heads_in_an_output(dims: tuple[Axis, ...], form: Affine, size: int | None):
    site: Any = SimpleNamespace(
        query=SimpleNamespace(dims=((), (), (HEADS,), (WIDTH,))),
        output_dims=((ROWS,), dims),
        output=a_value(INPUT, shape=(4, product(axis.size for axis in dims))),
    )
    assert [axis.size for axis in _heads_in_output(site, (axis_form(ROWS), form))] == (
        [] if size is None else [size]
    )


def test_a_product_that_is_no_contraction_projects_nothing():
    nothing = a_value(aten.addmm.default, X, X, X, kwargs={"alpha": 0})
    site: Any = SimpleNamespace(output=X)
    assert list(_summed_over_heads(nothing, site)) == []


def test_a_product_of_two_views_of_the_output_is_looked_at_once():
    y = a_value(INPUT, shape=(4, 4))
    turned = a_value(aten.t.default, y, shape=(4, 4))
    both = a_value(aten.mm.default, y, turned, shape=(4, 4))
    y.readers, turned.readers = [both, turned], [both]
    heads = Axis(4)
    site: Any = SimpleNamespace(
        query=SimpleNamespace(dims=((), (), (heads,), ())),
        output_dims=((ROWS,), (heads,)),
        output=y,
    )
    assert len(list(_output_projections(site))) == 2  # each of the two is the other's weight
