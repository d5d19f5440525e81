"""What waits for the engine: one scheduler a model, and jobs that touch an arena outside a tick.

The one place where the event loop and the engine's threads meet. The loop adds; an engine thread takes whenever it is free,
so all that has gathered by then goes at once. `lock` guards the schedulers and the `busy` column. Ticks of different threads
have no session in common; a job has all arenas to itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.pauses import Pauses
from engram_service.scheduler import FIXED_ROWS, Batch, Scheduler, Tick
from engram_service.sessions.table import SessionTable

Job = Callable[[], None]

_SHARE_MIN = 5 * FIXED_ROWS  # rows that a thread takes before it leaves the rest to another


class WorkQueue:
    """Ready rows and jobs; `take` blocks until there is something to do."""

    def __init__(
        self, table: SessionTable, rows_max: Callable[[int], int], run_max: int, takers: int, pauses: Pauses
    ) -> None:
        """`rows_max`: how many rows a tick of a model may have, by its index."""
        self.lock = threading.Condition()
        self._table = table
        self._rows_max = rows_max
        self._run_max = run_max
        self._takers = takers
        self._pauses = pauses
        self._schedulers: dict[int, Scheduler] = {}
        self._jobs: deque[Job] = deque()
        self._turn = 0
        self._running: list[int] = []  # the models of the ticks that are computed
        self._job_running = False
        self._closed = False

    @property
    def waiting_rows(self) -> int:
        return sum(scheduler.waiting_rows for scheduler in list(self._schedulers.values()))

    def add(self, model: int, batch: Batch) -> None:
        with self.lock:
            if model not in self._schedulers:
                self._schedulers[model] = Scheduler(self._run_max)
            self._schedulers[model].add(batch)
            self.lock.notify()

    def post(self, job: Job) -> None:
        """Runs before any tick that is taken later, in the order of posting."""
        with self.lock:
            self._jobs.append(job)
            self.lock.notify_all()

    def release(self, rows: NDArray[Any]) -> None:
        """These sessions' next rows may go."""
        with self.lock:
            self._table.busy[rows] = False
            self.lock.notify()

    def hold(self, rows: NDArray[Any]) -> None:
        with self.lock:
            self._table.busy[rows] = True

    def try_hold(self, rows: NDArray[Any], wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Pins those of the wanted sessions that are free; which they are. A row that stands twice is pinned once, for both."""
        with self.lock:
            found: NDArray[np.bool_] = wanted & ~self._table.busy[rows]
            self._table.busy[rows[found]] = True
        return found

    async def barrier(self) -> None:
        """Returns when the jobs that were posted before have been done. Event loop only."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def reached() -> None:
            loop.call_soon_threadsafe(_set, done)

        self.post(reached)
        await done

    def drop(self, wanted: Callable[[Batch], NDArray[np.bool_]]) -> list[tuple[Batch, NDArray[np.intp]]]:
        """Takes out waiting rows of every model; see Scheduler.drop."""
        with self.lock:
            return [found for scheduler in self._schedulers.values() for found in scheduler.drop(wanted)]

    def prolong(self, rows: NDArray[np.int32], seq: np.uint64, deadline: float) -> None:
        """See Scheduler.prolong; of every model."""
        with self.lock:
            for scheduler in self._schedulers.values():
                scheduler.prolong(rows, seq, deadline)

    def take(self, wait: bool = True, turns: bool = True) -> Job | tuple[int, Tick] | None:
        """The next job, else the next tick and its model; without `turns` none of large streams that have small ones beside them.

        None once the queue is closed and empty of jobs, or at once where `wait` is false and there is nothing to do.
        Whoever takes says `finished` when the arena has what the work leaves there.
        """
        with self.lock:
            while True:
                if self._jobs:
                    if not self._running and not self._job_running:
                        self._job_running = True
                        return self._jobs.popleft()
                elif not self._job_running and (found := self._next_tick(turns)):
                    self._running.append(found[0])
                    return found
                elif self._closed:
                    return None
                if not wait:
                    return None
                self.lock.wait()

    def took(self, model: int, rows: int, seconds: float) -> None:
        """How long a tick of so many rows was computed."""
        self._schedulers[model].took(rows, seconds)

    def finished(self, model: int | None = None) -> None:
        """The caller's tick of this model is done with the arena; None: its job."""
        with self.lock:
            if model is None:
                self._job_running = False
            else:
                self._running.remove(model)
            if self._jobs or self._closed or self.waiting_rows:
                self.lock.notify_all()

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self.lock.notify_all()

    def _next_tick(self, turns: bool) -> tuple[int, Tick] | None:
        models, now = list(self._schedulers), time.monotonic()
        for offset in range(len(models)):
            model = models[(self._turn + offset) % len(models)]
            if self._pauses.bars(model, model in self._running):
                continue
            scheduler = self._schedulers[model]
            share = max(_SHARE_MIN, -(-scheduler.waiting_rows // self._takers))
            if tick := scheduler.next(self._table.busy, min(share, self._rows_max(model)), now, turns):
                self._turn = (self._turn + offset + 1) % len(models)
                if self.waiting_rows:
                    self.lock.notify()  # the rest is another thread's
                return model, tick
        return None


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
