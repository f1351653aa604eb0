"""What cannot be read is one opaque value: the rest of the graph is read all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.cases import H, d, f
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import mhf_compiler
from mhf_compiler.patterns import Kind
from models.harness import OPTIONS, Tally, assert_same_steps, flashmhf, forget, tally

aten = torch.ops.aten


class Network(nn.Module):
    def __init__(self, scale: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.temperature = scale, temperature
        shapes = (H, d, f), (H, d, f), (H, f, d)
        self.k, self.u, self.v = (nn.Parameter(torch.randn(shape) * 0.3) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H * d) to the same."""
        q = x.unflatten(-1, (H, d))
        gate = torch.einsum("...hd,hdf->...hf", q, self.k)
        if self.temperature != 1.0:
            gate = gate / self.temperature
        hidden = F.silu(gate) * torch.einsum("...hd,hdf->...hf", q, self.u)
        y = torch.einsum("...hf,hfd->...hd", hidden, self.v).flatten(-2)
        return x + self.scale * y


def tokens(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 6)), H * d)


def assert_same(model: Any, *inputs: Any, sites: int, **how: Any) -> None:
    compiled = flashmhf(model, **how)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert tally().sites == sites
    assert tally().failures == 0


# Floats that are symbols.


def test_a_symbolic_scale():
    model, x = Network(scale=0.7), tokens()
    torch.testing.assert_close(flashmhf(model, dynamic=True)(x), model(x), rtol=1e-4, atol=1e-5)
    assert tally().sites == 1
    assert tally().declined == 0


def test_a_symbolic_temperature_is_declined_with_a_reason():
    """Inside of the hidden units it would be a constant of the op."""
    assert_same(Network(temperature=0.7), tokens(), sites=0, dynamic=True)
    assert tally().declined == 1


def test_a_factor_of_depth():
    """Each layer compiled by itself: from the second on the factor is a symbol."""
    layers = [Network(scale=(2 * i + 2) ** -0.5) for i in range(3)]
    x = y = tokens()
    for layer in layers:
        y = layer(y)
    for layer in layers:
        layer.compile(backend="flashmhf", options=OPTIONS)
        x = layer(x)
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert tally().declined == 0
    assert tally().sites >= 2


def test_a_number_of_a_tensor():
    network = Network()

    def model(x: Tensor) -> Tensor:
        return network(x) * x.abs().max().item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert_same(model, tokens(), sites=1, fullgraph=True)


# Sizes that depend on data.


@pytest.fixture
def _data_dependent() -> Any:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.usefixtures("_data_dependent")
def test_a_masked_loss():
    network = Network()
    assert_same(lambda x, m: network(x)[m].mean(), tokens(), torch.rand(2, 6) > 0.5, sites=1)


PARTS = {
    "all but the last": lambda x: x[:, :-1],
    "all but the first": lambda x: x[:, 1:].contiguous(),
    "one more": lambda x: torch.cat([x[:, :1], x], 1),
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)),
    "those of a mask": lambda x: x[x[..., 0, 0] > 0][None],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_network_on_a_part_of_dynamic_tokens(part: Any):
    """Whose strides PyTorch writes as of sizes that may be zero, and not multiplied out."""
    network = Network()

    def model(x: Tensor) -> Tensor:  # [B, L, H, d] to a part of it
        q = part(x)
        gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (network.k, network.u))
        return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, network.v)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same(model, tokens().unflatten(-1, (H, d)), sites=1, dynamic=True)


@pytest.mark.usefixtures("_data_dependent")
def test_a_network_on_masked_tokens():
    network = Network()

    def model(x: Tensor, mask: Tensor) -> Tensor:
        y = x.clone()
        y[mask] = network(x[mask])
        return y

    assert_same(model, tokens(), torch.rand(2, 6) > 0.5, sites=1)


@pytest.mark.usefixtures("_data_dependent")
def test_masked_tokens_between_two_networks():
    first, second = Network(), Network()

    def model(x: Tensor, mask: Tensor) -> Tensor:
        x = first(x)
        chosen = x[mask].sum(0)
        return second(x + chosen)

    assert_same(model, tokens(), torch.rand(2, 6) > 0.5, sites=2)


def test_a_write_of_unknown_size_is_seen():
    """What an operation that is not followed writes is no longer the value it was."""
    network = Network()

    def model(x: Tensor, mask: Tensor) -> Tensor:
        q = x.clone()
        y = network(q)
        q.masked_scatter_(mask[..., None], torch.zeros_like(q))
        return y + network(q)

    with torch.no_grad():
        assert_same(model, tokens(), torch.rand(2, 6) > 0.5, sites=2)


def test_the_last_token_at_a_symbolic_place():
    network = Network()

    def model(x: Tensor) -> Tensor:
        return network(x[:, x.shape[1] - 1 : x.shape[1]])

    x = tokens()
    torch._dynamo.mark_dynamic(x, 1)
    assert_same(model, x, sites=1)


# Tensor subclasses.


