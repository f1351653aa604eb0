"""Near-misses of which something is rewritten, or that a corpus case cannot hold: what is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from corpus.cases import TOKENS, E, H, PerHead, SubNetworks, d, split_heads
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import mhf_compiler
from mhf_compiler.options import parse_options
from mhf_compiler.patterns import Kind, Unreadable
from mhf_compiler.substitution.graph import rewrite_graph

Mixing = Callable[[Tensor], Tensor]


def assert_said(model: nn.Module, kind: Kind, code: str, detail: str, rewritten: int) -> None:
    """One reason, with the line of the source that has this code."""
    report = mhf_compiler.explain(model, options={"rewrite": "always"})(torch.randn(TOKENS))
    assert len(report.rewritten) == rewritten
    said = [site for site in report.declined if site.reason is not None]
    assert {site.reason.kind for site in said if site.reason} == {kind}
    assert any(site.reason is not None and detail in site.reason.detail for site in said)
    where = Path(__file__)
    lines = {site.location.line: site.location.code for site in said if site.location}
    assert all(site.location and site.location.file == str(where) for site in said)
    assert any(code in line for line in lines.values())
    assert all(lines[n] in where.read_text().splitlines()[n - 1] for n in lines)


# Sub-networks that are rewritten one by one.


class InALoop(SubNetworks):
    """Adds up sub-networks in a loop."""

    def __init__(self, add: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        route = torch.sigmoid(torch.einsum("bhld,hed->bhle", q, self.route))
        out = torch.zeros_like(q)
        for e in range(E):
            hidden = F.silu(q @ self.gate[:, e]) * (q @ self.up[:, e])
            out = self.add(out, hidden @ self.down[:, e], route[..., e, None], e)
        return out


def with_its_own_factor(out: Tensor, sub: Tensor, r: Tensor, e: int) -> Tensor:
    return torch.addcmul(out, sub, r, value=(0.5, 1.0, 2.0)[e])


def divided(out: Tensor, sub: Tensor, r: Tensor, e: int) -> Tensor:
    return out + sub / (1 + r)


def selected(out: Tensor, sub: Tensor, r: Tensor, e: int) -> Tensor:
    return out + torch.where(r > 0.5, sub * r, 0.0)


def masked(out: Tensor, sub: Tensor, r: Tensor, e: int) -> Tensor:
    return out + (sub * r).masked_fill(r < 0.5, 0.0)


@pytest.mark.parametrize(
    ("add", "code", "detail"),
    [
        (with_its_own_factor, "torch.addcmul(out, sub", "mul"),
        (divided, "out + sub / (1 + r)", "div"),
        (selected, "torch.where(r > 0.5", "where"),
        (masked, ".masked_fill(r <", "masked_fill"),
    ],
)
def test_what_keeps_sub_networks_apart(
    add: Callable[[Tensor, Tensor, Tensor, int], Tensor], code: str, detail: str
):
    assert_said(InALoop(add), Kind.SUMMED_APART, code, detail, rewritten=E)


def test_networks_that_are_multiplied_are_not_of_one_sum():
    model = InALoop(lambda out, sub, r, e: sub if e == 0 else out * sub)
    report = mhf_compiler.explain(model, options={"rewrite": "always"})(torch.randn(TOKENS))
    assert len(report.rewritten) == E
    assert report.declined == []


class ShrinkingSum(SubNetworks):
    """What was summed before counts half."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).flatten(0, 1).transpose(0, 1)
        out = torch.zeros_like(q)
        for e in range(E):
            hidden = F.silu(q @ self.gate[:, e]) * (q @ self.up[:, e])
            out = torch.baddbmm(out, hidden, self.down[:, e], beta=0.5)
        return out


def test_a_sum_that_shrinks():
    assert_said(ShrinkingSum(), Kind.SUMMED_APART, "beta=0.5)", "baddbmm", rewritten=E)


