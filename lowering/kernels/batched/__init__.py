"""The op by PyTorch's own batched products; tiles.py says when.

    views.py     tokens and weights as matrices of a batch
    products.py  the products
    hidden.py    the kernels between them, over the hidden units
    passes.py    the forward and the backward pass, a chunk of heads at a time

Heads of any width, on any card. The products follow PyTorch's settings, TF32 among them. Hidden
units do reach memory here, but those of a few heads at a time: as many as tiles.py has as
`MOST_BYTES`. So there are five products in the backward pass, eight
with a gate, where kernels that keep nothing need seven and thirteen.
"""

from .passes import run_backward as run_backward
from .passes import run_forward as run_forward
