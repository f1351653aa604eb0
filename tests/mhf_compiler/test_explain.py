"""``explain``: what is found where, in the words of the model's author.

Golden texts are updated with ``EXPECTTEST_ACCEPT=1 pytest tests/mhf_compiler/test_explain.py``.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import mhf_compiler
from mhf_compiler import Report
from mhf_compiler.compat import counters
from mhf_compiler.lowering.cost import Estimate
from mhf_compiler.lowering.workload import Workload
from mhf_compiler.patterns import Kind, Location
from mhf_compiler.report.page import nearby, page

ALWAYS = {"rewrite": "always"}


class Heads(nn.Module):
    """A SwiGLU for each of four heads."""

    def __init__(self) -> None:
        super().__init__()
        shapes = (4, 8, 5), (4, 8, 5), (4, 5, 8)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(s) / 4) for s in shapes)

    def query(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 8)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        hidden = F.silu(q @ self.gate) * (q @ self.up)
        out = hidden @ self.down  # of Heads
        return out.transpose(1, 2).flatten(2)


class Routed(nn.Module):
    """Three ungated sub-networks a head, in a loop; two heads share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(8, 3)
        self.up, self.down = (nn.Parameter(torch.randn(3, 2, *s)) for s in ((8, 5), (5, 8)))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 2, 8)).movedim(1, 3)
        r = self.route(q).softmax(-1)
        total = torch.zeros_like(q)
        for e in range(3):
            hidden = F.gelu(q @ self.up[e][:, None])
            total = total + r[..., e, None] * (hidden @ self.down[e][:, None])  # of Routed
        return total.movedim(3, 1).flatten(2)


class OtherQuery(Heads):
    """The up projection reads something else."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.query(x) @ self.gate)
        hidden = hidden * (self.query(x.cos()) @ self.up)  # of OtherQuery
        return hidden @ self.down


class Clamped(Heads):
    """An activation that the op does not have."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.query(x) @ self.gate).clamp(max=1)
        return hidden @ self.down


class Plain(nn.Module):
    """A linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x


class Breaking(nn.Module):
    """A graph break between two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Heads(), Routed()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).sin()
        torch._dynamo.graph_break()
        return self.second(x)


def tokens() -> Tensor:
    return torch.randn(2, 6, 32)


def explain(model: nn.Module, options: dict[str, Any] = ALWAYS) -> Report:
    return mhf_compiler.explain(model, options=options)(tokens())


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def normalised(report: Report) -> str:
    """A report without line numbers and estimates, columns as narrow as can be."""
    text = re.sub(re.escape(__file__) + r":\d+", "FILE", str(report))
    text = re.sub(r"\n +estimate .*|, an estimated .*?\)", "", text)  # depends on the machine
    return re.sub(r"(?<=\S) {2,}", "  ", text)


# What is printed.


def test_the_printed_report_of_rewritten_networks():
    report = explain(nn.Sequential(Heads(), nn.LayerNorm(32), Routed()))
    assert_expected_inline(
        normalised(report),
        """\
2 MH-FFNs rewritten, 0 declined, in 1 graph
  {0,2}: 2 of 3 modules (not 1)
  in all: 3.84 kB of hidden units not stored, 4.8 kB not kept for the backward pass

Rewritten
  site  source  module  heads  head dim  sub-networks  hidden units  router
  0  FILE  0  4  8  1 x 5  silu(gate) * up  no
  1  FILE  2  4 (2 groups)  8  3 x 5  gelu  yes

  FILE
      out = hidden @ self.down  # of Heads
    module  0 (Heads)
    formula  (silu(Q K^T) * (Q U^T)) V
    Q  args.0  (2, 6, 4, 8) float32
    K  0.gate  (4, 1, 5, 8) float32
    U  0.up  (4, 1, 5, 8) float32
    V  0.down  (4, 1, 5, 8) float32
    lowered to  torch.ops.mhf_compiler.multi_head_ffn; CPU path: blocks of tokens whose hidden
                units stay in the cache; the backward pass recomputes the hidden units: only the
                arguments are saved
    work  11.5 kFLOP and 4.99 kB forward for 12 tokens; 960 B of hidden units are not
                stored, 1.92 kB not kept for the backward pass

  FILE
      total = total + r[..., e, None] * (hidden @ self.down[e][:, None])  # of Routed
    module  2 (Routed)
    formula  sum over e of R[e] * gelu(Q K[e]^T) V[e]
    Q  input_2  (2, 6, 4, 8) float32
    K  2.up  (2, 3, 5, 8) float32
    V  2.down  (2, 3, 5, 8) float32
    R  r  (2, 6, 4, 3) float32
    lowered to  torch.ops.mhf_compiler.multi_head_ffn; CPU path: blocks of tokens whose hidden
                units stay in the cache; the backward pass recomputes the hidden units: only the
                arguments are saved
    work  23 kFLOP and 5.57 kB forward for 12 tokens; 2.88 kB of hidden units are not
                stored, 2.88 kB not kept for the backward pass

After autograd
  no pass has run; when Inductor compiles the model, counters and logs say what was fused""",
    )


