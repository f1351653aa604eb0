"""Changes that no test can notice, since they change nothing; each with the reason."""

_CHECKS = "patterns/checks.py:"
_OPERATIONS = "patterns/operations.py:"
_AXES_OF_AN_OPERAND = (
    "an operand is read along axes of the output and summed ones, and assign_roles gives all of "
    "those that the weights are read along to groups, sub-networks, hidden units or the width"
)
_RANGE = "of PyTorch's dtypes, one with the digits but not the range of another has a larger tiny"
_NUMBERS = "sympy computes the same of two ints, and makes an int of it again; it is slower"
_SHARES = "into how many shares tokens are cut changes the order of a sum, and how long it takes"
_FIXED = "a place that no axis moves is a number: of symbols it is not known to be below the pieces"

EQUIVALENT = {
    f'{_CHECKS}one_query: role in ("up", "up_query")  ->  True': (
        "no other operand is read along axes of the up projection's own contraction"
    ),
    f"{_CHECKS}check_weights: not real(roles.hidden) | real(width) <= read "
    "or not read <= inner | real(width)  ->  ((not real(roles.hidden) | real(width) <= read))": (
        _AXES_OF_AN_OPERAND
    ),
    f"{_CHECKS}check_weights: read <= inner | real(width)  ->  True": _AXES_OF_AN_OPERAND,
    f"{_OPERATIONS}holds: a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny  ->  "
    "((a.eps <= b.eps) and (a.tiny <= b.tiny))": _RANGE,
    f"{_CHECKS}_nested: _as_number(c) < max(steps, default=0)  ->  "
    "((_as_number(c)) <= (max(steps, default=0)))": (
        "no view reads one dimension along two axes in equal steps: it would read elements twice"
    ),
    f"{_CHECKS}check_piece: copy.positions[reader] < merged  ->  "
    "((copy.positions[reader]) <= (merged))": (
        "the node that merges is the maker of the root, which is among what was read"
    ),
    f"{_CHECKS}_read_at: places is not None and places.dtype is not torch.bool  ->  "
    "((places is not None))": (
        "how much a mask selects depends on data, so that the result is opaque"
    ),
    "patterns/parts.py:plain: return tree  ->  pass": (
        "what is no tree is returned at the end of the function, too; nearly all arguments are ints"
    ),
    **{
        f"patterns/axes.py:{function}: {shortcut}  ->  pass": _NUMBERS
        for function, shortcut in (
            ("multiply", "return a * b"),
            ("plus", "return a + b"),
            ("at_most", "return a <= b"),
            ("stride_in_sizes", "return stride"),
        )
    },
    "patterns/repeats.py:frozen: type(tree) is int or tree is None  ->  ((type(tree) is int))": (
        "None is hashable, and is returned at the end of the function, too"
    ),
    "patterns/axes.py:_place_offset: offset == 0  ->  True": (
        "the innermost digit has stride one, so that nothing is left over"
    ),
    "patterns/grammar.py:_Reader._pieces: not position.resolved().terms and "
    "isinstance(position.offset, int)  ->  ((not position.resolved().terms))": _FIXED,
    "patterns/hidden.py:_one_piece: read is None or read[0].resolved().terms or "
    "not isinstance(read[0].offset, int)  ->  ((read is None) or (read[0].resolved().terms))": (
        _FIXED
    ),
    "patterns/views.py:_slice: isinstance(start, int) and start < 0  ->  ((start < 0))": (
        "a symbolic start is known to be at least zero there"
    ),
    "patterns/repeats.py:program: seeded or call.func._schema.is_mutable or "
    "call.undeclared_writes()  ->  ((seeded) or (call.func._schema.is_mutable))": (
        "what is repeated is written down as what is run, statistics that it updates as well"
    ),
    'patterns/recorder.py:_functional_form: not name.endswith("_") or name.startswith("__")  ->  '
    '((not name.endswith("_")))': "no operator is called so but for the last underscore",
    "patterns/tracer.py:_Tracer._call: key in self._programs and not functorch_depth()  ->  "
    "((key in self._programs))": (
        "in vmap, what is batched has no key, and what is not computes there what it does elsewhere"
    ),
    **{
        f"lowering/kernels/plain/router.py:_run_backward: {before}  ->  ({after})": _SHARES
        for before, after in (
            ("triton.cdiv(axes.length, _TOKENS) * axes.batch", "triton.cdiv(axes.length, _TOKENS)"),
            ("triton.cdiv(axes.length, _TOKENS) * axes.batch", "axes.batch"),
            ("_PROGRAMS * multiprocessors(q.device)", "_PROGRAMS"),
            ("_PROGRAMS * multiprocessors(q.device)", "multiprocessors(q.device)"),
            ("heads * blocks", "heads"),
            ("heads * blocks", "blocks"),
        )
    },
    **{
        f"lowering/kernels/activations.py:{function}: "
        'tl.static_assert(NAME == "tanh", "unknown activation")  ->  pass': (
            "the names of activations are checked before any kernel is launched"
        )
        for function in ("activate", "activate_with_slope")
    },
    "lowering/kernels/activations.py:activate_twice: "
    'tl.static_assert(NAME == "gelu", "does not begin by halving")  ->  pass': (
        "it is called for silu and gelu alone"
    ),
    "lowering/kernels/plain/backward.py:mhf_backward_dq_kernel: F + BF - 1  ->  (F + BF)": (
        "a tile beyond the hidden units is one of zeros"
    ),
}
