"""What happened to a model's graphs: values, and their renderings.

values      the plain values that a report holds
describe    makes them from graphs, in the words of the model's author
groups      puts equal sites of several layers together
folding     the rounds of long loops, in a picture
paths       paths of modules, many in one expression
totals      sums over all sites
context     what was explained, when, and with what
map         the layers of the model, and what became of them
text, page, dot    renderings of graphs: text, HTML, pictures
difference  code before and after, as a part of the page
report      ``Report``, on top of the renderings
logs        counters, log lines and trace artifacts during a compilation
"""

from ..passes.outcome import Fusion
from ..patterns import Location, Reason
from .context import Context
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
    "Context",
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
