"""The Triton kernels one by one: time and rate, against the vendor's matrix product.

A rate counts the products that a kernel executes: three in the forward and in dV, five in dQ with
dR and in dK with dU. Where Hopper has a kernel of its own, plain Triton's is shown as well.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mhf_compiler.lowering.kernels import dispatch
from mhf_compiler.lowering.kernels.operands import tokens_innermost
from mhf_compiler.lowering.kernels.plain import backward, forward
from mhf_compiler.lowering.kernels.replay import recorded
from mhf_compiler.lowering.problem import Gradients, Problem
from mhf_compiler.lowering.tiles import Kernel, Tile, portable

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
from .models import PAPER, SHAPE_NAMES, SWIGLU_HIDDEN, loop, make_inputs

#: products executed, results written
KERNELS: dict[Kernel, tuple[int, tuple[str, ...]]] = {
    "forward": (3, ("out",)),
    "dq": (5, ("dq", "dr")),
    "dv": (3, ("dv",)),
    "dk_du": (5, ("dk", "du")),
}
WIDTHS = ((8, 4096, 16, 16, 22, 256), (8, 4096, 16, 32, 22, 256), (8, 4096, 16, 64, 22, 171),
          (8, 4096, 16, 64, 22, 256), (8, 4096, 16, 96, 22, 256), (8, 4096, 16, 256, 22, 256),
          (8, 4096, 16, 128, 1, 2752))  # fmt: skip
TOKENS = (1, 4, 16, 64, 128, 256)
_STEPS = 16  # of decoding in a graph
#: alternatives to the chosen tile: tokens, hidden units, warps, stages
SWEEP: dict[Kernel, list[tuple[int, int, int, int]]] = {
    "forward": [
        (128, 64, 8, 4), (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 4),
        (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 3), (256, 32, 8, 2), (256, 64, 8, 2),
        (64, 64, 4, 4),
    ],
    "dq": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2),
        (128, 128, 8, 2), (64, 64, 8, 2), (64, 128, 4, 2),
    ],
    "dv": [
        (128, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 8, 4), (128, 64, 4, 2),
        (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (32, 128, 8, 4),
    ],
    "dk_du": [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 4), (64, 64, 4, 2),
        (128, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 1),
    ],
}  # fmt: skip


def cases(settings: Settings) -> Iterator[Case]:
    """The kernels that the op chooses, and plain Triton's where Hopper's runs."""
    for shape in settings.shapes or (PAPER,):
        about = dict(zip(SHAPE_NAMES, shape, strict=True))
        yield Case(about, partial(build, tuple(shape)))


def cases_of_widths(settings: Settings) -> Iterator[Case]:
    """The same for other widths of heads, and for one sub-network of many hidden units."""
    for shape in settings.shapes or (PAPER, *WIDTHS):
        about = dict(zip(SHAPE_NAMES, shape, strict=True))
        yield Case(about, partial(build, tuple(shape)))


def cases_of_sweep(settings: Settings) -> Iterator[Case]:
    """Plain Triton with other tiles."""
    for shape in settings.shapes or (PAPER,):
        for kernel in KERNELS:
            about = dict(zip(SHAPE_NAMES, shape, strict=True)) | {"kernel": kernel}
            yield Case(about, partial(build, tuple(shape), only=kernel, sweep=True))


def cases_of_tokens(settings: Settings) -> Iterator[Case]:
    """The forward of few tokens: a step of decoding."""
    base = settings.shapes[0] if settings.shapes else PAPER
    for tokens in TOKENS:
        shape = (tokens, 1, *base[2:])
        about = dict(zip(SHAPE_NAMES, shape, strict=True))
        yield Case(about, partial(build_few_tokens, shape), busy=True)


def build(shape: tuple[int, ...], only: Kernel | None = None, sweep: bool = False) -> Job:
    problem, grad_out = make_problem(shape)
    contenders = [matrix_product("cuda", (32768, 2048, SWIGLU_HIDDEN), torch.bfloat16)]
    if only is None:
        contenders += as_called(problem, grad_out)
    for kernel in KERNELS if only is None else (only,):
        contenders += contenders_of(kernel, problem, grad_out, sweep)
    return Job(contenders, expected_results(problem, grad_out), "matrix product")


def make_problem(shape: Sequence[int]) -> tuple[Problem, Tensor]:
    q, k, u, v, r = make_inputs(shape, torch.bfloat16, "cuda", torch.float32)
    return Problem(q, k, u, v, r), torch.randn_like(q)


def product_flops(problem: Problem) -> float:
    """Of one product over all tokens and hidden units."""
    batch, length, heads, head_dim = problem.q.shape
    return 2.0 * batch * length * heads * head_dim * problem.k[0, ..., 0].numel()


def as_called(problem: Problem, grad_out: Tensor) -> list[Contender]:
    """What the op runs: three products forward; backward counts eight, however many it executes."""
    out = torch.empty_like(problem.q)

    def run_forward() -> Sequence[Tensor]:
        dispatch.forward(problem, out)
        return [out]

    def run_backward() -> Sequence[Tensor]:
        gradients = problem.new_gradients([x is not None for x in problem.tensors])
        dispatch.backward(problem, grad_out, gradients)
        return gradients.wanted

    names = ("dq", "dk", "du", "dv", "dr")
    flops = product_flops(problem)
    return [
        contender("forward, as called", run_forward, ("out",), [out], 3 * flops),
        contender("backward, as called", run_backward, names, [], 8 * flops),
    ]


def contenders_of(
    kernel: Kernel, problem: Problem, grad_out: Tensor, sweep: bool
) -> Iterator[Contender]:
    """One kernel: Hopper's own where it takes the problem, and plain Triton's."""
    products, names = KERNELS[kernel]
    like = {"out": problem.q, "dq": problem.q, "dr": problem.r}
    like |= {"dk": problem.k, "du": problem.u, "dv": problem.v}
    outputs = [torch.empty_like(x) for name in names if (x := like[name]) is not None]
    if kernel != "forward" and problem.r is not None:  # as `dispatch.backward` does
        problem = problem._replace(r=tokens_innermost(problem.r, merged=True))
    flops = products * product_flops(problem)
    chosen = portable(kernel, problem.sizes)
    tiles = [chosen]
    if sweep:
        others = (Tile(*tile, descriptors=chosen.descriptors) for tile in SWEEP[kernel])
        tiles += [dataclasses.replace(chosen, descriptors=False)]
        tiles += [tile for tile in others if tile != chosen]
    else:
        run = hopper_kernel(kernel, problem, grad_out, outputs)
        if run is not None:
            yield contender(f"{kernel}, Hopper", run, names, outputs, flops)
    for tile in tiles:
        run = partial(plain_kernel, kernel, problem, grad_out, outputs, tile)
        about = {"tokens": tile.tokens, "hidden": tile.hidden, "warps": tile.warps}
        about |= {"stages": tile.stages, "descriptors": tile.descriptors, "chosen": tile is chosen}
        label = ", ".join(f"{name} {value}" for name, value in about.items()) if sweep else "Triton"
        yield contender(f"{kernel}, {label}", run, names, outputs, flops, about)


def plain_kernel(
    kernel: Kernel, problem: Problem, grad_out: Tensor, outputs: list[Tensor], tile: Tile
) -> list[Tensor]:
    if kernel == "forward":
        forward.run_forward(problem, *outputs, tile)
    else:
        run = {"dq": backward.run_dq, "dv": backward.run_dv, "dk_du": backward.run_dk_du}
        run[kernel](problem, grad_out, as_gradients(kernel, outputs), tile)
    return outputs


def as_gradients(kernel: Kernel, outputs: list[Tensor]) -> Gradients:
    names = [name.removeprefix("d") for name in KERNELS[kernel][1]]
    return Gradients(**dict(zip(names, outputs, strict=True)))


def hopper_kernel(
    kernel: Kernel, problem: Problem, grad_out: Tensor, outputs: list[Tensor]
) -> Callable[[], list[Tensor]] | None:
    """A run of Hopper's own kernel; None where there is none for the device or the problem."""
    if kernel == "forward":
        launch = partial(dispatch.specialised_forward, problem, *outputs)
    else:
        gradients = as_gradients(kernel, outputs)
        launch = partial(dispatch.specialised_backward, kernel, problem, grad_out, gradients)
    if not launch():
        return None
    again = recorded(launch)

    def run() -> list[Tensor]:
        again()
        return outputs

    return run


