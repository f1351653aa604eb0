"""Several devices, each with some heads: tensor parallelism for MH-FFNs, found and planned.

    plan = head_parallel_plan(model, *example_inputs)
    parallelize_module(model, mesh["tp"], plan)

Which parameters of a model have heads, and along which dimension, is read from its graphs, as the
networks themselves are. ``HeadParallel`` is one of PyTorch's parallel styles: parameters become
DTensors, the rest of the module's code stays what it is, and DTensor computes it on shards. So
placements decide how fast a model is and how much is sent around, and never what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any, TypeAlias

from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from .explanation import call_once
from .patterns import Heads, Modes, Site, find_heads, find_sites, inner_graphs
from .report.describe import classes_around
from .substitution.graph import shape_env_in

__all__ = ["HeadParallel", "HeadParallelError", "head_parallel_plan", "parallelize_heads"]

Plan: TypeAlias = "ParallelStyle | dict[str, ParallelStyle]"

#: the arguments of the op that have to be divided; others follow
_WEIGHTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


class HeadParallelError(ValueError):
    """The heads of a network cannot be divided between devices; the message says why."""


class HeadParallel(ParallelStyle):
    """Divides the heads of the MH-FFNs of one module between the devices of a mesh.

    A style for ``torch.distributed.tensor.parallel.parallelize_module``. The named parameters
    become DTensors that are ``Shard`` along the dimension of their heads, all others of the module
    ``Replicate``. Tensors that the module is called with become replicated DTensors, and those
    that it returns are gathered and plain. ``head_parallel_plan`` makes these styles.

    Args:
        dims: for each parameter with heads, by its name in the module, the dimension along which
            heads follow each other. Its size is a multiple of ``heads``.
        heads: the number of heads, or of groups of heads that share weights. The size of the mesh
            divides it.
        sequence_parallel: whether the first argument, and what the module returns, are shards
            of sequences, along dimension 1 of ``[B, L, ...]``.
        path: what error messages call the module.

    Raises:
        HeadParallelError: when it is applied: the mesh has several dimensions or a size that does
            not divide ``heads``, or a parameter is missing, is a DTensor already or has another
            size.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        heads: int,
        *,
        sequence_parallel: bool = False,
        path: str = "",
    ) -> None:
        super().__init__()
        self.dims = dict(dims)
        self.heads = heads
        self.sequence_parallel = sequence_parallel
        self.path = path

    def __repr__(self) -> str:
        sequences = ", sequence_parallel=True" if self.sequence_parallel else ""
        return f"{type(self).__name__}({self.dims}, heads={self.heads}{sequences})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._check(module, device_mesh)
        distribute_module(module, device_mesh, self._divide)
        for parameter in module.parameters():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                parameter.register_hook(partial(_placed_as, parameter.placements))
        module.register_forward_pre_hook(partial(self._enter, device_mesh), with_kwargs=True)
        module.register_forward_hook(self._leave)
        return module

    def _check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        name = self.path or type(module).__name__
        if mesh.ndim != 1:
            raise HeadParallelError(
                f"{name}: heads are divided along one dimension of a mesh, this one has {mesh.ndim}"
                f" ({mesh}): give one of them, as in mesh['tp']"
            )
        if self.heads % mesh.size():
            allowed = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise HeadParallelError(
                f"{name}: {', '.join(self.dims)} consist of {self.heads} heads, or groups of heads "
                f"that share weights, and the mesh of {mesh.size()} devices: allowed are "
                f"{', '.join(map(str, allowed))}"
            )
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for key, dim in self.dims.items():
            if key not in parameters:
                raise HeadParallelError(
                    f"{name} has no parameter {key!r}; it has {', '.join(parameters) or 'none'}"
                )
            parameter = parameters[key]
            if isinstance(parameter, DTensor):
                raise HeadParallelError(
                    f"{name}.{key} is a DTensor already, {parameter.placements}: divide heads "
                    "before fully_shard and other styles"
                )
            if not -parameter.ndim <= dim < parameter.ndim or parameter.shape[dim] % self.heads:
                raise HeadParallelError(
                    f"{name}.{key} has shape {tuple(parameter.shape)}: dimension {dim} is not a "
                    f"multiple of {self.heads} heads"
                )

    def _divide(self, prefix: str, module: nn.Module, mesh: DeviceMesh) -> None:
        """Make DTensors of the parameters of one submodule; those left out are replicated."""
        for name, parameter in module.named_parameters(recurse=False):
            dim = self.dims.get(f"{prefix}.{name}" if prefix else name)
            if dim is not None:
                shards = distribute_tensor(parameter.detach(), mesh, [Shard(dim % parameter.ndim)])
                made = nn.Parameter(shards, requires_grad=parameter.requires_grad)
                module.register_parameter(name, made)

    def _enter(
        self,
        mesh: DeviceMesh,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, dict[str, Any]]:
        outside: Placement = Shard(1) if self.sequence_parallel else Replicate()
        placed = [outside, *(Replicate() for _ in (*args, *kwargs))]
        values = (*args, *kwargs.values())
        given = [_replicated(x, mesh, place) for x, place in zip(values, placed, strict=False)]
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, DTensor):
            outside = Shard(1) if self.sequence_parallel else Replicate()
            return output.redistribute(placements=[outside]).to_local()
        if isinstance(output, dict):
            return type(output)({k: self._leave(module, args, x) for k, x in output.items()})
        if type(output) in (tuple, list):
            return type(output)(self._leave(module, args, x) for x in output)
        return output


