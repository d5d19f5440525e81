"""Puts together what a commit writes: header, state and the outputs that the client has not acknowledged."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.store import RecordBlock


def pack_records(
    served: Served,
    slots: NDArray[np.int32],
    seqs: NDArray[np.uint64],
    acked: NDArray[np.uint64],
    epochs: NDArray[np.uint64],
    states: list[NDArray[np.uint8]],
) -> list[tuple[NDArray[np.intp], RecordBlock]]:
    """Records of sessions as blocks of equal length, with the rows of each.

    Rows are put together by how many outputs they keep, rounded up to a power of two, so that a block packs as one array.
    """
    arena = served.arena
    # The newest output, where there is one, is always kept: a session that runs on its own output needs it.
    counts = np.minimum(np.clip(seqs - acked, 1, arena.window), seqs).astype(np.uint32)
    now_ms = int(time.time() * 1000)
    blocks: list[tuple[NDArray[np.intp], RecordBlock]] = []
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


def _by_capacity(counts: NDArray[np.uint32]) -> list[tuple[NDArray[np.intp], int]]:
    capacity = 1
    groups: list[tuple[NDArray[np.intp], int]] = []
    if counts.max() == 1:
        return [(np.arange(len(counts)), 1)]
    while True:
        rows = np.flatnonzero((counts <= capacity) & (counts > capacity // 2))
        if len(rows):
            groups.append((rows, capacity))
        if capacity >= counts.max():
            return groups
        capacity *= 2


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
