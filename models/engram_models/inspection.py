"""What is done in a process of its own where a bundle is examined (examination.py), and what a graph is proved with wherever it
runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engram_models.batching import ALONE, Batching
from engram_models.bundle import Bundle, BundleError, load_bundle
from engram_models.check import CheckError
from engram_models.examination import TILE_ROWS, Examination
from engram_models.graph_step import GraphError, GraphStep
from engram_models.importing.errors import ImportRefusedError
from engram_models.probe import batch_floor, work

_TRIES = 3
_PROBE_S = 20.0  # a model for which the probe would take longer has a simpler answer
_WORTH = 4  # a tile that costs so many rows alone is not worth it


def checked_step(bundle: Bundle, batching: Batching, options: Any = None) -> GraphStep:
    """The bundle's step, after it has computed what was recorded; `options` are those of GraphStep. Raises BundleError."""
    try:
        with bundle.graph_file() as graph:
            step = GraphStep(graph, bundle.schema, batching)
        bundle.check.verify(bundle.schema, lambda inputs, states: step(inputs, states, options), bundle.tolerance)
    except (GraphError, CheckError) as error:
        raise BundleError(f"{bundle.path}: {error}") from error
    return step


def inspected(_: Path, path: str, rows_max: int, fingerprint: str, graph: str) -> dict[str, Any]:
    """What `examine` has done in the process of its own. Raises ImportRefusedError, without the path."""
    from engram_models.importing.reading import check_graph, parse_model  # which has onnx

    try:
        bundle = load_bundle(Path(path))
        if (bundle.fingerprint, bundle.graph) != (fingerprint, graph):
            raise ImportRefusedError("its files were changed while it was examined")
        check_graph(parse_model(bundle.read_graph()))
        return asdict(_batching(bundle, rows_max))
    except BundleError as error:
        raise ImportRefusedError(str(error).removeprefix(f"{path}: ")) from error


def _batching(bundle: Bundle, rows_max: int) -> Examination:
    if bundle.one_by_one:
        return Examination(None, 1, _seconds(checked_step(bundle, ALONE), bundle, 1))
    step = checked_step(bundle, Batching())
    alone, tile = _seconds(step, bundle, 1), _seconds(step, bundle, TILE_ROWS)
    calls, rows = work(rows_max)
    if calls * alone + (rows - calls) * max(0.0, tile - alone) / (TILE_ROWS - 1) > _PROBE_S:
        return _tiled(step, bundle, alone, tile) if tile < _WORTH * alone else Examination(None, 1, alone)
    floor = batch_floor(step, bundle.schema, bundle.check, rows_max)
    if floor is not None:
        return Examination(floor, 1, tile / TILE_ROWS)
    return _tiled(step, bundle, alone, tile)


def _tiled(step: GraphStep, bundle: Bundle, alone: float, tile: float) -> Examination:
    alike = batch_floor(step, bundle.schema, bundle.check, TILE_ROWS, [TILE_ROWS]) is not None
    return Examination(None, TILE_ROWS, tile / TILE_ROWS) if alike else Examination(None, 1, alone)


def _seconds(step: GraphStep, bundle: Bundle, rows: int) -> float:
    """Of a processor, that so many equal rows take: the least of a few."""
    inputs = [np.repeat(values[0, :1], rows, 0) for values in bundle.check.inputs]
    states = [np.repeat(values[:1], rows, 0) for values in bundle.check.before]
    taken: list[float] = []
    for _ in range(_TRIES):
        started = time.thread_time()
        step(inputs, states)
        taken.append(time.thread_time() - started)
    return min(taken)
