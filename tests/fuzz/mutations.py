"""The mutator: a program becomes a near-miss, by a small edit of its source.

*Directed* mutations know what they break. Each is one entry of ``DIRECTED``: after the assignment
of a variable with a certain part in the network (the gate projection, the hidden units ...) a
statement is inserted that overwrites it. In the statement ``{v}`` is the variable, ``{q}`` the
query in scope, and ``{f}``, ``{h}`` ... are the dimensions of ``{v}`` that these axes have.

*Blind* mutations edit the syntax tree without knowing what it means: another number, another
variable of the program, another operation, other letters in an einsum, a part without gradients.

No mutant is expected to be declined: some are MH-FFNs still. What is asserted is that a mutant
computes the same with and without the back end.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

import torch

from .programs import VALUES, Program
from .spelling import Assignment


@dataclass(frozen=True)
class Mutant:
    """A mutated program: which mutation, and of which program."""

    name: str
    program: Program


@dataclass(frozen=True)
class Directed:
    """Statements that are inserted after an assignment to a variable in ``role``."""

    name: str
    role: str
    statement: str
    returned: str = ""  # a further result of the module


DIRECTED = (
    # The query.
    Directed(
        "the up projection reads a normalised query",
        "gate",
        "{q} = F.layer_norm({q}, {q}.shape[-1:])",
    ),
    Directed("the up projection reads a scaled query", "gate", "{q} = {q} * 2.0"),
    Directed("the up projection reads a detached query", "gate", "{q} = {q}.detach()"),
    Directed("the up projection reads other tokens", "gate", "{q} = {q}.roll(1, 0)"),
    Directed("the up projection reads a reversed query", "gate", "{q} = {q}.flip(-1)"),
    Directed("the query is dropped out between", "gate", "{q} = F.dropout({q}, 0.5)"),
    Directed("the query is overwritten between", "gate", "{q} = {q}.clone(); {q}.mul_(0.5)"),
    Directed(
        "a part of the query is overwritten",
        "gate",
        "with torch.no_grad(): {q}.data[..., 0] = 0.0",
    ),
    Directed("the query is rolled along heads", "query", "{v} = {v}.roll(1, {h})"),
    Directed("the query is squared", "query", "{v} = {v} * {v}"),
    Directed(
        "the query is cut and glued otherwise",
        "query",
        "{v} = torch.cat(({v}[..., 1:], {v}[..., :1]), -1)",
    ),
    # The gate.
    Directed("the gate is shifted", "gate", "{v} = {v} + 1.0"),
    Directed("the gate is clamped", "gate", "{v} = {v}.clamp(max=0.5)"),
    Directed("the gate has another slope", "gate", "{v} = {v} * torch.sigmoid(1.702 * {v})"),
    Directed("the gate is scaled by 1.702", "gate", "{v} = 1.702 * {v}"),
    Directed("the gate is detached", "gate", "{v} = {v}.detach()"),
    Directed("the gate goes through a softmax", "gate", "{v} = {v}.softmax({f})"),
    Directed("the gate is rolled along units", "gate", "{v} = {v}.roll(1, {f})"),
    Directed("the gate is reversed along heads", "gate", "{v} = {v}.flip({h})"),
    Directed("the gate is of the token before", "gate", "{v} = {v}.roll(1, {t})"),
    Directed("the gate is summed up over tokens", "gate", "{v} = {v}.cumsum({t})"),
    Directed(
        "the gate is transposed with heads",
        "gate",
        "{v} = {v}.transpose({f}, {h}).reshape({v}.shape)",
    ),
    Directed(
        "a temperature depends on the token",
        "gate",
        "{v} = {v} * {v}.mean({f}, keepdim=True)",
    ),
    Directed(
        "a half of the gate is zero",
        "gate",
        "{v} = {v} * torch.linspace(0, 1, {v}.shape[-1], dtype={v}.dtype)",
    ),
    Directed("the gate is rounded", "gate", "{v} = torch.floor({v})"),
    Directed("the gate is cast to 16 bits and back", "gate", "{v} = {v}.bfloat16().to({v}.dtype)"),
    Directed(
        "the gate gets a bias with more digits", "gate", "{v} = {v} + torch.full((1,), 0.3001)"
    ),
    Directed("the gate is added to and taken from", "gate", "{v} = {v} + 1e6 - 1e6"),
    Directed("the gate is multiplied and divided", "gate", "{v} = {v} * {v} / {v}"),
    Directed("the gate is overwritten in part", "gate", "{v} = {v}.clone(); {v}[..., 0] = 0.0"),
    # The up projection.
    Directed("the up projection is activated", "up", "{v} = F.relu({v})"),
    Directed("the up projection is shifted", "up", "{v} = {v} + 1.0"),
    Directed("the up projection is rolled along units", "up", "{v} = {v}.roll(1, {f})"),
    Directed("the up projection is reversed", "up", "{v} = {v}.flip({f})"),
    Directed("the up projection is of other heads", "up", "{v} = {v}.roll(1, {h})"),
    Directed("the up projection is of other sub-networks", "up", "{v} = {v}.roll(1, {e})"),
    Directed("the up projection is squared", "up", "{v} = {v} * {v}"),
    Directed("the up projection is detached", "up", "{v} = {v}.detach()"),
    Directed("gate and up are exchanged", "up", "gate, up = up, gate"),
    Directed("the up projection is the gate", "up", "{v} = gate"),
    Directed("the gate is added to the up projection", "up", "{v} = {v} + gate"),
    Directed("the up projection is divided by itself", "up", "{v} = {v} / {v}"),
    Directed("the up projection is cast to 16 bits", "up", "{v} = {v}.half().to({v}.dtype)"),
    # The hidden units.
    Directed(
        "the hidden units are cast to 8 bits and back",
        "hidden",
        "{v} = {v}.to(torch.float8_e4m3fn).to({v}.dtype)",
    ),
    Directed(
        "the hidden units are quantised",
        "hidden",
        "{v} = ({v} * 8.0).bfloat16().to({v}.dtype) / 8.0",
    ),
    Directed("the hidden units are widened", "hidden", "{v} = {v}.double().to({v}.dtype)"),
    Directed("zero times the gate is added", "hidden", "{v} = {v} + 0.0 * gate"),
    Directed("the hidden units are dropped out", "hidden", "{v} = F.dropout({v}, 0.5)"),
    Directed("the hidden units are normalised", "hidden", "{v} = F.normalize({v}, dim={f})"),
    Directed("the hidden units are activated again", "hidden", "{v} = torch.tanh({v})"),
    Directed(
        "the hidden units get a factor each",
        "hidden",
        "{v} = {v} * torch.arange(1, {v}.shape[-1] + 1)",
    ),
    Directed("the hidden units are rolled", "hidden", "{v} = {v}.roll(1, {f})"),
    Directed("the hidden units are of other heads", "hidden", "{v} = {v}.flip({h})"),
    Directed("the hidden units are of other sub-networks", "hidden", "{v} = {v}.flip({e})"),
    Directed("the hidden units are of other tokens", "hidden", "{v} = {v}.flip({t})"),
    Directed("the hidden units are summed up", "hidden", "{v} = {v}.cumsum({f})"),
    Directed(
        "the hidden units are averaged over tokens",
        "hidden",
        "{v} = {v}.mean({t}, keepdim=True).expand({v}.shape)",
    ),
    Directed("a residual around the hidden units", "hidden", "{v} = {v} + gate"),
    Directed("the hidden units are detached", "hidden", "{v} = {v}.detach()"),
    Directed("the hidden units are returned", "hidden", "", returned="{v}"),
    Directed(
        "the hidden units are returned reduced",
        "hidden",
        "",
        returned="{v}.detach().abs().mean()",
    ),
    Directed("the gate is returned", "gate", "", returned="{v} * 2"),
    Directed(
        "the hidden units are overwritten afterwards",
        "y",
        "hidden = hidden.detach(); hidden.zero_()",
    ),
    Directed("a unit is missing", "hidden", "{v} = F.pad({v}[..., 1:], (1, 0))"),
    Directed("the halves are rolled", "both", "{v} = {v}.roll(1, {u})"),
    Directed("the halves are reversed", "both", "{v} = {v}.flip({u})"),
    Directed(
        "the halves go across heads",
        "both",
        "{v} = {v}.transpose({h}, {u}).reshape({v}.shape)",
    ),
    Directed("the halves are of other heads", "both", "{v} = {v}.flip({h})"),
    # Router.
    Directed("the router is reversed along sub-networks", "router", "{v} = {v}.flip({e})"),
    Directed("the router is of other heads", "router", "{v} = {v}.flip({h})"),
    Directed("the router is of other tokens", "router", "{v} = {v}.flip({t})"),
    Directed("the router is detached", "router", "{v} = {v}.detach()"),
    Directed(
        "the router scales the query",
        "query",
        "{v} = {v} * {v}.mean(-1, keepdim=True).sigmoid()",
    ),
    Directed(
        "the router goes the wrong way round",
        "router",
        "{v} = {v}.transpose({h}, {e}).reshape({v}.shape)",
    ),
    Directed("the router is rounded", "router", "{v} = {v}.bfloat16().to({v}.dtype)"),
    Directed("the router is summed up", "router", "{v} = {v}.cumsum({e})"),
    # Numbers that only extreme inputs tell apart.
    Directed("the gate is limited", "gate", "{v} = {v}.clamp(-1e3, 1e3)"),
    Directed("what is no number becomes zero", "hidden", "{v} = {v}.nan_to_num(0.0)"),
    Directed("an infinity becomes finite", "gate", "{v} = {v}.nan_to_num(posinf=1e3)"),
    Directed("the output is without infinities", "y", "{v} = torch.nan_to_num({v})"),
    Directed("zero times the query is added", "y", "{v} = {v} + 0.0 * {q}.sum()"),
    Directed("tiny hidden units are zero", "hidden", "{v} = F.hardshrink({v}, 1e-9)"),
    # Symbols.
    Directed("the gate is divided by the length", "gate", "{v} = {v} / {v}.shape[{t}]"),
    Directed("the output is divided by the length", "y", "{v} = {v} / {v}.shape[{t}]"),
    Directed("an attribute scales the gate", "gate", "self.factor = 0.9; {v} = {v} * self.factor"),
    Directed(
        "a counter scales the hidden units",
        "hidden",
        "self.calls = getattr(self, 'calls', 0) + 1; {v} = {v} * self.calls",
    ),
    # Writes to the input.
    Directed(
        "the input is overwritten between",
        "gate",
        "with torch.no_grad(): x.mul_(0.5)",
    ),
    Directed("the input is overwritten in part", "hidden", "with torch.no_grad(): x[..., 0] = 1.0"),
    Directed(
        "the input is overwritten before it is read",
        "query",
        "with torch.no_grad(): x.add_(1.0)",
    ),
    Directed(
        "the input is overwritten by the output",
        "output",
        "with torch.no_grad(): x.copy_({v}.reshape(x.shape))",
    ),
    # Results that share memory.
    Directed("the output and a view of it are returned", "output", "", returned="{v}[..., :1]"),
    Directed("the output is returned flat, too", "output", "", returned="{v}.flatten()"),
    Directed("the output of a part is returned", "y", "", returned="{v}"),
    Directed(
        "a view of the output is overwritten",
        "output",
        "{v} = {v} * 1.0; {v}.unsqueeze(0)[..., :1].mul_(2.0)",
    ),
    # Of one token, what moves as the token does is no bias.
    Directed("the gate gets a bias of the token", "gate", "{v} = {v} + {q}.sum()"),
    Directed("the up projection gets a bias of the token", "up", "{v} = {v} + x.flatten()[0]"),
    Directed("the output gets a bias of the token", "y", "{v} = {v} + x.flatten()[:1].sin()"),
    # Axes of one size.
    Directed("gate: heads and units exchanged", "gate", "{v} = {v}.transpose({h}, {f})"),
    Directed("gate: sub-networks and units exchanged", "gate", "{v} = {v}.transpose({e}, {f})"),
    Directed("gate: heads and sub-networks exchanged", "gate", "{v} = {v}.transpose({h}, {e})"),
    Directed("gate: tokens and heads exchanged", "gate", "{v} = {v}.transpose({t}, {h})"),
    Directed("hidden: tokens and units exchanged", "hidden", "{v} = {v}.transpose({t}, {f})"),
    Directed("router: tokens and networks exchanged", "router", "{v} = {v}.transpose({t}, {e})"),
    Directed("router: heads and networks exchanged", "router", "{v} = {v}.transpose({h}, {e})"),
    Directed("query: heads and width exchanged", "query", "{v} = {v}.transpose({h}, {d})"),
    Directed("query: tokens and heads exchanged", "query", "{v} = {v}.transpose({t}, {h})"),
    Directed("output: heads and width exchanged", "y", "{v} = {v}.transpose({h}, {o})"),
    # The output.
    Directed("the output gets a factor a feature", "y", "{v} = {v} * torch.arange(1, d + 1)"),
    Directed("a residual inside of the heads", "y", "{v} = {v} + {q}.mean()"),
    Directed("the output is activated", "y", "{v} = torch.tanh({v})"),
    Directed("the output is rolled along features", "y", "{v} = {v}.roll(1, {o})"),
    Directed("the output is of other heads", "y", "{v} = {v}.flip({h})"),
    Directed("the output of other sub-networks", "y", "{v} = {v}.flip({e})"),
    Directed("the output is overwritten in part", "y", "{v} = {v}.clone(); {v}[..., 0] = 0.0"),
    Directed("the output is divided by itself", "y", "{v} = {v} / (1 + {v}.abs())"),
    Directed("the output is returned twice", "output", "", returned="{v} + 1"),
    Directed("the output is overwritten afterwards", "output", "{v} = {v} * 1.0; {v}.mul_(2.0)"),
    Directed("the heads are merged backwards", "output", "{v} = {v}.flip({h})"),
    Directed("the output is cast to 16 bits", "y", "{v} = {v}.bfloat16().to({v}.dtype)"),
    Directed("the output is widened", "y", "{v} = {v} + torch.zeros(1, dtype=torch.float64)"),
    Directed("the output gets a bias", "y", "{v} = {v} + torch.linspace(-300, 300, {v}.shape[-1])"),
    Directed("two large routers", "y", "{v} = {v} * 1e-4 * {q}.abs().mean().mul(300) * 300"),
    # Weights.
    Directed("the weights depend on tokens", "weight", "{v} = {v} + 0.1 * {q}.mean()"),
    Directed("the weights are rolled along heads", "weight", "{v} = {v}.roll(1, {h})"),
    Directed("the weights are detached", "weight", "{v} = {v}.detach()"),
    Directed("the weights are rolled along units", "weight", "{v} = {v}.roll(1, {f})"),
    Directed("the weights are normalised", "weight", "{v} = F.normalize({v}, dim=-1)"),
)


def mutants(program: Program, rng: Random) -> Iterator[Mutant]:
    """Mutants of a program, without end; some of them do not run."""
    while True:
        kind = rng.random()
        if kind < 0.15:
            yield under_modes(program, rng)
            continue
        if kind < 0.2:
            yield in_other_dtypes(program, rng)
            continue
        mutant = directed(program, rng) if kind < 0.55 else blind(program, rng)
        if mutant is not None and rng.random() < 0.15:
            mutant = on_other_numbers(mutant, rng)
        if mutant is not None and rng.random() < 0.2:
            second = blind(mutant.program, rng)
            if second is not None:
                mutant = Mutant(f"{mutant.name}; {second.name}", second.program)
        if mutant is not None and mutant.program.source != program.source:
            yield mutant


# The same program under other modes.


def under_modes(program: Program, rng: Random) -> Mutant:
    """Autocast and grad modes around the compiled code, and around a checkpoint inside of it."""
    around, inside = (
        rng.choice(["", "autocast", "no autocast", "no_grad", "enable_grad", "inference_mode"])
        for _ in range(2)
    )
    modes = (around, inside, rng.choice(["", "checkpoint", "checkpoint", "cond"]))
    if "autocast" in (around, inside):  # which leaves float64 as it is
        program = replace(program, dtype=torch.float32, precision=torch.bfloat16)
    called = modes[2] or "call"
    return Mutant(f"under {around!r}, {called} under {inside!r}", replace(program, modes=modes))


# The same program in other dtypes, or on other numbers.


def in_other_dtypes(program: Program, rng: Random) -> Mutant:
    """One tensor in another dtype than the others. Most products of two dtypes do not run."""
    program = replace(program, dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]))
    stored = re.findall(r"self\.(\w+) = nn\.Parameter|register_buffer\(\"(\w+)\"", program.source)
    names = [a or b for a, b in stored] + [name for name in program.inputs if name != "x"]
    biases = [name for name in names if "bias" in name or name == "r"]
    name = rng.choice(biases or names or ["x"])
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    precision = max(
        (program.dtype, dtype, program.precision), key=lambda dtype: torch.finfo(dtype).eps
    )
    kept = {**program.kept, name: dtype}
    return Mutant(f"{name} in {dtype}", replace(program, kept=kept, precision=precision))


def on_other_numbers(mutant: Mutant, rng: Random) -> Mutant:
    """A mutant on extreme numbers, which may tell it apart where random ones do not."""
    values = rng.choice(VALUES)
    return Mutant(f"{mutant.name}, on {values}", replace(mutant.program, values=values))


# Directed mutations.


def directed(program: Program, rng: Random) -> Mutant | None:
    """One of ``DIRECTED``, if the program has the variable that it asks for."""
    mutation = rng.choice(DIRECTED)
    variables = [a for a in program.assignments if a.role == mutation.role]
    if not variables:
        return None
    variable = rng.choice(variables)
    lines = program.source.splitlines()
    places = [i for i, line in enumerate(lines) if line.strip().startswith(f"{variable.name} = ")]
    if not places:
        return None
    at = rng.choice(places)
    names = _names(variable, program, lines, at)
    try:
        statement = mutation.statement.format(**names)
        returned = mutation.returned.format(**names)
    except KeyError:
        return None
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    if statement:
        lines.insert(at + 1, indent + statement)
    if returned:
        lines.insert(at + 1, f"{indent}extra = {returned}")
        lines[-1] = re.sub(r"return (.*)$", r"return (\1, extra)", lines[-1])
    return Mutant(mutation.name, program.with_source("\n".join(lines) + "\n"))


def _names(
    variable: Assignment, program: Program, lines: list[str], at: int
) -> dict[str, str | int]:
    """What a statement's placeholders stand for after line ``at``."""
    queries = [a.name for a in program.assignments if a.role in ("query", "input")]
    before = "\n".join(lines[: at + 1])
    in_scope = [q for q in queries if re.search(rf"^\s*{q} = ", before, re.MULTILINE)]
    names: dict[str, str | int] = {"v": variable.name, "q": in_scope[-1] if in_scope else "x"}
    for position, letters in enumerate(variable.dims):
        for letter in letters:
            names.setdefault("t" if letter in "blt" else letter, position)
    return names


