"""One graph of Dynamo's on its way through the back end: rewritten, compiled, reported.

``backend.py`` imports this when the first graph arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx

from . import compat, history
from .buckets import CutError, Part, rewrite_whole
from .errors import NotAnalysedError, fault, only_reporting
from .followed import Followed
from .options import Options, inductor_config
from .passes.layers import Layers, layers_of
from .passes.manager import with_post_grad_passes
from .passes.outcome import Fusion
from .patterns import Site
from .report.logs import announce_fusions, announce_nothing_rewritten
from .report.values import GraphReport
from .substitution.graph import Originals, rewrite_graph


def compile_graph_of_dynamo(
    gm: fx.GraphModule, example_inputs: list[Any], options: Options
) -> Callable[..., Any]:
    """Rewrite and compile a graph, or one part of a graph that DDP's buckets have cut."""
    if compat.is_part_of_buckets(gm):
        whole = _whole_graph(gm, options)
        if whole is not None:
            return whole.compile_next(gm, example_inputs)
    compilation = Compilation(options)
    compilation.rewrite(gm)
    return compilation.compile(gm, example_inputs)


class Compilation:
    """What is done to one graph, and said of it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = _config(options)
        self.counted = compat.counters["flashmhf"].copy()
        self.report: GraphReport | None = None
        self.folder: Path | None = None
        self.originals: Originals | None = None
        self.sites: list[tuple[fx.GraphModule, Site]] = []
        self.followed: Followed | None = None
        self.layers: Layers = {}
        self.told = False

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Put the ops into a graph and prepare Inductor for them; all of it, or nothing."""
        self.originals = Originals(gm)
        try:
            self.prepare(gm, rewrite_graph(gm, self.options, self.keep))
        except NotAnalysedError:
            self.originals.restore()
            raise
        except Exception as error:
            self.originals.restore()
            self.failed(error)
        else:
            self.dump(gm)

    def failed(self, error: Exception) -> None:
        """Nothing of what was found is rewritten; raises under ``strict``."""
        compat.counters["flashmhf"] = self.counted.copy()
        self.report = self.followed = None
        self.config = _config(self.options)
        message = "rewriting failed, the graph is compiled as it is"
        fault("rewrite", message, error, strict=self.options.strict)

    def keep(self, gm: fx.GraphModule, site: Site) -> None:
        """Keep a site until the graph is compiled, with the graph that has it."""
        self.sites.append((gm, site))

    def prepare(self, gm: fx.GraphModule, report: GraphReport) -> None:
        """Prepare Inductor for a graph that is rewritten, and what counts its networks."""
        self.report = report
        if report.rewritten:
            with only_reporting("a count of networks"):
                self.followed = Followed(gm, self.sites)
            with only_reporting("the names of layers in profiles"):
                self.layers = layers_of(self.sites, report.rewritten)
        self.config = with_post_grad_passes(
            gm, self.config, self.options, tell=self.tell, layers=self.layers
        )
        if self.options.fallback == "inductor":
            # The user may have called the op, too.
            from .lowering.ops import ALL, MUTATING

            compat.tell_inductor_of(ALL, MUTATING)

    def dump(self, gm: fx.GraphModule) -> None:
        """Write the graph and its report to the folder that the user has named."""
        if self.options.dump_dir is None or self.report is None:
            return
        with only_reporting(f"the graph in {self.options.dump_dir}"):
            from .debug.dump import dump

            self.folder = dump(self.report, gm, self.options.dump_dir)

    def tell(self, fusions: Sequence[Fusion], notes: Sequence[str]) -> None:
        """Log what the passes after autograd did, and add it to the report of the graph."""
        with only_reporting("what was fused"):
            announce_fusions(fusions, notes)
            if self.report is None:
                return
            self.report.fusions = [*(self.report.fusions or ()), *fusions]
            self.report.notes += notes
            if self.folder is not None:
                from .debug.dump import dump_report

                dump_report(self.report, self.folder)

    def compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph with the fallback; if only its rewritten form fails, as it was."""
        try:
            compiled = compat.compile_graph(self.options.fallback, gm, example_inputs, self.config)
            self.hand_over()
            return compiled if self.followed is None else self.followed.calls_of(compiled, gm)
        except Exception as error:
            # Nothing was compiled, and Dynamo may trace the code again: where AOTAutograd wants a
            # symbolic float to be a constant, it says so by an exception, and only once.
            compat.counters["flashmhf"] = self.counted
            restarts = isinstance(error, compat.RestartAnalysis)
            if restarts or self.options.strict or compat.is_minifying():
                raise
            original = self._compile_original(gm, example_inputs)
            if original is None:
                raise
            fault("compile", "the rewritten graph does not compile, so the original is used", error)
            self.report = None
            return original

    def hand_over(self) -> None:
        """Keep the report, give it to whoever asked for it, and tell of a graph left as it was."""
        if self.report is None or self.told:
            return
        self.told = True  # the parts of a graph that DDP has cut are compiled one after the other
        history.keep(self.report, self.options.report, self.followed)
        if self.options.rewrite == "auto":
            announce_nothing_rewritten(self.report)

    def _compile_original(
        self, gm: fx.GraphModule, example_inputs: list[Any]
    ) -> Callable[..., Any] | None:
        """Compile the graph as it was; None if it was not changed, or does not compile either."""
        if self.originals is None or not self.originals.were_replaced:
            return None
        self.originals.restore()
        config = _config(self.options)
        try:
            return compat.compile_graph(self.options.fallback, gm, example_inputs, config)
        except Exception:  # the first failure is what the user has to see
            return None


def _config(options: Options) -> dict[str, Any]:
    """Inductor's settings, without passes of ours that would do again what is done here."""
    config = inductor_config(options)
    with suppress(ImportError, AttributeError):  # such a PyTorch was not given those passes either
        return compat.without_added_passes(config)
    return config


