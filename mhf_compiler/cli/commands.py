"""The command line: ``explain``, ``bench``, ``build-ops``, ``info`` and ``doctor``.

Exit codes: 0 success; 1 the report is not what ``--strict``, ``--sites`` or ``--fail-on-declined``
asks for, ``bench --site`` found wrong numbers, or ``doctor`` found something; 2 the request cannot
be carried out, with one line why.
Completion comes from click: ``eval "$(_MHF_COMPILER_COMPLETE=bash_source mhf-compiler)"``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..report import Report
    from .bench import Subject


def _writable(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Refuse a file that cannot be written, before the model runs."""
    if path is not None:
        place = Path(path) if Path(path).exists() else Path(path).absolute().parent
        if not os.access(place, os.W_OK):
            raise Problem(f"{path!r} cannot be written: {place} {_unwritable(place)}")
    return path


def _unwritable(place: Path) -> str:
    return "is not writable" if place.exists() else "does not exist"


def _file(flag: str, name: str, text: str) -> Callable[[Any], Any]:
    return click.option(flag, name, type=click.Path(dir_okay=False), callback=_writable, help=text)


class Problem(click.ClickException):
    """One line, exit code 2."""

    exit_code = 2


class Disagreement(click.ClickException):
    """The op computes other numbers. One line, exit code 1."""