# Blind mutations.


def blind(program: Program, rng: Random) -> Mutant | None:
    """One random edit of the body of ``forward``."""
    tree = ast.parse(program.source)
    forward = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "forward"
    )
    name, edit = rng.choice(list(_BLIND.items()))
    if not edit(forward, rng):
        return None
    source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    mutated = program.with_source(source)
    for spelled, dtype in _ROUNDINGS.items():  # which may be left out
        if spelled in source and torch.finfo(mutated.precision).eps < torch.finfo(dtype).eps:
            mutated = replace(mutated, precision=dtype)
    return Mutant(name, mutated)


_ROUNDINGS = {
    ".float()": torch.float32,
    "torch.float32": torch.float32,
    "torch.float16": torch.float16,
    "torch.bfloat16": torch.bfloat16,
}


def _another_number(forward: ast.FunctionDef, rng: Random) -> bool:
    numbers = [
        node
        for statement in forward.body[1:]
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float)
    ]
    if not numbers:
        return False
    node = rng.choice(numbers)
    value = node.value
    assert isinstance(value, (int, float))
    node.value = value + rng.choice([-1, 1]) if isinstance(value, int) else value * 1.5
    return True


def _another_variable(forward: ast.FunctionDef, rng: Random) -> bool:
    reads = [
        node
        for statement in forward.body[1:]
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    ]
    assigned = {
        node.id
        for node in ast.walk(forward)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    } | {argument.arg for argument in forward.args.args[1:]}
    reads = [node for node in reads if node.id in assigned]
    if not reads:
        return False
    node = rng.choice(reads)
    others = sorted(assigned - {node.id})
    if not others:
        return False
    node.id = rng.choice(others)
    return True


