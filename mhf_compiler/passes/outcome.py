"""What a pass after autograd did at one place, or why it did nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx

from ..patterns import Location, locate


class Obstacle(Enum):
    """Every reason why a pass leaves a place of the graph as it is."""

    # Aliasing.
    INPUT = "the memory belongs to an input or a parameter, or another op mutates it"
    UNKNOWN_MEMORY = "the tensor has no storage that is known"
    SHARED_MEMORY = "another argument of the op shares the memory"
    READ_LATER = "the tensor is read after the op, or may be: Inductor can inline its readers"
    READ_ELSEWHERE = "something else reads the tensor, too"
    DIFFERENT_LAYOUT = (
        "the result has another dtype, shape or strides, or the tensor does not fill its storage"
    )
    # The norm and the router.
    DEVICE = "on this device Inductor's own kernels are as fast"
    DTYPE = "the queries are not bfloat16 or float16"
    WIDE_HEADS = "the heads are wider than one kernel can normalise at an advantage"
    NO_NORM = "the queries are not the result of an RMS norm that the op computes"
    INTERMEDIATE_READ = "something else reads an intermediate result of the norm"
    # Sums of gradients.
    NOT_ADDED = "the gradient is not just added to one that the op has computed before"
    # The norm and the network.
    NO_NORM_AND_ROUTE = "queries and router weights do not both come from norm_and_route"
    BIAS = "the network has biases"
    # The kernel.
    DYNAMIC_SIZES = "a size that the kernel depends on is dynamic"
    DOES_NOT_PAY = "no kernel pays for these sizes on this device"
    KERNEL_FAILED = "the kernel did not compile or launch"

    @property
    def sentence(self) -> str:
        """The obstacle in words."""
        return self.value


@dataclass(frozen=True)
class Fusion:
    """One place where a pass after autograd could put an op.

    Attributes:
        op: name of the op.
        location: the line of the model's source.
        obstacle: why the op was not put there; None if it was.
    """

    op: str
    location: Location | None = None
    obstacle: Obstacle | None = None

    def __str__(self) -> str:
        where = self.location or "unknown source"
        if self.obstacle is None:
            return f"{where}: {self.op}"
        return f"{where}: {self.op}: {self.obstacle.name}: {self.obstacle.sentence}"


class Declined(Exception):
    """A pass leaves one place of the graph as it is.

    Attributes:
        obstacle: why.
        node: where, unless at the node that the pass began with.
    """

    def __init__(self, obstacle: Obstacle, node: fx.Node | None = None) -> None:
        self.obstacle = obstacle
        self.node = node
        super().__init__(obstacle.sentence)


def fused(op: str, node: fx.Node) -> Fusion:
    """The op was put in place of a node."""
    return Fusion(op, locate(node))


def declined(op: str, node: fx.Node, reason: Declined) -> Fusion:
    """The op was not put in place of a node."""
    found = None if reason.node is None else locate(reason.node)
    return Fusion(op, found or locate(node), reason.obstacle)


def require(condition: bool, obstacle: Obstacle, node: fx.Node | None = None) -> None:
    """Raise ``Declined`` unless a condition holds."""
    if not condition:
        raise Declined(obstacle, node)
