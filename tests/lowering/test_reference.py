"""The specification says what the formula says, and is differentiable."""

import itertools

import pytest
import torch

from mhf_compiler.lowering import multi_head_ffn_reference
from mhf_compiler.lowering.activations import ACTIVATIONS, Activation


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_the_formula_element_by_element():
    """Every index of the formula in a Python loop, on numbers small enough for one."""
    torch.manual_seed(0)
    B, L, H, d, G, E, f = 2, 3, 4, 2, 2, 3, 2
    q, r = randn(B, L, H, d), randn(B, L, H, E)
    k, u, v = randn(G, E, f, d), randn(G, E, f, d), randn(G, E, f, d)
    k_bias, u_bias, v_bias = randn(G, E, f), randn(G, E, f), randn(G, E, d)
    expected = torch.zeros(B, L, H, d, dtype=torch.float64)
    for b, t, h, e in itertools.product(range(B), range(L), range(H), range(E)):
        g = h // (H // G)
        token = q[b, t, h]
        down = v_bias[g, e].clone()
        for i in range(f):
            gate = 0.5 * token.dot(k[g, e, i]) + k_bias[g, e, i]
            up = 2.0 * token.dot(u[g, e, i]) + u_bias[g, e, i]
            down += gate * torch.sigmoid(gate) * up * v[g, e, i]
        expected[b, t, h] += 3.0 * r[b, t, h, e] * down
    out = multi_head_ffn_reference(
        q, k, u, v, r, k_bias=k_bias, u_bias=u_bias, v_bias=v_bias,
        k_scale=0.5, u_scale=2.0, out_scale=3.0,
    )  # fmt: skip
    torch.testing.assert_close(out, expected)


def test_what_is_left_out_is_neutral():
    torch.manual_seed(0)
    q, k, v = randn(1, 3, 2, 4), randn(2, 2, 5, 4), randn(2, 2, 5, 4)
    ones, zeros = torch.ones(2, 2, 5).double(), torch.zeros(2, 2, 5, 4).double()
    short = multi_head_ffn_reference(q, k, None, v)
    spelled_out = multi_head_ffn_reference(
        q, k, zeros, v, torch.ones(1, 3, 2, 2), u_bias=ones, v_bias=torch.zeros(2, 2, 4).double()
    )
    torch.testing.assert_close(short, spelled_out)


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(gated: bool):
    torch.manual_seed(0)
    q, r = randn(1, 2, 2, 2), randn(1, 2, 2, 2)
    k, v, v_bias = randn(1, 2, 3, 2), randn(1, 2, 3, 2), randn(1, 2, 2)
    u = randn(1, 2, 3, 2) if gated else None
    tensors = [x.requires_grad_() for x in (q, k, v, r, v_bias)]

    def call(q, k, v, r, v_bias):
        return multi_head_ffn_reference(q, k, u, v, r, v_bias=v_bias, k_scale=0.7)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_table_of_activations(name: str):
    """The derivative is that of the function, in place or not; the samples avoid the kink at 0."""
    activation = ACTIVATIONS[name]
    x = torch.linspace(-6, 6, 100, dtype=torch.float64, requires_grad=True)
    value = activation.function(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(activation.derivative(x.detach()), slope)
    in_place, also_in_place = x.detach().clone(), x.detach().clone()
    slope_in_place = torch.empty_like(slope)
    activation.evaluate_(in_place)
    activation.evaluate_with_derivative_(also_in_place, slope_in_place)
    torch.testing.assert_close(in_place, value.detach())
    torch.testing.assert_close(also_in_place, value.detach())
    torch.testing.assert_close(slope_in_place, slope)


def test_an_activation_needs_only_its_function_and_derivative():
    square = Activation(torch.square, lambda x: 2 * x)
    x, slope = torch.tensor([3.0, -2.0]), torch.empty(2)
    square.evaluate_with_derivative_(x, slope)
    assert x.tolist() == [9.0, 4.0]
    assert slope.tolist() == [6.0, -4.0]