def _another_weight(forward: ast.FunctionDef, rng: Random) -> bool:
    """Another of the module's tensors."""
    reads = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "self"
    ]
    names = sorted({node.attr for node in reads})
    if len(names) < 2:
        return False
    node = rng.choice(reads)
    node.attr = rng.choice([name for name in names if name != node.attr])
    return True


def _another_operator(forward: ast.FunctionDef, rng: Random) -> bool:
    operations = [node for node in ast.walk(forward) if isinstance(node, ast.BinOp)]
    if not operations:
        return False
    node = rng.choice(operations)
    node.op = rng.choice([ast.Add(), ast.Sub(), ast.Mult(), ast.Div()])
    return True


def _another_function(forward: ast.FunctionDef, rng: Random) -> bool:
    families = (
        {"silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "elu", "relu6", "mish", "exp"},
        {"sum", "mean", "amax", "cumsum"},
        {"flatten", "unflatten"},
        {"cat", "stack"},
        {"square", "abs", "sign"},
    )
    calls = [
        (node, family)
        for node in ast.walk(forward)
        if isinstance(node, ast.Attribute)
        for family in families
        if node.attr in family
    ]
    if not calls:
        return False
    node, family = rng.choice(calls)
    node.attr = rng.choice(sorted(family - {node.attr}))
    return True


def _other_letters(forward: ast.FunctionDef, rng: Random) -> bool:
    """Two letters exchanged in one operand of an einsum."""
    specs = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "->" in node.value
    ]
    if not specs:
        return False
    node = rng.choice(specs)
    terms = re.split(r"(,|->)", str(node.value))
    at = rng.choice([i for i, term in enumerate(terms) if term not in (",", "->")])
    letters = sorted(set(re.findall(r"[A-Za-z]", terms[at])))
    if len(letters) < 2:
        return False
    a, b = rng.sample(letters, 2)
    terms[at] = terms[at].translate(str.maketrans({a: b, b: a}))
    node.value = "".join(terms)
    return True


