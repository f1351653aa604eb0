"""What all ops share: registration, unsupported transforms, and checks of memory."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..arguments import differentiates_forward
from .profiled import is_profiled, range_of_layer

__all__ = [
    "empty_like_in_order",
    "function_of_kernels",
    "kernels",
    "no_second_derivative",
    "overwrite",
    "owns_memory",
    "refuse_forward_mode",
    "register",
    "registered",
    "trial",
    "with_strides_of",
]

_T = TypeVar("_T")

Compute = Callable[..., Any] | None

_LIBRARY = torch.library.Library("mhf_compiler", "FRAGMENT")

#: the schemas of all ops, by name
registered: dict[str, str] = {}


def register(
    name: str,
    schema: str,
    operator: Callable[..., Any],
    *,
    check: Callable[..., None],
    cpu: Compute,
    cuda: Compute,
    packaged: Compute = None,
) -> str:
    """Define an op, for CPU, CUDA and fake tensors; returns its qualified name.

    ``operator`` takes what computes the op on a device, followed by the op's arguments as they were
    passed: trailing ones that have their default value may be missing. On fake tensors it gets
    None, and makes results of the right shapes and strides. Before that, ``check`` takes the
    arguments, and raises if the op does not.

    ``packaged`` spells the op as operations that need no Python at run time: they take its place
    where AOTInductor makes a package for a GPU. It takes all of the op's arguments, and returns its
    result.

    The overload ``compiled`` is for graphs whose arguments were checked, and whose gradients were
    taken, before: it does without the check, and without the dispatch keys of autograd and
    autocast, each of which takes the host as long as the launch of a kernel.
    """

    def on(compute: Compute, *, checked: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if checked:
                check(*arguments)
            elif compute is not None and is_profiled():
                with range_of_layer():
                    return operator(compute, *arguments)
            return operator(compute, *arguments)

        call.__name__ = call.__qualname__ = name
        return call

    if hasattr(torch.ops.mhf_compiler, name):
        raise ImportError(
            f"mhf_compiler::{name} is defined already, by the C++ library of the ops: "
            "import mhf_compiler before the library is loaded, or not at all"
        )
    qualified = f"mhf_compiler::{name}"
    # A call that names no overload gets the one that was defined first.
    for overload, checked in ((qualified, True), (f"{qualified}.compiled", False)):
        torch.library.define(overload, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(overload, "cpu", on(cpu, checked=checked))
        torch.library.impl(overload, "cuda", on(cuda, checked=checked))
        torch.library.register_fake(overload, on(None, checked=checked))
    for key in ("Autograd", "AutocastCPU", "AutocastCUDA"):
        _LIBRARY.impl(f"{name}.compiled", torch.library.fallthrough_kernel, key)
    # Not by way of mhf_compiler.compat, which loads Dynamo: to import the ops loads little.
    functional = getattr(torch._subclasses, "functional_tensor", None)
    mode = getattr(functional, "FunctionalTensorMode", None)
    if packaged is not None and mode is not None:
        torch.library.register_torch_dispatch(qualified, mode, partial(_in_a_package, packaged))
    registered[name] = schema
    return qualified


def _in_a_package(
    packaged: Callable[..., Any],
    mode: Any,
    op: Any,
    types: Sequence[type],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call an op while AOTAutograd makes a graph functional, before Inductor sees it."""
    from mhf_compiler.compat import (
        arguments_by_name,
        packages_ahead_of_time,
        realize_while_tracing,
    )

    if not packages_ahead_of_time():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    arguments = tuple(arguments_by_name(op, args, kwargs).values())
    if arguments[0].device.type != "cuda":
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode, torch.autocast("cuda", enabled=False):
        for x in arguments:
            if isinstance(x, Tensor):
                realize_while_tracing(x)
        return packaged(*arguments)


def trial(device: torch.device, run: Callable[[], Any], *, training: bool = False) -> None:
    """Run something once on a GPU, so that a kernel that cannot run shows here.

    Autocast is off, since it would change dtypes that are given. On the CPU there is nothing to
    try: PyTorch's operations replace what cannot be compiled.

    Args:
        device: where ``run`` launches kernels.
        run: what to try.
        training: whether gradients are recorded.

    Raises:
        Exception: whatever the compiler or the launch raised.
    """
    if device.type == "cpu":
        return
    with torch.set_grad_enabled(training), torch.autocast(device.type, enabled=False):
        run()
    torch.cuda.synchronize(device)


def kernels(path: str) -> Callable[..., Any]:
    """A function of a module of ``lowering/kernels``, as "module.function".

    It is imported by its first call: the package must import where there is no Triton.
    """

    def call(*arguments: Any) -> Any:
        return function_of_kernels(path)(*arguments)

    return call


@cache
def function_of_kernels(path: str) -> Callable[..., Any]:
    """The function itself."""
    module, _, function = path.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(f"..kernels.{module}", __package__), function)
    return found


def overwrite(
    x: Tensor,
    others: Sequence[Tensor | None],
    compute: Callable[[Tensor], _T],
    *,
    reads: bool = False,
) -> _T:
    """Call ``compute`` with the tensor in which it is to put the new contents of ``x``.

    That is ``x`` itself, unless one of ``others``, which ``compute`` reads, may share its memory:
    then it is another tensor, which is copied to ``x`` at the end. If ``compute`` ``reads`` the old
    contents in it, they are there.
    """
    safe = owns_memory(x, others)
    # A tensor of its own in either case: launches are repeated by which tensor goes where.
    place = x.detach() if safe else x.clone() if reads else torch.empty_like(x)
    result = compute(place)
    if not safe:
        x.copy_(place)
    return result


def owns_memory(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether the elements of ``x`` do not overlap, and none of ``others`` shares its storage."""
    memory = x.untyped_storage().data_ptr()
    if any(y is not None and y.untyped_storage().data_ptr() == memory for y in others):
        return False
    reach = 1  # from the innermost dimension on, each steps over all that lies within
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * size
    return True


def refuse_forward_mode(x: Tensor, op: str, instead: str) -> None:
    """Raise if a tangent of the op's result would be lost silently."""
    if differentiates_forward(x):
        raise NotImplementedError(f"{op} has no forward-mode derivative. For one use {instead}.")


def no_second_derivative(op: str, instead: str) -> Callable[..., None]:
    """The derivative of an op's backward pass, which raises."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op} is differentiable once: its backward pass has no derivative. "
            f"For second derivatives use {instead}."
        )

    return refuse


def empty_like_in_order(
    like: Tensor, shape: Sequence[int], order: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """A new tensor of four dimensions that lie in memory in ``order``, from the outermost on."""
    strides: list[int] = [0] * 4
    step: int = 1
    for dim in reversed((0, 1, 2, 3) if order is None else tuple(order)):
        strides[dim] = step
        step = step * shape[dim]
    # Not a permuted view: autograd forbids in-place changes of a view made inside of a function.
    return like.new_empty_strided(shape, strides, dtype=dtype)


def with_strides_of(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides that the shape function promised for it."""
    if x.is_contiguous() and gradient.stride() == x.stride():
        return gradient  # without the tensor below, which takes the host longer
    promised = torch.empty_like(x, device="meta")  # no memory only to ask for strides
    if gradient.stride() == promised.stride():
        return gradient
    return torch.empty_like(x).copy_(gradient)
