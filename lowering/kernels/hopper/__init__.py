"""The kernels for Hopper, in Gluon; tiles.py says when they run.

    forward.py           the forward pass, and the same after a norm and a router
    routing.py           that norm and router, inside of the forward kernel
    backward.py          what the kernels of the backward pass have in common
    backward_query.py    dQ and dR
    backward_weights.py  dV; dK and dU; dK and dV

As in each family of kernels, `run_<kernel>` launches a kernel with the tile that was chosen for it.
It returns False, having launched nothing, where a tensor's strides or address rule the kernel out.
"""

from .backward_query import run_dq as run_dq
from .backward_weights import run_dk_du as run_dk_du
from .backward_weights import run_dk_dv as run_dk_dv
from .backward_weights import run_dv as run_dv
from .forward import run_forward as run_forward
from .forward import run_normed_forward as run_normed_forward