_WRAPPERS = (
    "{}.detach()",
    "{} + 1.0",
    "{}.flip(-1)",
    "{}.flip(0)",
    "{}.roll(1, -1)",
    "{}.roll(1, 1)",
    "{}.abs()",
    "{} * {}",
    "{}.cumsum(-1)",
    "{}.mT.reshape({}.shape)",
    "{}.transpose(0, 1).reshape({}.shape)",
    "{}.clamp(-0.5, 0.5)",
    "{}.clamp(min=0)",
    "torch.tanh({})",
    "{}.float().to(x.dtype)",
    "{} * 0.5",
    "-{}",
    "F.dropout({}, 0.5)",
    "{}[..., :1].expand({}.shape)",
    "{}.contiguous()",
    "{}.sort(-1).values",
    "{}.mT",
    "{}.transpose(0, 1)",
    "{}.transpose(0, -1)",
    "{}.nan_to_num()",
    "{}.double().to(x.dtype)",
)


def _wrapped(forward: ast.FunctionDef, rng: Random) -> bool:
    """One tensor goes through something else first."""
    parents = [
        (owner, name, value)
        for statement in forward.body[1:]
        for owner in ast.walk(statement)
        for name, value in ast.iter_fields(owner)
        if isinstance(value, (ast.Name, ast.Call, ast.Subscript))
        and isinstance(getattr(value, "ctx", ast.Load()), ast.Load)
        and not (isinstance(owner, ast.Call) and name == "func")
        and not (isinstance(value, ast.Name) and value.id in ("torch", "F", "self", "math"))
        and not (isinstance(value, ast.Name) and value.id in "hedfHEGSBLT")
    ]
    if not parents:
        return False
    owner, name, value = rng.choice(parents)
    text = f"({ast.unparse(value)})"
    wrapper = rng.choice(_WRAPPERS).replace("{}", text)
    setattr(owner, name, ast.parse(wrapper, mode="eval").body)
    return True


