"""Whether a proved site is rewritten here: does the op take it, does it pay, does it run?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..compat import cache_folder, no_fake_mode
from ..errors import kernel_failed
from ..options import Options, inductor_config, tunes
from ..patterns import STACK, Kind, Reason, RouterProduct, Site, TensorView, Value, locate
from ..report.logs import progress

if TYPE_CHECKING:
    from ..lowering.cost import Estimate
    from ..lowering.device import Card
    from ..lowering.workload import Workload


@dataclass(frozen=True)
class Decision:
    """What is decided about a proved site.

    Attributes:
        site: the site.
        workload: its sizes.
        estimate: of the time that it takes, as written and rewritten.
        reason: why it is declined; None if it is rewritten.
        products: products before its router that are rewritten with it.
    """

    site: Site
    workload: Workload
    estimate: Estimate
    reason: Reason | None = None
    products: tuple[RouterProduct, ...] = ()


def decide(
    site: Site,
    options: Options,
    training: bool = True,
    card: Card | None = None,
    packaged: bool = False,
) -> Decision:
    """Ask the op, the cost model and the machine, in this order.

    ``training`` says whether to expect a backward pass where gradients are recorded, ``card`` which
    one is assumed; of that, nothing is tried. ``packaged`` says that the kernels are those of a
    package of AOTInductor's.
    """
    from ..lowering.cost import estimate

    workload = workload_of(site, options, training, card, packaged)
    estimated = estimate(workload)
    return Decision(site, workload, estimated, _objection(site, workload, estimated, options))


def _objection(
    site: Site, workload: Workload, estimate: Estimate, options: Options
) -> Reason | None:
    from ..lowering.arguments import differentiates_forward
    from ..lowering.workload import trial_run, tune, unsupported

    message = unsupported(workload)
    if message is not None:
        return Reason(Kind.UNSUPPORTED_PROBLEM, message, site.output_node)
    if differentiates_forward(torch.empty(0)):
        return Reason(Kind.FORWARD_MODE, node=site.output_node)
    if options.rewrite == "auto" and not estimate.pays:
        return Reason(Kind.DOES_NOT_PAY, str(estimate), site.output_node)
    if workload.card is not None:
        return None
    try:
        with no_fake_mode():
            if tunes(options):
                with progress() as say:
                    tune(workload, cache_folder(), say)
            trial_run(workload)
    except Exception as error:
        kernel_failed("the MH-FFN", site.location, error, strict=options.strict)
        first, *_ = str(error).splitlines() or [type(error).__name__]
        return Reason(Kind.KERNEL_FAILED, first, site.output_node)
    return None


def product_runs(product: RouterProduct, strict: bool) -> bool:
    """Whether there is a kernel for a router's product, and it runs on this machine.

    On the meta device none is tried: the card is another one.

    Raises:
        Exception: under ``strict``, what the kernel raised in its trial run.
    """
    from ..lowering.ops.router import takes, trial_run

    query, weight = product.query.value, product.weight.value
    shape = [int(size) for size in product.weight.shape]
    if not takes(query.dtype, weight.dtype, *shape[1:]):
        return False
    if query.device.type == "meta":
        return True
    try:
        with no_fake_mode():
            training = _may_be_trained(product.output)
            trial_run(query.dtype, weight.dtype, shape, query.device, training)
    except Exception as error:
        where = locate(product.output_node)
        kernel_failed("the product before a router", where, error, strict=strict)
        return False
    return True


def _may_be_trained(output: Value) -> bool:
    """Whether a backward pass may come: not where all that a network reads is frozen."""
    return output.requires_grad_mode and output.may_need_gradient()


def workload_of(
    site: Site,
    options: Options,
    training: bool,
    card: Card | None = None,
    packaged: bool = False,
) -> Workload:
    """The sizes of a site, for ``lowering``, which knows no graphs."""
    named = card is not None and card.name != ""
    assumed = card if named or site.device.type == "meta" else None
    from ..lowering.tiles import MANY_TOKENS, Sizes
    from ..lowering.workload import Workload

    known = [size for size in site.tokens if isinstance(size, int)]
    dynamic = len(known) < len(site.tokens)
    sizes = Sizes(
        tokens=MANY_TOKENS if dynamic else math.prod(known),
        heads=site.heads,
        groups=site.groups,
        head_dim=site.head_dim,
        sub_networks=site.sub_networks,
        hidden=site.hidden,
        gated=site.gated,
        routed=site.routed,
        biased=(
            site.gate_bias is not None,
            site.up_bias is not None,
            site.down_bias is not None,
        ),
        dtype=site.dtype,
        packaged=packaged,
    )
    return Workload(
        sizes=sizes,
        activation=site.activation,
        out_dtype=site.out_dtype,
        device=torch.device("cuda") if named else site.device,
        training=training and _may_be_trained(site.output),
        dynamic=dynamic,
        pieces=(
            _pieces(site.gate.value),
            1 if site.up is None else _pieces(site.up.value),
            _pieces(site.down.value),
        ),
        written=site.products,
        wide_biases=(
            _is_wide(site, site.gate_bias),
            _is_wide(site, site.up_bias),
            _is_wide(site, site.down_bias),
        ),
        card=assumed,
        captured=bool(inductor_config(options).get("triton.cudagraphs")),
    )


def _is_wide(site: Site, bias: TensorView | None) -> bool:
    """Whether a bias has more digits than its network."""
    return bias is not None and site.dtype_of_bias(bias) is not site.dtype


def _pieces(value: Value) -> int:
    """How many tensors of the graph a weight is stacked from; modules may be nested."""
    return sum(map(_pieces, value.args)) if value.op == STACK else 1
