"""The nearest of many bit patterns, by counting bits with NumPy. Used by pattern_search.py where faiss is not installed.

Patterns are rows of whole uint64 words. What is looked at side by side is bounded, so that it stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Counts = NDArray[np.unsignedinteger]

WORD_BITS = 64
_TILE = 1 << 15  # words in work at a time
_ROWS = 1 << 13  # patterns in a tile of several cues
_DISTANCES = 1 << 20  # of all cues in work: cues by patterns
_FEW_WORDS = 16  # of a pattern: with more of them it is quicker to go along the pattern than across all patterns
_SHARES = 64  # the places are dealt into so many times fewer shares to find out what is near
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def looked_up(words: Words) -> NDArray[np.uint8]:
    """`ones` where NumPy is older than 2."""
    counts: NDArray[np.uint8] = _ONES[words.view(np.uint8)].reshape(*words.shape, 8).sum(-1, dtype=np.uint8)
    return counts


ones: Callable[[Words], NDArray[np.uint8]] = getattr(np, "bitwise_count", looked_up)
"""How many bits are 1 in each word."""


def distances(patterns: Words, on: Words, known: Words) -> Counts:
    """Known bits in which patterns [P, W] and cues [n, W] differ, [n, P]."""
    words = patterns.shape[1]
    found: Counts = np.zeros((len(on), len(patterns)), np.uint16 if words * WORD_BITS < 1 << 16 else np.uint32)
    rows = max(1, min(_ROWS, _TILE // words)) if words > _FEW_WORDS else _ROWS
    cues = max(1, _TILE // (rows * (words if words > _FEW_WORDS else 1)))
    for row in range(0, len(patterns), rows):
        block = patterns[row : row + rows]
        for cue in range(0, len(on), cues):
            part = found[cue : cue + cues, row : row + rows]
            if words > _FEW_WORDS:
                differing = (block ^ on[cue : cue + cues, None]) & known[cue : cue + cues, None]
                ones(differing).sum(2, out=part, dtype=part.dtype)
            else:
                for word in range(words):
                    differing = block[:, word] ^ on[cue : cue + cues, None, word]
                    differing &= known[cue : cue + cues, None, word]
                    part += ones(differing)
    return found


def nearest(patterns: Words, on: Words, known: Words, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each cue the k <= P nearest patterns' distances and places, [n, k]; of equally near ones the earlier first."""
    found, places = np.empty((2, len(on), k), np.int64)
    if not k:
        return found, places
    cues = max(1, _DISTANCES // max(1, len(patterns)))
    for start in range(0, len(on), cues):
        part = slice(start, start + cues)
        away = distances(patterns, on[part], known[part])
        for cue, (row, bound) in enumerate(zip(away, _bounds(away, k), strict=True), start):
            near = np.flatnonzero(row <= bound)
            places[cue] = near[np.argsort(row[near], kind="stable")[:k]]
            found[cue] = row[places[cue]]
    return found, places


def _bounds(away: Counts, k: int) -> Counts:
    """For each row of distances [n, P] one that at least k of them are within, and few others."""
    share = away.shape[1] // _SHARES
    # The least of each share is k different places' at least.
    near = away[:, : share * _SHARES].reshape(len(away), _SHARES, share).min(1) if share >= k else away
    bounds: Counts = np.partition(near, k - 1, axis=1)[:, k - 1]
    return bounds
