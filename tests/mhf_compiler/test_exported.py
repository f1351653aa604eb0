"""``rewrite``: exported programs in, exported programs out, with the op in them."""

from __future__ import annotations

import copy
import io
import operator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.harness import assert_close, step
from models.networks import FFNS, LENGTH, Tower, tokens
from support.forks import run_code, run_script
from support.networks import Heads, MultiHeadFFN
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, unflatten

import mhf_compiler
from mhf_compiler import (
    DeclineKind,
    MhfCompilerWarning,
    NotAnalysedError,
    OptionError,
    Report,
    exported,
)
from mhf_compiler.compat import FakeTensor, counters
from mhf_compiler.lowering import summary
from mhf_compiler.lowering.device import find_card
from mhf_compiler.patterns import Findings, Reason, Unreadable
from mhf_compiler.substitution import graph as substitution

ALWAYS = {"rewrite": "always", "strict": True}
NAMES = ("loop", "packed")
OP = torch.ops.mhf_compiler.multi_head_ffn.default
ROUNDED = 5e-2  # two bfloat16 results
SAVES_VMAP = torch.__version__ >= (2, 13)  # in an exported program

strict = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
forms = pytest.mark.parametrize(
    ("strict", "decomposed"), [(False, True), (True, False)], ids=["core ATen", "strict"]
)


def rewritten(
    program: ExportedProgram, sites: int = 1, **options: Any
) -> tuple[ExportedProgram, Report]:
    report = Report()
    result = mhf_compiler.rewrite(program, options=ALWAYS | options, report=report)
    assert len(report.rewritten) == sites, report
    assert number_of_ops(result) == sites
    result.validate()
    return result, report


def number_of_ops(program: ExportedProgram) -> int:
    graphs = [
        gm.graph for gm in program.graph_module.modules() if isinstance(gm, torch.fx.GraphModule)
    ]
    return sum(len(graph.find_nodes(op="call_function", target=OP)) for graph in graphs)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    memory = io.BytesIO()
    torch.export.save(program, memory)
    memory.seek(0)
    return torch.export.load(memory)


def result_and_effects(program: ExportedProgram, *args: Any) -> Any:
    """What a program returns, and what it leaves in its arguments and buffers."""
    module, args = program.module(), copy.deepcopy(args)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        result = module(*args)
        after = {name: buffer.clone() for name, buffer in module.named_buffers()}
        module.load_state_dict(before, strict=False)
    return result, args, after


def assert_same(program: ExportedProgram, other: ExportedProgram, *args: Any, **how: Any) -> None:
    expected = result_and_effects(program, *args)
    torch.testing.assert_close(result_and_effects(other, *args), expected, **how)


