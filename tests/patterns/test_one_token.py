"""Of one token, as when text is generated, a bias of the output moves as the output does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhf_compiler import explain

H, E, d, f = 3, 2, 8, 5


class Biased(nn.Module):
    """q (B, L, H, d) to (B, L, H, d), each sub-network with biases, without a router."""

    def __init__(self, spelling: Callable[[Biased, Tensor], Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.up, self.down = (nn.Parameter(torch.randn(H, E, f, d)) for _ in range(2))
        self.up_bias = nn.Parameter(torch.randn(H, E, f))
        self.down_bias = nn.Parameter(torch.randn(H, E, d))
        self.position = nn.Parameter(torch.randn(64, H, d))

    def forward(self, q: Tensor) -> Tensor:
        return self.spelling(self, q)


def batched(m: Biased, q: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("blhd,hefd->blhef", q, m.up) + m.up_bias)
    return (torch.einsum("blhef,hefd->blhed", hidden, m.down) + m.down_bias).sum(3)


def loop(m: Biased, q: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for e in range(E):
        hidden = F.gelu(torch.einsum("blhd,hfd->blhf", q, m.up[:, e]) + m.up_bias[:, e])
        out = out + (torch.einsum("blhf,hfd->blhd", hidden, m.down[:, e]) + m.down_bias[:, e])
    return out


def sum_then_bias(m: Biased, q: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("blhd,hefd->blhef", q, m.up) + m.up_bias)
    return torch.einsum("blhef,hefd->blhd", hidden, m.down) + m.down_bias.sum(1)


def with_positions(m: Biased, q: Tensor) -> Tensor:
    return batched(m, q) + m.position[: q.shape[1]]


def positions_first(m: Biased, q: Tensor) -> Tensor:
    out = m.position[: q.shape[1]]
    for e in range(E):
        hidden = F.gelu(torch.einsum("blhd,hfd->blhf", q, m.up[:, e]) + m.up_bias[:, e])
        out = out + (torch.einsum("blhf,hfd->blhd", hidden, m.down[:, e]) + m.down_bias[:, e])
    return out


def bias_from_the_input(m: Biased, q: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("blhd,hefd->blhef", q, m.up) + m.up_bias)
    return (torch.einsum("blhef,hefd->blhed", hidden, m.down) + q.unsqueeze(3).sin()).sum(3)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(
    "spelling", [batched, loop, sum_then_bias, with_positions, positions_first]
)
def test_biases_of_parameters(spelling: Callable[[Biased, Tensor], Tensor], length: int) -> None:
    module, q = Biased(spelling), torch.randn(1, length, H, d)
    assert len(explain(module, options={"rewrite": "always"})(q).rewritten) == 1
    options = {"rewrite": "always", "strict": True, "fallback": "eager"}
    found = torch.compile(module, backend="flashmhf", options=options)(q)
    torch.testing.assert_close(found, module(q))


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("spelling", [batched, loop])
def test_biases_in_buffers(spelling: Callable[[Biased, Tensor], Tensor], length: int) -> None:
    module, q = Biased(spelling), torch.randn(1, length, H, d)
    bias = module.down_bias.data
    del module.down_bias
    module.register_buffer("down_bias", bias)
    assert len(explain(module, options={"rewrite": "always"})(q).rewritten) == 1
    options = {"rewrite": "always", "strict": True, "verify": True, "fallback": "eager"}
    found = torch.compile(module, backend="flashmhf", options=options)(q)
    torch.testing.assert_close(found, module(q))


def added_input(m: Biased, q: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("blhd,hefd->blhef", q, m.up) + m.up_bias)
    return (torch.einsum("blhef,hefd->blhed", hidden, m.down) + q.unsqueeze(3)).sum(3)


@pytest.mark.parametrize("spelling", [bias_from_the_input, added_input])
def test_what_depends_on_the_token_is_no_bias(spelling: Callable[[Biased, Tensor], Tensor]) -> None:
    module, q = Biased(spelling), torch.randn(1, 1, H, d)
    assert not explain(module, options={"rewrite": "always"})(q).rewritten