def _without_gradients(forward: ast.FunctionDef, rng: Random) -> bool:
    """One statement is put under ``no_grad``."""
    blocks = list(_blocks(forward))
    block = rng.choice(blocks)
    at = rng.randrange(len(block))
    if isinstance(block[at], ast.Return):
        return False
    guarded = ast.parse("with torch.no_grad(): pass").body[0]
    assert isinstance(guarded, ast.With)
    guarded.body = [block[at]]
    block[at] = guarded
    return True


def _overwritten(forward: ast.FunctionDef, rng: Random) -> bool:
    """One variable is overwritten in place between two statements."""
    block = rng.choice(list(_blocks(forward)))
    names = [
        target.id
        for statement in block
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
    if not names:
        return False
    name = rng.choice(names)
    first = next(
        i
        for i, s in enumerate(block)
        if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == name
    )
    at = rng.randrange(first + 1, len(block) + (not isinstance(block[-1], ast.Return)))
    change = rng.choice(
        ["{}.mul_(0.5)", "{}[..., 0] = 0.0", "{}.zero_()", "{} += 1.0", "{}[0] = 1.0"]
    )
    block.insert(at, ast.parse(change.format(name)).body[0])
    return True


def _repeated(forward: ast.FunctionDef, rng: Random) -> bool:
    """A statement that has an effect is executed twice."""
    block = rng.choice(list(_blocks(forward)))
    effects = [
        at
        for at, statement in enumerate(block)
        if isinstance(statement, (ast.AugAssign, ast.Expr)) or _updates(statement)
    ]
    if not effects:
        return False
    at = rng.choice(effects)
    block.insert(at, block[at])
    return True


def _updates(statement: ast.stmt) -> bool:
    """Whether it assigns a variable that it reads."""
    if not isinstance(statement, ast.Assign):
        return False
    target = ast.unparse(statement.targets[0])
    return any(isinstance(x, ast.Name) and x.id == target for x in ast.walk(statement.value))


def _another_size(forward: ast.FunctionDef, rng: Random) -> bool:
    """A slice or a view uses another size: off by one, a half, another dimension's."""
    sizes = set("defHESGBLT") - {"e"}
    reads = [
        node
        for statement in forward.body[1:]
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in sizes
    ]
    if not reads:
        return False
    node = rng.choice(reads)
    other = rng.choice(["({0} - 1)", "({0} + 1)", "({0} // 2)", "(2 * {0})", "H", "d", "f", "E"])
    replacement = ast.parse(other.format(node.id), mode="eval").body
    _Replace(node, replacement).visit(forward)
    return True


def _reversed_list(forward: ast.FunctionDef, rng: Random) -> bool:
    """The outputs of a loop are merged in another order."""
    lists = {
        node.targets[0].id
        for node in ast.walk(forward)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        if isinstance(node.targets[0], ast.Name)
    }
    calls = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call)
        if node.args and isinstance(node.args[0], ast.Name) and node.args[0].id in lists
    ]
    if not calls:
        return False
    call = rng.choice(calls)
    order = rng.choice(["{}[::-1]", "{0}[1:] + {0}[:1]", "{0}[:1] * len({0})", "{0}[:-1]"])
    call.args[0] = ast.parse(order.format(ast.unparse(call.args[0])), mode="eval").body
    return True


