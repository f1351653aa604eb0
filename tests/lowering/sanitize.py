"""Every kernel of the op at odd shapes, to be run under compute-sanitizer: ``make sanitize``.

The shapes are ragged in tokens, head width and hidden units, and leave an incomplete last round of
tiles, so that every edge of a kernel is met.
"""

import sys

import torch

from mhf_compiler.lowering import multi_head_ffn
from mhf_compiler.lowering.ops.router import router_product

# (B, L, H, G, d, E, f, dtype, activation, gated, biased)
PROBLEMS = (
    (2, 777, 3, 1, 8, 3, 256, torch.bfloat16, "gelu_tanh", False, False),
    (3, 129, 16, 1, 128, 4, 512, torch.bfloat16, "sigmoid", True, True),
    (2, 777, 4, 4, 96, 3, 171, torch.float16, "silu", True, True),
    (2, 600, 4, 4, 128, 3, 341, torch.bfloat16, "silu", True, False),
    (2, 777, 16, 2, 40, 4, 341, torch.bfloat16, "gelu_tanh", True, True),
    (1, 600, 2, 2, 256, 2, 100, torch.bfloat16, "silu", True, False),
    (1, 33, 4, 4, 64, 2, 100, torch.bfloat16, "silu", True, False),
    (1, 130, 2, 1, 32, 2, 48, torch.float32, "relu2", True, True),
)


def main(numbers: list[int]) -> None:
    """Run the problems of these numbers, or all."""
    torch.manual_seed(0)
    for number in numbers or range(len(PROBLEMS)):
        B, L, H, G, d, E, f, dtype, activation, gated, biased = PROBLEMS[number]

        def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device="cuda").to(dtype).requires_grad_()

        q, k, v = random(B, L, H, d), random(G, E, f, d), random(G, E, f, d)
        u = random(G, E, f, d) if gated else None
        biases = [random(G, E, n) if biased and there else None for n, there in
                  ((f, True), (f, gated), (d, True))]  # fmt: skip
        if dtype is torch.float32:
            r = random(B, L, H, E)
        else:
            r = router_product(q, random(H, d, E, dtype=torch.float32)).softmax(-1)
        names = ("k_bias", "u_bias", "v_bias")
        out = multi_head_ffn(
            q, k, u, v, r, activation=activation, **dict(zip(names, biases, strict=True))
        )
        out.sum().backward()
        torch.cuda.synchronize()
        assert out.isfinite().all()
        print(tuple(q.shape), dtype, "ran")


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
