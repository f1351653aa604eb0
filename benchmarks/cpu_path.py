"""The op on the CPU against the usual spellings under Inductor: time and peak memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mhf_compiler.lowering import multi_head_ffn, multi_head_ffn_reference

from .ffn import same_case
from .harness import Benchmark, Case, Contender, Expected, Job, Row, Settings, of_cases, training
from .models import SHAPE_NAMES, batched, loop, make_inputs

SHAPES = ((8, 256, 4, 32, 4, 64), (8, 256, 4, 64, 4, 128), (8, 256, 8, 32, 8, 85))
_RESULTS = ("out", "dq", "dk", "du", "dv", "dr")


def cases(settings: Settings) -> Iterator[Case]:
    for shape in settings.shapes or (((1, 32, 2, 16, 2, 16),) if settings.quick else SHAPES):
        for phase in ("forward", "training"):
            about = dict(zip(SHAPE_NAMES, shape, strict=True)) | {"phase": phase}
            yield Case(about, partial(build, tuple(shape), phase == "training"))


def build(shape: tuple[int, ...], trains: bool) -> Job:
    inputs = make_inputs(shape, torch.float32, "cpu")
    grad = torch.ones_like(inputs[0])

    def contender(name: str, network: Callable[..., Tensor], dtype: torch.dtype) -> Contender:
        leaves = [x.to(dtype).detach().requires_grad_(trains) for x in inputs]

        def forward() -> Tensor:
            with torch.set_grad_enabled(trains):
                return network(*leaves)

        plain = Contender(name, forward)
        timed = training(plain, leaves, grad.to(dtype)) if trains else plain

        def values() -> dict[str, Tensor]:
            results = timed.step()
            found = results if isinstance(results, list) else [results]
            return {name: x.detach() for name, x in zip(_RESULTS, found, strict=False)}

        return replace(timed, values=values)

    def results(network: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        values = contender("", network, dtype).values
        assert values is not None
        return dict(values())

    exact = results(multi_head_ffn_reference, torch.float64)
    plain = results(batched, torch.float32)
    networks = {
        "op": multi_head_ffn,
        "Inductor, loop": torch.compile(loop, backend="inductor"),
        "Inductor, batched": torch.compile(batched, backend="inductor"),
        "eager, batched": batched,
    }
    contenders = [contender(name, network, torch.float32) for name, network in networks.items()]
    return Job(contenders, {name: Expected.of(exact[name], plain[name]) for name in exact})


def summary(rows: list[Row]) -> list[str]:
    lines = []
    for rivals in same_case(rows):
        op = rivals["op"]
        others = [row for name, row in rivals.items() if name.startswith("Inductor")]
        if all("ms" in row for row in (op, *others)):
            best = min(row["ms"] for row in others)
            least = min(row["peak_mib"] for row in others)
            shape = ",".join(str(op[name]) for name in SHAPE_NAMES)
            lines.append(
                f"{shape} {op['phase']}: {best / op['ms']:.2f} times as fast as Inductor's better, "
                f"{least / op['peak_mib']:.1f} times less memory"
            )
    return lines


BENCHMARK = Benchmark(
    "the op on the CPU, against Inductor", of_cases(cases), summary=summary, devices=("cpu",)
)
