"""``python -m tests.fuzz.gpu --number 3000``: random networks through the whole back end, on a GPU.

Each program is compiled as a user would: Dynamo, the rewriting, autograd, Inductor and the passes
over its graphs, our kernels and Inductor's, with or without CUDA graphs. Outputs and all gradients
are compared with float32 by the two-times rule of docs/numerics.md, for several draws of inputs.

A seed is a program. Six seeds in a row share a network, whose kernels are compiled once, and differ
in everything around it: tokens, norm, projections, router, spelling, what else is returned, mode.

Every program runs twice: while the other workers use the card, and while they are kept off it
(except for what they launch in order to compile).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

USES = 6  # programs that share a network
_DRAWS = 3  # of inputs, for each program and each of its two runs
_MOST_HIDDEN = 2e8  # hidden units in all, so that eager's fit and are quick

# A gradient that comes from fewer weights of a router than this, such as those of one token, is as
# exact as their roundings happen to be. So eager's error is the largest of so many draws.
_FEW = 64
_MORE_DRAWS = 16

_WORST = 4  # times the largest error of a token in eager's: its worst may be another one

# What an error may be in addition to twice eager's, which can be 0.
_ROUNDING = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 2e-6}

Values = list[Tensor | None]  # outputs, and in training the gradients

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda r: r.softmax(-1),
    "sigmoid": torch.sigmoid,
    "normalised": lambda r: r.sigmoid() / r.sigmoid().sum(-1, keepdim=True).clamp_min(1e-20),
}

# (sequences, length): single tokens, short and long sequences, most of them of odd lengths.
TOKENS = (
    (1, 1), (1, 7), (2, 33), (4, 1), (64, 1), (1, 128), (3, 129), (2, 257), (5, 300), (1, 1000),
    (2, 1024), (4, 777), (3, 1366), (1, 4096),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What the op's kernels are compiled for."""

    dtype: torch.dtype
    heads: int
    groups: int
    head_dim: int
    sub_networks: int
    hidden: int
    activation: str
    gated: bool
    biased: bool
    routed: bool


@dataclass(frozen=True)
class Use:
    """What surrounds the network, and how it is run."""

    batch: int
    length: int
    norm: str  # "", "rms" or "layer"
    projected: bool
    projection_bias: bool
    router: str
    wide_router: bool  # logits in float32
    looped: bool  # over sub-networks, instead of one batched einsum
    wide_sum: bool  # the loop's sum in float32
    heads_first: bool  # queries stored by heads
    returns: str  # "out", "residual", "queries too"
    mode: str  # "inference", "training", and with " graphs" under reduce-overhead
    autocast: bool
    columns: bool  # weights stored as [..., d, f], and read transposed
    twice: bool  # a second network reads the same queries
    frozen: bool  # the weights of the gate need no gradient
    offset: int  # of the input in its buffer, in elements: 1 is aligned to nothing
    dynamic: bool  # the length is a symbol


def draw(seed: int) -> tuple[Sizes, Use]:
    """The program of a seed."""
    rng = Random(f"network {seed // USES}")
    heads = rng.choice([1, 2, 3, 4, 8, 16])
    groups = rng.choice([g for g in {1, 2, heads} if heads % g == 0])
    sizes = Sizes(
        dtype=rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        heads=heads,
        groups=groups,
        head_dim=rng.choice([8, 16, 24, 32, 40, 64, 72, 96, 128, 128, 160, 192, 256, 320, 512]),
        # One of everything is a plain FFN.
        sub_networks=rng.choice([1, 2, 3, 8] if groups > 1 else [2, 3, 8]),
        hidden=rng.choice([16, 48, 64, 100, 128, 171, 256, 341, 512]),
        activation=rng.choice(["silu", "silu", *ACTIVATIONS]),
        gated=rng.random() < 0.75,
        biased=rng.random() < 0.25,
        routed=rng.random() < 0.8,
    )
    rng = Random(f"use {seed}")
    units = heads * sizes.sub_networks * sizes.hidden
    batch, length = rng.choice([t for t in TOKENS if t[0] * t[1] * units <= _MOST_HIDDEN])
    modes = ["inference", "inference", "training", "training", "inference graphs"]
    mode = rng.choice([*modes, "training graphs"])
    use = Use(
        batch=batch,
        length=length,
        norm=rng.choice(["", "rms", "rms", "layer"]),
        projected=rng.random() < 0.7,
        projection_bias=rng.random() < 0.3,
        router=rng.choice(sorted(ROUTERS)),
        wide_router=rng.random() < 0.5,
        looped=rng.random() < 0.5,
        wide_sum=rng.random() < 0.5,
        heads_first=rng.random() < 0.3,
        returns=rng.choice(["out", "out", "residual", "queries too"]),
        mode=mode,
        autocast=rng.random() < 0.5 and sizes.dtype is torch.float32,
        columns=rng.random() < 0.25,
        twice=rng.random() < 0.15,
        frozen=rng.random() < 0.15 and mode.startswith("training"),
        offset=rng.choice([0, 0, 0, 1, 8]),
        dynamic=rng.random() < 0.15 and not mode.endswith("graphs") and length > 1,
    )
    return sizes, use


