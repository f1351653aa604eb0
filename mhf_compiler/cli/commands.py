"""The command line: ``explain``, ``bench``, ``build-ops``, ``info`` and ``doctor``.

Exit codes: 0 success; 1 nothing was rewritten under ``--strict``, ``bench --site`` found wrong
numbers, or ``doctor`` found something; 2 the request cannot be carried out, with one line why.
Completion comes from click: ``eval "$(_MHF_COMPILER_COMPLETE=bash_source mhf-compiler)"``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..report import Report
    from .bench import Subject

_FILE = click.Path(dir_okay=False, writable=True)


class Problem(click.ClickException):
    """One line, exit code 2."""

    exit_code = 2


class Disagreement(click.ClickException):
    """The op computes other numbers. One line, exit code 1."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mhf-compiler")
def commands() -> None:
    """Multi-head feed-forward networks in a model: what is rewritten, and why the rest is not."""


def _model(command: Callable[..., None]) -> Callable[..., None]:
    """The parameters that name a model and its inputs, and whether it is trained."""
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
    import torch

    with _problems(), torch.set_grad_enabled(not no_grad):
        report = _explained(*_made(model, inputs, device), rewrite)
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
@click.option("--site", type=int, help="One site by itself, by its number in the report.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
def bench(
    model: str,
    inputs: tuple[str, ...],
    device: str,
    no_grad: bool,
    site: int | None,
    rounds: int,
) -> None:
    """Time a model, or one site of it, with Inductor alone and rewritten.

    If something is trained, the forward pass and both passes are timed; with --no-grad, or if
    nothing is, the forward pass in inference. A site is timed as the model spells it and as the op.
    If their numbers differ by more than rounding nothing is timed, and the exit code is 1.
    The peak memory is the most that one call allocates beyond what is there before it.
    """
    import torch

    from ..report.text import scaled
    from .bench import Subject, check_rewritten, steps

    with _problems(), torch.set_grad_enabled(not no_grad):
        made, args, kwargs = _made(model, inputs, device)
        if site is None:
            check_rewritten(_explained(made, args, kwargs, "always"))
            subject = Subject(made, args, kwargs)
        else:
            subject = _one_site(made, args, kwargs, site)
        training = not no_grad and bool(subject.leaves)
        with click.progressbar(
            length=steps(training=training, rounds=rounds), label="timing"
        ) as bar:
            found = subject.times(training=training, rounds=rounds, tick=lambda: bar.update(1))
        peaks = subject.peaks(training=training)
    click.echo(f"{f'median of {rounds}':<18} {'as written':>13} {'rewritten':>13} {'speed-up':>10}")
    for times in found:
        old, new = times.median("as written"), times.median("rewritten")
        click.echo(
            f"{times.what:<18} {old * 1e3:10.3f} ms {new * 1e3:10.3f} ms {times.speed_up:8.2f} x"
        )
    old, new = peaks.values()
    ratio = f"{old / new:8.2f} x" if new else ""
    click.echo(
        f"{'peak memory':<18} {scaled(old, 'B'):>13} {scaled(new, 'B'):>13} {ratio}".rstrip()
    )


@commands.command()
@click.argument("folder", type=click.Path(file_okay=False))
def build_ops(folder: str) -> None:
    """Build the ops as a C++ library for the CPU, for programs without Python.

    CMake finds it with FOLDER in CMAKE_PREFIX_PATH. Prints the path of the library.
    """
    from ..lowering import library

    with _problems():
        click.echo(library.build_ops(folder))


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(as_json: bool) -> None:
    """Print versions, the card, and which kernels run here and why not."""
    from .doctor import look_around

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
    from .doctor import check_up

    checks = check_up()
    for check in checks:
        mark = "ok    " if check.problem is None else "broken"
        click.echo(f"{mark}  {check.name}{f': {check.problem}' if check.problem else ''}")
    if any(check.problem is not None for check in checks):
        click.get_current_context().exit(1)


@contextmanager
def _problems() -> Iterator[None]:
    """Turn errors of what the user named into one line."""
    from .bench import MeasuringError
    from .inputs import GivenError, one_line

    try:
        yield
    except click.ClickException:
        raise
    except (GivenError, MeasuringError) as error:
        raise Problem(str(error)) from error
    except Exception as error:
        raise Problem(one_line(error)) from error


def _made(
    model: str, inputs: tuple[str, ...], device: str
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model, its arguments and its named arguments."""
    from .inputs import find_device, make_inputs, make_model

    where = find_device(device)
    args, kwargs = make_inputs(inputs, where)
    made = make_model(model, where)
    made(*args, **kwargs)  # the model itself knows best what is wrong with its arguments
    return made, args, kwargs


def _explained(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rewrite: str
) -> Report:
    from .. import explanation

    return explanation.explain(model, options={"rewrite": rewrite})(*args, **kwargs)


def _one_site(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], number: int
) -> Subject:
    """The site, after a check that its numbers are right."""
    from ..report.escape import visible
    from .bench import Subject, check_part, find_site

    report, part = find_site(model, number, *args, **kwargs)
    click.echo(visible(f"site {number}: {report.place}: {report.sizes}"))
    given = [entry.make() for entry in part.given]
    compared = check_part(part, given)
    wrong = [difference for difference in compared if not difference.agrees]
    if wrong:
        raise Disagreement(f"{len(wrong)} of {len(compared)} results are wrong: {wrong[0]}")
    worst = max(difference.error / difference.allowed for difference in compared)
    click.echo(f"numbers agree: at most {worst:.0%} of the error that is allowed")
    return Subject(part.spelling, given)
