"""Two spellings of one module give the same site: the same elements of the same parameters.

A site is described without the graph it was found in: for each argument of the op the name of the
parameter that it views, and for each dimension of the argument its stride in that parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mhf_compiler.patterns import Site, TensorView, Value, find_sites

B, L, H, E, d, f = 2, 6, 4, 3, 8, 5

Forward = Callable[[nn.Module, Tensor], Tensor]
Look = Callable[[Site, dict[Value, str]], Any]
Strides = tuple[tuple[int, int], ...]  # (size, distance in memory) of the runs of one dimension


class PerHead(nn.Module):
    """A SwiGLU for each of H heads; ``spelling`` computes it."""

    def __init__(self, spelling: Forward) -> None:
        super().__init__()
        self.spelling = spelling
        self.gate, self.up = (nn.Parameter(torch.randn(H, d, f)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, f, d))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


class SubNetworks(PerHead):
    """E SwiGLUs for each head, and a router."""

    def __init__(self, spelling: Forward) -> None:
        super().__init__(spelling)
        self.gate, self.up = (nn.Parameter(torch.randn(H, E, d, f)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, E, f, d))
        self.route = nn.Parameter(torch.randn(H, d, E))


def described(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The one site of a model, as what can be compared with the site of another spelling."""
    return seen(_description, model, dtype)


