"""The guard after an edit, with editors that are broken on purpose.

Each of them writes one thing into the graph that the original does not do, which recognition would
not notice: the site is declined, at its line, and the others are rewritten.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mhf_compiler
import mhf_compiler.substitution.edit
from mhf_compiler.compat import counters
from mhf_compiler.patterns import Kind
from mhf_compiler.substitution.emit import Editor

H, d, f = 4, 8, 5
TOKENS = (2, 6, H * d)


class Heads(nn.Module):
    """One SwiGLU for each head."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(H, d, f) / 4) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, f, d) / 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d)).transpose(1, 2)
        out = (self.activation(q @ self.gate) * (q @ self.up)) @ self.down
        return out.transpose(1, 2)


class Routed(Heads):
    """The same with a router in float32, which becomes an op of its own before the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(H, 3, d, f) / 4) for _ in range(2))
        self.down = nn.Parameter(torch.randn(H, 3, f, d) / 4)
        self.route = nn.Parameter(torch.randn(H, 3, d))
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        r = torch.einsum("blhd,hed->blhe", q.float(), self.route.float()).sigmoid()
        hidden = F.silu(torch.einsum("blhd,hedf->blhef", q, self.gate))
        hidden = hidden * torch.einsum("blhd,hedf->blhef", q, self.up)
        return torch.einsum("blhef,hefd,blhe->blhd", hidden, self.down, r.to(q.dtype))


Breaks = Callable[[Editor, fx.Node], fx.Node]


def _reads(editor: Editor, role: str) -> fx.Node:
    return editor.value(editor.site.views()[role].value)


BROKEN: dict[str, tuple[Breaks, str]] = {
    "dtype": (lambda e, out: e.call(torch.Tensor.to, out, torch.float64), "dtype of"),
    "shape": (lambda e, out: e.call(torch.flatten, out, 2), "shape of"),
    "strides": (
        lambda e, out: e.call(torch.clone, out, memory_format=torch.contiguous_format),
        "strides of",
    ),
    "device": (lambda e, out: e.call(torch.Tensor.to, out, "meta"), "device of"),
    "gradient": (lambda e, out: e.call(torch.detach, out), "requires_grad of"),
    "memory of an input": (
        lambda e, out: e.call(
            torch.transpose, e.call(torch.Tensor.view, _reads(e, "query"), 2, 6, H, d), 1, 2
        ),
        "share memory",
    ),
    "an error": (lambda e, out: e.call(torch.Tensor.view, out, 7, 11), "view does not run"),
}


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An editor that goes wrong with networks of relu. The value is what is said of it."""
    breaks, message = BROKEN[request.param]
    insert = Editor.insert

    def insert_wrongly(self: Editor) -> fx.Node:
        out = insert(self)
        return breaks(self, out) if self.site.activation == "relu" else out

    monkeypatch.setattr(Editor, "insert", insert_wrongly)
    return message


class Copied(Heads):
    """Its result does not lie as the op writes it, so that a copy of it has other strides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous().transpose(1, 2)


def test_a_wrong_edit_is_declined_and_the_others_stay(broken: str):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.right, self.wrong = Copied(), Copied(F.relu)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.right(x), self.wrong(x)

    model, x = Two(), torch.randn(TOKENS).requires_grad_()
    report = mhf_compiler.explain(model, options={"rewrite": "always"})(x)
    (declined,) = report.declined
    assert declined.reason is not None
    assert declined.reason.kind is Kind.CHANGED_RESULT
    assert broken in declined.reason.detail
    assert declined.location is not None
    assert declined.location.file == __file__
    assert len(report.rewritten) == 1
    assert counters["flashmhf"]["declined.CHANGED_RESULT"] == 1
    torch.compiler.reset()
    compiled = torch.compile(model, backend="flashmhf", options={"rewrite": "always"})
    for found, expected in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()


def test_equal_layers_are_all_declined(monkeypatch: pytest.MonkeyPatch):
    """What is found for one layer holds for the others, which are not run again."""
    insert = Editor.insert
    monkeypatch.setattr(
        Editor, "insert", lambda e: e.call(torch.Tensor.to, insert(e), torch.float64)
    )
    model = nn.Sequential(*(nn.Sequential(Heads(), nn.Flatten(2)) for _ in range(3)))
    report = mhf_compiler.explain(model, options={"rewrite": "always"})(torch.randn(TOKENS))
    kinds = [site.reason and site.reason.kind for site in report.declined]
    assert kinds == [Kind.CHANGED_RESULT] * 3
    assert report.rewritten == []


def test_a_wrong_product_keeps_its_spelling_and_the_network_is_rewritten(
    monkeypatch: pytest.MonkeyPatch,
):
    product = Editor.router_product
    monkeypatch.setattr(
        Editor,
        "router_product",
        lambda e, *args: e.call(torch.Tensor.to, product(e, *args), torch.bfloat16),
    )
    x = torch.randn(TOKENS, dtype=torch.bfloat16)
    report = mhf_compiler.explain(Routed(), options={"rewrite": "always"})(x)
    assert len(report.rewritten) == 1
    assert "multi_head_ffn" in report.graph_after
    assert "router_product" not in report.graph_after


class ReturnedTwice(Heads):
    """A caller may write to one of the results, and read it from the other."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q = x.unflatten(-1, (H, d)).transpose(1, 2)
        out = (F.silu(q @ self.gate) * (q @ self.up)) @ self.down
        return out, out.transpose(0, 1)


def test_results_share_memory_with_each_other_as_before(monkeypatch: pytest.MonkeyPatch):
    model, x = ReturnedTwice(), torch.randn(TOKENS)
    explain = mhf_compiler.explain(model, options={"rewrite": "always"})
    assert len(explain(x).rewritten) == 1
    edit = mhf_compiler.substitution.edit._redirect_readers

    def copies(edited: Any, *given: Any) -> None:
        """Each reader reads a copy of its own."""
        edit(edited, *given)
        *_, editor, _ = given
        for (reader, argument), place in edited.redirected.items():
            new = editor.copied(place)
            edited.nodes[reader].replace_input_with(place, new)
            edited.redirected[reader, argument] = new

    monkeypatch.setattr(mhf_compiler.substitution.edit, "_redirect_readers", copies)
    report = explain(x)
    (declined,) = report.declined
    assert declined.reason is not None
    assert "share memory" in declined.reason.detail


def test_strides_that_nobody_sees_may_differ():
    """A router's logits lie as the kernels read them best: the guard follows them to their end."""
    x = torch.randn((2, 8, H * d), dtype=torch.bfloat16)
    report = mhf_compiler.explain(Routed(), options={"rewrite": "always"})(x)
    assert "router_product" in report.graph_after
    assert report.declined == []


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("modes", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_right_edits_pass(dynamic: bool, modes: Any):
    model, x = nn.Sequential(Heads(), nn.Flatten(2), Heads()), torch.randn(TOKENS)
    options = {"rewrite": "always", "strict": True, "fallback": "aot_eager"}
    compiled = torch.compile(model, backend="flashmhf", dynamic=dynamic, options=options)
    with modes():
        torch.testing.assert_close(compiled(x), model(x))
    assert counters["flashmhf"]["sites_rewritten"] == 2
    assert counters["flashmhf"]["sites_declined"] == 0
