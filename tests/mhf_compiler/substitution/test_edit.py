"""The edit: what it inserts, what it removes, what it keeps, and that the original stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mhf_compiler
from mhf_compiler.patterns import find_sites
from mhf_compiler.substitution.edit import rewrite

OP = torch.ops.mhf_compiler.multi_head_ffn.default
VIEWS = {"view", "unflatten", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "select"}
VIEWS |= {"narrow", "broadcast_to", "expand", "mT", "t", "reshape", "size", "getitem", "getattr"}

H, d, f = 4, 8, 5


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 4)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, d))


class PerHead(nn.Module):
    """Einsums over heads. Sub-classes store their weights in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(H, d, f), weight(H, d, f), weight(H, f, d)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate, self.up, self.down

    def heads(self, q: Tensor) -> Tensor:
        gate, up, down = self.weights()
        hidden = F.silu(torch.einsum("blhd,hdf->blhf", q, gate))
        hidden = hidden * torch.einsum("blhd,hdf->blhf", q, up)
        return torch.einsum("blhf,hfd->blhd", hidden, down)

    def forward(self, x: Tensor) -> Any:
        return self.heads(split(x)).flatten(2)


def dynamo_graph(model: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=collect, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


def edited(gm: fx.GraphModule) -> fx.Graph:
    findings = find_sites(gm)
    assert findings.sites
    assert findings.copy is not None
    return rewrite(gm.graph, findings.sites, findings.copy).graph


def edit(model: nn.Module, x: Tensor | None = None) -> fx.Graph:
    return edited(dynamo_graph(model, torch.randn(2, 6, H * d) if x is None else x))


def names(graph: fx.Graph) -> list[str]:
    """What is called, in order."""
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    return [n.target if isinstance(n.target, str) else n.target.__name__ for n in calls]


def op_of(graph: fx.Graph) -> fx.Node:
    (node,) = [node for node in graph.nodes if node.target is OP]
    return node


def between(node: fx.Node) -> list[fx.Node]:
    """The operations between the graph's inputs and a node."""
    seen: dict[fx.Node, None] = {}
    todo = list(node.all_input_nodes)
    while todo:
        current = todo.pop()
        if current.op not in ("placeholder", "get_attr") and current not in seen:
            seen[current] = None
            todo += current.all_input_nodes
    return list(seen)


# The original.


def test_the_original_graph_is_untouched():
    gm = dynamo_graph(PerHead(), torch.randn(2, 6, H * d))
    before = gm.print_readable(print_output=False)
    meta = {node: dict(node.meta) for node in gm.graph.nodes}
    graph = edited(gm)
    assert graph is not gm.graph
    assert not set(graph.nodes) & set(gm.graph.nodes)
    gm.recompile()
    assert gm.print_readable(print_output=False) == before
    assert {node: dict(node.meta) for node in gm.graph.nodes} == meta


def test_the_edited_graph_is_valid_and_computes_the_same():
    model, x = PerHead(), torch.randn(2, 6, H * d)
    gm = dynamo_graph(model, x)
    graph = edited(gm)
    graph.lint()
    inputs = {"x": x, "gate": model.gate, "up": model.up, "down": model.down}
    arguments = [
        next(tensor for key, tensor in inputs.items() if node.name.endswith(f"_{key}_"))
        for node in graph.find_nodes(op="placeholder")
    ]
    (out,) = fx.GraphModule(gm, graph)(*arguments)
    torch.testing.assert_close(out, model(x))


# What is removed.


def test_what_computed_the_site_is_gone():
    assert set(names(edit(PerHead()))) <= VIEWS | {"multi_head_ffn.default"}


class OthersAround(PerHead):
    """Operations before, parallel to and after the network."""

    def forward(self, x: Tensor) -> Any:
        before = x.sin()
        after = self.heads(split(before)).flatten(2).cos()
        return after + x.exp(), before.tanh()


def test_everything_else_stays():
    left = names(edit(OthersAround()))
    for name in ("sin", "cos", "exp", "tanh", "add"):
        assert left.count(name) == 1


class Filled(PerHead):
    """A buffer filled head by head."""

    def forward(self, x: Tensor) -> Any:
        out = torch.empty_like(x)
        for h in range(H):
            q = x[..., h * d : (h + 1) * d]
            hidden = F.silu(q @ self.gate[h]) * (q @ self.up[h])
            out[..., h * d : (h + 1) * d] = hidden @ self.down[h]
        return out.flatten(1)


class Accumulated(PerHead):
    """Sub-networks added to a buffer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(3, H, d, f), weight(3, H, d, f), weight(3, H, f, d)

    def forward(self, x: Tensor) -> Any:
        q = split(x).transpose(1, 2)
        out = torch.zeros_like(q)
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            out += (F.silu(q @ gate) * (q @ up)) @ down
        return out.flatten(1)


@pytest.mark.parametrize("model", [Filled, Accumulated])
def test_buffers_that_nobody_reads_any_more_are_gone(model: Callable[[], nn.Module]):
    left = set(names(edit(model())))
    assert left <= VIEWS | {"multi_head_ffn.default"}


class WrittenInput(PerHead):
    """Writes into one of its inputs."""

    def forward(self, x: Tensor) -> Any:
        out = self.heads(split(x * 2)).flatten(2)
        x.mul_(3)
        return out


class Random(PerHead):
    """Draws from the random number generator, and throws the result away."""

    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        return super().forward(x)


@pytest.mark.parametrize(("model", "effect"), [(WrittenInput, "mul_"), (Random, "rand")])
def test_side_effects_stay(model: Callable[[], nn.Module], effect: str):
    with torch.no_grad():
        assert effect in names(edit(model()))


class Asserting(PerHead):
    def forward(self, x: Tensor) -> Any:
        torch._check(x.size(0) < 100)
        torch._assert_async(x.sum() > -1e9)
        return super().forward(x)


def test_assertions_stay():
    assert any("assert" in name for name in names(edit(Asserting())))


# What is kept of the nodes.


def test_metadata_is_kept():
    """Line numbers, module names and what Dynamo knows of the inputs."""
    gm = dynamo_graph(OthersAround(), torch.randn(2, 6, H * d))
    old = {node.name: node for node in gm.graph.nodes}
    graph = edited(gm)
    kept = [node for node in graph.nodes if node.name in old]
    assert {"placeholder", "call_method", "output"} <= {node.op for node in kept}
    for node in kept:
        if node.op == old[node.name].op and node.target == old[node.name].target:
            assert node.meta == old[node.name].meta
    for node in graph.find_nodes(op="placeholder"):
        assert node._dynamo_source == old[node.name]._dynamo_source


def test_the_op_has_the_line_of_what_it_replaces():
    op = op_of(edit(PerHead()))
    assert __file__ in op.meta["stack_trace"]
    assert "return self.heads(split(x))" in op.meta["stack_trace"]


def test_inputs_keep_their_order():
    gm = dynamo_graph(PerHead(), torch.randn(2, 6, H * d))
    before = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    assert [node.target for node in edited(gm).find_nodes(op="placeholder")] == before


# Weights.


class Packed(PerHead):
    """Gate and up projection side by side in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = weight(H, d, 2 * f)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return *self.packed.chunk(2, dim=-1), self.down


class Interleaved(Packed):
    """Gate and up projection interleaved."""

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed[..., ::2], self.packed[..., 1::2], self.down


class Flat(PerHead):
    """As ``nn.Linear`` stores them: all hidden units of all heads in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(H * f, d), weight(H * f, d), weight(H * f, d)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = (w.view(H, f, d).mT for w in (self.gate, self.up))
        return gate, up, self.down.view(H, f, d)


class PartOfALarger(PerHead):
    """Some heads of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = weight(3 * H, d, f)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate[H : 2 * H], self.up, self.down


class Shared(PerHead):
    """Two heads share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(2, d, f), weight(2, d, f), weight(2, f, d)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (w.repeat_interleave(2, 0) for w in (self.gate, self.up, self.down))
        return gate, up, down


class Copied(PerHead):
    """Made contiguous each time, which the op does not need."""

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = (w.transpose(0, 1).contiguous().transpose(0, 1) for w in (self.gate, self.up))
        return gate, up, self.down.clone()


@pytest.mark.parametrize(
    "model", [PerHead, Packed, Interleaved, Flat, PartOfALarger, Shared, Copied, Filled]
)
def test_weights_of_one_tensor_enter_as_views(model: Callable[[], nn.Module]):
    """Nothing but views between the parameters and the op: no copy."""
    op = op_of(edit(model()))
    assert {node.op for node in between(op)} <= {"call_method", "call_function"}
    used = {n.target if isinstance(n.target, str) else n.target.__name__ for n in between(op)}
    assert used <= VIEWS


class ListOfHeads(nn.Module):
    """A module for each head."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(d, f), nn.Linear(f, d)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(self.Head() for _ in range(H))

    def forward(self, x: Tensor) -> Tensor:
        parts = [head(q) for head, q in zip(self.heads, x.chunk(H, -1), strict=True)]
        return torch.cat(parts, dim=-1)


def test_weights_of_several_tensors_are_stacked_once():
    graph = edit(ListOfHeads())
    stacks = [node for node in graph.nodes if node.target is torch.stack]
    assert len(stacks) == 4  # two weights, two biases
    for stack in stacks:
        assert len(stack.all_input_nodes) == H
        assert all(source.op == "placeholder" for source in stack.all_input_nodes)
    assert set(names(graph)) <= VIEWS | {"stack", "multi_head_ffn.default"}


# The result.


class Merged(PerHead):
    """The heads' outputs side by side."""


class HeadsFirst(PerHead):
    """The reader wants (B, H, L, d)."""

    def forward(self, x: Tensor) -> Any:
        return self.heads(split(x)).transpose(1, 2).contiguous().sin()


class HeadsFirstProduct(PerHead):
    """The reader wants (H, B, L, d)."""

    def forward(self, x: Tensor) -> Any:
        return self.heads(split(x)).permute(2, 0, 1, 3).contiguous().sin()


@pytest.mark.parametrize(
    ("model", "order"),
    [(Merged, None), (HeadsFirst, [0, 2, 1, 3]), (HeadsFirstProduct, [2, 0, 1, 3])],
)
def test_the_result_lies_in_memory_as_its_reader_wants_it(
    model: Callable[[], nn.Module], order: list[int] | None
):
    assert op_of(edit(model())).kwargs["out_order"] == order


def test_the_result_is_cast_by_the_op():
    class Widened(PerHead):
        def forward(self, x: Tensor) -> Any:
            return self.heads(split(x)).float().flatten(2)

    graph = edit(Widened().bfloat16(), torch.randn(2, 6, H * d, dtype=torch.bfloat16))
    assert op_of(graph).kwargs["out_dtype"] is torch.float32
    assert "float" not in names(graph)


def test_scales_become_arguments():
    class Scaled(PerHead):
        def heads(self, q: Tensor) -> Tensor:
            hidden = F.silu(torch.einsum("blhd,hdf->blhf", q, self.gate) * 0.5)
            hidden = hidden * torch.einsum("blhd,hdf->blhf", q, self.up) * 3
            return torch.einsum("blhf,hfd->blhd", hidden, self.down) / 4

    graph = edit(Scaled())
    scales = [op_of(graph).kwargs[name] for name in ("k_scale", "u_scale", "out_scale")]
    assert scales[0] == 0.5
    assert scales[1] * scales[2] == 0.75
    assert set(names(graph)) <= VIEWS | {"multi_head_ffn.default"}


class TwoReaders(PerHead):
    def forward(self, x: Tensor) -> Any:
        out = self.heads(split(x))
        return out.sin(), out.cos()


def test_all_readers_read_the_op():
    graph = edit(TwoReaders())
    assert {"sin", "cos"} <= set(names(graph))
    assert names(graph).count("multi_head_ffn.default") == 1


class HeadsKept(ListOfHeads):
    """Heads that are kept one by one, in addition to what they are merged into."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Any:
        outs = [head(q) for head, q in zip(self.heads, split(x).unbind(2), strict=True)]
        return torch.cat(outs, self.dim), outs


@pytest.mark.parametrize("dim", [-1, 0])
def test_heads_that_are_kept_are_cut_out_of_the_result(dim: int):
    """Into memory of their own: what overwrites one of the results leaves the others alone."""
    model, x = HeadsKept(dim), torch.randn(2, 6, H * d)
    graph = edit(model, x)
    assert set(names(graph)) <= VIEWS | {"stack", "multi_head_ffn.default", "clone"}
    assert names(graph).count("multi_head_ffn.default") == 1
    options = {"rewrite": "always", "fallback": "eager"}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    results = [[merged, *outs] for merged, outs in (model(x), compiled(x))]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()
    assert len({found.untyped_storage().data_ptr() for found in results[1]}) == 1 + H


class Chained(nn.Module):
    """The second network reads what the first computes, with nothing in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PerHead(), PerHead()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_one_op_feeds_the_other() -> None:
    graph = edit(Chained())
    first, second = (node for node in graph.nodes if node.target is OP)
    assert any(node is first for node in between(second))
    assert set(names(graph)) <= VIEWS | {"multi_head_ffn.default"}


class BufferAccumulated(Accumulated):
    """The buffer that the sub-networks are added to is the output itself."""

    def forward(self, x: Tensor) -> Tensor:
        q = split(x).transpose(1, 2)
        out = torch.zeros_like(q)
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            out += (F.silu(q @ gate) * (q @ up)) @ down
        return out


class BufferFilled(PerHead):
    """The buffer that the heads are written to is the output itself."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for h in range(4):
            part = slice(h * 8, (h + 1) * 8)
            q = x[..., part]
            hidden = F.silu(q @ self.gate[h]) * (q @ self.up[h])
            out[..., part] = hidden @ self.down[h]
        return out


@pytest.mark.parametrize("model", [BufferAccumulated, BufferFilled])
def test_a_buffer_that_is_the_output_takes_its_loop_along(model: type[nn.Module]) -> None:
    assert set(names(edit(model()))) <= VIEWS | {"multi_head_ffn.default"}


# What stays, although nobody reads it in the forward pass.


class HookElsewhere(PerHead):
    """A hook on a layer that has nothing to do with the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(H * d, H * d)

    def forward(self, x: Tensor) -> Any:
        z = self.last(self.heads(split(x)).flatten(2))
        out = z.tanh()
        z.register_hook(lambda gradient: gradient * 0)
        return out


class WriteForTheBackwardPass(HookElsewhere):
    def forward(self, x: Tensor) -> Any:
        z = self.last(self.heads(split(x)).flatten(2))
        out = z * z
        z.data.zero_()
        return out


@pytest.mark.parametrize("kind", [HookElsewhere, WriteForTheBackwardPass])
def test_what_only_the_backward_pass_sees_stays(kind: type[nn.Module]):
    model, x = kind(), torch.randn(2, 6, H * d)
    options = {"rewrite": "always", "strict": True, "fallback": "aot_eager"}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    gradients = []
    for call in (model, compiled):
        model.zero_grad()
        call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert torch._dynamo.utils.counters["flashmhf"]["sites_rewritten"] == 1
    assert all(not g.any() for g in gradients[0][:3])  # of the heads
    for eager, rewritten in zip(*gradients, strict=True):
        torch.testing.assert_close(rewritten, eager)


# What is not computed twice.


class ProjectedAndReadAgain(PerHead):
    """Of a linear layer only a view of its product is held."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(H * d, H * d, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = self.inputs(x)
        return self.heads(split(y)).flatten(2) + y


def test_a_projection_that_others_read_is_not_computed_again():
    called = names(edit(ProjectedAndReadAgain()))
    assert called.count("linear") == 1
    assert not any("mm" in name for name in called)


class Dropped(PerHead):
    """Random numbers right before the heads, in an operation of which only a view is held."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(H * d, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.heads(split(y)).flatten(2)


def test_random_numbers_are_not_drawn_again():
    model, x = Dropped(), torch.randn(2, 6, H * d)
    options = {"rewrite": "always", "strict": True, "fallback": "aot_eager"}
    compiled = torch.compile(model, backend="flashmhf", options=options)
    results = []
    for call in (model, compiled):
        torch.manual_seed(0)
        results.append(call(x))
    torch.testing.assert_close(*results)


class OfPart(PerHead):
    """The network of a part of the tokens, with heads outermost in memory as the product has it."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        return self.heads(split(self.part(x)))


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, x.shape[0] :],
        lambda x: x[:, : -x.shape[0]],
        lambda x: x[:, x.shape[1] // 2 :],
        lambda x: x[:1, 1:],
        lambda x: x[:1, x.shape[0] :],
        lambda x: x[:, : max(x.shape[1] - 2, 1)],
    ],
)
def test_the_result_for_a_part_that_may_be_empty_is_no_copy(part: Callable[[Tensor], Tensor]):
    """PyTorch writes the strides of such a result with ``Max(1, size)``."""
    model, x = OfPart(part), torch.randn(2, 6, H * d)
    options = {"rewrite": "always", "strict": True, "fallback": "aot_eager"}
    report = mhf_compiler.explain(model, options=options, dynamic=True)(x)
    assert len(report.rewritten) == 1
    assert "contiguous" not in report.graph_after
    compiled = torch.compile(model, backend="flashmhf", options=options, dynamic=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled(x).stride() == model(x).stride()
