"""Our cells as ONNX graphs: what a bundle carries as its step, and ONNX Runtime runs.

`step_graph` writes the graph of a cell of any kind. It is called where bundles are written, never while one is served.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from engram_models.bidirectional import Bidirectional
from engram_models.boltzmann import DBN, RBM
from engram_models.cell import Cell
from engram_models.graphs import bidirectional, boltzmann, hopfield, normalised, ntm, recurrent
from engram_models.graphs.builder import Graph
from engram_models.hopfield import Hopfield
from engram_models.normalised import Normalised
from engram_models.ntm import NTM
from engram_models.recurrent import RecurrentCell

__all__ = ["step_graph"]


def step_graph(cell: Cell, dtype: str = "float32") -> onnx.ModelProto:
    """A cell's step as one graph of standard operators, its weights inside.

    Inputs: the cell's input, then its states in the order of the schema; outputs: its output, then next_<state> in the same
    order. `dtype` float64 gives every float of the graph that type: a check against the cell in float64 uses it. Raises
    TypeError for a cell of a kind that has no graph.
    """
    graph = Graph(cell.schema, dtype)
    y, after = _step(graph, cell, graph.inputs[0], graph.states)
    return graph.model([y], after)


def _step(graph: Graph, cell: Cell, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    match cell:
        case RecurrentCell():
            return recurrent.step(graph, cell, x, state)
        case Bidirectional():
            return bidirectional.step(graph, cell, x, state)
        case NTM():
            return ntm.step(graph, cell, x, state)
        case RBM() | DBN():
            return boltzmann.step(graph, cell, x)
        case Hopfield():
            return hopfield.step(graph, cell, x, state)
        case Normalised():
            y, after = _step(graph, cell.inner, normalised.scaled(graph, cell, x), state)
            return normalised.raw(graph, cell, y), after
        case _:
            raise TypeError(f"there is no graph for a cell of kind {cell.kind!r}")
