"""One program, compiled and compared with itself.

``check`` captures the module with Dynamo, lets the back end rewrite the graph, and runs the result
without any further compiler: what differs from the plain module then is the rewriting. Outputs
and the gradients of every parameter and input are compared.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from mhf_compiler import NotAnalysedError, Report
from mhf_compiler.debug.accuracy import seed_generators
from mhf_compiler.options import parse_options
from mhf_compiler.patterns import Kind, Unreadable
from mhf_compiler.substitution.graph import rewrite_graph

from .programs import Program

_OPTIONS = parse_options(
    None, {"rewrite": "always", "strict": True, "verify": True, "fallback": "eager"}
)
#: what results may be off by relative to the largest, by the lowest precision they go through
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}

#: modes that a program is called under, by name
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}


def _is_cast(program: Program) -> bool:
    """Whether autocast is on where the module runs. It leaves float64 as it is."""
    around, inside, _ = program.modes
    on = inside == "autocast" or (around == "autocast" and inside != "no autocast")
    return on and program.dtype is not torch.float64


def _multiplies(program: Program) -> bool:
    contractions = program.features.get("contractions", "")
    return "multiply" in contractions or "einsum of three" in contractions


def _has_variables(program: Program) -> bool:
    return program.features.get("symbol") == "gate" or "math." in program.source


def _has(feature: str, text: str) -> Callable[[Program], bool]:
    return lambda program: text in program.features.get(feature, "")


#: what is declined by design (docs/matching.md, docs/numerics.md): whether a program has it, and
#: the reasons that it may be declined for. Such a program counts as no miss.
BY_DESIGN: tuple[tuple[Callable[[Program], bool], tuple[Kind | Unreadable, ...]], ...] = (
    (_has("modes", "call > inference_mode"), (Kind.INFERENCE_REGION,)),
    # A graph that is called under inference_mode is not analysed.
    (lambda p: p.modes[1] == "inference_mode" and p.modes[2] != "", (Unreadable.SEVERAL_MODES,)),
    # Autocast leaves a product that is spelled by a multiplication in float32: a network is partly
    # in another precision, or as a whole, where autocast would change that of the op.
    (
        lambda p: _is_cast(p) and _multiplies(p),
        (Kind.MIXED_PRECISION, Kind.AUTOCAST_BOUNDARY),
    ),
    # In float64; those in float32 are read so.
    (_has("biases", "in other dtypes"), (Kind.MIXED_PRECISION,)),
    (_has("router dtype", "float64"), (Kind.MIXED_PRECISION,)),
    # An attribute, or math.pi, inside the network that Dynamo traces as a variable.
    (lambda p: p.all_dynamic and _has_variables(p), (Kind.VARYING_NUMBER,)),
    # The width of a head, or the number of heads, that is a symbol.
    (_has("kind", "symbols"), (Kind.UNSUPPORTED_PROBLEM,)),
)

Results = dict[str, Tensor]
_MEMORY = "shared memory"


class Verdict(Enum):
    """What became of a program."""

    FOUND = "found and rewritten"
    OTHER_SITE = "rewritten, but described otherwise"
    MISSED = "declined"
    UNSEEN = "neither found nor declined"
    WRONG = "wrong results"
    DYNAMO = "other results, but those of Dynamo alone"
    CRASHED = "the back end raised"
    BY_DESIGN = "declined by design"
    ORDINARY = "declined as an ordinary network, which it may be called"
    UNCAPTURED = "Dynamo does not capture it"
    INVALID = "does not run"
    MISWRITTEN = "is not what its reference computes"


@dataclass(frozen=True)
class Outcome:
    """A verdict with what explains it. Plain data: it travels between processes."""

    program: Program
    verdict: Verdict
    detail: str = ""
    reasons: tuple[str, ...] = ()  # the kinds of the typed reasons, without repetition
    explained: str = ""  # every declined candidate: its reason and its line of the source
    rewritten: int = 0


def check(program: Program) -> Outcome:
    """Whether a program is found, and computes the same when it is rewritten."""
    report = Report()
    outcome = _check_same(program, report)
    if outcome.verdict in (Verdict.MISSED, Verdict.UNSEEN, Verdict.FOUND):
        off = _off_reference(program)
        if off:
            return replace(outcome, verdict=Verdict.MISWRITTEN, detail=off)
    if program.ordinary and outcome.reasons == (Kind.PLAIN_FFN.name,):
        return replace(outcome, verdict=Verdict.ORDINARY)
    if outcome.verdict is Verdict.MISSED and _by_design(program, outcome):
        return replace(outcome, verdict=Verdict.BY_DESIGN)
    if outcome.verdict is Verdict.FOUND:
        difference = _site_difference(program, report)
        if difference:
            explained = bool(outcome.reasons) and _by_design(program, outcome)
            verdict = Verdict.BY_DESIGN if explained else Verdict.OTHER_SITE
            return replace(outcome, verdict=verdict, detail=difference)
    return outcome


def _by_design(program: Program, outcome: Outcome) -> bool:
    """Whether each reason is one that a feature of the program explains."""
    explained = {kind.name for has, kinds in BY_DESIGN if has(program) for kind in kinds}
    return set(outcome.reasons) <= explained


def check_same(program: Program) -> Outcome:
    """Whether a program computes the same when it is compiled, whatever is made of it."""
    return _check_same(program, Report())


def _check_same(program: Program, report: Report) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = program.build()
            used = copy.deepcopy(model)  # a step may change a buffer, or a counter
            plain = _step(program, used, _called(program, used))
        except Exception as error:
            # Even without a back end, PyTorch compiles the branches of torch.cond.
            alone = replace(program, modes=(*program.modes[:2], ""))
            blamed = program.modes[2] == "cond" and _runs(alone)
            verdict = Verdict.UNCAPTURED if blamed else Verdict.INVALID
            return Outcome(program, verdict, f"{type(error).__name__}: {error}")
        try:
            rewritten = copy.deepcopy(model)
            found = _step(program, rewritten, _compiled(program, rewritten, report))
        except Exception as error:
            runs = _without_us(program, model)
            blamed = Verdict.CRASHED if runs else Verdict.UNCAPTURED
            return _outcome(program, blamed, _raised(error), report)
        if not report.rewritten:
            seen = Verdict.MISSED if _reasons(report) else Verdict.UNSEEN
            return _outcome(program, seen, "", report)
        exact = plain if program.dtype is torch.float64 else _exact(program, model) or plain
        differs = _difference(program, plain, found, exact)
        verdict = Verdict.WRONG if differs else Verdict.FOUND
        if differs:
            for alone in _without_us(program, model):
                if not _difference(program, alone, found, exact):
                    verdict = Verdict.DYNAMO
        return _outcome(program, verdict, differs, report)


def _raised(error: BaseException) -> str:
    """The error below those of Dynamo, and where it was raised."""
    while error.__cause__ is not None or getattr(error, "inner_exception", None) is not None:
        error = error.__cause__ or error.inner_exception  # type: ignore[attr-defined]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def _outcome(program: Program, verdict: Verdict, detail: str, report: Report) -> Outcome:
    reasons = _reasons(report)
    lines = [
        f"{site.reason} | {site.location.code if site.location else 'unknown line'}"
        for site in (*report.declined, *report.ordinary)
    ]
    lines += [str(unread) for graph in report.graphs for unread in graph.unread]
    explained = "\n".join(dict.fromkeys(lines))
    return Outcome(program, verdict, detail, reasons, explained, len(report.rewritten))


def _reasons(report: Report) -> tuple[str, ...]:
    """The kinds of all reasons: of networks that are declined, and of graphs that are not read."""
    reasons = [site.reason for site in (*report.declined, *report.ordinary)]
    reasons += [unread.reason for graph in report.graphs for unread in graph.unread]
    return tuple(dict.fromkeys(reason.kind.name for reason in reasons if reason is not None))


def _exact(program: Program, model: nn.Module) -> Results | None:
    """The results in float64, where the program runs in it."""
    wider = replace(program, dtype=torch.float64)
    try:
        model = copy.deepcopy(model).double()
        return _step(wider, model, _called(program, model), program.arguments())
    except Exception:
        return None


def _compiled(program: Program, model: nn.Module, report: Report) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            report.graphs.append(rewrite_graph(gm, _OPTIONS))
        except NotAnalysedError:  # a property of the program
            report.graphs.append(rewrite_graph(gm, replace(_OPTIONS, strict=False)))
        return gm.forward

    torch.compiler.reset()
    return torch.compile(_called(program, model), backend=backend, dynamic=_dynamic(program))


def _dynamic(program: Program) -> bool | None:
    """The option of ``torch.compile``."""
    return True if program.all_dynamic else None if program.dynamic else False


def _called(program: Program, model: nn.Module) -> Callable[..., Any]:
    """The module under the modes that it is called under inside of the compiled code."""
    _, inside, how = program.modes
    if not inside and not how:
        return model

    def call(**arguments: Tensor) -> Any:
        with MODES[inside]():
            if how == "checkpoint":
                return checkpoint(model, use_reentrant=False, **arguments)
            if how == "cond":
                return _chosen(model, arguments)
            return model(**arguments)

    return call


def _chosen(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    """The module in both branches of a condition, which are alike but for a factor."""
    names = list(arguments)

    def scaled(factor: float) -> Callable[..., Tensor]:
        def branch(*values: Tensor) -> Tensor:
            result: Tensor = model(**dict(zip(names, values, strict=True)))
            return result.contiguous() * factor

        return branch

    condition = arguments["x"].sum() < 1e9
    chosen: Tensor = torch.cond(condition, scaled(0.5), scaled(2.0), tuple(arguments.values()))
    return chosen


def _runs(program: Program) -> bool:
    try:
        model = program.build()
        _step(program, model, _called(program, model))
    except Exception:
        return False
    return True


def _without_us(program: Program, model: nn.Module) -> list[Results]:
    """The results of Dynamo alone, as they are and with the strides that it promises.

    There are none where that fails.

    They differ from those of the plain module where Dynamo itself changes something, such as which
    random numbers a checkpoint draws. Its fake tensors promise other strides than eager gives where
    PyTorch's two implementations of an operation disagree, and Inductor returns what is promised.
    """
    promised: list[list[tuple[int, ...]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        outputs = gm.graph.output_node().args[0]
        if isinstance(outputs, tuple):
            fakes = [x.meta["example_value"] for x in outputs if isinstance(x, fx.Node)]
            strides = [x.stride() for x in fakes if isinstance(x, Tensor)]
            promised.append([tuple(map(int, stride)) for stride in strides])
        return gm.forward

    torch.compiler.reset()
    try:
        model = copy.deepcopy(model)
        call = _called(program, model)
        found = _step(
            program, model, torch.compile(call, backend=backend, dynamic=_dynamic(program))
        )
    except Exception:
        return []
    names = [name for name in found if name.startswith("result")]
    if len(promised) != 1 or len(promised[0]) != len(names):
        return [found]
    laid_out = {
        name: torch.empty_strided(found[name].shape, stride, dtype=found[name].dtype)
        for name, stride in zip(names, promised[0], strict=True)
    }
    return [found, found | {name: place.copy_(found[name]) for name, place in laid_out.items()}]


def _step(
    program: Program,
    model: nn.Module,
    call: Callable[..., Any],
    arguments: dict[str, Tensor] | None = None,
) -> Results:
    """One training or inference step: everything that can be seen of it."""
    arguments = arguments or program.arguments()
    for name, value in arguments.items():
        arguments[name] = value.to(program.dtype_of(name)).requires_grad_(program.training)
    for axis in program.dynamic:
        torch._dynamo.maybe_mark_dynamic(arguments["x"], program.inputs["x"].index(axis))
    model.zero_grad(set_to_none=True)
    seed_generators(program.seed)
    with torch.set_grad_enabled(program.training):
        with MODES[program.modes[0]]():
            returned = call(**arguments)
        results = list(returned) if isinstance(returned, tuple) else [returned]
        seed_generators(program.seed + 1)
        loss = torch.zeros((), dtype=torch.float64)
        for result in results:
            if result.requires_grad:
                weights = torch.randn(result.shape, dtype=torch.float64)
                loss = loss + (result.double() * weights).sum()
        if loss.requires_grad:
            loss.backward()
    seen = {f"result {i}": result for i, result in enumerate(results)}
    seen |= {f"argument {name}": x for name, x in arguments.items()}
    if program.training:
        seen |= {f"gradient of argument {name}": _gradient(x) for name, x in arguments.items()}
        seen |= {f"gradient of {name}": _gradient(p) for name, p in model.named_parameters()}
    seen |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    seen[_MEMORY] = _memory([*results, *arguments.values()])
    return {name: tensor.detach() for name, tensor in seen.items()}


def _memory(tensors: list[Tensor]) -> Tensor:
    """For each tensor the first one that it shares its storage with."""
    storages = [x.untyped_storage().data_ptr() or -at for at, x in enumerate(tensors, 1)]
    return torch.tensor([storages.index(storage) for storage in storages])


def _gradient(tensor: Tensor) -> Tensor:
    """No gradient is as good as one of zeros."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _difference(program: Program, plain: Results, found: Results, exact: Results) -> str:
    """What differs by more than rounding, as a sentence; "" where nothing does.

    Numbers that are not finite must be where eager has them. Of large finite numbers only those are
    asked for that eager has, too: it may overflow where the op does not. Gradients at an infinity
    or a NaN follow no rule.
    """
    if list(found) != list(plain):
        return f"other results: {list(found)}, not {list(plain)}"
    if not torch.equal(found[_MEMORY], plain[_MEMORY]):
        return f"memory is shared as in {found[_MEMORY].tolist()}, not {plain[_MEMORY].tolist()}"
    finite = all(x.isfinite().all() for name, x in plain.items() if name.startswith("argument"))
    largest = max(
        (_scale(x) for name, x in exact.items() if name.startswith("gradient")), default=0
    )
    for name, expected in plain.items():
        gradient = name.startswith("gradient")
        if name == _MEMORY or (gradient and not finite):
            continue
        got = found[name]
        if _form(got, name) != _form(expected, name):
            return f"{name} is {_form(got, name)}, not {_form(expected, name)}"
        known = expected.isfinite()
        if "large" not in program.values and not torch.equal(got.isfinite(), known):
            return f"{name} is finite elsewhere"
        if not got[known].isfinite().all():
            return f"{name} is not finite where it was"
        known &= exact[name].isfinite()
        got, expected, wide = (x[known].double() for x in (got, expected, exact[name]))
        if not expected.numel():
            continue
        scale = _scale(wide)
        if gradient:  # one that cancels to zero leaves what the others round
            scale = max(scale, largest)
        own = float((expected - wide).abs().max())
        off = float((got - expected).abs().max())
        if not off <= _tolerance(program) * scale + 4 * own:
            return f"{name} is off by {off:.3g}, of {scale:.3g}"
    return ""


