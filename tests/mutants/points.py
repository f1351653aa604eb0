"""The changes, found in syntax trees: they follow the code wherever it moves.

In what reads graphs, a check disappears:

- a ``raise`` is left out, and so is a branch that only returns, continues or breaks;
- a condition loses one of its clauses, wherever clauses are joined by ``and`` or ``or``;
- in checks.py and axes.py, a comparison holds for more than it did.

In what computes gradients, a term disappears: an update is left out, a sum or a product loses an
operand.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: what reads graphs: all of its checks
READERS = tuple(
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "patterns").glob("*.py"))
    if path.stem not in ("__init__", "reasons", "site", "source", "products")
)
COMPARING = ("patterns/checks.py", "patterns/axes.py")

#: what computes gradients, and the functions in which it does; None stands for all
GRADIENTS: dict[str, tuple[str, ...] | None] = {
    "lowering/activations.py": None,
    "lowering/cpu/blocked.py": (
        "backward",
        "_differentiate_down_bias",
        "_differentiate",
        "_differentiate_projection",
    ),
    "lowering/kernels/activations.py": None,
    "lowering/kernels/plain/backward.py": (
        "mhf_backward_dq_kernel",
        "mhf_backward_dv_kernel",
        "mhf_backward_dk_du_kernel",
        "mhf_backward_dv_bias_kernel",
        "mhf_add_bias_parts_kernel",
    ),
    "lowering/kernels/plain/sums.py": None,
    "lowering/kernels/plain/router.py": (
        "_run_backward",
        "_leading",
        "_rest",
        "exact_product",
        "mhf_router_backward_kernel",
    ),
    "lowering/kernels/plain/norm_router.py": ("mhf_norm_and_route_kernel",),
}
#: these are Triton: run by its interpreter, which reads their source
KERNELS = "lowering/kernels/"

FILES = (*READERS, *GRADIENTS)

_ALWAYS = {ast.Eq: "True", ast.Is: "True", ast.In: "True", ast.LtE: "True", ast.GtE: "True"}
_NEVER = {ast.NotEq: "False", ast.IsNot: "False", ast.NotIn: "False"}
_CLOSED = {ast.Lt: "<=", ast.Gt: ">="}
_TERMS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: the file, relative to the repository.
        function: the qualified name of the function that it is in.
        line: where it is; for people, since it moves.
        before, after: the source that changes, on one line.
        statement: the key of the statement that it is in (``key_of``).
        beyond: the key of what runs only if the condition holds that it is in; or an empty string.
        decisive: the key of the value that a clause or a comparison must have had for the change to
            make a difference (``value_key``); or an empty string.
        text: the whole changed file.
    """

    path: str
    function: str
    line: int
    before: str
    after: str
    statement: str
    beyond: str
    decisive: str
    text: str

    @property
    def name(self) -> str:
        """The same as long as neither its function nor its own source changes."""
        return f"{self.path}:{self.function}: {self.before}  ->  {self.after}"


def key_of(function: str, statement: ast.stmt) -> str:
    """A statement by its function and its first line as Python writes it.

    Not by its file: a record of which tests run it outlives a move into another one.
    """
    return f"{function}: {ast.unparse(statement).splitlines()[0]}"


def value_key(function: str, expression: ast.expr, value: bool) -> str:
    """A condition of a function, and that it was true, or false, once."""
    return f"{function}: {ast.unparse(expression)} is {value}"


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods by qualified name; what is nested in one belongs to it."""

    def walk(nodes: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    return walk(tree.body, "")


def statements(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    """All statements of a function, those of functions inside it as well."""
    for node in ast.walk(function):
        if isinstance(node, ast.stmt) and node is not function:
            yield node


def mutants_of(path: str, source: str | None = None) -> list[Mutant]:
    """All changes of one file."""
    source = (ROOT / path).read_text() if source is None else source
    tree = ast.parse(source)
    found: list[Mutant] = []
    for name, function in functions(tree):
        wanted = GRADIENTS.get(path)
        if wanted is None or name in wanted:
            changes = _terms if path in GRADIENTS else _checks
            found += _Changes(path, source, name).of(function, changes)
    return list({mutant.text: mutant for mutant in found}.values())  # x * x loses either


def mutants(only: list[str]) -> list[Mutant]:
    """All changes whose names begin like one of `only`, in its order; all if it is empty."""
    found = [mutant for path in FILES for mutant in mutants_of(path)]
    chosen = [m for start in only for m in found if m.name.startswith(start)]
    return list(dict.fromkeys(chosen)) if only else found


Change = tuple[ast.AST, str, str]  # what changes, into what, and the key of what is decisive


class _Changes:
    def __init__(self, path: str, source: str, name: str) -> None:
        self.path, self.name = path, name
        self.source = source.encode()
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def of(self, function: ast.FunctionDef, changes) -> Iterator[Mutant]:  # type: ignore[no-untyped-def]
        for statement in statements(function):
            beyond = ""
            if isinstance(statement, (ast.If, ast.While, ast.For)):
                beyond = key_of(self.name, statement.body[0])
            for node, after, decisive in changes(self, statement):
                start, end = self.span(node)
                text = self.source[:start] + after.encode() + self.source[end:]
                yield Mutant(
                    self.path,
                    self.name,
                    node.lineno,  # type: ignore[attr-defined]
                    " ".join(self.source[start:end].decode().split()),
                    " ".join(after.split()),
                    key_of(self.name, statement),
                    beyond,
                    decisive,
                    text.decode(),
                )

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return start, end

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()


def _own_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """What a statement computes itself: not the statements inside it."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop(0)
        if node is not statement:
            yield node
        if isinstance(node, ast.JoinedStr | ast.FunctionDef):
            continue  # Python 3.11 does not say where the parts of a formatted string are
        todo += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]


def _checks(file: _Changes, statement: ast.stmt) -> Iterator[Change]:
    if isinstance(statement, ast.Raise):
        yield statement, "pass", ""
    if isinstance(statement, ast.If) and not statement.orelse and len(statement.body) == 1:
        body = statement.body[0]
        if isinstance(body, (ast.Return, ast.Continue, ast.Break)):
            yield body, "pass", ""
    for node in _own_expressions(statement):
        if isinstance(node, ast.BoolOp):
            word = " and " if isinstance(node.op, ast.And) else " or "
            for dropped in node.values:
                kept = [f"({file.text(value)})" for value in node.values if value is not dropped]
                decisive = value_key(file.name, dropped, isinstance(node.op, ast.Or))
                if isinstance(dropped, ast.Constant):
                    decisive = ""  # what stands in for nothing has no other value
                yield node, f"({word.join(kept)})", decisive
        if isinstance(node, ast.Compare) and file.path in COMPARING and len(node.ops) == 1:
            op = type(node.ops[0])
            constant = _ALWAYS.get(op) or _NEVER.get(op)
            if constant is not None:
                yield node, constant, value_key(file.name, node, constant == "False")
            elif op in _CLOSED:
                left, right = file.text(node.left), file.text(node.comparators[0])
                yield node, f"(({left}) {_CLOSED[op]} ({right}))", ""


def _terms(file: _Changes, statement: ast.stmt) -> Iterator[Change]:
    if isinstance(statement, ast.AugAssign):
        yield statement, "pass", ""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        yield statement, "pass", ""
    for node in _own_expressions(statement):
        if isinstance(node, ast.BinOp) and isinstance(node.op, _TERMS):
            yield node, f"({file.text(node.left)})", ""
            if isinstance(node.op, (ast.Add, ast.Mult)):
                yield node, f"({file.text(node.right)})", ""
