"""What replaces a multi-head feed-forward network: one op, its specification, its kernels."""

from .arguments import ArgumentError
from .ops import in_place as in_place  # and three more
from .ops import norm_network as norm_network  # defines one more op
from .ops import norm_router as norm_router  # and one more
from .ops.network import multi_head_ffn
from .ops.router import router_product
from .reference import multi_head_ffn_reference

__all__ = ["ArgumentError", "multi_head_ffn", "multi_head_ffn_reference", "router_product"]
