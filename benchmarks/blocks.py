"""Whole models of equal size: 20 FlashMHF blocks against 24 SwiGLU blocks, attention included."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .ffn import clear, compiled, run
from .harness import Benchmark, Case, Contender, Expected, Job, Plot, Row, Settings, of_cases
from .models import PAPER, SWIGLU_HIDDEN, MultiHeadFFN, SwiGLU, Transformer, batched

LENGTHS = (4096, 16128)
BATCH = 8
_CHECKED = 256  # the first tokens of the last sequence: attention is causal, so they need no others


def cases(phase: str, settings: Settings) -> Iterator[Case]:
    for length in (32,) if settings.quick else LENGTHS:
        about = {"B": 2 if settings.quick else BATCH, "L": length, "phase": phase}
        yield Case(about, partial(build, settings, length, phase == "training"))


def build(settings: Settings, length: int, training: bool) -> Job:
    device, dtype = settings.device, torch.bfloat16
    heads, head_dim, sub_networks, hidden = (2, 16, 2, 32) if settings.quick else PAPER[2:]
    layers, swiglu_layers = (2, 3) if settings.quick else (20, 24)
    model = heads * head_dim
    swiglu_hidden = 3 * model if settings.quick else SWIGLU_HIDDEN
    ours = Transformer(
        model,
        heads,
        [MultiHeadFFN(heads, head_dim, sub_networks, hidden, batched) for _ in range(layers)],
    ).to(device, dtype)
    swiglu = Transformer(
        model, heads, [SwiGLU(model, swiglu_hidden) for _ in range(swiglu_layers)]
    ).to(device, dtype)
    batch = 2 if settings.quick else BATCH
    x = torch.randn(batch, length, model, device=device, dtype=dtype, requires_grad=training)
    grad = torch.randn_like(x) if training else None

    def contender(name: str, module: nn.Module, backend: str | None) -> Contender:
        call = module if backend is None else compiled(module, backend)

        def values() -> dict[str, Tensor]:
            return {"out": run(call, x, grad)[-1, :_CHECKED].clone()}

        return Contender(
            name,
            partial(run, call, x, grad),
            values if module is ours else None,
            clear=partial(clear, module, x),
            about={"parameters": sum(p.numel() for p in module.parameters())},
        )

    contenders = [
        contender("FlashMHF, flashmhf", ours, "flashmhf"),
        contender("SwiGLU, Inductor", swiglu, "inductor"),
        contender("SwiGLU, eager", swiglu, None),
    ]
    return Job(contenders, {"out": expected(ours, x)})


def expected(model: Transformer, x: Tensor) -> Expected:
    """The first tokens' outputs in float32, and what eager makes of them."""
    few = x.detach()[-1:, :_CHECKED]
    with torch.no_grad():
        plain = model(few)[0]
        exact = model.float()(few.float())[0]
        model.to(x.dtype)
    return Expected.of(exact, plain)


def summary(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["contender"] != "FlashMHF, flashmhf" or "ms" not in row:
            continue
        same = [other for other in rows if (other["L"], other["phase"]) == (row["L"], row["phase"])]
        for other in same:
            if other["contender"].startswith("SwiGLU") and "ms" in other:
                lines.append(
                    f"L {row['L']}, {row['phase']}: {other['ms'] / row['ms']:.3f} times as fast as "
                    f"{other['contender']}, memory {row['peak_mib'] / other['peak_mib']:.2f}"
                )
    return lines


INFERENCE_BENCHMARK, TRAINING_BENCHMARK = (
    Benchmark(
        f"20 FlashMHF blocks against 24 SwiGLU blocks, {phase}",
        of_cases(partial(cases, phase)),
        plots=(Plot("time against length", "L", "ms"),),
        summary=summary,
        devices=("cuda", "cpu"),
        repeats=7,
    )
    for phase in ("inference", "training")
)
