"""The forward pass on a Hopper GPU: its own kernel, and tiles that several programs share.

An error is relative to float64, and may be twice that of the plain spelling in the same dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support import problems
from support.problems import BIASES, NAMES, Shape, Tensors, beside_nan, spelled
from torch import Tensor

from mhf_compiler.lowering import multi_head_ffn_reference
from mhf_compiler.lowering.activations import ACTIVATIONS
from mhf_compiler.lowering.problem import Problem

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)

SHAPE = Shape(B=2, L=333, H=4, d=128, G=4, E=8, f=256)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Hopper's own forward kernel was launched with."""
    from mhf_compiler.lowering.kernels import hopper, replay

    replay.forget_repeats()  # what an earlier test launched would come back without a choice
    run, runs = hopper.run_forward, list[Any]()

    def counted(*arguments: Any) -> bool:
        taken = run(*arguments)
        if taken:
            runs.append(arguments)
        return taken

    monkeypatch.setattr(hopper, "run_forward", counted)
    return runs


@pytest.fixture
def pipelined(runs: list[Any]) -> Iterator[None]:
    """Fails if a test that asks for it does not reach Hopper's own kernel."""
    yield
    assert runs


def make(
    dtype: torch.dtype = torch.bfloat16,
    absent: Sequence[str] = BIASES,
    by_columns: bool = False,
    **sizes: int,
) -> Tensors:
    return problems.make(
        SHAPE._replace(**sizes),
        dtype,
        absent,
        router_dtype=torch.float32,
        scaled=True,
        by_columns=by_columns,
        device="cuda",
    )


def forward(
    tensors: Tensors, activation: str = "silu", out: Tensor | None = None, **scales: float
) -> Tensor:
    from mhf_compiler.lowering.kernels import dispatch

    problem = Problem(*(tensors[name] for name in NAMES), activation, **scales)
    out = torch.empty_like(problem.q) if out is None else out
    dispatch.forward(problem, out.fill_(float("nan")))
    return out


def check(
    tensors: Tensors, activation: str = "silu", out: Tensor | None = None, **scales: float
) -> None:
    options = {"activation": activation, **scales}
    wide = {name: None if x is None else x.double() for name, x in tensors.items()}
    exact = multi_head_ffn_reference(**wide, **options)
    usual = spelled(**tensors, **options)
    found = forward(tensors, activation, out, **scales)
    problems.assert_as_exact(["out"], [found], [usual], [exact])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", [8, 16, 24, 32, 40, 64, 96, 128, 160, 192, 256])
def test_widths(d: int, dtype: torch.dtype, pipelined: None) -> None:
    check(make(d=d, dtype=dtype))


@pytest.mark.parametrize(("f", "E"), [(171, 8), (341, 22), (2752, 1), (16, 3), (64, 1), (20, 1)])
@pytest.mark.parametrize("d", [32, 64, 128])
def test_hidden_sizes(f: int, E: int, d: int, pipelined: None) -> None:
    check(make(f=f, E=E, d=d))


@pytest.mark.parametrize("L", [256, 257, 1000, 4096])
@pytest.mark.parametrize("d", [24, 64, 128, 256])
def test_lengths(L: int, d: int, pipelined: None) -> None:
    """From one tile to several rounds of tiles, of which the last is cut."""
    check(make(B=1, L=L, H=8, G=8, E=2, d=d))


def test_several_rounds(pipelined: None) -> None:
    check(make(B=3, L=3001, H=8, G=8, E=3, f=128))


def test_sequences_that_do_not_join(pipelined: None) -> None:
    tensors = make(B=3, L=200)
    assert tensors["q"] is not None
    tensors["q"] = torch.cat([tensors["q"], tensors["q"]], 1)[:, :200]
    check(tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_activations(activation: str, d: int, pipelined: None) -> None:
    check(make(d=d, E=3, f=171), activation)


@pytest.mark.parametrize("size", [0.05, 8.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_and_large_arguments(size: float, dtype: torch.dtype, pipelined: None) -> None:
    tensors = make(dtype=dtype)
    assert tensors["k"] is not None
    tensors["k"] *= size
    check(tensors)


@pytest.mark.parametrize(
    "absent",
    [(), ("r",), ("u", "u_bias"), ("r", *BIASES), ("u", *BIASES), ("u", "r", *BIASES)],
    ids=lambda absent: "without " + " ".join(absent) if absent else "complete",
)
@pytest.mark.parametrize("d", [16, 32, 64, 128, 256])
def test_optional_inputs(absent: tuple[str, ...], d: int, request: pytest.FixtureRequest) -> None:
    if d > 32 or "u" not in absent:  # plain Triton has the narrowest heads without a gate
        request.getfixturevalue("pipelined")
    check(make(d=d, E=3, absent=absent), k_scale=1.3, u_scale=0.7, out_scale=0.9)
    check(make(d=d, E=3, absent=absent))


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_weights(groups: int, pipelined: None) -> None:
    check(make(G=groups, E=3))


@pytest.mark.parametrize("d", [8, 24, 32, 64, 96, 128, 256])
def test_weights_stored_by_columns(d: int, pipelined: None) -> None:
    check(make(d=d, by_columns=True))


@pytest.mark.parametrize("d", [8, 24, 32, 40])
def test_what_lies_beside_narrow_heads(d: int, pipelined: None) -> None:
    """Their tiles are wider than they are: what that takes in is neither read nor written."""
    tensors = make(d=d, E=3)
    for name in ("q", "k", "u", "v"):
        x = tensors[name]
        assert x is not None
        tensors[name] = beside_nan(x)
    q = tensors["q"]
    assert q is not None
    out = beside_nan(q)
    check(tensors, out=out)
    assert out.as_strided((*q.shape[:3], 64), q.stride())[..., d:].isnan().all()


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3)])
def test_token_layouts(order: tuple[int, ...], pipelined: None) -> None:
    tensors = make()
    for name in ("q", "r"):
        tensors[name] = problems.stored_as(tensors[name], order)
    assert tensors["q"] is not None
    check(tensors, out=torch.empty_like(tensors["q"]))


