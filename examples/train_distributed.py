"""Train a byte-level FlashMHF language model on several devices, in one of four ways.

    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel fsdp

``ddp`` replicates the model, ``fsdp`` (FSDP2) cuts parameters and gathers them layer by layer,
``tp`` gives each device some heads of every MH-FFN, and ``fsdp+tp`` does both, over the two
dimensions of a mesh. The model and the text are those of ``byte_lm.py``. It runs on GPUs with NCCL
where there are any, otherwise on CPUs with gloo, and goes on from its checkpoint if it finds one,
whatever the number of processes that wrote it and the way in which they divided the model.
Layers of one form share a graph under FSDP: what is rewritten there is counted once for all.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from byte_lm import ByteLM, Model, Size, batches, cross_entropy, load_text
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mhf_compiler.parallel import parallelize_heads

STATE = ("model", "optimizer", "step")  # the keys of a checkpoint


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tp", "fsdp+tp"), default="fsdp")
    parser.add_argument("--tp", type=int, default=2, help="devices that divide heads in fsdp+tp")
    parser.add_argument("--backend", choices=("flashmhf", "inductor", "eager"), default="flashmhf")
    parser.add_argument("--rewrite", choices=("auto", "always"), default="auto", help="of flashmhf")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4, help="of the networks and of attention")
    parser.add_argument("--head-dim", type=int, default=32, help="times heads: width of the model")
    parser.add_argument("--sub-networks", type=int, default=4, help="of each head")
    parser.add_argument("--hidden", type=int, default=64, help="units of each sub-network")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, of all processes")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=100, help="those of the checkpoint included")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="a folder; written at the end")
    return parser.parse_args()


def parallelized(model: ByteLM, mesh: DeviceMesh, options: argparse.Namespace) -> Model:
    """What to call in place of the model: heads are divided first, layers compiled before FSDP."""
    compiles: dict[str, Any] = {"backend": options.backend, "disable": options.backend == "eager"}
    if options.backend == "flashmhf":
        compiles["options"] = {"rewrite": options.rewrite}
    if mesh["tp"].size() > 1:
        tokens = torch.zeros(1, 16, dtype=torch.long, device=model.head.weight.device)
        parallelize_heads(model, mesh["tp"], tokens)
    if options.parallel == "ddp":
        return torch.compile(DistributedDataParallel(model), **compiles)
    if options.parallel == "tp":
        return torch.compile(model, **compiles)
    on_gpu = mesh.device_type == "cuda"
    policy = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if on_gpu else ())
    for block in model.blocks:
        block.compile(**compiles)
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    return model


def main() -> None:
    options = parse()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    world = dist.get_world_size()
    tp = {"tp": world, "fsdp+tp": options.tp}.get(options.parallel, 1)
    if world % tp or options.batch % (world // tp):
        raise SystemExit(f"--tp {tp} must divide {world} processes, and these --batch")
    # Processes along dp have data of their own, those along tp heads.
    mesh = init_device_mesh(device.type, (world // tp, tp), mesh_dim_names=("dp", "tp"))
    replicas, replica = mesh["dp"].size(), mesh["dp"].get_local_rank()
    say = print if dist.get_rank() == 0 else lambda *args, **kwargs: None

    width, batch = options.heads * options.head_dim, options.batch // replicas
    shape = (options.heads, options.heads, options.sub_networks, options.hidden)
    training = (batch, options.length, options.steps, options.learning_rate)
    size = Size(width, options.layers, *shape, *training)
    torch.manual_seed(0)
    with device:
        model = ByteLM(size)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {mesh}")
    call = parallelized(model, mesh, options)
    groups: dict[object, list[nn.Parameter]] = {}  # fused loops take tensors of one mesh at a time
    for parameter in model.parameters():
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    lists = [{"params": group} for group in groups.values()]
    optimizer = torch.optim.AdamW(lists, options.learning_rate, fused=on_gpu)

    # By the names of parameters: another way to divide the model has other groups.
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    first = 0
    if options.checkpoint is not None and (options.checkpoint / ".metadata").exists():
        states = get_state_dict(model, optimizer, options=flat)
        state: dict[str, Any] = dict(zip(STATE, (*states, 0), strict=True))
        dcp.load(state, checkpoint_id=options.checkpoint)  # type: ignore[attr-defined]
        weights, moments, first = (state[key] for key in STATE)
        weights = {"model_state_dict": weights, "optim_state_dict": moments}
        set_state_dict(model, optimizer, **weights, options=flat)
        say(f"resumed at step {first} from {options.checkpoint}")

    endless = batches(load_text()[0], batch, options.length, seed=replica)
    source = itertools.islice(endless, first, options.steps)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    begin, counted = time.perf_counter(), first
    for step, (tokens, targets) in enumerate(source, first + 1):
        with autocast:
            loss = cross_entropy(call(tokens.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == first + 1 or step % options.log_every == 0 or step == options.steps:
            value = loss.item()  # waits for the device
            seconds = time.perf_counter() - begin
            rate = (step - counted) * options.batch * options.length / seconds
            peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if on_gpu else ""
            sites = torch._dynamo.utils.counters["flashmhf"]["sites_rewritten"]
            say(f"step {step}: loss {value:.4f}, {rate:.0f} tokens/s{peak}, {sites} rewritten")
            begin, counted = time.perf_counter(), step
    if options.checkpoint is not None:
        states = get_state_dict(model, optimizer, options=flat)
        state = dict(zip(STATE, (*states, max(first, options.steps)), strict=True))
        dcp.save(state, checkpoint_id=options.checkpoint)  # type: ignore[attr-defined]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