class Network(nn.Module):
    """A multi-head FFN, [B, L, H, d] to the same."""

    def __init__(self, sizes: Sizes, use: Use) -> None:
        super().__init__()
        self.sizes, self.use = sizes, use
        d, f = sizes.head_dim, sizes.hidden
        shape = (sizes.groups, sizes.sub_networks)

        def parameter(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size) * scale)

        def weights(scale: float) -> nn.Parameter:
            return parameter(*shape, *((d, f) if use.columns else (f, d)), scale=scale)

        self.gate = weights(d**-0.5).requires_grad_(not use.frozen)
        self.up = weights(d**-0.5) if sizes.gated else None
        self.down = weights(f**-0.5)
        if sizes.routed:
            self.router = parameter(sizes.heads, d, sizes.sub_networks, scale=d**-0.5)
        biases = [parameter(*shape, n, scale=0.1) if sizes.biased else None for n in (f, f, d)]
        self.gate_bias, self.up_bias, self.down_bias = biases

    def forward(self, q: Tensor) -> Tensor:
        r = self.weights_of_router(q) if self.sizes.routed else None
        return self.looped(q, r) if self.use.looped else self.batched(q, r)

    def weights_of_router(self, q: Tensor) -> Tensor:
        if self.use.wide_router:
            wide = torch.promote_types(q.dtype, torch.float32)
            logits = torch.einsum("blhd,hde->blhe", q.to(wide), self.router.to(wide))
        else:
            logits = torch.einsum("blhd,hde->blhe", q, self.router)
        return ROUTERS[self.use.router](logits)

    def rows(self) -> list[Tensor | None]:
        """Gate, up and down projection of each head, [H, E, f, d]."""
        stored = (self.gate, self.up, self.down)
        return self.of_heads(
            *(p.transpose(-1, -2) if p is not None and self.use.columns else p for p in stored)
        )

    def of_heads(self, *parameters: Tensor | None) -> list[Tensor | None]:
        """One for each head, of those that heads share."""
        repeats = self.sizes.heads // self.sizes.groups
        return [
            p if p is None or repeats == 1 else p.repeat_interleave(repeats, 0) for p in parameters
        ]

    def looped(self, q: Tensor, r: Tensor | None) -> Tensor:
        gate, up, down = self.rows()
        gate_bias, up_bias, down_bias = self.of_heads(self.gate_bias, self.up_bias, self.down_bias)
        wide = torch.promote_types(q.dtype, torch.float32)
        total = torch.zeros_like(q, dtype=wide if self.use.wide_sum else q.dtype)
        for e in range(self.sizes.sub_networks):
            m = torch.einsum("blhd,hfd->blhf", q, gate[:, e])
            a = ACTIVATIONS[self.sizes.activation](m if gate_bias is None else m + gate_bias[:, e])
            if up is not None:
                n = torch.einsum("blhd,hfd->blhf", q, up[:, e])
                a = a * (n if up_bias is None else n + up_bias[:, e])
            out = torch.einsum("blhf,hfd->blhd", a, down[:, e])
            out = (out if down_bias is None else out + down_bias[:, e]).to(total.dtype)
            total = total + (out if r is None else out * r[..., e, None].to(total.dtype))
        return total.to(q.dtype)

    def batched(self, q: Tensor, r: Tensor | None) -> Tensor:
        gate, up, down = self.rows()
        gate_bias, up_bias, down_bias = self.of_heads(self.gate_bias, self.up_bias, self.down_bias)
        m = torch.einsum("blhd,hefd->blhef", q, gate)
        a = ACTIVATIONS[self.sizes.activation](m if gate_bias is None else m + gate_bias)
        if up is not None:
            n = torch.einsum("blhd,hefd->blhef", q, up)
            a = a * (n if up_bias is None else n + up_bias)
        out = torch.einsum("blhef,hefd->blhed", a, down)
        out = out if down_bias is None else out + down_bias
        return (out if r is None else out * r.unsqueeze(-1).to(out.dtype)).sum(3)


