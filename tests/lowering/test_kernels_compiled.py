"""What the compiler makes of the kernels on each architecture: no GPU needed.

A driver that only pretends to have one lets the kernels go through their own launch path: tiles are
chosen, arguments specialised and binaries compiled as for a device of that capability. Instead of
being launched, the binaries are handed to the disassembler that Triton ships.
"""

import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import without_products
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas_version  # noqa: E402

from mhf_compiler.lowering import problem as problems  # noqa: E402
from mhf_compiler.lowering import tiles  # noqa: E402
from mhf_compiler.lowering.activations import ACTIVATIONS  # noqa: E402
from mhf_compiler.lowering.kernels import dispatch, launch, packaged  # noqa: E402
from mhf_compiler.lowering.kernels.batched.hidden import (  # noqa: E402
    activate_units,
    differentiate_units,
)
from mhf_compiler.lowering.kernels.plain import norm_router, router  # noqa: E402
from mhf_compiler.lowering.problem import Formula, NormedRouter, Problem  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's tools are for Linux"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]

# Shared memory that one block may have, in KiB.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

# Warp-group matrix products and tile loads by descriptor; elsewhere, the warp's and asynchronous.
INSTRUCTIONS = {90: ("HGMMA", "UTMALDG"), 100: ("UTCHMMA", "UTMALDG")}

# Of cards that multiply by the same instructions, one.
KINDS_OF_CARDS = [80, 86, 90, 100, 120]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def assembler(architecture: int) -> tuple[int, ...]:
    """The version of the assembler that Triton uses for an architecture."""
    told = get_ptxas_version(architecture)
    found = re.search(r"V(\d+)\.(\d+)", told)
    assert found is not None, told
    return tuple(map(int, found.groups()))


# Assemblers before 13.3 may write over registers that a matrix instruction is still to read.
CAREFUL = assembler(90) >= (13, 3)

# What newer versions keep in local memory, by architecture: on Hopper in accesses between matrix
# instructions, on Blackwell in bytes. Triton 3.6 and 3.7 keep nothing.
_SPILLS = {"3.8": {90: 104, 100: 8}, "3.9": {90: 66, 100: 8}}
FEW_IN_LOOPS = _SPILLS.get(triton.__version__[:3], {90: 0, 100: 0})


@dataclass
class Binary:
    """A compiled kernel."""

    name: str
    cubin: bytes
    shared: int  # bytes

    def spilled(self) -> int:
        """Bytes of local memory for each thread."""
        usage = disassembled(self.cubin, "cuobjdump", "-res-usage")
        return sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))

    def spilled_in_loops(self) -> int:
        """The same; or, of a kernel for Hopper, the accesses between its matrix instructions.

        Two of those keep a few registers in local memory from their start to their end, where it
        costs nothing. Each role of their warps lies between changes of its registers' number.
        """
        if not self.name.startswith("mhf_hopper_"):
            return self.spilled()
        roles = re.split("USETMAXREG", self.code())
        loops = [role[role.find("HGMMA") : role.rfind("HGMMA")] for role in roles]
        return sum(len(re.findall(r"\b(?:STL|LDL)\b", loop)) for loop in loops)

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.code()))

    def code(self) -> str:
        return disassembled(self.cubin, "nvdisasm", "-c")


@functools.lru_cache(maxsize=64)  # some are megabytes; several tests look at the same kernels
def disassembled(cubin: bytes, tool: str, option: str) -> str:
    """What a tool says of a binary, which a test asks for several times."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class PretendedDriver:
    """Triton's view of a GPU that is not there; keeps what it is asked to load."""

    devices = itertools.count(10_000)  # Triton keeps compiled kernels by device: never the same

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.device = next(self.devices)
        self.loaded: list[Binary] = []
        self.intermediate: dict[str, str] = {}  # by the name of a kernel: what was made of it
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED_MEMORY[architecture] * 1024
            },
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> object:
        return lambda *arguments: None

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        self.loaded.append(Binary(name, cubin, shared))
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads


@pytest.fixture(autouse=True)
def tiles_only() -> Iterator[None]:
    with without_products():
        yield