class TwoBiases(SubNetworks):
    """The op has one bias of the output."""

    def __init__(self, routed: bool) -> None:
        super().__init__()
        self.routed = routed
        self.biases = nn.Parameter(torch.randn(2, H, E, 1, d))

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        route = torch.sigmoid(torch.einsum("bhld,hed->bhle", q, self.route))
        out = torch.zeros_like(q)
        for e in range(E):
            sub = (F.silu(q @ self.gate[:, e]) * (q @ self.up[:, e])) @ self.down[:, e]
            sub = sub + self.biases[0, :, e] + self.biases[1, :, e]
            out = out + (sub * route[..., e, None] if self.routed else sub)
        return out


@pytest.mark.parametrize("routed", [True, False])
def test_sub_networks_with_two_biases(routed: bool):
    code = "self.biases[0, :, e] + self.biases[1, :, e]"
    assert_said(TwoBiases(routed), Kind.SUMMED_APART, code, "a second bias", rewritten=E)


# Heads that are rewritten one by one.


class HeadByHead(SubNetworks):
    """Merges heads of a loop, each with sub-networks."""

    def __init__(self, after: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for h, q in enumerate(split_heads(x).unbind(2)):
            hidden = F.silu(torch.einsum("bld,edf->blef", q, self.gate[h]))
            hidden = hidden * torch.einsum("bld,edf->blef", q, self.up[h])
            r = (q @ self.route[h].T).sigmoid()
            y = torch.einsum("blef,efd,ble->bld", hidden, self.down[h], r)
            heads.append(self.after(y, h))
        return torch.stack(heads, 2)


@pytest.mark.parametrize(
    ("after", "kind", "code", "detail"),
    [
        (
            lambda y, h: torch.tanh(y),
            Kind.OPERATION_IN_LOOP,
            "lambda y, h: torch.tanh(y)",
            "tanh before the heads are merged",
        ),
        (
            lambda y, h: y + torch.arange(d) * h,
            Kind.OPERATION_IN_LOOP,
            "lambda y, h: y + torch.arange(d)",
            "is added",
        ),
        (
            lambda y, h: y * (h + 1),
            Kind.UNEQUAL_HEADS,
            'torch.einsum("blef,efd,ble->bld"',
            "factors 1 and 2",
        ),
    ],
    ids=["activated", "added", "scaled"],
)
def test_what_keeps_heads_apart(
    after: Callable[[Tensor, int], Tensor], kind: Kind, code: str, detail: str
):
    assert_said(HeadByHead(after), kind, code, detail, rewritten=H)


class WideBias(SubNetworks):
    """A bias in float64, next to a network in 16 bits, before sub-networks are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(H, E, d, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x, gate, up, down = (w.bfloat16() for w in (x, self.gate, self.up, self.down))
        heads = []
        for h, q in enumerate(split_heads(x).unbind(2)):
            q = q.unsqueeze(1)
            hidden = F.silu(q @ gate[h]) * (q @ up[h])
            y = hidden @ down[h] + self.bias[h, :, None]
            heads.append((y * torch.sigmoid(y.new_zeros(E, 1, 1))).sum(1))
        return torch.stack(heads, 2)


def test_heads_with_a_bias_of_more_digits():
    assert_said(
        WideBias(), Kind.MIXED_PRECISION, "+ self.bias[h, :, None]", "a bias in torch.float64", H
    )


class Branches(nn.Module):
    """Two networks of one form, side by side: each reads a tensor of its own."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = PerHeadNetwork(), PerHeadNetwork()
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.first(x.sin()), self.second(x.cos()))


