"""Exact nearest patterns among many, by Hamming distance over the bits of a cue that are known. Used by patterns.py.

faiss searches where it is installed, NumPy (pattern_counting.py) where it is not: both find the same. For faiss every pattern p is
kept as the code [p, not p]. A cue q with known bits m asks with [q and m, not q and m]: a known bit that differs counts twice,
an unknown one once whatever the pattern, so that the order is that of the distance over known bits alone, and faiss finds it
without knowing of masks. NumPy needs the first half alone. A recall among 10,000 or 100,000 patterns of 256 or 1,024 bits takes it
one to three times as long.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_models.pattern_bits import unpack, width
from engram_models.pattern_counting import WORD_BITS, Words, distances, nearest

_ROWS = 1 << 16
_GROWTH = 1.5
_MANY = 10_000  # patterns: with fewer it is all one

log = logging.getLogger(__name__)


class PatternSearch:
    """The codes of a growing set of patterns of one size, in the order in which they came."""

    def __init__(self, size: int) -> None:
        self._size, self._bytes, self._words = size, width(size), -(-size // WORD_BITS)
        self._twofold = find_spec("faiss") is not None
        self._codes = np.empty((0, self._words * (2 if self._twofold else 1)), np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes

    @property
    def bits(self) -> NDArray[np.uint8]:
        """[count, bytes], a view."""
        return self._codes[: self._count].view(np.uint8)[:, : self._bytes]

    def add(self, bits: NDArray[np.uint8]) -> None:
        after = self._count + len(bits)
        if after > len(self._codes):
            codes = np.empty((max(after, int(self._count * _GROWTH)), self._codes.shape[1]), np.uint64)
            codes[: self._count] = self._codes[: self._count]
            self._codes = codes
        new = self._codes[self._count : after]
        new[:, : self._words] = self._worded(bits)
        if self._twofold:
            valid = self._worded(np.packbits(np.ones((1, self._size), np.bool_), axis=1))
            np.bitwise_and(~new[:, : self._words], valid, out=new[:, self._words :])
        self._count = after

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Forgets all others."""
        self._codes = self._codes[: self._count][chosen]
        self._count = len(self._codes)

    def nearest(self, cues: NDArray[np.int8], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For cues [n, size] of -1, 0, +1: the k nearest patterns' distances and places, [n, min(k, count)] each.

        By ascending distance over known bits; of equally near ones, the earlier stored come first.
        """
        on, k = self._worded(np.packbits(cues > 0, axis=1)), min(k, self._count)
        if not self._twofold or (faiss := _faiss()) is None:
            if self._count > _MANY:
                _tell()
            return nearest(self._patterns, on, self._worded(np.packbits(cues != 0, axis=1)), k)
        # More threads than free cores would wait for one another; who has cores to spare runs several searches at once.
        faiss.omp_set_num_threads(1)
        asked = np.concatenate((on, self._worded(np.packbits(cues < 0, axis=1))), axis=1)
        codes = self._codes[: self._count]
        found, places = faiss.knn_hamming(asked.view(np.uint8), codes.view(np.uint8), k, variant="mc")
        unknown = (cues == 0).sum(1, dtype=np.int64)
        return (found.astype(np.int64) - unknown[:, None]) // 2, places

    def within(self, cue: NDArray[np.int8], distance: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """All patterns at most that far from one cue, in blocks: distances [m] and patterns [m, size]."""
        on, known = (self._worded(np.packbits(bits[None], axis=1)) for bits in (cue > 0, cue != 0))
        for start in range(0, self._count, _ROWS):
            away = distances(self._patterns[start : start + _ROWS], on, known)[0]
            if (near := away <= distance).any():
                yield away[near].astype(np.int64), unpack(self.bits[start : start + _ROWS][near], self._size)

    @property
    def _patterns(self) -> Words:
        return self._codes[: self._count, : self._words]

    def _worded(self, bits: NDArray[np.uint8]) -> Words:
        """Bits [n, bytes] in whole words, [n, words]."""
        whole = np.zeros((len(bits), self._words), np.uint64)
        whole.view(np.uint8)[:, : self._bytes] = bits
        return whole


@cache
def _faiss() -> Any:
    """The module; None where it cannot be imported."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


@cache
def _tell() -> None:
    """Once in a process."""
    log.info("many patterns are searched without faiss; pip install 'engram[faiss]' makes it quicker")