Compile = Callable[..., dict[str, Binary]]
Pretend = Callable[[int], PretendedDriver]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Call with an architecture: kernels that are launched next are compiled for it."""

    def of(architecture: int) -> PretendedDriver:
        driver = PretendedDriver(architecture)
        triton.runtime.driver.set_active(driver)
        for module in (problems, launch, router):
            monkeypatch.setattr(module, "capability", lambda device: divmod(architecture, 10))

        def record(compiled: Any, programs: int, arguments: list[Any]) -> None:
            driver.intermediate[compiled.metadata.name] = compiled.asm["ttgir"]

        monkeypatch.setattr(launch, "record", record)
        return driver

    yield of
    triton.runtime.driver.set_active(None)  # the default one again


@pytest.fixture
def compile_all(pretend: Pretend) -> Compile:
    """Call with an architecture and a problem: its kernels, by name."""

    def run(architecture: int, **options: object) -> dict[str, Binary]:
        driver = pretend(architecture)
        launch_all(**options)
        return {binary.name: binary for binary in driver.loaded}

    return run


def launch_all(
    d: int = 128,
    f: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = 32768,
    heads: int = 16,
    groups: int = 16,
    activation: str = "silu",
    gated: bool = True,
    routed: bool = True,
    router: torch.dtype = torch.float32,
    biased: bool = False,
    wide_biases: bool = False,
    by_columns: bool = False,
    forward: bool = True,
    backward: bool = True,
) -> None:
    """The forward and the whole backward of heads with 22 sub-networks, on memory never read."""

    def weight() -> Tensor:
        if by_columns:
            return torch.empty(groups, 22, d, f, dtype=dtype).transpose(2, 3)
        return torch.empty(groups, 22, f, d, dtype=dtype)

    def bias(size: int) -> Tensor | None:
        kept = torch.float32 if wide_biases else dtype
        return torch.empty(groups, 22, size, dtype=kept) if biased else None

    q = torch.empty(1, tokens, heads, d, dtype=dtype)
    inputs = (
        q,
        weight(),
        weight() if gated else None,
        weight(),
        torch.empty(1, tokens, heads, 22, dtype=router) if routed else None,
        bias(f),
        bias(f) if gated else None,
        bias(d),
    )
    problem = Problem(*inputs, activation=activation)
    out = torch.empty_like(q, dtype=torch.float32 if wide_biases else dtype)
    if forward:
        dispatch.forward(problem, out)
    if backward:
        gradients = problem.new_gradients([x is not None for x in inputs])
        dispatch.backward(problem, torch.empty_like(out), gradients)


def without_sums(binaries: dict[str, Any]) -> dict[str, Any]:
    """Without the kernels that add parts, and multiply nothing."""
    return {name: binary for name, binary in binaries.items() if "_parts_" not in name}


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_wide_heads(architecture: int, compile_all: Compile) -> None:
    """At the paper's head width, tiles stay in registers and meet the fastest instructions."""
    binaries = compile_all(architecture)
    forward = (
        {"mhf_hopper_forward_kernel", "mhf_add_parts_kernel"}
        if architecture == 90
        else {"mhf_forward_kernel"}
    )
    assert set(binaries) >= forward
    for name, binary in without_sums(binaries).items():
        assert binary.spilled_in_loops() <= FEW_IN_LOOPS.get(architecture, 0), name
        for instruction in INSTRUCTIONS.get(architecture, ("HMMA", "LDGSTS")):
            assert binary.count(instruction), f"{name}: {instruction}"


def test_weights_stored_by_columns(compile_all: Compile) -> None:
    """A transposed tile is read as it lies: the same instructions, and no spill."""
    for name, binary in without_sums(compile_all(90, by_columns=True)).items():
        # An address read again, no operand.
        assert binary.spilled_in_loops() <= max(2, FEW_IN_LOOPS[90]), name
        for instruction in INSTRUCTIONS[90]:
            assert binary.count(instruction), f"{name}: {instruction}"


def test_weights_stored_by_columns_are_loaded_ahead(compile_all: Compile) -> None:
    """Without descriptors too: not kept in registers until both of their products are computed."""
    for name, binary in compile_all(86, by_columns=True).items():
        assert binary.spilled() == 0, name
        assert binary.count("LDGSTS"), name


def test_narrow_heads_stay_in_registers(compile_all: Compile) -> None:
    for name, binary in compile_all(120, d=64).items():
        assert binary.spilled() == 0, name


@dataclass
class Product:
    """One matrix instruction of a warp group."""

    left: range  # the registers of its left operand
    transposed: bool  # whether its right operand is stored along the sum's columns


