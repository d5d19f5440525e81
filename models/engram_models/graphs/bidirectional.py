"""Bidirectional cells as nodes: the forward net's step, and the backward net over the window of the last inputs."""

from __future__ import annotations

from collections.abc import Sequence

from engram_models.bidirectional import Bidirectional
from engram_models.graphs.builder import Graph
from engram_models.graphs.recurrent import activated, activated_sums, advance, affine, run
from engram_models.recurrent import Layer, RNNLayer


def step(graph: Graph, cell: Bidirectional, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """The nodes of the cell. -> output, new states"""
    *before, inputs, outputs, waiting = state
    phi = str(cell.config.get("nonlinearity", "tanh"))
    look_ahead = int(cell.config["look_ahead"])
    after = advance(graph, cell.ahead, x, before, phi)
    inputs = _pushed(graph, inputs, x, look_ahead)
    outputs = _pushed(graph, outputs, after[0], look_ahead)
    oldest = graph.op("Squeeze", graph.slice(outputs, 1, 0, 1), graph.integers(1)) if look_ahead else after[0]
    y = graph.op("Concat", oldest, _backwards(graph, cell.back, inputs, look_ahead, phi), axis=1)
    if cell.head is not None:
        y = affine(graph, y, cell.head.weight, cell.head.bias)
    y = activated(graph, y, str(cell.config["activation"]))
    early = graph.op("Greater", waiting, graph.integers(0))
    y = graph.op("Where", early, graph.weight(0.0), y)
    fewer = graph.op("Max", graph.op("Sub", waiting, graph.integers(1)), graph.integers(0))
    return y, [*after, inputs, outputs, fewer]


def _pushed(graph: Graph, window: str, newest: str, look_ahead: int) -> str:
    """A window [batch, look_ahead + 1, width] without its oldest row and with a new one."""
    newest = graph.op("Unsqueeze", newest, graph.integers(1))
    if not look_ahead:
        return newest
    return graph.op("Concat", graph.slice(window, 1, 1, look_ahead + 1), newest, axis=1)


def _backwards(graph: Graph, layer: Layer, inputs: str, look_ahead: int, phi: str) -> str:
    """The backward net's output after the oldest input, from 0 at the newest. [batch, hidden]"""
    xs = graph.op("Transpose", inputs, perm=[1, 0, 2])
    if isinstance(layer, RNNLayer):
        return _unrolled(graph, layer, xs, look_ahead, phi)
    return graph.op("Squeeze", run(graph, layer, xs, direction="reverse")[0], graph.integers(0))


def _unrolled(graph: Graph, layer: RNNLayer, xs: str, look_ahead: int, phi: str) -> str:
    """Step by step: ONNX Runtime's RNN operator is slow, and gives a row alone other bits than among others."""
    times = [xs]
    if look_ahead:
        times = graph.ops("Split", xs, graph.integers(*[1] * (look_ahead + 1)), outputs=look_ahead + 1, axis=0)
    x, *rest = [graph.op("Squeeze", one, graph.integers(0)) for one in reversed(times)]
    state = activated_sums(graph, affine(graph, x, layer.weight[:, : layer.input_size], layer.bias), phi)
    for x in rest:
        (state,) = advance(graph, layer, x, [state], phi)
    return state
