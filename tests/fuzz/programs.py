"""The generator: a seed becomes the source of a module that is an MH-FFN, spelled somehow.

``generate`` draws sizes, layout, storage of the weights, loops, contractions, activation, router
and merge, and writes a module that can be read, printed and pasted. The source comes with what
it means: the tensors of the op in their canonical layout and the expected site, so that the
module can be compared with ``lowering/reference.py``.

Half of the programs have one of ``KINDS`` in addition, such as modes, extreme numbers or writes to
an input. It is drawn by random numbers of its own.

Canonical layouts, with g heads that have weights of their own: gate, up and down are
``(g, e, f, d)``, their biases ``(g, e, f)``, ``(g, e, f)`` and ``(g, e, d)``, and route is
``(h, d, e)``. The module receives them in ``__init__`` and stores them in its own way.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from types import ModuleType
from typing import Any

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhf_compiler.debug.accuracy import seed_generators
from mhf_compiler.lowering.reference import multi_head_ffn_reference

from .spelling import SIZES, TOKENS, Assignment, Dims, Named, Writer, size

#: Activation -> its spellings; those in ``ROUNDED`` shorten a constant.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "silu": (
        "F.silu({x})",
        "F.silu({x})",
        "{x} * torch.sigmoid({x})",
        "{x}.sigmoid() * {x}",
        "{x} / (1 + torch.exp(-{x}))",
        "{x} / 2 * (1 + torch.tanh({x} / 2))",
        "torch.mul({x}, F.sigmoid({x}))",
    ),
    "gelu": (
        "F.gelu({x})",
        "0.5 * {x} * (1 + torch.erf({x} / math.sqrt(2)))",
        "{x} * 0.5 * (1.0 + torch.erf({x} * 0.7071067811865476))",
    ),
    "gelu_tanh": (
        'F.gelu({x}, approximate="tanh")',
        "0.5 * {x} * (1 + torch.tanh(math.sqrt(2 / math.pi) * ({x} + 0.044715 * {x} ** 3)))",
        "0.5 * {x} * (1 + torch.tanh(0.7978845608 * {x} * (1 + 0.044715 * {x} * {x})))",
        "0.5 * {x} * (1 + torch.tanh(0.79788456 * ({x} + 0.044715 * torch.pow({x}, 3))))",
    ),
    "relu": ("F.relu({x})", "torch.relu({x})", "{x}.relu()"),
    "relu2": (
        "F.relu({x}) ** 2",
        "F.relu({x}).square()",
        "torch.relu({x}).pow(2)",
        "F.relu({x}) * F.relu({x})",
        "{x}.clamp(min=0) ** 2",
    ),
    "sigmoid": ("torch.sigmoid({x})", "{x}.sigmoid()", "1 / (1 + torch.exp(-{x}))"),
    "tanh": ("torch.tanh({x})", "{x}.tanh()", "F.tanh({x})"),
}
#: in every such program a hidden unit starts from a gate of zero, at the kink of a relu
_UNTRAINED = 4
ROUNDED = ("0.7978845608 ", "0.79788456 ")
_HALF = (torch.bfloat16, torch.float16)

#: How router weights come from logits; the last dimension are the sub-networks.
ROUTERS: dict[str, str] = {
    "sigmoid": "torch.sigmoid({r})",
    "clamped sum": "torch.sigmoid({r}) / torch.sigmoid({r}).sum(-1, True).clamp_min(1e-20)",
    "shifted sum": "torch.sigmoid({r}) / ({r}.sigmoid().sum(dim=-1, keepdim=True) + 1e-6)",
    "softmax": "torch.softmax({r}, dim=-1)",
    "log space": "(F.logsigmoid({r}) - F.logsigmoid({r}).logsumexp(-1, keepdim=True)).exp()",
    "top 2": "torch.zeros_like({r}).scatter(-1, {r}.topk(min(2, E), -1).indices, "
    "{r}.topk(min(2, E), -1).values.softmax(-1))",
    "squared": "{r} ** 2",
}

#: What is done to the input before it is cut into heads, and to the output after they are merged.
#: A norm of two elements is little more than their signs; eps keeps it, and its gradient, smooth.
BEFORE = {
    "nothing": "{x}",
    "layer norm": "F.layer_norm({x}, {x}.shape[-1:], eps=1.0)",
    "activation": "F.silu({x})",
    "scale": "{x} * 0.5",
    "linear": "self.before({x})",
    # What repeats a part of the input along its first dimension, and what leaves complex numbers.
    "repeat": "{x}[:1].repeat({x}.shape[0], *[1] * ({x}.dim() - 1))",
    "repeat_interleave": "{x}[:1].repeat_interleave({x}.shape[0], 0)",
    "expand": "{x}[:1].expand({x}.shape).contiguous()",
    "real part": "torch.fft.fft({x}).real",
    "imaginary part": "torch.fft.fft({x}).conj().imag",
}
_MADE = ("repeat", "repeat_interleave", "expand")
_OUT_OF_COMPLEX = ("real part", "imaginary part")
AFTER = {
    "nothing": "{out}",
    "residual": "x + {out}",
    "layer norm": "F.layer_norm({out}, {out}.shape[-1:], eps=1.0)",
    "activation": "torch.tanh({out})",
    "linear": "self.after({out})",
}

#: What half of the programs have in addition to a spelling, one each.
KINDS = (
    "modes",  # autocast and grad modes around the call and inside, checkpoint, torch.cond
    "dtypes",  # biases, routers and sums in other dtypes than the network
    "values",  # zeros, large and tiny numbers, an infinity or a NaN in the input
    "symbols",  # sizes and an attribute that are symbols, under dynamic=True
    "writes",  # the input is overwritten after it is read
    "returned",  # the result is returned twice, or as a view
    "fused sums",  # addcmul, addmm and baddbmm, with their factors
    "dispatched",  # the tokens of each head one after another, (heads * tokens, d)
    "one size",  # heads, sub-networks, tokens, hidden units and width are the same number
    "made queries",  # repeated before the network, or computed out of complex numbers
    "one token",  # with biases, which then move as the tokens do
    "slices",  # sub-networks of one product are added slice by slice
)
VALUES = ("zeros", "zero weights", "large", "large weights", "tiny", "an infinity", "a NaN")
_LARGE, _TINY = 1e4, 1e-6
#: what the input becomes, after the result is computed, and what is then returned
WRITES = {
    "scaled": ("x.mul_(0.5)", "result"),
    "replaced": ("x.copy_({0})", "x"),
    "added": ("x.add_({0})", "result"),
    "in part": ("x[..., 0] = 1.0", "result"),
}
RETURNED = {
    "twice": "{0}, {0}",
    "and a part": "{0}, {0}[..., 0]",
    "and flat": "{0}, {0}.reshape(-1)",
    "and transposed": "{0}, {0}.transpose(0, -1)",
    "and a copy": "{0}, {0}.clone()",
    "after its view": "{0}, {0}.unsqueeze(0), {0}.detach()",
}

_HEADER = '''\
"""{title}"""

import math

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

{sizes}


{helper}class Model(nn.Module):
    def __init__(self, {parameters}: Tensor) -> None:
        super().__init__()
'''

_LINEAR = '''\
def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A Linear module with these parameters; the weight is (out, in)."""
    module = nn.Linear(*weight.T.shape, bias=bias is not None, dtype=weight.dtype)
    module.weight = nn.Parameter(weight.clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module


'''

_MAIN = """

if __name__ == "__main__":
    import mhf_compiler

    torch.manual_seed({seed})
    model = Model({tensors}).to(torch.{dtype}).train({training})
    inputs = [{inputs}]
    for x in inputs:
        x.requires_grad_({training})
    for dim in {dynamic}:
        torch._dynamo.maybe_mark_dynamic(inputs[0], dim)
    options = {{"rewrite": "always", "strict": True, "fallback": "eager"}}
    print(mhf_compiler.explain(model, options=options)(*inputs))
    compiled = torch.compile(model, backend="flashmhf", options=options)
    results = [run(*inputs) for run in (model, compiled)]
    plain, rewritten = (r[0] if isinstance(r, tuple) else r for r in results)
    print("largest difference of the results:", (plain - rewritten).abs().max().item())
"""


@dataclass(frozen=True)
class Program:
    """One module as source text, and what is known about it."""

    seed: int
    source: str
    sizes: dict[str, int]  # by axis
    tensors: dict[str, Dims]  # the canonical tensors, in the order of ``Model.__init__``
    inputs: dict[str, Dims]  # the arguments of ``forward``: x, and weights or a router
    outputs: Dims
    site: dict[str, Any]  # the fields of the expected SiteReport
    routed: str  # how the router works, "" without one
    templates: tuple[str, str]  # what is done before and after
    scales: tuple[float, float, float]
    dtype: torch.dtype = torch.float64
    precision: torch.dtype = torch.float64  # the lowest one that it computes in
    dynamic: tuple[str, ...] = ()  # axes of x that are marked as dynamic
    training: bool = True
    #: what the compiled code is called under and what the module is called under inside of it,
    #: names of ``check.MODES``; and how it is called, "", "checkpoint" or "cond"
    modes: tuple[str, str, str] = ("", "", "")
    values: str = ""  # one of ``VALUES``, or "" for random numbers
    #: the dtypes of parameters, buffers and inputs that do not take that of the program
    kept: dict[str, torch.dtype] = field(default_factory=dict)
    all_dynamic: bool = False  # whether it is compiled with dynamic=True
    features: dict[str, str] = field(default_factory=dict)  # what was drawn
    assignments: tuple[Assignment, ...] = ()

    @property
    def file(self) -> str:
        return f"<program {self.seed}>"

    @property
    def ordinary(self) -> bool:
        """Whether it is also an ordinary network: all heads share the one that there is."""
        return bool(self.site["groups"] == self.site["sub_networks"] == 1)

    def with_source(self, source: str) -> Program:
        return replace(self, source=source)

    def shape(self, dims: Dims) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[axis] for axis in letters) for letters in dims)

    def weights(self) -> dict[str, Tensor]:
        """The canonical tensors, in float64."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = {
            name: torch.randn(self.shape(dims), dtype=torch.float64, generator=generator) * 0.7
            for name, dims in self.tensors.items()
        }
        if self.seed % _UNTRAINED == 0:
            weights["gate"].select(self.tensors["gate"].index("f"), 0).zero_()
        factor = {"zero weights": 0.0, "large weights": _LARGE}.get(self.values, 1.0)
        return {name: weight * factor for name, weight in weights.items()}

    def arguments(self) -> dict[str, Tensor]:
        """The arguments of ``forward``, in the program's dtype."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        given = self.weights()
        arguments = {}
        for name, dims in self.inputs.items():
            x = torch.randn(self.shape(dims), dtype=torch.float64, generator=generator)
            canonical = given.get(name.removesuffix("_weight"))
            if canonical is not None:
                known = self.tensors[name.removesuffix("_weight")]
                source = tuple(a if a in "".join(dims) else "" for a in known)
                x = rearranged(canonical, source, dims)
            elif name == "x":
                x = self._extreme(x)
            arguments[name] = x.to(self.dtype_of(name))
        return arguments

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of an argument, a parameter or a buffer."""
        kept = self.kept.get(name, self.dtype)
        return torch.promote_types(kept, self.dtype) if self.dtype == torch.float64 else kept

    def _extreme(self, x: Tensor) -> Tensor:
        x = x * {"zeros": 0.0, "large": _LARGE, "tiny": _TINY}.get(self.values, 1.0)
        number = {"an infinity": math.inf, "a NaN": math.nan}.get(self.values)
        if number is not None:
            x.view(-1)[0] = number
        return x

    def namespace(self) -> dict[str, Any]:
        """The module's names. Its source is known to tracebacks and reports."""
        lines = self.source.splitlines(keepends=True)
        linecache.cache[self.file] = (len(self.source), None, lines, self.file)
        module = ModuleType(f"program_{self.seed}")
        sys.modules[module.__name__] = module  # where Dynamo looks for the names of what it inlines
        exec(compile(self.source, self.file, "exec"), vars(module))
        return vars(module)

    def build(self) -> nn.Module:
        seed_generators(self.seed)
        model: nn.Module = self.namespace()["Model"](**self.weights())
        model.to(self.dtype)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(self.dtype_of(name))
        return model.train(self.training)

    def runnable(self) -> str:
        """The source as a script that shows what becomes of it."""
        tensors = ", ".join(f"0.7 * torch.randn{self.shape(d)}" for d in self.tensors.values())
        inputs = ", ".join(
            f"torch.randn({self.shape(dims)}, dtype=torch.{self._dtype_name})"
            for dims in self.inputs.values()
        )
        main = _MAIN.format(
            seed=self.seed,
            tensors=tensors,
            inputs=inputs,
            dtype=self._dtype_name,
            training=self.training,
            dynamic=[self.inputs["x"].index(axis) for axis in self.dynamic],
        )
        return self.source + main

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def reference(self, model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
        """What the module computes, by the op's specification. All in float64."""
        given = self.weights()
        x = arguments["x"]
        names = {"F": F, "torch": torch, "self": model, "x": x, "E": self.sizes["e"]}
        before, after = self.templates
        tokens = "".join(a for a in "".join(self.inputs["x"]) if a in TOKENS)
        heads = "gs" if "g" in "".join(self.inputs["x"]) else "h"
        q = eval(before.format(x="x"), names)
        q = rearranged(q, self.inputs["x"], (*tokens, *heads, "d"), self.sizes)
        lead = q.shape[: len(tokens)]
        q = q.reshape(*([1] * (2 - len(tokens))), *lead, self.sizes["h"], self.sizes["d"])
        r = self._router(q, given, arguments, names, (tokens, heads))
        op = multi_head_ffn_reference(
            q,
            given["gate"],
            given.get("up"),
            given["down"],
            r,
            k_bias=given.get("gate_bias"),
            u_bias=given.get("up_bias"),
            v_bias=given.get("down_bias"),
            activation=self.site["activation"],
            k_scale=self.scales[0],
            u_scale=self.scales[1],
            out_scale=self.scales[2],
        )
        out = op.reshape(*lead, *self.shape(tuple(heads)), self.sizes["d"])
        out = rearranged(out, (*tokens, *heads, "o"), self.outputs, self.sizes)
        result: Tensor = eval(after.format(out="out"), {**names, "out": out})
        return result

    def _router(
        self,
        q: Tensor,
        given: dict[str, Tensor],
        arguments: dict[str, Tensor],
        names: dict[str, Any],
        order: tuple[str, str],
    ) -> Tensor | None:
        if not self.routed:
            return None
        kind = self.features["router"]
        if kind == "input":
            canonical = (*"".join(order), "e")
            r = rearranged(arguments["r"], self.inputs["r"], canonical, self.sizes)
            return r.reshape(*q.shape[:3], -1)
        if kind == "static":
            logits = given["route"].expand(*q.shape[:2], -1, -1)
        elif kind == "per token":
            logits = torch.einsum("blhd,hde->ble", q, given["route"])[:, :, None]
            logits = logits.expand(-1, -1, q.shape[2], -1)
        else:
            logits = torch.einsum("blhd,hde->blhe", q, given["route"])
        result: Tensor = eval(self.routed.format(r="r"), {**names, "r": logits})
        return result


def rearranged(
    x: Tensor, source: Dims, target: Dims, sizes: dict[str, int] | None = None
) -> Tensor:
    """``einops.rearrange`` by dimensions of single-letter axes."""

    def side(dims: Dims) -> str:
        return " ".join("1" if not letters else f"({' '.join(letters)})" for letters in dims)

    cut = {a for letters in source if len(letters) > 1 for a in letters}
    known = {a: n for a, n in (sizes or {}).items() if a in cut}
    result: Tensor = einops.rearrange(x, f"{side(source)} -> {side(target)}", **known)
    return result


@dataclass(frozen=True)
class Weight:
    """Where ``forward`` finds one of the weights or biases."""

    name: str
    text: str
    dims: Dims  # as stored; without the axes of the list
    listed: str = ""  # the axes of the list that it is spread over, outermost first
    module: bool = False  # the list holds Linear modules


def generate(seed: int, kind: str | None = None) -> Program:
    """The program of this seed; of one of ``KINDS``, or of none (""), instead of a drawn one."""
    return _Generator(seed, kind).program()


class _Generator:
    """Draws a program. All that is random comes from ``self.rng``, and for its kind ``self.more``.

    A kind that a program cannot have, such as sums by ``addmm`` without a loop, is left out.
    """

    def __init__(self, seed: int, kind: str | None = None) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.more = Random(f"kind of {seed}")
        drawn = self.more.choice(KINDS) if self.more.random() < 0.5 else ""
        self.kind = drawn if kind is None else kind
        self.features: dict[str, str] = {"kind": self.kind} if self.kind else {}
        self.kept: dict[str, torch.dtype] = {}
        self.raw: set[str] = set()  # biases that are added in a wider dtype
        self.sizes = self._sizes()
        self.numeric = torch.float64
        self.precision = torch.float64
        self._dtypes()
        self.own = self._sharing()  # the head axes of weights: h, g or none
        self.heads = "gs" if self.own == "g" and self.features["sharing"] == "grouped" else "h"
        self.sub_networks = "e" if self.sizes["e"] > 1 or self.chance(0.1) else ""
        self.gated = self.chance(0.65)
        self.activation = self.draw("activation", *ACTIVATIONS)
        self.layout = self._layout()
        self.tokens = "".join(a for a in "".join(self.layout) if a in TOKENS)
        apart = all(a in self.layout for a in self.tokens)
        self.dynamic = tuple(self.tokens) if self.chance(0.2) and apart else ()
        if self.dynamic and len(self.tokens) == 2 and self.chance(0.4):
            self.dynamic = (self.rng.choice(self.tokens),)
        self.loops = self._loops()
        self.biases = self._biases()
        self.router = self._router_kind()
        self.scales = [self._scale(), self._scale() if self.gated else 1.0, 1.0]
        self.modes = self._modes()
        self.values = self._values()
        self.symbol = self._symbol()
        self.writer = Writer(
            self.rng,
            self.sizes,
            dynamic=bool(self.dynamic),
            detours=self.rng.choice([0.0, 0.0, 0.05, 0.15]),
            cast=any("autocast" in mode for mode in self.modes),
        )
        self.init: list[str] = []
        self.inputs: dict[str, Dims] = {"x": self.layout}
        self.needs_linear = False
        self.mixed = False  # whether the router is in a higher precision than the rest
        self.scaled: set[str] = set()  # projections whose product has its scale already

    # Draws.

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def draw(self, feature: str, *options: str) -> str:
        """One of the options, remembered as a feature of the program."""
        self.features[feature] = self.rng.choice(options)
        return self.features[feature]

    def _sizes(self) -> dict[str, int]:
        heads = self.rng.choice([1, 2, 2, 3, 3, 4])
        sub_networks = self.rng.choice([1, 1, 2, 3] if heads > 1 else [2, 3])
        groups = self.rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
        width = self.rng.choice([3, 4, 5, 6, heads if heads > 1 else 3])
        hidden = self.rng.choice([2, 4, 5, 6, 7, width])
        batch, length = self.rng.choice([2, 3]), self.rng.choice([2, 3, 5])
        tokens = self.rng.choice([3, 5, 6])
        if self.kind == "one size":
            length = tokens = sub_networks = width = hidden = self.more.choice([2, 2, 3, 4])
            heads = self.more.choice([length, length, length, 1])
            groups, batch = self.more.choice([1, heads]), self.more.choice([1, length])
        elif self.kind == "one token":
            batch = length = tokens = 1
        return {
            "b": batch,
            "l": length,
            "t": tokens,
            "h": heads,
            "g": groups,
            "s": heads // groups,
            "e": sub_networks,
            "f": hidden,
            "d": width,
            "o": width,
            "p": 2,
            "u": 2 * hidden,
        }

    def _dtypes(self) -> None:
        kind = self.draw("dtype", *["float64"] * 7, "float32", "float32", "bfloat16")
        if self.kind == "dtypes":
            kind = self.more.choice(["bfloat16", "bfloat16", "float16", "float32"])
        elif self.kind == "modes" and kind == "float64":  # which autocast leaves as it is
            kind = "float32"
        self.features["dtype"] = kind
        self.numeric = self.precision = getattr(torch, kind)

    def _sharing(self) -> str:
        groups, heads = self.sizes["g"], self.sizes["h"]
        if heads == 1 or self.chance(0.75):
            self.features["sharing"] = "none"
            self.sizes["g"], self.sizes["s"] = heads, 1
            return "h"
        if groups == heads:
            self.sizes["g"], self.sizes["s"] = 1, heads
            groups = 1
        if groups == 1:
            self.features["sharing"] = "all"
            return ""
        self.draw("sharing", "grouped", "repeated")
        return "g"

    def _layout(self) -> Dims:
        h = self.heads
        options: list[Dims] = [
            ("b", "l", h + "d"),
            ("b", "l", h + "d"),
            ("t", h + "d"),
        ]
        if self.own:  # else heads and tokens are not to be told apart
            options += [
                ("b", "l", h, "d"),
                ("b", h, "l", "d"),
                ("t", h, "d"),
                (h, "t", "d"),
                (h, "b", "l", "d"),
                ("b", h + "d", "l"),
                ("b", "l", "d" + h),
                ("b", "l", "d", h),
                ("t", "d" + h),
            ]
        layout = self.rng.choice(options)
        if self.kind == "dispatched" and self.own:
            layout = self.more.choice([(h + "t", "d"), (h + "t", "d"), ("b", h + "l", "d")])
        self.features["layout"] = " ".join(layout)
        return layout

    def _loops(self) -> str:
        options = ["", "", ""]
        if self.sub_networks:
            options += ["e", "e"]
        if self.heads == "h" and self.sizes["h"] > 1:
            options += ["h"]
            if self.sub_networks:
                options += ["he", "eh"]
        loops = self.rng.choice(options)
        self.features["loops"] = loops or "none"
        return loops

    def _biases(self) -> set[str]:
        names = ["gate_bias", "down_bias"] + (["up_bias"] if self.gated else [])
        if self.kind in ("one token", "dtypes") and self.more.random() < 0.8:
            return {name for name in names if self.more.random() < 0.8}
        if self.chance(0.65):
            return set()
        return {name for name in names if self.chance(0.7)}

    def _modes(self) -> tuple[str, str, str]:
        if self.kind != "modes":
            return ("", "", "")
        grad = ["", "", "no_grad", "enable_grad"]
        around = self.more.choice([*grad, "autocast", "autocast", "inference_mode"])
        inside = self.more.choice([*grad, "autocast", "autocast", "no autocast", "inference_mode"])
        called = self.more.choice(["", "checkpoint", "cond"])
        self.features["modes"] = f"{around or 'none'} > {called or 'call'} > {inside or 'none'}"
        return (around, inside, called)

    def _values(self) -> str:
        if self.kind != "values":
            return ""
        self.features["values"] = self.more.choice(VALUES)
        return self.features["values"]

    def _symbol(self) -> str:
        """Where an attribute, which is a symbol under dynamic=True, scales the network."""
        if self.kind != "symbols":
            return ""
        self.features["symbol"] = self.more.choice(["output", "output", "gate", "none"])
        return self.features["symbol"]

    def _router_kind(self) -> str:
        optional = self.sizes["h"] > 1  # one head and no router is an ordinary network
        absent = self.chance(0.5 if self.sizes["e"] == 1 else 0.15)
        if not self.sub_networks or (optional and absent):
            self.features["router"] = "none"
            return ""
        kinds = ["per head"] * 4 + ["per token"] * 2
        kinds += ["static", "input"]
        kind = self.draw("router", *kinds)
        if kind == "input":
            return "{r}"
        options = [n for n in ROUTERS if kind != "static" or n != "top 2"]
        return ROUTERS[self.draw("normalised", *options)]

    def _scale(self) -> float:
        """A constant factor of a projection."""
        return self.rng.choice([0.5, 1.5, 0.25, 2.0, -1.0]) if self.chance(0.12) else 1.0

    # The program.

    def program(self) -> Program:
        w = self.writer
        x = self._input()
        q = self._query(x)
        self.weights = self._storage()
        r = self._router(q) if self.router else None
        out = self._over(self.loops, q, r, {})
        self._output(out)
        source, tensors = self._source()
        return Program(
            seed=self.seed,
            source=source,
            sizes=self.sizes,
            tensors=tensors,
            inputs=self.inputs,
            outputs=self.outputs,
            site=self._site(),
            routed=self.router,
            templates=(BEFORE[self.features["before"]], AFTER[self.features["after"]]),
            scales=(self.scales[0], self.scales[1], self.scales[2]),
            dtype=self.numeric,
            precision=self.precision,
            dynamic=self.dynamic,
            training=self.chance(0.8) and self.kind != "writes",
            modes=self.modes,
            values=self.values,
            kept=self.kept,
            all_dynamic=self.kind == "symbols",
            features=self.features | {"contractions": ", ".join(sorted(w.spellings))},
            assignments=tuple(w.assignments),
        )

    def _site(self) -> dict[str, Any]:
        return {
            "heads": self.sizes["h"],
            "groups": self.sizes["h"] if self.features["sharing"] == "none" else self.sizes["g"],
            "head_dim": self.sizes["d"],
            "sub_networks": self.sizes["e"],
            "hidden": self.sizes["f"],
            "activation": self.activation,
            "gated": self.gated,
            "routed": bool(self.router),
        }

    def _canonical(self) -> dict[str, Dims]:
        """The canonical tensors that the program has."""
        own = self.own or "g"
        matrix: Dims = (own, "e", "f", "d")
        tensors: dict[str, Dims] = {"gate": matrix, "down": matrix}
        if self.gated:
            tensors["up"] = matrix
        for bias in sorted(self.biases):
            tensors[bias] = (own, "e", "d" if bias == "down_bias" else "f")
        if self.router and self.features["router"] != "input":
            static = self.features["router"] == "static"
            tensors["route"] = ("h", "e") if static else ("h", "d", "e")
        return tensors

    def _source(self) -> tuple[str, dict[str, Dims]]:
        tensors = self._canonical()
        title = f"Program {self.seed}: " + ", ".join(f"{k} {v}" for k, v in self.features.items())
        letters = "hefd" + ("gs" if self.own == "g" else "")
        sizes = ", ".join(SIZES[a] for a in letters)
        numbers = ", ".join(str(self.sizes[a]) for a in letters)
        text = _HEADER.format(
            title=title,
            sizes=f"{sizes} = {numbers}",
            helper=_LINEAR if self.needs_linear else "",
            parameters=": Tensor, ".join(tensors),
        )
        text += "".join(f"        {line}\n" for line in self.init)
        text += f"\n    def forward(self, {': Tensor, '.join(self.inputs)}: Tensor) -> Tensor:\n"
        text += "".join(f"        {line}\n" for line in self.writer.lines)
        return text, tensors

    # Input, query, router.

    def _input(self) -> Named:
        w = self.writer
        names = [SIZES[a] for a in self.tokens]
        dims = {a: (at, letters) for at, letters in enumerate(self.layout) for a in letters}
        sizes = []
        for axis in self.tokens:
            at, letters = dims[axis]
            rest = size(letters.replace(axis, ""))
            sizes.append(f"x.shape[{at}]" + (f" // ({rest})" if rest != "1" else ""))
        w.add(f"{', '.join(names)} = {', '.join(sizes)}")
        w._taken |= {*names, "x", "h", "e", "H", "E", "G", "S", "d", "f"}
        options = ["nothing", "nothing", "scale", "activation"]
        merged = self.layout[-1] == self.heads + "d"
        if self.layout[-1][-1] == "d":
            options += ["layer norm"]
        if merged:
            options += ["linear"]
        kind = self.draw("before", *options)
        if self.kind == "made queries":  # of 16 bits there are no complex numbers
            of_complex = () if self.numeric in _HALF else _OUT_OF_COMPLEX
            kind = self.features["before"] = self.more.choice(_MADE + of_complex)
        if kind == "linear":
            self.init.append("self.before = nn.Linear(H * d, H * d)")
        if kind == "nothing":
            return Named("x", self.layout)
        return w.let("y", Named(BEFORE[kind].format(x="x"), self.layout), "input")

    def _query(self, x: Named) -> Named:
        """The query in the layout that the program works in."""
        w = self.writer
        axes = [*self.tokens, *self.heads]
        options: list[list[str]] = [[*self.tokens, *self.heads], [*self.heads, *self.tokens]]
        if len(self.tokens) == 2:
            options.append([self.tokens[0], *self.heads, self.tokens[1]])
        order = self.rng.choice(options)
        if self.chance(0.1):
            self.rng.shuffle(axes)
            order = axes
        target: tuple[str, ...] = (*order, "d")
        if "h" in self.loops and any(len(letters) > 1 for letters in x.dims) and self.chance(0.5):
            target = x.dims
        if target == x.dims and self.chance(0.5):
            return x if x.text != "x" else w.let("q", x, "query")
        q = w.rearrange(x, target)
        if self.chance(0.3):
            q = q.then(".contiguous()")
        return w.let("q", q, "query")

    def _router(self, q: Named) -> Named:
        w = self.writer
        kind = self.features["router"]
        if kind == "input":
            dims = [*self.tokens, *self.heads, "e"]
            if self.chance(0.3):
                self.rng.shuffle(dims)
            self.inputs["r"] = tuple(dims)
            w._taken.add("r")
            if self.kind == "dtypes" and self.more.random() < 0.7:
                self.kept["r"] = self.more.choice([torch.float32, torch.float64])
                self.features["router dtype"] = str(self.kept["r"])
                self.mixed = True
            return Named("r", tuple(dims))
        heads = self.heads
        stored = (heads, "e") if kind == "static" else (heads, "d", "e")
        route = Named("self.route", stored)
        self.init.append("self.route = nn.Parameter(route)")
        lower = False
        if kind == "static":
            logits = w.rearrange(route, (*heads, "e"))
        else:
            lower = self.numeric is not torch.float64 and self.chance(0.5)
            a, b = (q.then(".float()"), route.then(".float()")) if lower else (q, route)
            summed = heads + "d" if kind == "per token" else "d"
            plain = ["einsum", "einsum", "multiply", "matmul"]
            logits = w.contract(a, b, summed, kind=self.rng.choice(plain))
            rest = [x for x in logits.dims if x != "e"]
            logits = w.rearrange(logits, (*rest, "e"))
        logits = w.let("logits", logits)
        r = Named(self.router.format(r=logits.text), logits.dims)
        self.mixed = lower
        if lower and self.chance(0.5):
            r, self.mixed = r.then(".to(x.dtype)"), False
        r = w.let("r", r, "router")
        if self.chance(0.3):
            dims = list(r.dims)
            self.rng.shuffle(dims)
            r = w.let("r", w.rearrange(r, dims), "router")
        return r

    # Weights.

    def _storage(self) -> dict[str, Weight]:
        """Draw how each weight is stored, and write ``__init__``."""
        self.packed = ""
        if self.gated and self.chance(0.3):
            self.packed = self.draw("packed", "apart", "halves", "interleaved")
            self.first = self.draw("first half", "gate", "gate", "up")
            self.scales[:2] = [1.0, 1.0]
        if self.symbol == "gate" and (self.packed or "gate_bias" in self.biases):
            self.symbol = self.features["symbol"] = "output"
        kind = self.draw("storage", "parameter", "parameter", "parameter", "buffer", "input")
        if self.loops and self.chance(0.4):
            kind = self.features["storage"] = "list"
        linears = kind == "list" and self._linear_fits() and self.chance(0.6)
        if linears:
            self.features["storage"] = "list of Linear"
        weights: dict[str, Weight] = {}
        merged = self.chance(0.25)
        for name in self._stored_names():
            weights[name] = self._store(name, kind, linears, merged)
        return weights

    def _linear_fits(self) -> bool:
        """Whether each weight is one matrix in the innermost loop."""
        return set(self._weight_axes("gate")) - set(self.loops) <= set("fd") and not self.packed

    def _stored_names(self) -> list[str]:
        names = ["gate", "down"] + (["up"] if self.gated and not self.packed else [])
        biases = sorted(self.biases)
        if self.packed and {"gate_bias", "up_bias"} & self.biases:
            self.biases |= {"gate_bias", "up_bias"}  # packed like the weights
            biases = sorted(self.biases - {"up_bias"})
        return names + biases

    def _weight_axes(self, name: str) -> str:
        inner = {"gate": "fd", "up": "fd", "down": "fo", "down_bias": "o"}.get(name, "f")
        return self.own + self.sub_networks + inner

    def _store(self, name: str, kind: str, linears: bool, merged: bool) -> Weight:
        axes = self._weight_axes(name)
        value, source = name, self._source_dims(axes)
        if self.packed and name in ("gate", "gate_bias"):
            value, source, axes = self._pack(name, source, axes)
        listed = "".join(a for a in self.loops if a in axes) if kind == "list" else ""
        stored = [a for a in axes if a not in listed]
        attribute = {"gate": "gate_up", "gate_bias": "gate_up_bias"}.get(name, name)
        attribute = attribute if self.packed else name
        if linears:
            return self._store_linears(name, listed)
        self.rng.shuffle(stored)
        if "bias" in name:
            stored = [a for a in axes if a not in listed]
        dims = self._some_merged(stored) if merged else tuple(stored)
        if listed:
            return self._store_list(attribute, value, source, listed, dims)
        text = self._rearranged_text(value, source, dims)
        if self.kind == "dtypes" and "bias" in name and self.more.random() < 0.7:
            self.kept[attribute] = self.more.choice([torch.float32, torch.float64])
            if self.more.random() < 0.3 and not self.packed:
                self.raw.add(name)
                self.features["biases"] = "in other dtypes"
        if kind == "buffer":
            self.init.append(f'self.register_buffer("{attribute}", {text}.clone())')
        elif kind == "input" and name in ("gate", "up", "down") and not self.packed:
            argument = f"{name}_weight"
            self.inputs[argument] = tuple(letters.replace("o", "d") for letters in dims)
            self.writer._taken.add(argument)
            return Weight(name, argument, dims)
        else:
            self.init.append(f"self.{attribute} = nn.Parameter({text}.clone())")
        return Weight(name, f"self.{attribute}", dims)

    def _source_dims(self, axes: str) -> Dims:
        """The canonical dimensions of these axes: "" stands for a dimension of one."""
        own, inner = self.own, axes.removeprefix(self.own + self.sub_networks)
        return (own, self.sub_networks, *inner)

    def _pack(self, name: str, source: Dims, axes: str) -> tuple[str, Dims, str]:
        up = name.replace("gate", "up")
        pair = f"{name}, {up}" if self.first == "gate" else f"{up}, {name}"
        at = source.index("f")
        if self.packed == "apart":
            return f"torch.stack(({pair}))", ("p", *source), "p" + axes
        inner = tuple("u" if a == "f" else a for a in source)
        axes = axes.replace("f", "u")
        if self.packed == "halves":
            return f"torch.cat(({pair}), {at})", inner, axes
        return f"torch.stack(({pair}), {at + 1}).flatten({at}, {at + 1})", inner, axes

    def _some_merged(self, axes: Sequence[str]) -> Dims:
        """Axes side by side, merged into one or two dimensions: flat weights."""
        cut = self.rng.randrange(len(axes))
        parts = ("".join(axes[:cut]), "".join(axes[cut:]))
        return tuple(part for part in parts if part)

    def _rearranged_text(self, value: str, source: Dims, target: Dims) -> str:
        def side(dims: Dims) -> str:
            return " ".join(
                "1" if not a else a if len(a) == 1 else f"({' '.join(a)})" for a in dims
            )

        return f'einops.rearrange({value}, "{side(source)} -> {side(target)}")'

    def _list_index(self, listed: str) -> str:
        """The position in a flat list, by the indices of the loops."""
        return listed if len(listed) == 1 else f"{listed[0]} * {SIZES[listed[1]]} + {listed[1]}"

    def _store_list(
        self, attribute: str, value: str, source: Dims, listed: str, dims: Dims
    ) -> Weight:
        flat = self._rearranged_text(value, source, (listed, *dims))
        self.init.append(f"parts = {flat}")
        self.init.append(
            f"self.{attribute} = nn.ParameterList(nn.Parameter(w.clone()) for w in parts)"
        )
        return Weight(attribute, f"self.{attribute}", dims, listed)

    def _store_linears(self, name: str, listed: str) -> Weight:
        self.needs_linear = True
        if "bias" in name:  # stored with its weight
            return Weight(
                name,
                f"self.{name.removesuffix('_bias')}",
                ("o" if name == "down_bias" else "f",),
                listed,
                True,
            )
        out, inner = ("o", "f") if name == "down" else ("f", "d")
        source = self._source_dims(self._weight_axes(name))
        flat = (
            self._rearranged_text(name, source, (listed, out, inner))
            if listed
            else (self._rearranged_text(name, source, (out, inner)) + "[None]")
        )
        bias = f"{name}_bias"
        if bias in self.biases:
            target: Dims = (listed, out) if listed else (out,)
            added = self._rearranged_text(bias, self._source_dims(self._weight_axes(bias)), target)
            added += "" if listed else "[None]"
            self.init.append(f"pairs = zip({flat}, {added}, strict=True)")
            made = "linear(w, b) for w, b in pairs"
        else:
            self.init.append(f"parts = {flat}")
            made = "linear(w) for w in parts"
        self.init.append(f"self.{name} = nn.ModuleList({made})")
        return Weight(name, f"self.{name}", (out, inner), listed, True)

    def _weight(self, name: str, at: dict[str, str]) -> Named:
        """A weight or bias as it is read inside the loops, ``at`` their indices."""
        w, stored = self.writer, self.weights[name]
        if stored.listed or stored.module:
            index = self._list_index(stored.listed) if stored.listed else "0"
            member = (".bias" if "bias" in name else ".weight") if stored.module else ""
            value = Named(f"{stored.text}[{index}]{member}", stored.dims)
        else:
            value = Named(stored.text, stored.dims)
        for axis, index in at.items():
            if axis in value.letters:
                value = w.select(value, axis, index)
            elif axis == "h" and "g" in value.letters:
                value = w.select(value, "g", "(h // S)")
        if stored.text.removeprefix("self.") in self.kept and name not in self.raw:
            value = value.then(".to(x.dtype)")
        if self.features["sharing"] == "repeated" and "g" in value.letters:
            value = self._repeated(value)
        if self.chance(0.15) and "bias" not in name:
            value = w.let(f"{name}_matrix", value, "weight")
        return value

    def _repeated(self, value: Named) -> Named:
        """The weights of each group, once for each of its heads."""
        w = self.writer
        value = w.singles(value)
        at = value.dim("g")
        dims = tuple("h" if a == "g" else a for a in value.dims)
        if self.chance(0.6):
            return Named(f"{value.atom}.repeat_interleave(S, {at})", dims)
        sizes = ["-1"] * (len(dims) + 1)
        sizes[at + 1] = "S"
        text = f"{value.atom}.unsqueeze({at + 1}).expand({', '.join(sizes)})"
        return Named(f"{text}.flatten({at}, {at + 1})", dims)

    # Loops.

    def _over(self, loops: str, q: Named, r: Named | None, at: dict[str, str]) -> Named:
        """The output of the network, by loops over heads and sub-networks."""
        if not loops:
            return self._network(q, r, at)
        axis, rest = loops[0], loops[1:]
        return (self._heads if axis == "h" else self._sub_networks)(rest, q, r, at)

    def _heads(self, rest: str, q: Named, r: Named | None, at: dict[str, str]) -> Named:
        w = self.writer
        merge = self.draw("merge", "cat", "stack", "slices", "index")
        others = [a for a in self._result_axes(q) if a != "h"]
        if self.chance(0.2):
            self.rng.shuffle(others)
        where = self.rng.randrange(len(others) + (merge != "cat"))
        if self.chance(0.6):
            where = others.index("o")
        whole = list(others)
        if merge in ("cat", "slices"):
            where = min(where, len(others) - 1)
            whole[where] = "h" + whole[where]
        else:
            whole.insert(where, "h")
        name = w.name("out" if not at else "outs")
        if merge in ("slices", "index"):
            w.add(f"{name} = {self._buffer(whole)}")
        else:
            w.add(f"{name} = []")
        with w.block("for h in range(H):"):
            inner = w.let("q_h", w.select(q, "h", "h"), "query")
            routed = None if r is None else w.select(r, "h", "h") if "h" in r.letters else r
            y = self._over(rest, inner, routed, {**at, "h": "h"})
            y = w.rearrange(y, others)
            if merge in ("slices", "index"):
                w.add(f"{self._place(name, whole)} = {y.text}")
            else:
                w.add(f"{name}.append({y.text})")
        if merge in ("slices", "index"):
            return Named(name, tuple(whole))
        glue = "cat" if merge == "cat" else self.rng.choice(["stack", "stack"])
        dim = where if self.chance(0.5) else where - len(whole)
        return w.let("out", Named(f"torch.{glue}({name}, dim={dim})", tuple(whole)), "output")

    def _place(self, name: str, whole: Sequence[str]) -> str:
        """The part of a buffer that belongs to head h."""
        at = next(i for i, letters in enumerate(whole) if "h" in letters)
        items = [":"] * at
        rest = whole[at][1:]
        step = size(rest) if len(rest) < 2 else f"({size(rest)})"
        items.append(f"h * {step} : (h + 1) * {step}" if rest else "h")
        if at == len(whole) - 1 and self.chance(0.5):
            items = ["...", items[-1]]
        return f"{name}[{', '.join(items)}]"

    def _buffer(self, dims: Sequence[str]) -> str:
        shape = ", ".join(size(letters) for letters in dims)
        options = [f"x.new_zeros({shape})", f"torch.zeros({shape}, dtype=x.dtype)"]
        options += [f"torch.zeros(({shape}), dtype=x.dtype, device=x.device)"]
        return self.rng.choice(options)

    def _result_axes(self, q: Named) -> list[str]:
        return ["o" if a == "d" else a for a in q.letters]

    def _sub_networks(self, rest: str, q: Named, r: Named | None, at: dict[str, str]) -> Named:
        w = self.writer
        how = self.draw("sum", "in place", "out of place", "list", "stack", "first")
        dims = self._result_axes(q)
        if self.kind == "fused sums":
            if not rest and "down_bias" not in self.biases and self.more.random() < 0.5:
                return self._added_products(q, r, at)
            if r is not None and not self.mixed:
                how = self.features["sum"] = self.more.choice(["addcmul_", "addcmul"])
        if self.chance(0.2):
            self.rng.shuffle(dims)
        name = w.name({"list": "parts", "stack": "parts"}.get(how, "total"))
        if how in ("list", "stack"):
            w.add(f"{name} = []")
        elif how != "first":
            zeros = self._buffer(dims)
            if self.numeric in _HALF and self.chance(0.5) and "addcmul" not in how:
                zeros = zeros.replace("x.new_zeros(", "torch.zeros(").replace(
                    "dtype=x.dtype", "dtype=torch.float32"
                )
            w.add(f"{name} = {zeros}")
        with w.block("for e in range(E):"):
            routed = None if r is None else w.select(r, "e", "e")
            inner = None if "addcmul" in how else routed
            y = self._over(rest, q, inner, {**at, "e": "e"})
            y = w.rearrange(y, dims)
            if "addcmul" in how:
                assert routed is not None
                w.add(self._addcmul(how, name, y, w.align(routed, dims)))
            else:
                statement = {
                    "in place": f"{name} += {y.text}",
                    "out of place": f"{name} = {name} + {y.text}",
                    "first": f"{name} = {y.text} if e == 0 else {name} + {y.text}",
                }.get(how, f"{name}.append({y.text})")
                w.add(statement)
        if how == "list":
            return w.let("out", Named(f"sum({name})", tuple(dims)), "output")
        if how == "stack":
            dim = self.rng.randrange(len(dims) + 1)
            text = f"torch.stack({name}, {dim}).sum({dim})"
            return w.let("out", Named(text, tuple(dims)), "output")
        return Named(name, tuple(dims))

    def _addcmul(self, how: str, total: str, y: Named, r: Named) -> str:
        """A weighted output is added to the sum, at times with a factor."""
        factor = ""
        if self.more.random() < 0.3:
            self.scales[2] *= 0.5
            factor = ", value=0.5"
        factors = [y.text, r.text]
        self.more.shuffle(factors)
        call = f"{total}.{how}({', '.join(factors)}{factor})"
        return call if how.endswith("_") else f"{total} = {call}"

    def _added_products(self, q: Named, r: Named | None, at: dict[str, str]) -> Named:
        """The last products add themselves to the sum: ``addmm``, ``baddbmm``."""
        w = self.writer
        inner = {**at, "e": "e"}
        shared = "".join(a for a in self._weight_axes("down") if a not in inner and a not in "fo")
        if shared == "g" and self.features["sharing"] == "repeated":
            shared = "" if "h" in at else "h"
        tokens = "".join(a for a in q.letters if a not in shared + "d")
        dims = (shared, tokens, "o") if shared else (tokens, "o")
        call = "baddbmm" if shared else "addmm"
        self.features["sum"] = call
        factors = ""
        if self.more.random() < 0.4:
            self.scales[2] *= 0.5
            factors = self.more.choice([", alpha=0.5", ", beta=1, alpha=0.5"])
        in_place = self.more.random() < 0.5
        total = w.name("total")
        w.add(f"{total} = {self._buffer(dims)}")
        with w.block("for e in range(E):"):
            hidden = self._hidden_of(q, inner)
            if r is not None:
                hidden = w.let("hidden", w.times(hidden, w.select(r, "e", "e")))
                if self.mixed:
                    hidden = w.let("hidden", hidden.then(".to(x.dtype)"))
            left = w.rearrange(hidden, (*dims[:-1], "f"))
            right = w.rearrange(self._weight("down", inner), (*dims[:-2], "f", "o"))
            if in_place:
                w.add(f"{total}.{call}_({left.text}, {right.text}{factors})")
            else:
                w.add(f"{total} = torch.{call}({total}, {left.text}, {right.text}{factors})")
        return w.let("out", w.singles(Named(total, dims)), "output")

    # The network itself.

    def _network(self, q: Named, r: Named | None, at: dict[str, str]) -> Named:
        """act(gate) * up, down, weighted: what is left when the loops are gone."""
        return self._down(self._hidden_of(q, at), r, at)

    def _hidden_of(self, q: Named, at: dict[str, str]) -> Named:
        w = self.writer
        q = w.singles(q)
        if self.packed:
            gate, up = self._packed_projections(q, at)
        else:
            gate = w.let("gate", self._projection("gate", q, at))
            gate = self._rescaled(gate, 0, "gate", at)
            if self.symbol == "gate":
                gate = w.let("gate", gate.then(" * self.scale"))
            up = None
            if self.gated:
                up = w.let("up", self._projection("up", q, at))
                up = self._rescaled(up, 1, "up", at)
        return self._hidden(gate, up)

    def _projection(self, name: str, q: Named, at: dict[str, str]) -> Named:
        """A projection with its bias, but for one that is added after a scale."""
        w, stored = self.writer, self.weights[name]
        summed = "f" if name == "down" else "d"
        bias = f"{name}_bias" in self.biases
        later = name != "down" and self.scales[("gate", "up").index(name)] != 1.0
        if stored.module and not (bias and later) and self.chance(0.7):
            rest = [a for a in q.dims if a != summed]
            q = w.rearrange(q, (*rest, summed))
            index = self._list_index(stored.listed) if stored.listed else "0"
            return Named(f"{stored.text}[{index}]({q.text})", (*rest, stored.dims[0]))
        if bias and later and self.kind == "fused sums" and not self.packed:
            self.scaled.add(name)
            scale = self.scales[("gate", "up").index(name)]
            added = self._weight(f"{name}_bias", at)
            return w.contract(q, self._weight(name, at), summed, added, "bmm", scale)
        added = self._weight(f"{name}_bias", at) if bias and not later else None
        if f"{name}_bias" in self.raw and added is not None:
            return w.plus(w.contract(q, self._weight(name, at), summed), added)
        return w.contract(q, self._weight(name, at), summed, added)

    def _rescaled(self, value: Named, which: int, name: str, at: dict[str, str]) -> Named:
        w, scale = self.writer, self.scales[which]
        if scale == 1.0 or name in self.scaled:
            return value
        text = w.pick(f"{value.atom} * {scale}", f"{scale} * {value.atom}")
        if scale in (0.5, 0.25) and self.chance(0.3):
            text = f"{value.atom} / {1 / scale}"
        value = w.let(name, Named(text, value.dims))
        if f"{name}_bias" in self.biases:
            value = w.let(name, w.plus(value, self._weight(f"{name}_bias", at)))
        return value

    def _packed_projections(self, q: Named, at: dict[str, str]) -> tuple[Named, Named | None]:
        w = self.writer
        bias = self._weight("gate_bias", at) if "gate_bias" in self.biases else None
        both = w.let("both", w.contract(q, self._weight("gate", at), "d", bias))
        glu = self.packed == "halves" and self.first == "up" and self.activation == "sigmoid"
        if glu and self.chance(0.5):
            dims = tuple("f" if a == "u" else a for a in both.dims)
            return Named(f"F.glu({both.text}, {both.dim('u')})", dims), None
        first, second = w.halves(both, self.packed)
        if self.first == "up":
            first, second = second, first
        gate, up = w.let("gate", first), w.let("up", second)
        return gate, up

    def _hidden(self, gate: Named, up: Named | None) -> Named:
        w = self.writer
        if gate.text.startswith("F.glu"):
            return w.let("hidden", gate)
        spelling = self.rng.choice(ACTIVATIONS[self.activation])
        if any(constant in spelling for constant in ROUNDED):
            eps = {t: torch.finfo(t).eps for t in (self.precision, torch.float32)}
            self.precision = max(eps, key=lambda t: eps[t])
            if self.numeric is torch.float64:  # in which it is another activation
                self.numeric = torch.float32
        hidden = Named(spelling.format(x=gate.text), gate.dims)
        if up is None:
            return w.let("hidden", self._narrowed(hidden))
        hidden = w.let("act", hidden) if self.chance(0.4) else hidden
        if up.dims != gate.dims:
            up = w.rearrange(up, gate.dims)
        return w.let("hidden", self._narrowed(w.times(hidden, up)))

    def _narrowed(self, hidden: Named) -> Named:
        """In the network's dtype again, after biases in another one."""
        return hidden.then(".to(x.dtype)") if self.raw & {"gate_bias", "up_bias"} else hidden

    def _down(self, hidden: Named, r: Named | None, at: dict[str, str]) -> Named:
        w = self.writer
        many = "e" in hidden.letters
        biased = "down_bias" in self.biases
        options = ["after", "after"]
        if self.mixed:
            biased = True
        elif many and r is not None:
            options += ["weighted sum"]
        if not biased and r is not None:
            options += ["hidden", "einsum"]
        if not biased and r is None and many:
            options = ["after", "hidden"]
        how = self.draw("applied", *options)
        if how == "einsum":
            assert r is not None
            out = [a for a in hidden.letters if a not in "ef"]
            y = w.einsum([hidden, self._weight("down", at), r], "".join([*out, "o"]))
            w.spellings.add("einsum of three")
            return self._final(w.let("y", y))
        if how == "hidden":
            if r is not None:
                hidden = w.let("hidden", w.times(hidden, r))
            if many and self.chance(0.7):
                y = w.contract(hidden, self._weight("down", at), w.pick("ef", "fe"))
                return self._final(w.let("y", y))
            y = w.let("y", self._projection("down", hidden, at))
            return self._final(self._summed(y) if many else y)
        y = w.let("y", self._projection("down", hidden, at))
        if how == "weighted sum":
            assert r is not None
            y = w.contract(y, r, "e", kind=w.pick("einsum", "einsum", "matmul", "multiply"))
            return self._final(w.let("y", y))
        if r is not None:
            y = w.let("y", w.times(y, r))
        return self._final(self._summed(y) if many else y)

    def _summed(self, y: Named) -> Named:
        """The sum over sub-networks; a mean is a sum with a scale."""
        w = self.writer
        at = y.dim("e")
        rest = tuple(a for a in y.dims if a != "e")
        if self.kind == "slices":
            return self._added(w.let("y", y), at, rest)
        dim = at if self.chance(0.5) else at - len(y.dims)
        if not self.router and self.chance(0.3):
            self.scales[2] /= self.sizes["e"]
            return w.let("y", Named(f"{y.atom}.mean({dim})", rest))
        text = w.pick(
            f"{y.atom}.sum({dim})", f"{y.atom}.sum(dim={dim})", f"torch.sum({y.text}, {dim})"
        )
        if self.kind == "dtypes" and self.more.random() < 0.6:
            wider = self.more.choice(["float32", "float64"])
            text = f"{y.atom}.sum({dim}, dtype=torch.{wider})"
        return w.let("y", Named(text, rest))

    def _added(self, y: Named, at: int, rest: Dims) -> Named:
        """The sum over sub-networks, which are cut out of what they were computed in."""
        places = [*range(self.sizes["e"])]
        self.more.shuffle(places)
        before = ":, " * at
        text = self.more.choice(
            [
                f"sum({y.text}.unbind({at}))",
                f"sum({y.text}.split(1, {at})).squeeze({at})",
                " + ".join(f"{y.text}[{before}{e}]" for e in places),
                " + ".join(f"{y.text}.select({at}, {e})" for e in places),
                " + ".join(f"{y.text}.narrow({at}, {e}, 1).squeeze({at})" for e in places),
            ]
        )
        return self.writer.let("y", Named(text, rest))

    def _final(self, y: Named) -> Named:
        if self.chance(0.1):
            scale = self.rng.choice([0.5, 2.0, 0.7, -1.0])
            self.scales[2] *= scale
            return self.writer.let("y", y.then(f" * {scale}"))
        return y

    # Output.

    def _output(self, out: Named) -> None:
        w = self.writer
        heads = self.heads
        options: list[Dims] = [
            tuple(letters.replace("d", "o") for letters in self.layout),
            tuple(letters.replace("d", "o") for letters in self.layout),
            (*self.tokens, heads + "o"),
            tuple(out.letters),
            out.dims,
        ]
        if self.chance(0.1):
            options = [(*self.tokens, "o" + heads), (heads + "o", *self.tokens)]
            options += [(self.tokens, heads + "o"), (heads, self.tokens + "o")]
        target = self.rng.choice(options)
        if self.numeric in _HALF or self.kind == "dtypes":
            out = out.then(".to(x.dtype)")
        out = w.let("out", w.rearrange(out, target), "output")
        self.outputs = target
        after = ["nothing", "nothing", "activation"]
        if tuple(letters.replace("o", "d") for letters in target) == self.layout:
            after += ["residual"]
        if target[-1][-1] == "o":
            after += ["layer norm"]
        if target[-1] == heads + "o":
            after += ["linear"]
        kind = self.draw("after", *after)
        if kind == "linear":
            self.init.append("self.after = nn.Linear(H * d, H * d)")
        if self.symbol in ("output", "gate"):
            self.init.append("self.scale = 0.7")
            self.scales[2 if self.symbol == "output" else 0] *= 0.7
        if self.symbol == "output":
            out = w.let("out", out.then(" * self.scale"), "output")
        self._return(AFTER[kind].format(out=out.text))

    def _return(self, text: str) -> None:
        """The result is returned, at times twice, or after it was written to the input."""
        w = self.writer
        if self.kind == "returned":
            self.features["returned"] = how = self.more.choice([*RETURNED])
            w.add(f"result = {text}")
            text = RETURNED[how].format("result")
        elif self.kind == "writes":
            same = tuple(letters.replace("o", "d") for letters in self.outputs) == self.layout
            fitting = [how for how in WRITES if same or "{0}" not in WRITES[how][0]]
            self.features["writes"] = how = self.more.choice(fitting)
            write, text_after = WRITES[how]
            w.add(f"result = {text}")
            w.add(write.format("result"))
            text = text_after
        w.add(f"return {text}")
