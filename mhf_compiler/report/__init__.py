"""What happened to a model's graphs: values, and their renderings.

values      the plain values that a report holds
describe    makes them from graphs, in the words of the model's author
groups      puts equal sites of several layers together
paths       paths of modules, many in one expression
totals      sums over all sites
text, page, dot    renderings of graphs: text, HTML, pictures
report      ``Report``, on top of the renderings
logs        counters, log lines and trace artifacts during a compilation
"""

from ..passes.outcome import Fusion
from ..patterns import Location, Reason
from .paths import Coverage
from .report import SCHEMA, Report
from .totals import Totals
from .values import (
    Argument,
    GraphBreak,
    GraphReport,
    Module,
    Operation,
    RegionNode,
    SiteReport,
    UnreadGraph,
    Work,
)

__all__ = [
    "SCHEMA",
    "Argument",
    "Coverage",
    "Fusion",
    "GraphBreak",
    "GraphReport",
    "Location",
    "Module",
    "Operation",
    "Reason",
    "RegionNode",
    "Report",
    "SiteReport",
    "Totals",
    "UnreadGraph",
    "Work",
]
