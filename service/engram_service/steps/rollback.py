"""Sessions of a batch that failed go back to their records; their clients may send the same steps again. Event loop only."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.errors import InternalError, ServiceError
from engram_service.observability.metrics import Metrics
from engram_service.runtimes.base import RuntimeStoppedError
from engram_service.scheduling.columns import Steps
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import References, SessionTable
from engram_service.steps.answers import Answers
from engram_service.steps.repeats import Repeats
from engram_service.steps.withdrawal import Withdrawal

_LOOK_S = 0.005


class Rollback:
    """Of sessions that are pinned, for they are in a batch."""

    def __init__(
        self, table: SessionTable, pins: Pins, residency: Residency, repeats: Repeats, withdrawal: Withdrawal,
        answers: Answers, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._table = table
        self._pins = pins
        self._residency = residency
        self._repeats = repeats
        self._withdrawal = withdrawal
        self._answers = answers
        self._metrics = metrics

    def of(self, served: Served, steps: Steps, why: ServiceError) -> None:
        """These steps are refused, and what waits behind them."""
        rows = np.unique(steps.rows)
        sessions, flushing = self._table.refer(rows), bool(self._table.flushing[rows].any())
        if not flushing:
            self._rewind(served, rows, why)
        self._metrics.steps.labels(served.bundle.name, why.reason.lower()).inc(len(steps))
        self._answers.refuse_all(steps, why)
        self._repeats.refuse(sessions, why)
        if flushing:  # how far the records are is not known before that has ended
            self._when_flushed(served, sessions, why)
        else:
            self._let_on(rows)

    def _when_flushed(self, served: Served, sessions: References, why: ServiceError) -> None:
        if self._table.flushing[sessions.rows].any():
            asyncio.get_running_loop().call_later(_LOOK_S, self._when_flushed, served, sessions, why)
            return
        self._rewind(served, sessions.rows, why)
        self._let_on(sessions.rows)

    def _rewind(self, served: Served, rows: NDArray[np.int32], why: ServiceError) -> None:
        self._residency.forget_slots(served, rows)
        self._withdrawal.of_sessions(rows, why)
        for figures in (self._table.admitted, self._table.computed, self._table.applied):
            figures[rows] = self._table.durable[rows]

    def _let_on(self, rows: NDArray[np.int32]) -> None:
        self._pins.release(rows)
        self._residency.serve_wanting()


def failure(served: Served, error: Exception) -> InternalError:
    """What is told to steps that a model failed on."""
    failed = f"model {served.reference} failed on this session's input: {type(error).__name__}"
    what = str(error) if isinstance(error, RuntimeStoppedError) else failed
    return InternalError("INTERNAL", f"{what}; nothing was applied", model=served.bundle.name)