class Model(nn.Module):
    """One or two multi-head FFNs of the same queries and their surroundings, [B, L, H d]."""

    def __init__(self, sizes: Sizes, use: Use) -> None:
        super().__init__()
        self.sizes, self.use = sizes, use
        width = sizes.heads * sizes.head_dim
        if use.projected:
            self.before = nn.Linear(width, width, bias=use.projection_bias)
            self.after = nn.Linear(width, width, bias=use.projection_bias)
        if use.norm:
            self.norm = (nn.RMSNorm if use.norm == "rms" else nn.LayerNorm)(sizes.head_dim)
        self.networks = nn.ModuleList(Network(sizes, use) for _ in range(1 + use.twice))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        use = self.use
        q = self.before(x) if use.projected else x
        q = q.unflatten(-1, (self.sizes.heads, -1))
        if use.norm:
            q = self.norm(q)
        if use.heads_first:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        out = self.networks[0](q).flatten(2)
        for network in self.networks[1:]:
            out = out * network(q).flatten(2)
        out = self.after(out) if use.projected else out
        if use.returns == "residual":
            return out + x
        return (out, q.mean((0, 1))) if use.returns == "queries too" else out


@dataclass(frozen=True)
class Finding:
    """What became of one program."""

    seed: int
    reasons: tuple[str, ...] = ()  # why networks were declined
    error: str = ""
    without: str = ""  # what is wrong with Inductor alone, if anything is wrong


def check(seed: int, device: str, lock: Path) -> Finding:
    """Compile and run a program, together with others and then alone."""
    sizes, use = draw(seed)
    torch._dynamo.reset()
    counters.clear()
    tally = counters["flashmhf"]
    options = {"rewrite": "always", "strict": True}
    error = _error_of(sizes, use, device, lock, seed, backend="flashmhf", options=options)
    declined = [name for name in tally if name.startswith("declined.")]
    reasons = tuple(name.removeprefix("declined.") for name in declined)
    networks = 1 + use.twice
    if not error and tally["sites_rewritten"] != networks:
        error = f"missed: {tally['sites_rewritten']} of {networks} networks rewritten, {reasons}"
    without = ""
    if error:
        torch._dynamo.reset()
        without = _error_of(sizes, use, device, lock, seed, backend="inductor", options={})
    return Finding(seed, reasons, error, without)


def _error_of(*program: Any, **compilation: Any) -> str:
    """What is wrong with a program, compiled so: "" if nothing is."""
    try:
        _check(*program, **compilation)
    except Exception as raised:
        place = traceback.extract_tb(raised.__traceback__)[-1]
        told = " ".join(str(raised).split())[:200]
        return f"{type(raised).__name__}: {told} ({Path(place.filename).name}:{place.lineno})"
    return ""


