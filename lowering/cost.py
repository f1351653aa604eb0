"""The cost model of ``rewrite="auto"``: whether the op is faster than the original spelling.

Both ways are estimated from sizes and from how many products the original consists of. Compiled by
Inductor, it is limited by its passes over the hidden units, which it writes to memory and reads
again. Inductor does not batch products: a loop over sub-networks, or over weights in separate
modules, runs kernels for each of them. The op copies weights of separate modules together, and
never writes the hidden units. Its forward pass is limited by the weights when tokens are few, since
enough programs share them, and by the matrix units when tokens are many; its backward pass by how
many programs there are to keep the card busy, too, and by the latency of one step of a program's
loop. In a small training step the host that launches the kernels is the limit, except inside a CUDA
graph. Constants were fitted to ``python -m benchmarks run grid`` on an H200; other cards are scaled
by what their driver reports.

On a CPU nothing overlaps, so times add up, and each way has a price for a call. The op computes in
float32 whatever the dtype, and the two cores that the constants were fitted to have products for
bfloat16: there it does not pay. A dynamic number of tokens is assumed to be large, since that is
where rewriting matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from .tiles import ENOUGH_PROGRAMS, Kernel, Sizes, batched_chunk, specialised
from .workload import Workload

_T = TypeVar("_T")

_TIE = 1.05
_TIE_THAT_SAVES_MEMORY = 1.1
_FEWEST_TOKENS = 16  # of a tile or a vector, padded or not
_WIDTHS = (32, 64, 128, 256)  # of padded heads
_BATCHED_SHARE = 0.85  # of the rate of large library products, for batches of smaller ones


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds and bytes for one call, rewritten and not.

    The bytes are those of the result and of the hidden units that are stored at once. Arguments and
    their gradients are not among them: both ways have them.
    """

    rewritten: float
    original: float
    rewritten_bytes: float = 0.0
    original_bytes: float = 0.0

    @property
    def saves_memory(self) -> bool:
        """Whether the op takes less than half of the original's memory."""
        return self.rewritten_bytes < self.original_bytes / 2

    @property
    def pays(self) -> bool:
        """A tie goes to the op, and is wider where the op saves memory."""
        tie = _TIE_THAT_SAVES_MEMORY if self.saves_memory else _TIE
        return self.rewritten <= tie * self.original

    def __str__(self) -> str:
        return (
            f"an estimated {_scaled(self.rewritten, self.rewritten_bytes)} rewritten, "
            f"{_scaled(self.original, self.original_bytes)} as it is"
        )


def _scaled(seconds: float, count: float) -> str:
    return f"{seconds * 1e3:.3g} ms and {count / 2**20:.3g} MiB"


class Shares(NamedTuple):
    """The op's rates as shares of a device's ``matrix``."""

    forward: float
    plain_forward: float  # in a package, which lacks the card's own kernel
    backward: float
    plain_backward: float  # of what the card's own backward kernels do not take, or have no gate


class Host(NamedTuple):
    """The host's time for a training step, in seconds: it launches the kernels.

    In inference the host is ahead of the card, or a CUDA graph is, or both ways wait for it alike.
    """

    step: float  # the calls of the two compiled graphs, and autograd
    weight: float  # for each tensor of weights: its gradient is kept
    kernel: float  # to launch one kernel of the graphs
    op: float  # to launch one kernel of the op, from Python
    idle: float  # what the card waits for the two calls, however long the kernels take


@dataclass(frozen=True)
class Device:
    """What limits a device: rates in FLOP/s and bytes/s, times in seconds."""

    major: int  # of its compute capability
    matrix: float  # of large library products
    bandwidth: float
    units: int  # multiprocessors, or cores
    launch: float  # one small kernel, in a stream of kernels
    host: Host
    step: float  # the least time of one step of a kernel's loop
    start: float  # the least time of the op's forward pass, without a launch
    shares: Mapping[int, Shares]  # by padded head width


def estimate(workload: Workload) -> Estimate:
    """Estimate both ways of running a workload."""
    memory = _rewritten_bytes(workload), _original_bytes(workload)
    if workload.device.type == "cpu":
        return Estimate(*_on_a_cpu(workload), *memory)
    if workload.card is not None and workload.card.multiprocessors:
        units = workload.card.multiprocessors
        assumed = _gpu(workload.card.capability[0], units, workload.sizes.dtype)
        return Estimate(_rewritten(workload, assumed), _original(workload, assumed), *memory)
    device = _device(workload.device.type, workload.device.index, workload.sizes.dtype)
    if device is None:
        return Estimate(0.0, 0.0, *memory)
    return Estimate(_rewritten(workload, device), _original(workload, device), *memory)


