"""One process of two that train under DistributedDataParallel; `test_buckets.py` starts it.

python bucketed.py RANK WORLD FOLDER
"""

import sys

import torch
import torch.distributed as dist
from test_buckets import ALWAYS, LAYERS, Tower, step
from torch.nn.parallel import DistributedDataParallel

from mhf_compiler.compat import counters


def main(rank: int, world: int, folder: str) -> None:
    """Gradients are the mean of those of both halves of the batch."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model, xs = Tower(), torch.randn(world, 3, 5, 128)
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    compiled = torch.compile(ddp, backend="flashmhf", options=ALWAYS)
    for _ in range(2):  # DDP arranges its buckets again after the first
        found = step(compiled, ddp, xs[rank])[1:]
    plain = Tower()
    plain.load_state_dict(model.state_dict())
    gradients = [step(plain, plain, x)[1:] for x in xs]
    expected = [sum(each) / world for each in zip(*gradients, strict=True)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["flashmhf"]["sites_rewritten"] == LAYERS, counters["flashmhf"]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
