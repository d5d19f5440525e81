"""Restricted Boltzmann machines and belief networks as nodes: products and logistic functions."""

from __future__ import annotations

from engram_models.boltzmann import DBN, RBM
from engram_models.graphs.builder import Graph
from engram_models.graphs.recurrent import affine


def step(graph: Graph, cell: RBM | DBN, x: str) -> tuple[str, list[str]]:
    """The nodes of either. -> output, no states"""
    if isinstance(cell, RBM):
        features = _up(graph, cell, x)
        return (_down(graph, cell, features) if cell.recreates else features), []
    if cell.recreates:
        for rbm in cell.stack:
            x = _up(graph, rbm, x)
        for rbm in reversed(cell.stack):
            x = _down(graph, rbm, x)
        return x, []
    for layer in cell.net:
        x = graph.op("Sigmoid", affine(graph, x, layer.weight, layer.bias))
    return graph.op("Softmax", affine(graph, x, cell.head.weight, cell.head.bias), axis=-1), []


def _up(graph: Graph, rbm: RBM, v: str) -> str:
    return graph.op("Sigmoid", graph.op("Gemm", v, graph.weight(rbm.weight), graph.weight(rbm.bias), transB=1))


def _down(graph: Graph, rbm: RBM, h: str) -> str:
    """By the same weights, which are in the graph once."""
    return graph.op("Sigmoid", graph.op("Gemm", h, graph.weight(rbm.weight), graph.weight(rbm.visible_bias)))
