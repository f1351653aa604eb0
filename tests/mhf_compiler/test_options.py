"""Options: ours by name, Inductor's under its own names, and what is said of all others."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from support.networks import Heads

import mhf_compiler
from mhf_compiler import OptionError, Options
from mhf_compiler.compat import counters
from mhf_compiler.options import inductor_config, parse_options, tunes


def test_defaults():
    assert parse_options(None, None) == parse_options(None, {}) == Options()
    assert Options() == Options(
        rewrite="auto", strict=False, fallback="inductor", dump_dir=None, mode=None, inductor={}
    )
    assert inductor_config(Options()) == {}


@pytest.mark.parametrize(
    ("key", "value", "parsed"),
    [
        ("rewrite", "auto", "auto"),
        ("rewrite", "always", "always"),
        ("rewrite", "never", "never"),
        ("strict", True, True),
        ("strict", False, False),
        ("verify", True, True),
        ("fallback", "inductor", "inductor"),
        ("fallback", "aot_eager", "aot_eager"),
        ("fallback", "eager", "eager"),
        ("dump_dir", "some/folder", Path("some/folder")),
        ("dump_dir", Path("some/folder"), Path("some/folder")),
        ("dump_dir", None, None),
        ("mode", "max-autotune", "max-autotune"),
        ("mode", None, None),
    ],
)
def test_every_key_of_ours(key: str, value: object, parsed: object):
    assert getattr(parse_options(None, {key: value}), key) == parsed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewrite": "sometimes"}, "'rewrite' is 'sometimes'; allowed: auto, always, never"),
        ({"rewrite": True}, "'rewrite' is True; allowed: auto, always, never"),
        ({"rewrite": None}, "'rewrite' is None; allowed: auto, always, never"),
        ({"fallback": "cudagraphs"}, "allowed: inductor, aot_eager, eager"),
        ({"strict": "yes"}, "'strict' is 'yes'; allowed: True, False"),
        ({"strict": 1}, "'strict' is 1; allowed: True, False"),
        ({"verify": 1}, "'verify' is 1; allowed: True, False"),
        ({"dump_dir": 3}, "'dump_dir' is 3; allowed: a path"),
        ({"mode": "max-autotun"}, "unknown mode 'max-autotun'; the nearest is 'max-autotune'"),
    ],
)
def test_wrong_values_are_refused_with_the_right_ones(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_options(None, options)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rewite", "rewrite"),
        ("Strict", "strict"),
        ("fall_back", "fallback"),
        ("dumpdir", "dump_dir"),
        ("max_autotun", "max_autotune"),
        ("triton.cudagraf", "triton.cudagraphs"),
        ("inductor", None),  # the field that holds Inductor's own settings is no key
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str | None):
    with pytest.raises(OptionError, match=f"unknown option '{re.escape(key)}'") as caught:
        parse_options(None, {key: 1})
    if nearest is not None:
        assert str(caught.value).endswith(f"the nearest is {nearest!r}")


def test_option_errors_are_value_errors():
    assert issubclass(OptionError, ValueError)


# Inductor's settings.


def test_other_keys_go_to_inductor():
    parsed = parse_options(None, {"max_autotune": True, "triton.cudagraphs": True, "strict": True})
    assert parsed.strict
    assert parsed.inductor == {"max_autotune": True, "triton.cudagraphs": True}
    assert inductor_config(parsed) == parsed.inductor


def test_dashes_are_as_good_as_underscores():
    """As ``torch.compile`` has it for ``backend="inductor"``."""
    assert parse_options(None, {"max-autotune": True}).inductor == {"max_autotune": True}


def test_the_options_that_were_given_stay_as_they_are():
    given = {"rewrite": "always", "dump_dir": "here", "max-autotune": True}
    parse_options(None, given)
    assert given == {"rewrite": "always", "dump_dir": "here", "max-autotune": True}


# Modes.


@pytest.mark.parametrize("mode", ["default", *torch._inductor.list_mode_options()])
def test_modes_are_those_of_inductor(mode: str):
    settings = torch._inductor.list_mode_options().get(mode, {})
    assert inductor_config(parse_options(mode, None)) == settings
    assert inductor_config(parse_options(None, {"mode": mode})) == settings


def test_a_setting_given_by_name_overrides_the_mode():
    parsed = parse_options("reduce-overhead", {"triton.cudagraphs": False})
    assert inductor_config(parsed)["triton.cudagraphs"] is False


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        (None, {}, False),
        ("default", {}, False),
        ("reduce-overhead", {}, False),
        ("max-autotune", {}, True),
        ("max-autotune-no-cudagraphs", {}, True),
        (None, {"mode": "max-autotune"}, True),
        (None, {"max_autotune": True}, True),
        ("max-autotune", {"max_autotune": False}, False),
        (None, {"max_autotune_gemm": True}, False),
    ],
)
def test_kernels_are_tuned_where_inductors_are(
    mode: str | None, options: dict[str, Any], expected: bool
):
    assert tunes(parse_options(mode, options)) == expected


def test_a_mode_given_twice_has_to_be_the_same():
    assert parse_options("max-autotune", {"mode": "max-autotune"}).mode == "max-autotune"
    message = "mode is 'max-autotune', but option 'mode' is 'default'"
    with pytest.raises(OptionError, match=message):
        parse_options("max-autotune", {"mode": "default"})


# As an instance.


def test_an_instance_says_what_a_dict_says():
    given = {"rewrite": "always", "strict": True, "dump_dir": Path("a"), "max_autotune": True}
    instance = Options(
        rewrite="always", strict=True, dump_dir=Path("a"), inductor={"max_autotune": True}
    )
    assert parse_options(None, instance) == parse_options(None, given) == instance
    assert parse_options("default", Options()).mode == "default"


@pytest.mark.parametrize(
    "options",
    [
        Options(rewrite="sometimes"),
        Options(fallback="cudagraphs"),
        Options(mode="max-autotun"),
        Options(inductor={"max_autotun": True}),
    ],
)
def test_an_instance_is_checked(options: Options):
    with pytest.raises(OptionError):
        parse_options(None, options)


@pytest.mark.parametrize("rewrite", ["always", "never"])
def test_an_instance_is_taken_wherever_options_are(rewrite: str):
    model, x = Heads(), torch.randn(2, 6, 32)
    options = Options(rewrite=rewrite, fallback="eager", strict=True)
    sites = int(rewrite == "always")
    assert len(mhf_compiler.explain(model, options=options)(x).rewritten) == sites
    mhf_compiler.assert_rewritten(model, (x,), sites=sites, options=options)
    counters.clear()
    compiled = torch.compile(model, backend="flashmhf", options=options)
    torch.testing.assert_close(compiled(x), model(x))
    assert counters["flashmhf"]["sites_rewritten"] == sites


# Where a user meets them.


def test_explain_refuses_wrong_options_before_anything_runs():
    with pytest.raises(OptionError, match="the nearest is 'strict'"):
        mhf_compiler.explain(torch.nn.Identity(), options={"stricter": True})


@pytest.mark.parametrize("strict", [False, True])
def test_wrong_options_are_an_error_whether_strict_or_not(strict: bool):
    """They are the user's mistake: no fall-back, no warning."""
    compiled = torch.compile(
        torch.nn.Linear(2, 2), backend="flashmhf", options={"strict": strict, "rewrit": "always"}
    )
    with pytest.raises(Exception, match="unknown option 'rewrit'; the nearest is 'rewrite'"):
        compiled(torch.randn(1, 2))
