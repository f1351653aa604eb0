"""On a card: every kernel passes its comparison, once, and leaves no other trace."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mhf_compiler.compat
from mhf_compiler.lowering import multi_head_ffn, router_product

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def unjudged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    from mhf_compiler.lowering.kernels import verdicts

    monkeypatch.delenv(verdicts.SWITCH, raising=False)

    def fail(text: str, *rest: object) -> None:
        pytest.fail(text % rest)

    monkeypatch.setattr(mhf_compiler.compat, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(verdicts.log, "warning", fail)  # of what could not be compared
    verdicts.forget()
    yield
    verdicts.forget()


def step(
    dtype: torch.dtype, d: int, tokens: int, by_columns: bool = False, gated: bool = True
) -> list[torch.Tensor]:
    def weight() -> torch.Tensor:
        shape = (2, 3, d, 64) if by_columns else (2, 3, 64, d)
        x = torch.randn(shape, device="cuda", dtype=dtype) * d**-0.5
        return (x.transpose(2, 3) if by_columns else x).requires_grad_()

    q = torch.randn(1, tokens, 4, d, device="cuda", dtype=dtype, requires_grad=True)
    r = torch.rand(1, tokens, 4, 3, device="cuda", requires_grad=True)
    inputs = [q, weight(), weight() if gated else None, weight(), r]
    biases = {}
    if not gated:
        for name, size in (("k_bias", 64), ("v_bias", d)):
            x = torch.randn(2, 3, size, device="cuda", dtype=dtype)
            biases[name] = x.requires_grad_()
    out = multi_head_ffn(*inputs, **biases)
    wanted = [x for x in (*inputs, *biases.values()) if x is not None]
    return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(
    ("dtype", "d", "tokens", "kernels"),
    [
        (torch.bfloat16, 128, 2048, 4),
        (torch.float16, 64, 2048, 4),
        (torch.bfloat16, 256, 2048, 2),
        (torch.bfloat16, 64, 40, 4),
        (torch.float32, 64, 200, 4),
        (torch.float32, 64, 300, 2),
        (torch.bfloat16, 512, 300, 2),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_kernel_is_right(
    dtype: torch.dtype, d: int, tokens: int, kernels: int, by_columns: bool, tmp_path: Path
) -> None:
    state = torch.cuda.get_rng_state()
    step(dtype, d, tokens, by_columns)
    drawn = torch.cuda.get_rng_state()
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == kernels
    torch.cuda.set_rng_state(state)
    step(dtype, d, tokens, by_columns)
    assert torch.cuda.get_rng_state().equal(drawn)
    assert sorted(tmp_path.rglob("*.json")) == files


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("d", [16, 64, 128])
def test_the_kernels_of_networks_without_a_gate_are_right(d: int, tmp_path: Path) -> None:
    """One fewer where the card has one kernel for dK and dV."""
    step(torch.bfloat16, d, 2048, gated=False)
    own = torch.cuda.get_device_capability() == (9, 0)
    assert len(list(tmp_path.rglob("*.json"))) == (3 if own else 4)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_routers_kernels_are_right(dtype: torch.dtype, tmp_path: Path) -> None:
    q = torch.randn(2, 200, 4, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 64, 5, device="cuda", requires_grad=True)
    out = router_product(q, weight)
    torch.autograd.grad(out, [q, weight], torch.ones_like(out))
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_nothing_is_compared_in_a_capture(tmp_path: Path) -> None:
    from mhf_compiler.lowering.kernels import verdicts

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(verdicts.SWITCH, "0")
        with torch.no_grad():
            q = torch.randn(1, 64, 2, 32, device="cuda").half()
            weights = [torch.randn(2, 2, 32, 32, device="cuda").half() for _ in range(3)]
            multi_head_ffn(q, *weights)  # compiles
    verdicts.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = multi_head_ffn(q, *weights)
    graph.replay()
    assert not list(tmp_path.rglob("*.json"))
    with torch.no_grad():
        assert out.equal(multi_head_ffn(q, *weights))