def products(code: str) -> list[Product]:
    pattern = r"HGMMA\.64x\d+x16\S* R\d+, (?:R(\d+)|gdesc\S+), gdesc\[UR\d+\](\.tnspB)?"
    return [
        Product(range(int(left or 0), int(left or 0) + (4 if left else 0)), bool(transposed))
        for left, transposed in re.findall(pattern, code)
    ]


def loops(code: str) -> list[str]:
    """The innermost loops with matrix instructions, one or more for each warp group."""
    lines = code.splitlines()
    labels = {line[:-1]: n for n, line in enumerate(lines) if line.startswith(".L_")}
    found: list[range] = []
    for end, line in enumerate(lines):
        # A jump without a condition only comes back from a wait that stands behind the code.
        target = re.search(r"@\S+ +BRA\b.*`\((\.L_\w+)\)", line)
        start = labels[target[1]] if target else end
        if any("HGMMA" in inner for inner in lines[start:end]):
            found.append(range(start, end))
    return [
        "\n".join(lines[loop.start : loop.stop])
        for loop in found
        if not any(
            other.start in loop and other.stop - 1 in loop for other in found if other != loop
        )
    ]


def check_registers(code: str, by_columns: bool = False) -> None:
    """In no loop do operands that are kept and operands that are computed share registers."""
    if CAREFUL:
        pytest.skip("this assembler waits until registers have been read")
    both = 0
    for loop in loops(code):
        found = products(loop)
        kept = {r for product in found if product.transposed == by_columns for r in product.left}
        computed = {
            r for product in found if product.transposed != by_columns for r in product.left
        }
        assert not kept & computed
        both += bool(kept and computed)
    assert both == 2  # a loop for each warp group


def check_running(code: str) -> None:
    """Nothing is written to the registers that a product is reading, before one waits for it."""
    read: set[int] = set()
    products = 0
    for line in code.splitlines():
        product = re.search(r"HGMMA\.64x\d+x16\S* R\d+, (?:R(\d+)|gdesc)", line)
        if product is not None:
            left = product[1]
            read |= set(range(int(left), int(left) + 4)) if left else set()
            products += bool(left)
        elif "WARPGROUP.DEPBAR" in line:
            read.clear()
        else:
            written = re.search(r"\*/ +(?:@\S+ +)?[A-Z]\S* +(?:P\w+, )?R(\d+),", line)
            assert written is None or int(written[1]) not in read, line
    assert products


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d": 64},
        {"d": 96},
        {"dtype": torch.float16, "activation": "gelu_tanh"},
        {"gated": False},
        {"gated": False, "f": 192, "biased": True, "activation": "gelu"},
        {"biased": True, "groups": 4},
        {"by_columns": True},
        {"d": 96, "f": 171, "biased": True},
        {"gated": False, "biased": True, "routed": False},
    ],
    ids=str,
)
def test_nothing_overwrites_the_query(options: dict[str, object], compile_all: Compile) -> None:
    """Hopper's forward keeps Q in registers over a loop that multiplies other registers by V.

    An assembler was seen to put both into the same ones, for a loop only slightly different.
    """
    binary = compile_all(90, backward=False, **options)["mhf_hopper_forward_kernel"]
    check_registers(binary.code(), by_columns=bool(options.get("by_columns")))