class Wrapped(Tensor):
    """A subclass that computes on what it wraps."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # AOTAutograd writes it down, and fakes have no numbers to show
        return "Wrapped"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Wrapped:
        return Wrapped(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        views = (aten.detach.default, aten.t.default, aten.view.default, aten.permute.default)
        return Wrapped(result) if func in views else result


def test_a_head_in_a_subclass():
    network, head = Network().eval(), nn.Linear(H * d, 10, bias=False)
    head.weight = nn.Parameter(Wrapped(head.weight.data), requires_grad=False)
    model = nn.Sequential(network, head, nn.Linear(10, H * d), Network()).eval()
    with torch.no_grad():
        torch.testing.assert_close(flashmhf(model)(tokens()), model(tokens()))
    assert tally().sites >= 2  # Dynamo makes another graph of the class itself
    assert tally().declined == 0


@pytest.mark.parametrize("name", ["k", "u", "v"])
def test_weights_in_a_subclass_are_a_reason(name: str):
    model = Network().eval()
    setattr(model, name, nn.Parameter(Wrapped(getattr(model, name).data), requires_grad=False))
    both = nn.Sequential(model, Network()).eval()
    with torch.no_grad():
        assert_same(both, tokens(), sites=1)
        forget()
        report = mhf_compiler.explain(both, options=OPTIONS)(tokens())
    kinds = {site.reason.kind for site in report.declined if site.reason}
    assert kinds == {Kind.TENSOR_SUBCLASS}


# Products by every name.


@pytest.mark.parametrize(
    "product",
    [
        lambda q, w: q @ w.T,
        torch.inner,
        lambda q, w: torch.tensordot(q, w, ([-1], [1])),
        lambda q, w: torch.linalg.multi_dot([q.flatten(0, 1), w.T]).view(*q.shape[:2], -1),
        lambda q, w: torch.addmm(torch.zeros(1), q.flatten(0, 1), w.T, beta=0).view(
            *q.shape[:2], -1
        ),
        lambda q, w: torch.addbmm(torch.zeros(1), q.flatten(0, 1)[None], w.T[None]).view(
            *q.shape[:2], -1
        ),
        lambda q, w: torch.linalg.vecdot(q[:, :, None], w),
    ],
    ids=["@", "inner", "tensordot", "multi_dot", "addmm", "addbmm", "vecdot"],
)
def test_products_by_every_name(product: Any):
    torch.manual_seed(0)
    gates, downs = torch.randn(H, f, d), torch.randn(H, d, f)

    def model(x: Tensor) -> Tensor:
        outputs = [
            product(product(q, gates[h]).relu(), downs[h]) for h, q in enumerate(x.chunk(H, dim=-1))
        ]
        return torch.cat(outputs, -1)

    assert_same(model, tokens(), sites=1)


# What reads a network's output without being read itself.


class AuxiliaryLoss(torch.autograd.Function):
    """Returns its first argument; the second gets a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(())


class InPlace(torch.autograd.Function):
    """Overwrites what it is given."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def hooked(y: Tensor) -> Tensor:
    y.register_hook(lambda gradient: gradient * 2)
    return y.sin()


@torch.compiler.nested_compile_region
def region(y: Tensor) -> Tensor:
    return y.sin() * 2


def checkpointed(body: Any) -> Any:
    return lambda y: checkpoint(body, y, use_reentrant=False)


READERS = {
    "an autograd.Function": lambda y: AuxiliaryLoss.apply(y, y.detach().mean()),
    "a hook": hooked,
    "a branch": lambda y: torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)),
    "a region": region,
    "two regions": lambda y: region(y) + region(y + 1),
    "a checkpoint": checkpointed(lambda y: (y * 2).add_(1)),
}
WRITERS = {
    "an autograd.Function": InPlace.apply,
    "a checkpoint": checkpointed(lambda y: y.mul_(2)),
    "a checkpoint, through a view": checkpointed(lambda y: (y[0].mul_(2), y * 2)[1]),
}


class Heads(Network):
    """The network's output as it is, without residual: (..., H * d) to (..., H, d)."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        gate, up = (torch.einsum("...hd,hdf->...hf", q, w) for w in (self.k, self.u))
        return self.then(torch.einsum("...hf,hfd->...hd", F.silu(gate) * up, self.v))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_what_reads_the_output_does_not_overwrite_it(reader: Any):
    assert_same_steps(Heads(reader), tokens())
    assert tally() == Tally(sites=1)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_overwrites_the_output_does(writer: Any):
    assert_same_steps(Heads(writer), tokens())
    assert tally().failures == 0


def test_a_hook_on_what_is_read_changes_its_gradient():
    """Also of what has read it before the hook was registered; the op would read the query."""

    def model(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        cast = q.double()
        y = network(cast)
        cast.register_hook(lambda gradient: gradient * 0)
        return y

    network = Heads(lambda y: y * 1).double()
    network.forward = lambda q: type(network).forward(network, q.flatten(-2))  # type: ignore[method-assign]
    x = tokens().requires_grad_()
    flashmhf(model)(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_network_reads_what_a_graph_inside_of_this_one_has_overwritten():
    """The gate is computed before that, the up projection after it."""
    network = Network()

    def model(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d)) * 1
        gate = torch.einsum("...hd,hdf->...hf", q, network.k)
        checkpoint(lambda t: t.mul_(2).sum(), q, use_reentrant=False)
        up = torch.einsum("...hd,hdf->...hf", q, network.u)
        return torch.einsum("...hf,hfd->...hd", F.silu(gate) * up, network.v)

    with torch.no_grad():
        assert_same(model, tokens(), sites=0)