class Two(nn.Module):
    """Two networks with something in between; sub-classes say what."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Heads(), Heads()

    def forward(self, x: Tensor) -> Any:
        return self.second(x + self.first(x))


def x(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 32)


# What is kept.


@forms
def test_a_tower(strict: bool, decomposed: bool):
    """In either form the result is a program that can be run, saved, loaded and decomposed."""
    model, given = Tower(1, NAMES).double().eval(), tokens()
    program = export(model, (given,), strict=strict)
    program = program.run_decompositions() if decomposed else program
    result, _ = rewritten(program, 2)
    for form in (result, saved_and_loaded(result), result.run_decompositions()):
        assert number_of_ops(form) == 2
        assert_same(program, form, given)


@pytest.mark.parametrize("name", FFNS)
def test_every_spelling(name: str):
    if name == "vmap" and not SAVES_VMAP:
        pytest.skip("PyTorch does not save it")
    model, given = Tower(1, [name]).double().eval(), tokens()
    program = export(model, (given,), strict=name == "vmap")
    assert_same(program, saved_and_loaded(rewritten(program)[0]), given)


def test_a_program_that_was_loaded():
    model, given = Tower(1, NAMES).double().eval(), tokens()
    program = saved_and_loaded(export(model, (given,)))
    assert_same(program, rewritten(program, 2)[0], given)


@pytest.mark.parametrize(
    ("strict", "decomposed", "name"),
    [(False, True, "loop"), (True, False, "packed")],
    ids=["core ATen", "strict"],
)
def test_dynamic_shapes(strict: bool, decomposed: bool, name: str):
    model = Tower(1, [name]).double().eval()
    shapes = {"x": {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=64)}}
    program = export(model, (tokens(),), dynamic_shapes=shapes, strict=strict)
    program = program.run_decompositions() if decomposed else program
    guards = list(program._guards_code)
    result, _ = rewritten(program)
    loaded = saved_and_loaded(result)
    assert result.range_constraints == program.range_constraints
    assert result._guards_code == guards
    for batch, length in [(2, LENGTH), (3, LENGTH + 4)]:
        assert_same(program, result, tokens(batch, length))
        assert_same(program, loaded, tokens(batch, length))
    with pytest.raises(Exception, match=r"Guard failed: x\.size\(\)\[0\] <= 64"):
        result.module()(tokens(65, LENGTH))


class SecondHalf(nn.Module):
    """A network of the later tokens: where they begin is a quotient of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Heads()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[:, x.shape[1] // 2 :])


@strict
def test_a_part_of_a_dynamic_number_of_tokens(strict: bool):
    program = export(SecondHalf(), (x(),), dynamic_shapes={"x": {1: Dim.AUTO}}, strict=strict)
    result, _ = rewritten(program)
    loaded = saved_and_loaded(result)
    for length in (5, 8, 13):
        assert_same(program, result, x(2, length))
        assert_same(program, loaded, x(2, length))


@strict
def test_it_is_trained(strict: bool):
    """The parameters are those of the model, so gradients arrive there."""
    model, given = Tower(1, NAMES).double(), tokens()
    module = rewritten(export(model, (given,), strict=strict), 2)[0].module()
    found = dict(sorted(step(module, model, (given,)).items()))
    assert_close(found, dict(sorted(step(model, model, (given,)).items())))


def test_it_is_compiled():
    """By any back end: there is nothing left to find."""
    program = export(Heads(), (x(),))
    result, _ = rewritten(program)
    compiled = torch.compile(result.module(), backend="aot_eager")
    given = x()
    torch.testing.assert_close(compiled(given), program.module()(given))


def test_all_nodes_are_atens_with_a_fake_tensor():
    """In the mode, and over the symbols, of the given program."""
    shapes = {"x": {0: Dim("batch", min=2), 1: Dim("length", min=2)}}
    program = export(Tower(1, NAMES), (tokens(dtype=torch.float32),), dynamic_shapes=shapes)
    result, _ = rewritten(program, 2)
    (mode,) = {
        id(node.meta["val"].fake_mode) for node in program.graph.find_nodes(op="placeholder")
    }
    symbols = set(program.range_constraints)
    before = {node.name for node in program.graph.nodes}
    inserted = [node for node in result.graph.nodes if node.name not in before]
    assert inserted
    for node in inserted:
        val = node.meta["val"]
        assert isinstance(node.target, torch._ops.OpOverload) or node.target is operator.mul
        assert node.meta["nn_module_stack"]
        if isinstance(val, FakeTensor):
            assert id(val.fake_mode) == mode
            assert not val.requires_grad
            sizes = [size for size in val.shape if isinstance(size, torch.SymInt)]
            assert symbols.issuperset(s for size in sizes for s in size.node.expr.free_symbols)
        else:
            assert isinstance(val, (int, torch.SymInt))


def test_the_given_program_stays_as_it_is():
    program = export(Two(), (x(),))
    code, signature = program.graph_module.code, copy.deepcopy(program.graph_signature)
    meta = [dict(node.meta) for node in program.graph.nodes]
    result, _ = rewritten(program, 2)
    assert program.graph_module.code == code
    assert program.graph_signature == signature
    assert [list(node.meta) for node in program.graph.nodes] == [list(known) for known in meta]
    program.validate()
    assert not any("flashmhf" in key for node in result.graph.nodes for key in node.meta)
    assert all(result.state_dict[name] is tensor for name, tensor in program.state_dict.items())


def test_the_signature_follows_a_renamed_output():
    """A network that is returned has another node, in whatever place."""

    class Several(Two):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            return {"y": y, "none": None, "x": x}, [self.second(y), 3]

    program = export(Several(), (x(),))
    result, _ = rewritten(program, 2)
    kinds = [(spec.kind, spec.target) for spec in program.graph_signature.output_specs]
    assert [(spec.kind, spec.target) for spec in result.graph_signature.output_specs] == kinds
    assert result.graph_signature.input_specs == program.graph_signature.input_specs
    assert result.call_spec == program.call_spec
    assert_same(program, saved_and_loaded(result), x())


def test_arguments_that_are_not_used():
    class Unused(Two):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.randn(3))
            self.register_buffer("constant", torch.ones(2), persistent=False)

        def forward(self, x: Tensor, y: Tensor, n: int) -> Any:
            return self.first(x), n, self.constant + 1

    args = x(), torch.randn(3), 7
    program = export(Unused(), args)
    assert_same(program, saved_and_loaded(rewritten(program)[0]), *args)


