"""Why a candidate was not accepted: one typed reason each, with a remedy.

``Declined`` is raised wherever a proof fails and is caught once, in ``recognise.py``. The sentence
is for the author of the model, so it speaks of their model, never of the graph machinery.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx


class Explained(Enum):
    """Reasons, each with the pair (what is the matter, what to change)."""

    @property
    def sentence(self) -> str:
        """The reason in words."""
        return str(self.value[0])

    @property
    def remedy(self) -> str:
        """What the author of the model can do about it."""
        return str(self.value[1])


class Kind(Explained):
    """Every reason there is: (what is the matter, what to change)."""

    PLAIN_FFN = (
        "this is an ordinary feed-forward network: one head, one sub-network",
        "nothing to do; Inductor compiles it well",
    )
    DIFFERENT_QUERIES = (
        "the gate and the up projection read different inputs",
        "feed both projections of a head from the same query",
    )
    TOKEN_DEPENDENT_WEIGHTS = (
        "a projection's weights depend on the token",
        "an MH-FFN has the same weights for every token; this is another kind of layer",
    )
    ROUTER_ON_INPUT = (
        "the router scales the input of the heads, which is not the same as scaling their output",
        "multiply the output of each sub-network by its router weight",
    )
    UNPAIRED_BRANCHES = (
        "the gate and the up projection belong to different heads, sub-networks or hidden units",
        "pair the halves of a packed projection head by head",
    )
    UNKNOWN_ACTIVATION = (
        "the activation is none of silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh",
        "use one of these, without a clamp, a shift or another slope",
    )
    UNKNOWN_OPERATION = (
        "an operation inside the feed-forward network is not part of an MH-FFN",
        "move the operation before or after the heads",
    )
    VARYING_NUMBER = (
        "a number inside the network may change from call to call: Dynamo traced it as a variable",
        "write the number into the code or keep it in a tensor, or set "
        "torch._dynamo.config.specialize_float = True; dynamic=True makes even math.pi a variable",
    )
    SUMMED_APART = (
        "sub-networks of one sum are rewritten one by one, because of what is done before the sum",
        "multiply the output of each by its router weight, and do nothing else before the sum",
    )
    OPERATION_IN_LOOP = (
        "an operation inside the loop over heads or sub-networks is not part of an MH-FFN",
        "move the operation out of the loop: apply it to all heads at once",
    )
    DROPOUT_INSIDE = (
        "there is dropout between the hidden units and the down projection",
        "apply dropout after the down projection, or compile in eval mode",
    )
    NOT_A_PRODUCT = (
        "the hidden units are not the product of an activation and a projection",
        "write hidden = act(gate) * up, or hidden = act(gate)",
    )
    ADDED_PROJECTIONS = (
        "two projections of the same input are added where an MH-FFN has one, as by a LoRA adapter "
        "that is not merged",
        "merge the adapter (merge_and_unload in PEFT), or add the weights before the product",
    )
    ESCAPING_INTERMEDIATE = (
        "an intermediate result of the feed-forward network is also read elsewhere",
        "remove the other reader, or compute what it needs from inputs or outputs",
    )
    UNEQUAL_HEADS = (
        "the heads or sub-networks differ in width, activation or form",
        "give every head and every sub-network the same sizes and the same form",
    )
    IRREGULAR_WEIGHTS = (
        "the heads' weights or inputs are not regularly spaced in their tensor",
        "store heads and sub-networks in order, or as separate parameters",
    )
    MIXED_PRECISION = (
        "the projections of one network are computed in different precisions",
        "use one dtype for gate, up and down projection",
    )
    ROUNDING_CAST = (
        "a cast inside the network rounds to fewer digits than the op would keep",
        "cast only the input and the output of the network",
    )
    FLOAT16_RANGE = (
        "a bias or a residual is scaled up: in float16 it may overflow although the sum would not",
        "scale before the addition, or compute the network in bfloat16",
    )
    UNSUPPORTED_DTYPE = (
        "the projections are computed in a dtype that the op does not support",
        "use float32, bfloat16 or float16 (float64 on the CPU only)",
    )
    GRADIENTS_CUT = (
        "gradients are switched off for a part of the network only",
        "put the whole network, or none of it, under no_grad",
    )
    TENSOR_SUBCLASS = (
        "a projection is computed with a tensor subclass, such as a quantised weight, which "
        "defines its own operations",
        "give the network plain tensors, for instance by leaving its weights out when you quantise "
        "the model",
    )
    NOT_ON_SHARDS = (
        "the op cannot compute on the shards of the network's DTensors as they are placed",
        "shard all of them alike, along heads, sub-networks, hidden units or tokens",
    )
    OWN_BACKWARD = (
        "an autograd.Function or a hook inside the feed-forward network changes its backward pass",
        "write the hidden units in plain PyTorch, without hooks: the op stores none of them anyway",
    )
    AUTOCAST_BOUNDARY = (
        "autocast would change the precision of the op where its output is made",
        "put the whole network inside, or outside, the autocast region",
    )
    MUTATION = (
        "memory that the network reads or returns is overwritten in place in between",
        "write the new value to a new tensor",
    )
    UNEQUAL_WIDTHS = (
        "the heads' output width differs from their input width",
        "use the same head width on both sides",
    )
    UNSUPPORTED_LAYOUT = (
        "the roles of the dimensions cannot be told apart",
        "use one query and one weight tensor with separate head and width dimensions",
    )
    UNSUPPORTED_PROBLEM = ("the op does not support the problem", "see the message")
    FORWARD_MODE = (
        "the model is differentiated in forward mode, for which the op has no formula",
        "use reverse mode, or leave the original spelling in forward mode",
    )
    FUNCTION_TRANSFORM = (
        "the network is inside a torch.func transform that the op does not support",
        "apply torch.vmap, torch.func.grad or jvp around the compiled code, or to another part",
    )
    INFERENCE_REGION = (
        "the compiled code itself enters torch.inference_mode, where PyTorch compiles no views of "
        "tensors from outside",
        "use torch.no_grad there, or call the compiled model under inference_mode",
    )
    CUT_BY_BUCKETS = (
        "DistributedDataParallel's buckets cut the graph where the network cannot be kept whole",
        "set torch._dynamo.config.optimize_ddp = False, or give DDP a larger bucket_cap_mb",
    )
    DOES_NOT_PAY = (
        "rewriting would not be faster here",
        'use options={"rewrite": "always"} to rewrite it anyway',
    )
    CHANGED_RESULT = (
        "with the op in its place, a tensor would have another dtype, shape, layout, device, "
        "gradient or memory than before",
        "report it with the message: a fault of the compiler; the original spelling is used",
    )
    NOT_VERIFIED = (
        "the option 'verify' found that the op computes something else here",
        "report it with the message: a fault of the compiler; the original spelling is used",
    )
    KERNEL_FAILED = (
        "the kernel for these shapes did not compile or launch",
        "report it with the message; the original spelling is used",
    )


class Unreadable(Explained):
    """Every reason why a whole graph is not analysed: (what is the matter, what to change)."""

    REPLACED_TENSOR = (
        "a tensor is turned into another view, or given other memory, in place",
        "make a new tensor, for example by unsqueeze instead of unsqueeze_",
    )
    SWITCHED_GRADIENT = (
        "an operation changes in place whether a tensor has a gradient",
        "use detach instead of detach_, and requires_grad_ outside of the compiled code",
    )
    FOREIGN_TENSOR = (
        "the graph contains a tensor that is not a plain tensor",
        "pass it to the model as an input, or convert it to a plain tensor before",
    )
    UNKNOWN_RESULT = (
        "the result of an operation is not known before it runs",
        "move the operation out of the compiled code",
    )
    NOT_ON_FAKES = (
        "an operation does not run on fake tensors, which have no values",
        "move the operation out of the compiled code",
    )
    SEVERAL_MODES = (
        "an inner graph is called under torch.inference_mode, under several modes of autocast or "
        "gradients, or under modes that are not known",
        "call it under one mode, or compile it by itself",
    )
    INSIDE_VMAP = (
        "an inner graph, such as a checkpoint or a region of autocast, is called inside of "
        "torch.vmap",
        "call torch.vmap inside of it",
    )
    COMPILER_FAULT = (
        "the compiler itself failed",
        'report it with the message; options={"strict": True} raises the error',
    )


@dataclass(frozen=True)
class Reason:
    """Why one candidate was declined, or one graph was not analysed.

    Attributes:
        kind: its name, with the sentence and the remedy that go with it.
        detail: what is particular to this case; may be empty.
        node: the operation that decided it, where one did; None in a report.
    """

    kind: Kind | Unreadable
    detail: str = ""
    node: fx.Node | None = None

    def __str__(self) -> str:
        return f"{self.kind.sentence} ({self.detail})" if self.detail else self.kind.sentence


class Declined(Exception):
    """A candidate is no MH-FFN, or was not proved to be one."""

    def __init__(
        self, kind: Kind | Unreadable, detail: str = "", node: fx.Node | None = None
    ) -> None:
        self.reason = Reason(kind, detail, node)
        super().__init__(str(self.reason))