def test_the_printed_report_of_near_misses():
    report = explain(OtherQuery())
    assert_expected_inline(
        normalised(report),
        """\
0 MH-FFNs rewritten, 1 declined, in 1 graph

Declined
  FILE
      hidden = hidden * (self.query(x.cos()) @ self.up)  # of OtherQuery
    why  the gate and the up projection read different inputs
    operation  FILE: matmul_1 = matmul(transpose_1, up)
    what to do  feed both projections of a head from the same query""",
    )


def test_the_printed_report_of_both():
    report = explain(nn.Sequential(Heads(), Clamped()))
    assert_expected_inline(
        normalised(report),
        """\
1 MH-FFN rewritten, 1 declined, in 1 graph
  0: 1 of 2 modules (not 1)
  in all: 960 B of hidden units not stored, 1.92 kB not kept for the backward pass

Rewritten
  site  source  module  heads  head dim  sub-networks  hidden units  router
  0  FILE  0  4  8  1 x 5  silu(gate) * up  no

  FILE
      out = hidden @ self.down  # of Heads
    module  0 (Heads)
    formula  (silu(Q K^T) * (Q U^T)) V
    Q  args.0  (2, 6, 4, 8) float32
    K  0.gate  (4, 1, 5, 8) float32
    U  0.up  (4, 1, 5, 8) float32
    V  0.down  (4, 1, 5, 8) float32
    lowered to  torch.ops.mhf_compiler.multi_head_ffn; CPU path: blocks of tokens whose hidden
                units stay in the cache; the backward pass recomputes the hidden units: only the
                arguments are saved
    work  11.5 kFLOP and 4.99 kB forward for 12 tokens; 960 B of hidden units are not
                stored, 1.92 kB not kept for the backward pass

Declined
  FILE
      hidden = F.silu(self.query(x) @ self.gate).clamp(max=1)
    module  1 (Clamped)
    why  the activation is none of silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh (it is clamped)
    operation  FILE: hidden_1 = silu_1.clamp(max=1)
    what to do  use one of these, without a clamp, a shift or another slope

After autograd
  no pass has run; when Inductor compiles the model, counters and logs say what was fused""",
    )


def test_a_model_without_a_network_says_why():
    assert_expected_inline(
        normalised(explain(Plain())),
        """\
0 MH-FFNs rewritten, 0 declined, in 1 graph

None of the 9 operations is the down projection of a feed-forward network: a matrix product (or a sum of products) of activated hidden units. An MH-FFN is down(act(gate(q)) * up(q)) or down(act(gate(q))), head by head.

Looked at, as the matrix products that there are
  FILE: linear = linear(x, first.weight, first.bias)
  FILE: linear_1 = linear(linear, second.weight, second.bias)""",  # noqa: E501
    )


