"""A network whose parts tests put together in their own ways."""

import torch
from torch import Tensor, nn

B, L, H, E, d, f = 2, 5, 3, 2, 4, 6


class Network(nn.Module):
    """Sub-networks of all heads, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(H, d, E) / 2)
        shape = (H, E, f, d)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(shape) / 2) for _ in range(3))
        self.double()

    def router_of(self, q: Tensor) -> Tensor:
        return torch.einsum("blhd,hde->blhe", q, self.router).sigmoid()

    def head(self, x: Tensor, h: int) -> Tensor:
        q = x.unflatten(-1, (H, d))[:, :, h]
        gate = torch.einsum("bld,efd->blef", q, self.gate[h])
        up = torch.einsum("bld,efd->blef", q, self.up[h])
        return torch.einsum("blef,efd->bld", nn.functional.silu(gate) * up, self.down[h])

    def hidden(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, d))
        gate = torch.einsum("blhd,hefd->blhef", q, self.gate)
        up = torch.einsum("blhd,hefd->blhef", q, self.up)
        return nn.functional.silu(gate) * up * self.router_of(q).unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("blhef,hefd->blhd", self.hidden(x), self.down).flatten(2)
