"""Runs a model of the corpus as it is and compiled, and compares all that can be seen of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from mhf_compiler import GraphReport, Options, Report, compilation
from mhf_compiler.substitution.graph import Keep, rewrite_graph

from .cases import Case

#: rewrites whatever is proved, and lets every failure through
OPTIONS = {"rewrite": "always", "fallback": "aot_eager", "strict": True}

_WIDER = {torch.complex64: torch.complex128}


def assert_compiled_right(case: Case, **options: Any) -> Report:
    """The compiled model gives the model's results, gradients and buffers, up to rounding.

    Returns what the back end reports of it, which can be printed, so that it is compiled once for
    both. ``options`` are added to those above.

    The reference is the model in float64. The bound is four times what the model itself is off by,
    but at least four units in the last place of the lowest precision that it computes in.
    """
    model = case.build()
    wider = case.dtype if case.random else _WIDER.get(case.dtype, torch.float64)
    exact = _run(case, copy.deepcopy(model).to(wider))
    plain = _run(case, copy.deepcopy(model))
    compiled = torch.compile(copy.deepcopy(model), backend="flashmhf", options=OPTIONS | options)
    with reported() as report:
        found = _run(case, compiled)
    assert list(found) == list(plain)
    for name, reference in exact.items():
        assert found[name].shape == plain[name].shape, name
        assert found[name].dtype == plain[name].dtype, name
        largest = float(reference.abs().max()) if reference.numel() else 0.0
        rounding = torch.finfo(case.precision or case.dtype).eps * largest
        allowed = 4 * max(_distance(plain[name], reference), rounding)
        assert _distance(found[name], reference) <= allowed, name
    assert str(report)
    assert report.to_json()
    return report


@contextmanager
def reported() -> Iterator[Report]:
    """What the back end reports of the graphs that it compiles in here, without ``explain``."""
    report = Report()

    def rewrite(gm: fx.GraphModule, options: Options, keep: Keep) -> GraphReport:
        report.graphs.append(rewrite_graph(gm, options, keep))
        return report.graphs[-1]

    with mock.patch.object(compilation, "rewrite_graph", rewrite):
        yield report


def _run(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """One step in the model's dtype: outputs, gradients and what the inputs hold after it."""
    dtype = next((p.dtype for p in model.parameters()), case.dtype)
    inputs = [x.to(dtype).requires_grad_(case.gradients) for x in case.inputs()]
    torch.default_generator.manual_seed(2)
    with torch.set_grad_enabled(case.gradients):
        results = list(_flat(model(*inputs)))
    torch.default_generator.manual_seed(3)
    loss = torch.zeros((), dtype=torch.float64)
    for result in results:
        if result.requires_grad:
            loss = loss + (result * torch.randn(result.shape).to(result.dtype)).sum().abs()
    if loss.requires_grad:
        loss.backward()
    seen = {f"result {i}": result for i, result in enumerate(results)}
    seen |= {f"input {i}": x for i, x in enumerate(inputs)}
    seen |= {f"gradient of input {i}": _gradient(x) for i, x in enumerate(inputs)}
    seen |= {f"gradient of {name}": _gradient(p) for name, p in model.named_parameters()}
    seen |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in seen.items()}


def _gradient(tensor: Tensor) -> Tensor:
    """No gradient is as good as one of zeros."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.to(b.dtype) - b).abs().max()) if b.numel() else 0.0


def _flat(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in tree:
            yield from _flat(part)
