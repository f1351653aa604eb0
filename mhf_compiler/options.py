"""The back end's options: ours by name, every other key is Inductor's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .compat import inductor_modes, inductor_options

_CHOICES = {
    "rewrite": ("auto", "always", "never"),
    "fallback": ("inductor", "aot_eager", "eager"),
}


_SWITCHES = ("strict", "verify")


class OptionError(ValueError):
    """An option that does not exist, or a value that it does not take."""


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="flashmhf", options=...)`` takes.

    Options can be given as a dict of these names, and of Inductor's settings, or as an instance:

        {"rewrite": "always", "max_autotune": True}
        Options(rewrite="always", inductor={"max_autotune": True})

    Values are checked where the options are used.

    Attributes:
        rewrite: ``"auto"`` rewrites where it pays, ``"always"`` wherever it is proved right,
            ``"never"`` nothing.
        strict: raise when a graph cannot be analysed or the rewriting itself fails. By default the
            untouched graph is compiled, with a warning.
        fallback: what compiles the graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        verify: compare each MH-FFN with its original spelling before it is rewritten, on random and
            on extreme numbers, in values and gradients. Slow; for tests.
        dump_dir: a folder that receives each graph before and after as programs, and the report.
        report: a function that is called with the ``Report`` of each graph that is compiled.
        mode: one of Inductor's modes; ``torch.compile`` takes ``mode`` or ``options``, not both.
        inductor: settings for Inductor, by their names in ``torch._inductor.config``.
    """

    rewrite: str = "auto"
    strict: bool = False
    verify: bool = False
    fallback: str = "inductor"
    dump_dir: Path | None = None
    report: Callable[[Any], object] | None = None
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)


_OURS = tuple(f.name for f in fields(Options) if f.name != "inductor")

GivenOptions = Options | Mapping[str, Any]


def as_mapping(options: GivenOptions | None) -> dict[str, Any]:
    """Options by name, ours and Inductor's."""
    if isinstance(options, Options):
        return {**options.inductor, **{name: getattr(options, name) for name in _OURS}}
    return dict(options or {})


def chosen(options: Options) -> dict[str, Any]:
    """By name, those options that are not the defaults."""
    given, defaults = as_mapping(options), as_mapping(Options())
    return {name: value for name, value in given.items() if value != defaults.get(name)}


def parse_options(mode: str | None, options: GivenOptions | None) -> Options:
    """Check the options of ``torch.compile`` and sort them into ours and Inductor's.

    Raises:
        OptionError: an unknown key or mode (the message names the nearest), or a wrong value.
    """
    given = as_mapping(options)
    ours = {key: given.pop(key) for key in _OURS if key in given}
    for key, allowed in _CHOICES.items():
        if key in ours and ours[key] not in allowed:
            raise OptionError(f"option {key!r} is {ours[key]!r}; allowed: {', '.join(allowed)}")
    for key in _SWITCHES:
        if not isinstance(ours.get(key, False), bool):
            raise OptionError(f"option {key!r} is {ours[key]!r}; allowed: True, False")
    if ours.get("dump_dir") is not None:
        if not isinstance(ours["dump_dir"], (str, Path)):
            raise OptionError(f"option 'dump_dir' is {ours['dump_dir']!r}; allowed: a path")
        ours["dump_dir"] = Path(ours["dump_dir"])
    if ours.get("report") is not None and not callable(ours["report"]):
        raise OptionError(f"option 'report' is {ours['report']!r}; allowed: a function")
    if mode is not None and ours.get("mode") not in (None, mode):
        raise OptionError(f"mode is {mode!r}, but option 'mode' is {ours['mode']!r}")
    ours["mode"] = ours.get("mode") or mode
    parsed = Options(**ours, inductor=_inductor_settings(given))
    if parsed.mode is not None:
        _mode_settings(parsed.mode)
    return parsed


def inductor_config(options: Options) -> dict[str, Any]:
    """Inductor's settings: those of the mode, overridden by those given by name."""
    return _mode_settings(options.mode) | dict(options.inductor)


def tunes(options: Options) -> bool:
    """Whether kernels are to be tuned, ours as Inductor's: a mode, or its setting by name."""
    return bool(inductor_config(options).get("max_autotune"))


def _mode_settings(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    modes = inductor_modes()
    if mode not in modes:
        raise OptionError(f"unknown mode {mode!r}{_nearest(mode, modes)}")
    return dict(modes[mode])


def _inductor_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    known = inductor_options()
    settings: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise OptionError(f"unknown option {key!r}{_nearest(name, [*_OURS, *known])}")
        settings[name] = value
    return settings


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; the nearest is {close[0]!r}" if close else ""
