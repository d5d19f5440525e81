"""The runtime of CPUs: a bundle's graph on ONNX Runtime, one thread, states in NumPy columns. Imports no torch.

Gather the states' rows, run the graph, scatter the new ones. How many rows the graph is given at once is `GraphStep`'s to see to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engram_models.graph_step import GraphStep
from engram_service.places import at
from engram_service.runtimes.arena import Arena, from_bytes, split, to_bytes
from engram_service.runtimes.base import Advanced, Runtime, RuntimeStoppedError
from engram_service.runtimes.watchdog import Watchdog


class OnnxGraphs(Runtime):
    name = "onnx_graphs"
    code = 1

    def __init__(self, arena: Arena, step: GraphStep, watchdog: Watchdog) -> None:
        super().__init__(arena)
        self._step = step
        self._watchdog = watchdog
        self._changing = [spec.role != "constant" for spec in arena.schema.state]
        self._one_input, self._one_output = len(arena.schema.inputs) == 1, len(arena.schema.outputs) == 1

    @property
    def batching(self) -> str:
        why = self.arena.bundle.why
        return f"{self._step.batching.text}: {why}" if why else self._step.batching.text

    def step(self, slots: NDArray[np.int32], inputs: NDArray[np.uint8], feedback: NDArray[np.bool_] | None) -> Advanced:
        arena, schema = self.arena, self.arena.schema
        index = at(slots)
        if feedback is not None and arena.last is not None:
            inputs = np.where(feedback[:, None], arena.last[index], inputs)
        if self._one_input:
            given = [from_bytes(inputs, schema.inputs[0])]
        else:
            blocks = zip(split(inputs, schema.inputs), schema.inputs, strict=True)
            given = [from_bytes(block, spec) for block, spec in blocks]
        if isinstance(index, slice):
            before = [column[index] for column in arena.state]  # views, which the graph only reads
        else:
            index = index.astype(np.intp)  # once, and not for each column
            before = [column.take(index, 0, mode="clip") for column in arena.state]
        run = self._watchdog.begin(arena.bundle)
        try:
            outputs, after = self._step(given, before, run.options)
        except Exception as error:
            if run.stopped:
                raise RuntimeStoppedError(run.stopped) from error
            raise
        finally:
            self._watchdog.end(run)
        for column, new, changes in zip(arena.state, after, self._changing, strict=True):
            if changes:
                column[index] = new
        rows = to_bytes(outputs[0]) if self._one_output else np.concatenate([to_bytes(one) for one in outputs], 1)
        if arena.last is not None:
            arena.last[index] = rows
        return Advanced(rows, [])
