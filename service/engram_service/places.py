"""Rows of a column, in the way that costs least: where the extension is here, with one call of it for a dozen of NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import engram_native
except ImportError:  # there is no wheel for this platform, and nobody has built it
    NATIVE = False
else:
    NATIVE = True


def at(rows: NDArray[Any]) -> NDArray[Any] | slice:
    """An index of these rows, none of which is negative. Of one row it is a slice: NumPy gets a view then, at a tenth of what it
    takes to copy by an array of one number."""
    if len(rows) != 1:
        return rows
    row = rows.item()
    return slice(row, row + 1)


def seize(busy: NDArray[np.bool_], rows: NDArray[np.int32], deadlines: NDArray[np.float64], now: float) -> bool:
    """Marks rows in `busy`, if none of them is marked, none stands there twice, and no deadline lies before `now`. False: nothing
    was done."""
    if NATIVE:
        return engram_native.seize(busy.view(np.uint8), rows, deadlines, now)
    free = not np.count_nonzero(busy[rows]) and not np.count_nonzero(deadlines < now) and distinct(rows, len(busy))
    if free:
        busy[rows] = True
    return free


def keep(
    rings: NDArray[np.uint8], slots: NDArray[np.int32], seqs: NDArray[np.uint64], outputs: NDArray[np.uint8]
) -> None:  # fmt: skip
    """Puts outputs, uint8 [n, nbytes], into the rings of slots, uint8 [slots, window, nbytes], each where its seq belongs."""
    if NATIVE:
        engram_native.keep(rings, rings.shape[1], slots, seqs, outputs)
    else:
        rings[slots, seqs % np.uint64(rings.shape[1])] = outputs


def distinct(rows: NDArray[np.int32], size: int) -> bool:
    """Whether no row, of a table of this size, stands twice."""
    places = np.arange(len(rows))
    last = np.empty(size, np.intp)
    last[rows] = places
    return bool(np.count_nonzero(last[rows] == places) == len(rows))