def seen(look: Look, model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """What is seen of the one site of a model, while there is its graph."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        findings = find_sites(gm)
        assert findings.copy is not None
        names = {value: str(node.name) for value, node in findings.copy.inputs()}
        found.extend(look(site, names) for site in findings.sites)
        assert not findings.near_misses
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(B, L, H * d, dtype=dtype))
    (one,) = found
    return one


def _description(site: Site, names: dict[Value, str]) -> dict[str, Any]:
    fields = ("activation", "gate_scale", "up_scale", "out_scale", "heads", "groups", "head_dim")
    fields += ("sub_networks", "hidden", "tokens", "dtype", "out_dtype")
    described = {name: getattr(site, name) for name in fields}
    for role, view in site.views().items():
        # A router is computed, by other operations in every spelling: only its place can be equal.
        source = names.get(view.value, "computed")
        where = _strides(view) if source != "computed" else tuple(view.shape)
        described[role] = (source, where)
    return described


def _strides(view: TensorView) -> tuple[tuple[int, tuple[Strides, ...]], ...] | tuple[Any, ...]:
    """Where the argument begins in memory, and the runs of each of its dimensions."""
    distance: dict[Any, int] = {}
    start = 0
    for form, stride in zip(view.index, view.value.strides, strict=True):
        resolved = form.resolved()
        start += resolved.offset * stride
        for axis, step in resolved.terms:
            distance[axis] = distance.get(axis, 0) + step * stride
    dims = []
    for axes in view.dims:
        runs = [(axis.size, distance.get(axis, 0)) for axis in axes if axis.size != 1]
        dims.append(_merged(runs))
    return (start, tuple(dims))


def _merged(runs: list[tuple[int, int]]) -> Strides:
    """Runs that continue each other are one: how often an axis was split says nothing."""
    merged = runs[:1]
    for (_, _), (size, step) in pairwise(runs):
        outer_size, outer_step = merged[-1]
        if outer_step == size * step:
            merged[-1] = (outer_size * size, step)
        else:
            merged.append((size, step))
    return tuple(merged)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, d))


def by_einsum(m: PerHead, x: Tensor) -> Tensor:
    gate, up = (torch.einsum("blhd,hdf->blhf", heads(x), w) for w in (m.gate, m.up))
    return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, m.down).flatten(2)


def by_other_letters(m: PerHead, x: Tensor) -> Tensor:
    gate, up = (torch.einsum("z a b, ...z a -> b z ...", w, heads(x)) for w in (m.gate, m.up))
    hidden = up * (gate / (1 + torch.exp(-gate)))
    return torch.einsum("q z ..., z q i -> ... z i", hidden, m.down).flatten(2)


def by_matmul(m: PerHead, x: Tensor) -> Tensor:
    q = heads(x).transpose(1, 2).contiguous()
    out = (F.silu(q @ m.gate) * (q @ m.up)) @ m.down
    return out.transpose(1, 2).reshape(B, L, H * d)


def by_bmm(m: PerHead, x: Tensor) -> Tensor:
    q = heads(x).flatten(0, 1).transpose(0, 1)
    gate = torch.bmm(q, m.gate)
    out = torch.bmm(gate * gate.sigmoid() * torch.bmm(q, m.up), m.down)
    return out.transpose(0, 1).reshape(B, L, H * d)


def by_convolution(m: PerHead, x: Tensor) -> Tensor:
    def conv(y: Tensor, w: Tensor) -> Tensor:
        return F.conv1d(y, w.transpose(1, 2).flatten(0, 1).unsqueeze(-1), groups=H)

    y = x.transpose(1, 2)
    return conv(F.silu(conv(y, m.gate)) * conv(y, m.up), m.down).transpose(1, 2)


def by_vmap(m: PerHead, x: Tensor) -> Tensor:
    def head(q: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(q @ gate) * (q @ up)) @ down

    return torch.vmap(head, in_dims=(2, 0, 0, 0), out_dims=2)(
        heads(x), m.gate, m.up, m.down
    ).flatten(2)


def by_a_loop(m: PerHead, x: Tensor) -> Tensor:
    outs = []
    for h, q in enumerate(x.chunk(H, -1)):
        outs.append(F.linear(F.silu(q @ m.gate[h]) * (q @ m.up[h]), m.down[h].T))
    return torch.cat(outs, -1)


def into_a_buffer(m: PerHead, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for h in range(H):
        q = x[..., h * d : (h + 1) * d]
        out[..., h * d : (h + 1) * d] += (F.silu(q @ m.gate[h]) * (q @ m.up[h])) @ m.down[h]
    return out


PER_HEAD: list[Forward] = [
    by_other_letters,
    by_matmul,
    by_bmm,
    by_convolution,
    by_vmap,
    by_a_loop,
    into_a_buffer,
]


@pytest.mark.parametrize("spelling", PER_HEAD, ids=lambda spelling: spelling.__name__)
def test_spellings_of_heads_give_one_site(spelling: Forward):
    assert described(PerHead(spelling)) == described(PerHead(by_einsum))


def scaled_early(m: PerHead, x: Tensor) -> Tensor:
    gate, up = (torch.einsum("blhd,hdf->blhf", heads(x), w) for w in (m.gate, m.up))
    return torch.einsum("blhf,hfd->blhd", F.silu(gate) * 0.125 * up, m.down).flatten(2)


def squared_early(m: PerHead, x: Tensor) -> Tensor:
    gate = torch.einsum("blhd,hdf->blhf", heads(x), m.gate)
    return torch.einsum("blhf,hfd->blhd", (F.relu(gate) * 0.25) ** 2, m.down).flatten(2)


@pytest.mark.parametrize(
    ("spelling", "scales"),
    [(scaled_early, (1, 0.125, 1)), (squared_early, (0.25, 1, 1))],
    ids=["gated", "squared"],
)
def test_what_is_scaled_down_early_stays_so_in_float16(
    spelling: Forward, scales: tuple[float, float, float]
):
    """The hidden units that the op rounds to float16 are those that the author scaled to fit."""
    site = described(PerHead(spelling).half(), torch.float16)
    assert (site["gate_scale"], site["up_scale"], site["out_scale"]) == scales
    wider = described(PerHead(spelling))
    assert (wider["gate_scale"], wider["up_scale"]) == (1, 1)


def test_another_module_gives_another_site():
    """The description would show a difference: gate and up exchanged, heads shifted."""

    def exchanged(m: PerHead, x: Tensor) -> Tensor:
        gate, up = (torch.einsum("blhd,hdf->blhf", heads(x), w) for w in (m.up, m.gate))
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, m.down).flatten(2)

    def transposed(m: PerHead, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (d, H)).transpose(-1, -2)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (m.gate, m.up))
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, m.down).flatten(2)

    one = described(PerHead(by_einsum))
    assert described(PerHead(exchanged)) != one
    assert described(PerHead(transposed)) != one


def routed(m: SubNetworks, x: Tensor) -> Tensor:
    return torch.einsum("blhd,hde->blhe", heads(x), m.route).softmax(-1)


def networks_by_einsum(m: SubNetworks, x: Tensor) -> Tensor:
    gate, up = (torch.einsum("blhd,hedf->blhef", heads(x), w) for w in (m.gate, m.up))
    hidden = F.silu(gate) * up * routed(m, x).unsqueeze(-1)
    return torch.einsum("blhef,hefd->blhd", hidden, m.down).flatten(2)


def networks_weighted_afterwards(m: SubNetworks, x: Tensor) -> Tensor:
    gate, up = (torch.einsum("blhd,hedf->blhef", heads(x), w) for w in (m.gate, m.up))
    y = torch.einsum("blhef,hefd->blhed", F.silu(gate) * up, m.down)
    return torch.einsum("blhed,blhe->blhd", y, routed(m, x)).flatten(2)


def networks_in_a_loop(m: SubNetworks, x: Tensor) -> Tensor:
    r, out = routed(m, x), 0
    for e in range(E):
        gate, up = (torch.einsum("blhd,hdf->blhf", heads(x), w[:, e]) for w in (m.gate, m.up))
        y = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, m.down[:, e])
        out = out + r[..., e : e + 1] * y
    return out.flatten(2)


def heads_and_networks_in_loops(m: SubNetworks, x: Tensor) -> Tensor:
    r, out = routed(m, x), torch.zeros_like(heads(x))
    for e in reversed(range(E)):
        for h in range(H):
            q = heads(x)[:, :, h]
            y = (F.silu(q @ m.gate[h, e]) * (q @ m.up[h, e])) @ m.down[h, e]
            out[:, :, h] += r[:, :, h, e, None] * y
    return out.flatten(2)


NETWORKS: list[Forward] = [
    networks_weighted_afterwards,
    networks_in_a_loop,
    heads_and_networks_in_loops,
]


@pytest.mark.parametrize("spelling", NETWORKS, ids=lambda spelling: spelling.__name__)
def test_spellings_of_sub_networks_give_one_site(spelling: Forward):
    assert described(SubNetworks(spelling)) == described(SubNetworks(networks_by_einsum))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (PerHead(by_einsum), 3),
        (PerHead(by_a_loop), 3 * H),
        (SubNetworks(networks_by_einsum), 3),
        (SubNetworks(networks_in_a_loop), 3 * E),
        (SubNetworks(heads_and_networks_in_loops), 3 * H * E),
    ],
    ids=["heads at once", "loop over heads", "all at once", "loop over networks", "two loops"],
)
def test_products_are_counted_as_they_are_written(model: nn.Module, count: int):
    """The compiler does not batch them: each is a kernel."""
    assert seen(lambda site, names: site.products, model) == count