class Dense(Branches):
    """The second one reads what the first one has made, and both results are kept."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.join(y, self.second(y.sin()))


def _weighted(out: Tensor, sub: Tensor, r: Tensor, e: int) -> Tensor:
    return out + sub * r


class TwoLayers(nn.Module):
    """One after the other, on one residual stream: no sum of sub-networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PerHeadNetwork(), PerHeadNetwork()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class PerHeadNetwork(PerHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def network(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(-3, -2)
        out = (F.silu(q @ self.gate) * (q @ self.up)) @ self.down
        return out.transpose(-3, -2).flatten(-2)


@pytest.mark.parametrize(
    ("model", "sites"),
    [
        (lambda: InALoop(_weighted), 1),
        (TwoLayers, 2),
        (lambda: Branches(torch.add), 2),
        (lambda: Branches(torch.mul), 2),
        (lambda: Dense(lambda a, b: torch.cat((a.relu(), b.relu()), -1)), 2),
        (lambda: HeadByHead(lambda y, h: y), 1),
    ],
    ids=["loop", "layers", "added", "multiplied", "dense", "heads"],
)
def test_nothing_is_said_where_nothing_is_missed(model: Callable[[], nn.Module], sites: int):
    report = mhf_compiler.explain(model(), options={"rewrite": "always"})(torch.randn(TOKENS))
    assert len(report.rewritten) == sites
    assert report.declined == []


# Operations between the projections.


@torch.library.custom_op("near_miss::silu_and_mul", mutates_args=())
def silu_and_mul(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, -1)
    return F.silu(gate) * up


@silu_and_mul.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


class OpaqueActivation(PerHead):
    def forward(self, x: Tensor) -> Tensor:
        packed = torch.einsum("blhi,hio->blho", split_heads(x), torch.cat([self.gate, self.up], -1))
        return torch.einsum("blhf,hfd->blhd", silu_and_mul(packed), self.down)


class SummedUp(PerHead):
    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        hidden = F.silu(q @ self.gate) * (q @ self.up)
        return hidden.cumsum(-2) @ self.down


def test_an_activation_of_somebody_elses():
    with torch.no_grad():
        assert_said(
            OpaqueActivation(),
            Kind.UNKNOWN_OPERATION,
            "silu_and_mul(packed), self.down",
            "near_miss.silu_and_mul",
            rewritten=0,
        )


def test_hidden_units_that_are_summed_up_over_tokens():
    assert_said(SummedUp(), Kind.UNKNOWN_OPERATION, ".cumsum(-2) @", "cumsum", rewritten=0)


class MixedUnits(PerHead):
    """Something happens to the gate, or to the hidden units, that mixes units or tokens."""

    def __init__(self, gate: Mixing, hidden: Mixing) -> None:
        super().__init__()
        self.of_gate, self.of_hidden = gate, hidden

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        gate = self.of_gate(q @ self.gate)
        return self.of_hidden(gate * (q @ self.up)) @ self.down


def largest(hidden: Tensor) -> Tensor:
    return hidden / hidden.max(2, keepdim=True).values


def averaged(hidden: Tensor) -> Tensor:
    return hidden.mean(2, keepdim=True).expand(hidden.shape)


def shifted(hidden: Tensor) -> Tensor:
    return hidden - hidden.amax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("gate", "hidden", "kind", "code", "detail"),
    [
        (
            lambda gate: gate.softmax(-1),
            lambda hidden: hidden,
            Kind.UNKNOWN_OPERATION,
            "lambda gate: gate.softmax(-1)",
            "softmax",
        ),
        (F.silu, averaged, Kind.NOT_A_PRODUCT, "hidden.mean(2, keepdim=True)", "mean"),
        (F.silu, shifted, Kind.NOT_A_PRODUCT, "hidden - hidden.amax(-1", "amax"),
        (F.silu, largest, Kind.NOT_A_PRODUCT, "hidden / hidden.max(2", "max.dim"),
        (
            F.silu,
            lambda hidden: hidden.sort(2).values,
            Kind.UNKNOWN_OPERATION,
            "lambda hidden: hidden.sort(2)",
            "sort",
        ),
        (
            F.silu,
            lambda hidden: F.normalize(hidden, dim=-1),
            Kind.NOT_A_PRODUCT,
            "lambda hidden: F.normalize",
            "clamp_min",
        ),
    ],
    ids=["softmax", "mean over tokens", "largest unit", "largest token", "sorted", "normalised"],
)
def test_what_mixes_units_or_tokens(
    gate: Mixing, hidden: Mixing, kind: Kind, code: str, detail: str
):
    assert_said(MixedUnits(gate, hidden), kind, code, detail, rewritten=0)


def test_a_softmax_between_weights_in_buffers():
    """No parameters: they might be tokens, but what is multiplied with an up projection is none."""
    model = MixedUnits(lambda gate: gate.softmax(-1), lambda hidden: hidden)
    for name, tensor in [*model.named_parameters()]:
        delattr(model, name)
        model.register_buffer(name, tensor.data)
    code = "lambda gate: gate.softmax(-1)"
    assert_said(model, Kind.UNKNOWN_OPERATION, code, "softmax", rewritten=0)


class Attention(PerHead):
    """A softmax between two products, of tokens with tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(x).transpose(1, 2) @ w for w in (self.gate, self.up, self.gate))
        return (q @ k.mT).softmax(-1) @ v


class AttentionToACache(PerHead):
    """Keys and values are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(2, H, 9, d))
        self.register_buffer("values", torch.randn(2, H, 9, d))

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2) @ self.gate @ self.down
        return F.dropout((q @ self.keys.mT).softmax(-1) * 2.0, 0.0) @ self.values


