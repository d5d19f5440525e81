"""Numbers for proofs: made-up inputs, poison for a row, and how far two tensors are apart. Used by trials.py and replay.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.spec import TensorSpec

Array = NDArray[Any]

TOLERANCE = 1e-4  # of max(1, |y|): more is no rounding
_TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2}  # four of their own roundings
_MAGNITUDE = 0.3
_BF16_SHIFT = 16
LEVELS = (4, 2, 1, 0)  # integers are below; 1: all of them 1, and 0: all of them 0
POISONS = {"NaN": np.nan, "infinity": np.inf, "a large value": 1e30, "1000": 1e3}


def tolerance(spec: TensorSpec) -> float:
    return _TOLERANCES.get(spec.dtype, TOLERANCE)


def drawn(
    specs: Sequence[TensorSpec],
    rows: int,
    level: int,
    generator: np.random.Generator,
    examples: Mapping[str, Array],
    step: int,
) -> list[Array]:
    """[rows, *shape] each: of N(0, 0.3) or small integers, or of `examples` [steps, rows, *shape], other ones for every row."""
    found = []
    for spec in specs:
        if (given := examples.get(spec.name)) is not None:
            flat = given.reshape(-1, *spec.shape)
            found.append(flat[[(row * 7919 + step * given.shape[1] + row) % len(flat) for row in range(rows)]])
            continue
        shape = (rows, *spec.shape)
        if spec.is_float:
            found.append(of_floats(generator.standard_normal(shape) * _MAGNITUDE, spec))
        elif spec.dtype == "bool":
            found.append(generator.integers(0, 2, shape).astype(np.bool_))
        elif level > 1:
            found.append(generator.integers(0, level, shape).astype(spec.np_dtype))
        else:
            found.append(np.full(shape, level, spec.np_dtype))
    return found


def poisoned(array: Array, spec: TensorSpec, value: float) -> Array:
    """A copy whose second row is `value` throughout, or as large as the type has it."""
    copy = array.copy()
    row = np.full(spec.shape, value)
    copy[1] = of_floats(row, spec)
    return copy


def of_floats(values: NDArray[np.float64], spec: TensorSpec) -> Array:
    if spec.dtype == "bfloat16":
        bits: Array = (values.astype(np.float32).view(np.uint32) >> _BF16_SHIFT).astype(np.uint16)
        return bits
    if spec.dtype == "float16":
        values = np.where(np.isfinite(values), np.clip(values, -6e4, 6e4), values)
    return values.astype(spec.np_dtype)


def as_floats(array: Array, spec: TensorSpec) -> NDArray[np.float64]:
    if spec.dtype == "bfloat16":
        array = (array.astype(np.uint32) << _BF16_SHIFT).view(np.float32)
    return array.astype(np.float64)


def difference(got: Array, wanted: Array, spec: TensorSpec) -> float:
    """The largest |got - wanted| / max(1, |wanted|). 0: the same bits; infinite: of integers, or where one of both is NaN."""
    if got.shape != wanted.shape:
        return float("inf")
    if same_bits(got, wanted):
        return 0.0
    if not spec.is_float:
        return float("inf")
    one, other = as_floats(got, spec), as_floats(wanted, spec)
    with np.errstate(all="ignore"):
        distance = np.abs(one - other) / np.maximum(1.0, np.abs(other))
    distance[(one == other) | (np.isnan(one) & np.isnan(other))] = 0
    # Never 0 here, so that 0 means the same bits: zeros may have two signs.
    return max(float(np.nan_to_num(distance, nan=np.inf, posinf=np.inf).max()), float(np.finfo(np.float64).tiny))


def same_bits(one: Array, other: Array) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
