"""What an MH-FFN is: reads graphs, never edits them, imports no Triton.

The files, in the order in which a graph passes through them:

    canonical      the graph as pure values, with provenance
    tracer         makes it: recorder: of ATen operations; memory: what a write changes;
                   numbering: equal values are one; parts: of buffers;
                   repeats: nodes that do the same; modes: autocast and gradients
    axes, views    which element of which tensor a value reads
    products       what a matrix product is
    contractions   sums of products in any spelling
    meaning        what a tree of pointwise operations computes
    rolling        unrolled loops become axes
    grammar        a value read as the output of an MH-FFN
    checks         the proof that it is one; reasons: why it is not
    routers        what computes a site's router from widened queries
    heads          along which dimension of each parameter its heads lie
    recognise      the entry point; site: what it returns
"""

from .axes import Affine, Axis, Size, at_most, multiply, plus, quotient, stride_in_sizes
from .canonical import COPY, OPAQUE, SCATTER, CanonicalCopy, Value
from .casts import uncast
from .heads import Heads, find_heads
from .modes import Modes, called_graphs, inner_graphs
from .operations import is_cast
from .products import is_product_call, is_summed_product_call
from .reasons import Kind, Reason, Unreadable
from .recognise import Findings, NearMiss, find_sites
from .rolling import STACK
from .routers import find_router_products
from .site import Location, RouterProduct, Site, TensorView
from .source import locate, modules_around
from .views import RESHAPES, all_pieces, is_factory

__all__ = [
    "COPY",
    "OPAQUE",
    "RESHAPES",
    "SCATTER",
    "STACK",
    "Affine",
    "Axis",
    "CanonicalCopy",
    "Findings",
    "Heads",
    "Kind",
    "Location",
    "Modes",
    "NearMiss",
    "Reason",
    "RouterProduct",
    "Site",
    "Size",
    "TensorView",
    "Unreadable",
    "Value",
    "all_pieces",
    "at_most",
    "called_graphs",
    "find_heads",
    "find_router_products",
    "find_sites",
    "inner_graphs",
    "is_cast",
    "is_factory",
    "is_product_call",
    "is_summed_product_call",
    "locate",
    "modules_around",
    "multiply",
    "plus",
    "quotient",
    "stride_in_sizes",
    "uncast",
]
