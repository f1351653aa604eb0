"""Two programs that should do the same: what is rounding, and what is a mistake."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhf_compiler.debug.accuracy import Difference, compare


def plain(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    hidden = F.gelu(x @ w)
    return hidden @ w.mT, hidden.argmax(-1)  # whole numbers are not compared


def inputs(dtype: torch.dtype = torch.float32, training: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    x, w = torch.randn(16, 8, dtype=dtype), torch.randn(8, 24, dtype=dtype)
    return [x.requires_grad_(training), w.requires_grad_(training)]


def compared(
    other: Callable[..., object], dtype: torch.dtype = torch.float32, **kind: bool
) -> dict[str, Difference]:
    found = compare(plain, other, inputs(dtype, **kind), ["x", "w"])
    return {difference.name: difference for difference in found}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_program_agrees_with_itself(dtype: torch.dtype):
    found = compared(plain, dtype)
    assert list(found) == ["output 0", "gradient of x", "gradient of w"]
    assert all(difference.agrees for difference in found.values())


def test_gradients_are_compared_where_they_are_required():
    assert list(compared(plain, training=False)) == ["output 0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_rounding_agrees(dtype: torch.dtype):
    """The same in float32 throughout, rounded once."""

    def rounded_once(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(part.to(dtype) for part in plain(x.float(), w.float()))

    assert all(difference.agrees for difference in compared(rounded_once, dtype).values())


@pytest.mark.parametrize(
    ("dtype", "other"), [(torch.float32, "tanh"), (torch.float64, "tanh"), (torch.bfloat16, "relu")]
)
def test_another_activation_does_not(dtype: torch.dtype, other: str):
    def wrong(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.gelu(x @ w, approximate="tanh") if other == "tanh" else F.relu(x @ w)
        return hidden @ w.mT, hidden.argmax(-1)

    assert not any(difference.agrees for difference in compared(wrong, dtype).values())


def test_a_single_wrong_element_is_seen():
    def wrong(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out, index = plain(x, w)
        return out + torch.zeros_like(out).index_fill(0, torch.tensor(3), 0.1), index

    found = compared(wrong, torch.float32)
    assert not found["output 0"].agrees
    assert found["output 0"].plain is not None
    assert str(found["output 0"]).endswith(": MISMATCH")
    assert found["gradient of w"].agrees


def test_a_wrong_gradient_is_seen_behind_a_right_result():
    def detached(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return plain(x.detach(), w)

    found = compared(detached)
    assert [name for name, difference in found.items() if not difference.agrees] == [
        "gradient of x"
    ]


def test_what_is_no_number_must_be_so_in_both():
    def empty(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out, index = plain(x, w)
        return out * math.nan, index

    assert not compared(empty)["output 0"].agrees
    (same,) = compare(lambda x: x.log(), lambda x: x.log(), [torch.tensor([-1.0, 0.0, 1.0])])
    assert same.agrees


def test_another_shape_does_not_agree():
    (found,) = compare(lambda x: x, lambda x: x[:1], [torch.ones(3)])
    assert not found.agrees


def test_a_gradient_that_cancels_may_be_what_others_round():
    """The gradient of a softmax's shift is zero, and what comes out in its place is rounding."""

    def shifted(x: Tensor, shift: Tensor) -> Tensor:
        return (x + shift).softmax(-1)

    def other(x: Tensor, shift: Tensor) -> Tensor:
        return x.softmax(-1) + 1e-9 * shift

    given = [torch.randn(6, 9).requires_grad_(), torch.randn(6, 1).requires_grad_()]
    assert all(difference.agrees for difference in compare(shifted, other, given))


def test_where_numbers_are_drawn_the_two_are_compared_with_each_other():
    def dropout(x: Tensor, w: Tensor) -> Tensor:
        return F.dropout(plain(x, w)[0], 0.5)

    def wrong(x: Tensor, w: Tensor) -> Tensor:
        return 1.1 * dropout(x, w)

    for other, agrees in ((dropout, True), (wrong, False)):
        for difference in compare(dropout, other, inputs()):
            assert difference.plain is None
            assert difference.agrees is agrees


@pytest.mark.parametrize(
    "dropout",
    [
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0),
    ],
)
def test_a_dropout_of_nothing_draws_no_numbers(dropout: Callable[[Tensor], Tensor]):
    """So the measure is the float64 result, and half the rounding's root is an error."""
    x = torch.randn(2, 4, 6, 8)
    (difference,) = compare(dropout, lambda x: dropout(x) * 1.0001, [x])
    assert not difference.agrees


def test_casts_do_not_narrow_the_measure():
    """Also those of autocast, and what is made in the program."""

    def mixed(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = (x @ x.mT).float() + torch.ones(16, 16, dtype=torch.float16)
        return hidden.bfloat16()

    (found,) = compare(mixed, mixed, [torch.randn(16, 8)])
    assert found.plain is not None
    assert found.plain > 1e-4
    assert found.agrees


def test_the_inputs_are_left_as_they_are():
    def writes(x: Tensor) -> Tensor:
        return x.mul_(2)

    x = torch.ones(3, requires_grad=True)
    assert all(difference.agrees for difference in compare(writes, lambda x: 2 * x, [x]))
    assert x.tolist() == [1, 1, 1]
    assert x.grad is None
