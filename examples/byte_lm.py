"""Train a byte-level FlashMHF language model three times and compare the runs.

The model is the architecture of the FlashMHF paper (arXiv 2512.06989) written in plain PyTorch:
pre-norm blocks of causal self-attention and a multi-head FFN with routed sub-networks. It knows
nothing of the compiler. The same weights see the same batches once in eager mode, once under
``torch.compile(model, backend="inductor")`` and once under
``torch.compile(model, backend="flashmhf")``, each in a process of its own. The script then prints
a table, samples some text from the last model, and draws the loss curves::

    python examples/byte_lm.py                      # a small model on a CPU, the paper's on a GPU
    python examples/byte_lm.py --size paper-128m --precision bf16 --steps 200

The training text is the source of Python's own standard library, so nothing is downloaded.
The exit status is 1 when the loss curves differ by more than rounding explains, or when the
``flashmhf`` run replaced no multi-head FFN.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]

BACKENDS = ("eager", "inductor", "flashmhf")
PRECISIONS = ("fp32", "autocast-bf16", "bf16")
VOCABULARY = 256
WARMUP_STEPS = 3  # the first compiles, the next two settle allocators and clocks
SAMPLE_BYTES = 160
PROMPT = b"def read_file(path, mode="

# Every run computes the same function in another order of operations, so single losses differ by
# rounding only: 2**-24 relative in float32 and 2**-8 in bfloat16. Training feeds each difference
# back through the weights, and Adam's division by a small second moment amplifies it in the first
# steps. The tolerances leave room for that growth, and none for a wrong formula: an error in one
# activation or one router weight moves the curves by far more.
LOSS_TOLERANCE = {"fp32": 5e-3, "autocast-bf16": 5e-2, "bf16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model with the shape of its training batches."""

    d_model: int
    layers: int
    attention_heads: int
    ffn_heads: int
    sub_networks: int
    hidden: int  # of one sub-network of one head
    batch: int
    length: int
    steps: int
    learning_rate: float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.ffn_heads


SIZES = {
    "demo": Size(
        d_model=128,
        layers=3,
        attention_heads=4,
        ffn_heads=4,
        sub_networks=4,
        hidden=64,
        batch=8,
        length=256,
        steps=120,
        learning_rate=2e-3,
    ),
    "paper-128m": Size(
        d_model=768,
        layers=10,
        attention_heads=12,
        ffn_heads=8,
        sub_networks=8,
        hidden=256,
        batch=16,
        length=1024,
        steps=300,
        learning_rate=6e-4,
    ),
}


