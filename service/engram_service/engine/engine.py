"""The engine's threads: take what is ready, advance it, keep the outputs, and hand the commit to the store.

The only threads that run cells and write arenas. What they find is told to the event loop through `Answers`. A GPU has one.
A CPU has several, each on a tick of its own: threads that share one tick wait for each other at every operation, and when Redis
and clients want the cores too, for whoever the kernel has put to sleep.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Catalog, Served
from engram_service.engine import apart
from engram_service.engine.records import pack_records
from engram_service.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.runtimes.base import RuntimeStoppedError
from engram_service.scheduler import FIXED_ROWS, Tick
from engram_service.sessions.admission import FEEDBACK
from engram_service.sessions.table import Reference, References, SessionTable
from engram_service.store import CommitJob, MetaFields, Sent, Store, Verdict
from engram_service.supervision import Supervisor
from engram_service.work import Job, WorkQueue

log = logging.getLogger(__name__)

_LOOK_S = 0.005

Commit = Callable[
    [], CommitJob | None
]  # packs the records, which takes about as long as to compute them; None: that failed


@dataclass(eq=False, slots=True)
class Advance:
    """A tick after its computation: what the event loop needs to answer it."""

    served: Served
    tick: Tick
    outputs: NDArray[np.uint8]  # [rows, output_nbytes]
    started: float
    computed: float = 0.0
    committing: NDArray[np.intp] = field(
        default_factory=lambda: np.empty(0, np.intp)
    )  # row of the tick for each row of the job
    good: NDArray[np.intp] | None = None  # rows that were computed; None: all
    last: NDArray[np.intp] = field(
        default_factory=lambda: np.empty(0, np.intp)
    )  # of each session that was: its last row
    error: Exception | None = None  # why others were not
    unanswered: int = 0  # rows whose answer has not been handed to a stream
    answered: NDArray[np.bool_] | None = None  # rows that were answered by a deadline; event loop only


class Answers(Protocol):
    """Called from the engine and committer threads."""

    def advanced(self, advance: Advance) -> None:
        """Before the commit: the tick is under way to the store."""

    def volatile(self, advance: Advance, rows: NDArray[np.intp]) -> None:
        """These rows of the tick may be answered before they are durable (durability interval)."""

    def committed(self, advance: Advance, job_rows: NDArray[np.intp], verdict: Verdict) -> None:
        """The store's word on these rows of the tick's job."""

    def flushed(self, sessions: References, seqs: NDArray[np.uint64], verdict: Verdict) -> None:
        """The store's word on an interval commit of these sessions."""

    def failed(self, served: Served, tick: Tick, error: Exception) -> None:
        """The cell raised: nothing of the tick was committed."""

    def broken(self, advance: Advance, index: NDArray[np.intp], error: Exception) -> None:
        """The cell raised for these rows of the tick: nothing of their sessions was committed."""

    def unpacked(self, advance: Advance, error: Exception) -> None:
        """The commit of a tick could not be put together: nothing of it was committed."""