class Pooled(PerHead):
    """The mean of all tokens is classified."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(split_heads(x).transpose(1, 2) @ self.gate)
        return hidden.mean(2) @ self.down[0]


@pytest.mark.parametrize("model", [Attention, AttentionToACache, Pooled])
def test_products_that_are_no_feed_forward_network(model: Callable[[], nn.Module]):
    report = mhf_compiler.explain(model(), options={"rewrite": "always"})(torch.randn(TOKENS))
    assert report.rewritten == []
    assert report.declined == []


# Numbers and sizes that Dynamo takes for variables.


class Tempered(PerHead):
    """A number scales the gates, and the heads of a loop are written to a buffer."""

    temperature = 0.7

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = torch.zeros_like(q)
        for h in range(H):
            gate = q[:, :, h] @ self.gate[h] * self.temperature
            out[:, :, h] = (F.silu(gate) * (q[:, :, h] @ self.up[h])) @ self.down[h]
        return out


class FlatHeads(PerHead):
    """The number of heads follows from the width of the input."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (-1, d))
        hidden = F.silu(torch.einsum("blhd,hdf->blhf", q, self.gate))
        return torch.einsum("blhf,hfd->blhd", hidden, self.down)


def declined_dynamically(model: nn.Module) -> list[tuple[Kind, str]]:
    """The reasons where all sizes and numbers are variables, with their lines."""
    reports = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        reports.append(rewrite_graph(gm, parse_options(None, {"rewrite": "always"})))
        return gm.forward

    torch.compile(model, backend=backend, dynamic=True)(torch.randn(TOKENS))
    (report,) = reports
    assert report.rewritten == []
    return [
        (site.reason.kind, site.location.code)
        for site in report.declined
        if site.reason and site.location
    ]


def test_a_number_that_is_a_variable():
    """Not that the buffer is not full after the first head."""
    ((kind, code),) = declined_dynamically(Tempered())
    assert kind is Kind.VARYING_NUMBER
    assert "self.temperature" in code


def test_a_number_of_heads_that_is_a_variable():
    ((kind, _),) = declined_dynamically(FlatHeads())
    assert kind in (Kind.UNSUPPORTED_PROBLEM, Kind.TOKEN_DEPENDENT_WEIGHTS)


class WideBiasBeforeTheRouter(SubNetworks):
    """One head; its sub-networks without their bias, router and sum are rewritten as heads."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(E, d, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q = x[..., :d].bfloat16()
        gate, up, down = (w[0].bfloat16() for w in (self.gate, self.up, self.down))
        route = torch.sigmoid(q.float() @ self.route[0].T)
        hidden = F.silu(torch.einsum("bld,edf->blef", q, gate))
        hidden = hidden * torch.einsum("bld,edf->blef", q, up)
        y = torch.einsum("blef,efd->bled", hidden, down) + self.bias
        return (y * route[..., None]).sum(2)


def test_a_bias_that_keeps_the_router_out():
    said = "a bias in torch.float64"
    assert_said(WideBiasBeforeTheRouter(), Kind.MIXED_PRECISION, "+ self.bias", said, 1)


# Gradients, and results in memory that is given.


class HalfWithoutGradients(PerHead):
    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x).transpose(1, 2)
        with torch.no_grad():
            gate = F.silu(q @ self.gate)
        return (gate * (q @ self.up)) @ self.down


def test_gradients_that_nothing_wants_are_not_cut():
    cut = "(gate * (q @ self.up))"
    assert_said(HalfWithoutGradients(), Kind.GRADIENTS_CUT, cut, "", 0)
    frozen = HalfWithoutGradients().requires_grad_(False)
    report = mhf_compiler.explain(frozen, options={"rewrite": "always"})(torch.randn(TOKENS))
    assert len(report.rewritten) == 1
    wanted = torch.randn(TOKENS, requires_grad=True)
    report = mhf_compiler.explain(frozen, options={"rewrite": "always"})(wanted)
    assert [site.reason.kind for site in report.declined if site.reason] == [Kind.GRADIENTS_CUT]


class IntoABuffer(PerHead):
    """The last product writes to a part of a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = q.new_zeros(H, x.shape[0] * x.shape[1], d)
        for h in range(H):
            head = q[:, :, h].flatten(0, 1)
            hidden = F.silu(head @ self.gate[h]) * (head @ self.up[h])
            torch.mm(hidden, self.down[h], out=out[h])
        return out * 2.0


