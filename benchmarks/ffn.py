"""The whole FFN on a GPU: the back end against eager, Inductor, a SwiGLU FFN and cuBLAS.

    python benchmarks/ffn.py                             # the 1.3B configuration of the paper
    python benchmarks/ffn.py --shape 8,1024,8,96,8,256 --phase forward
    python benchmarks/ffn.py --tokens 1,16,256,4096      # latency against the number of tokens
    python benchmarks/ffn.py --json benchmarks/results/ffn.json

The FFN is input projection, per-head RMSNorm, router, sub-networks and output projection, written
in plain PyTorch as a loop over sub-networks and with batched einsums. Every contender compiles
first, is compared with float32, and then runs once per repeat, in turn, so that a drift of the
clocks slows all alike; the table shows medians. A contender whose error exceeds twice that of the
eager loop shows RED instead of figures, and the script ends with status 1.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

SHAPE_NAMES = "B,L,H,d,E,f"
GEMM = (32768, 2048, 5504)  # the SwiGLU FFN's product at the default shape


Networks = Callable[["MultiHeadFFN", Tensor, Tensor], Tensor]


class MultiHeadFFN(nn.Module):
    """FlashMHF's FFN; ``networks`` spells the sub-networks."""

    def __init__(
        self, networks: Networks, heads: int, width: int, experts: int, hidden: int
    ) -> None:
        super().__init__()
        self.networks = networks
        model = heads * width
        self.heads, self.width, self.experts = heads, width, experts
        self.in_proj = nn.Linear(model, model, bias=False)
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(model, heads * experts, bias=False)
        shape = (heads, experts, hidden, width)
        self.gate = nn.Parameter(torch.randn(shape) / width**0.5)
        self.up = nn.Parameter(torch.randn(shape) / width**0.5)
        self.down = nn.Parameter(torch.randn(shape) / hidden**0.5)
        self.out_proj = nn.Linear(model, model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, model = x.shape
        q = self.norm(self.in_proj(x).view(batch, length, self.heads, self.width))
        scores = torch.sigmoid(self.router(x).float())
        r = scores.view(batch, length, self.heads, self.experts)
        r = r / r.sum(-1, keepdim=True).clamp_min(1e-20)
        out = self.networks(self, q, r).to(x.dtype)
        return self.out_proj(out.reshape(batch, length, model))


def loop(ffn: MultiHeadFFN, q: Tensor, r: Tensor) -> Tensor:
    """One pass per sub-network, summed in float32."""
    out = torch.zeros_like(q, dtype=torch.float32)
    for e in range(ffn.experts):
        gate = torch.einsum("blhd,hfd->blhf", q, ffn.gate[:, e])
        up = torch.einsum("blhd,hfd->blhf", q, ffn.up[:, e])
        down = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, ffn.down[:, e])
        out += r[..., e, None] * down
    return out


def batched(ffn: MultiHeadFFN, q: Tensor, r: Tensor) -> Tensor:
    """All sub-networks in one einsum per projection."""
    gate = torch.einsum("blhd,hefd->blhef", q, ffn.gate)
    up = torch.einsum("blhd,hefd->blhef", q, ffn.up)
    hidden = F.silu(gate) * up * r.to(q.dtype)[..., None]
    return torch.einsum("blhef,hefd->blhd", hidden, ffn.down)


