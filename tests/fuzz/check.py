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

from mhf_compiler import Report
from mhf_compiler.options import parse_options
from mhf_compiler.patterns import Kind
from mhf_compiler.rewrite.graph import rewrite_graph

from .programs import Program

_OPTIONS = parse_options(
    None, {"rewrite": "always", "strict": True, "verify": True, "fallback": "eager"}
)
#: what results may be off by relative to the largest, by the lowest precision they go through
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}

#: modes that a program is called under, by name
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
}

Results = dict[str, Tensor]


class Verdict(Enum):
    """What became of a program."""

    FOUND = "found and rewritten"
    OTHER_SITE = "rewritten, but described otherwise"
    MISSED = "declined"
    UNSEEN = "neither found nor declined"
    WRONG = "wrong results"
    CRASHED = "the back end raised"
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
    if outcome.verdict is Verdict.FOUND:
        difference = _site_difference(program, report)
        if difference:
            return replace(outcome, verdict=Verdict.OTHER_SITE, detail=difference)
    return outcome


def check_same(program: Program) -> Outcome:
    """Whether a program computes the same when it is compiled, whatever is made of it."""
    return _check_same(program, Report())


def _check_same(program: Program, report: Report) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = program.build()
            plain = _step(program, model, _called(program, model))
        except Exception as error:
            return Outcome(program, Verdict.INVALID, f"{type(error).__name__}: {error}")
        try:
            rewritten = copy.deepcopy(model)
            found = _step(program, rewritten, _compiled(program, rewritten, report))
        except Exception as error:
            blamed = Verdict.CRASHED if _runs_without_us(program, model) else Verdict.UNCAPTURED
            return _outcome(program, blamed, _raised(error), report)
        if not report.rewritten:
            seen = Verdict.MISSED if report.declined else Verdict.UNSEEN
            return _outcome(program, seen, "", report)
        exact = plain if program.dtype is torch.float64 else _exact(program, model) or plain
        differs = _difference(program, plain, found, exact)
        return _outcome(program, Verdict.WRONG if differs else Verdict.FOUND, differs, report)


def _raised(error: BaseException) -> str:
    """The error below those of Dynamo, and where it was raised."""
    while error.__cause__ is not None or getattr(error, "inner_exception", None) is not None:
        error = error.__cause__ or error.inner_exception  # type: ignore[attr-defined]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def _outcome(program: Program, verdict: Verdict, detail: str, report: Report) -> Outcome:
    declined = [site for site in report.declined if site.reason is not None]
    kinds = [site.reason.kind.name for site in declined if site.reason is not None]
    lines = [
        f"{site.reason} | {site.location.code if site.location else 'unknown line'}"
        for site in declined
    ]
    explained = "\n".join(dict.fromkeys(lines))
    reasons = tuple(dict.fromkeys(kinds))
    return Outcome(program, verdict, detail, reasons, explained, len(report.rewritten))


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
        report.graphs.append(rewrite_graph(gm, _OPTIONS))
        return gm.forward

    torch.compiler.reset()
    dynamic = None if program.dynamic else False
    return torch.compile(_called(program, model), backend=backend, dynamic=dynamic)


def _called(program: Program, model: nn.Module) -> Callable[..., Any]:
    """The module under the modes that it is called under inside of the compiled code."""
    _, inside, checkpointed = program.modes
    if not inside and not checkpointed:
        return model

    def call(**arguments: Tensor) -> Any:
        with MODES[inside]():
            if checkpointed:
                return checkpoint(model, use_reentrant=False, **arguments)
            return model(**arguments)

    return call


def _runs_without_us(program: Program, model: nn.Module) -> bool:
    torch.compiler.reset()
    try:
        model = copy.deepcopy(model)
        _step(program, model, torch.compile(_called(program, model), backend="eager"))
    except Exception:
        return False
    return True


def _step(
    program: Program,
    model: nn.Module,
    call: Callable[..., Any],
    arguments: dict[str, Tensor] | None = None,
) -> Results:
    """One training or inference step: everything that can be seen of it."""
    arguments = arguments or program.arguments()
    for name, value in arguments.items():
        arguments[name] = value.to(program.dtype).requires_grad_(program.training)
    for axis in program.dynamic:
        torch._dynamo.maybe_mark_dynamic(arguments["x"], program.inputs["x"].index(axis))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(program.seed)
    with torch.set_grad_enabled(program.training):
        with MODES[program.modes[0]]():
            returned = call(**arguments)
        results = list(returned) if isinstance(returned, tuple) else [returned]
        torch.manual_seed(program.seed + 1)
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
    return {name: tensor.detach() for name, tensor in seen.items()}


def _gradient(tensor: Tensor) -> Tensor:
    """No gradient is as good as one of zeros."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _difference(program: Program, plain: Results, found: Results, exact: Results) -> str:
    """What differs by more than rounding, as a sentence; "" where nothing does."""
    tolerance = _TOLERANCE[program.precision]
    largest = max(
        (_scale(x) for name, x in exact.items() if name.startswith("gradient")), default=0
    )
    if list(found) != list(plain):
        return f"other results: {list(found)}, not {list(plain)}"
    for name, expected in plain.items():
        got = found[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"{name} is {_form(got)}, not {_form(expected)}"
        if not expected.numel():
            continue
        scale = _scale(exact[name])
        if name.startswith("gradient"):  # one that cancels to zero leaves what the others round
            scale = max(scale, largest)
        own = float((expected.double() - exact[name].double()).abs().max())
        off = float((got.double() - expected.double()).abs().max())
        if not off <= tolerance * scale + 4 * own and not (
            torch.equal(got.isnan(), expected.isnan()) and bool(expected.isnan().any())
        ):
            return f"{name} is off by {off:.3g}, of {scale:.3g}"
    return ""


def _scale(tensor: Tensor) -> float:
    return float(tensor.abs().max()) + 1e-3 if tensor.numel() else 0.0


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} of {tuple(tensor.shape)}"


def _off_reference(program: Program) -> str:
    """How a program differs from its reference, in float64; "" where it does not."""
    model = program.build().double()
    arguments = {name: value.double() for name, value in program.arguments().items()}
    with torch.no_grad():
        result = model(**arguments)
        expected = program.reference(model, arguments)
    off = float((result.double() - expected).abs().max())
    scale = float(expected.abs().max()) + 1e-3
    if result.shape != expected.shape or not off <= _TOLERANCE[program.precision] * scale:
        return f"off by {off:.3g}, of {scale:.3g}"
    return ""


def _site_difference(program: Program, report: Report) -> str:
    """How the sites differ from the expected one; "" where they do not.

    Sub-networks without a router are also one network with more hidden units, and heads that all
    share one network are also tokens.
    """
    if len(report.rewritten) != 1:
        return f"{len(report.rewritten)} sites"
    site, expected = report.rewritten[0], dict(program.site)
    found = {name: getattr(site, name) for name in expected}
    if not expected["routed"]:
        for fields in (found, expected):
            fields["hidden"] *= fields.pop("sub_networks")
    if expected["groups"] == found["heads"] == found["groups"] == 1:
        expected["heads"] = 1
    differing = {n: (found[n], expected[n]) for n in expected if found[n] != expected[n]}
    return ", ".join(f"{n} is {got}, not {want}" for n, (got, want) in differing.items())
