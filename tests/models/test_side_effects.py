"""What can be seen of a model apart from the numbers that it returns.

Which results share memory, and with what: to change one is to change the others. What is written
where: inputs that are views of each other, statistics that a norm keeps, tensors that an operation
writes without returning them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.harness import flashmhf, tally, tensors_in
from models.parts import B, E, H, L, Network, d, f

SHAPE = (B, L, H * d)

Run = Callable[[Network, Tensor, Tensor], Any]


class Kept(Network):
    """With memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistics", torch.zeros(H * d))
        self.register_buffer("units", torch.zeros(B, L, H, E, f))
        self.double()


def gates(m: Kept, x: Tensor) -> Tensor:
    return torch.einsum("blhd,hefd->blhef", x.unflatten(-1, (H, d)), m.gate)


def ups(m: Kept, x: Tensor) -> Tensor:
    return torch.einsum("blhd,hefd->blhef", x.unflatten(-1, (H, d)), m.up)


def merged(m: Kept, hidden: Tensor) -> Tensor:
    return torch.einsum("blhef,hefd->blhd", hidden, m.down).flatten(2)


def norm(m: Kept, x: Tensor) -> Tensor:
    """Of all tokens; the module's statistics move."""
    return F.batch_norm(x.flatten(0, 1), m.statistics, torch.ones(H * d).double(), training=True)


# Results.


def twice(m: Kept, x: Tensor, y: Tensor) -> Any:
    return m(x), m(x)


def twice_in_parts(m: Kept, x: Tensor, y: Tensor) -> Any:
    return m(x).view(-1), m(x)[0]


def twice_scaled(m: Kept, x: Tensor, y: Tensor) -> Any:
    return m(x) * 2, m(x) * 2, m(y)


def twice_by_heads(m: Kept, x: Tensor, y: Tensor) -> Any:
    heads = [m.head(x, h) for h in range(H)]
    return torch.cat(heads, -1), torch.cat(heads, -1), heads[1]


def once_and_a_view(m: Kept, x: Tensor, y: Tensor) -> Any:
    out = m(x)
    return out, out.view(-1), out[0]


def of_shared_weights(m: Kept, x: Tensor) -> Tensor:
    """The last product makes the memory and returns a view of it."""
    q = x.unflatten(-1, (H, d))
    hidden = F.silu(q @ m.gate[0, 0].T) * (q @ m.up[0, 0].T)
    return torch.tensordot(hidden, m.down[0, 0], dims=([3], [0]))


def a_product_and_its_views(m: Kept, x: Tensor, y: Tensor) -> Any:
    out = of_shared_weights(m, x)
    return out, out[..., 0], out.view(-1)


def a_view_of_a_product_and_another(m: Kept, x: Tensor, y: Tensor) -> Any:
    out = of_shared_weights(m, x)
    return out.transpose(1, 2), out[0], out


def twice_with_a_sum(m: Kept, x: Tensor, y: Tensor) -> Any:
    one, other = m(x), m(x)
    return one, one + other, other


def a_buffer_and_its_part(m: Kept, x: Tensor, y: Tensor) -> Any:
    buffer = torch.zeros(H, B, L, d).double()
    for h in range(H):
        buffer[h] = m.head(x, h)
    return torch.cat(list(buffer), -1), buffer[1], buffer


def a_view_of_its_part(m: Kept, x: Tensor, y: Tensor) -> Any:
    buffer = torch.zeros(H, B, L, d).double()
    for h in range(H):
        buffer[h] = m.head(x, h)
    return torch.cat(list(buffer), -1), buffer[1].view(-1), buffer[1:]


def a_part_alone(m: Kept, x: Tensor, y: Tensor) -> Any:
    part = torch.zeros(B, L, 2 * H * d).double()[..., : H * d]
    out = m(x)
    part.copy_(out)
    doubled = part * 2
    part.mul_(2)
    return doubled, part


def logits(m: Kept, x: Tensor, y: Tensor) -> Any:
    q = x.unflatten(-1, (H, d))
    return m(x), m.router_of(q), m.router_of(q)


# Statistics.