def contender(
    name: str,
    run: Callable[[], Sequence[Tensor]],
    names: Sequence[str],
    outputs: Sequence[Tensor],
    flops: float,
    about: Row | None = None,
) -> Contender:
    """A kernel whose outputs are poisoned before they are compared."""

    def values() -> dict[str, Tensor]:
        for output in outputs:
            output.fill_(float("nan"))
        results = run()
        # A NaN anywhere shows in the part that is compared.
        spoiled = [0 if bool(result.isfinite().all()) else float("nan") for result in results]
        return {
            name: part(name, result) + nothing
            for name, result, nothing in zip(names, results, spoiled, strict=True)
        }

    return Contender(name, run, values, flops=flops, about=about or {})


def part(name: str, result: Tensor) -> Tensor:
    """What is compared: the last tokens' part, or the last sub-network's of the last head."""
    return result[-1:, -256:] if name in ("out", "dq", "dr") else result[-1:, -1:]


def expected_results(problem: Problem, grad_out: Tensor) -> dict[str, Expected]:
    """From two small problems whose results are parts of the whole one's.

    A token's output and gradients need no other token; a sub-network's gradients no other network.
    """
    found: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, problem.q.dtype):
        results: dict[str, Tensor] = {}
        for which, tensors in parts(problem, grad_out).items():
            q, k, u, v, r, grad = (x.to(dtype) for x in tensors)
            inputs = [x.detach().requires_grad_() for x in (q, k, u, v, r.float())]
            out = loop(*inputs)
            gradients = torch.autograd.grad(out, inputs, grad)
            if which == "tokens":
                results |= {"out": out.detach(), "dq": gradients[0], "dr": gradients[4]}
            else:
                results |= dict(zip(("dk", "du", "dv"), gradients[1:4], strict=True))
        found.append(results)
    exact, plain = found
    return {name: Expected.of(exact[name], plain[name]) for name in exact}


