"""The activations of a feed-forward network: one entry per name."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its derivative.

    ``function`` and ``derivative`` define the activation; both take the pre-activation and
    return a new tensor of its shape and dtype, and ``function`` is differentiable by autograd.
    The other two are how the CPU path evaluates it inside its scratch buffers. They are
    optional: set them only where an in-place spelling makes fewer passes over memory.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor] | None = None
    in_place_with_derivative: Callable[[Tensor, Tensor], None] | None = None

    def evaluate_(self, x: Tensor) -> None:
        """Overwrite the pre-activation ``x`` with the activation."""
        if self.in_place is not None:
            self.in_place(x)
        else:
            x.copy_(self.function(x))

    def evaluate_with_derivative_(self, x: Tensor, slope: Tensor) -> None:
        """Overwrite ``x`` with the activation and ``slope`` with the derivative at old ``x``."""
        if self.in_place_with_derivative is not None:
            self.in_place_with_derivative(x, slope)
        else:
            slope.copy_(self.derivative(x))
            self.evaluate_(x)


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_with_derivative_(x: Tensor, slope: Tensor) -> None:
    # With s = sigmoid(x) and y = x * s the derivative is s + y * (1 - s), which is lerp(s, 1, y):
    # one exponential and three passes for both results.
    torch.sigmoid(x, out=slope)
    x.mul_(slope)
    torch.lerp(slope, x.new_ones(()), x, out=slope)


def _gelu_derivative(x: Tensor) -> Tensor:
    cumulative = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return cumulative + x * density


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (x + cubic * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cubic * x * x)


def _relu_derivative(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _relu2_(x: Tensor) -> Tensor:
    return x.relu_().square_()


def _relu2_derivative(x: Tensor) -> Tensor:
    return 2 * F.relu(x)


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _tanh_derivative(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(
        F.silu,
        _silu_derivative,
        in_place=lambda x: F.silu(x, inplace=True),
        in_place_with_derivative=_silu_with_derivative_,
    ),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative),
    "relu": Activation(F.relu, _relu_derivative, in_place=torch.relu_),
    "relu2": Activation(_relu2, _relu2_derivative, in_place=_relu2_),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivative, in_place=torch.sigmoid_),
    "tanh": Activation(torch.tanh, _tanh_derivative, in_place=torch.tanh_),
}
