"""Quantised weights, as torchao makes them: harmless around the networks, a reason inside."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import mhf_compiler
from mhf_compiler.patterns import Kind
from models.harness import OPTIONS, assert_same_steps, flashmhf, forget, tally

H, E, d, f, WORDS = 4, 2, 8, 16, 40
INT8, FP8 = torch.int8, torch.float8_e4m3fn
aten = torch.ops.aten


class WeightOnly(Tensor):
    """A weight in eight bits with a scale for each row, which every operation reads in full."""

    numbers: Tensor  # [rows, columns], int8 or fp8
    scale: Tensor  # [rows, 1]

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> WeightOnly:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, numbers.shape, strides=numbers.stride(), dtype=scale.dtype, device=scale.device
        )

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def quantised(cls, weight: Tensor, dtype: torch.dtype) -> WeightOnly:
        largest = torch.iinfo(dtype).max if dtype == INT8 else torch.finfo(dtype).max
        scale = weight.abs().amax(-1, keepdim=True) / largest
        numbers = weight / scale
        return cls((numbers.round() if dtype == INT8 else numbers).to(dtype), scale)

    def in_full(self) -> Tensor:
        return self.numbers.to(self.scale.dtype) * self.scale

    def __repr__(self) -> str:  # AOTAutograd writes it down, and fakes have no numbers to show
        return "WeightOnly"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> WeightOnly:
        return WeightOnly(tensors["numbers"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.clone.default, aten.t.default):
            (weight,) = args
            return cls(func(weight.numbers), func(weight.scale))
        args, kwargs = tree_map(
            lambda x: x.in_full() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class OwnLinear(WeightOnly):
    """The same, if the class takes ``linear`` over before it is decomposed."""

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> OwnLinear:
        return OwnLinear(tensors["numbers"], tensors["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return func(x, weight.in_full(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class Batched(nn.Module):
    """The paper's layer over weights of all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(H * d, H * d), nn.Linear(H * d, H * d, bias=False)
        self.norm, self.router = nn.RMSNorm(d), nn.Linear(d, E, bias=False)
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(H, E, *shape) / 3) for shape in ((f, d), (f, d), (d, f))
        )

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.inputs(x).unflatten(-1, (H, d)))
        hidden = F.silu(torch.einsum("blhd,hefd->blhef", q, self.gate))
        hidden = hidden * torch.einsum("blhd,hefd->blhef", q, self.up)
        hidden = hidden * self.router(q).sigmoid()[..., None]
        return x + self.outputs(torch.einsum("blhef,hedf->blhd", hidden, self.down).flatten(2))


class Linears(nn.Module):
    """A SwiGLU of three linear layers for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(H * d, H * d), nn.Linear(H * d, H * d, bias=False)
        self.heads = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate": nn.Linear(d, f, bias=False),
                    "up": nn.Linear(d, f, bias=False),
                    "down": nn.Linear(f, d, bias=False),
                }
            )
            for _ in range(H)
        )

    def forward(self, x: Tensor) -> Tensor:
        queries = self.inputs(x).chunk(H, -1)
        outputs = [
            head["down"](F.silu(head["gate"](q)) * head["up"](q))
            for q, head in zip(queries, self.heads, strict=True)
        ]
        return x + self.outputs(torch.cat(outputs, -1))


class Model(nn.Module):
    """Two layers between an embedding and a head."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, H * d)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.head = nn.Linear(H * d, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def quantise(
    model: nn.Module, dtype: torch.dtype, chosen: Callable[[str], bool], kind: Any = WeightOnly
) -> nn.Module:
    """Quantise the linear layers whose names are chosen, in place."""
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and chosen(name):
            weight = kind.quantised(module.weight.detach(), dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)
            found += 1
    assert found
    return model


def around(name: str) -> bool:
    return ".heads." not in name


def words() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, WORDS, (2, 6))


def assert_same(model: nn.Module, call: Callable[[nn.Module], Any] = flashmhf) -> None:
    with torch.no_grad():
        expected = model(words())
        torch.testing.assert_close(call(model)(words()), expected, rtol=1e-4, atol=1e-5)
    assert tally().failures == 0


@pytest.mark.parametrize(
    ("layer", "dtype", "kind"),
    [
        (Batched, INT8, WeightOnly),
        (Batched, FP8, WeightOnly),
        (Linears, INT8, WeightOnly),
        (Linears, FP8, OwnLinear),
    ],
)
def test_networks_between_quantised_layers_are_rewritten(
    layer: type[nn.Module], dtype: torch.dtype, kind: type[WeightOnly]
):
    assert_same(quantise(Model(layer), dtype, around, kind))
    assert (tally().sites, tally().declined) == (2, 0)


def test_they_are_rewritten_through_inductors_options():
    given = mhf_compiler.inductor_options(
        {"rewrite": "always", "strict": True, "fallback_by_default": True}
    )
    model = quantise(Model(Batched), INT8, around)
    assert_same(model, lambda model: torch.compile(model, options=given))
    assert (tally().sites, tally().declined) == (2, 0)


def test_networks_are_trained_between_frozen_quantised_layers():
    """As adapters are. Networks and embedding have gradients, which pass the layers."""
    model = quantise(Model(Batched), INT8, around)
    assert_same_steps(model, words())
    assert (tally().sites, tally().declined) == (2, 0)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("*.heads.*", WeightOnly),
        ("*.heads.*.up", WeightOnly),
        ("*.heads.2.*", WeightOnly),
        ("*.heads.2.gate", WeightOnly),
        ("*.heads.2.up", WeightOnly),
        ("*.heads.2.down", WeightOnly),
        ("*.heads.*", OwnLinear),
        ("*.heads.2.up", OwnLinear),
    ],
)
def test_quantised_weights_of_a_network_are_a_reason(names: str, kind: type[WeightOnly]):
    """All, some of every head, or some of one head; that of a second layer is rewritten."""
    first = f"layers.0{names.removeprefix('*')}"
    model = quantise(Model(Linears), INT8, lambda name: fnmatch.fnmatch(name, first), kind)
    assert_same(model)
    assert tally().sites == 1
    forget()
    with torch.no_grad():
        report = mhf_compiler.explain(model, options=OPTIONS)(words())
    (reason,) = {site.reason for site in report.declined}
    assert reason is not None
    assert reason.kind is Kind.TENSOR_SUBCLASS
    assert kind.__name__ in str(report)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize(
    ("inside", "expected"), [(False, (2, 0)), (True, (0, 2))], ids=["around", "inside"]
)
def test_models_that_torchao_quantised(config: str, inside: bool, expected: tuple[int, int]):
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(Model(Linears)).eval()

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (inside or around(name))

    quantization.quantize_(model, getattr(quantization, config)(), filter_fn=chosen)
    assert_same(model)
    assert (tally().sites, tally().declined) == expected


def test_tokens_of_a_subclass():
    """What such tensors are used for is not looked into, and a note says so, with the line."""
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.randn(2, 5, H * d)
    report = mhf_compiler.explain(Batched(), options=OPTIONS)(TwoTensor(x, x.clone()))
    assert not report.rewritten
    (note,) = report.graphs[0].notes
    assert "matrix products of tensors of the class TwoTensor" in note
    assert "test_quantised.py" in note
