"""The cost model against measurements: the op and Inductor on a grid of shapes, on a GPU.

    python benchmarks/grid.py --json benchmarks/results/grid.json

For every point the op and the batched einsum under Inductor are timed in turn, and both are set
beside what ``mhf_compiler.lowering.cost`` estimates. A point where ``rewrite="auto"`` would choose
the slower one by more than five percent is marked; the last line counts them.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from networks import DTYPES, SHAPE_NAMES, batched, make_inputs, parse_shape, relative_error
from torch import Tensor

from mhf_compiler.lowering import multi_head_ffn
from mhf_compiler.lowering.cost import estimate
from mhf_compiler.lowering.workload import Workload

POINTS = [
    *(f"1,{tokens},16,128,22,256" for tokens in (1, 16, 256, 2048, 16384)),
    *(f"64,{tokens},16,128,22,256" for tokens in (1, 4)),
    *(f"1,{tokens},8,96,8,256" for tokens in (16, 512, 8192)),
    *(f"1,{tokens},16,64,8,171" for tokens in (64, 1024, 16384)),
    *(f"1,{tokens},8,128,1,2752" for tokens in (16, 512, 8192)),
    *(f"1,{tokens},8,256,8,256" for tokens in (16, 512, 8192)),
    *(f"1,{tokens},32,32,1,128" for tokens in (256, 4096, 65536)),
    *(f"1,{tokens},2,64,4,64" for tokens in (256, 16384)),
    *(f"1,{tokens},16,16,11,64" for tokens in (1024, 32768)),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=parse_shape, action="append", metavar=SHAPE_NAMES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--phase", default="forward,training")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{SHAPE_NAMES:>24} {'phase':9} {'op ms':>8} {'est.':>8} {'Inductor':>8} {'est.':>8}")
    rows = []
    for shape in options.shape or map(parse_shape, POINTS):
        for phase in options.phase.split(","):
            row = measure(shape, DTYPES[options.dtype], phase == "training", options.repeats)
            rows.append(row)
            print_row(row)
    wrong = [row for row in rows if row["loss"] > 1.05]
    print(f"{len(wrong)} of {len(rows)} points lose more than five percent")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "dtype": options.dtype,
        }
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return int(any(not row["right"] for row in rows))


def measure(shape: list[int], dtype: torch.dtype, training: bool, repeats: int) -> dict:
    torch.manual_seed(0)
    torch.compiler.reset()
    inputs = [x.requires_grad_(training) for x in make_inputs(shape, dtype, "cuda", torch.float32)]
    grad = torch.randn_like(inputs[0])
    networks = {"op": multi_head_ffn, "inductor": torch.compile(batched, dynamic=False)}
    calls = {name: make_call(network, inputs, grad, training) for name, network in networks.items()}
    with torch.no_grad():
        outs = {name: network(*inputs).float() for name, network in networks.items()}
    right = relative_error(outs["op"], outs["inductor"]) < 2e-2
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-3, repeats):
        for name, call in calls.items():
            elapsed = milliseconds(call)
            if repeat >= 0:
                times[name].append(elapsed)
    op, inductor = (statistics.median(times[name]) for name in ("op", "inductor"))
    guess = estimate(workload(shape, dtype, training))
    chosen = op if guess.pays else inductor
    return {
        "shape": shape,
        "phase": "training" if training else "forward",
        "op_ms": op,
        "inductor_ms": inductor,
        "estimated_op_ms": guess.rewritten * 1e3,
        "estimated_inductor_ms": guess.original * 1e3,
        "loss": chosen / min(op, inductor),
        "right": right,
    }


def make_call(
    network: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, training: bool
) -> Callable[[], object]:
    if not training:
        return torch.no_grad()(lambda: network(*inputs))
    return lambda: torch.autograd.grad(network(*inputs), inputs, grad)


def milliseconds(call: Callable[[], object]) -> float:
    """Device time of a call that is launched while the device is busy, as inside a model."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # hides the launches' host time
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def workload(shape: list[int], dtype: torch.dtype, training: bool) -> Workload:
    b, length, h, d, e, f = shape
    return Workload(
        batch=b,
        length=length,
        heads=h,
        kuv_heads=h,
        head_dim=d,
        experts=e,
        expert_dim=f,
        gated=True,
        routed=True,
        biased=(False, False, False),
        activation="silu",
        dtype=dtype,
        out_dtype=dtype,
        device=torch.device("cuda"),
        training=training,
    )


def print_row(row: dict) -> None:
    figures = (row[k] for k in ("op_ms", "estimated_op_ms", "inductor_ms", "estimated_inductor_ms"))
    shape = ",".join(map(str, row["shape"]))
    marks = ("" if row["right"] else " WRONG") + (" *" if row["loss"] > 1.05 else "")
    print(f"{shape:>24} {row['phase']:9} " + " ".join(f"{x:8.3f}" for x in figures) + marks)


if __name__ == "__main__":
    sys.exit(main())
