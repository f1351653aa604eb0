"""The edit: an op in place of each site, in a copy of Dynamo's graph.

A site is an MH-FFN or, before it, a product of widened queries that its router is computed from.
The op is inserted, the readers of the value that it replaces are redirected to its result, and
what is then dead is removed. The given graph stays untouched; the caller takes the edited copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from ..compat import copy_dynamo_metadata
from ..patterns import CanonicalCopy, RouterProduct, Site, Value
from .emit import EditError, Editor


@dataclass(frozen=True)
class Edit:
    """An edited graph, and how it belongs to the given one.

    Attributes:
        graph: the edited copy.
        nodes: each node of the given graph, with its copy; some of these are removed.
        inserted: each new node that computes a site, with that site.
        redirected: for a node of the given graph and one of its arguments, the new node that it
            reads instead.
    """

    graph: fx.Graph
    nodes: dict[fx.Node, fx.Node]
    inserted: dict[fx.Node, Site | RouterProduct] = field(default_factory=dict)
    redirected: dict[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)


def rewrite(
    graph: fx.Graph,
    sites: Sequence[Site | RouterProduct],
    copy: CanonicalCopy,
    *,
    copies_returned: bool = False,
) -> Edit:
    """Copy ``graph`` and put its op in place of every site.

    Args:
        graph: the graph.
        sites: what is replaced.
        copy: what the graph computes.
        copies_returned: whether what is returned is a copy of an op's result. That may be a view
            where the author's was none, of which PyTorch forgets hooks, or which it does not let
            be overwritten.

    Raises:
        EditError: an argument of a site cannot be expressed; nothing was changed.
    """
    edit = _copied_graph(graph)
    results: dict[Value, fx.Node] = {}
    current = dict(edit.nodes)  # which a result may have taken the place of
    for site in sorted(sites, key=lambda site: copy.positions[site.output_node]):
        editor = Editor(edit.graph, current, copy, site, results)
        try:
            output = editor.insert()
            made = {site.output: output, **{p: editor.piece(output, p) for p in site.pieces}}
        except EditError as error:
            error.site = site
            raise
        if copy.takes_place_of_node(site.output):
            _replace_node(edit, site.output_node, output)
            current[site.output_node] = output
        else:
            results |= made
            for value, result in made.items():
                _redirect_readers(edit, current, value, result, copy, editor, copies_returned)
        edit.inserted.update(dict.fromkeys(editor.inserted, site))
    _remove_dead(edit.graph, edit.nodes, copy, sites)
    edit.graph.lint()
    return edit


def _copied_graph(graph: fx.Graph) -> Edit:
    edited = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    output = edited.graph_copy(graph, nodes)
    old_output = graph.output_node()
    nodes[old_output] = edited.output(output)
    nodes[old_output].meta = dict(old_output.meta)
    for old, new in nodes.items():
        copy_dynamo_metadata(old, new)
    return Edit(edited, nodes)


def _replace_node(edit: Edit, old: fx.Node, result: fx.Node) -> None:
    """Let every later node use the result in a node's place, whatever is written there by then."""
    for reader in old.users:
        edit.nodes[reader].replace_input_with(edit.nodes[old], result)
        edit.redirected[reader, old] = result


def _redirect_readers(
    edit: Edit,
    current: dict[fx.Node, fx.Node],
    value: Value,
    result: fx.Node,
    copy: CanonicalCopy,
    editor: Editor,
    copies_returned: bool,
) -> None:
    """Let every node after the inserted ones that reads the value read the result instead.

    Exception: a value that the model copied into an input is still read from that input, because
    mutating the returned tensor must mutate the input. For the same reason equal results in
    separate storages keep separate storages.
    """
    returned = {memory for _, memory in copy.returned}
    places: dict[int | None, fx.Node] = {}
    for reader, argument in copy.readers_of.get(value, ()):
        if copy.positions[reader] <= editor.position or copy.is_outside(argument):
            continue
        memory = copy.memory_of(argument)
        if memory not in returned:
            place = result
        elif memory in places:
            place = places[memory]
        else:
            place = editor.copied(result) if places or copies_returned else result
            places[memory] = place
        edit.nodes[reader].replace_input_with(current[argument], place)
        edit.redirected[reader, argument] = place


def _remove_dead(
    graph: fx.Graph,
    nodes: dict[fx.Node, fx.Node],
    copy: CanonicalCopy,
    sites: Sequence[Site | RouterProduct],
) -> None:
    """Remove what computed the sites: nodes without readers, and writes that nothing observes."""
    replaced = {
        value: list(_read_by(site)) for site in sites for value in (site.output, *site.pieces)
    }
    needed = copy.needed_without(replaced)
    for old in reversed(copy.positions):
        node = nodes[old]
        writes = copy.written.get(old)
        # A write that had no reader before either: for a hook, or for the backward pass.
        outside = copy.written_outside.get(old, ())
        unseen = (
            writes is not None
            and any(copy.is_live(v) for v in writes)
            and not any(v in needed and (v not in replaced or v in outside) for v in writes)
        )
        stays = node.users or node.op in ("output", "placeholder")
        if not stays and (old in copy.pure or unseen):
            graph.erase_node(node)
        elif old in copy.looked_into:  # it inspects memory, so what it finds must be written
            needed |= copy.needed_without(replaced, copy.looked_into[old])


def _read_by(site: Site | RouterProduct) -> Sequence[Value]:
    return [view.value for view in site.views().values()]