def _another_order(forward: ast.FunctionDef, rng: Random) -> bool:
    """A view has two of its sizes exchanged, such as tokens and heads."""
    shapes = [
        node
        for call in ast.walk(forward)
        if isinstance(call, ast.Call)
        for node in [call, *call.args]
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("view", "reshape", "unflatten")
    ]
    lists = [node.args if isinstance(node, ast.Call) else node.elts for node in shapes
             if isinstance(node, (ast.Call, ast.Tuple))]  # fmt: skip
    lists = [sizes for sizes in lists if len(sizes) > 1 and not isinstance(sizes[1], ast.Tuple)]
    if not lists:
        return False
    sizes = rng.choice(lists)
    a, b = rng.sample(range(len(sizes)), 2)
    sizes[a], sizes[b] = sizes[b], sizes[a]
    return True


def _another_factor(forward: ast.FunctionDef, rng: Random) -> bool:
    """A fused sum has another factor, or reads itself after it was overwritten."""
    names = {"addmm": "beta", "baddbmm": "beta", "addcmul": "value"}
    calls = [
        (node, names[node.func.attr.removesuffix("_")])
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr.removesuffix("_") in names
    ]
    if not calls:
        return False
    call, name = rng.choice(calls)
    name = rng.choice([name, "alpha"]) if name == "beta" else name
    call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]
    factor = ast.Constant(rng.choice([0, 0.5, 2, -1, 1e-3]))
    call.keywords.append(ast.keyword(name, factor))
    return True


