"""How tests that compile through Inductor stay fast."""

#: Options under which Inductor calls PyTorch's kernels where it would write C++, whose compilation
#: takes three of a test's four seconds. Passes get the same graph. For tests of what passes find
#: and decline; what Inductor itself makes of a rewritten graph needs its C++.
NO_CPP = {"fallback_by_default": True}
