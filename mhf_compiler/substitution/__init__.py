"""Dynamo's graph, before autograd: what is rewritten, and how.

graph    one graph, from recognition to the edited graph and its report
judge    whether a proved site is worth rewriting and runs on this machine
edit     the edit of a copy of the graph: redirect readers, remove dead nodes
emit     one op with its arguments, as view operations of values that the graph has
aten     the same as ATen operations, for exported programs
guard    whether anything but numbers has changed
verify   whether a site computes what its original spelling computes
"""