def of_a_result(m: Kept, x: Tensor, y: Tensor) -> Any:
    out = m(x)
    norm(m, out)
    return out


def of_half_of_it(m: Kept, x: Tensor, y: Tensor) -> Any:
    buffer = torch.zeros_like(x)
    for h in range(H):
        buffer[..., h * d : (h + 1) * d] = m.head(x, h)
        if h == 1:
            norm(m, buffer)
    return buffer * 3


def of_something_else(m: Kept, x: Tensor, y: Tensor) -> Any:
    norm(m, y)
    return m(x)


def between_two_reads(m: Kept, x: Tensor, y: Tensor) -> Any:
    one = m(x - m.statistics)
    normed = norm(m, x)
    return one, m(x - m.statistics), normed


# Operations that write what they do not return.


def gates_into_a_buffer(m: Kept, x: Tensor, y: Tensor) -> Any:
    gate = gates(m, x) * 1.0
    F.silu(gate, inplace=True)
    torch.mul(gate, 1, out=m.units)
    return merged(m, gate * ups(m, x))


def hidden_units_into_a_buffer(m: Kept, x: Tensor, y: Tensor) -> Any:
    hidden = F.silu(gates(m, x))
    hidden.mul_(ups(m, x))
    torch._foreach_copy_([m.units], [hidden])
    return merged(m, hidden)


def heads_into_lists(m: Kept, x: Tensor, y: Tensor) -> Any:
    out, kept = torch.zeros_like(x), [torch.zeros_like(x) for _ in range(H)]
    for h in range(H):
        out[..., h * d : (h + 1) * d] = m.head(x, h)
        torch._foreach_add_(kept, [out] * H)
    return out, kept


def random_numbers(m: Kept, x: Tensor, y: Tensor) -> Any:
    """Drawn by what is summed up to then, which is certain."""
    q = x.unflatten(-1, (H, d))
    total = torch.zeros_like(q)
    for e in range(E):
        gate = torch.einsum("blhd,hfd->blhf", q, m.gate[:, e])
        up = torch.einsum("blhd,hfd->blhf", q, m.up[:, e])
        down = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, m.down[:, e])
        total += m.router_of(q)[..., e, None] * down
        if e == 0:
            y.view_as(q).bernoulli_((total > 0).double())
    return total


# Inputs that are views of each other: y is x.view(-1), or a part of it.


def changed_in_between(m: Kept, x: Tensor, y: Tensor) -> Any:
    one = m(x)
    y.mul_(2)
    return one, m(x)


def changed_before(m: Kept, x: Tensor, y: Tensor) -> Any:
    y.mul_(2)
    return m(x)


def changed_between_its_parts(m: Kept, x: Tensor, y: Tensor) -> Any:
    gate = gates(m, x)
    y.zero_()
    return merged(m, F.silu(gate) * ups(m, x)), x * 1


def copied_into_a_view(m: Kept, x: Tensor, y: Tensor) -> Any:
    out = m(x)
    y.copy_(out.view(-1)[: y.numel()].view_as(y))
    return x + out


# Results of higher-order operations that are views.


def a_view_of_the_input(m: Kept, x: Tensor, y: Tensor) -> Any:
    view = checkpoint(lambda t: t.view(-1), x, use_reentrant=False)
    one = m(x)
    view.mul_(2)
    return one, m(x)


def two_views(m: Kept, x: Tensor, y: Tensor) -> Any:
    def make(t: Tensor) -> Any:
        u = t * 2
        return u, u.view(-1)

    one, other = checkpoint(make, x, use_reentrant=False)
    out = m(one)
    other.zero_()
    return out, m(one)


def copied_into_a_view_of_the_input(m: Kept, x: Tensor, y: Tensor) -> Any:
    view = checkpoint(lambda t: t.view(-1), y, use_reentrant=False)
    view.copy_(m(x).view(-1))
    return view


def copied_into_one_of_two(m: Kept, x: Tensor, y: Tensor) -> Any:
    def make(t: Tensor) -> Any:
        u = t * 2
        return u, u.view(-1)

    one, other = checkpoint(make, y, use_reentrant=False)
    one.copy_(m(x))
    return one, other


