"""Golden texts: what the back end makes of a handful of the corpus's models, for a reviewer to see.

Update them with ``EXPECTTEST_ACCEPT=1 pytest tests/mhf_compiler/test_golden.py`` and read the
difference. Shown is the graph as it goes on to the fallback, without what says nothing: the source
comments, the releases of variables, and the bookkeeping of vmap.
"""

from __future__ import annotations

import re
import textwrap

from corpus.cases import Case
from corpus.near_miss import NEAR_MISSES
from corpus.positive import POSITIVE
from expecttest import assert_expected_inline

import mhf_compiler
from mhf_compiler import Report

OPTIONS = {"rewrite": "always", "strict": True}


def explained(case: Case) -> Report:
    return mhf_compiler.explain(case.build(), options=OPTIONS)(*case.inputs())


def graph(case: Case) -> str:
    """The edited graph, an operation a line, inputs by their names in the model."""
    code = explained(case).graph_after
    code = re.sub(r"#.*|;  [\w =]+ = None|: \"[^\"]*\"(?= =)", "", code)
    lines = [line.strip() for line in code.splitlines()]
    operations = [line for line in lines if " = " in line and not _says_nothing(line)]
    text = "\n".join(
        textwrap.fill(_readable(line), 96, subsequent_indent="    ") for line in operations
    )
    return f"{text}\n{lines[-1]}"


def _says_nothing(line: str) -> bool:
    return line.startswith("def ") or "predispatch" in line or bool(re.match(r"l_\w+ = L_", line))


def _readable(line: str) -> str:
    names = re.sub(r"\bl_(?:self_)?(\w+?)_\b", r"\1", line)
    return re.sub(r"(modules|parameters)_(?=\w)", "", names)


def report(model: Case) -> str:
    """The printed report; lines without numbers, no estimates, columns as narrow as can be."""
    text = re.sub(r"/\S+/(\w+\.py):\d+", r"\1", str(explained(model)))
    text = re.sub(r"\n +estimate .*|, an estimated .*", "", text)  # depends on the machine
    return re.sub(r"(?<=\S) {2,}", "  ", text)


def test_the_authors_loop():
    """What is left of it are views of the weights; the buffer and its additions are gone."""
    assert_expected_inline(
        graph(POSITIVE["Published-heads first"]),
        """\
linear = torch._C._nn.linear(x, project_weight, project_bias)
view = linear.view(2, 6, 4, 8)
rms_norm = torch.rms_norm(view, (8,), norm_weight, None)
transpose = rms_norm.transpose(1, 2)
q = transpose.contiguous()
float_1 = q.float()
float_2 = route.float()
matmul = float_1 @ float_2
r = torch.sigmoid(matmul)
sum_1 = r.sum(-1, keepdim = True)
clamp_min = sum_1.clamp_min(1e-20)
r_1 = r / clamp_min
unflatten = torch.unflatten(k, 0, (4, 3, 5))
unflatten_1 = torch.unflatten(v, 0, (4, 3, 5))
unflatten_2 = torch.unflatten(u, 0, (4, 3, 5))
permute = torch.permute(r_1, [0, 2, 1, 3])
multi_head_ffn_default = torch.ops.mhf_compiler.multi_head_ffn.default(rms_norm, unflatten,
    unflatten_2, unflatten_1, permute, None, None, None, activation = 'silu', k_scale = 1.0,
    u_scale = 1.0, out_scale = 1.0, out_order = None, out_dtype = None)
flatten = torch.flatten(multi_head_ffn_default, 2, 3)
linear_1 = torch._C._nn.linear(flatten, merge_weight, merge_bias)
return (linear_1,)""",
    )


