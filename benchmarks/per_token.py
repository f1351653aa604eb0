"""Per-token FFNs of ranking models: a network for each of a few tokens, over a large batch.

A ranking model embeds its features into T tokens of width d, and gives each token an un-gated FFN
of its own, written with stacked parameters:

    y = einsum("bth,thd->btd", gelu(einsum("btd,tdh->bth", x, k) + k_bias), v) + v_bias

The yardstick is the products alone, two of them forward and six in a training step, by
``torch.bmm`` into memory that is there already: cuBLAS on a GPU.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from .ffn import clear, run, same_case
from .harness import (
    Benchmark,
    Case,
    Contender,
    Expected,
    Job,
    Plot,
    Row,
    Settings,
    of_cases,
)

SHAPE_NAMES = ("T", "d", "f", "B")
SHAPES: tuple[tuple[int, ...], ...] = (
    (16, 128, 512, 4096),
    (16, 256, 1024, 4096),
    (32, 512, 2048, 2048),
    (16, 768, 3072, 2048),
    (32, 1536, 6144, 512),
)
PHASES = ("inference", "training")
#: all combinations of tokens, widths, hidden units as a multiple of the width, and batches
_FULL = list(
    itertools.product(
        (8, 16, 32, 64), (64, 128, 256, 512, 768, 1024, 1536), (2, 4), (64, 256, 1024, 4096, 8192)
    )
)
FULL_GRID = [(tokens, d, times * d, batch) for tokens, d, times, batch in _FULL]
#: some of them: every width with few, more and many rows, which is what decides
GRID: tuple[tuple[int, ...], ...] = (
    (16, 64, 256, 64),
    (32, 64, 128, 1024),
    (64, 64, 256, 8192),
    (8, 128, 256, 64),
    (32, 128, 512, 1024),
    (16, 128, 256, 8192),
    (64, 128, 512, 4096),
    (16, 256, 512, 64),
    (32, 256, 1024, 1024),
    (8, 256, 1024, 8192),
    (64, 256, 512, 4096),
    (16, 512, 2048, 64),
    (8, 512, 1024, 1024),
    (32, 512, 2048, 4096),
    (8, 768, 3072, 64),
    (32, 768, 1536, 1024),
    (16, 768, 3072, 8192),
    (16, 1024, 4096, 256),
    (8, 1536, 6144, 64),
    (16, 1536, 3072, 4096),
)
_TINY = (3, 16, 32, 8)
_AUTOTUNED = "max-autotune-no-cudagraphs"
YARDSTICK = "products alone"


class PerTokenFFN(nn.Module):
    """A network for each token, in stacked parameters."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.randn(tokens, width, hidden) / width**0.5)
        self.v = nn.Parameter(torch.randn(tokens, hidden, width) / hidden**0.5)
        self.k_bias = nn.Parameter(torch.randn(tokens, hidden))
        self.v_bias = nn.Parameter(torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d]
        hidden = F.gelu(torch.einsum("btd,tdh->bth", x, self.k) + self.k_bias)
        return torch.einsum("bth,thd->btd", hidden, self.v) + self.v_bias


# How a model computes: what its parameters are, and what the products are computed in.


def precisely(precision: str, device: str) -> AbstractContextManager[Any]:
    """The mode in which a step of this precision runs."""
    if precision == "autocast":
        return torch.autocast(device, torch.bfloat16)
    return nullcontext()


def dtypes(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Of parameters and inputs, and of what the products read."""
    stored = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return stored, torch.float32 if precision == "tf32" else torch.bfloat16


# Cases.


def cases(
    shapes: Sequence[Sequence[int]], precisions: Sequence[str], graphs: bool, settings: Settings
) -> Iterator[Case]:
    taken = settings.shapes or ((_TINY,) if settings.quick else shapes)
    for shape, precision, phase in itertools.product(taken, precisions, PHASES):
        about = dict(zip(SHAPE_NAMES, shape, strict=True))
        about |= {"precision": precision, "phase": phase}
        built = partial(
            build, tuple(shape), precision, phase == "training", graphs, settings.device
        )
        yield Case(about, built, busy=graphs and phase == "inference", profiled=True)


def build(shape: tuple[int, ...], precision: str, training: bool, graphs: bool, device: str) -> Job:
    tokens, width, hidden, batch = shape
    stored, _ = dtypes(precision)
    # Exact results first, and then the precision that everything afterwards is compiled for.
    torch.set_float32_matmul_precision("highest")
    ffn = PerTokenFFN(tokens, width, hidden).to(device, stored)
    x = torch.randn(batch, tokens, width, device=device, dtype=stored, requires_grad=training)
    grad = torch.randn_like(x) if training else None
    exact = last_token(ffn, x, grad, "exact", device)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    plain = last_token(ffn, x, grad, precision, device)

    def contender(name: str, backend: str, mode: str | None, rewrite: str = "auto") -> Contender:
        options: dict[str, Any] = {"mode": mode}
        if backend == "flashmhf":
            options = {"options": {"rewrite": rewrite} | ({} if mode is None else options)}
        compiled = torch.compile(ffn, backend=backend, dynamic=False, fullgraph=True, **options)

        def call(x: Tensor) -> Tensor:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with precisely(precision, device):
                return compiled(x)

        return Contender(
            name,
            partial(run, call, x, grad),
            partial(results, call, ffn, x, grad),
            flops=_flops(shape, training),
            clear=partial(clear, ffn, x),
            rewrites=backend == "flashmhf",
        )

    mode = "reduce-overhead" if graphs else None
    contenders = [
        contender("flashmhf auto", "flashmhf", mode),
        contender("flashmhf always", "flashmhf", mode, "always"),
        contender("Inductor", "inductor", mode),
    ]
    if not graphs:
        contenders += [
            contender("flashmhf always, max-autotune", "flashmhf", _AUTOTUNED, "always"),
            contender("Inductor, max-autotune", "inductor", _AUTOTUNED),
        ]
    contenders.append(products(shape, precision, training, device))
    expected = {name: Expected.of(exact[name], plain[name]) for name in exact}
    return Job(contenders, expected, YARDSTICK)


def results(
    call: Callable[[Tensor], Tensor], ffn: PerTokenFFN, x: Tensor, grad: Tensor | None
) -> dict[str, Tensor]:
    """What a step computes for the last token, and for the parameters of its network."""
    found = {"out": run(call, x, grad)[:, -1]}
    if grad is not None:
        assert x.grad is not None
        found["x.grad"] = x.grad[:, -1]
        for name, parameter in ffn.named_parameters():
            assert parameter.grad is not None
            found[f"{name}.grad"] = parameter.grad[-1]
    return {name: value.clone() for name, value in found.items()}


def last_token(
    ffn: PerTokenFFN, x: Tensor, grad: Tensor | None, precision: str, device: str
) -> dict[str, Tensor]:
    """The same, by the last token's network alone in plain PyTorch."""
    dtype = torch.float32 if precision == "exact" else x.dtype
    one = PerTokenFFN(1, x.shape[2], ffn.k.shape[2]).to(x.device, dtype)
    one.load_state_dict({name: value[-1:] for name, value in ffn.state_dict().items()})
    few = x.detach()[:, -1:].to(dtype).requires_grad_(grad is not None)

    def call(x: Tensor) -> Tensor:
        with precisely(precision, device):
            return one(x)

    return results(call, one, few, None if grad is None else grad[:, -1:].to(dtype))


def _flops(shape: Sequence[int], training: bool) -> float:
    tokens, width, hidden, batch = shape
    return (6 if training else 2) * 2.0 * tokens * width * hidden * batch


def products(shape: Sequence[int], precision: str, training: bool, device: str) -> Contender:
    """The matrix products of a step and nothing else, each token's for itself."""
    tokens, width, hidden, batch = shape
    _, dtype = dtypes(precision)
    x, y, dx, dy = (
        torch.randn(batch, tokens, width, device=device, dtype=dtype).transpose(0, 1)
        for _ in range(4)
    )
    h, dh = (torch.randn(tokens, batch, hidden, device=device, dtype=dtype) for _ in range(2))
    k, dk = (torch.randn(tokens, width, hidden, device=device, dtype=dtype) for _ in range(2))
    v, dv = (torch.randn(tokens, hidden, width, device=device, dtype=dtype) for _ in range(2))

    def step() -> None:
        torch.bmm(x, k, out=h)
        torch.bmm(h, v, out=y)
        if training:
            torch.bmm(dy, v.mT, out=dh)
            torch.bmm(h.mT, dy, out=dv)
            torch.bmm(dh, k.mT, out=dx)
            torch.bmm(x.mT, dh, out=dk)

    return Contender(YARDSTICK, step, flops=_flops(shape, training))


def measured(
    shapes: Sequence[Sequence[int]], precisions: Sequence[str] = ("bfloat16",), graphs: bool = False
) -> Callable[[Settings, Progress], Iterator[Row]]:
    """A benchmark's ``run``, after which products are computed as precisely as before."""

    def of(settings: Settings, progress: Progress) -> Iterator[Row]:
        before = torch.get_float32_matmul_precision()
        try:
            yield from of_cases(partial(cases, shapes, precisions, graphs))(settings, progress)
        finally:
            torch.set_float32_matmul_precision(before)

    return of


def summary(rows: list[Row]) -> list[str]:
    """Inductor's best time and memory against ours, and what ``auto`` loses by its choice."""
    lines = []
    for rivals in same_case(rows):
        times = {name: row["ms"] for name, row in rivals.items() if "ms" in row}
        ours = [name for name in times if name.startswith("flashmhf always")]
        others = [name for name in times if name.startswith("Inductor")]
        if not ours or not others:
            continue
        mine, other = min(ours, key=times.__getitem__), min(others, key=times.__getitem__)
        row = rivals[mine]
        line = f"{','.join(str(row[name]) for name in SHAPE_NAMES)} {row['precision']} "
        line += f"{row['phase']}: {mine} {times[other] / times[mine]:.2f} times as fast as {other}"
        if row.get("busy_us") and rivals[other].get("busy_us"):
            line += f", by the card's time {rivals[other]['busy_us'] / row['busy_us']:.2f}"
        if row.get("peak_mib"):
            line += f", {rivals[other]['peak_mib'] / row['peak_mib']:.1f} times less memory"
        if "flashmhf auto" in times:
            line += f"; auto {times['flashmhf auto'] / min(times[mine], times[other]):.2f} of best"
        lines.append(line)
    return lines


BENCHMARK = Benchmark(
    "per-token FFNs of ranking models, against Inductor and the products alone",
    measured(SHAPES),
    summary=summary,
    devices=("cuda", "cpu"),
    shape_names=SHAPE_NAMES,
)
PRECISIONS_BENCHMARK = replace(
    BENCHMARK,
    about="the same with float32 parameters: under autocast, and with products in TF32",
    run=measured(SHAPES, ("autocast", "tf32")),
)
GRAPHS_BENCHMARK = replace(
    BENCHMARK, about="the same in CUDA graphs", run=measured(SHAPES, graphs=True), devices=("cuda",)
)
GRID_BENCHMARK = replace(
    BENCHMARK,
    about="the same over tokens, widths and batches, 20 points",
    run=measured(GRID),
    plots=(Plot("time against batch", "B", "ms", each="phase"),),
)
FULL_GRID_BENCHMARK = replace(
    BENCHMARK, about=f"the same at all {len(FULL_GRID)} points", run=measured(FULL_GRID)
)