def test_tied_weights():
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.second.gate, self.second.down = self.first.gate, self.first.down

    program = export(Tied(), (x(),))
    result, _ = rewritten(program, 2)
    assert_same(program, result, x())
    assert result.state_dict["first.gate"] is result.state_dict["second.gate"]
    assert_same(program, saved_and_loaded(result), x())


# Memory. Nothing is known of the tensors that a caller will pass.


@pytest.mark.parametrize("loaded", [False, True])
def test_results_that_share_memory(loaded: bool):
    class Aliases(Two):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            return y, y.view(10, -1), y, x[0]

    program = export(Aliases(), (x(),))
    program = saved_and_loaded(program) if loaded else program
    result, _ = rewritten(program)
    whole, flat, again, _ = result.module()(x())
    whole.detach().zero_()
    assert not flat.any()
    assert not again.any()


def test_buffers_that_are_written():
    """Two of them share memory, which only the program's own tensors show."""

    class Counted(Two):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))
            self.register_buffer("part", self.count[:2])
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Any:
            part = self.part + 1
            self.count.add_(1)
            y = self.second(self.norm(x + self.first(x)))
            return y, part, self.part + 1

    program = export(Counted(), (x(),))
    result, _ = rewritten(program, 2)
    assert_same(program, result, x())


def test_buffers_that_are_written_in_core_aten():
    """There they are outputs."""

    class Counted(Two):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: Tensor) -> Any:
            self.count.add_(1)
            return super().forward(x), self.count + 1

    program = export(Counted(), (x(),)).run_decompositions()
    result, _ = rewritten(program, 2)
    assert result.graph_signature.buffers_to_mutate == program.graph_signature.buffers_to_mutate
    assert_same(program, saved_and_loaded(result), x())


class WritesBetween(nn.Module):
    """An argument is written in between, which is the query, or may share its memory."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.ffn, self.same = Heads(), same

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        hidden = F.silu(q @ self.ffn.gate) * (q @ self.ffn.up)
        (x if self.same else other).mul_(2)
        return (hidden @ self.ffn.down).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("same", [True, False])
def test_arguments_that_are_written_in_between(same: bool):
    program = export(WritesBetween(same), (x(), x()))
    report = Report()
    assert mhf_compiler.rewrite(program, options=ALWAYS, report=report) is program
    assert [site.reason.kind for site in report.declined if site.reason] == [DeclineKind.MUTATION]


@pytest.mark.parametrize("loaded", [False, True])
def test_what_a_region_returns_may_be_what_it_was_given(loaded: bool):
    class ViewedInRegion(WritesBetween):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            x = x + other
            with torch.autocast("cpu", torch.bfloat16):
                q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            hidden = F.silu(q @ self.ffn.gate) * (q @ self.ffn.up)
            x.mul_(2)
            return (hidden @ self.ffn.down).transpose(1, 2).flatten(2)

    program, report = export(ViewedInRegion(False), (x(), x())), Report()
    program = saved_and_loaded(program) if loaded else program
    assert mhf_compiler.rewrite(program, options=ALWAYS, report=report) is program
    kinds = [site.reason.kind for site in report.declined if site.reason]
    assert kinds == [DeclineKind.MUTATION]


def test_an_argument_that_is_written_where_no_network_reads():
    class Cached(Two):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            y = x * 2
            cache[:, :5].copy_(y)
            return self.second(self.first(y) + cache[:, :5])

    args = x(), torch.zeros(2, 9, 32)
    program = export(Cached(), args)
    assert_same(program, rewritten(program, 2)[0], *args)


# Regions.


class Autocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
        return self.second(x + y.float())


class AutocastInPlace(Two):
    """What a region returns is added to what it read, in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for part in (self.first, self.second):
            with torch.autocast("cpu", torch.bfloat16):
                y = part(x)
            x += y
        return x


class NoGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
        return self.second(x + y)


class Branches(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.first.forward, self.second.forward, (x,))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("model", [Autocast, AutocastInPlace, NoGrad, Branches])
def test_inner_graphs(model: type[nn.Module], loaded: bool):
    """Each is read under its own modes. What is passed may share memory with what is returned."""
    program = export(model(), (x(),))
    program = saved_and_loaded(program) if loaded else program
    result, _ = rewritten(program, 2)
    assert_same(program, saved_and_loaded(result), x(), atol=ROUNDED, rtol=ROUNDED)


def test_a_network_in_bfloat16_is_one_in_the_signature_too():
    class Whole(Two):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.first(x)

    result, _ = rewritten(export(Whole(), (x(),)))
    (output,) = result.graph.output_node().args[0]
    assert output.meta["val"].dtype is torch.bfloat16
    assert result.module()(x()).dtype is torch.bfloat16


class HalfWithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = Heads()

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        with torch.no_grad():
            hidden = F.silu(q @ self.ffn.gate) * (q @ self.ffn.up)
        return (hidden @ self.ffn.down).transpose(1, 2).flatten(2)


class WritesAfterwards(nn.Module):
    """What the backward pass reads again is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = Heads()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.ffn(x)
        x.mul_(2)
        return y


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", [HalfWithoutGradients, WritesAfterwards])
def test_gradients_matter_wherever_it_is_made(model: type[nn.Module], around: Any):
    """The result may be trained."""
    program = export(model(), (x(),))
    with around():
        assert mhf_compiler.rewrite(program, options=ALWAYS) is program


def test_the_callers_autocast_does_not_matter():
    program = export(Heads(), (x(),))
    with torch.autocast("cpu", torch.bfloat16):
        result, report = rewritten(program)
        assert torch.is_autocast_enabled("cpu")
    assert {argument.dtype for argument in report.rewritten[0].arguments} == {"float32"}
    assert_same(program, result, x())


# Modules that keep their calling convention.


def test_a_module_with_a_signature_of_its_own():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.ffn = nn.LayerNorm(32), Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(self.norm(x) * 2) * 3

    program = export(Scaled(), (x(),), preserve_module_call_signature=("norm", "ffn"))
    result, report = rewritten(program, 2)
    kept = {entry.fqn for entry in result.module_call_graph if entry.signature is not None}
    assert "norm" in kept
    assert "ffn" not in kept
    assert [note for note in report.graphs[0].notes if "'ffn'" in note]
    assert all(entry.signature for entry in program.module_call_graph if entry.fqn == "ffn")
    given = x()
    torch.testing.assert_close(unflatten(result)(given), program.module()(given))


def test_a_program_that_was_unflattened():
    """PyTorch attaches to it a module that cannot be copied."""
    program = export(Heads(), (x(),))
    unflatten(program)
    result, _ = rewritten(program)
    assert_same(program, result, x())


# What is not rewritten, and what is wrong.


def test_nothing_to_rewrite():
    program = export(nn.Linear(32, 32), (x(),))
    report = Report()
    assert mhf_compiler.rewrite(program, options=ALWAYS, report=report) is program
    assert (report.rewritten, report.declined) == ([], [])


def test_twice_is_once():
    result, _ = rewritten(export(Heads(), (x(),)))
    assert mhf_compiler.rewrite(result, options=ALWAYS) is result


@pytest.mark.parametrize("loaded", [False, True])
def test_a_region_inside_of_vmap_is_left_alone(loaded: bool):
    """Its graph shows tensors with one dimension less than they have."""

    class Mapped(Two):
        def one(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.first(x[None])[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.one)(x)

    if loaded and not SAVES_VMAP:
        pytest.skip("PyTorch does not save it")
    program, report = export(Mapped(), (x(),)), Report()
    program = saved_and_loaded(program) if loaded else program
    options = {"rewrite": "always"}
    with pytest.warns(MhfCompilerWarning, match=r"inside of torch\.vmap"):
        assert mhf_compiler.rewrite(program, options=options, report=report) is program
    assert [unread.reason.kind for unread in report.unread] == [Unreadable.INSIDE_VMAP]


def test_a_near_miss_is_reported():
    class Shifted(Heads):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            hidden = F.mish(q @ self.gate) * (q @ self.up)
            return (hidden @ self.down).transpose(1, 2).flatten(2)

    report = Report()
    program = export(Shifted(), (x(),))
    assert mhf_compiler.rewrite(program, options=ALWAYS, report=report) is program
    (site,) = report.declined
    assert site.reason is not None
    assert site.reason.kind is DeclineKind.UNKNOWN_ACTIVATION
    assert site.location is not None
    assert site.location.file == __file__


def test_the_report_says_of_each_network_what_a_package_has(monkeypatch: pytest.MonkeyPatch):
    """Of one on a GPU; on the CPU a package calls the op."""
    program = export(Two().eval(), (x(),))
    _, report = rewritten(program, 2)
    assert not any("package" in said for site in report.rewritten for said in site.lowered)
    monkeypatch.setattr(summary, "packaged_as", lambda workload: (f"{workload.sizes.heads} heads",))
    _, report = rewritten(program, 2)
    assert [site.lowered[-1] for site in report.rewritten] == ["4 heads"] * 2


def test_a_program_for_a_package_is_judged_by_what_the_package_has(
    monkeypatch: pytest.MonkeyPatch,
):
    """Plain Triton's kernel, which takes longer than Hopper's, and no backward pass."""
    on_a_card = partial(substitution.rewrite_graph, card=find_card("cuda:h100"))
    monkeypatch.setattr(exported, "rewrite_graph", on_a_card)
    model = MultiHeadFFN(4, 64, 3, 96).eval().bfloat16()
    program = export(model, (torch.randn(2, 4096, 4 * 64).bfloat16(),))
    report = Report()
    for package in (False, True):
        with torch.no_grad():
            mhf_compiler.rewrite(program, options=ALWAYS, report=report, package=package)
    python, packaged = (graph.rewritten[0] for graph in report.graphs)
    assert python.lowered[1].startswith("forward kernel for Hopper")
    kernel = "in a package of AOTInductor's: plain Triton's kernel, 128 tokens x 64 hidden units"
    assert packaged.lowered[1] == f"{kernel} in place of Hopper's"
    assert packaged.work.rewritten > python.work.rewritten
    assert packaged.work.original == python.work.original


def test_a_report_collects_programs():
    report = Report()
    for model in (Heads(), Two(), nn.Linear(32, 32)):
        mhf_compiler.rewrite(export(model, (x(),)), options=ALWAYS, report=report)
    assert [len(graph.rewritten) for graph in report.graphs] == [1, 2, 0]
    names = [argument.name for argument in report.graphs[0].rewritten[0].arguments]
    assert names == ["x", "gate", "up", "down"]


@pytest.mark.parametrize("given", ["never", "always"])
def test_the_option_rewrite(given: str):
    program = export(Heads(), (x(),))
    assert (mhf_compiler.rewrite(program, options={"rewrite": given}) is program) == (
        given == "never"
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_cost_is_that_of_what_is_enabled(training: bool):
    program = export(Heads(), (x(),))
    with torch.set_grad_enabled(training):
        _, report = rewritten(program)
    assert ("backward" in " ".join(report.rewritten[0].lowered)) == training


def test_the_option_verify():
    rewritten(export(Tower(1, NAMES), (tokens(dtype=torch.float32),)), 2, verify=True)


def test_the_option_dump_dir(tmp_path: Path):
    rewritten(export(Heads(), (x(),)), dump_dir=tmp_path)
    done = run_script(tmp_path / "graph_0" / "compare.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Heads(), "exported_program is a Heads, must be a torch.export.ExportedProgram"),
        (None, "exported_program is a NoneType"),
    ],
)
def test_something_else_than_a_program(given: Any, message: str):
    with pytest.raises(TypeError, match=message):
        mhf_compiler.rewrite(given)


def test_something_else_than_a_report():
    with pytest.raises(
        TypeError, match=r"report is a list, must be a mhf_compiler\.Report or None"
    ):
        mhf_compiler.rewrite(export(Heads(), (x(),)), report=[])  # type: ignore[arg-type]


def test_an_unknown_option():
    with pytest.raises(OptionError, match="rewrit"):
        mhf_compiler.rewrite(export(Heads(), (x(),)), options={"rewrit": "always"})


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize("part", ["find_sites", "spell_in_aten", "guard.check"])
def test_a_failure_gives_the_program_back(part: str, monkeypatch: pytest.MonkeyPatch):
    owner, _, name = part.rpartition(".")
    monkeypatch.setattr(getattr(substitution, owner) if owner else substitution, name, _broken)
    _gives_back(export(Heads(), (x(),)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_that_cannot_be_copied(strict: bool):
    class Uncopied:
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("broken")

    program = export(Heads(), (x(),))
    program.graph_module.uncopied = Uncopied()
    if strict:
        with pytest.raises(RuntimeError, match="broken"):
            mhf_compiler.rewrite(program, options=ALWAYS)
    else:
        _gives_back(program)


def test_an_invalid_result_gives_the_program_back(monkeypatch: pytest.MonkeyPatch):
    program = export(Heads(), (x(),))
    monkeypatch.setattr(substitution, "spell_in_aten", lambda *arguments: None)
    _gives_back(program, "SpecViolationError")


def _gives_back(program: ExportedProgram, message: str = "broken") -> None:
    report = Report()
    with pytest.warns(MhfCompilerWarning, match=message):
        result = mhf_compiler.rewrite(program, options={"rewrite": "always"}, report=report)
    assert result is program
    assert (len(report.rewritten), len(report.unread)) == (0, 1)
    assert counters["flashmhf"]["failures.rewrite"] == 1
    assert counters["flashmhf"]["sites_rewritten"] == 0
    with pytest.raises(Exception, match=r"broken|is missing val field"):
        mhf_compiler.rewrite(program, options=ALWAYS)


def test_a_graph_that_is_not_analysed(monkeypatch: pytest.MonkeyPatch):
    unread = Findings(unreadable=Reason(Unreadable.REPLACED_TENSOR))
    monkeypatch.setattr(substitution, "find_sites", lambda *arguments: unread)
    program = export(Heads(), (x(),))
    with pytest.raises(NotAnalysedError):
        mhf_compiler.rewrite(program, options=ALWAYS)
    with pytest.warns(MhfCompilerWarning, match="not analysed"):
        assert mhf_compiler.rewrite(program, options={"rewrite": "always"}) is program


# Another process.


def test_the_import_is_all_that_a_saved_program_needs(tmp_path: Path):
    """Neither the kernels for a GPU nor the recogniser are loaded for it."""
    model, given = Heads(), x()
    torch.export.save(rewritten(export(model, (given,)))[0], tmp_path / "program.pt2")
    torch.save((given, model(given)), tmp_path / "expected.pt")
    code = f"""
import sys
import torch
import mhf_compiler
program = torch.export.load({str(tmp_path / "program.pt2")!r})
given, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert "mhf_compiler.patterns" not in sys.modules
assert not [name for name in sys.modules if name.startswith("mhf_compiler.lowering.kernels")]
torch.testing.assert_close(program.module()(given), expected)
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr


def test_a_package_runs_where_nothing_but_this_package_is_imported(tmp_path: Path):
    model, given = Heads().eval(), x()
    with torch.no_grad():
        result, _ = rewritten(export(model, (given,)))
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(result, package_path=package)
        torch.save((given, model(given)), tmp_path / "expected.pt")
    code = f"""
import torch
import mhf_compiler
given, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(torch._inductor.aoti_load_package({package!r})(given), expected)
"""
    done = run_code(code)
    assert done.returncode == 0, done.stderr