def test_products_that_write_to_what_they_are_given():
    model, x = IntoABuffer(), torch.randn(TOKENS)
    options = {"rewrite": "always", "strict": True, "verify": True, "fallback": "eager"}
    with torch.no_grad():
        assert len(mhf_compiler.explain(model, options=options)(x).rewritten) == 1
        found = torch.compile(model, backend="flashmhf", options=options)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


class OverAnOperand(PerHead):
    """The last product adds to a buffer that it also writes to."""

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        out = q.new_ones(H, x.shape[0] * x.shape[1], d)
        for h in range(H):
            head = q[:, :, h].flatten(0, 1)
            hidden = F.silu(head @ self.gate[h]) * (head @ self.up[h])
            torch.addmm(out[h], hidden, self.down[h], out=out[h])
        return out * 2.0


def test_products_that_write_over_what_they_read_are_told_of():
    model, x = OverAnOperand(), torch.randn(TOKENS)
    with torch.no_grad():
        report = mhf_compiler.explain(model, options={"rewrite": "always"})(x)
    assert report.rewritten == []
    (reason,) = [site.reason for site in report.declined]
    assert reason is not None
    assert (reason.kind, reason.detail) == (Kind.OPERATION_IN_LOOP, "addmm")


# Inner graphs.


class SummedProducts(PerHead):
    """Products of elements that are summed, in a checkpoint under inference mode."""

    def network(self, x: Tensor) -> Tensor:
        q = split_heads(x)
        hidden = F.silu((q[..., None] * self.gate).sum(-2))
        return (hidden[..., None] * self.down).sum(-2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return checkpoint(self.network, x, use_reentrant=False)


def test_an_inner_graph_that_is_not_read_is_told_of_however_it_spells_products():
    with pytest.warns(mhf_compiler.MhfCompilerWarning, match="SEVERAL_MODES"):
        report = mhf_compiler.explain(SummedProducts())(torch.randn(TOKENS))
    unread = [unread.reason for graph in report.graphs for unread in graph.unread]
    assert [reason.kind for reason in unread if reason] == [Unreadable.SEVERAL_MODES]


# In place, and in transforms.


class AddsInPlace(PerHeadNetwork):
    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        x += self.network(x)
        return x


def test_a_residual_that_is_added_in_place():
    """Eager's backward pass refuses the same."""
    assert_said(AddsInPlace(), Kind.MUTATION, "x += self.", "is overwritten", rewritten=0)
    with torch.no_grad():
        report = mhf_compiler.explain(AddsInPlace(), options={"rewrite": "always"})
        assert len(report(torch.randn(TOKENS)).rewritten) == 1


class BySample(PerHeadNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.network)(x)


class GradientsBySample(PerHeadNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda one: self.network(one).square().sum()))(x)


def test_vmap_over_the_batch_is_rewritten():
    report = mhf_compiler.explain(BySample(), options={"rewrite": "always"})(torch.randn(TOKENS))
    assert len(report.rewritten) == 1


def test_gradients_of_each_sample():
    code = "out = (F.silu(q @ self.gate) * (q @ self.up)) @ self.down"
    assert_said(GradientsBySample(), Kind.FUNCTION_TRANSFORM, code, "", rewritten=0)