def _check(
    sizes: Sizes,
    use: Use,
    device: str,
    lock: Path,
    seed: int,
    *,
    backend: str,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(seed)
    model = Model(sizes, use).to(device, sizes.dtype)
    # What eager is judged by as well: in its own dtype it would be without any error.
    exactly = torch.float64 if sizes.dtype is torch.float32 else torch.float32
    wide = Model(sizes, use).to(device, exactly)
    wide.load_state_dict({name: p.to(exactly) for name, p in model.state_dict().items()})
    if use.mode.endswith("graphs"):
        graphs = (
            {"mode": "reduce-overhead"} if backend == "flashmhf" else {"triton.cudagraphs": True}
        )
        options = options | graphs
    compiled = torch.compile(model, backend=backend, options=options)

    shape = use.batch, use.length, sizes.heads * sizes.head_dim
    cases = []
    for _ in range(_DRAWS):
        x = torch.randn(shape, device=device, dtype=sizes.dtype)
        exact = _step(wide, wide, x.to(exactly), use, autocast=False)
        cases.append((x, exact, _step(model, model, x, use, use.autocast)))
    usual = [0.0] * len(cases[0][1])
    if use.batch * use.length * sizes.heads * sizes.sub_networks < _FEW:
        for _ in range(_MORE_DRAWS):
            x = torch.randn(shape, device=device, dtype=sizes.dtype)
            exact = _step(wide, wide, x.to(exactly), use, autocast=False)
            errors = _differences(_step(model, model, x, use, use.autocast), exact)
            usual = [max(pair) for pair in zip(usual, errors, strict=True)]
    _step(compiled, model, cases[0][0], use, use.autocast)  # compiles, and holds nobody up
    beside_others: list[Values] = []
    with locked(lock, fcntl.LOCK_SH):
        for x, exact, eager in cases:
            beside_others.append(_step(compiled, model, x, use, use.autocast))
            _compare(beside_others[-1], eager, exact, usual, sizes, use)
    with locked(lock, fcntl.LOCK_EX):
        for (x, exact, eager), before in zip(cases, beside_others, strict=True):
            found = _step(compiled, model, x, use, use.autocast)
            _compare(found, eager, exact, usual, sizes, use)
            _compare_bits(found, before)


def _step(
    call: Callable[[Tensor], Any], model: nn.Module, x: Tensor, use: Use, autocast: bool
) -> Values:
    """Outputs and, in training, the gradients of the input and of all parameters."""
    training = use.mode.startswith("training")
    given = x
    buffer = x.new_empty(use.offset + x.numel())
    x = buffer[use.offset :].view_as(x).copy_(x).requires_grad_(training)
    if use.dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    for parameter in model.parameters():
        parameter.grad = None
    torch.compiler.cudagraph_mark_step_begin()
    with (
        torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
        torch.set_grad_enabled(training),
    ):
        returned = call(x)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    if not torch.equal(x.detach(), given):
        raise AssertionError("the input was overwritten")
    gradients: list[Tensor | None] = []
    if training:
        generator = torch.Generator(x.device).manual_seed(5)
        weights = [torch.randn(y.shape, generator=generator, device=x.device) for y in outputs]
        sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
        gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    seen = [*outputs, *gradients]
    # A clone of a tensor whose elements have memory of their own keeps its strides.
    return [None if value is None else value.detach().clone() for value in seen]


def _differences(values: Values, exact: Values) -> list[float]:
    """The norm of each value's error."""
    return [
        0.0 if value is None or wide is None else (value.to(wide.dtype) - wide).norm().item()
        for value, wide in zip(values, exact, strict=True)
    ]


def _compare(
    found: Values, eager: Values, exact: Values, usual: list[float], sizes: Sizes, use: Use
) -> None:
    """Raise where a value's error is more than twice eager's: of all, or of some of its rows.

    ``usual`` holds errors of eager's on other inputs, which are allowed too: 0 where this one tells
    enough.
    """
    rounding = 2e-3 if use.autocast else _ROUNDING[sizes.dtype]
    outputs = 2 if use.returns == "queries too" else 1
    for number, (value, plain, wide, other) in enumerate(
        zip(found, eager, exact, usual, strict=True)
    ):
        if value is None or plain is None or wide is None:
            if (value is None) != (plain is None):
                raise AssertionError(f"value {number} is None for one of eager and compiled")
            continue
        if value.dtype is not plain.dtype or value.shape != plain.shape:
            raise AssertionError(f"value {number}: {value.dtype} {tuple(value.shape)}")
        if number < outputs and value.stride() != plain.stride():
            raise AssertionError(f"value {number} has strides {value.stride()}")
        if not value.isfinite().all() and plain.isfinite().all():
            raise AssertionError(f"value {number} has infinities or NaN")
        if number == outputs and sizes.activation == "relu":
            rounding += _flipped(sizes, use)
        if wide.norm() < 1e-3 * wide.numel() ** 0.5:
            continue  # nothing but rounding, such as the router's gradient for one sub-network
        error, eagers = _error(value, wide), _error(plain, wide)
        if not error <= 2 * max(eagers, other / wide.norm().item()) + rounding:
            raise AssertionError(f"value {number} has error {error:.1e}, eager {eagers:.1e}")
        if number < outputs and value.dim() == 3:
            _compare_tokens(value, plain, wide, rounding)


def _compare_tokens(value: Tensor, plain: Tensor, wide: Tensor, rounding: float) -> None:
    """Raise where one token is wrong, which the norm of all would not show."""
    errors, eagers = ((x.to(wide.dtype) - wide).norm(dim=-1) for x in (value, plain))
    worst = (eagers.max() + rounding * wide.norm(dim=-1)) * _WORST
    if (errors > worst).any():
        where = (errors - worst).argmax().item()
        raise AssertionError(f"token {where} has error {errors.flatten()[where]:.1e}")


def _compare_bits(found: Values, before: Values) -> None:
    """Raise where the same inputs gave other bits: our kernels add nothing atomically."""
    for number, (value, other) in enumerate(zip(found, before, strict=True)):
        if value is not None and other is not None and not torch.equal(value, other):
            error = _error(value, other.double()) if other.norm() else 0.0
            raise AssertionError(f"value {number} differs from run to run, by {error:.1e}")


def _flipped(sizes: Sizes, use: Use) -> float:
    """What a few hidden units at the kink of relu, 0 in one rounding only, do to a gradient."""
    units = use.batch * use.length * sizes.heads * sizes.sub_networks * sizes.hidden
    return 4 / units**0.5


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.to(exact.dtype) - exact).norm() / exact.norm()).item()


