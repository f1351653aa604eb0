"""Inductor pads the strides of large ragged tensors, but not of those that our ops read or write.

It does so on GPUs. Here it is told to on a CPU, where a view over planned strides that then change
writes past its buffer as well (torch 2.11).
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._inductor.config as inductor
from support.inductor import no_caches
from torch import Tensor, nn
from torch._inductor import metrics
from torch.fx.experimental.proxy_tensor import make_fx

from mhf_compiler.passes.layouts import fix_layouts

# 3 * 777 and 8 * 257 numbers are no multiple of 128 bytes, so Inductor pads what steps over them.
B, L, H, E, d, f = 2, 777, 3, 3, 8, 16


class Network(nn.Module):
    """Sub-networks in a loop, whose router may be cast to another dtype one column at a time."""

    def __init__(self, shared: bool = False, width: int = d) -> None:
        super().__init__()
        groups = 1 if shared else H
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Parameter(torch.randn(groups, E, f, width)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(groups, E, f, width) / f)
        self.router = nn.Parameter(torch.randn(H, width, E))

    def weights(self) -> list[Tensor]:
        return [w.expand(H, -1, -1, -1) for w in (self.gate, self.up, self.down)]

    def network(self, q: Tensor, r: Tensor) -> Tensor:
        gate, up, down = self.weights()
        out = torch.zeros_like(q)
        for e in range(E):
            m = torch.einsum("blhd,hfd->blhf", q, gate[:, e])
            n = torch.einsum("blhd,hfd->blhf", q, up[:, e])
            part = torch.einsum("blhf,hfd->blhd", nn.functional.silu(m) * n, down[:, e])
            out = out + part * r[..., e, None].to(q.dtype)
        return out


def normed(model: Network, x: Tensor) -> Tensor:
    q = model.norm(x.unflatten(-1, (H, -1)))
    r = torch.einsum("blhd,hde->blhe", q.float(), model.router.float()).sigmoid()
    return model.network(q, r).flatten(2) + x


def routed_by_softmax(model: Network, x: Tensor) -> Tensor:
    q = x.unflatten(-1, (H, -1))
    r = torch.einsum("blhd,hde->blhe", q.float(), model.router.float()).softmax(-1)
    return model.network(q, r).flatten(2) + x


def routed_in_its_own_dtype(model: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    q = (x * 0.5).unflatten(-1, (H, -1))
    r = torch.einsum("blhd,hde->blhe", q, model.router).sigmoid()
    return model.network(q, r).flatten(2), q.mean((0, 1))


@pytest.fixture(autouse=True)
def padding() -> Iterator[None]:
    torch._dynamo.reset()
    with inductor.patch(disable_padding_cpu=False):
        yield


# Every pair of the three; each of these is two programs in C++.
@pytest.mark.parametrize(
    ("run", "shared", "training"),
    [
        (normed, False, False),
        (normed, True, True),
        (routed_by_softmax, False, True),
        (routed_by_softmax, True, False),
        (routed_in_its_own_dtype, False, False),
        (routed_in_its_own_dtype, True, True),
    ],
)
def test_ragged_tensors_keep_their_values(
    run: Callable[[Network, Tensor], Tensor], shared: bool, training: bool
) -> None:
    dtype = torch.float16
    model = Network(shared).to(dtype)
    x = torch.randn(B, L, H * d, dtype=dtype, requires_grad=training)
    inputs = [x, *model.parameters()]

    def values(call: Callable[..., Tensor], run_model: Network) -> list[Tensor | None]:
        with torch.set_grad_enabled(training):
            out = call(run_model, x)
        results = list(out) if isinstance(out, tuple) else [out]
        if not training:
            return [*results]
        total = sum((result.float() * result.float().cos()).sum() for result in results)
        return [*results, *torch.autograd.grad(total, inputs, allow_unused=True)]

    want = values(run, model)
    options = {"rewrite": "always", "strict": True}
    with no_caches():
        got = values(torch.compile(run, backend="flashmhf", options=options), model)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() <= 2e-2 * other.norm()


def test_inductor_pads_tensors_of_these_sizes() -> None:
    """Otherwise the test above shows nothing."""

    def of_intermediate_sums(x: Tensor) -> Tensor:
        return x.sum(-1).softmax(1)

    metrics.reset()
    with no_caches():
        torch.compile(of_intermediate_sums)(torch.randn(B, L, H, d))
    assert metrics.num_comprehensive_padding


def test_the_buffer_under_views_is_marked() -> None:
    def graph(x: Tensor, w: Tensor) -> Tensor:
        q = (x + 1).unflatten(-1, (H, d))
        elsewhere = x * 2
        return torch.ops.mhf_compiler.multi_head_ffn(q, w, w, w) + elsewhere.view_as(q)

    import mhf_compiler.lowering  # noqa: F401  # defines the op

    traced = make_fx(graph, tracing_mode="fake")(
        torch.randn(1, 4, H * d), torch.randn(H, E, f, d)
    ).graph
    fix_layouts(traced)
    marked = [str(node) for node in traced.nodes if node.meta.get("inductor_realize_to_strides")]
    assert marked == ["add"]
