"""The CPU path against the usual spellings under Inductor: time and peak temporary memory.

    python benchmarks/cpu_path.py                        # the three default sizes, float32
    python benchmarks/cpu_path.py --size 8,256,4,32,4,64 --repeats 30 --dtype bfloat16

Every contender runs once per repeat, in turn, so that a busy machine slows all of them alike; the
table shows medians. Peak memory is what the allocator of PyTorch held at most above what it held
before the call, outputs included. A contender whose error is out of proportion to that of the
plain spelling has no figures, and the script ends with status 1.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from networks import (
    DTYPES,
    SHAPE_NAMES,
    batched,
    loop,
    make_inputs,
    parse_shape,
    relative_error,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mhf_compiler.lowering import multi_head_ffn, multi_head_ffn_reference

Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], list[Tensor]]

SIZES = ["8,256,4,32,4,64", "8,256,4,64,4,128", "8,256,8,32,8,85"]


def make_step(network: Network, inputs: list[Tensor], training: bool) -> Step:
    """One call that returns the output, and with ``training`` also every gradient."""
    if not training:

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return [network(*inputs)]

        return infer
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad_out = torch.ones_like(inputs[0])

    def train() -> list[Tensor]:
        out = network(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    return train


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [relative_error(x, y) for x, y in zip(found, exact, strict=True)]


def peak_mebibytes(step: Step) -> float:
    """Most bytes that one call held at once, from the allocator's events in a profile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        results = step()
    del results
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def interleaved_medians(steps: dict[str, Step], repeats: int, warmups: int) -> dict[str, float]:
    """Milliseconds of each step, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warmups + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if repeat >= warmups:
                times[name].append(1e3 * elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(size: list[int], dtype: torch.dtype, repeats: int, warmups: int) -> bool:
    """Print one table; false when a contender's numbers are wrong."""
    torch.manual_seed(0)
    inputs = make_inputs(size, dtype, "cpu")
    right = True
    for training in (False, True):
        torch._dynamo.reset()
        networks: dict[str, Network] = {
            "op": multi_head_ffn,
            "Inductor, loop": torch.compile(loop, backend="inductor"),
            "Inductor, batched": torch.compile(batched, backend="inductor"),
            "eager, batched": batched,
        }
        exact = make_step(multi_head_ffn_reference, [x.double() for x in inputs], training)()
        plain = relative_errors(make_step(batched, inputs, training)(), exact)
        steps: dict[str, Step] = {}
        wrong: dict[str, float] = {}
        for name, network in networks.items():
            step = make_step(network, inputs, training)
            errors = relative_errors(step(), exact)
            ratio = max(error / base for error, base in zip(errors, plain, strict=True))
            if ratio <= 2:
                steps[name] = step
            else:
                wrong[name] = ratio
        peaks = {name: peak_mebibytes(step) for name, step in steps.items()}
        times = interleaved_medians(steps, repeats, warmups)
        sizes = " ".join(
            f"{name} {n}" for name, n in zip(SHAPE_NAMES.split(","), size, strict=True)
        )
        phase = "forward and backward" if training else "forward"
        print(f"\n{sizes}, {str(dtype).removeprefix('torch.')}, {phase}")
        print(f"  {'':20}{'ms':>9}{'of op':>8}{'peak MiB':>10}{'of op':>8}")
        base_time, base_peak = times.get("op", math.nan), peaks.get("op", math.nan)
        for name in steps:
            print(
                f"  {name:20}{times[name]:9.2f}{times[name] / base_time:8.2f}"
                f"{peaks[name]:10.1f}{peaks[name] / base_peak:8.2f}"
            )
        for name, ratio in wrong.items():
            print(f"  {name:20} WRONG: error {ratio:.1f} times that of the plain spelling")
            right = False
    return right


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=parse_shape, action="append", metavar=SHAPE_NAMES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports every start and stop
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    right = [
        compare(size, DTYPES[options.dtype], options.repeats, options.warmups)
        for size in options.size or map(parse_shape, SIZES)
    ]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
