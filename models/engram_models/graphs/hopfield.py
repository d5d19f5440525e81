"""The Hopfield network as nodes. Its fields are summed exactly, in float64, as the cell does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engram_models.graphs.builder import Graph, array
from engram_models.hopfield import Hopfield

_OUTVOTES = 2.0**54  # the finest weights are multiples of 2^-51


def step(graph: Graph, cell: Hopfield, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """Where the input says nothing the unit before stands; where the field is 0, the unit stays. -> units, units

    ONNX Runtime's Sign and Where are slow. Signs are taken by making numbers large and clipping them instead, and what
    decides is made so large that the other side of a sum is heard only where it is 0.
    """
    units = _sign(graph, graph.op("Add", _large(graph, x), _sign(graph, _large(graph, state[0]))))
    if cell.rule == "dense" and not cell.labels:
        return units, [units]
    y = _sign(graph, graph.op("Add", graph.cast(_fields(graph, cell, units), graph.dtype), units))
    return y, [y]


def _large(graph: Graph, value: str) -> str:
    """Numbers that are 0, or 2 at least: any others are made so, without one becoming infinite on the way."""
    # Twice multiplied, the smallest number there is becomes 2 at least.
    factor = graph.weight(2.0 ** (75 if graph.dtype == np.float32 else 538))
    return graph.op("Mul", _sign(graph, graph.op("Mul", value, factor)), factor)


def _sign(graph: Graph, value: str) -> str:
    """Of numbers that are 0, or 1 at least; others between are left as they are."""
    return graph.op("Clip", value, graph.weight(-1.0), graph.weight(1.0))


def _fields(graph: Graph, cell: Hopfield, units: str) -> str:
    """What each unit feels, float64 [batch, size], times a power of two that makes it more than 2 where it is not 0."""
    weights = array(cell.weights)
    if cell.rule != "dense":
        return graph.op("MatMul", graph.cast(units, np.float64), graph.double(weights * _OUTVOTES))
    signs = array(cell.patterns).astype(np.float64) * 2 - 1
    # Whole numbers up to the size: exact in any float.
    overlaps = graph.op("MatMul", units, graph.weight(signs.T))
    behind = graph.op("Sub", graph.op("ReduceMax", overlaps, axes=[1], keepdims=1), overlaps)
    shares = graph.op("Gather", graph.double(weights), graph.cast(behind, np.int64))
    return graph.op("MatMul", shares, graph.double(signs * _OUTVOTES))