class Mixed(nn.Module):
    """A network with heads between two ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)
        )
        self.heads = Heads()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlps[1](self.heads(self.mlps[0](x)))


def test_ordinary_networks_are_no_near_misses():
    report = explain(Mixed())
    assert (len(report.rewritten), report.declined) == (1, [])
    assert [site.reason and site.reason.kind for site in report.ordinary] == [Kind.PLAIN_FFN] * 2
    for shown in (str(report), page(report.graphs)):
        assert "2 ordinary FFNs, left to Inductor: mlps.{0,1}" in shown
        assert "what to do" not in shown
    assert counters["flashmhf"]["ordinary"] == 2
    assert counters["flashmhf"]["sites_declined"] == 0
    plain = explain(Mixed().mlps[0])
    assert repr(plain) == "<Report: 0 MH-FFNs rewritten, 0 declined, in 1 graph>"
    assert "None of the" not in str(plain)


def test_a_call_without_a_graph_says_so():
    assert_expected_inline(
        str(mhf_compiler.explain(lambda x: x)(3)),
        """\
0 MH-FFNs rewritten, 0 declined, in 0 graphs

No graph was compiled: nothing in the call was captured by torch.compile.""",
    )


# Where it is.


@pytest.mark.parametrize("model", [Heads, Routed])
def test_a_site_lies_where_its_down_projection_is(model: Callable[[], nn.Module]):
    (site,) = explain(model()).rewritten
    assert site.location is not None
    assert site.location.file == __file__
    assert site.location.line == line_of(f"# of {model.__name__}")  # type: ignore[attr-defined]
    assert site.location.function == "forward"
    assert "self.down" in site.location.code


def test_a_near_miss_lies_where_it_is_decided():
    (miss,) = explain(OtherQuery()).declined
    assert miss.reason is not None
    assert miss.reason.kind is Kind.DIFFERENT_QUERIES
    line = line_of("# of OtherQuery")
    assert miss.location == Location(__file__, line, "forward", miss.location.code)
    assert "self.query(x.cos()) @ self.up" in miss.location.code


class Lists(nn.Module):
    """Networks in lists, a dict, and lists of lists; it does not call itself self."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList([Heads(), Heads()]) for _ in range(2))
        self.named = nn.ModuleDict({"x": Heads()})

    def forward(module, x: Tensor) -> Tensor:
        for stage in module.stages:
            for network in stage:
                x = network(x)
        return module.named["x"](x)


class PerHead(nn.Module):
    """Each head has modules of its own, in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 5, bias=False) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(5, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = zip(x.chunk(4, -1), self.ups, self.downs, strict=True)
        return torch.cat([down(up(q).relu()) for q, up, down in heads], -1)


class Repeated(nn.Module):
    """One module called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = Heads()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.ffn(self.ffn(x)))


@pytest.mark.parametrize(
    ("make", "sentences"),
    [
        (lambda: nn.Sequential(Heads(), Heads(), Heads()), ["{0-2}: all 3 modules"]),
        (lambda: nn.Sequential(PerHead(), PerHead(), PerHead()), ["{0-2}: all 3 modules"]),
        (Lists, ["stages.{0,1}.{0,1}: all 4 modules", "named.x"]),
        (lambda: nn.Sequential(Lists(), Heads()), ["0.stages.{0,1}.{0,1}: all 4 modules"]),
        (Repeated, ["ffn: 3 times"]),
    ],
)
def test_equal_layers_are_one_row_and_a_sentence(make: Callable[[], nn.Module], sentences: Any):
    report = explain(make())
    assert len(re.findall("formula", str(report))) == 1
    assert [str(one) for one in report.coverage][: len(sentences)] == sentences
    for shown in (str(report), report._repr_html_(), page(report.graphs)):
        for site in report.rewritten:
            assert site.module in shown


def test_weights_in_modules_of_their_own_are_copied():
    report = explain(nn.Sequential(PerHead(), PerHead()))
    k, v = (one for one in report.rewritten[1].arguments if one.role in "KV")
    assert k.tensors == tuple(f"1.ups.{n}.weight" for n in range(4))
    assert k.copied_bytes == v.copied_bytes == 4 * 8 * 5 * 4
    assert report.totals.copied_bytes == 4 * k.copied_bytes
    assert explain(Heads()).totals.copied_bytes == 0


# The graphs.


def test_graphs_are_readable_code():
    report = explain(Heads())
    for code in (report.graph_before, report.graph_after):
        compile(code, "graph", "exec")
        assert f"# File: {__file__}:" in code
    assert "silu" in report.graph_before
    assert "multi_head_ffn" not in report.graph_before
    assert "silu(" not in report.graph_after
    assert report.graph_after.count("torch.ops.mhf_compiler.multi_head_ffn.default(") == 1


