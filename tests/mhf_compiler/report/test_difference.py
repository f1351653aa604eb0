"""The code before and after as one difference, of which one sees what changed."""

import re

from mhf_compiler.report.difference import difference


def plain(html: str) -> list[str]:
    """Its lines, without markup; what is folded is in front of an indented part."""
    html = re.sub(r"<summary>(.*?)</summary>", r"\1\n", html)
    return re.sub(r"<[^>]*>", "", html).split("\n")[:-1]


def test_lines_are_removed_added_or_equal():
    html = difference("a = f(1)\nb = f(2)", "a = f(1)\nc = f(3)")
    assert plain(html) == ["  a = f(1)", "- b = f(2)", "+ c = f(3)"]
    assert html.count('class="line del"') == html.count('class="line add"') == 1
    assert html.count('<div class="change" tabindex="-1">') == 1


def test_equal_lines_are_folded_except_around_a_change():
    code = [f"x{n} = f({n})" for n in range(20)]
    html = difference("\n".join(code), "\n".join([*code[:10], "y = g(1)", *code[11:]]))
    shown = re.sub(r"</summary>.*?</details>", "</summary>", html, flags=re.DOTALL)
    assert plain(shown) == [
        "… 7 equal lines …",
        *(f"  {line}" for line in code[7:10]),
        "- x10 = f(10)",
        "+ y = g(1)",
        *(f"  {line}" for line in code[11:14]),
        "… 6 equal lines …",
    ]
    assert all(f"  {line}" in plain(html) for line in code[:10])  # there, but folded


def test_of_a_long_change_the_middle_is_folded():
    html = difference("\n".join(f"x{n} = f({n})" for n in range(100)), "y = g(1)")
    assert "… 80 more lines removed …" in html
    assert html.count('class="line del"') == 100


def test_other_names_and_releases_are_left_out():
    before = "    l_x_ = L_x_\n    y = f(l_x_);  l_x_ = None\n\n    return y"
    after = "    y = f(l_x_)\n    return y"
    assert not re.search(r'"line (add|del)"', difference(before, after))
    assert plain(difference(before, before)) == ["      y = f(l_x_)", "      return y"]


def test_parameters_have_the_models_names_and_arguments_a_line_each():
    name = "L_self_modules_layers_modules_0_parameters_gate_"
    code = (
        f'def forward(self, {name}: "f32[2, 3]", L_x_: "f32[3]"):\n    y = f({name.lower()}, l_x_)'
    )
    assert plain(difference(code, code)) == [
        '  def forward(self, layers.0.gate: "f32[2, 3]",',
        '              L_x_: "f32[3]"):',
        "      y = f(layers.0.gate, l_x_)",
    ]


def test_what_code_says_is_no_markup():
    assert "<b>" not in difference("# <b>", "x = '<b>'")
