"""What replaces a multi-head feed-forward network: one op, its specification, its kernels."""

from . import normed_network as normed_network  # defines one more op
from . import normed_router as normed_router  # and one more
from . import overwriting as overwriting  # and three more
from .arguments import ArgumentError
from .op import multi_head_ffn
from .reference import multi_head_ffn_reference
from .router import router_product

__all__ = ["ArgumentError", "multi_head_ffn", "multi_head_ffn_reference", "router_product"]
