"""Models that write what a network computes into tensors of their caller, as serving code does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.harness import flashmhf, tally
from models.parts import B, E, H, L, Network, d

SHAPE = (B, L, H * d)

Run = Callable[[Network, Tensor, Tensor], Any]


def copied(m: Network, x: Tensor, out: Tensor) -> None:
    out.copy_(m(x))


def copied_and_returned(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out.copy_(m(x))
    return out


def what_copies_is_returned(m: Network, x: Tensor, out: Tensor) -> Tensor:
    return out.copy_(m(x))


def copied_and_read(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out.copy_(m(x))
    return out + x


def read_through_both(m: Network, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    y = m(x)
    out.copy_(y)
    return y * 2, out.sin()


def by_index(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out[:] = m(x)
    return out[:, 1:]


def by_a_view(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out.view(-1).copy_(m(x).view(-1))
    return out + 1


def into_a_part(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out[1:].copy_(m(x)[1:])
    return out * 2


def of_another_dtype(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out.copy_(m(x.float().double()))
    return out


def twice(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out.copy_(m(x))
    out.copy_(m(out.double()))
    return out.cos()


def changed_after(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out.copy_(m(x))
    out.mul_(2)
    return out


def over_the_input(m: Network, x: Tensor, out: Tensor) -> Tensor:
    x.copy_(m(x))
    return x


def added_to_the_input(m: Network, x: Tensor, out: Tensor) -> Tensor:
    return x.add_(m(x))


def added_to_it(m: Network, x: Tensor, out: Tensor) -> Tensor:
    out += m(x)
    return out


def into_a_buffer_of_the_model(m: Any, x: Tensor, out: Tensor) -> Tensor:
    m.last.copy_(m(x))
    return m.last + out


def head_by_head(m: Network, x: Tensor, out: Tensor) -> Tensor:
    for h in range(H):
        out[:, :, h * d : (h + 1) * d] = m.head(x, h)
    return out.exp()


def summed_there(m: Network, x: Tensor, out: Tensor) -> Tensor:
    q, r = x.unflatten(-1, (H, d)), m.router_of(x.unflatten(-1, (H, d)))
    total = out.zero_().unflatten(-1, (H, d))
    for e in range(E):
        gate = torch.einsum("blhd,hfd->blhf", q, m.gate[:, e])
        up = torch.einsum("blhd,hfd->blhf", q, m.up[:, e])
        down = torch.einsum("blhf,hfd->blhd", nn.functional.silu(gate) * up, m.down[:, e])
        total += r[..., e, None] * down
    return out * 3


def each_head_apart(m: Network, x: Tensor, out: Tensor) -> Tensor:
    heads = [m.head(x, h) for h in range(H)]
    for h, y in enumerate(heads):
        out.view(-1)[: y.numel()].view_as(y).copy_(y) if h == 1 else None
    return torch.cat(heads, -1)


def a_head_after(m: Network, x: Tensor, out: Tensor) -> Tensor:
    heads = [m.head(x, h) for h in range(H)]
    merged = torch.cat(heads, -1)
    out[..., :d].copy_(heads[1])
    return merged + out.sum()


def hidden_units(m: Network, x: Tensor, out: Tensor) -> Tensor:
    hidden = m.hidden(x)
    out.view(-1)[: 4 * d].copy_(hidden.reshape(-1)[: 4 * d])
    return torch.einsum("blhef,hefd->blhd", hidden, m.down).flatten(2)


def the_router(m: Network, x: Tensor, out: Tensor) -> Tensor:
    r = m.router_of(x.unflatten(-1, (H, d)))
    out.view(-1)[: r.numel()].copy_(r.reshape(-1))
    return m(x)


#: how many sites are rewritten
CASES: dict[str, tuple[Run, int]] = {
    "copied": (copied, 1),
    "copied and returned": (copied_and_returned, 1),
    "what copies is returned": (what_copies_is_returned, 1),
    "copied and read": (copied_and_read, 1),
    "read through both": (read_through_both, 1),
    "by index": (by_index, 1),
    "by a view": (by_a_view, 1),
    "into a part": (into_a_part, 1),
    "of another dtype": (of_another_dtype, 1),
    "twice": (twice, 2),
    "changed after": (changed_after, 1),
    "over the input": (over_the_input, 1),
    "added to the input": (added_to_the_input, 1),
    "added to it": (added_to_it, 1),
    "into a buffer of the model": (into_a_buffer_of_the_model, 1),
    "head by head": (head_by_head, 0),
    "summed there": (summed_there, E),  # each sub-network by itself
    "each head apart": (each_head_apart, 0),
    "a head after": (a_head_after, 1),
    "hidden units": (hidden_units, 0),
    "the router": (the_router, 1),
}


@pytest.mark.parametrize(("run", "sites"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_caller_finds_it_there(run: Run, sites: int, dtype: torch.dtype):
    torch.manual_seed(0)
    module = Network()
    module.register_buffer("last", torch.zeros(SHAPE).double())
    x, out = torch.randn(SHAPE).double(), torch.randn(SHAPE).to(dtype)
    results = []
    for call in (run, flashmhf(run)):
        given = [x.clone(), out.clone()]
        module.last.zero_()
        with torch.no_grad():
            returned = call(module, *given)
        returned = returned if isinstance(returned, tuple) else (returned,)
        same = [y is not None and y.data_ptr() == z.data_ptr() for y in returned for z in given]
        values = [y for y in (*given, module.last.clone(), *returned) if y is not None]
        results.append((same, values))
    (same, right), (found_same, found) = results
    assert found_same == same
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)
    assert tally().failures == 0
    assert tally().sites == sites


@pytest.mark.parametrize("run", [copied_and_read, read_through_both, by_index, into_a_part])
def test_gradients_go_through_it(run: Run):
    """The caller's tensor takes part in the graph of gradients from the copy on."""
    module = Network()
    x, out = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    found = []
    for call in (run, flashmhf(run)):
        query, given = x.clone().requires_grad_(), out.clone()
        returned = call(module, query, given)
        returned = returned if isinstance(returned, tuple) else (returned,)
        leaves = [query, *module.parameters()]
        loss = sum((y * y).sum() for y in (*returned, given))
        found.append([given, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert tally().sites == 1


def test_logits_that_are_kept():
    """A product before a router, which becomes an op too."""

    def run(m: Network, x: Tensor, logits: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        found = q.float() @ m.router[0].float()
        logits.copy_(found)
        gate = torch.einsum("blhd,hefd->blhef", q, m.gate)
        up = torch.einsum("blhd,hefd->blhef", q, m.up)
        hidden = nn.functional.silu(gate) * up * found.sigmoid().bfloat16().unsqueeze(-1)
        return torch.einsum("blhef,hefd->blhd", hidden, m.down)

    module, x = Network().bfloat16(), torch.randn(SHAPE).bfloat16()
    kept = [torch.zeros(B, L, H, E) for _ in range(2)]
    with torch.no_grad():
        right, found = (
            call(module, x, y) for call, y in zip((run, flashmhf(run)), kept, strict=True)
        )
    torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(*kept)
    assert tally().sites == 1
