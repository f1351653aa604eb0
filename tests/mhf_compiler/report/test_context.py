"""What a report is of."""

import torch
from torch import nn

import mhf_compiler
from mhf_compiler.options import chosen, parse_options
from mhf_compiler.report.context import context_of


class Model(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale


def test_the_model_its_inputs_the_mode_and_the_options():
    options = chosen(parse_options(None, {"rewrite": "always", "strict": False}))
    with torch.no_grad():
        found = context_of(
            torch.compile(Model().eval()), [torch.zeros(2, 3)], {"scale": 2.0}, options
        )
    assert found.model == "Model"
    assert found.inputs == ("float32[2, 3]", "scale: 2.0")
    assert (found.training, found.gradients) == (False, False)
    assert found.options == {"rewrite": "always"}  # not those that are the defaults


def test_the_machine_the_versions_and_the_date():
    found = context_of(Model(), [[torch.zeros(2), {"a": None}]])
    assert found.inputs == ("(float32[2], dict)",)
    assert found.device is not None
    assert found.device.startswith("CPU (")
    assert found.versions["PyTorch"] == torch.__version__
    assert found.versions["mhf_compiler"] == mhf_compiler.__version__
    assert found.date.startswith("20")


def test_a_function_has_its_name_and_what_is_unknown_is_left_out():
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    function = context_of(double, [torch.zeros(2)])
    assert str(function.model).endswith("double")
    assert function.training is None
    unknown = context_of()
    assert (unknown.model, unknown.gradients, unknown.device) == (None, None, None)


def test_of_many_inputs_the_first_are_named():
    assert context_of(Model(), [1] * 20).inputs == (*["1"] * 8, "and 12 more")


def test_a_card_that_is_not_there_is_named():
    assert context_of(Model(), [torch.zeros(2)], device="h100").device == "h100"
