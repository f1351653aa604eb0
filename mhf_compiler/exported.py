"""``rewrite``: an exported program with the op in place of its MH-FFNs.

An exported program is a graph of ATen operations with a signature: which inputs are parameters and
buffers, which outputs are their new values. The graph is edited as one of Dynamo's is; what this
module adds is what Dynamo's graphs say and exported ones do not, such as which inputs may share
memory, and what an exported program has around its graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
)

from .compat import (
    ExportedInput,
    HigherOrderOperator,
    counters,
    exported_input,
    set_exported_input,
    storage_identity,
    tree_leaves,
)
from .errors import fault, only_reporting
from .options import GivenOptions, Options, chosen, parse_options
from .patterns import Modes, Reason, Site, Unreadable
from .report import GraphReport, Report
from .report.context import context_of
from .report.describe import unread_graph
from .substitution.graph import rewrite_graph
from .substitution.judge import workload_of

_GIVEN = "given"  # the memory of what the caller passes, of which nothing is known


def rewrite(
    exported_program: ExportedProgram,
    *,
    options: GivenOptions | None = None,
    report: Report | None = None,
    package: bool = False,
) -> ExportedProgram:
    """Put the op in place of every MH-FFN of an exported program.

    What comes back is an exported program like any other: it can be saved, loaded, decomposed,
    trained and compiled. Where it is loaded, ``import mhf_compiler`` defines the op.

        program = torch.export.export(model, args)
        program = mhf_compiler.rewrite(program)
        torch.export.save(program, "model.pt2")

    Inputs, outputs, parameters, buffers, constants, the ranges of dynamic sizes and the structure
    of arguments and results are those of the given program. The tensors are the same ones. To see
    what was rewritten, and why the rest was not, pass a report:

        report = mhf_compiler.Report()
        program = mhf_compiler.rewrite(program, report=report)
        print(report)

    The result may be trained, whatever is estimated here: a network is rewritten only if its
    gradients are right, too. Under ``rewrite="auto"`` the cost of a training step decides if
    gradients are enabled where this is called, and otherwise, as under ``torch.no_grad()``, that
    of inference. A package of AOTInductor's for a GPU has other kernels than Python launches, and
    is for inference: with ``package=True`` its cost decides, and the report names its kernels.

    Args:
        exported_program: from ``torch.export.export`` or ``torch.export.load``, decomposed or not.
            It is not changed.
        options: those of ``torch.compile(model, backend="flashmhf", options=...)``, a dict or
            ``Options``. ``fallback`` and Inductor's settings are not used, since nothing is
            compiled here; ``max_autotune`` tunes the op's kernels.
        report: receives one more graph: what was rewritten, and what was declined.
        package: whether the result is for ``torch._inductor.aoti_compile_and_package``. It can be
            run in Python and packaged either way.

    Returns:
        The rewritten program, or the given one if nothing is rewritten.

    Raises:
        TypeError: ``exported_program`` or ``report`` is something else.
        OptionError: an unknown option, or a value it does not take.
        NotAnalysedError: under ``strict``, a graph could not be analysed.
        Exception: under ``strict``, whatever has failed; by default it is warned of, and the given
            program comes back.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise TypeError(
            f"exported_program is a {type(exported_program).__name__}, must be a "
            "torch.export.ExportedProgram, as torch.export.export(model, args) returns it"
        )
    if report is not None and not isinstance(report, Report):
        raise TypeError(
            f"report is a {type(report).__name__}, must be a mhf_compiler.Report or None"
        )
    parsed = parse_options(None, options)
    training = torch.is_grad_enabled() and not package
    if report is not None and report.context is None:
        report.context = context_of(exported_program, options=chosen(parsed))
    try:
        gm = _copied(exported_program.graph_module)
        _describe_inputs(gm, exported_program)
    except Exception as error:
        message = "the program cannot be copied, the given one is returned"
        fault("rewrite", message, error, strict=parsed.strict)
        if report is not None:
            before = exported_program.graph_module.print_readable(print_output=False)
            found = GraphReport(before=before, after=before)
            _nothing_rewritten(found, error)
            report.graphs.append(found)
        return exported_program
    counted = counters["flashmhf"].copy()
    sites: list[Site] = []
    with _fixed_modes():
        found = rewrite_graph(
            gm,
            parsed,
            lambda _, site: sites.append(site),
            training=training,
            packaged=package,
        )
        _forget_inputs(gm)
    if not package:
        _tell_of_packages(found, sites, parsed)
    if report is not None:
        report.graphs.append(found)
    if not found.rewritten:
        _dump(found, gm, parsed)
        return exported_program
    try:
        rewritten = _with_graph(exported_program, gm, found)
    except Exception as error:
        counters["flashmhf"] = counted
        _nothing_rewritten(found, error)
        message = "the rewritten program is not valid, the given one is returned"
        fault("rewrite", message, error, strict=parsed.strict)
        return exported_program
    _dump(found, gm, parsed)
    return rewritten


@contextmanager
def _fixed_modes() -> Iterator[None]:
    """The modes that a program is analysed in: it may be trained, and its graph sets autocast."""
    modes = Modes(grad=True, autocast=(None, None), inference=False)
    with torch.inference_mode(False), modes.entered():
        yield


def _tell_of_packages(report: GraphReport, sites: Sequence[Site], options: Options) -> None:
    """Add to each network what a package of AOTInductor's has in its place."""
    with only_reporting("what a package has"):
        from .lowering.summary import packaged_as

        for i, (one, site) in enumerate(zip(report.rewritten, sites, strict=True)):
            in_package = packaged_as(workload_of(site, options, training=False))
            report.rewritten[i] = replace(one, lowered=(*one.lowered, *in_package))


