"""Loops in a picture: the first round, how many are alike, the last."""

from mhf_compiler.report import RegionNode
from mhf_compiler.report.folding import folded


def node(name: str, operation: str, *inputs: str, role: str | None = None) -> RegionNode:
    return RegionNode(name, f"{name} = {operation}({', '.join(inputs)})", role, inputs)


def given(name: str, role: str) -> RegionNode:
    return RegionNode(name, name, role, ())


def loop(rounds: int, head: str = "") -> list[RegionNode]:
    """out = out + silu(q @ k[e]), from zeros."""
    found = [node(f"out{head}", "zeros_like", "q")]
    for e in range(rounds):
        number = f"{head}_{e}"
        before = f"out{head}" if e == 0 else f"sum{head}_{e - 1}"
        found += [
            node(f"product{number}", "matmul", "q", f"k{number}"),
            node(f"hidden{number}", "silu", f"product{number}"),
            node(f"sum{number}", "add", before, f"hidden{number}"),
        ]
    return found


def weights(rounds: int, head: str = "") -> list[RegionNode]:
    return [given(f"k{head}_{e}", "K") for e in range(rounds)]


def names(nodes: list[RegionNode]) -> list[str]:
    return [one.call if one.role == "alike" else one.name for one in nodes]


def test_a_loop_is_its_first_round_a_number_and_its_last():
    nodes = [given("q", "Q"), *weights(22), *loop(22), node("y", "view", "sum_21", role="out")]
    shown = folded(nodes)
    first, last = [["product_%d", "hidden_%d", "sum_%d"]] * 2
    assert names(shown) == [
        *("q", "k_0", "k_21", "out"),
        *(name % 0 for name in first),
        "… 20 alike …",
        *(name % 21 for name in last),
        "y",
    ]
    (alike,) = (one for one in shown if one.role == "alike")
    assert alike.inputs == ("q", "sum_0")  # not the weights that only those rounds read
    known = {one.name for one in shown}
    assert all(source in known for one in shown for source in one.inputs)
    assert node("sum_21", "add", "sum_20", "hidden_21") in shown  # which reads what is alike


def test_short_loops_are_shown_as_they_are():
    nodes = [given("q", "Q"), *weights(3), *loop(3)]
    assert folded(nodes) == nodes


def test_loops_in_loops_are_folded_from_the_inside():
    heads, rounds = 16, 22
    nodes = [given("q", "Q"), *(k for h in range(heads) for k in weights(rounds, f"h{h}"))]
    nodes += [one for h in range(heads) for one in loop(rounds, f"h{h}")]
    ends = [f"sumh{h}_{rounds - 1}" for h in range(heads)]
    shown = folded([*nodes, node("y", "stack", *ends, role="out")])
    assert names(shown).count("… 20 alike …") == 2  # in the first head and in the last
    assert names(shown).count("… 14 alike …") == 1
    assert len(shown) == 1 + 4 + 2 * (1 + 3 + 1 + 3) + 1 + 1
    assert shown[-1].inputs == (ends[0], ends[-2], ends[-1])


def test_what_only_looks_like_a_loop_is_none():
    """Rounds of other operations, with another constant, or wired in another way."""
    q = given("q", "Q")
    operations = [node(f"x{n}", f"log{n}", "q") for n in range(8)]
    constants = [RegionNode(f"x{n}", f"x{n} = mul(q, 0.{n})", None, ("q",)) for n in range(8)]
    wired = [node("x0", "add", "q"), node("x1", "add", "x0"), node("x2", "add", "x1")]
    wired += [node("x3", "add", "x0"), node("x4", "add", "x1"), node("x5", "add", "x2")]
    for nodes in (operations, constants, wired):
        assert folded([q, *nodes]) == [q, *nodes]
