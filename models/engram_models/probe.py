"""Finds out in which batches a step gives a row the same bits, whoever shares the batch.

Matrix libraries choose their kernels by the batch size, and kernels round differently: a row alone may come out in other
bits than among a thousand, and a library that splits a batch between threads may round an odd share differently. Batches of
whole multiples of a small number usually do not differ. The probe looks for that floor and refuses to claim what it did not
see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.check import CheckVector, Step
from engram_models.spec import Schema, TensorSpec

FLOORS = (1, 2, 4, 8, 16, 32)
_STEPS = 3
_ROWS_MIN = 32  # rows that are looked at for a size: a contracting cell rounds most differences away again


def batch_floor(
    step: Step, schema: Schema, check: CheckVector, batch_max: int, sizes: Iterable[int] | None = None
) -> int | None:
    """The least floor F such that every tried batch of a multiple of F rows gives every row equal bits; None if none does.

    Whoever runs it pads its batches to a multiple of F. Tries sizes up to `batch_max` (or `sizes`: the only ones that will be
    used) over a few steps, each with other rows in other places. `check` says what numbers are usual.
    """
    most = max(batch_max, FLOORS[-1])
    tried = sorted({size for size in (_sizes(batch_max) if sizes is None else sizes) if 0 < size <= most})
    if not tried:
        return None
    pool = _Pool(step, schema, check, tried[-1] if sizes else -(-most // FLOORS[-1]) * FLOORS[-1])
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


def work(batch_max: int) -> tuple[int, int]:
    """How many calls, and rows in all of them, `batch_floor` makes at most."""
    draws = [(size, -(-_ROWS_MIN // size)) for size in {*_sizes(batch_max)} if size > 0]
    most = max(batch_max, FLOORS[-1])
    return _STEPS * (1 + sum(n for _, n in draws)), _STEPS * (most + sum(size * n for size, n in draws))


def _sizes(batch_max: int) -> list[int]:
    """Every small size, multiples of the floors around powers of two, where libraries change their ways, and others."""
    powers = [2**k for k in range(5, 13) if 2**k <= 2 * batch_max]
    near = [power + sign * step for power in powers for step in (0, *FLOORS) for sign in (-1, 1)]
    parts = [batch_max, batch_max // 3, batch_max // 5 * 3, batch_max * 3 // 4, batch_max * 6 // 7]
    multiples = [part // floor * floor for part in parts for floor in FLOORS]
    return [size for size in (*range(1, 49), *near, *multiples, 53, 99, 100, 200, 300, 333, 777) if size <= batch_max]


class _Pool:
    """Random rows with the outputs and states that they have in one large batch; others are held against these."""

    def __init__(self, step: Step, schema: Schema, check: CheckVector, rows: int) -> None:
        self._step, self._rows = step, rows
        self._random = np.random.default_rng(11)
        inputs = [
            self._like(values.reshape(-1, *spec.shape), spec)
            for values, spec in zip(check.inputs, schema.inputs, strict=True)
        ]
        self._inputs = [[values, *(self._random.permutation(values) for _ in range(_STEPS - 1))] for values in inputs]
        self._before = [self._like(values, spec) for values, spec in zip(check.before, schema.state, strict=True)]
        self._expected = self._run(np.arange(rows))

    def alike(self, size: int) -> bool:
        """Whether `size` rows in random order have the bits that they had in the large batch; small sizes several times."""
        return all(self._drawn_alike(size) for _ in range(-(-_ROWS_MIN // size)))

    def _drawn_alike(self, size: int) -> bool:
        rows = self._random.permutation(self._rows)[:size]
        return all(
            np.array_equal(_bits(got), _bits(expected[rows]))
            for got, expected in zip(self._run(rows), self._expected, strict=True)
        )

    def _run(self, rows: NDArray[np.intp]) -> list[NDArray[Any]]:
        """Outputs and states of these rows after every step."""
        states = [values[rows] for values in self._before]
        seen: list[NDArray[Any]] = []
        for number in range(_STEPS):
            outputs, after = self._step([several[number][rows] for several in self._inputs], states)
            states = list(after)
            seen.extend((*outputs, *after))
        return seen

    def _like(self, known: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
        """Rows like those of the check vector: larger numbers could saturate a model, which hides what rounds otherwise."""
        rows = known[self._random.integers(0, len(known), self._rows)]
        if spec.shared:
            return np.repeat(known[:1], self._rows, 0)  # rows that may be in one call
        if not spec.is_float or spec.dtype == "bfloat16" or spec.role == "constant":
            return rows
        spread = known.astype(np.float64).std(0)
        noise = self._random.standard_normal(rows.shape) * np.where(np.isfinite(spread), spread, 0)
        return (rows + noise).astype(spec.np_dtype)


def _bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """As bytes: NaN equals itself, and 0 is not -0."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
