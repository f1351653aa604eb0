"""One site by itself: it computes what it computes in its model, and is found again."""

from typing import Any

import pytest
import torch
from corpus.positive import POSITIVE
from torch import Tensor, fx, nn

from mhf_compiler import compat
from mhf_compiler.cli.bench import check_part
from mhf_compiler.debug.extract import Part, cut
from mhf_compiler.options import parse_options
from mhf_compiler.patterns import Site
from mhf_compiler.substitution.graph import rewrite_graph

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is the op with its spelling; what Inductor makes of either costs a build."""
    monkeypatch.setattr(compat, "compile_graph", lambda name, gm, *others: gm.forward)


ALWAYS = parse_options(None, {"rewrite": "always"})


def parts(model: nn.Module, *inputs: Tensor) -> list[Part]:
    found: list[tuple[fx.GraphModule, Site]] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        rewrite_graph(gm, ALWAYS, lambda *site: found.append(site))
        return gm.forward

    torch.compile(model, backend=collect)(*inputs)
    torch.compiler.reset()
    return [cut(*site) for site in found]


def part_of(name: str) -> Part:
    case = POSITIVE[name]
    return parts(case.build(), *case.inputs())[0]


@pytest.mark.parametrize(
    "name",
    [
        "Published-heads first",  # adds up in a buffer of another dtype
        "Published-bfloat16",
        "VmapOverHeads",
        "ListOfHeads-cat",
        "BufferFilledByHead",  # written in place, part by part
        "LoopOverHeadsAndSubNetworks-in place",
        "GroupedConvolution",
        "ResidualInBuffer",
        "Autocast-per head",
        "Checkpointed",
    ],
)
def test_a_site_is_found_again_and_agrees(name: str):
    part = part_of(name)
    inputs = [given.make() for given in part.given]
    compared = check_part(part, inputs)
    assert [str(difference) for difference in compared if not difference.agrees] == []
    assert len(compared) == 1 + sum(given.requires_grad for given in part.given)


def test_arguments_are_called_by_their_letters_and_the_models_names():
    part = part_of("RouterOnHidden")
    names = [given.name for given in part.given]
    assert names[1:4] == ["K (gate)", "U (up)", "V (down)"]
    assert [name.split()[0] for name in names] == ["Q", "K", "U", "V", "R"]
    assert [given.requires_grad for given in part.given][1:4] == [True] * 3


class Around(nn.Module):
    """Whatever else a model does stays outside: before, parallel to and after the site."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.network = nn.Linear(32, 32), POSITIVE["Published-heads first"].build()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.before(x).sin()).cos()


def test_only_the_site_is_in_the_part():
    (part,) = parts(Around(), *POSITIVE["Published-heads first"].inputs())
    code = part.spelling.code
    assert "silu" in code
    assert not any(outside in code for outside in ("addmm", "rms_norm", "sigmoid", "sin", "cos"))


def test_open_sizes_are_those_of_the_example():
    case = POSITIVE["RouterOnHidden"]
    (x,) = case.inputs()
    torch._dynamo.mark_dynamic(x, 1)
    (part,) = parts(case.build(), x)
    assert part.given[0].shape == tuple(x.shape)
    inputs = [given.make() for given in part.given]
    assert all(difference.agrees for difference in check_part(part, inputs))