def _placed_as(places: Sequence[Placement], gradient: Tensor) -> Tensor:
    """A gradient placed as its parameter: of one that all heads share, each device has a part."""
    return gradient.redistribute(placements=places) if isinstance(gradient, DTensor) else gradient


def _replicated(value: Any, mesh: DeviceMesh, outside: Placement) -> Any:
    """An argument as a replicated DTensor; ``outside`` is how a plain tensor is placed."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, mesh, [outside], run_check=False)
    return value.redistribute(mesh, [Replicate()])


def parallelize_heads(
    model: nn.Module,
    mesh: DeviceMesh,
    *example_inputs: Any,
    sequence_parallel: bool = False,
    **example_kwargs: Any,
) -> nn.Module:
    """Divide the heads of a model's MH-FFNs between the devices of a mesh, in place.

    The same as ``parallelize_module(model, mesh, head_parallel_plan(model, *example_inputs))``.

    Args:
        model: has plain tensors as parameters, also on the meta device.
        mesh: has one dimension, such as ``mesh["tp"]`` of a larger one.
        example_inputs: what the model is called with once to find its networks; few tokens do.
        sequence_parallel: whether the networks are called with shards of sequences.
        example_kwargs: the same by name.

    Returns:
        The model. Names of parameters in its state dict stay the same.

    Raises:
        HeadParallelError: there is no network, or one cannot be divided; the model is as it was.
    """
    plan = head_parallel_plan(
        model, *example_inputs, sequence_parallel=sequence_parallel, **example_kwargs
    )
    styles = plan if isinstance(plan, dict) else {"": plan}
    for path, style in styles.items():
        assert isinstance(style, HeadParallel)
        style._check(model.get_submodule(path), mesh)
    parallelize_module(model, mesh, plan)
    return model


def head_parallel_plan(
    model: nn.Module,
    *example_inputs: Any,
    sequence_parallel: bool = False,
    **example_kwargs: Any,
) -> Plan:
    """Plan tensor parallelism for every MH-FFN of a model, by heads.

    The model runs once, eagerly, as under ``explain``.
    Parameters with heads are the weights and biases of the networks, and those of routers, norms
    and projections before and after a network that belong to the network's module.

    Args:
        model: as for ``parallelize_heads``; not compiled yet, and without activation checkpointing
            by wrappers.
        example_inputs: as for ``parallelize_heads``.
        sequence_parallel: as for ``parallelize_heads``.
        example_kwargs: as for ``parallelize_heads``.

    Returns:
        A ``HeadParallel`` for the path of each module with networks, to which more may be added; or
        one alone if the model itself is such a module.

    Raises:
        HeadParallelError: there is no network; the weights of one have no dimension along which
            heads follow each other, are shared with another module, or are no parameters.
    """
    places = _merged(list(_places(model, example_inputs, example_kwargs)))
    if not places:
        raise HeadParallelError(
            f"{type(model).__name__} has no multi-head FFN: mhf_compiler.explain(model) says why"
        )
    plan: dict[str, ParallelStyle] = {
        place.path: HeadParallel(
            place.dims, place.heads, sequence_parallel=sequence_parallel, path=place.path
        )
        for place in places
    }
    return plan.get("", plan)


# Where the heads are.


@dataclass(frozen=True)
class _Cut:
    """The dimension of a parameter along which blocks of heads follow each other, and how many.

    ``required`` are the weights of a network; of others, DTensor computes the whole as well.
    """

    dim: int
    count: int
    required: bool


@dataclass
class _Place:
    """A module, and how its parameters with heads are cut, by their names in it."""

    path: str
    cuts: dict[str, _Cut] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """What the number of devices has to divide."""
        return gcd(*(cut.count for cut in self.cuts.values() if cut.required))

    @property
    def dims(self) -> dict[str, int]:
        """The dimension of heads of each parameter that is cut."""
        heads = self.heads
        return {name: cut.dim for name, cut in self.cuts.items() if cut.count % heads == 0}

    def add(self, name: str, cut: _Cut) -> None:
        """Cut a parameter.

        Raises:
            HeadParallelError: it is required that it is cut, in two ways.
        """
        known = self.cuts.setdefault(name, cut)
        if cut.required and known.required and cut.dim != known.dim:
            raise HeadParallelError(
                f"{self.path or 'the model'}: networks use {name} with heads along its dimension "
                f"{known.dim} and along {cut.dim}: allowed is one dimension"
            )
        if cut.required and known.dim != cut.dim:
            self.cuts[name] = cut
        elif known.dim == cut.dim:
            required = cut.required or known.required
            self.cuts[name] = _Cut(cut.dim, gcd(cut.count, known.count), required)


@dataclass(frozen=True)
class _Network:
    """A site, and the parameters in which its heads lie.

    Attributes:
        site: the site.
        heads: how they lie in each input that is a parameter.
        others: how they lie in the remaining inputs.
    """

    site: Site
    heads: list[tuple[nn.Parameter, Heads]]
    others: list[Heads]


def _networks(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[_Network]:
    """The sites of all graphs of a model, once for each call of a graph.

    Where graphs end, layers of one form share theirs, and only its inputs say which layer it is.
    """
    found: list[_Network] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        placeholders = gm.graph.find_nodes(op="placeholder")
        sites = list(_sites(gm, {node: node for node in placeholders}))

        def run(*inputs: Any) -> Any:
            given = dict(zip(placeholders, inputs, strict=True))
            found.extend(_network(site, heads, given) for site, heads in sites)
            return gm.forward(*inputs)

        return run

    call_once(model, collect, args, kwargs)
    return found


#: how heads lie in inputs of a site, each with the input of the whole graph, or the tensor
_Sources: TypeAlias = "list[tuple[Heads, Any]]"


def _sites(
    gm: fx.GraphModule, outside: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[Site, _Sources]]:
    """The sites of a graph and of those inside of it.

    ``outside`` are the inputs of the whole graph that those of this one are.
    """
    for inner, modes in inner_graphs(gm):
        if isinstance(modes, Modes):
            with modes.entered():
                yield from _sites(inner, _passed_on(gm, inner, outside))
    for site in find_sites(gm, shape_env_in(gm)).sites:
        sources: _Sources = []
        for heads in find_heads(site):
            node = heads.value.origin
            is_attribute = node.op == "get_attr"
            sources.append((heads, _attribute(gm, node) if is_attribute else outside.get(node)))
        yield site, sources


def _network(site: Site, sources: _Sources, given: Mapping[fx.Node, Any]) -> _Network:
    known: list[tuple[nn.Parameter, Heads]] = []
    others: list[Heads] = []
    for heads, source in sources:
        tensor = given.get(source) if isinstance(source, fx.Node) else source
        if isinstance(tensor, nn.Parameter):
            known.append((tensor, heads))
        else:
            others.append(heads)
    return _Network(site, known, others)


def _passed_on(
    gm: fx.GraphModule, inner: fx.GraphModule, outside: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The inputs of the whole graph that a call of an inner one passes on."""
    placeholders = inner.graph.find_nodes(op="placeholder")
    for node in gm.graph.find_nodes(op="get_attr"):
        if getattr(gm, str(node.target), None) is inner:
            for call in node.users:
                given = call.args[call.args.index(node) + 1 :] if node in call.args else ()
                if len(given) == len(placeholders):
                    return {
                        place: outside[one]
                        for place, one in zip(placeholders, given, strict=True)
                        if isinstance(one, fx.Node) and one in outside
                    }
    return {}


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _places(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[_Place]:
    """The module of each network, with its parameters.

    Raises:
        HeadParallelError: the heads of its weights cannot be divided.
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    for network in _networks(model, args, kwargs):
        weights = _weights(network, names)
        path = _module_of(model, network.site, weights)
        place = _Place(path)
        for parameter, heads in network.heads:
            own = [_inside(name, path) for name in names.get(id(parameter), [])]
            # A parameter that is used elsewhere, too, stays whole.
            if len(own) == 1 and own[0] is not None and heads.dim is not None:
                place.add(own[0], _Cut(heads.dim, heads.count, heads.role in _WEIGHTS))
        yield place


def _weights(network: _Network, names: Mapping[int, list[str]]) -> list[str]:
    """The parameters that are a network's weights and biases, by their names in the model.

    Raises:
        HeadParallelError: they cannot be divided between devices by heads.
    """
    site, found = network.site, list[str]()
    where = f"the multi-head FFN at {site.location}"
    if site.groups == 1:
        raise HeadParallelError(
            f"{where}: all heads have the same weights, of shape {site.down.shape[1:]}; allowed "
            "are several heads, or several groups of heads, with weights of their own"
        )
    for role in (role for role in _WEIGHTS if role in site.views()):
        known = [(names.get(id(p), []), h) for p, h in network.heads if h.role == role]
        for owners, heads in known:
            if len(owners) != 1:
                raise HeadParallelError(
                    f"{where}: the {role} weights are {' and '.join(owners) or 'not of the model'}:"
                    " allowed are parameters of one module"
                )
            if heads.alone:
                raise HeadParallelError(
                    f"{where}: {owners[0]} has the {role} weights of one head, in shape "
                    f"{tuple(heads.value.shape)}: allowed is a parameter with all {site.groups} "
                    "along one dimension"
                )
            if heads.dim is None:
                raise HeadParallelError(
                    f"{where}: {owners[0]}, the {role} weights in shape {tuple(heads.value.shape)},"
                    f" has no dimension that consists of {site.groups} blocks, one after the other "
                    "for each head"
                )
            found += owners
        if not known:
            given = [str(heads.value.origin) for heads in network.others if heads.role == role]
            raise HeadParallelError(
                f"{where}: the {role} weights are computed from {' and '.join(given) or 'others'}: "
                "allowed are parameters"
            )
    return found


def _module_of(model: nn.Module, site: Site, weights: Sequence[str]) -> str:
    """The path of the innermost module that has the weights of a site and computes it."""
    path, *others = (name.rpartition(".")[0] for name in weights)
    while any(_inside(f"{other}.", path) is None for other in others):
        path = path.rpartition(".")[0]
    classes = classes_around(site)  # without that of a module whose graph begins in it
    paths = [path]
    while paths[-1]:
        paths.append(paths[-1].rpartition(".")[0])
    modules = [(path, type(model.get_submodule(path))) for path in paths]
    running = [path for path, kind in modules if kind.__name__ in classes]
    callable_ = [path for path, kind in modules if kind.forward is not nn.Module.forward]
    return (running or callable_ or [""])[0]


def _inside(name: str, path: str) -> str | None:
    """A name in the model as a name in one of its modules; None if it is outside of that."""
    if not path:
        return name
    return name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else None


def _merged(places: list[_Place]) -> list[_Place]:
    """One place for each module, and none for modules inside of those."""
    merged: list[_Place] = []
    for place in sorted(places, key=lambda place: len(place.path)):
        for outer in merged:
            prefix = _inside(f"{place.path}.", outer.path) if place.path != outer.path else ""
            if prefix is not None:
                for name, cut in place.cuts.items():
                    outer.add(prefix + name, cut)
                break
        else:
            merged.append(place)
    return merged
