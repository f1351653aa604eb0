"""A FlashMHF model as a package that a C++ program runs without Python: see main.cpp.

    python examples/cpp/export.py build/cpp
    torch=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
    cmake -S examples/cpp -B build/cpp -DCMAKE_PREFIX_PATH="$torch;$PWD/build/cpp/ops"
    cmake --build build/cpp
    build/cpp/run build/cpp

The first command needs this package and a C++ compiler, the next two need CMake and PyTorch's C++
libraries, which any installation of PyTorch has. The last needs neither Python nor a compiler.

With `--device cuda` the package is for the GPU of the machine. It launches its kernels itself, so
no library of the ops is built.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import mhf_compiler

HEADS, NETWORKS, HIDDEN, WIDTH = 4, 3, 48, 32
LAYERS, MODEL = 2, HEADS * WIDTH
LONGEST = 512  # of a sequence, in tokens


class FlashMHF(nn.Module):
    """Heads with several SwiGLUs each, weighted by a router in float32."""

    def __init__(self) -> None:
        super().__init__()
        shape = (HEADS, NETWORKS, HIDDEN, WIDTH)
        self.norm = nn.RMSNorm(MODEL)
        self.split, self.merge = nn.Linear(MODEL, MODEL), nn.Linear(MODEL, MODEL)
        self.gate, self.up = (nn.Parameter(torch.randn(shape) / WIDTH**0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(shape) / HIDDEN**0.5)
        self.router = nn.Parameter(torch.randn(HEADS, WIDTH, NETWORKS) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(self.norm(x)).unflatten(-1, (HEADS, WIDTH))
        r = torch.einsum("blhd,hde->blhe", q.float(), self.router.float()).sigmoid()
        r = (r / r.sum(-1, keepdim=True)).to(q.dtype)
        y = torch.zeros_like(q)
        for e in range(NETWORKS):
            gate = torch.einsum("blhd,hfd->blhf", q, self.gate[:, e])
            up = torch.einsum("blhd,hfd->blhf", q, self.up[:, e])
            out = torch.einsum("blhf,hfd->blhd", F.silu(gate) * up, self.down[:, e])
            y = y + r[..., e, None] * out
        return x + self.merge(y.flatten(2))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the package and the ops")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args(argv)
    folder, dtype, device = arguments.folder, getattr(torch, arguments.dtype), arguments.device
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(*(FlashMHF() for _ in range(LAYERS))).eval().to(device, dtype)

    def tokens(length: int) -> Tensor:
        return torch.randn(2, length, MODEL, dtype=dtype, device=device)

    with torch.no_grad():
        length = {1: Dim("length", min=2, max=LONGEST)}
        program = torch.export.export(model, (tokens(16),), dynamic_shapes=(length,))
        report = mhf_compiler.Report()
        program = mhf_compiler.rewrite(
            program, options={"rewrite": "always"}, report=report, package=True
        )
        print(report)
        # The program finds the dtype and the device of its inputs in the package.
        inputs = {"dtype": arguments.dtype, "device": device}
        metadata = {"aot_inductor.metadata": inputs}
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "model.pt2"), inductor_configs=metadata
        )

        # What the program is to compute, by the model as it is written: sizes and numbers.
        with (folder / "samples.bin").open("wb") as file:
            for x in (tokens(length) for length in (2, 16, 77, LONGEST)):
                for part in (torch.tensor(x.shape), x.float(), model(x).float()):
                    file.write(part.cpu().numpy().tobytes())

    if device == "cpu":
        print(mhf_compiler.build_ops(folder / "ops"))


if __name__ == "__main__":
    main()