@pytest.mark.parametrize("options", [{}, {"d": 96, "dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_the_query_has_been_read_before_its_memory_is_given_back(
    options: dict[str, Any], normed: bool, pretend: Pretend
) -> None:
    """Between reading Q into registers and telling the producer so, a fence for the copy engine."""
    driver = pretend(90)
    if normed:
        normed_forward(options.get("d", 128), torch.float32, torch.float32)
    else:
        launch_all(**options, routed=False, backward=False)
    (binary,) = (b for b in driver.loaded if b.name == "mhf_hopper_forward_kernel")
    steps = re.findall(r"\b(LDSM|FENCE\.VIEW\.ASYNC|SYNCS\.ARRIVE)", binary.code())
    consumers = " ".join(steps).split("LDSM")[1:]
    ends = [rest.split() for rest in consumers if rest.strip()]  # after the last load of each
    assert len(ends) >= 2
    for fence, arrival, *_ in ends:
        assert (fence, arrival) == ("FENCE.VIEW.ASYNC", "SYNCS.ARRIVE")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d": 64},
        {"d": 96},
        {"d": 32},
        {"d": 8, "by_columns": True},
        {"routed": False, "activation": "relu2"},
        {"biased": True},
        {"biased": True, "d": 64, "f": 171, "routed": False},
        {"gated": False},
        {"gated": False, "biased": True, "activation": "gelu", "routed": False},
        {"gated": False, "biased": True, "activation": "gelu", "d": 64, "dtype": torch.float16},
        {"gated": False, "biased": True, "d": 16, "f": 128, "by_columns": True},
        {"gated": False, "activation": "relu", "routed": False, "d": 32},
    ],
    ids=str,
)
def test_hopper_backward(options: dict[str, object], compile_all: Compile) -> None:
    """All of it by kernels of its own; no product serialised, which more waits would show.

    But plain Triton's for dQ of narrow heads without a gate.
    """
    binaries = compile_all(90, forward=False, **options)
    gated = options.get("gated", True)
    kernels = ["dq", "dv", "dk_du"] if gated else ["dq", "dk_dv"]
    others = {"mhf_backward_dv_bias_kernel"} if options.get("biased") else set()
    if not gated and options.get("d", 128) in (16, 32, 64):
        kernels.remove("dq")
        others.add("mhf_backward_dq_kernel")
    names = [f"mhf_hopper_backward_{kernel}_kernel" for kernel in kernels]
    assert set(without_sums(binaries)) == {*names, *others}
    for name in names:
        # A few addresses may wait in local memory; an operand that did would be dozens.
        allowed = 0 if options == {} else 8
        assert binaries[name].spilled_in_loops() <= max(allowed, FEW_IN_LOOPS[90]), name
        assert binaries[name].count("HGMMA"), name
        assert binaries[name].count("UTMALDG"), name
        assert binaries[name].count(r"WARPGROUP\.DEPBAR") <= 8, name
    # Nothing overwrites what is kept in registers: Q in the kernel of dQ, K and U in that of dV.
    by_columns = bool(options.get("by_columns"))
    for kernel in {"dq", "dv"} & {*kernels}:
        check_registers(binaries[f"mhf_hopper_backward_{kernel}_kernel"].code(), by_columns)
    if not gated:
        check_running(binaries["mhf_hopper_backward_dk_dv_kernel"].code())


@pytest.mark.parametrize("d", [8, 16, 24, 32, 40, 64, 96, 128, 160, 192, 256])
def test_hopper_forward_does_not_spill(d: int, compile_all: Compile) -> None:
    binary = compile_all(90, d=d, backward=False)["mhf_hopper_forward_kernel"]
    assert binary.spilled_in_loops() == 0
    assert CAREFUL or binary.spilled() == 0
    assert binary.count("HGMMA")
    # One wait each for the projections and for the rest of a turn; more were serialised products.
    assert binary.count(r"WARPGROUP\.DEPBAR") <= 12


@pytest.mark.parametrize("d", [16, 64])
def test_narrow_heads_meet_the_router_in_pairs(d: int, compile_all: Compile) -> None:
    """Their activations are what takes time: two elements to a multiplication."""
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        binary = compile_all(90, d=d, router=dtype, backward=False)["mhf_hopper_forward_kernel"]
        assert binary.spilled() == 0
        counts.append([binary.count(rf"\b{name}\b") for name in ("FMUL", "HMUL2")])
    (singles, pairs), (fewer, more) = counts
    assert singles - fewer == 2 * (more - pairs) > 0


# One kernel, which is compiled for a number of parts: all of these numbers, and both architectures.
@pytest.mark.parametrize(("architecture", "tokens"), [(90, 1), (90, 128), (100, 256)])
def test_parts_are_added_without_waiting(
    architecture: int, tokens: int, compile_all: Compile
) -> None:
    """The sum of one head's many parts waits for the kernel before it, and then loads at once."""
    options = {"d": 256, "f": 512, "tokens": tokens, "heads": 1, "groups": 1, "backward": False}
    binary = compile_all(architecture, **options)["mhf_add_parts_kernel"]
    assert binary.spilled() == 0
    code = binary.code()
    loads = re.findall(r"(@!?U?P\d+ +)?LDG\.E\.128", code)
    assert loads == [""] * 8  # of 4 values each, none of which hangs on a mask
    assert "BAR.SYNC" not in code
    assert code.index("ACQBULK") < code.index("LDG")