def test_router_in_the_working_precision(pipelined: None) -> None:
    tensors = make()
    assert tensors["r"] is not None
    tensors["r"] = tensors["r"].bfloat16()
    check(tensors)


def misaligned(tensors: Tensors) -> Tensors:
    k = tensors["k"]
    assert k is not None
    memory = torch.empty(k.numel() + 1, device="cuda", dtype=k.dtype)
    return tensors | {"k": memory[1:].view(k.shape).copy_(k)}


@pytest.mark.parametrize("change", [misaligned, lambda tensors: tensors], ids=["K", "Out"])
def test_what_it_does_not_take_still_runs(change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(make(E=3))
    assert tensors["q"] is not None
    check(tensors, out=torch.empty_like(tensors["q"], dtype=torch.float32))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", [96, 128])
@pytest.mark.parametrize(("E", "f"), [(1, 64), (3, 64), (3, 16), (1, 192)])
@pytest.mark.parametrize("absent", [BIASES, (*BIASES, "r")], ids=["routed", "unrouted"])
def test_short_tiles_one_after_the_other(
    dtype: torch.dtype, d: int, E: int, f: int, absent: tuple[str, ...], pipelined: None
) -> None:
    """Each program has several tiles of tokens, with no more hidden tiles than its ring has slots.

    The next tile's Q is then loaded as soon as this one's has been read, and not before.
    """
    tensors = make(B=1, L=4098, H=16, d=d, G=16, E=E, f=f, dtype=dtype, absent=absent)
    check(tensors, "relu2")
    first = forward(tensors, "relu2")
    for _ in range(50):
        assert torch.equal(forward(tensors, "relu2"), first)


@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_same_bits_each_time(d: int, pipelined: None) -> None:
    tensors = make(B=3, L=3001, d=d)
    first = forward(tensors)
    assert first.isfinite().all()
    for _ in range(5):
        assert forward(tensors).equal(first)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 100, 256])
def test_few_tokens(tokens: int, dtype: torch.dtype) -> None:
    """Several programs share a tile's hidden units."""
    tensors = make(B=tokens, L=1, H=8, G=8, dtype=dtype)
    check(tensors)
    assert forward(tensors).equal(forward(tensors))


@pytest.mark.parametrize("tokens", [1, 2, 16, 100, 256, 300])
@pytest.mark.parametrize(("heads", "d"), [(1, 256), (1, 96), (2, 64), (3, 40), (5, 128)])
def test_few_tokens_of_few_heads(
    heads: int, d: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 128 programs share a tile, whose workspace holds NaN where nothing was written."""
    from mhf_compiler.lowering.kernels import replay

    replay.forget_repeats()
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(float("nan"))
    )
    tensors = make(B=tokens, L=1, H=heads, G=heads, d=d, E=22, f=512)
    check(tensors)
    assert forward(tensors).equal(forward(tensors))


def test_few_tokens_in_float32() -> None:
    check(make(B=40, L=1, H=8, G=8, dtype=torch.float32))


@pytest.mark.parametrize("absent", [(), ("u", "r", "u_bias")], ids=["complete", "without u, r"])
def test_few_tokens_biased(absent: tuple[str, ...]) -> None:
    check(make(B=5, L=1, G=1, f=171, d=96, absent=absent), k_scale=1.3, out_scale=0.7)


def test_inside_a_graph(pipelined: None) -> None:
    tensors = make(L=512)
    expected = forward(tensors).clone()
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(tensors, out=out)
    out.zero_()
    graph.replay()
    assert out.equal(expected)


@pytest.mark.parametrize("d", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("L", [640, 1031])
@pytest.mark.parametrize("absent", [BIASES, ("u", "u_bias"), ()], ids=str)
def test_the_result_over_the_query(
    d: int, L: int, absent: tuple[str, ...], runs: list[Any]
) -> None:
    """Whole tiles, and those of the last round that several programs share; and repeated."""
    tensors = make(L=L, d=d, absent=absent)
    expected = forward(tensors)
    inputs: Any = [tensors[name] for name in NAMES]
    for _ in range(3):
        q = inputs[0].clone()
        torch.ops.mhf_compiler.multi_head_ffn_over_query(q, *inputs[1:], "silu", 1.0, 1.0, 1.0)
        assert q.equal(expected)
    assert bool(runs) == (d > 32 or "u" not in absent)  # the narrowest without a gate: plain Triton


@pytest.mark.usefixtures("pipelined")
@pytest.mark.parametrize("B", [3, 9])
def test_many_tiles_over_the_query(B: int) -> None:
    """A program stores a tile while it already loads the next one."""
    tensors = make(B=B, L=4096, H=8, G=8, E=2, f=64)
    expected = forward(tensors)
    inputs: Any = [tensors[name] for name in NAMES]
    for _ in range(3):
        q = inputs[0].clone()
        torch.ops.mhf_compiler.multi_head_ffn_over_query(q, *inputs[1:], "silu", 1.0, 1.0, 1.0)
        assert q.equal(expected)