def _nothing_rewritten(report: GraphReport, error: Exception) -> None:
    what = f"{type(error).__name__}: {error}"
    report.unread = [unread_graph(Reason(Unreadable.COMPILER_FAULT, what))]
    report.rewritten.clear()
    report.declined.clear()
    report.ordinary.clear()
    report.after = report.before


def _dump(report: GraphReport, gm: fx.GraphModule, options: Options) -> None:
    """Write the graph and its report to the folder that the user has named."""
    if options.dump_dir is None:
        return
    with only_reporting(f"the graph in {options.dump_dir}"):
        from .debug.dump import dump

        dump(report, gm, options.dump_dir)


# The graph to edit.


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph and those inside of it, over the same tensors.

    Left out is what strict export has kept of Dynamo's graph, which this is not. What others have
    attached to a module is not copied: after ``unflatten`` it is a module that cannot be.
    """
    modules = list(gm.modules())
    held = (value for module in modules for value in vars(module).values())
    shared: list[Any] = [x for x in held if isinstance(x, torch.Tensor)]
    shared += [*gm.parameters(), *gm.buffers()]
    shared += [value for module in modules for value in getattr(module, "meta", {}).values()]
    copied = copy.deepcopy(gm, {id(one): one for one in shared})
    for graph in _graphs(copied):
        for node in graph.nodes:
            node.meta.pop("example_value", None)
    return copied


def _graphs(gm: fx.GraphModule) -> list[fx.Graph]:
    return [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]


def _describe_inputs(gm: fx.GraphModule, program: ExportedProgram) -> None:
    """Attach to each input what the program knows of it.

    Its own tensors share memory if they do so now. Those that the caller passes may share it with
    each other: no guard will check it.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
        name = spec.target if spec.target is not None else node.name
        memory = _memory_of(program, spec)
        set_exported_input(node, ExportedInput(name, memory, spec.kind is InputKind.PARAMETER))
    _describe_inner_inputs(gm)


def _memory_of(program: ExportedProgram, spec: InputSpec) -> Any:
    stored: Any = None
    if spec.target is not None:
        stored = program.state_dict.get(spec.target, program.constants.get(spec.target))
    if isinstance(stored, torch.Tensor) and stored.layout is torch.strided:
        return storage_identity(stored)
    return _GIVEN


def _describe_inner_inputs(gm: fx.GraphModule) -> None:
    """The inputs of graphs inside: of their memory nothing is known."""
    for node in gm.graph.nodes:
        if not isinstance(node.target, HigherOrderOperator):
            continue
        children = [
            getattr(gm, str(argument.target), None)
            for argument in node.all_input_nodes
            if argument.op == "get_attr"
        ]
        for child in children:
            if isinstance(child, fx.GraphModule):
                _describe_inner(child, node)


def _describe_inner(child: fx.GraphModule, call: fx.Node) -> None:
    inputs = child.graph.find_nodes(op="placeholder")
    passed = [x for x in tree_leaves(list(call.args)) if isinstance(x, fx.Node)]
    passed = [x for x in passed if x.op != "get_attr"][-len(inputs) :] if inputs else []
    given = passed if len(passed) == len(inputs) else [None] * len(inputs)
    for node, argument in zip(inputs, given, strict=True):
        outer = None if argument is None else exported_input(argument)
        name = node.name if outer is None else outer.name
        set_exported_input(
            node, ExportedInput(name, _GIVEN, outer is not None and outer.is_parameter)
        )
    _describe_inner_inputs(child)


def _forget_inputs(gm: fx.GraphModule) -> None:
    for graph in _graphs(gm):
        for node in graph.find_nodes(op="placeholder"):
            set_exported_input(node, None)


# The program around it.


def _with_graph(
    program: ExportedProgram, gm: fx.GraphModule, report: GraphReport
) -> ExportedProgram:
    """The program with another graph of the same inputs and outputs."""
    names = {node.name for node in gm.graph.nodes}
    calls = [_with_names(entry, names) for entry in program.module_call_graph]
    for was, now in zip(program.module_call_graph, calls, strict=True):
        if was.signature is not None and now.signature is None:
            report.notes.append(
                f"the calling convention of the module {was.fqn!r} is not kept: what it is given "
                "or returns is inside of a network that is rewritten"
            )
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=_signature(program.graph_signature, gm.graph),
        state_dict=program.state_dict,
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _with_names(entry: ModuleCallEntry, names: Set[str]) -> ModuleCallEntry:
    """How a module is called; without its signature if that names a node which is not there."""
    if entry.signature is None:
        return replace(entry)
    inputs, outputs = (
        map(copy.copy, entry.signature.inputs),
        map(copy.copy, entry.signature.outputs),
    )
    signature = replace(entry.signature, inputs=[*inputs], outputs=[*outputs])
    named = [argument.name for argument in (*signature.inputs, *signature.outputs)]
    known = all(not name or name in names for name in named)
    return replace(entry, signature=signature if known else None)


def _signature(given: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """The signature over the names that inputs and outputs have in another graph."""
    signature = copy.deepcopy(given)
    specs: list[Any] = [*signature.input_specs, *signature.output_specs]
    outputs: Any = graph.output_node().args[0]
    nodes = [*graph.find_nodes(op="placeholder"), *outputs]
    for spec, node in zip(specs, nodes, strict=True):
        if isinstance(node, fx.Node):  # and no constant
            spec.arg.name = node.name
    return signature
