"""Advances slots on a GPU: one CUDA graph for each bucket of rows, replayed on static buffers.

A graph gathers the state from the arena, runs the cell, scatters the new state, and leaves outputs and packed states in
buffers that one copy each brings to the host. Bits: in every bucket the cell is called for tiles of one and the same number
of rows, so that the libraries have no other batch to choose another kernel for; tiles are computed side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engram_service.engine.arena import Arena
from engram_service.engine.runner import Advanced, Runner, Shapes
from engram_service.engine.step import Step, chosen_inputs

_WARM_UPS = 2  # calls outside a graph before the capture, so that libraries have made their workspaces
_SIDES = 4  # streams that tiles are dealt out to


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    outputs: torch.Tensor  # uint8 [bucket, output_nbytes]
    states: torch.Tensor  # uint8 [bucket, state_nbytes]


@dataclass(frozen=True, slots=True)
class _Given:
    """What a step is given, for as many rows as the largest bucket has; on the device, or in pinned host memory."""

    index: torch.Tensor  # int64 [rows]
    inputs: torch.Tensor  # uint8 [rows, input_nbytes]
    feedback: torch.Tensor  # bool [rows]

    @classmethod
    def of(cls, arena: Arena, rows: int, pinned: bool) -> _Given:
        shapes = {torch.int64: (rows,), torch.uint8: (rows, arena.bundle.input.nbytes), torch.bool: (rows,)}
        if pinned:
            return cls(*(torch.zeros(shape, dtype=dtype, pin_memory=True) for dtype, shape in shapes.items()))
        return cls(*(torch.zeros(shape, dtype=dtype, device=arena.device) for dtype, shape in shapes.items()))


class CudaRunner(Runner):
    """The same as Runner, for an arena on a CUDA device. Graphs of all buckets are captured at once: a session that is served
    already shall not wait for it."""

    def __init__(self, arena: Arena, shapes: Shapes, step: Step) -> None:
        super().__init__(arena, shapes, step)
        rows_max = shapes.buckets[-1]
        with torch.cuda.device(arena.device), torch.inference_mode():
            self._staged = _Given.of(arena, rows_max, pinned=True)
            self._given = _Given.of(arena, rows_max, pinned=False)
            self._given.index.fill_(arena.capacity)
            self._sides = [torch.cuda.Stream(arena.device) for _ in range(_SIDES)]  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            self._graphs = {rows: self._capture(rows) for rows in reversed(shapes.buckets)}

    def _call(
        self,
        slots: NDArray[np.int32],
        inputs: NDArray[np.uint8],
        feedback: NDArray[np.bool_] | None,
        start: int,
        stop: int,
        padded: int,
    ) -> Advanced:
        rows = stop - start
        staged, given, graph = self._staged, self._given, self._graphs[padded]
        index = staged.index.numpy()
        index[:rows], index[rows:padded] = slots[start:stop], self.arena.capacity
        staged.inputs.numpy()[:rows] = inputs[start:stop]
        with torch.cuda.device(self.arena.device), torch.inference_mode():
            given.index[:padded].copy_(staged.index[:padded], non_blocking=True)
            given.inputs[:rows].copy_(staged.inputs[:rows], non_blocking=True)
            if self.arena.last is not None:
                staged.feedback.numpy()[:rows] = False if feedback is None else feedback[start:stop]
                given.feedback[:rows].copy_(staged.feedback[:rows], non_blocking=True)
            graph.graph.replay()
            outputs = graph.outputs[:rows].to("cpu", non_blocking=True)
            states = graph.states[:rows].to("cpu", non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return Advanced(outputs.numpy(), [states.numpy()])

    def _capture(self, rows: int) -> _Graph:
        stream = torch.cuda.Stream(self.arena.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._body(rows)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the engine's goes on serving the models that are there.
        with torch.cuda.graph(graph, self._pool, stream, "thread_local"):
            outputs, states = self._body(rows)
        return _Graph(graph, outputs, states)

    def _body(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        spec, tile = self.arena.bundle.input, self.shapes.tile
        index = self._given.index[:rows]
        inputs = self._given.inputs[:rows].view(-1).view(spec.torch_dtype).view(rows, *spec.shape)
        value = chosen_inputs(self.arena, index, inputs, self._given.feedback[:rows])
        here = torch.cuda.current_stream()
        for side in self._sides:
            side.wait_stream(here)
        tiles: list[tuple[torch.Tensor, ...]] = []
        for number, start in enumerate(range(0, rows, tile)):
            with torch.cuda.stream(self._sides[number % _SIDES]):
                tiles.append(self._step(index[start : start + tile], value[start : start + tile], *self._columns))
        for side in self._sides:
            here.wait_stream(side)
        outputs, *after = (torch.cat([_bytes(new) for new in news]) for news in zip(*tiles, strict=True))
        none = torch.empty((rows, 0), dtype=torch.uint8, device=index.device)  # a model may have no state
        return outputs, torch.cat([none, *after], 1)


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(len(rows), -1).view(torch.uint8)
