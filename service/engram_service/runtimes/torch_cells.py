"""The runtime of cells in torch: plug-in cells on a CPU here, every cell on a GPU with graphs (torch_cuda.py).

The probe at load finds a floor: batches of a multiple of that many rows all give a row the same bits, so batches are padded up
to one. Where it finds none, batches are cut into tiles of one fixed shape: of 32 rows if the probe saw no place in them matter,
else of one row, which is slow and exact. On a GPU a batch is padded to one of a few buckets, each a CUDA graph of tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_models.bundle import Bundle
from engram_models.cell import Cell, torch_dtype
from engram_models.cell_bundles import CellStep
from engram_models.examination import TILE_ROWS
from engram_models.probe import batch_floor
from engram_service.runtimes.arena import Arena, from_bytes
from engram_service.runtimes.base import Advanced, Runtime
from engram_service.runtimes.torch_step import chosen_inputs, step_of
from engram_service.runtimes.torch_traced import traced

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The batch shapes that a cell may be run in: multiples of `floor` (None: only tiles), or buckets of whole tiles."""

    floor: int | None
    buckets: tuple[int, ...] = (TILE_ROWS,)

    @property
    def tile(self) -> int:
        return self.buckets[0]

    @classmethod
    def of_tiles(cls, tile: int, rows_max: int = 1) -> Shapes:
        """Buckets of one tile, two, four and so on, up to the first that holds `rows_max` rows."""
        buckets = [tile]
        while buckets[-1] < rows_max:
            buckets.append(2 * buckets[-1])
        return cls(None, tuple(buckets))

    def cut(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, padded rows) of each cell call that together cover `rows`."""
        if self.floor is not None:
            yield 0, rows, -(-rows // self.floor) * self.floor
            return
        most = self.buckets[-1]
        for start in range(0, rows, most):
            stop = min(start + most, rows)
            yield start, stop, next(bucket for bucket in self.buckets if bucket >= stop - start)


class TorchCells(Runtime):
    """On a CPU: the cell's step, recorded, on tensors that are the arena's own memory."""

    name = "torch_cells"
    code = 2

    def __init__(self, arena: Arena, cell: Cell, shapes: Shapes) -> None:
        super().__init__(arena)
        self.shapes = shapes
        step = step_of(cell, len(arena.schema.state))
        self._cell = cell
        self._step = traced(step, cell, arena.bundle.reference)
        self._columns, self._last = columns(arena)

    @property
    def batching(self) -> str:
        if self.shapes.floor is not None:
            return f"filled up to a multiple of {self.shapes.floor} rows: a row has the same bits in each"
        return (
            "one by one"
            if self.shapes.tile == 1
            else f"in tiles of {self.shapes.tile} rows: a row has the same bits in each"
        )

    def step(self, slots: NDArray[np.int32], inputs: NDArray[np.uint8], feedback: NDArray[np.bool_] | None) -> Advanced:
        """One step of each slot. inputs: uint8 [n, input_nbytes]; rows set in `feedback` use the last output instead."""
        pieces = [self._call(slots, inputs, feedback, *cut) for cut in self.shapes.cut(len(slots))]
        if len(pieces) == 1:
            return pieces[0]
        blocks = zip(*(piece.states for piece in pieces), strict=True)
        return Advanced(np.concatenate([p.outputs for p in pieces]), [np.concatenate(block) for block in blocks])

    def _call(
        self,
        slots: NDArray[np.int32],
        inputs: NDArray[np.uint8],
        feedback: NDArray[np.bool_] | None,
        start: int,
        stop: int,
        padded: int,
    ) -> Advanced:
        index, x, fed = self._padded(
            slots[start:stop], inputs[start:stop], None if feedback is None else feedback[start:stop], padded
        )
        rows = stop - start
        # Of the calling thread: several that share a batch wait for each other at each operation.
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        with torch.inference_mode():
            where = torch.from_numpy(index)
            value = _tensor(x, self._cell)
            if fed is not None:
                value = chosen_inputs(self._last, where, value, torch.from_numpy(fed))
            output, *after = self._step(where, value, *self._columns)
            return Advanced(bytes_of(output[:rows]), [bytes_of(new[:rows]) for new in after])

    def _padded(
        self, slots: NDArray[np.int32], inputs: NDArray[np.uint8], feedback: NDArray[np.bool_] | None, padded: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_] | None]:
        rows = len(slots)
        index = np.full(padded, self.arena.capacity, np.int64)
        index[:rows] = slots
        if padded == rows:
            return index, inputs, feedback
        x = np.zeros((padded, inputs.shape[1]), np.uint8)
        x[:rows] = inputs
        fed: NDArray[Any] | None = None
        if feedback is not None:
            fed = np.zeros(padded, np.bool_)
            fed[:rows] = feedback
        return index, x, fed


def columns(arena: Arena) -> tuple[list[Tensor], Tensor | None]:
    """What a step reads and writes: the state's tensors, and the last outputs where the model can feed on them, also apart."""
    state = [
        torch.from_numpy(column).view(torch_dtype(spec)) if spec.dtype == "bfloat16" else torch.from_numpy(column)
        for column, spec in zip(arena.state, arena.schema.state, strict=True)
    ]
    if arena.last is None:
        return state, None
    spec = arena.schema.outputs[0]
    last = torch.from_numpy(arena.last).view(-1).view(torch_dtype(spec)).view(len(arena.last), *spec.shape)
    return [*state, last], last


def bytes_of(rows: Tensor) -> NDArray[np.uint8]:
    """A batch-first tensor as rows of bytes, uint8 [n, bytes]; a view where the tensor is contiguous on the CPU."""
    flat = rows.detach().contiguous().view(len(rows), -1)
    return flat.view(torch.uint8).cpu().numpy().reshape(len(rows), -1)


def shapes_of(bundle: Bundle, cell: Cell, rows_max: int) -> Shapes:
    """Of a cell on a CPU."""
    step = CellStep(cell)
    if (floor := batch_floor(step, bundle.schema, bundle.check, rows_max)) is not None:
        return Shapes(floor)
    if batch_floor(step, bundle.schema, bundle.check, TILE_ROWS, [TILE_ROWS]) is not None:
        return Shapes.of_tiles(TILE_ROWS)
    log.warning("model %s: a row's bits depend on its place; each is a batch", bundle.reference)
    return Shapes.of_tiles(1)


def _tensor(rows: NDArray[np.uint8], cell: Cell) -> Tensor:
    values = from_bytes(rows if rows.flags.writeable else rows.copy(), cell.input)
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if cell.input.dtype == "bfloat16" else tensor
