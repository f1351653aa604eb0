"""The Triton kernels, one by one, on a GPU: time and rate, against cuBLAS in the same run.

    python benchmarks/kernels.py                                  # the tiles that `choose` gives
    python benchmarks/kernels.py --sweep                          # and their alternatives
    python benchmarks/kernels.py --sweep --only up,down --shape 8,4096,16,64,8,171
    python benchmarks/kernels.py --few 1,16,64,256                # the forward of few tokens

Every contender runs once per repeat, in turn, so that a drift of the clocks slows all of them
alike; the table shows medians. A rate counts the products that a kernel executes: three in the
forward and in dV, five in dQ and in dK with dU. `host` is the time until a launch returns. A
contender whose error exceeds twice that of plain PyTorch in the same dtype shows RED instead of
figures, and the script ends with status 1; one that does not compile or launch is reported and
skipped. On Hopper the forward is Gluon's (warps x 64 tokens); plain Triton's is shown beside it.

`--few` measures a decoding step instead: CUDA graphs over several sets of weights, more than the
cache holds, and the rate at which these are read, against that of a large copy.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mhf_compiler.lowering import kernels
from mhf_compiler.lowering.kernels.backward_pass import run_down, run_query, run_up
from mhf_compiler.lowering.kernels.forward_pass import run_forward
from mhf_compiler.lowering.kernels.launching import Problem, capability
from mhf_compiler.lowering.kernels.tiles import (
    Kernel,
    PipelinedTile,
    Tile,
    choose,
    choose_pipelined,
)

SHAPE_NAMES = "B,L,H,d,E,f"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KERNELS: dict[Kernel, tuple[int, str]] = {  # products executed, gradients written
    "forward": (3, "out"),
    "query": (5, "dq dr"),
    "down": (3, "dv"),
    "up": (5, "dk du"),
}
ROUTERS = ("networks", "tokens", "pointer")

# Alternatives to the chosen tile: (tokens, hidden, warps, stages).
SWEEP: dict[Kernel, list[tuple[int, int, int, int]]] = {
    "forward": [
        (128, 64, 8, 4), (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 4),
        (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 3), (256, 32, 8, 2), (256, 64, 8, 2),
        (64, 64, 4, 4),
    ],
    "query": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2),
        (128, 128, 8, 2), (64, 64, 8, 2), (64, 128, 4, 2),
    ],
    "down": [
        (128, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 8, 4), (128, 64, 4, 2),
        (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (32, 128, 8, 4),
    ],
    "up": [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 4), (64, 64, 4, 2),
        (128, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 1),
    ],
}  # fmt: skip


@dataclass
class Contender:
    """One kernel with one tile and one layout of R."""

    kernel: Kernel
    tile: Tile | PipelinedTile
    router: str
    chosen: bool
    call: Callable[[], None]
    outputs: list[Tensor]
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    host_microseconds: list[float] = dataclasses.field(default_factory=list)
    fault: str | None = None


def main() -> int:
    arguments = parse_arguments()
    torch.manual_seed(0)
    if arguments.few:
        return measure_few_tokens(arguments)
    problem, grad_out = make_problem(arguments.shape, DTYPES[arguments.dtype])
    contenders = [
        contender
        for kernel in arguments.only
        for contender in make_contenders(kernel, problem, grad_out, arguments.sweep)
    ]
    expected = expected_outputs(problem, grad_out)
    for contender in contenders:
        check(contender, expected, problem)
    gemm = time_all([c for c in contenders if c.fault is None], arguments.repeats)
    report(contenders, problem, gemm)
    return int(any(c.fault is not None and c.fault.startswith("RED") for c in contenders))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8,4096,16,128,22,256", help=SHAPE_NAMES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--sweep", action="store_true", help="also time alternative tiles")
    parser.add_argument("--only", default=",".join(KERNELS), help="kernels, comma-separated")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--few", help="numbers of tokens, comma-separated: measure those instead")
    arguments = parser.parse_args()
    arguments.shape = [int(size) for size in arguments.shape.split(",")]
    if len(arguments.shape) != 6:
        parser.error(f"--shape takes {SHAPE_NAMES}")
    arguments.only = arguments.only.split(",")
    if not set(arguments.only) <= set(KERNELS):
        parser.error(f"--only takes some of {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    return arguments


def make_problem(shape: list[int], dtype: torch.dtype) -> tuple[Problem, Tensor]:
    b, l, h, d, e, f = shape  # noqa: E741
    q, grad_out = (torch.randn(b, l, h, d, device="cuda", dtype=dtype) for _ in range(2))
    k, u = (torch.randn(h, e, f, d, device="cuda", dtype=dtype) / d**0.5 for _ in range(2))
    v = torch.randn(h, e, f, d, device="cuda", dtype=dtype) / f**0.5
    r = torch.rand(b, l, h, e, device="cuda")
    return Problem(q, k, u, v, r, None, None, None, "silu", 1.0, 1.0, 1.0), grad_out


def with_router(problem: Problem, layout: str) -> Problem:
    """R with sub-networks or with tokens contiguous; "pointer": the latter, misaligned for TMA."""
    assert problem.r is not None
    if layout == "networks":
        return problem
    b, l, h, e = problem.r.shape  # noqa: E741
    offset = int(layout == "pointer")
    memory = torch.empty(problem.r.numel() + offset, device="cuda", dtype=problem.r.dtype)[offset:]
    r = memory.view(h, e, b, l).permute(2, 3, 0, 1)
    return problem._replace(r=r.copy_(problem.r))


def make_contenders(
    kernel: Kernel, problem: Problem, grad_out: Tensor, sweep: bool
) -> list[Contender]:
    batch, length, heads, width = problem.q.shape
    chosen = choose(
        kernel,
        tokens=batch * length,
        heads=heads,
        hidden=problem.k.shape[2],
        width=width,
        itemsize=problem.q.element_size(),
        capability=capability(problem.q.device),
    )
    usual = "networks" if kernel == "forward" else "tokens"  # what the entry points hand over
    entries: list[tuple[Tile | PipelinedTile, str]] = [(chosen, usual)]
    pipelined = choose_pipelined(
        tokens=batch * length,
        hidden=problem.k.shape[2],
        width=width,
        itemsize=problem.q.element_size(),
        capability=capability(problem.q.device),
    )
    if kernel == "forward" and pipelined is not None:
        entries.insert(0, (pipelined, usual))
    if sweep:
        entries += [(chosen, router) for router in ROUTERS if router != usual]
        entries += [(dataclasses.replace(chosen, descriptors=False), usual)]
        others = [Tile(*sizes, descriptors=chosen.descriptors) for sizes in SWEEP[kernel]]
        entries += [(tile, usual) for tile in others if tile != chosen]
    outputs = allocate(kernel, problem)  # shared: every contender is checked right after its run
    return [
        make_contender(kernel, with_router(problem, router), grad_out, outputs, tile, router, not i)
        for i, (tile, router) in enumerate(entries)
    ]


def allocate(kernel: Kernel, problem: Problem) -> list[Tensor]:
    like = {
        "forward": [problem.q],
        "query": [problem.q, problem.r],
        "down": [problem.v],
        "up": [problem.k, problem.u],
    }
    return [torch.empty_like(x) for x in like[kernel] if x is not None]


def make_contender(
    kernel: Kernel,
    problem: Problem,
    grad_out: Tensor,
    outputs: list[Tensor],
    tile: Tile | PipelinedTile,
    router: str,
    chosen: bool,
) -> Contender:
    def call() -> None:
        if isinstance(tile, PipelinedTile):
            run_pipelined(problem, outputs[0], tile)
        elif kernel == "forward":
            run_forward(problem, outputs[0], tile)
        elif kernel == "query":
            run_query(problem, grad_out, outputs[0], outputs[1], tile)
        elif kernel == "down":
            run_down(problem, grad_out, outputs[0], tile)
        else:
            run_up(problem, grad_out, outputs[0], outputs[1], None, None, tile)

    return Contender(kernel, tile, router, chosen, call, outputs)


def run_pipelined(problem: Problem, out: Tensor, tile: PipelinedTile) -> None:
    from mhf_compiler.lowering.kernels.hopper_forward import plan, run_hopper_forward

    planned = plan(problem, out, tile)
    if planned is None:
        raise ValueError("the kernel does not take these tensors")
    run_hopper_forward(problem, out, planned)


def plain(q: Tensor, k: Tensor, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """One einsum per sub-network and projection, in the dtype of its inputs."""
    out = torch.zeros_like(q)
    for e in range(k.shape[1]):
        gate = torch.einsum("blhd,hfd->blhf", q, k[:, e])
        up = torch.einsum("blhd,hfd->blhf", q, u[:, e])
        down = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, v[:, e])
        out = out + (r[..., e].unsqueeze(-1) * down).to(out.dtype)
    return out


def slices(problem: Problem, grad_out: Tensor) -> dict[str, list[Tensor]]:
    """Two small problems whose results are parts of the whole one's.

    A token's output and gradients need no other token; a sub-network's gradients no other network.
    """
    q, k, u, v, r = problem[:5]
    assert u is not None
    assert r is not None
    tokens, network = slice(-256, None), slice(-1, None)
    return {
        "tokens": [q[-1:, tokens], k, u, v, r[-1:, tokens], grad_out[-1:, tokens]],
        "network": [
            q[:, :, network],
            *(x[network, network] for x in (k, u, v)),
            r[:, :, network, network],
            grad_out[:, :, network],
        ],
    }


def expected_outputs(problem: Problem, grad_out: Tensor) -> dict[str, tuple[Tensor, float]]:
    """For each result: its part's float32 value, and the error that plain PyTorch makes there."""
    computed: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, problem.q.dtype):
        results: dict[str, Tensor] = {}
        for part, tensors in slices(problem, grad_out).items():
            *inputs, grad = (x.to(dtype) for x in tensors)
            inputs[4] = tensors[4].float()
            inputs = [x.detach().requires_grad_() for x in inputs]
            out = plain(*inputs)
            grads = torch.autograd.grad(out, inputs, grad)
            if part == "tokens":
                results |= {"out": out.detach(), "dq": grads[0], "dr": grads[4]}
            else:
                results |= dict(zip(("dk", "du", "dv"), grads[1:4], strict=True))
        computed.append(results)
    exact, rounded = computed
    return {name: (exact[name], relative_error(rounded[name], exact[name])) for name in exact}


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


