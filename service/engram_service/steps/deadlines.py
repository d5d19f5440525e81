"""Rows whose time is up, and how fast rows are done. Event loop only."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from engram_service.condition import Condition
from engram_service.pauses import Pauses
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions.table import SessionTable
from engram_service.steps.advance import Advance, Advances
from engram_service.steps.answers import Answers
from engram_service.steps.backlog import Backlog
from engram_service.steps.repeats import Repeats
from engram_service.steps.withdrawal import Withdrawal

_SWEEP_S = 0.02


class Deadlines:
    """Looks at all rows a few dozen times a second."""

    def __init__(
        self, scheduler: Scheduler, advances: Advances, repeats: Repeats, withdrawal: Withdrawal, answers: Answers,
        table: SessionTable, condition: Condition, pauses: Pauses, backlog: Backlog,
    ) -> None:  # fmt: skip
        self._scheduler = scheduler
        self._advances = advances
        self._repeats = repeats
        self._withdrawal = withdrawal
        self._answers = answers
        self._table = table
        self._condition = condition
        self._pauses = pauses
        self._backlog = backlog

    async def sweep(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now, waiting = time.monotonic(), self._scheduler.waiting_rows
            if not self._condition.store_trouble:
                self._backlog.observe(now, self._answers.count, waiting)
            if waiting:
                self._withdrawal.late(now)
            for advance in self._advances.late(now):
                self._expire(advance, now)
            self._repeats.expire(now)
            self._pauses.forget(now)

    def _expire(self, advance: Advance, now: float) -> None:
        """Answers rows whose commit did not come in time; should it come later, their seqs can be asked for again."""
        steps = advance.batch.steps
        if advance.answered is None:
            advance.answered = np.zeros(len(steps), np.bool_)
        committing = np.isin(steps.rows, advance.sessions)
        late = (steps.deadlines < now) & committing & (self._table.applied[steps.rows] < steps.seqs)
        index = np.flatnonzero(late & ~advance.answered)
        if len(index):
            self._answers.refuse_all(steps[index], self._condition.late())
            advance.answered[index] = True
