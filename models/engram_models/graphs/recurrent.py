"""Layers of RNN, GRUs and LSTMs as nodes: ONNX's own operators where their equations are ours and they are the faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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

_PHI = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}
_HEADS = {"softmax": "Softmax", "sigmoid": "Sigmoid"}


def step(graph: Graph, cell: RecurrentCell, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """The nodes of a layered cell. -> output, new states"""
    phi = str(cell.config.get("nonlinearity", "tanh"))
    per_layer = len(cell.layer_type.states)
    after: list[str] = []
    for number, layer in enumerate(cell.layers):
        assert isinstance(layer, Layer)
        new = advance(graph, layer, x, state[number * per_layer : (number + 1) * per_layer], phi)
        after += new
        x = new[0]
    y = x if cell.head is None else affine(graph, x, cell.head.weight, cell.head.bias)
    return activated(graph, y, str(cell.config["activation"])), after


def affine(graph: Graph, x: str, weight: Tensor | NDArray[Any], bias: Tensor | NDArray[Any]) -> str:
    """W x + b. x [batch, in], weight [out, in], bias [out]"""
    return graph.op("Gemm", x, graph.weight(array(weight).T), graph.weight(bias))


def activated(graph: Graph, y: str, activation: str) -> str:
    """The head's activation over the last dimension."""
    match activation:
        case "none":
            return y
        case "softmax":
            return graph.op("Softmax", y, axis=-1)
        case _:
            return graph.op(_HEADS[activation], y)


def advance(graph: Graph, layer: Layer, x: str, state: Sequence[str], phi: str = "tanh") -> list[str]:
    """One step of a layer. x [batch, input], state tensors [batch, hidden] -> new ones"""
    if isinstance(layer, RNNLayer):
        sums = affine(graph, graph.op("Concat", x, state[0], axis=1), layer.weight, layer.bias)
        return [activated_sums(graph, sums, phi)]
    first = graph.integers(0)
    before = [graph.op("Unsqueeze", tensor, first) for tensor in state]
    after = run(graph, layer, graph.op("Unsqueeze", x, first), before)
    return [graph.op("Squeeze", tensor, first) for tensor in after]


def activated_sums(graph: Graph, sums: str, phi: str) -> str:
    """phi of an RNN's sums."""
    return graph.op(_PHI[phi], sums)


def run(graph: Graph, layer: Layer, xs: str, before: Sequence[str] = (), direction: str = "forward") -> list[str]:
    """A GRU or an LSTM over a sequence. xs [time, batch, input], states [1, batch, hidden], 0 if none -> last states."""
    W, R, B, P = _operands(layer)
    operands = [graph.weight(value[None]) for value in (W, R, B)]
    states = [*before] or [""] * len(layer.states)
    common = {"hidden_size": layer.hidden_size, "direction": direction}
    if isinstance(layer, LSTMLayer):
        peephole = [] if P is None else [graph.weight(P[None])]
        return graph.ops("LSTM", xs, *operands, "", *states, *peephole, outputs=3, **common)[1:]
    after = int(isinstance(layer, GRUResetAfterLayer))
    return graph.ops("GRU", xs, *operands, "", *states, outputs=2, linear_before_reset=after, **common)[1:]


def _operands(layer: Layer) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Input weights, recurrent weights, both biases and peepholes in the order of gates that the operators have."""
    weight, bias = array(layer.weight), array(layer.bias)
    recurrent_bias = np.zeros_like(bias)
    peephole = None
    match layer:
        case LSTMLayer():
            order = [0, 3, 1, 2]  # i, f, g, o -> i, o, f, g
            if isinstance(layer, PeepholeLSTMLayer):
                p_i, p_f, p_o = array(layer.peephole)
                peephole = np.concatenate((p_i, p_o, p_f))
        case GRULayer():
            order = [1, 0, 2]  # r, z, n -> z, r, n
        case GRUResetAfterLayer():
            order = [1, 0, 2]
            recurrent_bias[2 * layer.hidden_size :] = array(layer.bias_n)
        case _:
            raise TypeError(f"there is no operator for a layer of type {type(layer).__name__}")

    def ordered(value: NDArray[Any]) -> NDArray[Any]:
        gates = np.split(value, layer.gates)
        return np.concatenate([gates[gate] for gate in order])

    weight = ordered(weight)
    biases = np.concatenate((ordered(bias), ordered(recurrent_bias)))
    return weight[:, : layer.input_size], weight[:, layer.input_size :], biases, peephole
