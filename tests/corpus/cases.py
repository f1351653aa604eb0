"""What a model of the corpus is: how to make it, how to call it, what has to be found in it.

Sizes are small and all different, so that a dimension that is taken for another one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mhf_compiler.patterns import Kind

B, L, H, E, d, f = 2, 6, 4, 3, 8, 5  # batch, length, heads, sub-networks, head width, hidden units
TOKENS = (B, L, H * d)


@dataclass(frozen=True)
class Case:
    """One model of the corpus."""

    model: type[nn.Module]
    label: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = (TOKENS,)
    dtype: torch.dtype = torch.float32  # of inputs and parameters
    precision: torch.dtype | None = None  # the lowest one that it computes in, if another one
    gradients: bool = True  # whether it is trained
    sites: tuple[dict[str, Any], ...] = ()  # the fields of each expected SiteReport
    kinds: tuple[Kind, ...] = ()  # why each of the others is declined
    either: bool = False  # it may be rewritten or not, as long as results are right
    random: bool = False  # its results depend on the random number generator

    @property
    def name(self) -> str:
        return f"{self.model.__name__}-{self.label}" if self.label else self.model.__name__

    def build(self) -> nn.Module:
        torch.default_generator.manual_seed(0)
        return self.model(**self.arguments).to(self.dtype).train(self.gradients)

    def inputs(self) -> tuple[Tensor, ...]:
        torch.default_generator.manual_seed(1)
        return tuple(torch.randn(shape, dtype=self.dtype) for shape in self.shapes)


class Corpus(dict[str, Case]):
    """Cases by name; its methods decorate the models."""

    def add(self, case: Case) -> None:
        assert case.name not in self, f"two cases are called {case.name}"
        self[case.name] = case

    def mhf(
        self,
        label: str = "",
        *,
        count: int = 1,
        arguments: dict[str, Any] | None = None,
        shapes: Sequence[tuple[int, ...]] = (TOKENS,),
        dtype: torch.dtype = torch.float32,
        precision: torch.dtype | None = None,
        random: bool = False,
        **sizes: Any,
    ) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """The model has ``count`` MH-FFNs: SwiGLUs of H heads, but for what is said otherwise."""
        site = {
            "heads": H,
            "groups": sizes.get("heads", H),
            "head_dim": d,
            "sub_networks": 1,
            "hidden": f,
            "activation": "silu",
            "gated": True,
            "routed": sizes.get("sub_networks", 1) > 1,
        } | sizes

        def decorate(model: type[nn.Module]) -> type[nn.Module]:
            self.add(
                Case(
                    model,
                    label,
                    arguments or {},
                    tuple(shapes),
                    dtype,
                    precision=precision,
                    random=random,
                    sites=(site,) * count,
                )
            )
            return model

        return decorate

    def declined(
        self, *kinds: Kind, label: str = "", **options: Any
    ) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """The model has no MH-FFN; ``kinds`` are the reasons that are given."""

        def decorate(model: type[nn.Module]) -> type[nn.Module]:
            self.add(Case(model, label, kinds=kinds, **options))
            return model

        return decorate

    def either(
        self, *, label: str = "", **options: Any
    ) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """The model is no plain MH-FFN. Whether a part of it can be rewritten is left open."""
        return self.declined(label=label, either=True, **options)


def weight(*shape: int) -> nn.Parameter:
    """A seeded weight, scaled so that activations stay near one."""
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


class PerHead(nn.Module):
    """The weights of one SwiGLU a head. Sub-classes spell what is computed."""

    def __init__(self, sizes: tuple[int, int] = (d, f)) -> None:
        super().__init__()
        width, hidden = sizes
        self.gate = weight(H, width, hidden)
        self.up = weight(H, width, hidden)
        self.down = weight(H, hidden, width)


class SubNetworks(nn.Module):
    """The weights of E SwiGLUs a head, and their router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = weight(H, E, d, f)
        self.up = weight(H, E, d, f)
        self.down = weight(H, E, f, d)
        self.route = weight(H, E, d)

    def router(self, q: Tensor) -> Tensor:
        r = torch.sigmoid(torch.einsum("blhd,hed->blhe", q, self.route))
        return r / (r.sum(-1, keepdim=True) + 1e-6)


def split_heads(x: Tensor) -> Tensor:
    """(..., H * d) to (..., H, d)."""
    return x.unflatten(-1, (H, -1))