def _summed_in_another_dtype(forward: ast.FunctionDef, rng: Random) -> bool:
    """A sum is computed in another dtype, and stays in it or not."""
    calls = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr == "sum" and not any(k.arg == "dtype" for k in node.keywords)
    ]
    if not calls:
        return False
    call = rng.choice(calls)
    dtype = rng.choice(["float32", "float64", "bfloat16", "float16"])
    call.keywords.append(ast.keyword("dtype", ast.parse(f"torch.{dtype}", mode="eval").body))
    if rng.random() < 0.6:
        back = ast.parse("x.to(x.dtype)", mode="eval").body
        assert isinstance(back, ast.Call)
        assert isinstance(back.func, ast.Attribute)
        _Replace(call, back).visit(forward)
        back.func.value = call
    return True


def _router_on_input(forward: ast.FunctionDef, rng: Random) -> bool:
    """The factor of an output scales the query instead."""
    for block in _blocks(forward):
        for at, statement in enumerate(block):
            value = statement.value if isinstance(statement, ast.Assign) else None
            if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Mult):
                continue
            sides = (value.left, value.right), (value.right, value.left)
            for output, router in sides:
                if isinstance(output, ast.Name) and output.id.startswith("y"):
                    statement.value = output
                    return _scale_query(block[:at], router, rng)
    return False


