"""The step loop: what happens between the arrival of steps and their answers, in the order in which it happens.

    take -> admit -> schedule -> advance -> commit -> answer

One turn is a callback of the event loop; what belongs to sessions' lives (opens, closes, loads, evictions) are coroutines that run
between two turns. This thread is the only owner of session table, handles and arenas: there are no locks and no hand-overs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Catalog, Served
from engram_service.errors import InternalError, ServiceError
from engram_service.observability.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.runtimes.base import RuntimeStoppedError
from engram_service.scheduling.scheduler import Batch, Scheduler
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import SessionTable
from engram_service.steps.admission import Admission
from engram_service.steps.advance import Advance, Advances
from engram_service.steps.answers import Answers
from engram_service.steps.commits import Commits
from engram_service.steps.computing import advance
from engram_service.steps.flushes import Flushes
from engram_service.steps.refusals import uncommitted
from engram_service.steps.repeats import Repeats
from engram_service.steps.rollback import Rollback, failure
from engram_service.steps.withdrawal import Withdrawal
from engram_service.store import Verdict
from engram_service.wire.base import PREFILL, Event, Wire

log = logging.getLogger(__name__)

_AGAIN_S = 0.05  # after a turn that failed


class StepLoop:
    """Takes what the wire has, and answers it."""

    def __init__(
        self, wire: Wire, events: Callable[[Event], None], admission: Admission, scheduler: Scheduler, catalog: Catalog,
        table: SessionTable, commits: Commits, flushes: Flushes, answers: Answers, advances: Advances, repeats: Repeats,
        residency: Residency, pins: Pins, ownership: Ownership, withdrawal: Withdrawal, rollback: Rollback, pauses: Pauses,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._wire = wire
        self._events = events
        self._admission = admission
        self._scheduler = scheduler
        self._catalog = catalog
        self._table = table
        self._commits = commits
        self._flushes = flushes
        self._answers = answers
        self._advances = advances
        self._repeats = repeats
        self._residency = residency
        self._pins = pins
        self._ownership = ownership
        self._withdrawal = withdrawal
        self._rollback = rollback
        self._pauses = pauses
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._due = False  # a turn is going to be

    def start(self) -> None:
        self._admission.on_admit = self._pins.on_release = self._commits.on_free = self._flushes.on_add = self.wake
        self._commits.open()
        self._wire.start(self.wake)
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self.turn)

    def turn(self) -> None:
        """All that has come is let in, and one batch of what is ready is computed, committed and answered."""
        self._due = False
        try:
            self._turn(time.monotonic())
        except Exception:  # which the loop tells of; what was let in must not wait for the next that comes
            self._loop.call_later(_AGAIN_S, self.wake)
            raise

    def _turn(self, began: float) -> None:
        arrived, events = self._wire.take()
        done = 0
        for before, event in events:
            if arrived is not None and before > done:
                self._admission.admit(arrived.part(done, before), began)
                done = before
            self._events(event)
        if arrived is not None and done < len(arrived):
            self._admission.admit(arrived.part(done, len(arrived)), began)

        batch = self._next_batch(began)
        if batch is not None:
            served, steps = batch
            if (computed := self._advance(served, steps)) is not None:
                self._answer_volatile(computed)
                self._commit(computed)
        self._flushes.send()
        if batch is not None or arrived is not None or events or (self._flushes and not self._commits.full):
            self.wake()
            self._metrics.loop_busy_seconds.inc(time.monotonic() - began)

    def _next_batch(self, now: float) -> tuple[Served, Batch] | None:
        """The next batch and its model, if there is a line to Redis for its commit."""
        if self._commits.full:
            return None
        for model in self._scheduler.models():
            if self._pauses.bars(model, running=False):
                continue
            served = self._catalog.models[model]
            if (batch := self._scheduler.next(model, self._table.busy, served.rows_max, now)) is not None:
                return served, batch
        return None

    def _advance(self, served: Served, batch: Batch) -> Advance | None:
        """Computes a batch; None: the model failed on all of it."""
        began = time.monotonic()
        try:
            computed = advance(served, self._table, batch)
        except Exception as error:  # the model's own failure; the loop must live on
            log.exception("a batch of %s failed", served.reference)
            if isinstance(error, RuntimeStoppedError):
                self._pauses.stopped(served, began)
            self._rollback.of(served, batch.steps, failure(served, error))
            if pause := self._pauses.refusal(served.index):  # what waits would be late
                self._withdrawal.of_model(served.index, pause)
            return None
        self._observe(computed)
        if computed.good is not None and computed.error is not None:
            log.warning("rows of a batch of %s failed, the others did not: %s", served.reference, computed.error)
            self._go_back(computed, np.setdiff1d(np.arange(len(batch)), computed.good), failure(served, computed.error))
        return computed

    def _answer_volatile(self, computed: Advance) -> None:
        """Rows of durability interval are answered before they are in Redis."""
        table, steps = self._table, computed.batch.steps
        interval = table.interval[steps.rows]
        if not interval.any():
            return
        index = np.flatnonzero(interval) if computed.good is None else computed.good[interval[computed.good]]
        last = computed.last[interval[computed.last]]
        sessions = steps.rows[last]
        clean = table.durable[sessions] == table.applied[sessions]
        table.dirty_since[sessions[clean]] = self._residency.clock()
        self._answer(computed, last, index, computed.computed)
        self._residency.flush_due(computed.served, sessions)
        kept = ~interval[computed.last]
        computed.last, computed.states = computed.last[kept], [block[kept] for block in computed.states]

    def _commit(self, computed: Advance) -> None:
        """What is left is answered when Redis has it."""
        if not len(computed.last):
            return
        steps = computed.batch.steps
        sessions = self._table.refer(steps.rows[computed.last])
        computed.committing = computed.last

        def done(rows: NDArray[np.intp], verdict: Verdict) -> None:
            self._committed(computed, rows, verdict)

        try:
            job = self._commits.job(computed.served, sessions, steps.seqs[computed.last], computed.states, done)
        except Exception as error:  # out of memory, for one; the sessions must not be held for ever
            log.exception("a commit of %s could not be put together", computed.served.reference)
            why = InternalError("INTERNAL", f"the server failed on the commit of this step: {type(error).__name__}")
            self._go_back(computed, np.flatnonzero(np.isin(steps.rows, sessions.rows)), why)
            return
        computed.states = []
        self._advances.add(computed)
        self._commits.send(job)

    def _committed(self, computed: Advance, rows: NDArray[np.intp], verdict: Verdict) -> None:
        """The store's word on these rows of a batch's commit."""
        batch, steps = computed.batch, computed.batch.steps
        last = computed.committing[rows]
        index = last if batch.last is None else np.flatnonzero(np.isin(steps.rows, steps.rows[last]))
        if verdict.ok:
            now = time.monotonic()
            self._scheduler.took(computed.served.index, len(batch), now - computed.started)
            self._table.durable[steps.rows[last]] = steps.seqs[last]
            self._answer(computed, last, index, now)
        else:
            self._advances.settle(computed, len(index))
            self._ownership.lose(steps.rows[last], verdict, pinned=True)
            if computed.answered is not None:
                index = index[~computed.answered[index]]
            why = uncommitted(verdict)
            self._answers.refuse_all(steps[index], why)
            self._metrics.steps.labels(computed.served.bundle.name, why.reason.lower()).inc(len(index))

    def _go_back(self, computed: Advance, index: NDArray[np.intp], why: ServiceError) -> None:
        """These rows of a batch are refused, and their sessions are as their records have them."""
        self._advances.settle(computed, len(index))
        self._rollback.of(computed.served, computed.batch.steps[index], why)

    def _answer(self, computed: Advance, last: NDArray[np.intp], index: NDArray[np.intp], durable: float) -> None:
        """Sends the outputs of the batch's rows in `index`, and lets their sessions, whose last rows are in `last`, go on.
        `durable`: since when they may be answered."""
        table, steps, outputs = self._table, computed.batch.steps, computed.outputs
        sessions, count = steps.rows[last], len(index)
        table.applied[sessions] = steps.seqs[last]
        table.used[sessions] = self._residency.clock()
        if computed.answered is not None:
            index = index[~computed.answered[index]]
        if len(index) < len(steps):
            steps, outputs = steps[index], outputs[index]
        if not steps.flags.any():
            if len(steps):
                self._answers.outputs(steps.streams, steps.handles, steps.rows, steps.seqs, outputs)
        else:
            prefill = (steps.flags & PREFILL).astype(np.bool_)
            for some, own in ((steps[prefill], None), (steps[~prefill], outputs[~prefill])):
                if len(some):
                    self._answers.outputs(some.streams, some.handles, some.rows, some.seqs, own)
        if len(steps):
            stages, given = self._metrics.stage_seconds, self._answers.given
            stages.answered(steps.times, computed.started, computed.computed, durable, given)
        self._pins.release(sessions)
        self._repeats.moved_on(sessions)
        self._metrics.steps.labels(computed.served.bundle.name, "ok").inc(count)
        self._advances.settle(computed, count)
        self._residency.serve_wanting()

    def _observe(self, computed: Advance) -> None:
        metrics, name, rows = self._metrics, computed.served.bundle.name, len(computed.batch)
        metrics.batches.labels(name).inc()
        metrics.batch_rows.labels(name).observe(rows)