# ------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis; a weight of shape [H, d] makes it one norm a head."""

    def __init__(self, *shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    cos: Tensor  # [length, width / 2], and so is sin
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.attention_heads
        self.qkv_proj = nn.Linear(size.d_model, 3 * size.d_model, bias=False)
        self.out_proj = nn.Linear(size.d_model, size.d_model, bias=False)
        width = size.d_model // size.attention_heads
        frequency = 10_000.0 ** (-torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(size.length).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.float().chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        qkv = self.qkv_proj(x).view(b, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, L, width]
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(b, length, -1))


class MultiHeadFFN(nn.Module):
    """The paper's feed-forward network: H heads, each with E routed SwiGLU sub-networks."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.ffn_heads
        self.sub_networks = size.sub_networks
        self.hidden = size.hidden
        self.head_dim = d = size.head_dim
        rows = self.heads * self.sub_networks * self.hidden
        self.in_proj = nn.Linear(size.d_model, size.d_model, bias=False)
        self.q_norm = RMSNorm(self.heads, d)
        self.router = nn.Parameter(torch.randn(self.heads, d, self.sub_networks) * d**-0.5)
        self.gate_weight = nn.Parameter(torch.randn(rows, d) * d**-0.5)
        self.up_weight = nn.Parameter(torch.randn(rows, d) * d**-0.5)
        self.down_weight = nn.Parameter(torch.randn(rows, d) * self.hidden**-0.5)
        self.out_proj = nn.Linear(size.d_model, size.d_model, bias=False)

    def route(self, q: Tensor) -> Tensor:
        """How much each sub-network counts; float32 whatever the precision of the model."""
        with torch.autocast(q.device.type, enabled=False):
            logits = torch.einsum("blhd,hde->blhe", q.float(), self.router.float())
            weights = logits.sigmoid()
            return weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)

    def forward(self, x: Tensor) -> Tensor:
        b, length, d_model = x.shape
        q = self.in_proj(x).view(b, length, self.heads, self.head_dim)  # [B, L, H, d]
        q = self.q_norm(q)
        r = self.route(q)  # [B, L, H, E]

        shape = (self.heads, self.sub_networks, self.hidden, self.head_dim)
        gate_weight = self.gate_weight.view(shape)  # [H, E, f, d]
        up_weight = self.up_weight.view(shape)
        down_weight = self.down_weight.view(shape)

        out = torch.zeros_like(q, dtype=torch.float32)  # [B, L, H, d]
        for e in range(self.sub_networks):
            gate = torch.einsum("blhd,hfd->blhf", q, gate_weight[:, e])
            up = torch.einsum("blhd,hfd->blhf", q, up_weight[:, e])
            hidden = F.silu(gate) * up  # [B, L, H, f]
            y = torch.einsum("blhf,hfd->blhd", hidden, down_weight[:, e])
            out += r[..., e, None] * y
        return self.out_proj(out.to(q.dtype).view(b, length, d_model))


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(size.d_model)
        self.attention = Attention(size)
        self.ffn_norm = RMSNorm(size.d_model)
        self.ffn = MultiHeadFFN(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class ByteLM(nn.Module):
    """A causal language model over bytes: tokens [B, L] in, logits [B, L, 256] out."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.d_model)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.d_model)
        self.head = nn.Linear(size.d_model, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Attention | MultiHeadFFN):
                # Residual branches start small, so that depth does not scale the activations.
                std = 0.02 / math.sqrt(2 * size.layers)
                nn.init.normal_(module.out_proj.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -------------------------------------------------------------------------------------- the text


def load_text(limit: int = 600_000) -> tuple[Tensor, Tensor]:
    """Training and held-out bytes: the standard library's sources by name, the last tenth kept."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    else:
        raise SystemExit(f"the standard library's sources hold {len(text)} bytes, not {limit}")
    data = torch.frombuffer(text[:limit], dtype=torch.uint8)
    return data[: limit * 9 // 10], data[limit * 9 // 10 :]


def batches(text: Tensor, batch: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, targets), both [B, L]; a seed fixes the sequence whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(length + 1)
    while True:
        start = torch.randint(len(text) - length, (batch, 1), generator=generator)
        chunk = text[start + window].long()  # [B, L + 1]
        yield chunk[:, :-1], chunk[:, 1:]


# --------------------------------------------------------------------------------- one training run


@dataclasses.dataclass
class Run:
    """What one backend's process reports."""

    backend: str
    losses: list[float]
    held_out_loss: float
    steps_per_second: float
    compile_seconds: float
    peak_bytes: int
    step_tensor_bytes: int | None
    sites_rewritten: int
    sample: str

    @property
    def final_loss(self) -> float:
        """The mean of the last ten steps: one batch alone is noise."""
        return statistics.fmean(self.losses[-10:])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_tensor_peak(step: Callable[[], object]) -> int:
    """Bytes of tensors that one more CPU step holds at its peak, over what was there before it.

    The resident set counts the compiler and freed pages too; the allocator's own events do not.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    allocations.sort(key=lambda event: float(event["ts"]))
    held = itertools.accumulate(int(event["args"]["Bytes"]) for event in allocations)
    return max(held, default=0)


@torch.no_grad()
def held_out_loss(model: Model, text: Tensor, length: int, device: torch.device) -> float:
    """Mean loss over windows of held-out text, one sequence at a time like `sample` below."""
    losses = []
    for start in range(0, 16 * length, length):
        chunk = text[start : start + length + 1].long().to(device)[None]  # [1, L + 1]
        losses.append(cross_entropy(model(chunk[:, :-1]), chunk[:, 1:]).item())
    return statistics.fmean(losses)


@torch.no_grad()
def sample(model: Model, prompt: bytes, count: int, length: int, device: torch.device) -> bytes:
    """The prompt and `count` more bytes, drawn at temperature 0.7.

    The window keeps its full length, so one compiled graph serves every step: the model is
    causal, and what follows the last byte cannot change its logits.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(count, length - len(prompt))
    window = torch.zeros(1, length, dtype=torch.long)
    window[0, : len(prompt)] = torch.tensor(list(prompt))
    for end in range(len(prompt), len(prompt) + count):
        logits = model(window.to(device))[0, end - 1].float().cpu()  # [256]
        choice = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        window[0, end] = choice.item()
    return bytes(window[0, : len(prompt) + count].tolist())


def train(backend: str, options: argparse.Namespace) -> Run:
    import psutil  # what the model and the text do not need is imported where it is used
    from tqdm import tqdm

    size, device = options.shape, torch.device(options.device)
    steps = size.steps
    warmup_steps = min(WARMUP_STEPS, steps - 1)
    train_text, held_out_text = load_text()
    source = batches(train_text, size.batch, size.length, options.seed)

    torch.manual_seed(options.seed)
    model = ByteLM(size)  # made on the CPU, so that the weights do not depend on the device
    if options.precision == "bf16":
        for parameter in model.parameters():  # not .to(): the rotary tables stay in float32
            parameter.data = parameter.data.bfloat16()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.1)
    forward: Model = model if backend == "eager" else torch.compile(model, backend=backend)
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=options.precision == "autocast-bf16"
    )

    def step(number: int) -> Tensor:
        tokens, targets = next(source)
        warmup = min(1.0, (number + 1) / 10)
        decay = 0.55 + 0.45 * math.cos(math.pi * min(1.0, number / steps))
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * warmup * decay
        with autocast:
            logits = forward(tokens.to(device))
        loss = cross_entropy(logits, targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    torch._dynamo.utils.counters.clear()
    resident = psutil.Process().memory_info().rss
    losses: list[Tensor] = []
    begin = warm = time.perf_counter()
    bar = tqdm(
        range(steps),
        desc=f"{backend:>9}",
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log keeps every line, a screen one
    )
    for number in bar:
        losses.append(step(number))
        if number == warmup_steps - 1:
            synchronize(device)
            warm = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        if number % 10 == 0 or number == steps - 1:
            bar.set_postfix(loss=f"{losses[-1].item():.3f}", refresh=False)
    synchronize(device)
    seconds = (time.perf_counter() - warm) / (steps - warmup_steps)
    if device.type == "cuda":
        peak, tensors = torch.cuda.max_memory_allocated(device), None
    else:
        # Linux counts the high-water mark in KiB.
        high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak, tensors = max(0, high - resident), step_tensor_peak(lambda: step(steps))
    sites = int(torch._dynamo.utils.counters["flashmhf"]["sites_rewritten"])

    model.eval()
    with autocast:
        held_out = held_out_loss(forward, held_out_text, size.length, device)
        text = b""
        if options.sample:
            text = sample(forward, PROMPT[: size.length], SAMPLE_BYTES, size.length, device)
    return Run(
        backend=backend,
        losses=[loss.item() for loss in losses],
        held_out_loss=held_out,
        steps_per_second=1 / seconds,
        compile_seconds=max(0.0, warm - begin - warmup_steps * seconds),
        peak_bytes=peak,
        step_tensor_bytes=tensors,
        sites_rewritten=sites,
        sample=text.decode("utf-8", errors="replace"),
    )


def train_in_process(backend: str, argv: Sequence[str], with_sample: bool) -> Run:
    """Run this script again for one backend, with compiler caches of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
            # The memory profiler logs its own start and stop, which are no news to a reader.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99"),
        }
        command = [sys.executable, __file__, *argv, "--run", backend, "--report", str(report)]
        if with_sample:
            command.append("--sample")
        if subprocess.run(command, env=environment).returncode != 0:
            raise SystemExit(f"the {backend} run failed; its messages stand above")
        return Run(**json.loads(report.read_text()))


# ------------------------------------------------------------------------------- what is reported


def largest_difference(run: Run, reference: Run) -> float:
    pairs = zip(run.losses, reference.losses, strict=True)
    return max(abs(ours - theirs) for ours, theirs in pairs)


def environment(device: str) -> dict[str, str]:
    """The machine and the versions that the figures come from."""
    versions = {"torch": str(torch.__version__)}  # says which CUDA it was built for, too
    for package in ("triton", "mhf-compiler"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else name}, {torch.get_num_threads()} threads"
    now = datetime.datetime.now(datetime.UTC)
    return versions | {
        "python": platform.python_version(),
        "device": name,
        "date": now.isoformat(timespec="seconds"),
    }


def print_table(runs: Sequence[Run], device: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    on_gpu = device.startswith("cuda")
    table = Table(
        title=f"byte-level FlashMHF language model on {environment(device)['device']}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("backend", no_wrap=True)
    headings = ["loss", "held\nout", "steps\n/ s", "compile\ns"]
    headings += ["peak\nMiB"] if on_gpu else ["RSS\nMiB", "tensors\nMiB"]
    for heading in [*headings, "sites", "max\ndiff"]:
        table.add_column(heading, justify="right", no_wrap=True)
    reference = next((run for run in runs if run.backend == "eager"), None)
    for run in runs:
        cells = [
            f"{run.final_loss:.4f}",
            f"{run.held_out_loss:.4f}",
            f"{run.steps_per_second:.2f}",
            f"{run.compile_seconds:.1f}",
            f"{run.peak_bytes / 2**20:.0f}",
        ]
        if run.step_tensor_bytes is not None:
            cells.append(f"{run.step_tensor_bytes / 2**20:.0f}")
        cells.append(str(run.sites_rewritten))
        if reference is None or run is reference:
            cells.append("-")
        else:
            cells.append(f"{largest_difference(run, reference):.1e}")
        table.add_row(run.backend, *cells)
    console = Console()
    console.print(table)
    if on_gpu:
        console.print("peak: allocated after warm-up", style="dim")
    else:
        console.print(
            "RSS: peak of the process over its size before training, compiler included; "
            "tensors: peak within one step",
            style="dim",
        )


def draw(runs: Sequence[Run], tolerance: float, path: Path) -> None:
    """The loss curves, and below them how far each is from the eager one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    styles = {"eager": ("-", 4.0), "inductor": ("-", 1.8), "flashmhf": ("--", 1.2)}
    reference = next((run for run in runs if run.backend == "eager"), None)
    for run in runs:
        dash, width = styles[run.backend]
        (line,) = top.plot(run.losses, dash, linewidth=width, label=run.backend)
        if reference is not None and run is not reference:
            pairs = zip(run.losses, reference.losses, strict=True)
            # Equal losses stand at the resolution of a float32, as far down as the axis goes.
            gaps = [max(abs(ours - theirs), 1e-7) for ours, theirs in pairs]
            bottom.plot(gaps, linewidth=1, color=line.get_color(), label=run.backend)
    top.set_ylabel("training loss (nats per byte)")
    top.legend()
    bottom.axhline(tolerance, color="grey", linestyle=":", label="tolerance")
    bottom.set_yscale("log")
    bottom.set_ylabel("difference to eager")
    bottom.set_xlabel("step")
    bottom.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def verdict(runs: Sequence[Run], tolerance: float) -> list[str]:
    """What is wrong with the runs; empty when nothing is."""
    complaints = []
    by_backend = {run.backend: run for run in runs}
    reference = by_backend.get("eager")
    for run in runs:
        if not all(map(math.isfinite, run.losses)):
            complaints.append(f"{run.backend}: the loss is not finite")
        elif reference is not None and largest_difference(run, reference) > tolerance:
            gap = largest_difference(run, reference)
            complaints.append(
                f"{run.backend}: a loss differs from eager's by {gap:.2e}, more than the "
                f"{tolerance:.0e} that rounding explains"
            )
    if "flashmhf" in by_backend and by_backend["flashmhf"].sites_rewritten == 0:
        complaints.append("flashmhf: no multi-head FFN was replaced")
    return complaints


# ------------------------------------------------------------------------------- the command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level FlashMHF language model under several backends.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--size", choices=SIZES, help="demo on a CPU, paper-128m on a GPU")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="fp32 on a CPU, autocast-bf16 on a GPU"
    )
    parser.add_argument("--steps", type=int, help="training steps; the size has a default")
    parser.add_argument("--batch", type=int, help="sequences a step; the size has a default")
    parser.add_argument("--length", type=int, help="bytes a sequence; the size has a default")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--out", type=Path, default=Path("runs/byte_lm"), help="results folder")
    # A process for one backend is this script with the three options below.
    parser.add_argument("--run", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    on_gpu = options.device.startswith("cuda")
    options.size = options.size or ("paper-128m" if on_gpu else "demo")
    options.precision = options.precision or ("autocast-bf16" if on_gpu else "fp32")
    given = {name: getattr(options, name) for name in ("steps", "batch", "length")}
    options.shape = dataclasses.replace(
        SIZES[options.size], **{name: value for name, value in given.items() if value is not None}
    )
    if options.shape.steps < 2:
        parser.error("--steps: at least 2, since the first compiles and is not timed")
    return options


def require_compiler(options: argparse.Namespace) -> None:
    """Say what is missing now rather than from within Inductor a minute later."""
    compiled = [backend for backend in options.backends if backend != "eager"]
    missing = set(compiled) - set(torch.compiler.list_backends())
    if missing:
        raise SystemExit(
            f"torch knows no backend {', '.join(sorted(missing))}: install mhf-compiler here first"
        )
    if compiled and options.device == "cpu":
        compilers = filter(None, [os.environ.get("CXX"), "g++", "clang++"])
        if not any(map(shutil.which, compilers)):
            raise SystemExit("torch.compile needs a C++ compiler on a CPU: install g++ or clang++")


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.run:
        options.report.write_text(json.dumps(dataclasses.asdict(train(options.run, options))))
        return 0

    require_compiler(options)
    last = options.backends[-1]
    runs = [
        train_in_process(backend, argv, with_sample=backend == last) for backend in options.backends
    ]
    tolerance = LOSS_TOLERANCE[options.precision]
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {
        "environment": environment(options.device),
        "size": options.size,
        "shape": dataclasses.asdict(options.shape),
        "precision": options.precision,
        "seed": options.seed,
        "tolerance": tolerance,
        "runs": [dataclasses.asdict(run) | {"final_loss": run.final_loss} for run in runs],
    }
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(runs, tolerance, options.out / "loss.png")

    print(f"\nsampled after training with {last}:\n{runs[-1].sample}\n")
    print_table(runs, options.device)
    print(f"figures and plot: {options.out}")
    complaints = verdict(runs, tolerance)
    for complaint in complaints:
        print(f"FAILED {complaint}", file=sys.stderr)
    if not complaints and len(runs) > 1 and "eager" in options.backends:
        print(f"the loss curves coincide: no step differs by more than {tolerance:.0e}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
