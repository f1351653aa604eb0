"""Inductor's graph, after autograd: fusions that need to know who reads which memory.

manager          which passes run, in which order, and what happens if one fails
memory           aliasing: who shares a storage, and who reads it late
functional       functional calls of ops that mutate an argument
norm_router      norm, router product and activation -> ``norm_and_route``
overwrite        the op writes over dead queries, its backward pass over dead gradients
norm_network     ``norm_and_route`` and the network after it -> one op
layouts          buffers that our ops access keep the strides of the graph
"""
