"""Option ``verify``: a site that computes something else is declined, or raises under strict."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mhf_compiler
from mhf_compiler import MhfCompilerWarning
from mhf_compiler.compat import counters
from mhf_compiler.debug.accuracy import Difference
from mhf_compiler.patterns import Kind
from mhf_compiler.substitution import graph as substitution
from mhf_compiler.substitution import verify
from mhf_compiler.substitution.emit import EditError, Editor

H, d, f = 4, 8, 5
VERIFY = {"rewrite": "always", "verify": True}


class Heads(nn.Module):
    """One SwiGLU for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(H, d, f) / 4) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, f, d) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d)).transpose(1, 2)
        return ((F.silu(q @ self.gate) * (q @ self.up)) @ self.down).transpose(1, 2).flatten(2)


def tokens() -> Tensor:
    return torch.randn(2, 6, H * d)


def _half_the_gradient(e: Editor, out: fx.Node) -> fx.Node:
    half = e.call(torch.mul, out, 0.5)
    return e.call(torch.add, half, e.call(torch.detach, half))


WRONG = {
    "values": (lambda e, out: e.call(torch.mul, out, 1.01), "random numbers, output 0"),
    "gradients": (_half_the_gradient, "gradient of"),
    "large numbers": (
        lambda e, out: e.call(torch.clamp, out, -1e6, 1e6),
        "large numbers, output 0",
    ),
    "NaN": (lambda e, out: e.call(torch.nan_to_num, out), "among the queries, output 0"),
}


@pytest.fixture(params=WRONG)
def wrong(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An editor that writes something wrong, and what is said of it."""
    breaks, message = WRONG[request.param]
    network = Editor.network
    monkeypatch.setattr(Editor, "network", lambda e, *given: breaks(e, network(e, *given)))
    return message


def test_what_computes_something_else_is_declined(wrong: str):
    model, x = Heads(), tokens()
    compiled = torch.compile(model, backend="flashmhf", options=VERIFY | {"fallback": "eager"})
    with pytest.warns(MhfCompilerWarning, match=f"VerificationError: with .*{wrong}"):
        torch.testing.assert_close(compiled(x), model(x))
    tally = counters["flashmhf"]
    assert (tally["sites_rewritten"], tally["declined.NOT_VERIFIED"], tally["failures"]) == (
        0,
        1,
        1,
    )


def test_strict_raises(wrong: str):
    compiled = torch.compile(Heads(), backend="flashmhf", options=VERIFY | {"strict": True})
    with pytest.raises(Exception, match=f"with .*{wrong}"):
        compiled(tokens())


def test_assert_rewritten_with_verify(wrong: str):
    mhf_compiler.assert_rewritten(Heads(), (tokens(),), sites=1)
    with (
        pytest.warns(MhfCompilerWarning),
        pytest.raises(AssertionError, match=Kind.NOT_VERIFIED.sentence),
    ):
        mhf_compiler.assert_rewritten(Heads(), (tokens(),), verify=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_right_rewrites_pass(dtype: torch.dtype, mode: Any):
    with mode():
        mhf_compiler.assert_rewritten(
            Heads().to(dtype), (tokens().to(dtype),), sites=1, verify=True, options={"strict": True}
        )


@pytest.mark.parametrize(
    ("errors", "declined"),
    [([1.5], False), ([2.5], True), ([1.5, 1.5], True), ([1.5, 0.5, 1.5], True)],
    ids=str,
)
def test_an_error_a_little_too_large_has_to_come_again(
    errors: list[float], declined: bool, monkeypatch: pytest.MonkeyPatch
):
    """Where it does not, PyTorch's own roundings cancelled. In parts of what is allowed."""
    draws: list[Tensor] = []

    def compare(original: Any, replaced: Any, inputs: list[Tensor], **_: Any) -> list[Difference]:
        draws.append(inputs[0])
        error = errors[len(draws) - 1] if len(draws) <= len(errors) else 0.0
        return [Difference("output 0", error, 0.1, 1.0)]

    monkeypatch.setattr(verify, "compare", compare)
    compiled = torch.compile(Heads(), backend="flashmhf", options=VERIFY | {"fallback": "eager"})
    with pytest.warns(MhfCompilerWarning) if declined else nullcontext():
        compiled(tokens())
    assert counters["flashmhf"]["declined.NOT_VERIFIED"] == declined
    assert errors == [2.5] or not draws[0].equal(draws[1])


def test_random_numbers_of_the_model_stay():
    torch.manual_seed(3)
    expected = torch.rand(2)
    model, x = Heads(), tokens()
    torch.manual_seed(3)
    mhf_compiler.explain(model, options=VERIFY)
    torch.compile(model, backend="flashmhf", options=VERIFY | {"fallback": "eager"})(x)
    assert torch.equal(torch.rand(2), expected)


def test_dynamic_sizes():
    model = torch.compile(Heads(), backend="flashmhf", dynamic=True, options=VERIFY)
    model(tokens())
    assert counters["flashmhf"]["sites_rewritten"] == 1


def test_a_loop_over_a_part_of_a_dynamic_dimension():
    """The heads that are read are a fixed part of a size that is a symbol."""
    w = Heads()

    def unbound(x: Tensor) -> Tensor:
        heads = [(F.silu(x[h] @ w.gate[h]) * (x[h] @ w.up[h])) @ w.down[h] for h in range(H)]
        return torch.stack(heads, -2)

    options = VERIFY | {"strict": True, "fallback": "eager"}
    x = torch.randn(H + 1, 6, d)
    model = torch.compile(unbound, backend="flashmhf", dynamic=True, options=options)
    torch.testing.assert_close(model(x), unbound(x), rtol=1e-4, atol=1e-5)
    assert counters["flashmhf"]["sites_rewritten"] == 1


@pytest.mark.parametrize(
    "zeros",
    [
        torch.zeros_like,
        lambda q: q.new_zeros(q.shape),
        lambda q: torch.empty_like(q).zero_(),
        lambda q: torch.zeros(q.shape).zero_(),
    ],
    ids=["like", "new", "empty, set to zero", "set to zero"],
)
def test_sums_that_begin_with_zeros(zeros: Callable[[Tensor], Tensor]):
    """Zeros are computed, and no random numbers."""
    heads = Heads()

    def summed(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d)).transpose(1, 2)
        out = zeros(q)
        for scale in (1.0, 1.0):
            out += scale * ((F.silu(q @ heads.gate) * (q @ heads.up)) @ heads.down)
        return out

    options = VERIFY | {"strict": True, "fallback": "eager"}
    torch.compile(summed, backend="flashmhf", options=options)(tokens())
    assert counters["flashmhf"]["sites_rewritten"] == 1


