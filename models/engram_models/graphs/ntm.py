"""The Neural Turing Machine as nodes, written so that the memory is passed over as seldom as may be.

The shapes are those of engram_models.ntm: memory [batch, N, M], weightings and what is computed of them [batch, heads, N].
"""

from __future__ import annotations

from collections.abc import Sequence

from engram_models.graphs.builder import Graph
from engram_models.graphs.recurrent import activated, advance, affine
from engram_models.ntm import NTM, PARAMETER_MAX, TINY, FeedForward


def step(graph: Graph, cell: NTM, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """The nodes of the cell. -> output, new states"""
    owned, reads, heads = len(cell.controller.states), cell.read_heads, cell.heads
    memory, weightings = state[owned], state[owned + 1 : -reads]
    seen = graph.op("Concat", x, *state[-reads:], axis=1)
    if isinstance(cell.controller, FeedForward):
        after = [graph.op("Tanh", affine(graph, seen, cell.controller.weight, cell.controller.bias))]
    else:
        after = advance(graph, cell.controller, seen, state[:owned])
    emitted = affine(graph, after[0], cell.emit.weight, cell.emit.bias)
    emitted = graph.op("Clip", emitted, graph.weight(-PARAMETER_MAX), graph.weight(PARAMETER_MAX))
    *addressing, erase, add = graph.ops("Split", emitted, graph.integers(*cell.sizes), outputs=len(cell.sizes), axis=1)
    before = _rows(graph, graph.op("Concat", *weightings, axis=1), heads)
    weighting = _address(graph, cell, memory, before, *addressing)
    reading, writing = graph.ops("Split", weighting, graph.integers(reads, heads - reads), outputs=2, axis=1)
    read = graph.op("MatMul", reading, memory)
    read_flat = graph.op("Reshape", read, graph.integers(0, -1))
    y = affine(graph, graph.op("Concat", after[0], read_flat, axis=1), cell.head.weight, cell.head.bias)
    new = [
        *after[:owned],
        _write(
            graph, memory, writing, _rows(graph, erase, heads - reads), _rows(graph, add, heads - reads), heads - reads
        ),
        *_apart(graph, reading, reads),
        *_apart(graph, writing, heads - reads),
        *_apart(graph, read, reads),
    ]
    return activated(graph, y, str(cell.config["activation"])), new


def _address(
    graph: Graph, cell: NTM, memory: str, before: str, key: str, beta: str, gate: str, shifts: str, gamma: str
) -> str:
    """The heads' weightings, from those of the step before."""
    heads = cell.heads
    content = _content(graph, memory, graph.op("Tanh", _rows(graph, key, heads)), graph.op("Softplus", beta))
    g = _column(graph, graph.op("Sigmoid", gate))
    # A weighting that is 0 everywhere stands for location 0: kept is the others' share of what comes from before.
    rest = graph.op("Sub", graph.weight(1.0), g)
    nowhere = graph.op("LessOrEqual", graph.op("ReduceMax", before, axes=[2], keepdims=1), graph.weight(0.0))
    first = graph.op("Mul", rest, graph.cast(nowhere, graph.dtype))
    kept = graph.op("Sub", rest, first)
    interpolated = graph.op("Add", graph.op("Mul", content, g), graph.op("Mul", before, kept))
    interpolated = graph.op("Add", interpolated, graph.op("Mul", graph.weight(cell.start), first))
    moved = _shift(graph, cell, interpolated, graph.op("Softmax", _rows(graph, shifts, heads), axis=-1))
    sharpness = _column(graph, graph.op("Add", graph.op("Softplus", gamma), graph.weight(1.0)))
    logarithms = graph.op("Log", graph.op("Add", graph.op("Relu", moved), graph.weight(TINY)))
    return graph.op("Softmax", graph.op("Mul", logarithms, sharpness), axis=-1)


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


def _write(graph: Graph, memory: str, weighting: str, erase: str, add: str, writes: int) -> str:
    """M(i) prod_h (1 - w_h(i) e_h) + sum_h w_h(i) a_h. Outer products as matrix products: these need no broadcasting."""
    places = graph.op("Transpose", weighting, perm=[0, 2, 1])
    erases = graph.op("Neg", graph.op("Sigmoid", erase))
    heads = zip(_heads(graph, weighting, writes), _heads(graph, erases, writes), strict=True)
    for own, erased in heads:
        # 1 - w e as the product of (1, w) and (1, -e)
        kept = graph.op(
            "MatMul", graph.op("Transpose", _with_ones(graph, own), perm=[0, 2, 1]), _with_ones(graph, erased)
        )
        memory = graph.op("Mul", memory, kept)
    return graph.op("Add", memory, graph.op("MatMul", places, graph.op("Tanh", add)))


def _with_ones(graph: Graph, rows: str) -> str:
    """[batch, 1, n] -> [batch, 2, n], the first row all 1."""
    return graph.op("Pad", rows, graph.integers(0, 1, 0, 0, 0, 0), graph.weight(1.0))


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
