"""Small changes to a graph: other names, other dimensions, fewer inputs. Used by trials and by the normal form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

BATCH = "batch"


def set_dims(value: ValueInfoProto, dims: Sequence[int | str]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    shape.SetInParent()
    for dim in dims:
        entry = shape.dim.add()
        if isinstance(dim, str):
            entry.dim_param = dim
        else:
            entry.dim_value = dim


def relabel(model: ModelProto, dims: Mapping[str, Sequence[int | str]]) -> None:
    """Gives inputs these dimensions and forgets all that was said of others: what the file says of inner tensors and outputs may
    hold for its own batch alone. Inputs that are not named become plain weights."""
    graph = model.graph
    kept = [value for value in graph.input if value.name in dims]
    initializers = [tensor for tensor in graph.initializer if tensor.name not in dims]
    if len(initializers) < len(graph.initializer):
        _replace(graph.initializer, initializers)
    _replace(graph.input, kept)
    for value in graph.input:
        set_dims(value, dims[value.name])
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for one in graphs(graph):
        del one.value_info[:]


def graphs(graph: GraphProto) -> Iterable[GraphProto]:
    """This one and all in it, from the outside in."""
    waiting = [graph]
    while waiting:
        one = waiting.pop()
        yield one
        for node in one.node:
            waiting += inner(node)


def inner(node: NodeProto) -> list[GraphProto]:
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            found.append(attribute.g)
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            found += attribute.graphs
    return found


def names_in(graph: GraphProto) -> set[str]:
    """Every name of a tensor anywhere."""
    found: set[str] = set()
    for one in graphs(graph):
        found.update(tensor.name for tensor in one.initializer)
        found.update(value.name for value in (*one.input, *one.output, *one.value_info))
        for node in one.node:
            found.update(node.input)
            found.update(node.output)
    return found


def rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Tensors of this graph, wherever they are used: graphs in it see them too, unless they have one of that name themselves."""
    waiting: list[tuple[GraphProto, Mapping[str, str]]] = [(graph, names)]
    while waiting:
        one, current = waiting.pop()
        for tensor in one.initializer:
            tensor.name = current.get(tensor.name, tensor.name)
        for value in (*one.input, *one.output):
            value.name = current.get(value.name, value.name)
        for node in one.node:
            _rename_all(node.input, current)
            _rename_all(node.output, current)
            for sub in inner(node):
                own = {tensor.name for tensor in sub.initializer} | {value.name for value in sub.input}
                own.update(name for each in sub.node for name in each.output)
                hidden = own & current.keys()
                waiting.append((sub, {k: v for k, v in current.items() if k not in hidden} if hidden else current))


def _rename_all(names: Any, current: Mapping[str, str]) -> None:
    for place, name in enumerate(names):
        if name in current:
            names[place] = current[name]


def _replace(field: Any, kept: Sequence[Any]) -> None:
    made = [type(one).FromString(one.SerializeToString()) for one in kept]
    del field[:]
    field.extend(made)
