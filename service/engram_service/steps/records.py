"""Puts together what a commit writes: header, state and the outputs that the client has not acknowledged."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.store import Blocks, RecordBlock


def pack_records(
    served: Served,
    slots: NDArray[np.int32],
    seqs: NDArray[np.uint64],
    acked: NDArray[np.uint64],
    epochs: NDArray[np.uint64],
    states: list[NDArray[np.uint8]],
) -> Blocks:
    """Records of sessions as blocks of equal length, with the rows of each.

    Rows are put together by how many outputs they keep, rounded up to a power of two, so that a block packs as one array.
    """
    counts = _counts(served, seqs, acked)
    now_ms = int(time.time() * 1000)
    blocks: Blocks = []
    for rows, capacity in _by_capacity(np.maximum(counts, 1)):
        if len(rows) == len(counts):
            outputs = _outputs(served, slots, seqs, counts, capacity)
            return [(rows, RecordBlock(served.layout, seqs, acked, epochs, states, counts, outputs, now_ms))]
        kept = counts[rows]
        outputs = _outputs(served, slots[rows], seqs[rows], kept, capacity)
        parts = [block[rows] for block in states]
        blocks.append(
            (rows, RecordBlock(served.layout, seqs[rows], acked[rows], epochs[rows], parts, kept, outputs, now_ms))
        )
    return blocks


def nbytes_of(served: Served, seqs: NDArray[np.uint64], acked: NDArray[np.uint64]) -> int:
    """Bytes of these sessions' records."""
    rows = np.bincount(_counts(served, seqs, acked)).tolist()
    return sum(many * served.layout.record_nbytes(_capacity(count)) for count, many in enumerate(rows) if many)


def _counts(served: Served, seqs: NDArray[np.uint64], acked: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """How many outputs a record keeps. The newest, where there is one, always: a session that runs on its own output needs it."""
    counts: NDArray[np.uint32] = np.minimum(np.clip(seqs - acked, 1, served.arena.window), seqs).astype(np.uint32)
    return counts


def _by_capacity(counts: NDArray[np.uint32]) -> list[tuple[NDArray[np.intp], int]]:
    if counts.max() == 1:
        return [(np.arange(len(counts)), 1)]
    capacities = np.array([_capacity(count) for count in range(int(counts.max()) + 1)])[counts]
    return [(np.flatnonzero(capacities == capacity), capacity) for capacity in np.unique(capacities).tolist()]


def _capacity(count: int) -> int:
    """For how many outputs a record has room that keeps so many: a power of two."""
    return 1 << max(0, count - 1).bit_length()


def _outputs(
    served: Served, slots: NDArray[np.int32], seqs: NDArray[np.uint64], counts: NDArray[Any], capacity: int
) -> NDArray[np.uint8]:
    """Kept outputs, oldest first, uint8 [n, capacity, output_nbytes]; rows beyond a session's count are zero."""
    place = np.arange(capacity, dtype=np.uint64)
    first = seqs - counts.astype(np.uint64) + np.uint64(1)
    outputs = served.arena.kept(slots[:, None], first[:, None] + place)
    if capacity > 1 or not counts.all():
        outputs[place[None, :] >= counts[:, None]] = 0
    return outputs
