"""Tuning on a GPU: what it chooses computes what the shipped tiles compute."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mhf_compiler.lowering import multi_head_ffn, multi_head_ffn_reference
from mhf_compiler.lowering.tiles import Sizes
from mhf_compiler.lowering.workload import Workload, tune, tuning_key

pytestmark = pytest.mark.gpu

KERNELS = ("forward", "dq", "dv", "dk_du")


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    from mhf_compiler.lowering.kernels.tuning import store

    store.forget()
    yield
    store.forget()


def workload() -> Workload:
    """So few tokens that plain Triton runs every kernel on every card."""
    sizes = Sizes(
        tokens=200,
        heads=4,
        groups=4,
        head_dim=32,
        sub_networks=3,
        hidden=128,
        gated=True,
        routed=True,
        biased=(False, False, False),
        dtype=torch.bfloat16,
    )
    return Workload(sizes, "silu", torch.bfloat16, torch.device("cuda", 0), training=True)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 100, 4, 32, device="cuda")
    k, u, v = (torch.randn(4, 3, 128, 32, device="cuda") * 32**-0.5 for _ in range(3))
    r = torch.rand(2, 100, 4, 3, device="cuda")
    return [*(x.bfloat16() for x in (q, k, u, v)), r]


def results(tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = multi_head_ffn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def exact(tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out = multi_head_ffn_reference(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def check(tensors: list[Tensor]) -> None:
    first, second = results(tensors), results(tensors)
    for value, again, right in zip(first, second, exact(tensors), strict=True):
        assert value.equal(again)
        assert (value.double() - right).norm() < 1e-2 * right.norm()


def test_a_problem_is_tuned_once_and_stays_right(tmp_path: Path) -> None:
    from mhf_compiler.lowering.kernels.tuning import store

    said: list[str] = []
    state = torch.cuda.get_rng_state()
    tune(workload(), tmp_path, said.append)
    assert torch.cuda.get_rng_state().equal(state)
    assert {text.split()[1] for text in said} == set(KERNELS)
    assert len(list(tmp_path.glob("*.json"))) == len(KERNELS)
    check(inputs())
    store.forget()
    said.clear()
    tune(workload(), tmp_path, said.append)
    assert not said
    check(inputs())


def test_every_candidate_is_right() -> None:
    """Whichever a card prefers: those that do not fit run as the shipped tile."""
    from mhf_compiler.lowering.kernels.tuning import store
    from mhf_compiler.lowering.kernels.tuning.search import candidates

    tensors = inputs()
    lists = [list(candidates(tuning_key(kernel, workload())).values()) for kernel in KERNELS]
    for number in range(max(map(len, lists))):
        for kernel, rows in zip(KERNELS, lists, strict=True):
            store.keep(tuning_key(kernel, workload()), rows[number % len(rows)], None)
        check(tensors)