def _scale_query(block: list[ast.stmt], factor: ast.expr, rng: Random) -> bool:
    """Multiply the query by ``factor`` wherever a projection reads it."""
    reads = [
        node
        for statement in block
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and re.fullmatch(r"q(_h)?\d*", node.id)
        if isinstance(node.ctx, ast.Load)
    ]
    for node in reads:
        scaled = ast.BinOp(ast.Name(node.id, ast.Load()), ast.Mult(), factor)
        for statement in block:
            _Replace(node, scaled).visit(statement)
    return bool(reads)


def _other_index(forward: ast.FunctionDef, rng: Random) -> bool:
    """A loop reads another head or sub-network than its own."""
    reads = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ("h", "e")
    ]
    if not reads:
        return False
    node = rng.choice(reads)
    count = node.id.upper()
    text = rng.choice(
        ["0", "({0} + 1) % {1}", "{1} - 1 - {0}", "{0} // 2", "min({0} + 1, {1} - 1)"]
    )
    replacement = ast.parse(f"({text.format(node.id, count)})", mode="eval").body
    _Replace(node, replacement).visit(forward)
    return True


def _unlike(forward: ast.FunctionDef, rng: Random) -> bool:
    """The first iteration of a loop computes something else."""
    loops = [node for node in ast.walk(forward) if isinstance(node, ast.For)]
    if not loops:
        return False
    loop = rng.choice(loops)
    places = [
        (i, statement.targets[0].id)
        for i, statement in enumerate(loop.body)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    ]
    if not places:
        return False
    at, name = rng.choice(places)
    change = rng.choice(
        [
            "{} * 2.0",
            "torch.tanh({})",
            "F.relu({})",
            "{}.flip(-1)",
            "{} * 0.0",
            "-{}",
            "{}[..., :-1]",
            "F.pad({}[..., :-1], (0, 1))",
            "{}.detach()",
        ]
    )
    test = f"{ast.unparse(loop.target)} == 0"
    text = f"{name} = {change.format(name)} if {test} else {name}"
    loop.body.insert(at + 1, ast.parse(text).body[0])
    return True


def _returned(forward: ast.FunctionDef, rng: Random) -> bool:
    """An intermediate result is returned, too."""
    last = forward.body[-1]
    assert isinstance(last, ast.Return)
    names = sorted(
        {
            node.id
            for node in ast.walk(forward)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        - set("hedfBLT")
    )
    if not names:
        return False
    name = rng.choice(names)
    last.value = ast.parse(
        f"({ast.unparse(last.value or ast.Constant(None))}, {name} * 1.0)", mode="eval"
    ).body
    return True


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _blocks(forward: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """The bodies of ``forward`` and of its loops, without the sizes at the beginning."""
    yield forward.body
    for node in ast.walk(forward):
        if isinstance(node, ast.For):
            yield node.body


_BLIND: dict[str, Callable[[ast.FunctionDef, Random], bool]] = {
    "another number": _another_number,
    "another variable": _another_variable,
    "another weight": _another_weight,
    "another size": _another_size,
    "another operator": _another_operator,
    "another order of sizes": _another_order,
    "another factor of a fused sum": _another_factor,
    "summed in another dtype": _summed_in_another_dtype,
    "another function": _another_function,
    "other letters": _other_letters,
    "a tensor goes through something else": _wrapped,
    "without gradients": _without_gradients,
    "overwritten": _overwritten,
    "executed twice": _repeated,
    "another index in a loop": _other_index,
    "an iteration differs": _unlike,
    "merged in another order": _reversed_list,
    "the router scales the query": _router_on_input,
    "an intermediate result is returned": _returned,
}
