"""Train a small ranking model three times, eagerly, with Inductor and with flashmhf, and compare.

    python examples/ranking.py                                   # on a GPU if there is one
    python examples/ranking.py --precision autocast-bf16 --steps 400 --batch 4096

A row is an impression: eight fields, each of which becomes a token of its own. A block mixes the
tokens by a transpose; after a residual and a norm, each token has feed-forward networks of its own:
a multi-head FFN whose heads are the tokens. In odd blocks it has several experts, all computed,
whose gates are zero where relu makes them so. The model knows nothing of the compiler.

The log is made by a rule, from a seed. Users and items have latent vectors a and b of 4 normal
numbers. An item's category is its number modulo 20; whatever else is in a row is uniform. A click
has the log odds  a b / 2 + 0.5 item + 0.7 category[hour] + 0.3 device - 0.15 position - 1,
where each name stands for a normal number of that item, category and hour, or device, and for the
number of the position. The loss is the binary cross-entropy of clicks, the score the area under the
curve (AUC) of rows that were not trained on.

The exit status is 1 if the losses differ by more than rounding, or if nothing was rewritten.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("eager", "inductor", "flashmhf")
FIELDS = {
    "user": 100, "item": 60, "category": 20, "hour": 24, "device": 5, "position": 10,
    "weekday": 7, "page": 50,
}  # fmt: skip
# As in byte_lm.py: rounding, fed back through the weights, and nothing else.
TOLERANCE = {"fp32": 5e-3, "autocast-bf16": 5e-2}


def click_log(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fields [rows, 8] and clicks [rows], by the rule above; always the same users and items."""
    world = torch.Generator().manual_seed(0)
    sizes = list(FIELDS.values())
    a, b = (torch.randn(size, 4, generator=world) for size in sizes[:2])
    item, device = (torch.randn(FIELDS[name], generator=world) for name in ("item", "device"))
    category = torch.randn(FIELDS["category"], FIELDS["hour"], generator=world)

    chance = torch.Generator().manual_seed(1 + seed)
    x = torch.stack([torch.randint(size, (rows,), generator=chance) for size in sizes], 1)
    x[:, 2] = x[:, 1] % FIELDS["category"]
    odds = (a[x[:, 0]] * b[x[:, 1]]).sum(1) / 2 + 0.5 * item[x[:, 1]]
    odds += 0.7 * category[x[:, 2], x[:, 3]] + 0.3 * device[x[:, 4]] - 0.15 * x[:, 5] - 1
    return x, (torch.rand(rows, generator=chance) < odds.sigmoid()).float()


def auc(scores: Tensor, clicks: Tensor) -> float:
    """How often a row with a click has a higher score than one without."""
    ranks = scores.argsort().argsort().double() + 1
    positive = int(clicks.sum())
    above = float(ranks[clicks > 0].sum()) - positive * (positive + 1) / 2
    return above / (positive * (len(clicks) - positive))


class PerTokenFFN(nn.Module):
    """Networks for each of T tokens; of several, the gates of a token weigh the results."""

    def __init__(self, tokens: int, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        shape = tokens, experts, width, hidden
        self.k = nn.Parameter(torch.randn(shape) / width**0.5)
        self.v = nn.Parameter(torch.randn(shape).transpose(2, 3) / hidden**0.5)
        self.k_bias = nn.Parameter(torch.zeros(tokens, experts, hidden))
        self.v_bias = nn.Parameter(torch.zeros(tokens, experts, width))
        self.gate = nn.Linear(width, experts) if experts > 1 else None

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d]
        hidden = F.gelu(torch.einsum("btd,tedf->btef", x, self.k) + self.k_bias)
        y = torch.einsum("btef,tefd->bted", hidden, self.v) + self.v_bias
        if self.gate is not None:
            y = y * F.relu(self.gate(x)).unsqueeze(-1)
        return y.sum(2)


