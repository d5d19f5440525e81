"""Interval commits: sessions that are ahead of their records, written in slices, behind the commits of steps. Event loop only."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.sessions.table import References, SessionTable
from engram_service.steps.commits import Commits
from engram_service.store import Verdict

log = logging.getLogger(__name__)

_SLICE = 256  # sessions that are packed and sent between two batches

Flushed = Callable[[References, NDArray[np.uint64], Verdict], None]


class Flushes:
    """Those that wait, and are pinned by the table's column `flushing`."""

    def __init__(self, table: SessionTable, commits: Commits) -> None:
        self._table = table
        self._commits = commits
        self._waiting: deque[tuple[Served, References]] = deque()
        self.on_flushed: Flushed = lambda sessions, seqs, verdict: None
        self.on_add: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, served: Served, sessions: References) -> None:
        for start in range(0, len(sessions), _SLICE):
            self._waiting.append((served, sessions[start : start + _SLICE]))
        self.on_add()

    def send(self) -> None:
        """The next slice, if there is one and a line for it."""
        if not self._waiting or self._commits.full:
            return
        served, sessions = self._waiting.popleft()
        table = self._table
        here = table.slot[sessions.rows] >= 0
        if not here.all():
            self.on_flushed(sessions[~here], table.durable[sessions.rows[~here]], Verdict.OK)
            sessions = sessions[here]
        if not len(sessions):
            return
        seqs = table.computed[sessions.rows]

        def done(rows: NDArray[np.intp], verdict: Verdict) -> None:
            self.on_flushed(sessions[rows], seqs[rows], verdict)

        try:
            written = self._commits.send(served, sessions.rows, seqs, [], done, 0.0, busy=False)
        except Exception:
            log.exception("a flush of %s could not be put together; it is tried again", served.reference)
            self.on_flushed(sessions, table.durable[sessions.rows], Verdict.OK)  # no further than before
            return
        if written:
            self.on_flushed(sessions, seqs, Verdict.OK)
