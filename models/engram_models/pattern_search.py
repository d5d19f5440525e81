"""Exact nearest patterns among many, by Hamming distance over the bits of a cue that are known. Used by patterns.py.

Every pattern p is kept as the code [p, not p]. A cue q with known bits m asks with [q and m, not q and m]: a known bit that
differs counts twice, an unknown one once whatever the pattern, so that the order is that of the distance over known bits
alone, and faiss finds it without knowing of masks.
"""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
from numpy.typing import NDArray

from engram_models.pattern_bits import unpack, width

_ROWS = 1 << 16
_GROWTH = 1.5
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


class PatternSearch:
    """The codes of a growing set of patterns of one size, in the order in which they came."""

    def __init__(self, size: int) -> None:
        self._size, self._bytes = size, width(size)
        self._valid = np.packbits(np.ones(size, np.bool_))
        self._codes = np.empty((0, 2 * self._bytes), np.uint8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes

    @property
    def bits(self) -> NDArray[np.uint8]:
        """[count, bytes], a view."""
        return self._codes[: self._count, : self._bytes]

    def add(self, bits: NDArray[np.uint8]) -> None:
        after = self._count + len(bits)
        if after > len(self._codes):
            codes = np.empty((max(after, int(self._count * _GROWTH)), 2 * self._bytes), np.uint8)
            codes[: self._count] = self._codes[: self._count]
            self._codes = codes
        new = self._codes[self._count : after]
        new[:, : self._bytes] = bits
        np.bitwise_and(~bits, self._valid, out=new[:, self._bytes :])
        self._count = after

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Forgets all others."""
        self._codes = self._codes[: self._count][chosen]
        self._count = len(self._codes)

    def nearest(self, cues: NDArray[np.int8], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For cues [n, size] of -1, 0, +1: the k nearest patterns' distances and places, [n, min(k, count)] each.

        By ascending distance over known bits; of equally near ones, the earlier stored come first.
        """
        # More threads than free cores would wait for one another; who has cores to spare runs several searches at once.
        faiss.omp_set_num_threads(1)
        found, places = faiss.knn_hamming(
            self._asked(cues), self._codes[: self._count], min(k, self._count), variant="mc"
        )
        unknown = (cues == 0).sum(1, dtype=np.int64)
        return (found.astype(np.int64) - unknown[:, None]) // 2, places

    def within(self, cue: NDArray[np.int8], distance: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """All patterns at most that far from one cue, in blocks: distances [m] and patterns [m, size]."""
        on, known = np.packbits(cue > 0), np.packbits(cue != 0)
        for start in range(0, self._count, _ROWS):
            bits = self.bits[start : start + _ROWS]
            distances = _ONES[(bits ^ on) & known].sum(1, dtype=np.int64)
            if (near := distances <= distance).any():
                yield distances[near], unpack(bits[near], self._size)

    def _asked(self, cues: NDArray[np.int8]) -> NDArray[np.uint8]:
        return np.concatenate((np.packbits(cues > 0, axis=1), np.packbits(cues < 0, axis=1)), axis=1)
