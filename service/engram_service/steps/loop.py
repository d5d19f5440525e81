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
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Catalog, Served
from engram_service.errors import InternalError, ServiceError
from engram_service.observability.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.places import at
from engram_service.runtimes.base import RuntimeStoppedError
from engram_service.scheduling.columns import Steps
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
        self._admission.on_admit = self._commits.on_free = self._flushes.on_add = self.wake
        self._pins.on_release = self._released
        self._commits.open()
        self._wire.start(self.wake, self._arrived)
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self.turn)

    def _arrived(self) -> None:
        if not self._due:
            self.turn()

    def _released(self) -> None:
        if self._scheduler.waiting_rows:
            self.wake()

    def turn(self) -> None:
        """All that has come is let in, and one batch of what is ready is computed, committed and answered."""
        self._due = True
        try:
            self._turn(time.monotonic())
        except Exception:  # which the loop tells of; what was let in must not wait for the next that comes
            self._due = False
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

        self._due = False  # what comes ready from here on needs another turn
        batch = self._next_batch(began)
        if batch is not None:
            served, steps = batch
            if (computed := self._advance(served, steps)) is not None:
                self._answer_volatile(computed)
                self._commit(computed)
                self._observe(computed)
            self._released()
        self._flushes.send()
        if self._flushes and not self._commits.full:
            self.wake()
        if batch is not None or arrived is not None or events:
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
        if computed.good is not None and computed.error is not None:
            log.warning("rows of a batch of %s failed, the others did not: %s", served.reference, computed.error)
            self._go_back(computed, np.setdiff1d(np.arange(len(batch)), computed.good), failure(served, computed.error))
        return computed

    def _answer_volatile(self, computed: Advance) -> None:
        """Rows of durability interval are answered before they are in Redis."""
        table, sessions, seqs, index = self._table, computed.sessions, computed.seqs, computed.good
        interval = table.interval[at(sessions)]
        count = np.count_nonzero(interval)
        if not count:
            return
        if count < len(sessions):
            sessions, seqs = sessions[interval], seqs[interval]
            index = computed.rows_of(sessions)
        clean = table.durable[sessions] == table.applied[sessions]
        table.dirty_since[sessions[clean]] = self._residency.clock()
        self._answer(computed, sessions, seqs, index, computed.computed)
        self._residency.flush_due(computed.served, sessions)
        computed.keep(~interval)

    def _commit(self, computed: Advance) -> None:
        """What is left is answered when Redis has it."""
        if not len(computed.sessions):
            return
        self._advances.add(computed)
        try:
            done = partial(self._committed, computed)
            written = self._commits.send(computed.served, computed.sessions, computed.seqs, computed.states, done)
        except Exception as error:  # out of memory, for one; the sessions must not be held for ever
            log.exception("a commit of %s could not be put together", computed.served.reference)
            why = InternalError("INTERNAL", f"the server failed on the commit of this step: {type(error).__name__}")
            self._go_back(computed, computed.rows_of(computed.sessions), why)
            return
        computed.states = []
        if written:
            index = None if computed.whole else computed.rows_of(computed.sessions)
            self._written(computed, computed.sessions, computed.seqs, index)

    def _committed(self, computed: Advance, places: NDArray[np.intp], verdict: Verdict) -> None:
        """The store's word on these of a commit's sessions."""
        sessions, seqs = computed.sessions[places], computed.seqs[places]
        index = computed.rows_of(sessions)
        if verdict.ok:
            self._written(computed, sessions, seqs, index)
            return
        self._advances.settle(computed, len(index))
        self._ownership.lose(sessions, verdict, pinned=True)
        if computed.answered is not None:
            index = index[~computed.answered[index]]
        why = uncommitted(verdict)
        self._answers.refuse_all(computed.batch.steps[index], why)
        self._metrics.steps.labels(computed.served.bundle.name, why.reason.lower()).inc(len(index))

    def _written(
        self, computed: Advance, sessions: NDArray[np.int32], seqs: NDArray[np.uint64], index: NDArray[np.intp] | None
    ) -> None:
        """These sessions are in Redis: the batch's rows in `index` are theirs (None: all)."""
        now = time.monotonic()
        self._table.durable[at(sessions)] = seqs
        self._answer(computed, sessions, seqs, index, now)
        self._scheduler.took(computed.served.index, len(computed.batch), now - computed.started)

    def _go_back(self, computed: Advance, index: NDArray[np.intp], why: ServiceError) -> None:
        """These rows of a batch are refused, and their sessions are as their records have them."""
        self._advances.settle(computed, len(index))
        self._rollback.of(computed.served, computed.batch.steps[index], why)

    def _answer(
        self, computed: Advance, sessions: NDArray[np.int32], seqs: NDArray[np.uint64], index: NDArray[np.intp] | None,
        durable: float,
    ) -> None:  # fmt: skip
        """Sends the outputs of the batch's rows in `index` (None: all), and lets their sessions go on, which are at `seqs` now.
        `durable`: since when they may be answered."""
        table = self._table
        answered, given = self._send(computed, index), self._answers.given
        count = len(computed.batch) if index is None else len(index)
        places = at(sessions)
        table.applied[places] = seqs
        table.used[places] = self._residency.clock()
        self._pins.release(sessions)
        self._repeats.moved_on(sessions)
        self._advances.settle(computed, count)
        self._residency.serve_wanting()
        if len(answered):
            stages = self._metrics.stage_seconds
            stages.answered(answered.times, computed.started, computed.computed, durable, given)
        self._metrics.steps.labels(computed.served.bundle.name, "ok").inc(count)

    def _send(self, computed: Advance, index: NDArray[np.intp] | None) -> Steps:
        """The outputs of these rows of a batch, and which they were: not those that a deadline has answered."""
        steps, outputs = computed.batch.steps, computed.outputs
        if computed.answered is not None:
            left = ~computed.answered
            index = np.flatnonzero(left) if index is None else index[left[index]]
        if index is not None and len(index) < len(steps):
            steps, outputs = steps[index], outputs[index]
        if not np.count_nonzero(steps.flags):
            if len(steps):
                self._answers.outputs(steps.streams, steps.handles, steps.rows, steps.seqs, outputs)
        else:
            prefill = (steps.flags & PREFILL).astype(np.bool_)
            for some, own in ((steps[prefill], None), (steps[~prefill], outputs[~prefill])):
                if len(some):
                    self._answers.outputs(some.streams, some.handles, some.rows, some.seqs, own)
        return steps

    def _observe(self, computed: Advance) -> None:
        metrics, name, rows = self._metrics, computed.served.bundle.name, len(computed.batch)
        metrics.batches.labels(name).inc()
        metrics.batch_rows.labels(name).observe(rows)