def check(
    contender: Contender, expected: dict[str, tuple[Tensor, float]], problem: Problem
) -> None:
    """Run once on poisoned outputs; note what fails to run or is wrong."""
    for output in contender.outputs:
        output.fill_(float("nan"))
    try:
        contender.call()
        torch.cuda.synchronize()
    except Exception as reason:
        contender.fault = f"{type(reason).__name__}: {' '.join(str(reason).split())[:90]}"
        return
    for name, output in zip(KERNELS[contender.kernel][1].split(), contender.outputs, strict=True):
        exact, allowed = expected[name]
        part = output[-1:, -256:] if name in ("out", "dq", "dr") else output[-1:, -1:]
        error = relative_error(part, exact)
        floor = 1e-6  # float32 against itself
        if not output.isfinite().all() or not error <= max(2 * allowed, floor):
            contender.fault = f"RED: {name} errs by {error:.1e}, plain PyTorch by {allowed:.1e}"
            return


def time_all(contenders: list[Contender], repeats: int) -> float:
    """Fill in the contenders' times; returns cuBLAS's rate in TFLOP/s."""
    m, k, n = 32768, 2048, 5504
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    gemm = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    gemm_times: list[float] = []
    for repeat in range(-2, repeats):  # two rounds of warming up
        elapsed, _ = time_once(lambda: torch.mm(a, b, out=gemm))
        if repeat >= 0:
            gemm_times.append(elapsed)
        for contender in contenders:
            elapsed, host = time_once(contender.call)
            if repeat >= 0:
                contender.milliseconds.append(elapsed)
                contender.host_microseconds.append(host)
    return 2 * m * k * n / statistics.median(gemm_times) / 1e9


