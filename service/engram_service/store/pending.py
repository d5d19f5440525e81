"""A commit on its way: what is still to be written of a job, and what of it may have been written already."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engram_service.store.generations import Mark
from engram_service.store.nodes import Node
from engram_service.store.types import UNACKNOWLEDGED, CommitJob, Verdict

_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)
_UNACKNOWLEDGED = UNACKNOWLEDGED.encode()


@dataclass(slots=True)
class Sent:
    """A job on its way: by node's name what failed; rows and buffers that were sent to each node, and what was known of its
    counter then."""

    pending: Pending
    failures: dict[str, str]
    parts: dict[Node, list[tuple[NDArray[np.intp], memoryview]]] = field(default_factory=dict)
    marks: dict[Node, Mark] = field(default_factory=dict)


class Pending:
    """A job, its records once they are packed, and which of its rows Redis has not settled yet."""

    def __init__(self, job: CommitJob) -> None:
        self.job = job
        # By node: ids of connections, whoever held them, that may still have commands of this job buffered.
        self.doubtful: defaultdict[str, list[int]] = defaultdict(list)
        self._attempts = 0
        # Rows that were sent, and of which Redis has not said what became.
        self.unknown = np.zeros(len(job.tags), np.bool_)
        self.doubted = np.zeros(len(job.tags), np.bool_)  # the same of earlier attempts
        self._open = np.ones(len(job.tags), np.bool_)
        self._packed: list[tuple[NDArray[np.intp], NDArray[np.uint8]]] = []

    def begin(self) -> None:
        """Another attempt: what was sent before without a word on it may have been written."""
        self.doubted |= self.unknown
        self.unknown[:] = False

    def backoff_s(self) -> float:
        """How long to wait after one more attempt has failed."""
        self._attempts += 1
        return _BACKOFF_S[min(self._attempts, len(_BACKOFF_S)) - 1]

    def blocks(self) -> list[tuple[NDArray[np.intp], NDArray[np.uint8]]]:
        """Rows still to be written, and their records, uint8 [rows, record bytes]."""
        if not self._packed:
            self._packed = [(rows, block.packed()) for rows, block in self.job.blocks()]
        if self._open.all():
            return self._packed
        return [(rows[left], values[left]) for rows, values in self._packed if (left := self._open[rows]).any()]

    def record(self, row: int) -> bytes:
        rows, values = next((rows, values) for rows, values in self._packed if row in rows)
        return bytes(values[np.flatnonzero(rows == row)[0]])

    def done(self, rows: NDArray[np.intp], verdict: Verdict) -> None:
        self._open[rows] = False
        self.job.done(rows, verdict)

    def written(self, rows: NDArray[np.intp], replies: list[bytes] | None) -> bool:
        """Tells the job of the rows that were written (None: all of them); whether they all were."""
        if replies is None:
            self.done(rows, Verdict.OK)
            return True
        self.unknown[rows] = [reply.endswith(_UNACKNOWLEDGED) for reply in replies]
        written = np.array([reply == b"+OK" for reply in replies], np.bool_)
        if written.any():
            self.done(rows[written], Verdict.OK)
        return bool(written.all())
