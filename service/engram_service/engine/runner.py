"""Runs a cell over slots of an arena, in batch shapes that keep every row's bits the same.

A row must not feel who shares its batch (promise 5). The probe at load finds a floor: batches of a multiple of that many
rows all give a row the same bits, so batches are padded up to one. Where it finds none, batches are cut into tiles of one
fixed shape: of 32 rows if the probe saw no place in them matter, else of one row, which is slow and exact. On a GPU a batch is
padded to one of a few buckets, each a CUDA graph of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engram_service.engine.arena import Arena, from_bytes, to_bytes
from engram_service.engine.step import Step, chosen_inputs, columns

TILE_ROWS = 32


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


@dataclass(frozen=True, slots=True)
class Advanced:
    """What a batched step left: rows of bytes, in the order of the slots that were given."""

    outputs: NDArray[np.uint8]  # [n, output_nbytes]
    states: list[NDArray[np.uint8]]  # [n, bytes of a state tensor] each, in schema order


class Runner:
    """Advances slots of one arena on the CPU; CudaRunner does the same with graphs."""

    def __init__(self, arena: Arena, shapes: Shapes, step: Step) -> None:
        self.arena = arena
        self.shapes = shapes
        self._step = step
        self._columns = columns(arena)

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
        arena, rows = self.arena, stop - start
        with torch.inference_mode():
            where = torch.from_numpy(index)
            value = from_bytes(x, arena.bundle.input)
            if fed is not None:
                value = chosen_inputs(arena, where, value, torch.from_numpy(fed))
            output, *after = self._step(where, value, *self._columns)
            return Advanced(to_bytes(output[:rows]), [to_bytes(new[:rows]) for new in after])

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
