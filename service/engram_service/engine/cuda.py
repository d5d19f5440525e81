"""Advances slots on a GPU: one CUDA graph for each bucket of rows, replayed on static buffers.

A graph gathers the state from the arena, runs the cell, scatters the new state, and leaves outputs and packed states in
buffers that one copy each brings to the host. Bits: graphs of every bucket from the probed floor on are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engram_service.engine.arena import Arena
from engram_service.engine.runner import Advanced, Runner, Shapes
from engram_service.engine.step import Step, chosen_inputs

_WARM_UPS = 3  # calls outside a graph before the capture, so that libraries have made their workspaces


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    index: torch.Tensor  # int64 [bucket]
    inputs: torch.Tensor  # [bucket, *input]
    feedback: torch.Tensor  # bool [bucket]
    outputs: torch.Tensor  # uint8 [bucket, output_nbytes]
    states: torch.Tensor  # uint8 [bucket, state_nbytes]


class CudaRunner(Runner):
    """The same as Runner, for an arena on a CUDA device. Graphs are captured when a bucket is first needed."""

    def __init__(self, arena: Arena, shapes: Shapes, step: Step) -> None:
        super().__init__(arena, shapes, step)
        self._graphs: dict[int, _Graph] = {}

    def _call(
        self,
        slots: NDArray[np.int32],
        inputs: NDArray[np.uint8],
        feedback: NDArray[np.bool_] | None,
        start: int,
        stop: int,
        padded: int,
    ) -> Advanced:
        with torch.cuda.device(self.arena.device), torch.inference_mode():
            if padded not in self._graphs:
                self._graphs[padded] = self._capture(padded)
            graph = self._graphs[padded]
            fed = np.zeros(stop - start, np.bool_) if feedback is None else feedback[start:stop]
            index, x, mask = self._padded(slots[start:stop], inputs[start:stop], fed, padded)
            graph.index.copy_(torch.from_numpy(index))
            graph.inputs.view(padded, -1).view(torch.uint8).copy_(torch.from_numpy(np.array(x)))
            if mask is not None:
                graph.feedback.copy_(torch.from_numpy(mask))
            graph.graph.replay()
            rows = stop - start
            return Advanced(graph.outputs[:rows].cpu().numpy(), [graph.states[:rows].cpu().numpy()])

    def _capture(self, rows: int) -> _Graph:
        arena, spec = self.arena, self.arena.bundle.input
        device = arena.device
        index = torch.full((rows,), arena.capacity, dtype=torch.int64, device=device)
        inputs = torch.zeros((rows, *spec.shape), dtype=spec.torch_dtype, device=device)
        feedback = torch.zeros(rows, dtype=torch.bool, device=device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._body(index, inputs, feedback)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs, states = self._body(index, inputs, feedback)
        return _Graph(graph, index, inputs, feedback, outputs, states)

    def _body(
        self, index: torch.Tensor, inputs: torch.Tensor, feedback: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value = chosen_inputs(self.arena, index, inputs, feedback)
        output, *after = self._step(index, value, *self._columns)
        rows = len(index)
        none = torch.empty((rows, 0), dtype=torch.uint8, device=index.device)  # a model may have no state
        packed = torch.cat([none, *(new.contiguous().view(rows, -1).view(torch.uint8) for new in after)], 1)
        return output.contiguous().view(rows, -1).view(torch.uint8), packed
