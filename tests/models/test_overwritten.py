"""A network's output may be overwritten later: the op's result takes the place of its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.cases import H, d, f
from torch import Tensor, nn

from models.harness import Tally, assert_same_steps, flashmhf, tally

Then = Callable[[Any, Tensor, Tensor], Any]


class Network(nn.Module):
    """A sum of sub-networks: (B, L, H, d) to the same. One is a single product at its end."""

    def __init__(self, sub_networks: int = 1) -> None:
        super().__init__()
        shapes = (H, d, f), (H, d, f), (H, f, d)
        weights = (torch.randn(sub_networks, *shape) * 0.3 for shape in shapes)
        self.k, self.u, self.v = (nn.Parameter(w.double()) for w in weights)

    def forward(self, q: Tensor) -> Tensor:
        parts = [self.part(q, *weights) for weights in zip(self.k, self.u, self.v, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def part(self, q: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (k, u))
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, v)


class Overwritten(nn.Module):
    """Two networks; the output of the first one, and what becomes of it."""

    def __init__(self, then: Then, sub_networks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = Network(sub_networks), Network()
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self, self.one(x), x)


def queries() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, H, d, dtype=torch.float64)


# What comes next. ``y`` is the output, ``x`` the queries.


def a_number_is_added(m: Any, y: Tensor, x: Tensor) -> Any:
    y.add_(1)
    return y


def a_part_is_set(m: Any, y: Tensor, x: Tensor) -> Any:
    y[..., 0] = 0
    return y


def a_part_is_set_without_gradients(m: Any, y: Tensor, x: Tensor) -> Any:
    with torch.no_grad():
        y[..., 0] = 5
    return y


def chosen_elements_are_set(m: Any, y: Tensor, x: Tensor) -> Any:
    y[y > 0] = 0
    return y


def masked(m: Any, y: Tensor, x: Tensor) -> Any:
    return y.masked_fill_(x > 0, 0.0) * 2


def through_a_view(m: Any, y: Tensor, x: Tensor) -> Any:
    flat = y.movedim(-1, 0)
    flat[0].mul_(2)
    return y.sin()


def a_view_is_read_after_it(m: Any, y: Tensor, x: Tensor) -> Any:
    first = y[:, 0]
    y.mul_(3)
    return first + 1


def through_what_has_no_gradient(m: Any, y: Tensor, x: Tensor) -> Any:
    y.detach().mul_(2)
    return y * 1.0


def with_its_own_part(m: Any, y: Tensor, x: Tensor) -> Any:
    y[0] = y[1].clone()
    return y.sum(0)


def transposed_in_place(m: Any, y: Tensor, x: Tensor) -> Any:
    y.transpose_(0, 1)
    return y + 1


def read_before_and_after(m: Any, y: Tensor, x: Tensor) -> Any:
    before = y * 2
    y[:, 1:] = 0
    return before, y


def read_by_a_network_before(m: Any, y: Tensor, x: Tensor) -> Any:
    z = m.other(y * 1)
    y[:, 0] = 0
    return z + y


def by_the_output_of_another(m: Any, y: Tensor, x: Tensor) -> Any:
    z = m.other(x)
    y[:, 0] = z[:, 1]
    z[:, 1] = 0
    return y, z


def both_in_turn(m: Any, y: Tensor, x: Tensor) -> Any:
    z = m.other(x)
    z.mul_(x)
    y.mul_(2)
    return y, z


REPLACED: dict[Then, int] = {
    a_number_is_added: 1,
    a_part_is_set: 1,
    a_part_is_set_without_gradients: 1,
    chosen_elements_are_set: 1,
    masked: 1,
    through_a_view: 1,
    a_view_is_read_after_it: 1,
    through_what_has_no_gradient: 1,
    with_its_own_part: 1,
    transposed_in_place: 1,
    read_before_and_after: 1,
    read_by_a_network_before: 2,
    by_the_output_of_another: 2,
    both_in_turn: 2,
}


@pytest.mark.parametrize("then", REPLACED)
@pytest.mark.parametrize("sub_networks", [1, 3])
def test_the_result_takes_the_place_of_what_is_overwritten(then: Then, sub_networks: int):
    model = Overwritten(then, sub_networks)
    assert_same_steps(model, queries())
    assert tally() == Tally(sites=REPLACED[then])


@pytest.mark.parametrize("then", [a_part_is_set, through_a_view, both_in_turn])
def test_in_inference(then: Then):
    assert_same_steps(Overwritten(then, 1).eval(), queries())
    assert tally() == Tally(sites=REPLACED[then])


# Where it may not.


def a_whole_of_another_is_written(m: Any, y: Tensor, x: Tensor) -> Any:
    """Whose weights have gradients of zeros then, and not none."""
    y.copy_(m.other(x))
    return y


def two_equal_outputs(m: Any, y: Tensor, x: Tensor) -> Any:
    z = m.one(x)
    z.add_(1)
    return y, z


def computed_again_after_it(m: Any, y: Tensor, x: Tensor) -> Any:
    y.add_(1)
    return y, m.one(x)


@pytest.mark.parametrize(
    "then", [a_whole_of_another_is_written, two_equal_outputs, computed_again_after_it]
)
def test_what_is_one_value_in_two_places_is_left(then: Then):
    assert_same_steps(Overwritten(then, 1), queries())
    assert tally().sites == 0
    assert tally().failures == 0


def test_a_view_from_before_is_read_later():
    """The network's last product is the view's memory, and the candidate is the view."""

    def model(x: Tensor) -> Tensor:
        q = x.transpose(1, 2)
        hidden = F.silu(q @ m.one.k[0]) * (q @ m.one.u[0])
        product = hidden @ m.one.v[0]
        y = product.transpose(1, 2).flatten(2)
        view = product[:, :1]
        y.add_(1)  # a copy: the view does not change
        product.mul_(2)
        return y.sum() + view.sum()

    m = Overwritten(a_part_is_set, 1)
    with torch.no_grad():
        torch.testing.assert_close(flashmhf(model)(queries()), model(queries()))
    assert tally().failures == 0


# A result that is a view, in place of what is none.


class Products(nn.Module):
    """A network of batched products, whose last one is no view, and what becomes of its output."""

    def __init__(self, then: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        one = Network()
        self.k, self.u, self.v = (nn.Parameter(w.detach()[0]) for w in (one.k, one.u, one.v))
        self.then = then

    def network(self, q: Tensor) -> Tensor:
        return torch.bmm(F.silu(torch.bmm(q, self.k)) * torch.bmm(q, self.u), self.v)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, x[0].transpose(0, 1))


def hooked_and_overwritten(m: Any, q: Tensor) -> Tensor:
    y = m.network(q)
    y.register_hook(lambda gradient: 3 * gradient)
    return y.mul_(2)


def overwritten_where_gradients_begin(m: Any, q: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.network(q)
    y[:, 0] = q[:, 0]
    return y


def overwritten_and_hooked(m: Any, q: Tensor) -> Tensor:
    y = m.network(q).mul_(2)
    y.register_hook(lambda gradient: 3 * gradient)
    return y


def hooked_twice(m: Any, q: Tensor) -> Tensor:
    y = m.network(q)
    for factor in (2, 3):
        y.register_hook(lambda gradient, factor=factor: factor * gradient)
    return y


def chosen_and_overwritten(m: Any, q: Tensor) -> Tensor:
    y = torch.cond(q.sum() > 0, m.network, lambda q: 2 * m.network(q), (q,))
    return y.add_(1)


@pytest.mark.parametrize(
    ("then", "sites"),
    [
        (hooked_and_overwritten, 0),
        (overwritten_where_gradients_begin, 0),
        (overwritten_and_hooked, 1),
        (hooked_twice, 1),
        (chosen_and_overwritten, 2),
    ],
)
def test_what_pytorch_does_to_views_alone_is_not_done(
    then: Callable[[Any, Tensor], Tensor], sites: int
):
    """It forgets the hooks of a view that is overwritten, and refuses to overwrite some."""
    assert_same_steps(Products(then), queries())
    assert (tally().sites, tally().failures) == (sites, 0)


@pytest.mark.parametrize("fallback", ["eager", "aot_eager"])
def test_a_caller_may_hook_or_overwrite_what_is_returned(fallback: str):
    model, x = Products(lambda m, q: m.network(q)), queries()
    compiled = flashmhf(model, options={"fallback": fallback})
    gradients = []
    for call in (model, compiled):
        y = call(x)
        y.register_hook(lambda gradient: 3 * gradient)
        gradients.append(torch.autograd.grad(y.mul_(2).sum(), model.v))
        with torch.no_grad():
            y = call(x)
        assert y.add_(model.v.sum()).requires_grad
    torch.testing.assert_close(*gradients)
    assert tally().sites > 0
