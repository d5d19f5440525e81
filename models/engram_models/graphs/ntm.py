"""The Neural Turing Machine as nodes, written so that the memory is passed over as seldom as may be.

The shapes are those of engram_models.ntm: memory [batch, N, M], weightings and what is computed of them [batch, heads, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.graphs.builder import Graph, array
from engram_models.graphs.recurrent import activated, advance, affine
from engram_models.ntm import NTM, PARAMETER_MAX, TINY, FeedForward

_PACKET = 4  # numbers that ONNX Runtime's slower functions take at a time


def step(graph: Graph, cell: NTM, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """The nodes of the cell. -> output, new states"""
    owned, reads, heads = len(cell.controller.states), cell.read_heads, cell.heads
    memory, weightings = state[owned], state[owned + 1 : -reads]
    seen = graph.op("Concat", x, *state[-reads:], axis=1)
    if isinstance(cell.controller, FeedForward):
        after = [graph.op("Tanh", affine(graph, seen, cell.controller.weight, cell.controller.bias))]
    else:
        after = advance(graph, cell.controller, seen, state[:owned])
    key, strengths, gate, shifts, erase, add = _emitted(graph, cell, after[0])
    before = _rows(graph, graph.op("Concat", *weightings, axis=1), heads)
    weighting = _address(graph, cell, memory, before, key, strengths, gate, shifts)
    reading, writing = graph.ops("Split", weighting, graph.integers(reads, heads - reads), outputs=2, axis=1)
    read = graph.op("MatMul", reading, memory)
    read_flat = graph.op("Reshape", read, graph.integers(0, -1))
    y = affine(graph, graph.op("Concat", after[0], read_flat, axis=1), cell.head.weight, cell.head.bias)
    new = [
        *after[:owned],
        _write(graph, cell, memory, writing, erase, add),
        *_apart(graph, reading, reads),
        *_apart(graph, writing, heads - reads),
        *_apart(graph, read, reads),
    ]
    return activated(graph, y, str(cell.config["activation"])), new


def _emitted(graph: Graph, cell: NTM, h: str) -> list[str]:
    """What the controller emits: keys, strengths with sharpnesses, gates, shifts, erases, adds.

    ONNX Runtime's Softplus rounds the last few numbers of a tensor in another way than the rest, so that a row's bits would
    depend on its batch: strengths and sharpnesses are filled up with zeros.
    """
    weight, bias = array(cell.emit.weight), array(cell.emit.bias)
    starts = np.cumsum([0, *cell.sizes])
    key, beta, gate, shifts, gamma, erase, add = (slice(*pair) for pair in pairwise(starts))
    spare = -2 * cell.heads % _PACKET
    order = [key, beta, gamma, None, gate, shifts, erase, add]

    def ordered(values: NDArray[Any]) -> NDArray[Any]:
        zeros = np.zeros((spare, *values.shape[1:]), values.dtype)
        return np.concatenate([zeros if part is None else values[part] for part in order])

    limits = graph.weight(-PARAMETER_MAX), graph.weight(PARAMETER_MAX)
    values = graph.op("Clip", affine(graph, h, ordered(weight), ordered(bias)), *limits)
    sizes = [cell.sizes[0], 2 * cell.heads + spare, cell.sizes[2], cell.sizes[3], *cell.sizes[5:]]
    return graph.ops("Split", values, graph.integers(*sizes), outputs=len(sizes), axis=1)


def _address(graph: Graph, cell: NTM, memory: str, before: str, *emitted: str) -> str:
    """The heads' weightings, from those of the step before."""
    key, strengths, gate, shifts = emitted
    heads = cell.heads
    sizes = [heads, heads, *filter(None, [-2 * heads % _PACKET])]
    beta, gamma, *_ = graph.ops(
        "Split", graph.op("Softplus", strengths), graph.integers(*sizes), outputs=len(sizes), axis=1
    )
    content = _content(graph, memory, graph.op("Tanh", _rows(graph, key, heads)), beta)
    g = _column(graph, graph.op("Sigmoid", gate))
    # A weighting that is 0 everywhere stands for location 0: kept is the others' share of what comes from before.
    rest = graph.op("Sub", graph.weight(1.0), g)
    nowhere = graph.op("LessOrEqual", graph.op("ReduceMax", before, axes=[2], keepdims=1), graph.weight(0.0))
    first = graph.op("Mul", rest, graph.cast(nowhere, graph.dtype))
    kept = graph.op("Sub", rest, first)
    interpolated = graph.op("Add", graph.op("Mul", content, g), graph.op("Mul", before, kept))
    interpolated = graph.op("Add", interpolated, graph.op("Mul", graph.weight(cell.start), first))
    moved = _shift(graph, cell, interpolated, graph.op("Softmax", _rows(graph, shifts, heads), axis=-1))
    sharpness = _column(graph, graph.op("Add", gamma, graph.weight(1.0)))
    return graph.op("Softmax", graph.op("Mul", _logarithms(graph, cell, moved), sharpness), axis=-1)


