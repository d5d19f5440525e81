"""Finds out in which batches a cell gives a row the same bits, whoever shares the batch.

Matrix libraries choose their kernels by the batch size, and kernels round differently: a row alone may come out in other
bits than among a thousand. From some batch size on they usually do not differ. The probe looks for that floor and refuses
to claim what it did not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engram_models.cell import Cell, State

FLOORS = (1, 2, 4, 8, 16, 32)
_STEPS = 2
_ROWS_WATCHED = 4


def batch_floor(
    cell: Cell, device: torch.device | str, batch_max: int, sizes: Iterable[int] | None = None
) -> int | None:
    """The least floor F such that every tried batch of F rows or more gives watched rows equal bits; None if none does.

    Tries sizes up to `batch_max` (or `sizes`: the only ones that will be used), several places of a row in the batch, and
    several neighbours, over a few steps, with the calling thread's number of torch threads.
    """
    tried = sorted({size for size in (sizes or _sizes(batch_max)) if size <= max(batch_max, FLOORS[-1])})
    generator = torch.Generator().manual_seed(11)
    rows = _Rows(cell, device, generator)
    with torch.inference_mode():
        results = {size: rows.run(size, generator) for size in tried}
    for floor in FLOORS:
        above = [results[size] for size in tried if size >= floor]
        if floor <= batch_max and above and all(_equal(above[0], other) for other in above[1:]):
            return floor
    return None


def _sizes(batch_max: int) -> Sequence[int]:
    """Every small size, sizes around the powers of two, and a few that are nothing in particular."""
    powers = [2**k for k in range(5, 13) if 2**k <= batch_max]
    near = [size for power in powers for size in (power - 1, power, power + 1, power + power // 2 + 1)]
    return [*range(1, 34), *near, *(size for size in (37, 53, 99, 100, 200, 333, 777, batch_max) if size <= batch_max)]


class _Rows:
    """A few watched rows, which are run in batches of any size at any place."""

    def __init__(self, cell: Cell, device: torch.device | str, generator: torch.Generator) -> None:
        self._cell = cell
        self._device = device
        self._inputs = [
            self._random(cell.input.shape, cell.input.torch_dtype, _ROWS_WATCHED, generator) for _ in range(_STEPS)
        ]
        self._state = [
            self._random(spec.shape, spec.torch_dtype, _ROWS_WATCHED, generator) for spec in cell.state_schema
        ]

    def run(self, size: int, generator: torch.Generator) -> list[list[torch.Tensor]]:
        """For each watched row, its outputs and states after every step; each row at a place of its own among neighbours."""
        results: list[list[torch.Tensor]] = []
        for row in range(_ROWS_WATCHED):
            place = int(torch.randint(0, size, (1,), generator=generator)) if row else size - 1
            cell = self._cell
            state: State = cell.state_type(*(
                self._among(tensor[row], spec.shape, size, place, generator)
                for tensor, spec in zip(self._state, cell.state_schema, strict=True)
            ))  # fmt: skip
            seen: list[torch.Tensor] = []
            for x in self._inputs:
                y, state = cell(self._among(x[row], cell.input.shape, size, place, generator), state)
                seen.extend(tensor[place].clone() for tensor in (y, *state))
            results.append(seen)
        return results

    def _among(
        self, row: torch.Tensor, shape: tuple[int, ...], size: int, place: int, generator: torch.Generator
    ) -> torch.Tensor:
        batch = self._random(shape, row.dtype, size, generator)
        batch[place] = row
        return batch

    def _random(
        self, shape: tuple[int, ...], dtype: torch.dtype, rows: int, generator: torch.Generator
    ) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.randn((rows, *shape), generator=generator).to(dtype).to(self._device)
        return torch.randint(0, 2, (rows, *shape), generator=generator).to(dtype).to(self._device)


def _equal(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> bool:
    return all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )
