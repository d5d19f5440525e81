"""Finds out in which batches a cell gives a row the same bits, whoever shares the batch.

Matrix libraries choose their kernels by the batch size, and kernels round differently: a row alone may come out in other
bits than among a thousand, and a library that splits a batch between threads may round an odd share differently. Batches of
whole multiples of a small number usually do not differ. The probe looks for that floor and refuses to claim what it did not
see.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engram_models.cell import Cell, State, torch_dtype

FLOORS = (1, 2, 4, 8, 16, 32)
_STEPS = 3
_ROWS_MIN = 32  # rows that are looked at for a size: a contracting cell rounds most differences away again


def batch_floor(
    cell: Cell, device: torch.device | str, batch_max: int, sizes: Iterable[int] | None = None
) -> int | None:
    """The least floor F such that every tried batch of a multiple of F rows gives every row equal bits; None if none does.

    Whoever runs the cell pads its batches to a multiple of F. Tries sizes up to `batch_max` (or `sizes`: the only ones that
    will be used) over a few steps, each with other rows in other places, with the calling thread's number of torch threads.
    """
    most = max(batch_max, FLOORS[-1])
    tried = sorted({size for size in (_sizes(batch_max) if sizes is None else sizes) if 0 < size <= most})
    if not tried:
        return None
    with torch.inference_mode():
        pool = _Pool(cell, device, tried[-1] if sizes else -(-most // FLOORS[-1]) * FLOORS[-1])
        alike: dict[int, bool] = {}
        for floor in FLOORS:
            multiples = [size for size in tried if size % floor == 0]
            for size in multiples:
                if size not in alike:
                    alike[size] = pool.alike(size)
                if not alike[size]:
                    break
            else:
                if multiples and floor <= batch_max:
                    return floor
    return None


def _sizes(batch_max: int) -> list[int]:
    """Every small size, multiples of the floors around powers of two, where libraries change their ways, and others."""
    powers = [2**k for k in range(5, 13) if 2**k <= 2 * batch_max]
    near = [power + sign * step for power in powers for step in (0, *FLOORS) for sign in (-1, 1)]
    parts = [batch_max, batch_max // 3, batch_max // 5 * 3, batch_max * 3 // 4, batch_max * 6 // 7]
    multiples = [part // floor * floor for part in parts for floor in FLOORS]
    return [size for size in (*range(1, 49), *near, *multiples, 53, 99, 100, 200, 300, 333, 777) if size <= batch_max]


class _Pool:
    """Random rows with the outputs and states that they have in one large batch; others are held against these."""

    def __init__(self, cell: Cell, device: torch.device | str, rows: int) -> None:
        self._cell, self._rows = cell, rows
        self._generator = torch.Generator().manual_seed(11)
        self._device = torch.device(device)
        noise = [self._random(cell.input.shape, torch_dtype(cell.input)) for _ in range(_STEPS)]
        # Numbers that saturate a cell would hide what rounds otherwise.
        self._inputs = [cell.inputs_like(one) for one in noise]
        self._before = [self._random(spec.shape, torch_dtype(spec)) for spec in cell.state_schema]
        self._expected = self._run(torch.arange(rows, device=self._device))

    def alike(self, size: int) -> bool:
        """Whether `size` rows in random order have the bits that they had in the large batch; small sizes several times."""
        return all(self._drawn_alike(size) for _ in range(-(-_ROWS_MIN // size)))

    def _drawn_alike(self, size: int) -> bool:
        rows = torch.randperm(self._rows, generator=self._generator)[:size].to(self._device)
        return all(
            torch.equal(_bits(got), _bits(expected[rows]))
            for got, expected in zip(self._run(rows), self._expected, strict=True)
        )

    def _run(self, rows: Tensor) -> list[Tensor]:
        """Outputs and states of these rows after every step."""
        state: State = self._cell.state_type(*(tensor[rows] for tensor in self._before))
        seen: list[Tensor] = []
        for x in self._inputs:
            y, state = self._cell(x[rows], state)
            seen.extend((y, *state))
        return seen

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        full = (self._rows, *shape)
        if dtype.is_floating_point:
            return torch.randn(full, generator=self._generator).to(dtype).to(self._device)
        return torch.randint(0, 2, full, generator=self._generator).to(dtype).to(self._device)


def _bits(tensor: Tensor) -> Tensor:
    """As bytes: NaN equals itself, and 0 is not -0."""
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
