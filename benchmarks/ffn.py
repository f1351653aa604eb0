"""The whole FFN: the back end against eager, Inductor and a SwiGLU FFN of about equal weights.

The FFN is input projection, per-head RMSNorm, router, sub-networks and output projection, written
in plain PyTorch as a loop over sub-networks and with batched einsums.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .harness import (
    Benchmark,
    Case,
    Contender,
    Expected,
    Job,
    Plot,
    Row,
    Settings,
    matrix_product,
    of_cases,
)
from .models import PAPER, SHAPE_NAMES, SWIGLU_HIDDEN, MultiHeadFFN, SwiGLU, batched, loop

PHASES = ("forward", "training")
LENGTHS = (192, 384, 768, 1536, 3072, 6144, 12288, 16128)  # the paper's, doubled from 192
_SMALL = (8, 96, 8, 256)  # the 128M model
#: tokens of a small training step of both models
STEPS = (
    *((1, length, *PAPER[2:]) for length in (128, 1024)),
    *((*tokens, *_SMALL) for tokens in ((1, 128), (1, 512), (4, 1024))),
)
_CHECKED = 64  # tokens whose results are compared: no token needs another one
_TINY = (2, 64, 2, 16, 2, 32)


def cases(settings: Settings) -> Iterator[Case]:
    """The FFN of the paper's 1.3B model."""
    for shape in settings.shapes or ((_TINY,) if settings.quick else (PAPER,)):
        for phase in PHASES:
            yield case(shape, phase, settings)


def cases_of_lengths(settings: Settings) -> Iterator[Case]:
    """The same over the length of eight sequences."""
    base = settings.shapes[0] if settings.shapes else _TINY if settings.quick else PAPER
    for phase in PHASES:
        for length in (32, 64) if settings.quick else LENGTHS:
            yield case((base[0], length, *base[2:]), phase, settings)


def cases_of_tokens(settings: Settings) -> Iterator[Case]:
    """The same over the number of tokens of a decoding step, in CUDA graphs on a GPU."""
    base = settings.shapes[0] if settings.shapes else _TINY if settings.quick else PAPER
    for tokens in (1, 4) if settings.quick else (1, 4, 16, 64, 128, 256):
        yield case((tokens, 1, *base[2:]), "forward", settings, mode="reduce-overhead")


def cases_of_steps(settings: Settings) -> Iterator[Case]:
    """Small training steps, which the host limits; on a GPU in CUDA graphs, too, without it."""
    modes = {"calls": None, "CUDA graphs": "reduce-overhead"}
    if settings.device != "cuda":
        del modes["CUDA graphs"]
    for shape in settings.shapes or ((_TINY,) if settings.quick else STEPS):
        for launched, mode in modes.items():
            yield case(shape, "training", settings, mode, {"launched": launched})


def case(
    shape: Sequence[int],
    phase: str,
    settings: Settings,
    mode: str | None = None,
    about: Row | None = None,
) -> Case:
    about = dict(zip(SHAPE_NAMES, shape, strict=True)) | {"phase": phase} | (about or {})
    built = partial(build, tuple(shape), phase == "training", settings.device, mode)
    return Case(about, built, busy=mode is not None)