class Block(nn.Module):
    """Token mixing, and networks for each token; residuals, and a norm after each."""

    def __init__(self, tokens: int, width: int, hidden: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.ffn = PerTokenFFN(tokens, width, hidden, experts)
        self.mixed, self.out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d]
        batch, tokens, width = x.shape
        mixed = x.view(batch, tokens, tokens, width // tokens).transpose(1, 2)
        x = self.mixed(x + mixed.reshape(batch, tokens, width))
        return self.out(x + self.dropout(self.ffn(x)))


class Ranker(nn.Module):
    """The logit of a click; the width is a multiple of the number of fields."""

    def __init__(self, width: int, hidden: int, blocks: int, dropout: float) -> None:
        super().__init__()
        sizes, tokens = torch.tensor(list(FIELDS.values())), len(FIELDS)
        self.register_buffer("first", sizes.cumsum(0) - sizes)
        self.embedding = nn.Embedding(int(sizes.sum()), width)
        self.blocks = nn.ModuleList(
            Block(tokens, width, hidden, 1 + 2 * (i % 2), dropout) for i in range(blocks)
        )
        self.head = nn.Linear(tokens * width, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, T]
        tokens = self.embedding(x + self.get_buffer("first"))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.flatten(1)).squeeze(1)


@dataclass(frozen=True)
class Run:
    """What came of training with one back end."""

    backend: str
    losses: list[float]
    auc: float
    milliseconds: float  # of a step, without the first ones
    rewritten: int


def train(backend: str, options: argparse.Namespace) -> Run:
    """The same weights and the same batches each time."""
    torch.manual_seed(options.seed)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    device = torch.device(options.device)
    model = Ranker(options.width, options.hidden, options.blocks, options.dropout).to(device)
    call: Callable[[Tensor], Tensor] = model
    if backend != "eager":
        own = {"rewrite": options.rewrite, "fallback": options.fallback}
        chosen = own if backend == "flashmhf" else None
        call = torch.compile(model, backend=backend, options=chosen, dynamic=False)
    cast = torch.autocast(device.type, torch.bfloat16, options.precision == "autocast-bf16")
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    x, clicks = (part.to(device) for part in click_log(options.steps * options.batch, options.seed))
    losses, start = [], 0.0
    for step, rows in enumerate(torch.arange(len(x), device=device).split(options.batch)):
        if step == min(3, options.steps - 1):
            start = time.perf_counter()
        with cast:
            logits = call(x[rows])
        loss = F.binary_cross_entropy_with_logits(logits.float(), clicks[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    found = torch.stack(losses).tolist()  # waits for the device
    took = (time.perf_counter() - start) / max(options.steps - 3, 1)
    model.eval()
    x, clicks = click_log(20 * options.batch, options.seed + 1)
    with torch.no_grad(), cast:
        scores = torch.cat([call(part.to(device)).float().cpu() for part in x.split(options.batch)])
    rewritten = torch._dynamo.utils.counters["flashmhf"]["sites_rewritten"]
    return Run(backend, found, auc(scores, clicks), 1e3 * took, rewritten)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--precision", choices=TOLERANCE, default=[*TOLERANCE][gpu])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--rewrite", choices=("auto", "always"), default="always")
    parser.add_argument("--fallback", choices=("inductor", "aot_eager"), default="inductor")
    for name, number in {"width": 256 if gpu else 32, "hidden": 1024 if gpu else 64}.items():
        parser.add_argument(f"--{name}", type=int, default=number, help="of each token")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0, help="differs between back ends")
    parser.add_argument("--batch", type=int, default=4096 if gpu else 256)
    parser.add_argument("--steps", type=int, default=200 if gpu else 100)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    runs = [train(backend, options) for backend in options.backends]
    print(f"{'':10}{'first loss':>11}{'last loss':>11}{'AUC':>8}{'ms a step':>11}{'rewritten':>11}")
    for run in runs:
        last = sum(run.losses[-10:]) / len(run.losses[-10:])
        numbers = f"{run.losses[0]:11.4f}{last:11.4f}{run.auc:8.4f}{run.milliseconds:11.2f}"
        print(f"{run.backend:10}{numbers}{run.rewritten:11}")
    gaps = [
        max(abs(a - b) for a, b in zip(run.losses, runs[0].losses, strict=True)) for run in runs
    ]
    tolerance = TOLERANCE[options.precision]
    wrong = [f"{r.backend}: a loss is off by {g:.2e}" for r, g in zip(runs, gaps, strict=True)
             if not g <= tolerance]  # fmt: skip
    wrong += [f"{r.backend}: nothing rewritten" for r in runs
              if r.backend == "flashmhf" and not r.rewritten]  # fmt: skip
    print(
        "\n".join(wrong)
        or f"the loss curves coincide: no step differs by more than {max(gaps):.0e}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