def time_once(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds on the device, microseconds until the launch returned."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    before = time.perf_counter()
    call()
    host = (time.perf_counter() - before) * 1e6
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def report(contenders: list[Contender], problem: Problem, gemm: float) -> None:
    batch, length, heads, width = problem.q.shape
    networks, hidden = problem.k.shape[1:3]
    product = 2 * batch * length * heads * networks * hidden * width
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuBLAS {gemm:.0f} TFLOP/s")
    print(f"{SHAPE_NAMES} = {[batch, length, heads, width, networks, hidden]}, {problem.q.dtype}")
    print("R with networks or tokens contiguous; * marks the chosen tile\n")
    header = f"{'kernel':8} {'tokens x hidden':>15} warps stages {'R':8} {'access':7}"
    print(f"{header} {'ms':>8} {'TFLOP/s':>8} {'cuBLAS':>6} {'host us':>8}")
    for c in contenders:
        tile = c.tile
        if isinstance(tile, PipelinedTile):
            tokens, warps, access = 64 * tile.consumers, 4 * tile.consumers + 1, "gluon"
        else:
            tokens, warps = tile.tokens, tile.warps
            access = "tma" if tile.descriptors else "pointer"
        row = f"{c.kernel:8} {tokens:7} x {tile.hidden:5} {warps:5} {tile.stages:6}"
        row = f"{row} {c.router:8} {access:7}"
        if c.fault is not None:
            print(f"{row} {c.fault}")
            continue
        elapsed = statistics.median(c.milliseconds)
        rate = KERNELS[c.kernel][0] * product / elapsed / 1e9
        host = statistics.median(c.host_microseconds)
        mark = " *" if c.chosen else ""
        print(f"{row} {elapsed:8.3f} {rate:8.0f} {rate / gemm:6.0%} {host:8.0f}{mark}")


def copy_rate() -> float:
    """GB/s read and written by a large copy."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = [time_once(lambda: target.copy_(source))[0] for _ in range(7)]
    return 2 * source.numel() * source.element_size() / statistics.median(times[2:]) / 1e6


def measure_few_tokens(arguments: argparse.Namespace) -> int:
    """A layer's forward by the number of tokens: microseconds, and the rate of reading weights."""
    _, _, heads, width, networks, hidden = arguments.shape
    dtype = DTYPES[arguments.dtype]
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    weights: list[list[Tensor]] = []
    size = 3 * heads * networks * hidden * width * dtype.itemsize
    for _ in range(2 + 2 * cache // size):
        problem, _ = make_problem([1, 1, heads, width, networks, hidden], dtype)
        assert problem.u is not None
        weights.append([problem.k, problem.u, problem.v])
    copy = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copying at {copy:.0f} GB/s")
    print(
        f"{size / 1e6:.1f} MB of weights, {arguments.dtype}\n\n{'tokens':>6} {'us':>8} {'GB/s':>6}"
    )
    red = 0
    for tokens in map(int, arguments.few.split(",")):
        q = torch.randn(tokens, 1, heads, width, device="cuda", dtype=dtype)
        r = torch.rand(tokens, 1, heads, networks, device="cuda")
        out = torch.full_like(q, float("nan"))

        def step(q: Tensor = q, r: Tensor = r, out: Tensor = out) -> None:
            for k, u, v in weights:
                kernels.forward(q, k, u, v, r, None, None, None, out, activation="silu")

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        exact = plain(*(x.float() for x in (q, *weights[-1], r)))
        rounded = plain(q, *weights[-1], r)
        error, allowed = relative_error(out, exact), 2 * relative_error(rounded, exact)
        if not error <= max(allowed, 1e-6):
            print(f"{tokens:6} RED: errs by {error:.1e}, plain PyTorch by {allowed / 2:.1e}")
            red = 1
            continue
        times = [time_once(graph.replay)[0] for _ in range(arguments.repeats + 2)][2:]
        elapsed = statistics.median(times) / len(weights)
        rate = size / elapsed / 1e6
        print(f"{tokens:6} {elapsed * 1e3:8.1f} {rate:6.0f} {rate / copy:6.0%}")
    return red


if __name__ == "__main__":
    sys.exit(main())