def build(shape: tuple[int, ...], training: bool, device: str, mode: str | None) -> Job:
    batch, length, heads, head_dim, sub_networks, hidden = shape
    model, dtype = heads * head_dim, torch.bfloat16
    looped = MultiHeadFFN(heads, head_dim, sub_networks, hidden, loop).to(device, dtype)
    einsums = MultiHeadFFN(heads, head_dim, sub_networks, hidden, batched).to(device, dtype)
    einsums.load_state_dict(looped.state_dict())
    swiglu_hidden = (
        SWIGLU_HIDDEN if shape[2:] == PAPER[2:] else 128 * -(-sub_networks * hidden // 128)
    )
    swiglu = SwiGLU(model, swiglu_hidden).to(device, dtype)
    x = torch.randn(batch, length, model, device=device, dtype=dtype, requires_grad=training)
    grad = torch.randn_like(x) if training else None

    def contender(name: str, module: nn.Module, call: Callable[[Tensor], Tensor]) -> Contender:
        values = None if module is swiglu else partial(results, call, x, grad)
        step = partial(run, call, x, grad)
        return Contender(name, step, values, clear=partial(clear, module, x))

    contenders = [
        contender("eager, loop", looped, looped),
        contender("Inductor, loop", looped, compiled(looped, "inductor", mode)),
        contender("Inductor, batched", einsums, compiled(einsums, "inductor", mode)),
        contender("flashmhf, loop", looped, compiled(looped, "flashmhf", mode)),
        contender("flashmhf, batched", einsums, compiled(einsums, "flashmhf", mode)),
        contender("SwiGLU, Inductor", swiglu, compiled(swiglu, "inductor", mode)),
        matrix_product(device, (batch * length, model, swiglu_hidden), dtype),
    ]
    return Job(contenders, expected(looped, shape, x, grad))


def compiled(module: nn.Module, backend: str, mode: str | None = None) -> Callable[..., Any]:
    """The module compiled; our back end always rewrites, for that is what is measured."""
    options: dict[str, Any] = {} if mode is None else {"mode": mode}
    if backend == "flashmhf":
        return torch.compile(module, backend=backend, options={"rewrite": "always", **options})
    return torch.compile(module, backend=backend, **options)


def run(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor | None) -> Tensor:
    """One step; with a gradient, the backward pass to the input and to the parameters too."""
    if grad is None:
        with torch.no_grad():
            return call(x)
    out = call(x)
    out.backward(grad)
    return out.detach()


def results(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
    """What a step computes for the last tokens."""
    values = {"out": last(run(call, x, grad))}
    if grad is not None:
        assert x.grad is not None
        values["x.grad"] = last(x.grad)
    return {name: value.clone() for name, value in values.items()}


def last(x: Tensor) -> Tensor:
    """The last few tokens."""
    return x.flatten(0, 1)[-_CHECKED:]


def clear(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None


def expected(
    module: nn.Module, shape: Sequence[int], x: Tensor, grad: Tensor | None
) -> dict[str, Expected]:
    """The results for the last tokens in float32, and what eager makes of them."""
    exact = MultiHeadFFN(*shape[2:]).to(x.device)
    exact.load_state_dict(module.state_dict())
    found = []
    for network, dtype in ((exact, torch.float32), (module, x.dtype)):
        few = last(x.detach()).to(dtype)[None].requires_grad_(grad is not None)
        few_grad = None if grad is None else last(grad).to(dtype)[None]
        found.append(results(network, few, few_grad))
        clear(network, few)
    return {name: Expected.of(found[0][name], found[1][name]) for name in found[0]}


def summary(rows: list[Row]) -> list[str]:
    """The back end against the better of Inductor's, by time and by memory."""
    lines = []
    for rivals in same_case(rows):
        others = [rivals[name] for name in rivals if name.startswith("Inductor")]
        ours = [rivals[name] for name in rivals if name.startswith("flashmhf")]
        if not all("ms" in row for row in ours) or not any("ms" in row for row in others):
            continue
        best = min(ours, key=lambda row: row["ms"])
        faster = min(row["ms"] for row in others if "ms" in row) / best["ms"]
        line = f"{best['B'] * best['L']} tokens, {best['phase']}: "
        line += f"{faster:.2f} times as fast as Inductor's better"
        for name in ("eager, loop", "SwiGLU, Inductor"):
            if rivals.get(name, {}).get("peak_mib") and best["peak_mib"]:
                less = rivals[name]["peak_mib"] / best["peak_mib"]
                line += f", {less:.1f} times less memory than {name}"
        lines.append(line)
    return lines


def same_case(rows: list[Row]) -> list[dict[str, Row]]:
    """The rows of each case, by contender."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        names = list(row)
        key = tuple(row[name] for name in names[: names.index("contender")])
        found.setdefault(key, {})[row["contender"]] = row
    return list(found.values())


BENCHMARK = Benchmark(
    "the whole FFN, against eager, Inductor and SwiGLU", of_cases(cases), summary=summary,
    devices=("cuda", "cpu"),
)  # fmt: skip
LENGTHS_BENCHMARK = Benchmark(
    "the whole FFN over the length: memory and latency, the paper's table",
    of_cases(cases_of_lengths),
    plots=(
        Plot("memory against length", "L", "peak_mib", each="phase"),
        Plot("latency against length", "L", "ms", each="phase"),
    ),
    summary=summary,
    devices=("cuda", "cpu"),
)
STEPS_BENCHMARK = Benchmark(
    "small training steps of the whole FFN, as called and in CUDA graphs",
    of_cases(cases_of_steps),
    summary=summary,
    devices=("cuda", "cpu"),
)
TOKENS_BENCHMARK = Benchmark(
    "the whole FFN over the tokens of a decoding step, in CUDA graphs",
    of_cases(cases_of_tokens),
    plots=(Plot("latency against tokens", "B", "ms"),),
    summary=summary,
    devices=("cuda", "cpu"),
)