def _logarithms(graph: Graph, cell: NTM, weighting: str) -> str:
    """Of a weighting, which may be 0. Log, like Softplus, wants whole packets of numbers."""
    slots = cell.start.shape[2]
    values = graph.op("Add", graph.op("Relu", weighting), graph.weight(TINY))
    spare = -slots % _PACKET if cell.heads * slots % _PACKET else 0
    if not spare:
        return graph.op("Log", values)
    padded = graph.op("Pad", values, graph.integers(0, 0, 0, 0, 0, spare), graph.weight(1.0))
    return graph.slice(graph.op("Log", padded), 2, 0, slots)


def _content(graph: Graph, memory: str, key: str, beta: str) -> str:
    """Weightings by likeness. The strength and the key's norm scale the key, which is smaller than the weighting."""
    scale = graph.op("Div", _column(graph, beta), _norm(graph, key, keepdims=1))
    dots = graph.op("MatMul", graph.op("Mul", key, scale), graph.op("Transpose", memory, perm=[0, 2, 1]))
    lengths = graph.op("Unsqueeze", _norm(graph, memory, keepdims=0), graph.integers(1))
    return graph.op("Softmax", graph.op("Div", dots, lengths), axis=-1)


def _norm(graph: Graph, rows: str, keepdims: int) -> str:
    squares = graph.op("ReduceSumSquare", rows, axes=[2], keepdims=keepdims)
    return graph.op("Sqrt", graph.op("Add", squares, graph.weight(TINY)))


def _shift(graph: Graph, cell: NTM, weighting: str, shifts: str) -> str:
    """Circular convolution: the weighting with its ends repeated, and a slice of that for each shift."""
    reach, slots = cell.reach, cell.start.shape[2]
    if not reach:
        return weighting  # its only shift has all of the softmax
    ends = [graph.slice(weighting, 2, slots - reach, slots), graph.slice(weighting, 2, 0, reach)]
    wide = graph.op("Concat", ends[0], weighting, ends[1], axis=2)
    places = 2 * reach + 1
    moved = ""
    for place, share in enumerate(graph.ops("Split", shifts, graph.integers(*[1] * places), outputs=places, axis=2)):
        start = places - 1 - place
        part = weighting if start == reach else graph.slice(wide, 2, start, start + slots)
        part = graph.op("Mul", part, share)
        moved = graph.op("Add", moved, part) if moved else part
    return moved


def _write(graph: Graph, cell: NTM, memory: str, weighting: str, erase: str, add: str) -> str:
    """M(i) prod_h (1 - w_h(i) e_h) + sum_h w_h(i) a_h. Outer products are matrix products: broadcasting is slower."""
    writes = cell.heads - cell.read_heads
    places = [graph.op("Reshape", own, graph.integers(0, -1, 1)) for own in _heads(graph, weighting, writes)]
    erases = _heads(graph, graph.op("Neg", graph.op("Sigmoid", _rows(graph, erase, writes))), writes)
    for place, erased in zip(places, erases, strict=True):
        kept = graph.op("Add", graph.op("MatMul", place, erased), graph.weight(1.0))
        memory = graph.op("Mul", memory, kept)
    columns = places[0] if writes == 1 else graph.op("Concat", *places, axis=2)
    return graph.op("Add", memory, graph.op("MatMul", columns, graph.op("Tanh", _rows(graph, add, writes))))


def _rows(graph: Graph, values: str, heads: int) -> str:
    """[batch, heads * n] -> [batch, heads, n]"""
    return graph.op("Reshape", values, graph.integers(0, heads, -1))


def _column(graph: Graph, values: str) -> str:
    """[batch, heads] -> [batch, heads, 1]"""
    return graph.op("Unsqueeze", values, graph.integers(2))


def _heads(graph: Graph, values: str, heads: int) -> list[str]:
    """[batch, heads, n] -> heads times [batch, 1, n]"""
    return [values] if heads == 1 else graph.ops("Split", values, graph.integers(*[1] * heads), outputs=heads, axis=1)


def _apart(graph: Graph, values: str, heads: int) -> list[str]:
    """[batch, heads, n] -> heads times [batch, n]"""
    return [graph.op("Squeeze", part, graph.integers(1)) for part in _heads(graph, values, heads)]
