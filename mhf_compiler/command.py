"""The command line: ``explain``, ``bench``, ``info`` and ``doctor``.

Exit codes: 0 all is well; 1 nothing was rewritten under ``--strict``, or ``doctor`` found
something; 2 what was asked for cannot be done, said in one line. Completion comes from click:
``eval "$(_MHF_COMPILER_COMPLETE=bash_source mhf-compiler)"``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .report import Report

_FILE = click.Path(dir_okay=False, writable=True)


class Problem(click.ClickException):
    """One line, exit code 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mhf-compiler")
def commands() -> None:
    """Multi-head feed-forward networks in a model: what is rewritten, and why the rest is not."""


def _model(command: Callable[..., None]) -> Callable[..., None]:
    """The parameters that name a model and its inputs."""
    for parameter in (
        click.option("--no-grad", is_flag=True, help="Without gradients, as in inference."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="SPEC",
            help="An argument, such as float32[2,16,768] or mask=bool[2,16]. Repeatable.",
        ),
        click.argument("model", metavar="PACKAGE.MODULE:FACTORY"),
    ):
        command = parameter(command)
    return command


@commands.command()
@_model
@click.option("--rewrite", type=click.Choice(["auto", "always"]), default="auto", show_default=True)
@click.option("--html", "html_path", type=_FILE, help="Also write the report as an HTML page.")
@click.option("--json", "json_path", type=_FILE, help="Also write the report to a JSON file.")
@click.option("--strict", is_flag=True, help="Exit with 1 if nothing was rewritten.")
def explain(
    model: str,
    inputs: tuple[str, ...],
    device: str,
    no_grad: bool,
    rewrite: str,
    html_path: str | None,
    json_path: str | None,
    strict: bool,
) -> None:
    """Print what is rewritten in a model, and why the rest is not.

    The factory is called without arguments and returns the model; a module is taken as it is.
    """
    report = _explained(model, inputs, device, no_grad, rewrite)
    click.echo(str(report))
    with _problems():
        if html_path is not None:
            report.to_html(html_path)
        if json_path is not None:
            report.to_json(json_path)
    if strict and not report.rewritten:
        click.get_current_context().exit(1)


@commands.command()
@_model
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
def bench(model: str, inputs: tuple[str, ...], device: str, no_grad: bool, rounds: int) -> None:
    """Time a model with Inductor alone and with its MH-FFNs rewritten.

    With gradients a round is a forward and a backward pass. For one site, name the factory of one
    layer.
    """
    import torch

    report = _explained(model, inputs, device, no_grad, "always")
    if not report.rewritten:
        raise Problem(f"{str(report).splitlines()[0]}: nothing to compare; explain says why")
    with _problems():
        runs = _before_and_after(model, inputs, device, no_grad)
        for run in runs.values():  # compiles
            run()
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with click.progressbar(length=rounds * len(runs), label="timing") as bar:
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(_time(run, torch.device(device)))
                bar.update(1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        click.echo(f"{name:<12} {median * 1e3:10.3f} ms  (best {min(seconds[name]) * 1e3:.3f})")
    click.echo(f"{'speed-up':<12} {medians['as written'] / medians['rewritten']:10.2f} x")


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(as_json: bool) -> None:
    """Print versions, the card, and which kernels run here and why not."""
    from .environment import look_around

    found = look_around()
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    rows = dict(found.versions)
    rows["card"] = found.card or "none"
    if found.capability is not None:
        rows["capability"] = found.capability
        rows["built for"] = " ".join(found.architectures)
    rows |= {
        k.name: "available" if k.missing is None else f"no: {k.missing}" for k in found.kernels
    }
    wide = max(map(len, rows))
    for name, text in rows.items():
        click.echo(f"{name.ljust(wide)}  {text}")


@commands.command()
def doctor() -> None:
    """Try everything that a compilation needs; exit with 1 if something is broken."""
    from .environment import check_up

    checks = check_up()
    for check in checks:
        mark = "ok    " if check.problem is None else "broken"
        click.echo(f"{mark}  {check.name}{f': {check.problem}' if check.problem else ''}")
    if any(check.problem is not None for check in checks):
        click.get_current_context().exit(1)


@contextmanager
def _problems() -> Iterator[None]:
    """Whatever goes wrong with what the user named, in one line."""
    from .given import GivenError, one_line

    try:
        yield
    except GivenError as error:
        raise Problem(str(error)) from error
    except Exception as error:
        raise Problem(one_line(error)) from error


def _explained(
    model: str, inputs: tuple[str, ...], device: str, no_grad: bool, rewrite: str
) -> Report:
    import torch

    from . import explanation
    from .given import find_device, make_inputs, make_model

    with _problems(), torch.set_grad_enabled(not no_grad):
        where = find_device(device)
        args, kwargs = make_inputs(inputs, where)
        made = make_model(model, where)
        made(*args, **kwargs)  # what is wrong with the arguments is said best by the model itself
        return explanation.explain(made, options={"rewrite": rewrite})(*args, **kwargs)


def _before_and_after(
    model: str, inputs: tuple[str, ...], device: str, no_grad: bool
) -> dict[str, Callable[[], None]]:
    """The two ways to be timed. Each compiles at its first call."""
    import torch

    from .given import find_device, make_inputs, make_model

    where = find_device(device)
    args, kwargs = make_inputs(inputs, where)
    made = make_model(model, where)

    def way(rewrite: str) -> Callable[[], None]:
        compiled = torch.compile(made, backend="flashmhf", options={"rewrite": rewrite})

        def run() -> None:
            with torch.set_grad_enabled(not no_grad):
                _backward(compiled(*args, **kwargs))

        return run

    torch.compiler.reset()
    return {"as written": way("never"), "rewritten": way("always")}


def _backward(out: Any) -> None:
    import torch

    if isinstance(out, torch.Tensor) and out.requires_grad:
        out.float().sum().backward()


def _time(run: Callable[[], None], device: Any) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
