"""Rows: the tensors of one step's input or output as bytes, one after the other. Used by steps/, protocols/ and sessions/.

Tensors are reached by slices of bytes, for all rows at once. Floats here are the protocol's `repeated float`: float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.spec import FLOATS, TensorSpec

_NAMED_MAX = 8  # tensors that a message names
_BFLOAT16_EXPONENT = 0x7F80
_BFLOAT16_NAN = 0x7FC0

_Bad = Callable[[NDArray[np.uint8], str], NDArray[np.bool_]]
Fault = tuple[NDArray[np.bool_], str, str]  # which rows, the reason, and what is said


class Rows:
    """What rows of these tensors are made of."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.nbytes = sum(spec.nbytes for spec in specs)
        self.size = sum(spec.size for spec in specs)
        ends = list(accumulate(spec.nbytes for spec in specs))
        self.slices = [slice(end - spec.nbytes, end) for end, spec in zip(ends, specs, strict=True)]
        # Neighbours of one dtype are looked at together: usually that is the whole row.
        self._floats = _joined(zip(self.slices, specs, strict=True), FLOATS)
        self._bools = _joined(zip(self.slices, specs, strict=True), ("bool",))
        whole = len(self._floats) == 1 and self._floats[0][0] == slice(0, self.nbytes)
        self._whole = np.dtype(self._floats[0][1]) if whole and self._floats[0][1] != "bfloat16" else None
        self.float_nbytes = 0 if self._whole is None else self._whole.itemsize
        """Of a number, where the whole row is of such as NumPy has."""

    def __str__(self) -> str:
        """float32[8] of one tensor; obs float32[12], gap float32[] of several."""
        if len(self.specs) == 1:
            return _form(self.specs[0])
        named = [f"{spec.name} {_form(spec)}" for spec in self.specs[:_NAMED_MAX]]
        if len(self.specs) > _NAMED_MAX:
            named.append(f"and {len(self.specs) - _NAMED_MAX} more")
        return ", ".join(named) or "nothing"

    def shape(self, rows: int) -> tuple[int, ...]:
        """Of so many rows as one array: of several tensors, their elements one after the other."""
        return (rows, *self.specs[0].shape) if len(self.specs) == 1 else (rows, self.size)

    def faults(self, rows: NDArray[np.uint8], non_finite: bool) -> list[Fault]:
        """What is wrong with contiguous rows uint8 [n, nbytes]; nothing as a rule. With `non_finite`, NaN and infinity are not."""
        if self._whole is not None and (non_finite or _all(np.isfinite(rows.view(self._whole)))):
            return []
        faults: list[Fault] = []
        if not non_finite and (bad := self._not_finite(rows)) is not None:
            which = self._names(rows, FLOATS, _not_finite)
            faults.append(
                (bad, "NON_FINITE_INPUT", f"the input{which} has NaN or infinity, which this model does not allow")
            )
        for at, _ in self._bools:
            if (wrong := _some(rows[:, at] > 1)) is not None:
                which = self._names(rows, ("bool",), lambda block, dtype: block > 1)
                message = f"the input{which} is bool, a byte of 0 or 1, and has others"
                faults.append((wrong, "INVALID_INPUT_DTYPE", message))
        return faults

    def _not_finite(self, rows: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
        """Rows with NaN or infinity; None where there are none."""
        found: NDArray[np.bool_] | None = None
        for at, dtype in self._floats:
            if (bad := _some(_not_finite(rows[:, at], dtype))) is not None:
                found = bad if found is None else found | bad
        return found

    def _names(self, rows: NDArray[np.uint8], dtypes: Sequence[str], bad: _Bad) -> str:
        """The tensors with a fault, where there are several."""
        if len(self.specs) == 1:
            return ""
        named = [
            spec.name
            for spec, at in zip(self.specs, self.slices, strict=True)
            if spec.dtype in dtypes and spec.nbytes and bad(rows[:, at], spec.dtype).any()
        ]
        return " " + ", ".join(named[:_NAMED_MAX])

    def of_floats(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Numbers, float32 [n, size], as rows uint8 [n, nbytes]. Raises ValueError where one is none of its tensor's dtype."""
        rows = np.empty((len(values), self.nbytes), np.uint8)
        start = 0
        for spec, at in zip(self.specs, self.slices, strict=True):
            block = _cast(np.ascontiguousarray(values[:, start : start + spec.size]), spec)
            if spec.nbytes:
                rows[:, at] = block.view(np.uint8)
            start += spec.size
        return rows

    def as_floats(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows uint8 [n, nbytes] as numbers, float32 [n, size]."""
        values = np.empty((len(rows), self.size), np.float32)
        start = 0
        for spec, at in zip(self.specs, self.slices, strict=True):
            if not spec.size:
                continue
            block = np.ascontiguousarray(rows[:, at]).view(spec.np_dtype)
            if spec.dtype == "bfloat16":
                block = (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # a float64 may be beyond them
                values[:, start : start + spec.size] = block
            start += spec.size
        return values


@lru_cache(256)
def rows_of(specs: tuple[TensorSpec, ...]) -> Rows:
    return Rows(specs)


def _form(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


def _joined(tensors: Iterable[tuple[slice, TensorSpec]], dtypes: Sequence[str]) -> list[tuple[slice, str]]:
    """The slices of tensors of these dtypes; those that follow one upon the other and are of one dtype as one."""
    joined: list[tuple[slice, str]] = []
    for at, spec in tensors:
        if not spec.nbytes or spec.dtype not in dtypes:
            continue
        if joined and joined[-1][0].stop == at.start and joined[-1][1] == spec.dtype:
            joined[-1] = (slice(joined[-1][0].start, at.stop), spec.dtype)
        else:
            joined.append((at, spec.dtype))
    return joined


def _all(mask: NDArray[np.bool_]) -> bool:
    """As mask.all(), which takes several times as long for few."""
    return bool(np.count_nonzero(mask) == mask.size)


def _some(bad: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Rows of [n, k] with one that is bad; None where there are none."""
    if not bad.any():
        return None
    rows: NDArray[np.bool_] = np.logical_or.reduce(bad, axis=1)
    return rows


def _not_finite(block: NDArray[np.uint8], dtype: str) -> NDArray[np.bool_]:
    """Which numbers of a float dtype are NaN or infinity."""
    block = np.ascontiguousarray(block)
    bad: NDArray[np.bool_]
    if dtype == "bfloat16":
        bad = (block.view(np.uint16) & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT  # exponent bits all set
    else:
        bad = ~np.isfinite(block.view(dtype))
    return bad


def _cast(values: NDArray[np.float32], spec: TensorSpec) -> NDArray[Any]:
    """float32 [n, size] as the tensor's dtype: of floats the nearest one, of whole numbers and bools the same or none."""
    if spec.dtype == "bfloat16":
        bits = values.view(np.uint32)
        nearest = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        return np.where(np.isnan(values), _BFLOAT16_NAN, nearest).astype(np.uint16)
    if spec.is_float:
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # then it is infinity, which is refused where it is not allowed
            return values.astype(spec.np_dtype)
    low, high = (0.0, 2.0) if spec.dtype == "bool" else _bounds(spec)
    good = (values >= low) & (values < high) & (np.trunc(values) == values)
    if not good.all():
        raise ValueError(f"{spec.name} is {_form(spec)}, and {values[~good][0]:g} is none of {spec.dtype}")
    return values.astype(spec.np_dtype)


def _bounds(spec: TensorSpec) -> tuple[float, float]:
    """The least whole number of a dtype, and the first above the greatest."""
    limits = np.iinfo(spec.np_dtype)
    return float(limits.min), float(limits.max) + 1.0