# The same lines of the kernel wait on both architectures.
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (90, {"tokens": 1}),
        (90, {"tokens": 64}),
        (90, {"tokens": 64, "d": 20}),
        (100, {"tokens": 64}),
    ],
    ids=str,
)
def test_an_early_launch_waits_before_it_reads(
    architecture: int, options: dict[str, object], compile_all: Compile
) -> None:
    """What the kernel before it writes, or reads of the memory that it will write, comes first."""
    code = compile_all(architecture, backward=False, **options)["mhf_forward_kernel"].code()
    accesses = [match.start() for match in re.finditer(r"\b(LDG|STG|UTMALDG|LDGSTS)\b", code)]
    assert code.index("ACQBULK") < accesses[0]
    assert code.index("PREEXIT") < accesses[-1]


@pytest.mark.parametrize("options", [{}, {"tokens": 64}, {"d": 20}], ids=str)
def test_other_launches_wait_for_all_before_them(
    options: dict[str, object], compile_all: Compile
) -> None:
    """None before Hopper can be early, and none of many tokens is."""
    binaries = compile_all(80, backward=False, **options)
    if "tokens" not in options:
        binaries |= compile_all(90, backward=False, **options)
        binaries.pop("mhf_add_parts_kernel", None)
    for name, binary in binaries.items():
        assert "ACQBULK" not in binary.code(), name


# Which cache a load goes by is written in the kernels: each of them once, each architecture once.
@pytest.mark.parametrize(
    ("architecture", "options"),
    [(80, {}), (90, {}), (100, {}), (80, {"d": 20}), (90, {"tokens": 64})],
    ids=str,
)
def test_nothing_is_read_as_if_it_never_changed(
    architecture: int, options: dict[str, object], compile_all: Compile
) -> None:
    """Results may be written over what is read, so no load may go by the cache for constants."""
    for name, binary in compile_all(architecture, **options).items():
        assert not binary.count(r"LDG\S*\.CONSTANT"), name


def test_strides_that_no_descriptor_takes(compile_all: Compile) -> None:
    """Rows of 40 bytes: plain Triton's, on Hopper too."""
    assert set(compile_all(90, d=20, backward=False)) == {"mhf_forward_kernel"}


# Triton refuses to load what needs more shared memory than the driver says there is. Heads of 96
# have the tiles of those of 128, which every architecture compiles above: here where least fits,
# and in the kernels for Hopper. Those of 256 with biases are compiled below.
@pytest.mark.parametrize(
    ("architecture", "d"), [(80, 256), (90, 256), (100, 256), (86, 96), (90, 96)]
)
def test_shared_memory_suffices(architecture: int, d: int, compile_all: Compile) -> None:
    compile_all(architecture, d=d)


@pytest.mark.parametrize(("architecture", "d"), [(86, 64), (86, 256), (90, 256)])
def test_shared_memory_suffices_in_float32(architecture: int, d: int, compile_all: Compile) -> None:
    compile_all(architecture, d=d, dtype=torch.float32)


# All variants for Hopper, whose kernels are others; elsewhere those that load the most.
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (90, {"biased": True, "groups": 4, "wide_biases": True}),
        (90, {"gated": False, "routed": False}),
        (86, {"d": 256, "biased": True, "wide_biases": True}),
        (90, {"f": 341, "dtype": torch.float16, "by_columns": True}),
        (90, {"tokens": 1}),
        (90, {"tokens": 200, "f": 20}),
        (86, {"biased": True, "groups": 4}),
        (86, {"f": 341, "dtype": torch.float16, "by_columns": True}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value),
)
def test_variants_compile(
    architecture: int, options: dict[str, object], compile_all: Compile
) -> None:
    compile_all(architecture, **options)


