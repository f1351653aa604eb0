"""The kernels that a report names, and that the passes count on, are those that are launched.

Launches go their own way up to the kernel, which is written down instead of compiled.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from models.workloads import changed
from torch import Tensor

triton = pytest.importorskip("triton")

from mhf_compiler.lowering import problem as problems  # noqa: E402
from mhf_compiler.lowering import summary  # noqa: E402
from mhf_compiler.lowering.kernels import dispatch, launch  # noqa: E402
from mhf_compiler.lowering.kernels.batched import hidden as batched_hidden  # noqa: E402
from mhf_compiler.lowering.kernels.batched import passes as batched_passes  # noqa: E402
from mhf_compiler.lowering.kernels.hopper import backward_query, backward_weights  # noqa: E402
from mhf_compiler.lowering.ops import norm_network  # noqa: E402
from mhf_compiler.lowering.ops.norm_network import Like, may_pay  # noqa: E402
from mhf_compiler.lowering.problem import Formula, NormedRouter, Problem  # noqa: E402
from mhf_compiler.lowering.tiles import Kernel, Sizes, Tile, portable  # noqa: E402
from mhf_compiler.lowering.workload import Workload  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="interpreted, plain Triton runs everything"
)

CARDS = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
KINDS: dict[str, dict[str, Any]] = {
    "gated and routed": {},
    "not routed": {"routed": False},
    "not gated": {"gated": False},
    "not gated, biased": {"gated": False, "routed": False, "biased": (True, False, True)},
    "biased down projection": {"biased": (False, False, True)},
    "biased throughout": {"biased": (True, True, True), "activation": "relu"},
    "a wider result": {"out_dtype": torch.float32},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = (
    (16, 96),
    (20, 96),
    (64, 32),
    (64, 96),
    (96, 171),
    (128, 96),
    (256, 96),
    (320, 96),
)  # d, f
TOKENS = ((1, 1), (2, 100), (1, 1023), (2, 512))  # B, L
LAYOUTS = ("dense", "by heads", "weights by columns", "misaligned")
SUMS = (
    "mhf_add_parts_kernel",
    "mhf_add_weight_parts_kernel",
    "mhf_add_bias_parts_kernel",
    "mhf_backward_dv_bias_kernel",
    "mhf_cut_router_kernel",
)


def _purpose(name: str) -> str:
    """``dq`` of ``mhf_hopper_backward_dq_kernel``."""
    name = name.removesuffix("_kernel")
    for start in ("mhf_", "hopper_", "batched_", "backward_"):
        name = name.removeprefix(start)
    return name


def _family(name: str) -> str | None:
    found = re.match(r"mhf_(hopper|batched)_", name)
    return None if found is None else found[1]


class Launched(NamedTuple):
    name: str
    tile: Tile
    arguments: dict[str, Any]


class Named(NamedTuple):
    """A kernel as a report has it."""

    kernel: Kernel
    family: str | None
    sizes: dict[str, int]


Pretend = Callable[[tuple[int, int]], list[Launched]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Call with a compute capability: the kernels that are launched next, as for such a card."""
    launched: list[Launched] = []

    def start(kernel: Any, programs: int, tile: Tile, device: object, arguments: Any) -> None:
        launched.append(Launched(kernel.fn.__name__, tile, dict(arguments)))

    def of(capability: tuple[int, int]) -> list[Launched]:
        for module in (problems, launch, summary, norm_network):
            monkeypatch.setattr(module, "capability", lambda device: capability)
        return launched

    for module in (launch, backward_query, backward_weights, batched_hidden):
        monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(batched_passes, "multiply", lambda *tensors, **scales: None)
    return of


def a_workload(tokens: tuple[int, int], **changes: Any) -> Workload:
    sizes = Sizes(
        tokens=math.prod(tokens),
        heads=4,
        groups=2,
        head_dim=64,
        sub_networks=3,
        hidden=96,
        gated=True,
        routed=True,
        biased=(False, False, False),
        dtype=changes["dtype"],
    )
    w = Workload(sizes, "silu", sizes.dtype, torch.device("cuda", 0), training=True)
    return changed(w, **changes)


def of_order(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...]) -> Tensor:
    lying = torch.empty([shape[axis] for axis in order], dtype=dtype)
    return lying.permute([order.index(axis) for axis in range(4)])


def a_problem(w: Workload, tokens: tuple[int, int], layout: str) -> Problem:
    """On memory never read: tokens of a sequence or of a head side by side, weights by columns."""
    s = w.sizes
    groups, sub_networks, hidden, head_dim = s.weight_shape
    rows = (0, 2, 1, 3) if layout == "by heads" else (0, 1, 2, 3)
    weights = (0, 1, 3, 2) if layout == "weights by columns" else (0, 1, 2, 3)
    down = of_order(s.weight_shape, s.dtype, weights)
    q = of_order((*tokens, s.heads, head_dim), s.dtype, rows)
    if layout == "misaligned":
        q = torch.empty(*q.shape[:3], head_dim + 1, dtype=s.dtype)[..., :head_dim]
    biases = [
        torch.empty(groups, sub_networks, size, dtype=s.dtype) if biased else None
        for size, biased in zip((hidden, hidden, head_dim), s.biased, strict=True)
    ]
    return Problem(
        q,
        torch.empty_like(down),
        torch.empty_like(down) if s.gated else None,
        down,
        torch.empty(*q.shape[:3], sub_networks) if s.routed else None,
        *biases,
        activation=w.activation,
    )