def views_inside(m: Kept, x: Tensor, y: Tensor) -> Any:
    def body(t: Tensor, view: Tensor) -> Tensor:
        one = m(t)
        view.zero_()
        return one + m(t)

    return checkpoint(body, x, x.view(-1), use_reentrant=False)


APART: list[Run] = [
    *(twice, twice_in_parts, twice_scaled, twice_by_heads, once_and_a_view, twice_with_a_sum),
    *(a_product_and_its_views, a_view_of_a_product_and_another),
    *(a_buffer_and_its_part, a_view_of_its_part, a_part_alone, logits),
    *(of_a_result, of_half_of_it, of_something_else, between_two_reads),
    *(gates_into_a_buffer, hidden_units_into_a_buffer, heads_into_lists),
    *(a_view_of_the_input, two_views, views_inside),
    *(copied_into_a_view_of_the_input, copied_into_one_of_two, random_numbers),
]
VIEWS: list[Run] = [
    changed_in_between,
    changed_before,
    changed_between_its_parts,
    copied_into_a_view,
]


def observe(call: Run, m: Kept, x: Tensor, y: Tensor) -> list[Tensor]:
    """What is returned and what inputs hold, and again after each result was changed in turn."""
    for buffer in m.buffers():
        buffer.zero_()
    with torch.no_grad():
        results = list(tensors_in(call(m, x, y)))
        seen = [*results, x, y, *m.buffers()]
        states = [z.clone() for z in seen]
        for result in results:
            result.add_(1)
            states += [z.clone() for z in seen]
    return [*states, *(torch.tensor(z.stride()) for z in results)]