def pairs(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every pair of the first two, with the values of the third in turn.

    Each of those meets each value of the others too, as long as the third has the fewest.
    """
    first, second, third = map(tuple, factors)
    return [
        (one, other, third[(i + j) % len(third)])
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]


def router_products(d: int, dtype: torch.dtype) -> None:
    q, weight = torch.empty(2, 1000, 16, d, dtype=dtype), torch.empty(16, d, 32)
    logits = torch.empty(2, 1000, 16, 32)
    router.forward(q, weight, logits)
    router.backward(logits, q, weight, [True, True])
    router.backward_onto(torch.empty_like(q), logits, q, weight, True)


# The widest takes the most registers; the others are its code with shorter loops.
@pytest.mark.parametrize(
    ("architecture", "d", "dtype"),
    [
        *((card, 256, torch.bfloat16) for card in (80, 90, 120)),
        *((card, 256, torch.float16) for card in (86, 100)),
        (90, 128, torch.float16),
        (100, 128, torch.bfloat16),
        (86, 32, torch.bfloat16),
        (90, 32, torch.float16),
    ],
)
def test_router_products(architecture: int, d: int, dtype: torch.dtype, pretend: Pretend) -> None:
    """On matrix units, in registers, at the most sub-networks that are taken."""
    driver = pretend(architecture)
    router_products(d, dtype)
    assert len(driver.loaded) == 3
    for binary in driver.loaded:
        assert binary.spilled() == 0, binary.name
        assert binary.count({90: "HGMMA", 100: "UTCHMMA"}.get(architecture, "HMMA"))


def check_tensor_memory(code: str) -> None:
    """In no loop are sums moved through registers, or do two products have the same one."""
    inner = re.findall(r"scf\.for (.*?)scf\.yield", code, re.DOTALL)
    for loop in inner or [code]:
        assert not inner or not re.search(r"tmem_store [^\n]*xf32", loop)
        sums = re.findall(r"tc_gen5_mma %\S+, %\S+, (%\w+)", loop)
        assert len(sums) == len(set(sums)) > 0


@pytest.mark.parametrize("options", [{}, {"d": 256}], ids=str)
def test_sums_stay_in_tensor_memory(options: dict[str, Any], pretend: Pretend) -> None:
    """Where two products are added to one sum, Triton before 3.9 may compute something else."""
    driver = pretend(100)
    launch_all(**options)
    assert set(driver.intermediate) >= {
        "mhf_forward_kernel",
        "mhf_backward_dq_kernel",
        "mhf_backward_dv_kernel",
        "mhf_backward_dk_du_kernel",
    }
    for code in without_sums(driver.intermediate).values():
        check_tensor_memory(code)


def test_sums_of_a_router_stay_in_tensor_memory(pretend: Pretend) -> None:
    """Of float16, which takes the most products."""
    driver = pretend(100)
    router_products(128, torch.float16)
    norm_and_route(128, torch.float16, torch.float32)
    assert len(driver.intermediate) == 3
    for code in driver.intermediate.values():
        check_tensor_memory(code)


def norm_and_route(
    d: int, dtype: torch.dtype, weights: torch.dtype, tokens_innermost: bool = True
) -> None:
    """On memory never read, at the most sub-networks that are taken."""
    order = (2, 3, 0, 1) if tokens_innermost else (0, 1, 2, 3)
    r = torch.empty(2, 1024, 16, 32, dtype=dtype).permute(order).contiguous()
    router = NormedRouter(
        torch.empty(d, dtype=weights),
        torch.empty(16, d, 32, dtype=weights),
        Formula(1e-6, False, "normalised", 1e-20, 0.0, dtype),
    )
    r = r.permute([order.index(axis) for axis in range(4)])
    norm_router.norm_and_route(torch.empty(2, 1024, 16, d, dtype=dtype), router, r)


DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize(("architecture", "dtypes", "d"), pairs(KINDS_OF_CARDS, DTYPES, [32, 128]))
def test_norm_and_router(
    architecture: int, dtypes: tuple[torch.dtype, torch.dtype], d: int, pretend: Pretend
) -> None:
    """In registers; queries are read once, and all memory is met in 16 bytes at a time."""
    dtype, weights = dtypes
    driver = pretend(architecture)
    norm_and_route(d, dtype, weights)
    (binary,) = driver.loaded
    assert binary.spilled() == 0
    assert binary.count({90: "HGMMA", 100: "UTCHMMA"}.get(architecture, "HMMA"))
    stores = 64 * (d + 32) * 2 / 16 / 128  # of 128 threads
    assert binary.count(r"STG\.E\.128") == binary.count(r"STG\.") == stores
    assert not binary.count(r"LDG\S*\.CONSTANT")


@pytest.mark.parametrize("architecture", [80, 90])
def test_weights_of_a_router_by_tokens(architecture: int, pretend: Pretend) -> None:
    driver = pretend(architecture)
    norm_and_route(128, torch.bfloat16, torch.bfloat16, tokens_innermost=False)
    (binary,) = driver.loaded
    assert binary.spilled() == 0
    assert binary.count(r"STG\.E\.128") == binary.count(r"STG\.")


def normed_forward(
    d: int,
    router: torch.dtype,
    r: torch.dtype,
    *,
    f: int = 256,
    by_columns: bool = False,
    routing: str = "normalised",
) -> None:
    """The network of 32 sub-networks with its norm and router, on memory never read."""
    shape = (16, 32, d, f) if by_columns else (16, 32, f, d)
    weights = [torch.empty(shape, dtype=torch.bfloat16) for _ in range(3)]
    if by_columns:
        weights = [x.transpose(2, 3) for x in weights]
    formula = Formula(1e-6, False, routing, 1e-20, 0.0, r)
    dispatch.normed_forward(
        Problem(torch.empty(1, 32768, 16, d, dtype=torch.bfloat16), *weights),
        NormedRouter(torch.empty(d), torch.empty(16, d, 32, dtype=router), formula),
    )


# Every width in float32, which takes the most registers; the others at full tiles and ragged ones.
@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        *((d, torch.float32) for d in (40, 64, 72, 96, 128)),
        *((d, torch.bfloat16) for d in (72, 128)),
        *((d, torch.float16) for d in (64, 96)),
    ],
)
def test_norm_router_and_network(d: int, dtype: torch.dtype, pretend: Pretend) -> None:
    """On Hopper: in registers, no product serialised, and two launches in all for full rounds."""
    driver = pretend(90)
    normed_forward(d, dtype, dtype)
    names = [binary.name for binary in driver.loaded if binary.name != "mhf_add_parts_kernel"]
    assert names == ["mhf_cut_router_kernel", "mhf_hopper_forward_kernel"]
    binary = driver.loaded[1]
    assert binary.spilled() == 0
    assert binary.count(r"WARPGROUP\.DEPBAR") <= 12
    assert not binary.count(r"LDG\S*\.CONSTANT")


@pytest.mark.parametrize(("routing", "by_columns"), [("none", True), ("sigmoid", False)])
def test_other_routers_of_a_network(routing: str, by_columns: bool, pretend: Pretend) -> None:
    driver = pretend(90)
    normed_forward(128, torch.float32, torch.float32, by_columns=by_columns, routing=routing)
    assert driver.loaded[1].name == "mhf_hopper_forward_kernel"
    assert driver.loaded[1].spilled() == 0


def test_nothing_overwrites_the_query_of_a_router(pretend: Pretend) -> None:
    """As above: Q meets the router, K and U, and other registers meet V."""
    driver = pretend(90)
    normed_forward(128, torch.bfloat16, torch.bfloat16)
    check_registers(driver.loaded[1].code())


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_other_cards_norm_and_route_first(architecture: int, pretend: Pretend) -> None:
    driver = pretend(architecture)
    normed_forward(128, torch.float32, torch.float32, f=32)
    names = {binary.name for binary in driver.loaded}
    forward = "mhf_hopper_forward_kernel" if architecture == 90 else "mhf_forward_kernel"
    assert names >= {"mhf_norm_and_route_kernel", forward}
    assert "mhf_cut_router_kernel" not in names


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_a_routers_parts(weights: torch.dtype, pretend: Pretend) -> None:
    """Which only the kernel for Hopper reads, see above."""
    driver = pretend(90)
    router.cut_router(torch.empty(16, 96, 22, dtype=weights))
    (binary,) = driver.loaded
    assert binary.spilled() == 0


def test_float32_is_not_approximated(compile_all: Compile) -> None:
    for binary in compile_all(90, d=32, dtype=torch.float32).values():
        assert not binary.count(r"MUFU\.TANH"), binary.name
        assert not binary.count("HGMMA|HMMA"), binary.name


def over_units(
    dtype: torch.dtype, f: int, *, complete: bool = True, activation: str = "gelu"
) -> None:
    """The two kernels between PyTorch's products; without `complete`, as an ordinary FFN has it."""
    E = 3 if complete else 1

    def units() -> Tensor:
        return torch.empty(2, 64, E * f, dtype=dtype)

    def bias() -> Tensor:
        return torch.empty(2, E, f, dtype=dtype)

    k = torch.empty(2, E, f, 320, dtype=dtype)
    q = torch.empty(1, 2048, 2, 320, dtype=dtype)
    gate = k if complete else None
    problem = Problem(q, k, gate, k, None, bias(), bias() if complete else None, None, activation)
    forward, backward = (tiles._batched_tile(problem.sizes, widest) for widest in (256, 128))
    m, da = units(), units()
    n = units() if complete else None
    r, dr = (torch.empty(2, 64, E) if complete else None for _ in range(2))
    activate_units(problem, m, n, r, forward)
    sums = [torch.empty(4, 2, E * f) if x is not None else None for x in (m, n)]
    differentiate_units(
        problem, m, n, da, r, dr, (sums[0], sums[1]), backward,
        adds_dr=complete, reads_n=complete, writes=(True, True, complete),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "dtype", "complete"),
    [
        *((architecture, torch.bfloat16, True) for architecture in SHARED_MEMORY),
        (90, torch.bfloat16, False),
        (80, torch.float32, True),
    ],
)
def test_kernels_between_products(
    architecture: int, dtype: torch.dtype, complete: bool, pretend: Pretend
) -> None:
    """They only move memory: 16 bytes at a time, and nothing through local memory."""
    driver = pretend(architecture)
    over_units(dtype, 2048, complete=complete)
    names = {"mhf_batched_forward_kernel", "mhf_batched_backward_kernel"}
    assert {binary.name for binary in driver.loaded} == names
    for binary in driver.loaded:
        reads = (1 if binary.name == "mhf_batched_forward_kernel" else 2) + complete
        writes = 1 if binary.name == "mhf_batched_forward_kernel" else 2 + complete
        assert binary.spilled() == 0
        each = (8 if complete else 16) * dtype.itemsize // 16  # of a thread
        assert binary.count(r"LDG\.E\S*\.128") >= reads * each, binary.name
        assert binary.count(r"STG\.E\S*\.128") >= writes * each, binary.name