def test_graphs_are_equal_when_nothing_is_rewritten():
    report = explain(Plain())
    assert report.graph_before == report.graph_after
    assert "linear" in report.graph_before


def test_every_graph_is_reported():
    report = explain(Breaking())
    assert [len(graph.rewritten) for graph in report.graphs] == [1, 1]
    assert [site.activation for site in report.rewritten] == ["silu", "gelu"]
    assert str(report).startswith("2 MH-FFNs rewritten, 0 declined, in 2 graphs\n")
    assert report.graph_after.count("class GraphModule") == 2


class Block(nn.Module):
    """A layer; Dynamo compiles it by itself where the loop over layers is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(32), Heads()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class CutAfter(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(self.norm(x))
        torch._dynamo.graph_break()
        return x + y


def heads(x: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    q = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return (F.silu(q @ gate) @ down).transpose(1, 2).flatten(2)


class Tower(nn.Module):
    """Layers in a loop that breaks the graph, in one of the ways that models do."""

    def __init__(self, layer: Callable[[], nn.Module], layers: int, cut: str = "") -> None:
        super().__init__()
        self.layers, self.cut = nn.ModuleList(layer() for _ in range(layers)), cut

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.cut == "print":
                print("a layer")
            if self.cut == "item" and x.sum().item() > 1e9:
                x = x / 2
        return x


class InLists(nn.Module):
    """Weights in lists of the model, networks in a function that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ParameterList(torch.randn(4, 8, 5) for _ in range(3))
        self.downs = nn.ParameterList(torch.randn(4, 5, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for gate, down in zip(self.gates, self.downs, strict=True):
            x = heads(x, gate, down)
            print("a layer")
        return x


@pytest.mark.parametrize(
    ("make", "where", "number"),
    [
        (lambda: Tower(Block, 6, "print"), "layers.{0-5}.ffn: all 6 layers", 6),
        (lambda: Tower(Block, 3, "item"), "layers.{0-2}.ffn: all 3 layers", 3),
        (lambda: Tower(Heads, 3, "print"), "layers.{0-2}: all 3 layers", 3),
        (lambda: Tower(CutAfter, 3), "layers.{0-2}.ffn: all 3 layers", 3),
        (
            lambda: nn.Sequential(Tower(Block, 2, "print"), Tower(Block, 2, "print")),
            "{0,1}.layers.{0,1}.ffn: all 4 layers",
            4,
        ),
        (InLists, "gates.{0-2}: all 3 gates", 3),
    ],
)
def test_layers_that_share_a_graph_are_all_counted_and_named(
    make: Callable[[], nn.Module], where: str, number: int
):
    """Dynamo compiles one layer and calls that graph for others; the call says for which."""
    report = explain(make())
    assert report.totals.networks == report.totals.calls == number
    assert [str(one) for one in report.coverage] == [where]
    assert len(report.rewritten) < number or number < 4
    text = str(report)
    assert text.startswith(f"{number} MH-FFNs rewritten, 0 declined, in {len(report.graphs)} ")
    assert sum(graph.calls * len(graph.rewritten) for graph in report.graphs) == number
    for site in report.rewritten:
        for argument in site.arguments:
            if argument.role in "KUV":
                assert set(argument.tensors) <= set(make().state_dict())


class Some(nn.Module):
    """A model that calls the first of its layers, and has one under another name."""

    def __init__(self, layers: list[nn.Module], called: int, cut: str = "") -> None:
        super().__init__()
        self.layers, self.called, self.cut = nn.ModuleList(layers), called, cut
        self.spare = Block()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.called]:
            x = layer(x)
            if self.cut:
                print(self.cut)
        return x


class Other(Block):
    """A layer whose network is of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = Routed()


def with_equal_weights(layer: Block) -> Block:
    """Another layer, which shares the weights of one."""
    other = Block()
    other.norm, other.ffn.gate = layer.norm, layer.ffn.gate
    other.ffn.up, other.ffn.down = layer.ffn.up, layer.ffn.down
    return other


@pytest.mark.parametrize(
    ("number", "called", "cut", "sentence"),
    [
        (4, 3, "", "layers.{0-2}.ffn: 3 of 4 layers (layers.3 is in no graph)"),
        (4, 3, "a layer", "layers.{0-2}.ffn: 3 of 4 layers (layers.3 is in no graph)"),
        (5, 2, "", "layers.{0,1}.ffn: 2 of 5 layers (layers.{2-4} are in no graph)"),
        (3, 3, "", "layers.{0-2}.ffn: all 3 layers"),
        (3, 1, "", "layers.0.ffn"),  # one of several heads is a choice, not a layer left out
    ],
)
def test_layers_that_are_never_called_are_counted(
    number: int, called: int, cut: str, sentence: str
):
    report = explain(Some([Block() for _ in range(number)], called, cut))
    assert [str(one) for one in report.coverage] == [sentence]
    assert sentence in str(report)
    assert sentence in page(report.graphs)


@pytest.mark.parametrize(
    "last",
    [lambda first: first, with_equal_weights, lambda first: Other(), lambda first: nn.Identity()],
    ids=["the same", "the same weights", "another network", "no network"],
)
@pytest.mark.parametrize("cut", ["", "a layer"])
def test_what_is_no_layer_left_out_is_not_counted(last: Callable[[Block], nn.Module], cut: str):
    first = Block()
    report = explain(Some([first, Block(), last(first)], 2, cut))
    assert [str(one) for one in report.coverage] == ["layers.{0,1}.ffn: all 2 layers"]


@pytest.mark.parametrize("how", ["shared", "read"])
def test_a_layer_of_whose_tensors_a_graph_has_some_is_left_out(how: str):
    blocks = [Block() for _ in range(3)]
    if how == "shared":
        blocks[2].ffn.gate = blocks[1].ffn.gate
    else:
        weight = blocks[2].norm.weight
        blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * weight.mean(),))
    report = explain(Some(blocks, 2))
    (sentence,) = map(str, report.coverage)
    assert sentence == "layers.{0,1}.ffn: 2 of 3 layers (layers.2 is in no graph)"


def test_layers_without_tensors_are_not_said_to_be_left_out():
    """The tensors that graphs are given tell layers apart, so nothing is known of these."""

    class Function(nn.Module):
        def forward(self, x: Tensor, gate: Tensor, down: Tensor) -> Tensor:
            return heads(x, gate, down)

    class Outside(InLists):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Function() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer, gate, down in zip(self.layers, self.gates, self.downs, strict=False):
                x = layer(x, gate, down)
            return x

    assert [str(one) for one in explain(Outside()).coverage] == ["layers.{0-2}: all 3 layers"]


def test_the_report_says_which_layers_each_graph_has():
    text = str(explain(Tower(Block, 4, "print")))
    first, second = re.search(r"\n\nGraphs\n(.*)\n(.*)\n", text).groups()
    assert first == "  graph 0: layers.0.ffn rewritten, called once"
    assert second == "  graph 1: layers.{1-3}.ffn rewritten, called 3 times"


@pytest.mark.parametrize(
    ("cut", "reason"),
    [("print", "Failed to trace builtin operator"), ("item", "Unsupported Tensor.item()")],
)
def test_a_function_that_dynamo_gives_up_is_reported(cut: str, reason: str):
    """Twice, though Dynamo gives it up for good at the first time."""
    model = Tower(Block, 2, cut)
    for _ in range(2):
        report = explain(model)
        (one,) = report.graph_breaks
        assert one.skipped == "forward"
        assert one.reason.startswith(reason)
        assert one.location is not None
        assert one.location.line == line_of(f'self.cut == "{cut}"') + (cut == "print")
        assert f"forward is left to Python, at {one.location}: {reason}" in str(report)
        assert nearby(str(one.location)) in page(report.graphs, report.breaks)


def test_a_break_before_the_first_operation_is_reported():
    class First(Block):
        def forward(self, x: Tensor) -> Tensor:
            print("first")
            return super().forward(x)

    report = explain(First())
    (one,) = report.breaks
    assert one.skipped is None
    assert [str(where) for where in report.coverage] == ["ffn"]
    assert "before the first operation, at " in str(report)


def test_a_network_that_is_compiled_for_two_sizes_is_one():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower(Block, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.cat([x, self.tower(x)[:, -1:]], 1)
                print("a token")
            return x

    report = explain(Twice())
    assert report.totals.networks == 2
    assert report.totals.calls == 6
    assert [str(one) for one in report.coverage] == [
        "tower.layers.{0,1}.ffn: all 2 layers, 3 times each"
    ]
    assert "in all (a large number of tokens where it is dynamic): " in str(report)


# The call.


def test_what_is_compiled_stays_compiled():
    """In the middle of a training, whatever is explained."""
    compiled: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    model, x = Tower(Block, 3, "print"), tokens()
    run = torch.compile(model, backend=backend)
    run(x)
    before = len(compiled)
    for explained in (model, run, lambda x: model(x) + 1):
        assert len(mhf_compiler.explain(explained, options=ALWAYS)(x).graphs) >= 2
        run(x)
        assert len(compiled) == before
    assert len(mhf_compiler.explain(model, options=ALWAYS)(torch.randn(2, 9, 32)).graphs) == 2
    run(x)
    assert len(compiled) == before


def test_on_the_meta_device_what_would_match_is_said():
    with torch.device("meta"):
        model, x = Tower(Block, 2), tokens()
    (first, _) = mhf_compiler.explain(model)(x).rewritten
    assert first.device == "meta"
    assert first.work is not None
    assert first.work.rewritten is None
    run = torch.compile(model, backend="flashmhf", options={"fallback": "eager"})
    assert run(x).shape == x.shape
    assert counters["flashmhf"]["declined.UNSUPPORTED_PROBLEM"] == 2


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_card_that_is_not_there_can_be_asked_about(device: str):
    model, x = Block().to(device), torch.randn(64, 1024, 32, device=device)
    (site,) = mhf_compiler.explain(model, device="cuda:H100", options=ALWAYS)(x).rewritten
    assert site.device == "cuda:h100"
    assert any("forward pass by PyTorch's" in sentence for sentence in site.lowered)  # float32
    assert site.work is not None
    assert site.work.rewritten is not None
    with pytest.raises(ValueError, match="the nearest is 'cuda:a100'"):
        mhf_compiler.explain(model, device="cuda:a1000")


def test_explaining_leaves_nothing_behind():
    """Neither graphs nor compiled code, so that Dynamo's limits are not used up."""
    model, x = Block(), tokens()
    for _ in range(3 * torch._dynamo.config.recompile_limit):
        assert len(explain(model).rewritten) == 1
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(Block.forward.__code__)
    assert entries == []
    compiled: list[fx.GraphModule] = []
    torch.compile(model, backend=lambda gm, inputs: compiled.append(gm) or gm.forward)(x)
    assert len(compiled) == 1


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="before torch 2.13 what is explained counts as a compilation",
)
def test_what_is_explained_does_not_count_towards_the_limit_of_compilations():
    model, compiled = Block(), list[fx.GraphModule]()
    run = torch.compile(model, backend=lambda gm, inputs: compiled.append(gm) or gm.forward)
    run(tokens())
    for _ in range(torch._dynamo.config.recompile_limit):
        explain(model)
    model.double()
    run(tokens().double())
    assert len(compiled) == 2


