"""Advances slots on a GPU: one CUDA graph for each bucket of rows, replayed on static buffers.

A graph gathers the state from the arena, runs the cell, scatters the new state, and leaves outputs and packed states in
buffers that one copy each brings to the host. Bits: in every bucket the cell is called for tiles of one and the same number
of rows, so that the libraries have no other batch to choose another kernel for; tiles are computed side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_models.bundle import Bundle
from engram_models.cell import Cell, torch_dtype
from engram_models.cell_bundles import CellStep
from engram_models.probe import batch_floor
from engram_models.spec import TensorSpec
from engram_service.runtimes.arena import Arena, split
from engram_service.runtimes.base import Advanced, Runtime
from engram_service.runtimes.torch_cells import Shapes, TorchCells, bytes_of
from engram_service.runtimes.torch_step import chosen_inputs, step_of

_WARM_UPS = 2  # calls outside a graph before the capture, so that libraries have made their workspaces
_TILE = 256  # rows: fewer take a GPU as long, and more of them are little faster as one tile than as several
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
    def of(cls, arena: CudaArena, rows: int, pinned: bool) -> _Given:
        shapes = {torch.int64: (rows,), torch.uint8: (rows, arena.schema.input_nbytes), torch.bool: (rows,)}
        if pinned:
            return cls(*(torch.zeros(shape, dtype=dtype, pin_memory=True) for dtype, shape in shapes.items()))
        return cls(*(torch.zeros(shape, dtype=dtype, device=arena.place) for dtype, shape in shapes.items()))


class CudaArena(Arena):
    """States on the GPU; the ring of outputs stays in host memory."""

    def __init__(self, bundle: Bundle, capacity: int, window: int, place: torch.device) -> None:
        self.place = place
        self.device = str(place)
        super().__init__(bundle, capacity, window)

    def _make_columns(self) -> None:
        slots = self.capacity + 1
        self.state = []  # the base class's, in host memory: there is none
        self.last = None
        self.tensors = [self._zeros((slots, *spec.shape), spec) for spec in self.schema.state]
        spec = self.schema.outputs[0]
        self.last_tensor = self._zeros((slots, *spec.shape), spec) if self.schema.generates else None
        initials = (self.bundle.initial(spec) for spec in self.schema.state)
        self._initial = [
            _typed(torch.from_numpy(np.array(value)[None]), spec).to(self.place)
            for value, spec in zip(initials, self.schema.state, strict=True)
        ]

    def reset(self, slots: NDArray[Any]) -> None:
        index = self._index(slots)
        for tensor, initial in zip(self.tensors, self._initial, strict=True):
            tensor.index_copy_(0, index, initial.expand(len(slots), *initial.shape[1:]))
        if self.last_tensor is not None:
            self.last_tensor.index_fill_(0, index, 0)

    def load(self, slots: NDArray[np.int32], states: NDArray[np.uint8]) -> None:
        index = self._index(slots)
        for spec, tensor, block in zip(self.schema.state, self.tensors, split(states, self.schema.state), strict=True):
            tensor.index_copy_(0, index, self._on_device(block, spec))

    def packed(self, slots: NDArray[np.int32]) -> NDArray[np.uint8]:
        index = self._index(slots)
        packed = np.empty((len(slots), self.state_nbytes), np.uint8)
        for block, tensor in zip(split(packed, self.schema.state), self.tensors, strict=True):
            block[:] = bytes_of(tensor.index_select(0, index))
        return packed

    def _put_last(self, slots: NDArray[np.int32], outputs: NDArray[np.uint8]) -> None:
        assert self.last_tensor is not None
        self.last_tensor.index_copy_(0, self._index(slots), self._on_device(outputs, self.schema.outputs[0]))

    def _on_device(self, rows: NDArray[np.uint8], spec: TensorSpec) -> torch.Tensor:
        host = torch.from_numpy(np.array(rows)).view(-1).view(torch_dtype(spec))
        return host.view(len(rows), *spec.shape).to(self.place)  # rows may be none

    def _index(self, slots: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(slots.astype(np.int64)).to(self.place)

    def _zeros(self, shape: tuple[int, ...], spec: TensorSpec) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch_dtype(spec), device=self.place)


class CudaGraphs(TorchCells):
    """For an arena on a CUDA device. Graphs of all buckets are captured at once: a session that is served already shall not wait
    for it."""

    code = 3
    arena: CudaArena

    def __init__(self, arena: CudaArena, cell: Cell, shapes: Shapes) -> None:
        Runtime.__init__(self, arena)
        self.shapes, self._cell = shapes, cell
        self._step = step_of(cell, len(arena.tensors))
        self._last = arena.last_tensor
        self._columns = arena.tensors if self._last is None else [*arena.tensors, self._last]
        rows_max = shapes.buckets[-1]
        with torch.cuda.device(arena.place), torch.inference_mode():
            self._staged = _Given.of(arena, rows_max, pinned=True)
            self._given = _Given.of(arena, rows_max, pinned=False)
            self._given.index.fill_(arena.capacity)
            self._sides = [torch.cuda.Stream(arena.place) for _ in range(_SIDES)]  # type: ignore[no-untyped-call]
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
        with torch.cuda.device(self.arena.place), torch.inference_mode():
            given.index[:padded].copy_(staged.index[:padded], non_blocking=True)
            given.inputs[:rows].copy_(staged.inputs[:rows], non_blocking=True)
            if self._last is not None:
                staged.feedback.numpy()[:rows] = False if feedback is None else feedback[start:stop]
                given.feedback[:rows].copy_(staged.feedback[:rows], non_blocking=True)
            graph.graph.replay()
            outputs = graph.outputs[:rows].to("cpu", non_blocking=True)
            states = graph.states[:rows].to("cpu", non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return Advanced(outputs.numpy(), [states.numpy()])

    def _capture(self, rows: int) -> _Graph:
        stream = torch.cuda.Stream(self.arena.place)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._body(rows)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the step loop's goes on serving the models that are there.
        with torch.cuda.graph(graph, self._pool, stream, "thread_local"):
            outputs, states = self._body(rows)
        return _Graph(graph, outputs, states)

    def _body(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        spec, tile = self._cell.input, self.shapes.tile
        index = self._given.index[:rows]
        inputs = self._given.inputs[:rows].view(-1).view(torch_dtype(spec)).view(rows, *spec.shape)
        value = chosen_inputs(self._last, index, inputs, self._given.feedback[:rows])
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


def shapes_on(bundle: Bundle, cell: Cell, rows_max: int) -> Shapes:
    """None is padded to a floor: CUDA's libraries have another kernel for nearly every batch."""
    tile = _TILE if batch_floor(CellStep(cell), bundle.schema, bundle.check, _TILE, [_TILE]) is not None else 1
    return Shapes.of_tiles(tile, rows_max if tile > 1 else 1)


def _typed(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return values.view(torch.bfloat16) if spec.dtype == "bfloat16" else values
