"""Buffers that are written and read at random, with networks in between, compute what they say.

The copy looks through memory: what is read from a part of a buffer is what was written there last.
Whatever the order of views, writes and reads, the rewritten graph must leave every tensor and every
gradient as the plain module does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from mhf_compiler.options import parse_options
from mhf_compiler.substitution.graph import rewrite_graph

PARTS, L, H, d, f = 3, 4, 2, 3, 2
OPTIONS = parse_options(None, {"rewrite": "always", "strict": True, "fallback": "eager"})


Step = tuple[str, int, int]  # what to do, to which part or view, with which tensor


class Buffers(nn.Module):
    """One buffer of three parts, and the steps that use it."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = steps
        self.gate, self.up = (nn.Parameter(torch.randn(H, d, f).double()) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, f, d).double())

    def network(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        gate, up = (torch.einsum("lhd,hdf->lhf", q, w) for w in (self.gate, self.up))
        return torch.einsum("lhf,hfd->lhd", F.silu(gate) * up, self.down).flatten(1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        buffer = x.new_zeros(PARTS, L, H * d)
        views, seen = [buffer[0]], [x * 2, x * 0.5]
        for what, at, which in self.steps:
            part, view, value = at % PARTS, views[at % len(views)], seen[which % len(seen)]
            if what == "set":
                buffer[part] = value
            elif what == "add":
                buffer[part] += value
            elif what == "set tokens":
                buffer[part, 1:3] = value[1:3]
            elif what == "add to a column":
                buffer[:, :, at % d] += value[:, 0]
            elif what == "scale all":
                buffer.mul_(0.5)
            elif what == "look":
                views.append(buffer[part])
            elif what == "look at tokens":
                views.append(buffer[part : part + 1, :, :].squeeze(0))
            elif what == "add to a view":
                view.add_(value)
            elif what == "read":
                seen.append(view + 1)
            elif what == "read a part":
                seen.append(buffer[part] * 2)
            elif what == "network":
                seen.append(self.network(value))
            elif what == "network of a part":
                seen.append(self.network(buffer[part]))
            elif what == "heads":
                for h in range(H):
                    columns = slice(h * d, (h + 1) * d)
                    hidden = F.silu(value[:, columns] @ self.gate[h])
                    hidden = hidden * (value[:, columns] @ self.up[h])
                    buffer[part][:, columns] += hidden @ self.down[h]
        return (buffer, *views, *seen)


STEPS = [
    "set", "add", "set tokens", "add to a column", "scale all", "look", "look at tokens",
    "add to a view", "read", "read a part", "network", "network of a part", "heads",
]  # fmt: skip
steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 5), st.integers(0, 5)), max_size=9
)


def results(model: Buffers, call: Callable[[Tensor], Any]) -> list[Tensor]:
    """Outputs and gradients of one step."""
    torch.manual_seed(1)
    x = torch.randn(L, H * d, dtype=torch.float64, requires_grad=True)
    outputs = call(x)
    loss = sum((out * (i + 1)).square().sum() for i, out in enumerate(outputs))
    gradients = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
    zeros = (torch.zeros(()) for _ in gradients)
    return [*outputs, *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(steps)
def test_buffers_used_at_random(steps: list[Step]):
    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        rewrite_graph(gm, OPTIONS)
        return gm.forward

    torch.compiler.reset()
    model = Buffers(steps)
    try:
        plain = results(model, model)
    except RuntimeError:  # autograd needs what was overwritten
        reject()
    rewritten = results(model, torch.compile(model, backend=backend))
    for expected, found in zip(plain, rewritten, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