def _rewritten_bytes(w: Workload) -> float:
    """The result, and copies of weights that lie in several tensors, with their gradients.

    PyTorch's batched products have the hidden units of a chunk in addition.
    """
    found = _result_bytes(w) + w.copied * _weight_bytes(w) * (2 if w.training else 1)
    if w.device.type != "cuda":
        return found
    if w.sizes.packaged and _is_batched("forward", w.sizes):
        return found - _result_bytes(w) + _original_bytes(_as_batches(w))
    passes: tuple[Kernel, ...] = ("forward", "backward") if w.training else ("forward",)
    chunks = [batched_chunk(x, w.sizes).kept for x in passes if _is_batched(x, w.sizes)]
    return found + max(chunks, default=0)


def _original_bytes(w: Workload) -> float:
    """The result, and the hidden units: what each product of the width makes of them.

    In training the backward pass begins with all of these, which were kept, and with the activated
    units, which it makes again. In inference a loop has the memory of one round, and activates
    where the product lies.
    """
    projections = len(w.products) - 1
    if w.training:
        return _result_bytes(w) + (projections + 1) * _hidden_bytes(w)
    return _result_bytes(w) + projections * _hidden_bytes(w) / _rounds(w)


def _original(w: Workload, device: Device) -> float:
    """Products as far as they can be batched, with the hidden units in memory between them."""
    products = len(w.products)  # in the forward pass
    hidden = _hidden_bytes(w)
    flops = _product_flops(w)
    # Forward: each product once, written and read; gradients: each product twice.
    passes = 2 * products
    if w.training:
        passes += 4 * products + 1
        products *= 3
    compute = products * flops / device.matrix
    memory = (passes * hidden + products * _weight_bytes(w)) / device.bandwidth
    kernels = _original_kernels(w)
    busy = compute * 0.3 + memory + kernels * device.launch
    # Products of wide heads take longer than their one pass over the hidden units.
    busy += max(0.0, compute * 0.7 - products * hidden / device.bandwidth)
    return _with_host(busy, w, device, kernels)


def _original_kernels(w: Workload) -> int:
    """One for each product, and what each round of products has in addition."""
    products, rounds = _written(w), _rounds(w)
    kernels = products + rounds + 1  # the hidden units; the results are brought together
    if w.training:
        # The hidden units; what a token's networks weigh; the two gradients of the query, added.
        kernels += 2 * products + (1 + w.sizes.routed + w.sizes.gated) * rounds
    return kernels


def _written(w: Workload) -> int:
    """The products of the original's forward pass; none are written where sums of products are."""
    return w.written or sum(w.products)