def _tolerance(program: Program) -> float:
    return _TOLERANCE[torch.bfloat16 if _is_cast(program) else program.precision]


def _scale(tensor: Tensor) -> float:
    """The largest of its numbers that are finite."""
    numbers = tensor[tensor.isfinite()]
    return float(numbers.abs().max()) + 1e-3 if numbers.numel() else 0.0


def _form(tensor: Tensor, name: str) -> str:
    form = f"{tensor.dtype} of {tuple(tensor.shape)}"
    if not name.startswith("result") or not tensor.numel():
        return form
    strides = [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return f"{form} with strides {strides}"


def _off_reference(program: Program) -> str:
    """How a program differs from its reference, in float64; "" where it does not.

    Both start from weights and inputs that no narrower dtype has rounded, which a router may have
    amplified. What the source itself casts is rounded to float32 at most.
    """
    program = replace(program, values="", dtype=torch.float64)
    model = program.build()
    arguments = program.arguments()
    with torch.no_grad():
        expected = program.reference(model, arguments)
        result = model(**arguments)  # which may overwrite them
        result = result[0] if isinstance(result, tuple) else result
    off = float((result.double() - expected).abs().max())
    scale = float(expected.abs().max()) + 1e-3
    allowed = min(_TOLERANCE[program.precision], _TOLERANCE[torch.float32])
    if result.shape != expected.shape or not off <= allowed * scale:
        return f"off by {off:.3g}, of {scale:.3g}"
    return ""


def _site_difference(program: Program, report: Report) -> str:
    """How the sites differ from the expected one; "" where they do not.

    Sub-networks without a router are also one network with more hidden units, and heads that share
    a network are also tokens.
    """
    branches = 2 if program.modes[2] == "cond" else 1
    if len(report.rewritten) != branches:
        return f"{len(report.rewritten)} sites"
    site, expected = report.rewritten[0], dict(program.site)
    found = {name: getattr(site, name) for name in expected}
    if not expected["routed"]:
        for fields in (found, expected):
            fields["hidden"] *= fields.pop("sub_networks")
    if expected["groups"] == found["heads"] == found["groups"]:
        expected["heads"] = found["heads"]
    differing = {n: (found[n], expected[n]) for n in expected if found[n] != expected[n]}
    return ", ".join(f"{n} is {got}, not {want}" for n, (got, want) in differing.items())