def test_sizes_that_depend_on_data():
    """A sample of such sizes is chosen."""
    heads = Heads()

    def masked(x: Tensor, keep: Tensor) -> Tensor:
        return heads(x[keep][None])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        options = VERIFY | {"strict": True, "fallback": "eager"}
        model = torch.compile(masked, backend="flashmhf", options=options)
        model(tokens(), torch.rand(2, 6) > 0.5)
    assert counters["flashmhf"]["sites_rewritten"] == 1


class Einsum(Heads):
    """Under autocast, only views of the queries and weights are cast."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        with torch.autocast("cpu", torch.bfloat16):
            gate, up = (torch.einsum("blhd,hdf->blhf", q, w) for w in (self.gate, self.up))
            return torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down).flatten(2)


class Looped(Heads):
    """Each head is cast by itself."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            heads = enumerate(x.split(d, -1))
            hidden = [F.silu(q @ self.gate[h]) * (q @ self.up[h]) for h, q in heads]
            return torch.cat([hidden[h] @ self.down[h] for h in range(H)], -1)


@pytest.mark.parametrize("model", [Einsum, Looped])
def test_casts_of_views_are_compared(model: type[nn.Module], monkeypatch: pytest.MonkeyPatch):
    options = VERIFY | {"strict": True}
    assert len(mhf_compiler.explain(model(), options=options)(tokens()).rewritten) == 1
    torch.compiler.reset()
    network = Editor.network
    monkeypatch.setattr(
        Editor, "network", lambda e, *given: e.call(torch.mul, network(e, *given), 2.0)
    )
    with pytest.raises(Exception, match="with random numbers"):
        mhf_compiler.explain(model(), options=options)(tokens())


def test_what_cannot_be_compared_is_declined(monkeypatch: pytest.MonkeyPatch):
    def fails(*given: Any) -> None:
        raise EditError("there is no such node")

    monkeypatch.setattr(substitution, "disagreement", fails)
    report = mhf_compiler.explain(Heads(), options=VERIFY)(tokens())
    assert not report.rewritten
    assert "there is no such node" in str(report.declined[0].reason)