def test_batched_einsums():
    assert_expected_inline(
        graph(POSITIVE["RouterOnHidden"]),
        """\
q = x.unflatten(-1, (4, -1))
einsum_2 = torch.functional.einsum('blhd,hed->blhe', q, route)
r = torch.sigmoid(einsum_2)
sum_1 = r.sum(-1, keepdim = True)
add = sum_1 + 1e-06
truediv = r / add
unflatten = torch.unflatten(x, 2, (4, 8))
permute = torch.permute(gate, [0, 1, 3, 2])
permute_1 = torch.permute(up, [0, 1, 3, 2])
multi_head_ffn_default = torch.ops.mhf_compiler.multi_head_ffn.default(unflatten, permute,
    permute_1, down, truediv, None, None, None, activation = 'silu', k_scale = 1.0, u_scale =
    1.0, out_scale = 1.0, out_order = None, out_dtype = None)
flatten_1 = torch.flatten(multi_head_ffn_default, 2, 3)
return (flatten_1,)""",
    )


def test_a_module_list():
    """Weights that lie apart are stacked, which is the one copy."""
    assert_expected_inline(
        graph(POSITIVE["ListOfHeads-cat"]),
        """\
unflatten = torch.unflatten(x, 2, (4, 8))
stack = torch.stack([heads_0_gate_weight, heads_1_gate_weight, heads_2_gate_weight,
    heads_3_gate_weight])
unsqueeze = torch.unsqueeze(stack, 1)
stack_1 = torch.stack([heads_0_down_weight, heads_1_down_weight, heads_2_down_weight,
    heads_3_down_weight])
permute = torch.permute(stack_1, [0, 2, 1])
unsqueeze_1 = torch.unsqueeze(permute, 1)
stack_2 = torch.stack([heads_0_up_weight, heads_1_up_weight, heads_2_up_weight,
    heads_3_up_weight])
unsqueeze_2 = torch.unsqueeze(stack_2, 1)
multi_head_ffn_default = torch.ops.mhf_compiler.multi_head_ffn.default(unflatten, unsqueeze,
    unsqueeze_2, unsqueeze_1, None, None, None, None, activation = 'silu', k_scale = 1.0,
    u_scale = 1.0, out_scale = 1.0, out_order = None, out_dtype = None)
flatten = torch.flatten(multi_head_ffn_default, 2, 3)
return (flatten,)""",
    )


def test_a_grouped_convolution():
    assert_expected_inline(
        graph(POSITIVE["GroupedConvolution"]),
        """\
unflatten = torch.unflatten(x, 1, (4, 8))
permute = torch.permute(unflatten, [0, 3, 1, 2])
select = torch.select(gate_weight, 2, 0)
unflatten_1 = torch.unflatten(select, 0, (4, 5))
unsqueeze = torch.unsqueeze(unflatten_1, 1)
select_1 = torch.select(down_weight, 2, 0)
unflatten_2 = torch.unflatten(select_1, 0, (4, 8))
permute_1 = torch.permute(unflatten_2, [0, 2, 1])
unsqueeze_1 = torch.unsqueeze(permute_1, 1)
select_2 = torch.select(up_weight, 2, 0)
unflatten_3 = torch.unflatten(select_2, 0, (4, 5))
unsqueeze_2 = torch.unsqueeze(unflatten_3, 1)
unflatten_4 = torch.unflatten(gate_bias, 0, (4, 5))
unsqueeze_3 = torch.unsqueeze(unflatten_4, 1)
unflatten_5 = torch.unflatten(up_bias, 0, (4, 5))
unsqueeze_4 = torch.unsqueeze(unflatten_5, 1)
unflatten_6 = torch.unflatten(down_bias, 0, (4, 8))
unsqueeze_5 = torch.unsqueeze(unflatten_6, 1)
multi_head_ffn_default = torch.ops.mhf_compiler.multi_head_ffn.default(permute, unsqueeze,
    unsqueeze_2, unsqueeze_1, None, unsqueeze_3, unsqueeze_4, unsqueeze_5, activation = 'silu',
    k_scale = 1.0, u_scale = 1.0, out_scale = 1.0, out_order = [0, 2, 3, 1], out_dtype = None)
permute_2 = torch.permute(multi_head_ffn_default, [0, 2, 3, 1])
flatten = torch.flatten(permute_2, 1, 2)
return (flatten,)""",
    )