def same(run: Run, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    module = Kept()
    pairs = zip(observe(run, module, *make()), observe(flashmhf(run), module, *make()), strict=True)
    for right, found in pairs:
        torch.testing.assert_close(found, right)
    assert tally().failures == 0


@pytest.mark.parametrize("run", APART)
def test_nothing_else_changes(run: Run):
    x, y = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    same(run, lambda: (x.clone(), y.clone()))


@pytest.mark.parametrize("view", [lambda x: x.view(-1), lambda x: x[1], lambda x: x[:, 1:3]])
@pytest.mark.parametrize("run", VIEWS)
def test_inputs_that_are_views_of_each_other(run: Run, view: Callable[[Tensor], Tensor]):
    x = torch.randn(SHAPE).double()

    def make() -> tuple[Tensor, Tensor]:
        whole = x.clone()
        return whole, view(whole)

    same(run, make)


@pytest.mark.parametrize(
    "run",
    [twice, once_and_a_view, a_product_and_its_views, twice_with_a_sum, of_something_else],
)
def test_such_networks_are_rewritten(run: Run):
    same(run, lambda: (torch.ones(SHAPE).double(), torch.ones(SHAPE).double()))
    assert tally().sites == 1


# Tensors that become other views in place.


def beside_the_network(m: Kept, x: Tensor, y: Tensor) -> Any:
    square = y[0, :H, :H] * 1
    before = square[:]
    square.transpose_(0, 1)
    return m(x) + before[0, 1] + square[0, 1], before, square


def its_input(m: Kept, x: Tensor, y: Tensor) -> Any:
    square = torch.cat([x, x, x])[:L] * 1
    before = square[:]
    square.transpose_(0, 1)
    return m(before), m(square)


def its_output(m: Kept, x: Tensor, y: Tensor) -> Any:
    out = m(x)
    before = out[0]
    out.transpose_(0, 1)
    return out, before


def its_hidden_units(m: Kept, x: Tensor, y: Tensor) -> Any:
    hidden = m.hidden(torch.cat([x, x, x])[:L])
    before = hidden[:]
    hidden.transpose_(0, 1)
    return merged(m, before), merged(m, hidden)


def its_router(m: Kept, x: Tensor, y: Tensor) -> Any:
    weights = x[..., 0] * 1
    weights.unsqueeze_(-1).unsqueeze_(-1)
    weights.squeeze_(-1)
    return merged(m, F.silu(gates(m, x)) * ups(m, x) * weights[..., None, None])


IN_PLACE: list[tuple[Run, int]] = [
    *((beside_the_network, 1), (its_input, 0), (its_output, 1), (its_hidden_units, 0)),
    (its_router, 0),
]


@pytest.mark.parametrize(("run", "sites"), IN_PLACE)
def test_a_tensor_that_becomes_another_view(run: Run, sites: int):
    x, y = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    same(run, lambda: (x.clone(), y.clone()))
    assert tally().sites == sites


def test_gradients_that_are_cut_in_place():
    def run(m: Kept, x: Tensor, y: Tensor) -> Tensor:
        hidden = m.hidden(x)
        hidden.detach_()
        return merged(m, hidden) + y.sum()

    module, x, y = Kept(), torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    found = []
    # Under strict it is an error that this graph is not analysed.
    for call in (run, flashmhf(run, options={"strict": False})):
        query = x.clone().requires_grad_()
        leaves = [query, *module.parameters()]
        out = call(module, query, y)
        found.append(torch.autograd.grad((out * out).sum(), leaves, materialize_grads=True,
                                         allow_unused=True))  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_an_input_that_becomes_another_view():
    def run(m: Kept, x: Tensor, y: Tensor) -> Tensor:
        y.unsqueeze_(0)
        return m(x) + y[0]

    x, y = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    same(run, lambda: (x.clone(), y.clone()))


# Gradients that are none, and not zeros: an optimizer leaves such a parameter alone.


class Heads(torch.nn.Module):
    """Parameters of its own for each head; ``merge`` makes the results of what the heads make."""

    def __init__(self, merge: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.merge = merge
        self.gate, self.up = (
            torch.nn.ParameterList(torch.randn(d, f).double() / 2 for _ in range(H))
            for _ in range(2)
        )
        self.down = torch.nn.ParameterList(torch.randn(f, d).double() / 2 for _ in range(H))

    def forward(self, x: Tensor) -> Any:
        heads = zip(x.chunk(H, -1), self.gate, self.up, self.down, strict=True)
        return self.merge([(F.silu(q @ k) * (q @ u)) @ v for q, k, u, v in heads])


def without_gradients(outs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat(outs, -1) * 2


@pytest.mark.parametrize(
    ("merge", "sites"),
    [
        (lambda outs: (torch.cat(outs, -1), outs[1]), 1),
        (lambda outs: (torch.cat(outs, -1).detach(), outs[1].detach()), 1),
        (lambda outs: (torch.cat(outs, -1).detach() * 2, outs[1] * 2), 0),
        (lambda outs: (torch.cat(outs, -1).argmax(-1), outs[1] * 2), 0),
        (lambda outs: (without_gradients(outs), outs[1] * 2), 0),
        (lambda outs: (torch.zeros_like(torch.cat(outs, -1) * 2), outs[1] * 2), 0),
        (lambda outs: ((torch.cat(outs, -1) > 0).double(), outs[1] * 2), 0),
    ],
    ids=["both", "neither", "detached", "indices", "no_grad", "zeros alike", "a mask"],
)
def test_parameters_without_a_gradient(merge: Callable[[list[Tensor]], Any], sites: int) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Heads(merge)
        call = flashmhf(model) if compiled else model
        results = [x for x in tensors_in(call(torch.randn(SHAPE).double())) if x.requires_grad]
        sum([x.sum() for x in results], torch.zeros((), requires_grad=True)).backward()
        found.append([None if p.grad is None else p.grad for p in model.parameters()])
    assert tally().sites == sites
    expected, ours = found
    assert [x is None for x in ours] == [x is None for x in expected]
    torch.testing.assert_close(
        [x for x in ours if x is not None], [x for x in expected if x is not None]
    )


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("training", [True, False])
def test_a_detached_alias_is_returned_next_to_the_output(dim: int, training: bool) -> None:
    model = Heads(lambda outs: (y := torch.cat(outs, dim), y.detach()))
    x = torch.randn(L, H * d, requires_grad=training, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        y, kept = flashmhf(model)(x)
        expected, _ = model(x)
    assert tally().sites == 1
    torch.testing.assert_close(y, expected)
    assert y.requires_grad is training
    assert not kept.requires_grad
    assert y.stride() == expected.stride()
    kept.zero_()
    assert not y.any()