class _Line:
    """A thread's way to Redis: one commit is under way at a time, and one may stand behind the next."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sent: Sent | None = None
        self.rows = 0  # of the commit that was sent last
        self.behind: Commit | None = None

    @property
    def empty(self) -> bool:
        return self._sent is None and self.behind is None

    def send(self, commit: Commit) -> None:
        job = commit()
        self.wait()
        if job is not None:
            self._sent, self.rows = self._store.begin(job), len(job.tags)

    def send_behind(self) -> None:
        if self.behind is not None:
            self.send(self.behind)
            self.behind = None

    def wait(self) -> None:
        """Until Redis has said what became of what was sent."""
        if self._sent is not None:
            self._store.finish(self._sent)
            self._sent = None


class Engine:
    """The threads of one device."""

    def __init__(
        self, queue: WorkQueue, table: SessionTable, catalog: Catalog, store: Store, answers: Answers, metrics: Metrics,
        meta: Callable[[Reference], MetaFields | None], workers: int, supervisor: Supervisor, pauses: Pauses,
    ) -> None:  # fmt: skip
        self._queue = queue
        self._table = table
        self._catalog = catalog
        self._store = store
        self._answers = answers
        self._metrics = metrics
        self._meta = meta
        self._pauses = pauses
        self._stopped = threading.Event()
        self._threads = [supervisor.thread(f"engine-{n}", self._run, self._stopped) for n in range(workers)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    async def left(self, deadline: float) -> list[str]:
        """Names of the threads that have not ended by then; the queue is closed before."""
        self._stopped.set()  # one that failed is not started again
        while names := [thread.name for thread in self._threads if thread.is_alive()]:
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(_LOOK_S)
        return names

    def _run(self) -> None:
        """Computes a tick while Redis writes the one before, and waits for Redis only where there is nothing to compute."""
        line = _Line(self._store)
        while (work := self._queue.take(wait=line.empty, turns=line.behind is None)) is not None or not line.empty:
            if callable(work):
                self._job(work)
            elif work is not None:
                model, tick = work
                if len(tick.waves) > 1 or len(tick) > 2 * line.rows + FIXED_ROWS:
                    line.wait()  # nobody's answer shall wait for a long tick
                commit = self._tick(model, tick)
                if commit is not None and tick.turn:
                    line.behind = commit  # small rows that came meanwhile overtake it
                    continue
                if commit is not None:
                    line.send(commit)
                    if line.behind is None:
                        continue
            line.wait()
            line.send_behind()

    def _job(self, job: Job) -> None:
        try:
            job()
        except Exception:  # the engine must live on
            log.exception("a job on the arena failed")
        finally:
            self._queue.finished()

    def _tick(self, model: int, tick: Tick) -> Commit | None:
        """Computes a tick; what is to be committed of it, if anything."""
        served, began = self._catalog.models[model], time.monotonic()
        try:
            advance, states = self._advance(served, tick)
        except Exception as error:  # the cell's own failure; the engine must live on
            log.exception("a tick of %s failed", served.reference)
            if isinstance(error, RuntimeStoppedError):
                self._pauses.stopped(served, began)
            self._queue.finished(model)
            self._answers.failed(served, tick, error)
            return None
        self._queue.finished(model)
        self._answers.advanced(advance)
        if advance.good is not None and advance.error is not None:
            log.warning("rows of a tick of %s failed, the others did not: %s", served.reference, advance.error)
            self._answers.broken(advance, np.setdiff1d(np.arange(len(tick)), advance.good), advance.error)
        return self._tick_commit(advance, states)

    def _advance(self, served: Served, tick: Tick) -> tuple[Advance, list[NDArray[np.uint8]]]:
        """Runs the tick's waves. The new states are in the arena, and come back as bytes for each session's last row."""
        started = time.monotonic()
        slots = self._table.slot[tick.rows]
        inputs = _inputs(tick)
        feedback = (tick.flags & FEEDBACK).astype(np.bool_) if served.bundle.schema.generates else None
        if feedback is not None and not feedback.any():
            feedback = None
        if tick.last is None:
            result = apart.advance(served.runtime, slots, inputs, feedback)
            outputs, states, broken, error = result.done.outputs, result.done.states, result.broken, result.error
        else:
            outputs, broken, error = self._waves(served, tick, slots, inputs, feedback)
            states = []
        index = None if broken is None else np.flatnonzero(~broken)
        last = np.arange(len(tick)) if tick.last is None else tick.last
        if broken is not None and index is not None:
            kept = ~broken[last]
            last, states = last[kept], [block[kept] for block in states]
            served.arena.keep(slots[index], tick.seqs[index], outputs[index])
        else:
            served.arena.keep(slots, tick.seqs, outputs)
        if tick.last is not None:
            states = [served.arena.packed(slots[last])]
        with self._queue.lock:  # columns move when the table grows
            self._table.computed[tick.rows[last]] = tick.seqs[last]
        advance = Advance(served, tick, outputs, started, time.monotonic(), unanswered=len(tick))
        advance.good, advance.last, advance.error = index, last, error
        self._observe(advance)
        return advance, states

    def _waves(
        self, served: Served, tick: Tick, slots: NDArray[np.int32], inputs: NDArray[np.uint8],
        feedback: NDArray[np.bool_] | None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None, Exception | None]:  # fmt: skip
        """Outputs; rows of sessions of which a step failed, if there are any; why. What stands behind such a one is left out."""
        outputs = np.zeros((len(tick), served.arena.output_nbytes), np.uint8)
        broken: NDArray[np.bool_] | None = None
        error: Exception | None = None
        for wave in tick.waves:
            rows = np.arange(len(tick)) if wave is None else wave
            if broken is not None:
                rows = rows[~broken[rows]]
            if not len(rows):
                continue
            result = apart.advance(
                served.runtime, slots[rows], inputs[rows], None if feedback is None else feedback[rows]
            )
            outputs[rows] = result.done.outputs
            if result.broken is not None:
                these = np.isin(tick.rows, tick.rows[rows[result.broken]])
                broken, error = these if broken is None else broken | these, result.error
        return outputs, broken, error

    def _tick_commit(self, advance: Advance, states: list[NDArray[np.uint8]]) -> Commit | None:
        """The commit of the tick's sessions of durability step; rows of the others are answered at once."""
        tick, last = advance.tick, advance.last
        interval = self._table.interval[tick.rows]
        if interval.any():
            volatile = np.flatnonzero(interval)
            if advance.good is not None:
                volatile = np.intersect1d(volatile, advance.good)
            if len(volatile):
                self._answers.volatile(advance, volatile)
            kept = ~interval[last]
            last, states = last[kept], [block[kept] for block in states]
        if not len(last):
            return None
        advance.committing = last

        def done(rows: NDArray[np.intp], verdict: Verdict) -> None:
            self._answers.committed(advance, rows, verdict)

        def commit() -> CommitJob | None:
            try:
                return self._commit_job(advance.served, tick.sessions[last], tick.seqs[last], states, done)
            except Exception as error:  # out of memory, for one; the sessions must not be held for ever
                log.exception("a commit of %s could not be put together", advance.served.reference)
                self._answers.unpacked(advance, error)
                return None

        return commit

    def flush(self, served: Served, sessions: References) -> None:
        """Commits sessions as the arena holds them (durability interval); they are pinned. A job of the queue, on the engine's
        thread."""
        table = self._table
        here = table.slot[sessions.rows] >= 0
        if not here.all():
            self._answers.flushed(sessions[~here], table.durable[sessions.rows[~here]], Verdict.OK)
            sessions = sessions[here]
        seqs = table.computed[sessions.rows]

        def done(rows: NDArray[np.intp], verdict: Verdict) -> None:
            self._answers.flushed(sessions[rows], seqs[rows], verdict)

        try:
            states = [served.arena.packed(table.slot[sessions.rows])]
            job = self._commit_job(served, sessions, seqs, states, done)
        except Exception:
            self._answers.flushed(
                sessions, table.durable[sessions.rows], Verdict.OK
            )  # no further than before: tried again
            raise
        self._store.submit(job)

    def _commit_job(
        self, served: Served, sessions: References, seqs: NDArray[np.uint64], states: list[NDArray[np.uint8]],
        done: Callable[[NDArray[np.intp], Verdict], None],
    ) -> CommitJob:  # fmt: skip
        """The sessions are pinned, until the store has said what became of them."""
        table, rows = self._table, sessions.rows
        blocks = pack_records(served, table.slot[rows], seqs, table.acked[rows], table.epoch[rows], states)
        self._metrics.commit_rows.inc(len(rows))
        self._metrics.commit_bytes.inc(sum(block.nbytes for _, block in blocks))
        return CommitJob(
            tags=table.tag[rows],
            tokens=table.token[rows],
            blocks=blocks,
            ttl_ms=table.ttl_ms[rows],
            meta=lambda row: self._meta(sessions.one(row)),
            done=done,
        )

    def _observe(self, advance: Advance) -> None:
        rows, metrics, name = len(advance.tick), self._metrics, advance.served.bundle.name
        metrics.ticks.labels(name).inc()
        metrics.tick_rows.labels(name).observe(rows)
        metrics.tick_busy_seconds.inc(advance.computed - advance.started)
        self._queue.took(advance.served.index, rows, advance.computed - advance.started)
        metrics.stage_seconds.labels("queue").observe(advance.started - advance.tick.parts[0].batch.arrived)
        metrics.stage_seconds.labels("compute").observe(advance.computed - advance.started)


def _inputs(tick: Tick) -> NDArray[np.uint8]:
    blocks = [
        part.batch.inputs if len(part.index) == len(part.batch.rows) else part.batch.inputs[part.index]
        for part in tick.parts
    ]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