def run(w: Workload, tokens: tuple[int, int], layout: str) -> Problem:
    problem = a_problem(w, tokens, layout)
    dispatch.forward(problem, torch.empty_like(problem.q, dtype=w.out_dtype))
    gradients = problem.new_gradients([x is not None for x in problem.tensors])
    dispatch.backward(problem, torch.empty_like(problem.q, dtype=w.out_dtype), gradients)
    return problem


def named(w: Workload) -> Iterator[Named]:
    pattern = (
        r"(?P<pass>forward|backward) kernel(?: for (?P<family>\w+))?"
        r"(?: of d(?P<of>K and dV|\w).*)?: "
        r"(?P<tokens>\d+) tokens x (?P<hidden>\d+) hidden units(?:, (?P<warps>\d+) warps)?, "
        r"(?P<stages>\d+) stages(?:, (?P<parts>\d+) programs to a tile)?"
        r"(?P<condition> \(where strides allow it\))?"
    )
    kernels: dict[str | None, Kernel] = {
        None: "forward",
        "Q": "dq",
        "V": "dv",
        "K": "dk_du",
        "K and dV": "dk_dv",
    }
    by_products: dict[str, Kernel] = {"forward": "forward", "backward": "backward"}
    for sentence in summary.kernels_of(w):
        products = re.fullmatch(r"(\w+) pass by PyTorch's batched products: .* at a time", sentence)
        if products is not None:
            yield Named(by_products[products[1]], "batched", {})
        if " tokens x " in sentence:
            match = re.fullmatch(pattern, sentence)
            assert match is not None, sentence
            found = match.groupdict()
            assert (found["family"] is None) == (found["condition"] is None)
            sizes = ("tokens", "hidden", "warps", "stages", "parts")
            family = found["family"] and found["family"].lower()
            yield Named(
                kernels[found["of"]],
                family,
                {name: int(found[name]) for name in sizes if found[name]},
            )


def sizes_of(launched: Launched) -> dict[str, int]:
    """The sizes that a report has of a kernel, as far as its launch shows them."""
    arguments, tile = launched.arguments, launched.tile
    if _family(launched.name) == "batched":
        return {}
    if launched.name == "mhf_hopper_forward_kernel":
        c = arguments["C"]
        return {"tokens": 64 * c.CONSUMERS, "hidden": c.BF, "stages": c.STAGES}
    if launched.name.startswith("mhf_hopper_"):
        streamed = "hidden" if launched.name == "mhf_hopper_backward_dq_kernel" else "tokens"
        return {streamed: arguments["C"].BS, "stages": arguments["C"].STAGES}
    found = {"tokens": arguments["BM"], "hidden": arguments["BF"]}
    return found | {
        "warps": tile.warps,
        "stages": tile.stages,
        "parts": arguments.get("PARTS", 1),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_the_report_names_what_is_launched(
    card: tuple[int, int], kind: str, pretend: Pretend
) -> None:
    launched = pretend(card)
    families = set()
    for dtype, (head_dim, hidden), tokens in itertools.product(DTYPES, SHAPES, TOKENS):
        w = a_workload(tokens, dtype=dtype, head_dim=head_dim, hidden=hidden, **KINDS[kind])
        report = {x.kernel: x for x in named(w)}
        for layout in LAYOUTS:
            launched.clear()
            problem = run(w, tokens, layout)
            aligned = layout != "misaligned" and head_dim * dtype.itemsize % 16 == 0
            if layout == "weights by columns":
                aligned &= hidden * dtype.itemsize % 16 == 0
            seen = set()
            for x in launched:
                if x.name in SUMS:
                    continue
                kernel = _purpose(x.name)
                family = _family(x.name)
                seen.add(kernel)
                # Where a layout rules out the one kernel of dK and dV, there are two.
                said = report.get(kernel) or report["dk_dv"]
                where = (dtype, head_dim, hidden, tokens, layout, x.name)
                if aligned or said.family != "hopper":
                    assert family == said.family, where
                    expected = said.sizes
                else:  # plain Triton's, as the report's condition says
                    assert family is None, where
                    expected = vars(portable(kernel, problem.sizes))
                for name, size in sizes_of(x).items():
                    assert size == expected.get(name, 1), (*where, name)
                families.add(family)
            said_as_one = {"dk_dv"} & set(report)
            assert seen in (set(report), set(report) - said_as_one | {"dv", "dk_du"})
            assert not said_as_one or ("dk_dv" in seen) == aligned
    assert families == ({None, "batched", "hopper"} if card == (9, 0) else {None, "batched"})


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_a_norm_joins_a_network_where_one_kernel_does_both(
    card: tuple[int, int], gated: bool, pretend: Pretend
) -> None:
    launched = pretend(card)
    shapes = [
        (head_dim, hidden) for head_dim, hidden in SHAPES if head_dim <= 128 and head_dim % 8 == 0
    ]
    for dtype, (head_dim, hidden), tokens in itertools.product(DTYPES[:2], shapes, TOKENS):
        w = a_workload(tokens, dtype=dtype, head_dim=head_dim, hidden=hidden, gated=gated)
        problem = a_problem(w, tokens, "dense")._replace(r=None)
        formula = Formula(1e-6, False, "sigmoid", 0.0, 0.0, torch.float32)
        router = NormedRouter(None, torch.empty(2, head_dim, 3), formula)
        launched.clear()
        dispatch.normed_forward(problem, router)
        names = {x.name for x in launched} - {"mhf_add_parts_kernel"}
        k = Like(dtype, tuple(problem.k.shape), problem.k.stride())
        one = names == {"mhf_cut_router_kernel", "mhf_hopper_forward_kernel"}
        assert may_pay(tokens[0] * tokens[1], k, gated, torch.device("cuda")) == one
        assert one or "mhf_norm_and_route_kernel" in names
