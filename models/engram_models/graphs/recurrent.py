"""Layers of RNN, GRUs and LSTMs as nodes.

Each gate is a product of its own, which ONNX Runtime fuses with the gate's function. Its operators for whole layers are slower
for one step (GRU by half, RNN many times), or as fast (LSTM), and RNN gives a row alone other bits than among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from engram_models.graphs.builder import Graph, array
from engram_models.recurrent import (
    GRULayer,
    GRUResetAfterLayer,
    Layer,
    LSTMLayer,
    PeepholeLSTMLayer,
    RecurrentCell,
    RNNLayer,
)

_FUNCTIONS = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}


def step(graph: Graph, cell: RecurrentCell, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """The nodes of a layered cell. -> output, new states"""
    per_layer = len(cell.layer_type.states)
    after: list[str] = []
    for number, layer in enumerate(cell.layers):
        assert isinstance(layer, Layer)
        new = advance(graph, layer, x, state[number * per_layer : (number + 1) * per_layer], phi(cell.config))
        after += new
        x = new[0]
    y = x if cell.head is None else affine(graph, x, cell.head.weight, cell.head.bias)
    return activated(graph, y, str(cell.config["activation"])), after


def phi(config: Any) -> str:
    """The operator of an RNN's function; the other layers do not look at it."""
    return _FUNCTIONS[str(config.get("nonlinearity", "tanh"))]


def affine(graph: Graph, x: str, weight: Tensor | NDArray[Any], bias: Tensor | NDArray[Any]) -> str:
    """W x + b. x [batch, in], weight [out, in], bias [out] -> [batch, out]"""
    return graph.op("Gemm", x, graph.weight(array(weight).T), graph.weight(bias))


def activated(graph: Graph, y: str, activation: str) -> str:
    """A head's activation, over the last dimension."""
    match activation:
        case "none":
            return y
        case "softmax":
            return graph.op("Softmax", y, axis=-1)
        case _:
            return graph.op(_FUNCTIONS[activation], y)


def advance(graph: Graph, layer: Layer, x: str, state: Sequence[str], phi: str = "Tanh") -> list[str]:
    """One step of a layer. x [batch, input], state tensors [batch, hidden] -> new ones; phi is an RNN's function."""
    match layer:
        case RNNLayer():
            both = graph.op("Concat", x, state[0], axis=1)
            return [graph.op(phi, affine(graph, both, layer.weight, layer.bias))]
        case GRULayer() | GRUResetAfterLayer():
            return [_gru(graph, layer, x, state[0])]
        case LSTMLayer():
            return _lstm(graph, layer, x, *state)
        case _:
            raise TypeError(f"there is no graph for a layer of type {type(layer).__name__}")


def _gate(graph: Graph, layer: Layer, both: str, place: int) -> str:
    """U x + W h + b of one gate. both [batch, input + hidden] -> [batch, hidden]"""
    rows = slice(place * layer.hidden_size, (place + 1) * layer.hidden_size)
    return affine(graph, both, layer.weight[rows], layer.bias[rows])


def _gru(graph: Graph, layer: GRULayer | GRUResetAfterLayer, x: str, s: str) -> str:
    both = graph.op("Concat", x, s, axis=1)
    r, z = (graph.op("Sigmoid", _gate(graph, layer, both, place)) for place in (0, 1))
    if isinstance(layer, GRUResetAfterLayer):
        split, inputs = 2 * layer.hidden_size, layer.input_size
        from_input = affine(graph, x, layer.weight[split:, :inputs], layer.bias[split:])
        from_state = affine(graph, s, layer.weight[split:, inputs:], layer.bias_n)
        sums = graph.op("Add", from_input, graph.op("Mul", r, from_state))
    else:
        sums = _gate(graph, layer, graph.op("Concat", x, graph.op("Mul", r, s), axis=1), 2)
    n = graph.op("Tanh", sums)
    return graph.op("Add", n, graph.op("Mul", z, graph.op("Sub", s, n)))


def _lstm(graph: Graph, layer: LSTMLayer, x: str, h: str, c: str) -> list[str]:
    both = graph.op("Concat", x, h, axis=1)
    i, f, g, o = (_gate(graph, layer, both, place) for place in range(4))
    peephole = layer.peephole if isinstance(layer, PeepholeLSTMLayer) else None
    if peephole is not None:
        i, f = (_seen(graph, sums, peephole[place], c) for place, sums in enumerate((i, f)))
    kept = graph.op("Mul", graph.op("Sigmoid", f), c)
    c = graph.op("Add", kept, graph.op("Mul", graph.op("Sigmoid", i), graph.op("Tanh", g)))
    if peephole is not None:
        o = _seen(graph, o, peephole[2], c)
    return [graph.op("Mul", graph.op("Sigmoid", o), graph.op("Tanh", c)), c]


def _seen(graph: Graph, sums: str, peephole: Tensor, c: str) -> str:
    """A gate's sums, and what it sees of the memory cell."""
    return graph.op("Add", sums, graph.op("Mul", c, graph.weight(peephole)))
