"""The scales around a cell as nodes: what goes into the inner cell, and what comes out of it."""

from __future__ import annotations

from engram_models.graphs.builder import Graph
from engram_models.normalised import Normalised


def scaled(graph: Graph, cell: Normalised, x: str) -> str:
    """Raw inputs as the inner cell takes them."""
    if cell.config["transform"] == "root":
        x = graph.op("Mul", graph.op("Sqrt", graph.op("Abs", x)), graph.op("Sign", x))
    x = graph.op("Sub", x, graph.weight(cell.input_mean))
    return graph.op("Div", x, graph.weight(cell.input_scale))


def raw(graph: Graph, cell: Normalised, y: str) -> str:
    """The inner cell's outputs in the data's own units."""
    if not cell.outputs_too:
        return y
    y = graph.op("Mul", y, graph.weight(cell.output_scale))
    y = graph.op("Add", y, graph.weight(cell.output_mean))
    return graph.op("Mul", graph.op("Abs", y), y) if cell.config["transform"] == "root" else y
