"""Under which modes the graphs of higher-order operations run."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from mhf_compiler.patterns.modes import Modes, inner_graphs, switches_modes
from mhf_compiler.patterns.reasons import Unreadable

operations = torch.ops.higher_order


def modes_inside(operation: Any, *before: Any, graphs: int = 1) -> list[Modes | Unreadable]:
    """Those of the graphs that an operation is given, after other arguments."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    names = [f"body_{place}" for place in range(graphs)]
    for name in names:
        root.add_module(name, fx.symbolic_trace(lambda x: x.sin()))
    graph.output(graph.call_function(operation, (*before, *map(graph.get_attr, names), x)))
    return [modes for _, modes in inner_graphs(fx.GraphModule(root, graph))]


def test_gradients_are_recorded_as_an_operation_says():
    """So exported programs enter ``torch.no_grad`` and leave it."""
    (modes,) = modes_inside(operations.wrap_with_set_grad_enabled, False)
    assert isinstance(modes, Modes)
    assert not modes.grad
    with torch.no_grad():
        (modes,) = modes_inside(operations.wrap_with_set_grad_enabled, True)
    assert isinstance(modes, Modes)
    assert modes.grad


def test_autocast_of_a_device_without_networks_changes_nothing():
    """They are found on CPUs and CUDA."""
    (modes,) = modes_inside(operations.wrap_with_autocast, "cpu", torch.bfloat16, True, None)
    assert isinstance(modes, Modes)
    assert torch.bfloat16 in modes.autocast
    (modes,) = modes_inside(operations.wrap_with_autocast, "mps", torch.float16, True, None)
    assert modes == Modes.now()


def test_an_autograd_function_records_no_gradients_and_runs_backward_anywhere():
    forward, backward = modes_inside(operations.autograd_function_apply, graphs=2)
    assert isinstance(forward, Modes)
    assert not forward.grad
    assert backward is Unreadable.SEVERAL_MODES


def test_an_input_switches_no_modes_whatever_its_name():
    graph = fx.Graph()
    assert switches_modes(graph.call_function(torch._C._set_grad_enabled, (True,)))
    assert not switches_modes(graph.placeholder("_set_grad_enabled"))