class _WholeGraph:
    """A graph that DDP's buckets have cut: rewritten as a whole, compiled in parts."""

    def __init__(self, cut: compat.BucketCut, options: Options) -> None:
        self.key = cut.buckets[0]
        self.number = 0
        self.parts: list[Part] | None = None
        self.compilation = Compilation(options)
        try:
            gm, report, self.parts = rewrite_whole(cut, options, self.compilation.keep)
            self.compilation.prepare(gm, report)
        except NotAnalysedError:
            raise
        except Exception as error:
            self.parts = None
            self.compilation.failed(error)
        else:
            self.compilation.dump(gm)

    def compile_next(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile the next of Dynamo's parts.

        Raises:
            CutError: it is not the part that was expected, and earlier ones are compiled already.
        """
        if self.parts is None:
            return self.compilation.compile(gm, example_inputs)
        part = self.parts[self.number]
        try:
            part.check(gm)
        except CutError as error:
            if self.number:
                raise
            self.parts = None
            self.compilation.failed(error)
            return self.compilation.compile(gm, example_inputs)
        self.number += 1
        inputs = part.example_inputs(example_inputs)
        if part.module is None:
            return part.place(None)
        return part.place(self.compilation.compile(part.module, inputs))


_COUNTED = "flashmhf_cut"


def tell_of_buckets(gm: fx.GraphModule, error: Exception, *, strict: bool) -> None:
    """Warn that networks which DDP's buckets cut are not seen, once for the parts of a graph."""
    if gm.meta.get(_COUNTED):  # all parts share it
        return
    gm.meta[_COUNTED] = True
    fault(
        "buckets",
        "DistributedDataParallel's buckets cut the graph, and the networks that they cut are "
        "not seen: set torch._dynamo.config.optimize_ddp = False, or a larger bucket_cap_mb",
        error,
        strict=strict,
    )


_whole_graphs: WeakKeyDictionary[Any, _WholeGraph] = WeakKeyDictionary()


def _whole_graph(gm: fx.GraphModule, options: Options) -> _WholeGraph | None:
    """The graph whose next part is being compiled; None, with a warning, if it cannot be seen."""
    try:
        cut = compat.bucket_cut()
        if cut is None:
            raise LookupError("Dynamo's DDPOptimizer is not what compiles it")
    except Exception as error:
        tell_of_buckets(gm, error, strict=options.strict)
        return None
    whole = _whole_graphs.get(cut.owner)
    if whole is None or whole.key is not cut.buckets[0]:  # traced and cut again
        whole = _whole_graphs[cut.owner] = _WholeGraph(cut, options)
    return whole