class Unmet(click.ClickException):
    """The report is not what was asked for. One line, exit code 1."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mhf-compiler")
def commands() -> None:
    """Multi-head feed-forward networks in a model: what is rewritten, and why the rest is not."""


@dataclass(frozen=True)
class Request:
    """A model and how it is called, in the words of the command line."""

    model: str
    inputs: tuple[str, ...]
    device: str
    dtype: str | None
    autocast: str | None
    no_grad: bool
    options: tuple[str, ...]
    factory_args: tuple[str, ...]

    def made(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The model, its arguments and its named arguments."""
        from .inputs import find_device, find_dtype, make_inputs, make_model, parse_assignments

        where = find_device(self.device)
        dtype = None if self.dtype is None else find_dtype(self.dtype, f"--dtype {self.dtype!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise Problem(f"--dtype {self.dtype!r} must be a floating one, such as bfloat16")
        args, kwargs = make_inputs(self.inputs, where)
        if dtype is not None:
            args = tuple(x.to(dtype) if x.is_floating_point() else x for x in args)
            kwargs = {
                name: x.to(dtype) if x.is_floating_point() else x for name, x in kwargs.items()
            }
        arguments = parse_assignments(self.factory_args, "--factory-arg")
        return make_model(self.model, where, dtype, arguments), args, kwargs

    def chosen(self) -> dict[str, Any]:
        """The options of the back end."""
        from ..options import OptionError, parse_options
        from .inputs import parse_assignments

        given = parse_assignments(self.options, "--option")
        try:
            parse_options(None, given)
        except OptionError as error:
            raise Problem(f"--option: {error}") from error
        return given

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Gradients and autocast, as they were asked for."""
        import torch

        from .inputs import find_device, find_dtype

        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(not self.no_grad))
            if self.autocast is not None:
                dtype = find_dtype(self.autocast, f"--autocast {self.autocast!r}")
                kind = find_device(self.device).type
                if kind == "meta":
                    raise Problem("--autocast needs a device that computes, such as cpu")
                stack.enter_context(torch.autocast(kind, dtype))
            yield


def _model(command: Callable[..., None]) -> Callable[..., None]:
    """The parameters of a ``Request``."""
    for parameter in (
        click.option(
            "--option",
            "options",
            multiple=True,
            metavar="NAME=VALUE",
            help="An option of the back end, or a setting of Inductor's. Repeatable.",
        ),
        click.option("--no-grad", is_flag=True, help="Without gradients, as in inference."),
        click.option("--autocast", metavar="DTYPE", help="Under autocast to a dtype."),
        click.option("--dtype", metavar="DTYPE", help="Of the model and of floating inputs."),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="cpu, cuda, cuda:N; to explain: meta, cuda:h100.",
        ),
        click.option(
            "--factory-arg",
            "factory_args",
            multiple=True,
            metavar="NAME=VALUE",
            help="An argument of the factory, such as layers=12. Repeatable.",
        ),
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
@click.option("--dynamic", is_flag=True, help="With dynamic sizes, as torch.compile has them.")
@_file("--html", "html_path", "Also write the report as an HTML page.")
@_file("--json", "json_path", "Also write the report to a JSON file.")
@click.option("--strict", is_flag=True, help="Exit with 1 if nothing was rewritten.")
@click.option("--sites", type=click.IntRange(0), help="Exit with 1 unless so many are rewritten.")
@click.option("--fail-on-declined", is_flag=True, help="Exit with 1 if something was declined.")
def explain(
    rewrite: str,
    dynamic: bool,
    html_path: str | None,
    json_path: str | None,
    strict: bool,
    sites: int | None,
    fail_on_declined: bool,
    **given: Any,
) -> None:
    """Print what is rewritten in a model, and why the rest is not.

    The factory is called with what --factory-arg names and returns the model; a module is taken as
    it is. A file is as good as a module: models/net.py:make.
    """
    from .inputs import assumed_card

    request = Request(**given)
    with _problems(), request.modes():
        options = {"rewrite": rewrite} | request.chosen()
        model, args, kwargs = request.made()
        report = _explained(model, args, kwargs, options, dynamic, assumed_card(request.device))
    click.echo(str(report))
    with _problems():
        if html_path is not None:
            report.to_html(html_path)
        if json_path is not None:
            report.to_json(json_path)
    found = report.totals.networks
    if sites is not None and found != sites:
        raise Unmet(f"--sites is {sites}, but {found} are rewritten")
    if strict and not found:
        raise Unmet("--strict: nothing is rewritten")
    if fail_on_declined and (report.declined or report.unread):
        raise Unmet(f"--fail-on-declined: {len(report.declined) + len(report.unread)} are declined")


@commands.command()
@_model
@click.option("--site", type=int, help="One site by itself, by its number in the report.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
def bench(site: int | None, rounds: int, **given: Any) -> None:
    """Time a model, or one site of it, with Inductor alone and rewritten.

    If something is trained, the forward pass and both passes are timed; with --no-grad, or if
    nothing is, the forward pass in inference. A site is timed as the model spells it and as the op.
    If their numbers differ by more than rounding nothing is timed, and the exit code is 1.
    The peak memory is the most that one call allocates beyond what is there before it.
    """
    from ..report.text import scaled
    from .bench import Subject, check_rewritten, steps
    from .inputs import find_device

    request = Request(**given)
    with _problems(), request.modes():
        options = request.chosen()
        if find_device(request.device).type == "meta":
            raise Problem(f"--device is {request.device!r}, on which nothing can be timed")
        made, args, kwargs = request.made()
        report = _explained(made, args, kwargs, {**options, "rewrite": "always"})
        if site is None:
            check_rewritten(report)
            subject = Subject(made, args, kwargs, options)
        else:
            subject = _one_site(made, args, kwargs, site)
        training = not request.no_grad and bool(subject.leaves)
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
    sizes = f"{scaled(old, 'B'):>13} {scaled(new, 'B'):>13}"
    click.echo(f"{'peak memory':<18} {sizes}{f' {old / new:8.2f} x' if new else ''}")


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


def _explained(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: dict[str, Any],
    dynamic: bool = False,
    card: str | None = None,
) -> Report:
    """The report of a call, after one that shows whether the model runs."""
    from .. import explanation
    from .inputs import run_model

    run_model(model, args, kwargs)
    explained = explanation.explain(model, options=options, dynamic=dynamic or None, device=card)
    return explained(*args, **kwargs)


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