@contextmanager
def locked(file: Path, kind: int) -> Iterator[None]:
    """Share the card with all who do so, or have it alone."""
    with file.open() as opened:
        fcntl.flock(opened, kind)
        yield


def check_network(seeds: list[int], device: str, lock: Path, deadline: float) -> list[Finding]:
    """The programs of one network; none is begun after the deadline."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        if time.time() < deadline:
            found.append(check(seed, device, lock))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.gpu", description=__doc__)
    parser.add_argument("--number", type=int, default=500, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed")
    parser.add_argument("--workers", type=int, default=8, help="processes that share the card")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin none after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in each of the workers
    begun = time.time()
    seeds = range(options.seed, options.seed + options.number)
    groups: dict[int, list[int]] = {}
    for seed in seeds:
        groups.setdefault(seed // USES, []).append(seed)
    findings: list[Finding] = []
    with tempfile.NamedTemporaryFile() as lock:
        others = (options.device, Path(lock.name), begun + options.seconds)
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            jobs = {pool.submit(check_network, group, *others): group for group in groups.values()}
            for job in as_completed(jobs):
                try:
                    found = job.result()
                except BrokenExecutor as crash:  # one of those that ran, and all that had to wait
                    found = [Finding(seed, error=repr(crash)) for seed in jobs[job]]
                findings += found
                for finding in found:
                    if finding.error:
                        print(f"seed {finding.seed}: {finding.error}")
                        print(f"  Inductor alone: {finding.without or 'right'}")
                        print(f"  {draw(finding.seed)}", flush=True)
    failed = [finding for finding in findings if finding.error and not finding.without]
    others = sum(bool(finding.without) for finding in findings)
    modes = Counter(draw(finding.seed)[1].mode for finding in findings)
    reasons = Counter(reason for finding in findings for reason in finding.reasons)
    print(
        f"{len(findings)} programs, seeds {seeds.start} to {seeds.stop - 1}: {len(failed)} wrong "
        f"or missed, {others} with Inductor alone as well, {time.time() - begun:.0f} s, "
        f"{options.workers} workers; {dict(modes)}; "
        f"declined: {dict(reasons)}"
    )
    return 1 if failed or not findings else 0


if __name__ == "__main__":
    sys.exit(main())