class SwiGLU(nn.Module):
    """The usual FFN with about as many weights as the MH-FFN."""

    def __init__(self, model: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(model, hidden, bias=False)
        self.up = nn.Linear(model, hidden, bias=False)
        self.down = nn.Linear(hidden, model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass
class Contender:
    """One module under one compiler, with what was measured of it."""

    name: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    is_multi_head: bool = True
    compile_seconds: float = 0.0
    error: float = float("nan")
    peak_mebibytes: float = float("nan")
    milliseconds: list[float] = field(default_factory=list)
    fault: str | None = None


def main() -> int:
    arguments = parse_arguments()
    rows: list[dict[str, object]] = []
    right = True
    batch, length, *sizes = arguments.shape
    shapes = [(1, tokens) for tokens in arguments.tokens] or [(batch, length)]
    for tokens in shapes:
        for phase in arguments.phase:
            contenders = compare([*tokens, *sizes], phase, arguments)
            right = right and not any(c.fault for c in contenders)
            rows += [as_row(c, [*tokens, *sizes], phase) for c in contenders]
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(machine() | {"rows": rows}, indent=2) + "\n")
    return 0 if right else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8,4096,16,128,22,256", help=SHAPE_NAMES)
    parser.add_argument("--tokens", default="", help="numbers of tokens, in place of B and L")
    parser.add_argument("--phase", default="forward,training", help="some of forward, training")
    parser.add_argument("--mode", default=None, help="a mode of torch.compile for all")
    parser.add_argument("--no-loop", action="store_true", help="leave the loops out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.shape = [int(size) for size in arguments.shape.split(",")]
    if len(arguments.shape) != 6:
        parser.error(f"--shape takes {SHAPE_NAMES}")
    arguments.tokens = [int(tokens) for tokens in arguments.tokens.split(",") if tokens]
    arguments.phase = arguments.phase.split(",")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    return arguments


def compare(shape: list[int], phase: str, arguments: argparse.Namespace) -> list[Contender]:
    torch.manual_seed(0)
    batch, length, heads, width, *_ = shape
    model = heads * width
    contenders = make_contenders(shape, arguments)
    x = torch.randn(batch, length, model, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    exact = reference(contenders[0].module, x)
    allowed = relative_error(contenders[0].module(x[-1:, -64:]).detach(), exact)
    for contender in contenders:
        prepare(contender, x, grad, phase)
        if contender.is_multi_head:
            check(contender, x, exact, allowed)
    gemm = time_all([c for c in contenders if c.fault is None], x, grad, phase, arguments.repeats)
    report(contenders, shape, phase, gemm)
    return contenders


def make_contenders(shape: list[int], arguments: argparse.Namespace) -> list[Contender]:
    _, _, heads, width, experts, hidden = shape
    looped = MultiHeadFFN(loop, heads, width, experts, hidden).to("cuda", torch.bfloat16)
    einsums = MultiHeadFFN(batched, heads, width, experts, hidden).to("cuda", torch.bfloat16)
    einsums.load_state_dict(looped.state_dict())
    model = heads * width
    swiglu = SwiGLU(model, 128 * round(experts * hidden / 128)).to("cuda", torch.bfloat16)
    torch.compiler.reset()

    def compiled(module: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
        options = {"rewrite": "always"} if backend == "flashmhf" else None
        if options is not None and arguments.mode is not None:
            options["mode"] = arguments.mode
            return torch.compile(module, backend=backend, options=options)
        mode = None if options is not None else arguments.mode
        return torch.compile(module, backend=backend, options=options, mode=mode)

    contenders = [
        Contender("eager, loop", looped, looped),
        Contender("Inductor, loop", looped, compiled(looped, "inductor")),
        Contender("Inductor, batched", einsums, compiled(einsums, "inductor")),
        Contender("flashmhf, loop", looped, compiled(looped, "flashmhf")),
        Contender("flashmhf, batched", einsums, compiled(einsums, "flashmhf")),
        Contender("SwiGLU, Inductor", swiglu, compiled(swiglu, "inductor"), is_multi_head=False),
    ]
    if arguments.no_loop:
        contenders = [c for c in contenders if "loop" not in c.name or c.name == "eager, loop"]
    return contenders


def reference(module: nn.Module, x: Tensor) -> Tensor:
    """The last 64 tokens' output in float32."""
    exact = MultiHeadFFN(loop, module.heads, module.width, module.experts, module.gate.shape[2])  # type: ignore[arg-type, union-attr, index]
    exact.load_state_dict(module.state_dict())
    with torch.no_grad():
        return exact.to("cuda", torch.float32)(x[-1:, -64:].float())


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


def step(contender: Contender, x: Tensor, grad: Tensor, phase: str) -> None:
    if phase == "forward":
        with torch.no_grad():
            contender.call(x)
    else:
        contender.module.zero_grad(set_to_none=True)
        contender.call(x.detach().requires_grad_()).backward(grad)


def prepare(contender: Contender, x: Tensor, grad: Tensor, phase: str) -> None:
    """Compile, and measure the peak memory of one step above what lies there anyway."""
    before = time.perf_counter()
    step(contender, x, grad, phase)
    torch.cuda.synchronize()
    contender.compile_seconds = time.perf_counter() - before
    contender.module.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    at_rest = torch.cuda.memory_allocated()
    step(contender, x, grad, phase)
    contender.peak_mebibytes = (torch.cuda.max_memory_allocated() - at_rest) / 2**20
    contender.module.zero_grad(set_to_none=True)


def check(contender: Contender, x: Tensor, exact: Tensor, allowed: float) -> None:
    with torch.no_grad():
        found = contender.call(x)[-1:, -64:]
    contender.error = relative_error(found, exact)
    if not contender.error <= 2 * allowed:
        contender.fault = f"RED: errs by {contender.error:.1e}, the eager loop by {allowed:.1e}"


def time_all(
    contenders: list[Contender], x: Tensor, grad: Tensor, phase: str, repeats: int
) -> float:
    """Fill in the contenders' times; returns cuBLAS's rate in TFLOP/s."""
    m, k, n = GEMM
    a, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((m, k), (k, n)))
    product = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    gemm: list[float] = []
    for repeat in range(-2, repeats):  # two rounds of warming up
        elapsed = milliseconds(lambda: torch.mm(a, b, out=product))
        if repeat >= 0:
            gemm.append(elapsed)
        for contender in contenders:
            elapsed = milliseconds(lambda c=contender: step(c, x, grad, phase))  # type: ignore[misc]
            if repeat >= 0:
                contender.milliseconds.append(elapsed)
    return 2 * m * k * n / statistics.median(gemm) / 1e9


def milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def report(contenders: list[Contender], shape: list[int], phase: str, gemm: float) -> None:
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, cuBLAS {gemm:.0f} TFLOP/s")
    print(f"{SHAPE_NAMES} = {shape}, bfloat16, {phase}")
    print(f"  {'':20} {'ms':>9} {'of flashmhf':>11} {'peak MiB':>9} {'error':>8} {'compile s':>9}")
    ours = [c for c in contenders if c.name == "flashmhf, batched" and c.fault is None]
    for c in contenders:
        if c.fault is not None:
            print(f"  {c.name:20} {c.fault}")
            continue
        elapsed = statistics.median(c.milliseconds)
        ratio = elapsed / statistics.median(ours[0].milliseconds) if ours else float("nan")
        print(
            f"  {c.name:20} {elapsed:9.3f} {ratio:11.2f} {c.peak_mebibytes:9.0f} "
            f"{c.error:8.1e} {c.compile_seconds:9.1f}"
        )


def as_row(contender: Contender, shape: list[int], phase: str) -> dict[str, object]:
    row = dataclasses.asdict(
        dataclasses.replace(contender, module=nn.Identity(), call=nn.Identity())
    )
    for key in ("module", "call", "milliseconds"):
        del row[key]
    times = contender.milliseconds
    timed = {"median_ms": statistics.median(times), "min_ms": min(times)} if times else {}
    return {"shape": dict(zip(SHAPE_NAMES.split(","), shape, strict=True)), "phase": phase} | (
        row | timed
    )


def machine() -> dict[str, str]:
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
