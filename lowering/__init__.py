"""What replaces a multi-head feed-forward network: the ops, their specification, their kernels."""

from .arguments import ArgumentError
from .ops.network import multi_head_ffn
from .ops.router import router_product
from .reference import multi_head_ffn_reference

__all__ = ["ArgumentError", "multi_head_ffn", "multi_head_ffn_reference", "router_product"]