def test_sizes_that_were_seen_before_are_not_dynamic():
    """Dynamo makes a size dynamic when it sees a second one; what is explained is one call."""
    model = Block()
    run = torch.compile(model, backend="eager")
    for length in (5, 6, 7):
        run(torch.randn(2, length, 32))
    assert not explain(model).totals.dynamic


def test_sizes():
    (site,) = explain(Routed()).rewritten
    sizes = (site.heads, site.groups, site.head_dim, site.sub_networks, site.hidden)
    assert sizes == (4, 2, 8, 3, 5)
    assert (site.gated, site.routed) == (False, True)
    assert str(site).endswith("4 heads in 2 groups of width 8, 3 x 5 hidden units, gelu")


def test_options_are_honoured():
    assert explain(Heads(), options={"rewrite": "never"}).rewritten == []
    assert len(explain(Heads(), options={"rewrite": "always"}).rewritten) == 1


def test_what_does_not_pay_is_declined_with_both_estimates(monkeypatch: pytest.MonkeyPatch):
    verdict = Estimate(0.0123, 0.00456, rewritten_bytes=2**20, original_bytes=0)
    monkeypatch.setattr("mhf_compiler.lowering.cost.estimate", lambda workload: verdict)
    (site,) = explain(Heads(), options={}).declined
    assert site.reason is not None
    assert site.reason.kind is Kind.DOES_NOT_PAY
    assert site.reason.detail == str(verdict)
    assert (site.heads, site.head_dim, site.activation) == (4, 8, "silu")


