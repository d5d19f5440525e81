"""Which node of a stranger's graph needs which: every name is made once, and before it is used. For reading.py."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from onnx import AttributeProto, GraphProto, NodeProto

from engram_models.importing.errors import ImportRefusedError, shown

Scopes = tuple[Mapping[str, int], ...]


def check_topology(graph: GraphProto) -> None:
    """Raises ImportRefusedError for names made twice, names that nobody makes, and circles. Sorts the graph's nodes."""
    order, _ = _check(graph, ())
    if order is None:
        return
    nodes = []
    for place in order:
        node = NodeProto()
        node.CopyFrom(graph.node[place])
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def subgraphs(attributes: Iterable[AttributeProto]) -> list[GraphProto]:
    """Those that a node with these attributes has: branches and bodies."""
    return [
        graph
        for attribute in attributes
        for graph in (([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs))
    ]


def _check(graph: GraphProto, outer: Scopes) -> tuple[list[int] | None, set[str]]:
    """Places of the nodes in an order in which they can run, None where theirs is one; and the names taken from around it."""
    makers = _makers(graph)
    scopes = (makers, *outer)
    wants: list[set[str]] = []
    for node in graph.node:
        taken = set(filter(None, node.input))
        for name in taken:
            if not any(name in scope for scope in scopes):
                raise ImportRefusedError(f"operator {shown(node.op_type)} takes {shown(name)}, which nothing makes")
        for inner in subgraphs(node.attribute):
            taken |= _check(inner, scopes)[1]
        wants.append(taken)
    given = {value.name for value in graph.output}
    for name in given:
        if not any(name in scope for scope in scopes):
            raise ImportRefusedError(f"output {shown(name)} is made by no operator")
    in_order = all(makers.get(name, -1) < place for place, taken in enumerate(wants) for name in taken)
    order = None if in_order else _order(graph, makers, wants)
    return order, {name for taken in (*wants, given) for name in taken if name not in makers}


def _makers(graph: GraphProto) -> dict[str, int]:
    """Name: the place of the node that makes it, -1 for what is given. An initialiser of an old file is an input too."""
    for what, names in (
        ("inputs", [value.name for value in graph.input]),
        ("outputs", [value.name for value in graph.output]),
        ("initialisers", [tensor.name for tensor in graph.initializer]),
    ):
        name, count = Counter(names).most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise ImportRefusedError(f"two {what} have the name {shown(name)}")
    makers = dict.fromkeys([value.name for value in graph.input] + [tensor.name for tensor in graph.initializer], -1)
    for place, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in makers:
                raise ImportRefusedError(f"{shown(name)} is made twice (by operator {shown(node.op_type)} again)")
            makers[name] = place
    return makers


def _order(graph: GraphProto, makers: Mapping[str, int], wants: list[set[str]]) -> list[int]:
    needed: list[int] = []
    users: dict[int, list[int]] = defaultdict(list)
    for place, taken in enumerate(wants):
        sources = {makers.get(name, -1) for name in taken} - {-1}
        needed.append(len(sources))
        for source in sources:
            users[source].append(place)
    order = [place for place, count in enumerate(needed) if not count]
    for place in order:  # grows as it is walked
        for user in users[place]:
            needed[user] -= 1
            if not needed[user]:
                order.append(user)
    if len(order) < len(graph.node):
        stuck = next(node for node, count in zip(graph.node, needed, strict=True) if count)
        raise ImportRefusedError(
            f"the graph runs in a circle: operator {shown(stuck.op_type)} waits for its own result"
        )
    return order
