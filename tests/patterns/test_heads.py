"""Along which dimension of each parameter the heads of a network lie."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mhf_compiler.patterns import find_heads, find_sites

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


def found(query: Callable, route: Callable, project: Callable) -> dict[str, tuple[int | None, int]]:
    """The dimension, and the number of blocks, of each parameter, by its name."""
    heads: dict[str, tuple[int | None, int]] = {}
    model = Network(query, route, project)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        (site,) = find_sites(gm).sites
        for one in find_heads(site):
            heads[names[id(inputs[one.value.origin])]] = (one.dim, one.count)
            assert not one.alone or one.dim is None
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
        f"heads.{head}": (None, 1) for head in range(H)
    }
