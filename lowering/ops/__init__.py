"""The operators, under ``torch.ops.mhf_compiler``; importing this package registers them.

network.py       multi_head_ffn and its backward pass: schema, shapes, autograd, autocast
router.py        router_product and its backward pass
in_place.py      these over memory that is no longer needed
norm_router.py   norm_and_route: a norm of the queries, and their router
norm_network.py  the same and the network, in one op
sharding.py      how they compute on the shards of DTensors
profiled.py      the layer's name around a call, in a profile
common.py        the factory that registers them, and what they share
"""

from typing import Any

import torch

from . import in_place as in_place
from . import network as network
from . import norm_network as norm_network
from . import norm_router as norm_router
from . import router as router
from .common import registered
from .sharding import know_dtensor

__all__ = ["ALL", "MUTATING", "know_dtensor"]


def _packets(names: list[str]) -> tuple[Any, ...]:
    return tuple(getattr(torch.ops.mhf_compiler, name) for name in names)


#: every op
ALL = _packets(list(registered))

#: those that write to their first argument
MUTATING = _packets([name for name, schema in registered.items() if "(a!)" in schema])