def test_arguments_by_name_and_functions():
    model = Heads()

    def function(x: Tensor, *, scale: float) -> Tensor:
        return model(x * scale)

    report = mhf_compiler.explain(function, options=ALWAYS)(tokens(), scale=2.0)
    assert len(report.rewritten) == 1


def test_the_model_is_left_as_it_was():
    """Its code, its parameters and what it computes; and it may be compiled afterwards."""
    model, x = Heads(), tokens()
    before = model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mhf_compiler.explain(model, options=ALWAYS)(x)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    compiled = torch.compile(model, backend="flashmhf", options=ALWAYS | {"fallback": "eager"})
    torch.testing.assert_close(compiled(x), before)


class Pair(nn.Module):
    """Two networks, with a graph break between them if there is no other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Heads(), Heads()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("place", ["", "second"])
def test_a_model_compiled_in_place(place: str):
    """It is seen as it was before, and is compiled afterwards as it was."""
    model, x = Pair(), tokens()
    part = model.get_submodule(place)
    compiled: list[fx.GraphModule] = []
    part.compile(backend=lambda gm, inputs: compiled.append(gm) or gm.forward)
    assert len(mhf_compiler.explain(model, options=ALWAYS)(x).rewritten) == 2
    assert not compiled
    with pytest.raises(Exception, match="multiply up to the size of dim 2"):
        mhf_compiler.explain(model)(torch.randn(2, 6, 31))
    model(x)
    assert len(compiled) == (1 if place else 2)


def test_explain_twice_says_the_same():
    model, x = Heads(), tokens()
    explained = mhf_compiler.explain(model, options=ALWAYS)
    assert str(explained(x)) == str(explained(x))


def test_an_error_in_the_model_comes_through():
    with pytest.raises(Exception, match="multiply up to the size of dim 2"):
        mhf_compiler.explain(Heads())(torch.randn(2, 6, 31))


def test_cuda_graphs_reach_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a CUDA graph the host's time for a launch does not count."""
    seen: list[Workload] = []

    def estimate(workload: Workload) -> Estimate:
        seen.append(workload)
        return Estimate(1.0, 2.0)

    monkeypatch.setattr("mhf_compiler.lowering.cost.estimate", estimate)
    mhf_compiler.explain(Heads(), options={"mode": "reduce-overhead"})(torch.randn(2, 6, 32))
    assert [workload.captured for workload in seen] == [True]


def test_networks_in_a_row_give_no_near_misses() -> None:
    model = nn.Sequential(Heads(), nn.Tanh(), Routed())
    report = mhf_compiler.explain(model, options={"rewrite": "always"})(torch.randn(2, 6, 32))
    assert len(report.rewritten) == 2
    assert report.declined == []


@pytest.mark.parametrize(
    ("frozen", "of_frozen", "trained"),
    [(False, True, True), (True, True, False), (True, False, True)],
    ids=["trained", "frozen", "frozen, of tokens that are trained"],
)
def test_a_network_counts_as_trained_if_anything_it_reads_is(
    frozen: bool, of_frozen: bool, trained: bool
):
    """A frozen network in grad mode has no backward pass, and is judged without one."""
    model = Heads().requires_grad_(not frozen)
    tokens = torch.randn(2, 5, 32, requires_grad=not of_frozen)
    (site,) = mhf_compiler.explain(model, options={"rewrite": "always"})(tokens).rewritten
    assert ("backward" in " ".join(site.lowered)) == trained
