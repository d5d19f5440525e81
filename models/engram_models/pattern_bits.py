"""Patterns as bits: packing, unpacking and what is refused. Used by patterns.py, and by whoever keeps patterns elsewhere.

A pattern has N units of -1 or +1. It is kept as ceil(N / 8) bytes in the order of numpy.packbits, +1 as 1, padded with 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS = 1 << 16  # unpacked at a time, so that a large store does not stand in memory eight times over


class PatternError(ValueError):
    """Patterns, labels or cues that cannot be taken. `reason` is for programs; the message names the row and what to do.

    INVALID_PATTERN, DUPLICATE_LABEL, UNKNOWN_LABEL, MEMORY_FULL, EMPTY_MEMORY or CUE_ALL_MASKED.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def width(size: int) -> int:
    """Bytes of one packed pattern."""
    return -(-size // 8)


def pack(patterns: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """Patterns [n, size] of any number type, each row of -1 and +1 or of 0 and 1, as bits [n, ceil(size / 8)].

    Raises PatternError INVALID_PATTERN for another width, other values, or a row with both 0 and -1.
    """
    patterns = _matrix(patterns, size, "pattern")
    bits = np.empty((len(patterns), width(size)), np.uint8)
    for start in range(0, len(patterns), _ROWS):
        rows = patterns[start : start + _ROWS]
        on, zero, minus = rows == 1, rows == 0, rows == -1
        _refuse(rows, ~(on | zero | minus), start, "pattern", "-1 and +1, or 0 and 1")
        if (mixed := (zero.any(1) & minus.any(1))).any():
            row = start + int(mixed.argmax())
            raise PatternError("INVALID_PATTERN", f"pattern {row} has both 0 and -1; give -1 and +1, or 0 and 1")
        bits[start : start + _ROWS] = np.packbits(on, axis=1)
    return bits


def unpack(bits: NDArray[np.uint8], size: int) -> NDArray[np.int8]:
    """Bits [n, ceil(size / 8)] as patterns [n, size] of -1 and +1."""
    return np.unpackbits(bits, axis=1, count=size).view(np.int8) * np.int8(2) - np.int8(1)


def check_bits(bits: NDArray[np.uint8], size: int) -> None:
    """Raises PatternError INVALID_PATTERN where bits are not packed patterns of this size."""
    if bits.ndim != 2 or bits.shape[1] != width(size) or bits.dtype != np.uint8:
        raise PatternError(
            "INVALID_PATTERN", f"bits are {bits.dtype} {list(bits.shape)}; {size} units are uint8 [n, {width(size)}]"
        )
    if size % 8 and (padded := bits[:, -1] & (0xFF >> size % 8) != 0).any():
        raise PatternError(
            "INVALID_PATTERN", f"pattern {int(padded.argmax())} has bits beyond its {size} units; set them to 0"
        )


def checked_cues(cues: NDArray[Any], size: int) -> NDArray[np.int8]:
    """Cues [n, size] of -1, 0 and +1, where 0 is an unknown unit. Raises PatternError INVALID_PATTERN, CUE_ALL_MASKED."""
    cues = _matrix(cues, size, "cue")
    known = (cues == 1) | (cues == -1)
    _refuse(cues, ~(known | (cues == 0)), 0, "cue", "-1, +1, and 0 for what is unknown")
    if not (some := known.any(1)).all():
        row = int(some.argmin())
        raise PatternError("CUE_ALL_MASKED", f"cue {row} is unknown in all its {size} units; give at least one")
    return cues.astype(np.int8)


def _matrix(values: NDArray[Any], size: int, what: str) -> NDArray[Any]:
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise PatternError("INVALID_PATTERN", f"{what}s are {values.dtype}; give numbers")
    if values.ndim != 2 or values.shape[1] != size:
        raise PatternError("INVALID_PATTERN", f"{what}s have shape {list(values.shape)}; [n, {size}] is expected")
    return values


def _refuse(rows: NDArray[Any], bad: NDArray[np.bool_], start: int, what: str, allowed: str) -> None:
    if bad.any():
        row, unit = (int(place) for place in np.argwhere(bad)[0])
        raise PatternError(
            "INVALID_PATTERN", f"{what} {start + row} has {rows[row, unit]} at unit {unit}; units are {allowed}"
        )