@pytest.mark.parametrize("f", [171, 1])
def test_kernels_between_products_of_ragged_hidden_units(f: int, pretend: Pretend) -> None:
    driver = pretend(86)
    over_units(torch.bfloat16, f)
    assert len(driver.loaded) == 2
    assert all(binary.spilled() == 0 for binary in driver.loaded)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_compile(activation: str, pretend: Pretend) -> None:
    """By the card's instruction where they are made of one; with their slopes, and two at a time.

    Every kernel calls the same functions for them: here the smallest, and the one of pairs.
    """
    driver = pretend(90)
    over_units(torch.bfloat16, 2048, activation=activation)
    launch_all(d=64, activation=activation, backward=False)
    binaries = {binary.name: binary for binary in driver.loaded}
    units = {"mhf_batched_forward_kernel", "mhf_batched_backward_kernel"}
    assert {*without_sums(binaries)} == {"mhf_hopper_forward_kernel", *units}
    for binary in without_sums(binaries).values():
        fast = binary.count(r"MUFU\.TANH") > 0
        assert fast == (activation not in ("relu", "relu2")), binary.name


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_activations_of_hopper_backward(activation: str, compile_all: Compile) -> None:
    binaries = without_sums(compile_all(90, d=64, activation=activation, forward=False))
    assert len(binaries) == 3
    for binary in binaries.values():
        assert bool(binary.count(r"MUFU\.TANH")) == (activation == "silu"), binary.name


