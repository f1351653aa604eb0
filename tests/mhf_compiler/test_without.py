"""A PyTorch that lacks a private name which `compat.py` uses: the model runs all the same.

Each name is misspelled in turn, in a copy of that file, and a model is compiled in a process that
gets the copy. These processes are forked from one that has imported PyTorch, to save its time.
"""

import ast
import json
import sys
from typing import Any

import pytest
import torch
from support.forks import run_code
from support.networks import HEADS
from support.private_names import COMPAT, private_names

import mhf_compiler
from mhf_compiler import MhfCompilerWarning, options, without


def sources() -> dict[str, str]:
    """The file without each name, wherever it is used."""
    found: dict[str, str] = {}
    for missing in dict(private_names(ast.parse(COMPAT.read_text()))):
        tree = ast.parse(COMPAT.read_text())
        for name, node in list(private_names(tree)):
            if name != missing:
                continue
            if isinstance(node, ast.alias):
                node.asname = node.asname or node.name
                node.name += "_is_gone"
            else:
                node.attr += "_is_gone"
        found[missing] = ast.unparse(tree)
    return found


IMPORTS = """
import importlib.abc, importlib.util, json, os, sys, traceback, warnings
import torch, torch._dynamo, torch._inductor.compile_fx
from torch import nn
"""
ATTEMPTS = """
class Finder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    def __init__(self, source):
        self.source = source

    def find_spec(self, name, path, target=None):
        if name == "mhf_compiler.compat":
            return importlib.util.spec_from_loader(name, self)

    def get_filename(self, name):
        return "compat.py"

    def get_data(self, path):
        return self.source.encode()

def attempt(source, fallback, strict):
    sys.meta_path.insert(0, Finder(source))
    model, x = Heads(), torch.randn(4, 6, 8)
    options = {"fallback": fallback, "rewrite": "always", "strict": strict}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if fallback == "eager":  # a graph that the parent has traced
                from mhf_compiler import flashmhf

                gm, inputs = traced[0]
                (found,) = flashmhf(gm, inputs, options=options)(*inputs)
                torch.testing.assert_close(found, expected)
            else:
                out = torch.compile(model, backend="flashmhf", options=options)(x)
                out.sum().backward()
                torch.testing.assert_close(out, model(x))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return [str(w.message) for w in caught if w.category.__name__ == "MhfCompilerWarning"]

def trace(gm, inputs):
    traced.append((gm, [*plain_inputs(gm)]))
    return gm.forward

def plain_inputs(gm):
    named = {str(p.shape): p for p in plain.parameters()} | {str(x.shape): x}
    for node in gm.graph.find_nodes(op="placeholder"):
        yield named[str(node.meta["example_value"].shape)]

traced, plain, x = [], Heads(), torch.randn(4, 6, 8)
expected = torch.compile(plain, backend=trace)(x)
torch.compiler.reset()
with torch.no_grad():  # after a backward pass, no fork can have one
    torch.compile(plain, backend="inductor")(x)  # finds the C++ compiler for all
torch.compiler.reset()
for line in open(sys.argv[1]):
    name, source, fallback, strict = json.loads(line)
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            told = attempt(source, fallback, strict)
        except BaseException:
            told = traceback.format_exc()
        print(json.dumps([name, strict, told]), flush=True)
        os._exit(0)
    os.wait()
"""
RUN = IMPORTS + HEADS + ATTEMPTS


#: what can be raised at once, and what only on the way
STRICT = "torch._guards:TracingContext", "torch._C._functorch.get_dynamic_layer_stack_depth"

Told = dict[str, Any]  # by name: the warnings, or what was raised


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Told]:
    """Lenient and strict, all forked from one process.

    Names that only Inductor's part of the way needs are tried with Inductor.
    """
    every = sources()
    lines = [
        (name, text, "inductor" if "inductor" in name or "repro" in name else "eager", False)
        for name, text in every.items()
    ]
    lines += [(name, every[name], "eager", True) for name in STRICT]
    asked = tmp_path_factory.mktemp("without") / "asked"
    asked.write_text("\n".join(map(json.dumps, lines)))
    done = run_code(RUN, asked)
    assert done.returncode == 0, done.stderr
    found: dict[bool, Told] = {False: {}, True: {}}
    for line in done.stdout.splitlines():
        if line.startswith("["):
            name, strict, told = json.loads(line)
            found[strict][name] = told
    assert [found[False].keys(), found[True].keys()] == [every.keys(), set(STRICT)]
    return found


def test_a_model_runs_without_any_one_of_them(attempts: dict[bool, Told]):
    assert len(attempts[False]) > 30
    raised = {name: what for name, what in attempts[False].items() if isinstance(what, str)}
    assert raised == {}


def test_there_is_one_warning_which_names_what_is_missing(attempts: dict[bool, Told]):
    """None where this model does not come by."""
    for warned in attempts[False].values():
        assert len(warned) <= 1
        assert all("_is_gone" in text for text in warned)
    assert sum(map(len, attempts[False].values())) > 20


def test_strict_raises(attempts: dict[bool, Told]):
    for raised in attempts[True].values():
        assert isinstance(raised, str)
        assert "_is_gone" in raised


def test_every_option_of_ours_is_kept_from_inductor():
    assert set(without._OURS) == set(options._OURS)


def test_options_for_inductor_are_then_those_of_the_user(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mhf_compiler.inductor", None)  # cannot be imported
    given = {"rewrite": "always", "mode": "max-autotune-no-cudagraphs", "max-fusion-size": 8}
    with pytest.warns(MhfCompilerWarning, match="nothing is rewritten: ModuleNotFoundError"):
        settings = mhf_compiler.inductor_options(given)
    assert settings["max_autotune"] is True
    assert settings["max_fusion_size"] == 8
    assert set(settings) <= set(torch._inductor.list_options())
    assert "pre_grad_custom_pass" not in settings
    with pytest.raises(ImportError, match=r"mhf_compiler\.inductor"):
        mhf_compiler.inductor_options({"strict": True})