def _rounds(w: Workload) -> int:
    """How often the original goes from the width to hidden units and back."""
    return -(-_written(w) // len(w.products))


def _rewritten(w: Workload, device: Device) -> float:
    products = len(w.products)
    flops = _product_flops(w)
    forward, backward = _shares(w, device)
    sizes = w.sizes_on((device.major, 0))
    if sizes.packaged and _is_batched("forward", sizes):
        total = _original(_as_batches(w), device)
    elif _is_batched("forward", sizes):
        total = _batched("forward", sizes, w, device)
    else:
        total = device.launch + device.start + products * flops / (device.matrix * forward)
        total += products * _weight_bytes(w) / device.bandwidth
    if w.training and _is_batched("backward", sizes):
        total += _batched("backward", sizes, w, device)
    elif w.training:
        # dQ and dR; dV; dK and dU: each recomputes the hidden units.
        executed = 4 * products + 1 if w.sizes.gated else 3 * products + 1
        total += _backward(executed, flops, w, device, backward) + 3 * device.launch
    copies = w.copied * (2 if w.training else 1)  # of the weights, and of their gradients
    total += copies * (2 * _weight_bytes(w) / device.bandwidth + device.launch)
    return _with_host(total, w, device, copies, of_the_op=4)


def _is_batched(kernel: Kernel, sizes: Sizes) -> bool:
    """Whether PyTorch's batched products compute a pass."""
    choice = specialised(kernel, sizes)
    return choice is not None and choice.family == "batched"


def _as_batches(w: Workload) -> Workload:
    """What a package has of batched products: the network in PyTorch's operations."""
    return replace(w, pieces=(1, 1, 1), written=0)


def _batched(kernel: Kernel, sizes: Sizes, w: Workload, device: Device) -> float:
    """A pass by products of the library's, with one kernel over the hidden units between them."""
    products = len(w.products)
    passes = products  # over the hidden units: what that kernel reads, and writes
    if kernel == "backward":
        # The projections again, da; and two for each of them. The kernel's results replace them.
        products, passes = 3 * products - 1, 3 * products - 2
    chunk = batched_chunk(kernel, sizes)
    rows = max(sizes.tokens, 1) * (sizes.heads // sizes.groups)
    chunks = -(-sizes.groups // chunk.groups) * -(-rows // max(chunk.rows, 1))
    total = products * _product_flops(w) / (device.matrix * _BATCHED_SHARE)
    total += (passes * _hidden_bytes(w) + products * _weight_bytes(w)) / device.bandwidth
    return total + chunks * (products + 1) * device.launch


def _with_host(busy: float, w: Workload, device: Device, kernels: int, of_the_op: int = 0) -> float:
    """The time of a step whose kernels keep the card busy for ``busy`` seconds.

    The op's kernels are few and long: the card has nothing to do while one is being launched.
    """
    host = device.host
    if w.captured or not w.training:
        return busy
    launches = host.step + sum(w.products) * host.weight + kernels * host.kernel
    return max(launches + of_the_op * host.op, busy + host.idle + of_the_op * host.op)


def _shares(w: Workload, device: Device) -> tuple[float, float]:
    """The op's rates, forward and backward, as shares of that of large library products."""
    shares = _by_width(device.shares, w)
    # Without a gate there is less to multiply for each activation, and the card's own kernel of dK
    # and dV ("dk_dv") comes no nearer to the products than plain Triton's do with one.
    sizes = w.sizes_on((device.major, 0))
    backward = shares.plain_backward if specialised("dv", sizes) is None else shares.backward
    in_python = specialised("forward", sizes._replace(packaged=False), out_dtype=w.out_dtype)
    replaced = in_python != specialised("forward", sizes, out_dtype=w.out_dtype)
    return shares.plain_forward if replaced else shares.forward, backward


def _backward(products: int, flops: float, w: Workload, device: Device, share: float) -> float:
    """Kernels whose programs each take a tile of tokens of one head through all hidden units."""
    busy = products * flops / (device.matrix * share)
    tile = 128
    while tile > 16 and -(-_tokens(w) // tile) * w.sizes.heads < ENOUGH_PROGRAMS:
        tile //= 2
    programs = -(-_tokens(w) // tile) * w.sizes.heads
    steps = w.sizes.sub_networks * -(-w.sizes.hidden // 64)
    waves = -(-programs // device.units)
    full = products * flops / programs * device.units / (device.matrix * share)
    return max(waves * max(full, steps * device.step * products / 3), busy)


def _by_width(rates: Mapping[int, _T], w: Workload) -> _T:
    """The entry for heads of at most that width; of the widest, for all that are wider."""
    return rates[next((width for width in rates if w.sizes.head_dim <= width), max(rates))]


def _tokens(w: Workload) -> int:
    return max(w.sizes.tokens, 1)


def _units(w: Workload) -> int:
    """The hidden units of a token."""
    return w.sizes.heads * w.sizes.sub_networks * w.sizes.hidden


def _product_flops(w: Workload) -> float:
    """One of the products between the width and the hidden units, with the padding of tiles."""
    width = w.sizes.head_dim
    if width <= _WIDTHS[-1]:  # wider heads are the library's, both ways
        width = max(64, 1 << (width - 1).bit_length())
    return 2.0 * max(_tokens(w), _FEWEST_TOKENS) * _units(w) * width


def _hidden_bytes(w: Workload) -> float:
    return float(_tokens(w) * _units(w) * w.sizes.dtype.itemsize)


def _result_bytes(w: Workload) -> float:
    return float(_tokens(w) * w.sizes.heads * w.sizes.head_dim * w.out_dtype.itemsize)


def _weight_bytes(w: Workload) -> float:
    return float(math.prod(w.sizes.weight_shape) * w.sizes.dtype.itemsize)


@dataclass(frozen=True)
class Cores:
    """What limits a CPU: rates of one thread in FLOP/s and bytes/s, times in seconds."""

    op: Mapping[int, float]  # the op's products, by padded head width
    products: Mapping[bool, float]  # the library's, in half precision and in float32
    bandwidth: float
    weights: Mapping[bool, float]  # how fast the library reads them, in training and in inference
    call: Mapping[bool, float]  # of the op, in training and in inference
    graph: Mapping[bool, float]  # of a compiled graph without it
    kernel: float  # of each kernel in it that weights in separate tensors add


#: fitted to the same grid on two cores of an AMD EPYC with 512-bit vectors and bfloat16 products
_CORES = Cores(
    op={16: 4e10, 32: 6e10, 64: 8e10, 128: 8.75e10, 256: 8.75e10},
    products={True: 1.35e11, False: 9.6e10},
    bandwidth=1.05e10,
    weights={True: 1.8e10, False: 5.5e10},
    call={True: 5.8e-4, False: 1.8e-4},
    graph={True: 3.5e-4, False: 5.9e-5},
    kernel=3e-6,
)


def _on_a_cpu(w: Workload) -> tuple[float, float]:
    """The seconds of both ways, on as many threads as PyTorch has.

    They are those of products, of passes over memory, and of the call.
    """
    threads, products = torch.get_num_threads(), len(w.products)
    half = w.sizes.dtype.itemsize < 4
    flops = 2.0 * _units(w) * w.sizes.head_dim  # of one product, for each token
    weights = float(products * _weight_bytes(w))

    # Forward, and in training each product's gradients; the op recomputes the products as well.
    executed = (5 * products - 4 if w.sizes.gated else 4 * products - 1) if w.training else products
    tokens = max(_tokens(w), _FEWEST_TOKENS)
    rewritten = executed * tokens * flops / (_by_width(_CORES.op, w) * threads)
    # Half precision is converted; gradients are cleared, summed, and copied into place.
    passes = 0.56 * half + 2.2 * w.training + w.copied / products * (4 if w.training else 2)
    rewritten += passes * (weights * 4 / w.sizes.dtype.itemsize) / (0.5e10 * threads)
    rewritten += _CORES.call[w.training]

    times = 3 if w.training else 1
    passes = 2 * products + (4 * products + 1) * w.training
    original = times * products * _tokens(w) * flops / (_CORES.products[half] * threads)
    original += passes * _hidden_bytes(w) / (_CORES.bandwidth * threads)
    original += times * weights / (_CORES.weights[w.training] * threads)
    added = _original_kernels(w) - _original_kernels(_as_batches(w))
    original += _CORES.graph[w.training] + added * _CORES.kernel
    return rewritten, original


#: of an H200's host
_HOST = Host(step=8.7e-4, weight=3.3e-5, kernel=2e-5, op=1.9e-4, idle=2.5e-4)
#: of an H200; the widest heads' backward pass is plain Triton's. Its forward kernel was measured
#: next to Hopper's with descriptors (results/h200_kernels-widths.json), which packages lack.
_HOPPER_SHARES = {
    32: Shares(0.65, 0.55, 0.42, 0.19),
    64: Shares(0.75, 0.41, 0.7, 0.55),
    128: Shares(1.05, 0.66, 1.0, 0.7),
    256: Shares(1.05, 0.68, 0.5, 0.5),
}


@lru_cache
def _device(kind: str, index: int | None, dtype: torch.dtype) -> Device | None:
    """The limits of a device, or None where nothing is known of it."""
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index or 0)
    return _gpu(properties.major, properties.multi_processor_count, dtype)


def _gpu(major: int, units: int, dtype: torch.dtype) -> Device:
    """Rates of one multiprocessor by generation, times their number."""
    if dtype is torch.float32:  # the kernels' float32 products are far from the library's
        shares = dict.fromkeys(_WIDTHS, Shares(0.1, 0.1, 0.1, 0.1))
        matrix, bandwidth = 0.35e12 * units, 3.2e10 * units
    else:
        shares = (
            _HOPPER_SHARES if major == 9 else dict.fromkeys(_WIDTHS, Shares(0.9, 0.9, 0.65, 0.65))
        )
        matrix = {8: 2.2e12, 9: 5.3e12, 10: 1.0e13, 12: 2.2e12}.get(major, 2.2e12) * units
        bandwidth = {8: 1.4e10, 9: 3.2e10, 10: 5e10, 12: 1e10}.get(major, 1.4e10) * units
    return Device(major, matrix, bandwidth, units, 3e-6, _HOST, 1e-6, 3e-6, shares)