@pytest.fixture
def package(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Binary]]:
    """Call with an architecture and sizes: the kernels of a package of AOTInductor's, by name.

    What Inductor would be told to launch goes through Triton's own launch path.
    """
    monkeypatch.setattr(packaged, "wrap_triton", lambda kernel: kernel)

    def compiled(architecture: int, d: int, tokens: int) -> dict[str, Binary]:
        driver = pretend(architecture)
        q, router = (torch.empty(1, tokens, 16, n, dtype=torch.bfloat16) for n in (d, 22))
        k, u, v = (torch.empty(16, 22, 256, d, dtype=torch.bfloat16) for _ in range(3))
        problem = Problem(q, k, u, v.mT.contiguous().mT, router)
        packaged.network(*problem, None, None)
        packaged.router(q, torch.empty(16, d, 22))
        return {binary.name: binary for binary in driver.loaded}

    return compiled


# Elsewhere plain Triton's kernels read through pointers anyway.
@pytest.mark.parametrize(
    ("architecture", "d"), [(90, 64), (90, 128), (90, 256), (100, 64), (100, 128), (100, 256)]
)
def test_kernels_of_a_package_stay_in_registers(
    architecture: int, d: int, package: Callable[..., dict[str, Binary]]
) -> None:
    """Without descriptors too: tiles fit the shared memory, and meet the matrix units."""
    binaries = package(architecture, d, 32768)
    assert set(binaries) == {"mhf_packaged_forward_kernel", "mhf_packaged_router_kernel"}
    for name, binary in binaries.items():
        assert binary.spilled() == 0, name
        assert binary.shared <= SHARED_MEMORY[architecture] * 1024, name
        assert binary.count({90: "HGMMA", 100: "UTCHMMA"}[architecture]), name
