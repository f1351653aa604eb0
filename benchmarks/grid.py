"""The cost model against measurements: the op and Inductor on a grid of shapes.

The op and the batched einsum are timed side by side, as inside a model, and next to each is what
``mhf_compiler.lowering.cost`` estimates. Inductor compiles both: in a model that is rewritten the
op is a part of the compiled graph, and what a call of that graph costs is paid either way. ``loss``
is what ``rewrite="auto"`` loses by its choice: the chosen one's time over that of the better one.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from mhf_compiler.lowering import multi_head_ffn
from mhf_compiler.lowering.cost import estimate
from mhf_compiler.lowering.tiles import Sizes
from mhf_compiler.lowering.workload import Workload

from .harness import (
    Benchmark,
    Case,
    Contender,
    Expected,
    Job,
    Row,
    Settings,
    measure,
    training,
)
from .models import SHAPE_NAMES, batched, loop, make_inputs

_ALLOWED_LOSS = 1.05
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16)}
CPU_POINTS: list[tuple[int, ...]] = [
    *((8, length, 4, 32, 4, 64) for length in (1, 16, 256)),
    *((1, tokens, 4, 64, 4, 128) for tokens in (1, 16, 128, 1024)),
    *((1, tokens, 8, 128, 4, 256) for tokens in (1, 16, 128, 1024)),
    *((1, tokens, 8, 96, 1, 341) for tokens in (1, 16, 128, 1024)),
    *((1, tokens, 16, 16, 1, 64) for tokens in (1, 128, 4096)),
]
POINTS: list[tuple[int, ...]] = [
    *((1, tokens, 16, 128, 22, 256) for tokens in (1, 16, 256, 2048, 16384, 131072)),
    *((64, tokens, 16, 128, 22, 256) for tokens in (1, 4)),
    *((1, tokens, 8, 96, 8, 256) for tokens in (1, 16, 64, 512, 8192, 65536)),
    *((1, tokens, 16, 64, 8, 171) for tokens in (1, 64, 1024, 16384)),
    *((1, tokens, 8, 128, 1, 2752) for tokens in (1, 16, 512, 8192)),
    *((1, tokens, 4, 128, 1, 8192) for tokens in (1, 64, 1024, 8192)),
    *((1, tokens, 8, 256, 8, 256) for tokens in (1, 16, 512, 8192)),
    *((1, tokens, 32, 32, 1, 128) for tokens in (1, 256, 4096, 65536)),
    *((1, tokens, 2, 64, 4, 64) for tokens in (1, 256, 16384)),
    *((1, tokens, 1, 256, 22, 512) for tokens in (1, 256, 16384)),
    *((1, tokens, 16, 32, 11, 64) for tokens in (1, 1024, 32768)),
]
#: of one network to a head, whose weights the op has to copy together before each call
SEPARATE_POINTS: list[tuple[int, ...]] = [
    *((1, tokens, 8, 96, 1, 256) for tokens in (1, 64, 1024, 16384)),
    *((1, tokens, 16, 128, 1, 2752) for tokens in (1, 64, 1024, 16384)),
    *((1, tokens, 4, 64, 1, 171) for tokens in (1, 1024)),
]


def run(settings: Settings, progress: Progress) -> Iterator[Row]:
    own = POINTS if settings.device == "cuda" else CPU_POINTS
    shapes = settings.shapes or (own[:1] if settings.quick else own)
    storages = [(shape, "together") for shape in shapes]
    if not settings.shapes:
        separate = SEPARATE_POINTS[:1] if settings.quick else SEPARATE_POINTS
        storages += [(shape, "separate") for shape in separate]
    points = list(itertools.product(storages, DTYPES[settings.device], (False, True)))
    for (shape, storage), dtype, trains in progress.track(points, description="points"):
        about: Row = dict(zip(SHAPE_NAMES, shape, strict=True))
        about |= {"weights": storage, "dtype": str(dtype).removeprefix("torch.")}
        about |= {"phase": "training" if trains else "forward"}
        built = partial(build, shape, storage, dtype, trains, settings.device)
        case = Case(about, built, busy=not trains)  # autograd's thread waits for its own steps
        rows = list(measure(case, settings, progress))
        judge(rows, workload(about, settings.device))
        yield from rows


def build(shape: Sequence[int], storage: str, dtype: torch.dtype, trains: bool, device: str) -> Job:
    inputs = make_inputs(shape, dtype, device, torch.float32)
    grad = torch.randn_like(inputs[0])
    taken = inputs if storage == "together" else [inputs[0], *apart(inputs[1:4]), inputs[4]]

    def contender(name: str, network: Callable[..., Tensor]) -> Contender:
        leaves = [x.detach().requires_grad_(trains) for x in taken]
        # One graph, or none: where it broke, a part would be timed in eager mode.
        compiled = torch.compile(network, dynamic=False, fullgraph=True)

        def forward() -> Tensor:
            with torch.set_grad_enabled(trains):
                return compiled(*leaves)

        plain = Contender(name, forward)
        timed = training(plain, leaves, grad) if trains else plain

        def values() -> dict[str, Tensor]:
            found = timed.step()
            results = found if isinstance(found, list) else [found]
            return {name: x[:, -64:] for name, x in zip(("out", "dq"), results, strict=False)}

        return replace(timed, values=values)

    ways = (multi_head_ffn, batched) if storage == "together" else (stacked_op, head_by_head)
    contenders = [contender("op", ways[0]), contender("Inductor", ways[1])]
    if storage == "together" and device == "cpu" and shape[4] > 1:
        # One sub-network after the other: its hidden units may stay in the cache.
        contenders.append(contender("Inductor, loop", loop))
    return Job(contenders, expected(inputs, grad if trains else None))


def apart(weights: Sequence[Tensor]) -> list[Tensor]:
    """Each head's part of k, u and v, one after the other, in memory of its own: (f, d) each."""
    return [x.squeeze(0).clone() for weight in weights for x in weight.unbind()]


def stacked_op(q: Tensor, *others: Tensor) -> Tensor:
    """The op after copying the weights together, as it is called for a list of modules."""
    *weights, r = others
    heads = q.shape[2]
    together = [torch.stack(weights[i : i + heads])[:, None] for i in range(0, 3 * heads, heads)]
    return multi_head_ffn(q, *together, r)


def head_by_head(q: Tensor, *others: Tensor) -> Tensor:
    """One small network after the other: a list of modules, in its usual spelling."""
    *weights, r = others
    heads = q.shape[2]
    outputs = []
    for head, x in enumerate(q.unbind(2)):
        k, u, v = weights[head::heads]
        hidden = F.silu(F.linear(x, k)) * F.linear(x, u) * r[:, :, head].to(q.dtype)
        outputs.append(hidden @ v)
    return torch.stack(outputs, dim=2)


def expected(inputs: Sequence[Tensor], grad: Tensor | None) -> dict[str, Expected]:
    """The last tokens' results in float32, and what eager makes of them."""
    q, k, u, v, r = inputs
    found = []
    for network, dtype in ((loop, torch.float32), (batched, q.dtype)):
        few = q[:, -64:].to(dtype).requires_grad_(grad is not None)
        out = network(few, *(x.to(dtype) for x in (k, u, v)), r[:, -64:])
        results = {"out": out.detach()}
        if grad is not None:
            results["dq"] = torch.autograd.grad(out, few, grad[:, -64:].to(dtype))[0]
        found.append(results)
    return {name: Expected.of(found[0][name], found[1][name]) for name in found[0]}


def judge(rows: Sequence[Row], work: Workload) -> None:
    """Write the estimates next to the measurements, and what the choice between them loses."""
    guess = estimate(work)
    op, *others = rows
    inductor = min(others, key=lambda row: row.get("ms", math.inf))
    op["estimated_ms"], inductor["estimated_ms"] = 1e3 * guess.rewritten, 1e3 * guess.original
    if "ms" in op and "ms" in inductor:
        chosen = op if guess.pays else inductor
        chosen["loss"] = chosen["ms"] / min(op["ms"], inductor["ms"])
    elif "ms" in op:  # the other one does not fit into memory
        inductor["loss"] = 1.0 if guess.pays else float("inf")


def workload(row: Row, device: str) -> Workload:
    """What the cost model is asked about a point."""
    dtype = getattr(torch, row["dtype"])
    pieces = row["H"] if row.get("weights") == "separate" else 1
    sizes = Sizes(
        tokens=row["B"] * row["L"],
        heads=row["H"],
        groups=row["H"],
        head_dim=row["d"],
        sub_networks=row["E"],
        hidden=row["f"],
        gated=True,
        routed=True,
        biased=(False, False, False),
        dtype=dtype,
    )
    return Workload(
        sizes=sizes,
        activation="silu",
        out_dtype=dtype,
        device=torch.device(device),
        training=row["phase"] == "training",
        pieces=(pieces, pieces, pieces),
    )


def summary(rows: list[Row]) -> list[str]:
    losses = [row["loss"] for row in rows if "loss" in row]
    lost = sum(loss > _ALLOWED_LOSS for loss in losses)
    return [f"auto loses more than five percent at {lost} of {len(losses)} points"]


BENCHMARK = Benchmark(
    "the cost model against the op and Inductor",
    run,
    summary=summary,
    devices=("cuda", "cpu"),
    repeats=9,
)