def test_vmap():
    """Nothing is left inside of vmap."""
    assert_expected_inline(
        graph(POSITIVE["VmapOverHeads"]),
        """\
unflatten = torch.unflatten(x, 2, (4, 8))
permute = torch.permute(gate, [0, 2, 1])
unsqueeze = torch.unsqueeze(permute, 1)
unsqueeze_1 = torch.unsqueeze(down, 1)
permute_1 = torch.permute(up, [0, 2, 1])
unsqueeze_2 = torch.unsqueeze(permute_1, 1)
multi_head_ffn_default = torch.ops.mhf_compiler.multi_head_ffn.default(unflatten, unsqueeze,
    unsqueeze_2, unsqueeze_1, None, None, None, None, activation = 'silu', k_scale = 1.0,
    u_scale = 1.0, out_scale = 1.0, out_order = None, out_dtype = None)
flatten_1 = torch.flatten(multi_head_ffn_default, 2, 3)
return (flatten_1,)""",
    )


def test_the_report_of_a_rewritten_model():
    assert_expected_inline(
        report(POSITIVE["Published-heads first"]),
        """\
1 MH-FFN rewritten, 0 declined, in 1 graph
  in all: 2.88 kB of hidden units not stored, 5.76 kB not kept for the backward pass

Rewritten
  site  source  module  heads  head dim  sub-networks  hidden units  router
  0  positive.py  4  8  3 x 5  silu(gate) * up  yes

  positive.py
      out += hidden @ v[:, e] * s_out * r[..., e : e + 1]
    formula  sum over e of R[e] * (silu(Q K[e]^T) * (Q U[e]^T)) V[e]
    Q  rms_norm  (2, 6, 4, 8) float32
    K  k  (4, 3, 5, 8) float32
    U  u  (4, 3, 5, 8) float32
    V  v  (4, 3, 5, 8) float32
    R  r_1  (2, 6, 4, 3) float32
    lowered to  torch.ops.mhf_compiler.multi_head_ffn; CPU path: blocks of tokens whose hidden
                units stay in the cache; the backward pass recomputes the hidden units: only the
                arguments are saved
    work  34.6 kFLOP and 9.41 kB forward for 12 tokens; 2.88 kB of hidden units are not
                stored, 5.76 kB not kept for the backward pass

After autograd
  no pass has run; when Inductor compiles the model, counters and logs say what was fused""",
    )


def test_the_reports_of_near_misses():
    names = [
        "DifferentQueries",
        "GateWithoutGradients",
        "Activation-clamped silu",
        "DropoutOfHidden",
    ]
    assert_expected_inline(
        "\n\n".join(report(NEAR_MISSES[name]) for name in names),
        """\
0 MH-FFNs rewritten, 1 declined, in 1 graph

Declined
  near_miss.py
      return torch.einsum("blhi,hio->blho", q, w)
    why  the gate and the up projection read different inputs
    operation  near_miss.py: einsum_1 = einsum(blhi,hio->blho, normalised, up)
    what to do  feed both projections of a head from the same query

0 MH-FFNs rewritten, 1 declined, in 1 graph

Declined
  near_miss.py
      return torch.einsum("blhi,hio->blho", q, w)
    why  gradients are switched off for a part of the network only
    operation  near_miss.py: einsum_2 = einsum(blhi,hio->blho, mul, down)
    what to do  put the whole network, or none of it, under no_grad

0 MH-FFNs rewritten, 1 declined, in 1 graph

Declined
  near_miss.py
      "clamped silu": lambda x: F.silu(x).clamp(max=1.0),
    why  the activation is none of silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh (it is clamped)
    operation  near_miss.py: clamp = silu.clamp(max=1.0)
    what to do  use one of these, without a clamp, a shift or another slope

0 MH-FFNs rewritten, 1 declined, in 1 graph

Declined
  near_miss.py
      return project(F.dropout(hidden, 0.5), self.down)
    why  there is dropout between the hidden units and the down projection
    operation  near_miss.py: dropout = dropout(hidden, 0.5)
    what to do  apply dropout after the down projection, or compile in eval mode""",
    )