def parts(problem: Problem, grad_out: Tensor) -> dict[str, list[Tensor]]:
    q, k, u, v, r = problem[:5]
    assert u is not None
    assert r is not None
    tokens, last = slice(-256, None), slice(-1, None)
    return {
        "tokens": [q[-1:, tokens], k, u, v, r[-1:, tokens], grad_out[-1:, tokens]],
        "network": [
            q[:, :, last],
            *(x[last, last] for x in (k, u, v)),
            r[:, :, last, last],
            grad_out[:, :, last],
        ],
    }


def build_few_tokens(shape: tuple[int, ...]) -> Job:
    """In a CUDA graph over several sets of weights, more than the cache holds."""
    q, k, u, v, r = make_inputs(shape, torch.bfloat16, "cuda", torch.float32)
    size = 3 * k.numel() * k.element_size()
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    # A graph takes some time to start, whatever is in it: enough steps make that disappear.
    sets = max(_STEPS, 2 + 2 * cache // size)
    weights = [[x.clone() for x in (k, u, v)] for _ in range(sets)]
    out = torch.empty_like(q)

    def step() -> None:
        for some in weights:
            dispatch.forward(Problem(q, *some, r), out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> object:
        graph.replay()
        return step  # a graph knows addresses only: this keeps the tensors there

    def values() -> dict[str, Tensor]:
        out.fill_(float("nan"))
        graph.replay()
        return {"out": out.clone()}

    exact = loop(*(x.float() for x in (q, k, u, v, r)))
    large = torch.empty(2**28, device="cuda")
    target = torch.empty_like(large)
    return Job(
        [
            Contender("forward, as called", replay, values, bytes=size, jobs=len(weights)),
            Contender("copy", lambda: target.copy_(large), bytes=2.0 * large.nbytes),
        ],
        {"out": Expected.of(exact, loop(q, k, u, v, r))},
    )


BENCHMARK = Benchmark(
    "the kernels one by one, against cuBLAS",
    of_cases(cases),
)
WIDTHS_BENCHMARK = Benchmark(
    "the kernels for other widths of heads",
    of_cases(cases_of_widths),
    plots=(Plot("share of cuBLAS", "d", "share", log=""),),
)
SWEEP_BENCHMARK = Benchmark("plain Triton with other tiles", of_cases(cases_of_sweep))
TOKENS_BENCHMARK = Benchmark(
    "the forward of few tokens in CUDA graphs: the rate at which weights are read",
    of_cases(cases_of_tokens),
    plots=(
        Plot("rate against tokens", "B", "gb_per_s", log="x"),
        Plot("latency against tokens", "B", "ms", log="x"),
    ),
)
