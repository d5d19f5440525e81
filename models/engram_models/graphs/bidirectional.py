"""Bidirectional cells as nodes: the forward net's step, and the backward net over the window of the last inputs."""

from __future__ import annotations

from collections.abc import Sequence

from engram_models.bidirectional import Bidirectional
from engram_models.graphs.builder import Graph
from engram_models.graphs.recurrent import activated, advance, affine, phi


def step(graph: Graph, cell: Bidirectional, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """The nodes of the cell. -> output, new states"""
    *before, inputs, outputs, waiting = state
    after = advance(graph, cell.ahead, x, before, phi(cell.config))
    window = int(cell.config["look_ahead"]) + 1
    inputs = _pushed(graph, inputs, x, window)
    outputs = _pushed(graph, outputs, after[0], window)
    oldest = graph.op("Squeeze", graph.slice(outputs, 1, 0, 1), graph.integers(1)) if window > 1 else after[0]
    y = graph.op("Concat", oldest, _backwards(graph, cell, inputs, before[0]), axis=1)
    if cell.head is not None:
        y = affine(graph, y, cell.head.weight, cell.head.bias)
    y = activated(graph, y, str(cell.config["activation"]))
    y = graph.op("Where", graph.op("Greater", waiting, graph.integers(0)), graph.weight(0.0), y)
    fewer = graph.op("Max", graph.op("Sub", waiting, graph.integers(1)), graph.integers(0))
    return y, [*after, inputs, outputs, fewer]


def _pushed(graph: Graph, rows: str, newest: str, window: int) -> str:
    """[batch, window, width] without the oldest row and with a new one, [batch, width]."""
    newest = graph.op("Unsqueeze", newest, graph.integers(1))
    return newest if window == 1 else graph.op("Concat", graph.slice(rows, 1, 1, window), newest, axis=1)


def _backwards(graph: Graph, cell: Bidirectional, inputs: str, like: str) -> str:
    """The backward net's output at the oldest input, having begun with 0 at the newest. `like` [batch, hidden] -> alike

    A scan, not a row of nodes for each input: ONNX Runtime keeps a copy of the weights for every product.
    """
    rest = graph.op("ConstantOfShape", graph.op("Shape", like), value=graph.zero())

    def one(x: str, state: Sequence[str]) -> list[str]:
        return advance(graph, cell.back, x, state, phi(cell.config))

    xs = graph.reversed(graph.op("Transpose", inputs, perm=[1, 0, 2]))
    states = [(rest, cell.back.hidden_size) for _ in cell.back.states]
    return graph.scan(one, (xs, cell.back.input_size), states)[0]
