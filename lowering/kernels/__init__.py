"""The Triton kernels of the ops, over arbitrary strided views.

    dispatch.py     from an op to its kernels, by the choice that lowering/tiles.py makes
    operands.py     tensors as kernels take them: descriptors, or pointers and strides
    launch.py       from operands to a launch
    verdicts.py     whether a kernel computes what it should on this card
    replay.py       launches that are repeated for other tensors
    compat.py       what Triton does not document, and options of every launch
    loads.py        tiles in and out of memory, inside the kernels
    activations.py  the activations and their slopes
    splitting.py    tiles cut along the hidden units, and the sum of their parts
    plain/          the kernels for all cards, in Triton
    hopper/         those for Hopper, in Gluon: loads, products and activations overlap
    batched/        wide heads and float32: PyTorch's products, and kernels between them
    packaged.py     what takes the kernels' place in a package of AOTInductor's
    tuning/         other tile sizes, timed under max-autotune

Inside the kernels the paper's letters are used: Q the per-head queries, K, U and V the gate, up and
down projections, R the router's weights; E sub-networks of F hidden units, heads of width D.

Nothing of the size tokens x hidden units reaches memory (in batched/, for a few heads at a time),
sums are kept in float32 and rounded once, and no order of addition depends on scheduling: equal
inputs give equal bits.
"""
