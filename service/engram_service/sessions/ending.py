"""Closes and detaches: how sessions leave their stream. Event loop only.

An end that was begun is finished by the server, whoever asked for it and whether he is still there: a client that is cut off, a
deadline that passes or a Redis that hangs leave no session behind. Who asks again joins the end that is under way.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.condition import Condition
from engram_service.errors import InternalError, ServiceError, UnavailableError
from engram_service.observability.metrics import Metrics
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.handles import ENDED
from engram_service.sessions.holds import Holds
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.streams import Stream
from engram_service.sessions.table import NO_STREAM, Reference, References, SessionTable
from engram_service.sessions.together import Together
from engram_service.settings import Settings
from engram_service.steps.frames import column
from engram_service.steps.refusals import taken_over, void
from engram_service.store import Store
from engram_service.supervision import Supervisor

_SLICE = 128  # sessions that are ended between two batches
_SMALL = 8  # sessions; an end of more of them has a call of the store of its own
_FLUSH_POLL_S = 0.005
_GOES_ON = "its end was begun and goes on; ask again to learn when it is done"

End = asyncio.Task[set[str]]  # the keys of sessions that had been lost to somebody else before


@dataclass(frozen=True, slots=True)
class Asked:
    """What a CloseFrame is about, as it was when the frame was read: the stream may be gone when its turn comes."""

    rows: NDArray[np.int32]  # of the frame: negative where there is nothing to end
    sessions: References  # those to be ended
    keys: list[str]
    tokens: list[bytes]  # the claims that they are under
    key_of: dict[int, str]  # by row of the frame
    detach: bool


class Endings:
    """Ends under way, by session."""

    def __init__(
        self, settings: Settings, table: SessionTable, store: Store, calls: StoreCalls, holds: Holds, pins: Pins,
        residency: Residency, ownership: Ownership, condition: Condition, supervisor: Supervisor, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._table = table
        self._pins = pins
        self._residency = residency
        self._ownership = ownership
        self._condition = condition
        self._supervisor = supervisor
        self._metrics = metrics
        self._deletes = Together(partial(_delete, store))
        self._calls = calls
        self._holds = holds
        self._under_way: dict[Reference, tuple[End, bool]] = {}  # with whether the records are deleted

    def asked(self, stream: Stream, frame: stream_pb2.CloseFrame) -> Asked:
        """Raises InvalidArgumentError."""
        table = self._table
        rows = stream.handles.rows_of(column(frame.handles, np.uint32, "handles"))
        known = np.unique(rows[rows >= 0])
        return Asked(
            rows, table.refer(known), [table.id_of(row) for row in known.tolist()],
            [table.token[row].tobytes() for row in known.tolist()],
            {n: table.id_of(rows.item(n)) for n in np.flatnonzero(rows >= 0).tolist()}, frame.detach,
        )  # fmt: skip

    async def close(self, stream: Stream, asked: Asked) -> list[tuple[int, ServiceError]]:
        """Deletes the records of a stream's sessions, or only lets go of them; returns what was refused, by row of the frame."""
        rows = asked.rows
        # To end what this stream has ended is done already.
        errors = [(n, void(int(rows[n]))) for n in np.flatnonzero((rows < 0) & (rows != ENDED)).tolist()]
        tasks: list[End] = []
        for start in range(0, len(asked.keys), _SLICE):
            tasks += self._ends(stream, asked, slice(start, start + _SLICE))
        _, open_ = await asyncio.wait(tasks, timeout=self._settings.step_timeout_s) if tasks else ((), ())
        if open_:
            late = UnavailableError(
                "STORE_UNAVAILABLE", f"the session is not ended yet: {_GOES_ON}", retry_after_ms=500
            )
            return [*errors, *((n, late) for n in np.flatnonzero(rows >= 0).tolist())]
        if failed := next((task for task in tasks if task.cancelled() or task.exception()), None):
            why = "cancelled" if failed.cancelled() else type(failed.exception()).__name__
            fault = InternalError("INTERNAL", f"the server failed on this end ({why}); ask again")
            return [*errors, *((n, fault) for n in np.flatnonzero(rows >= 0).tolist())]
        lost = set[str]().union(*(task.result() for task in tasks))
        return [*errors, *((n, taken_over()) for n, key in asked.key_of.items() if key in lost)]

    def _ends(self, stream: Stream, asked: Asked, piece: slice) -> list[End]:
        """The ends of some of the sessions: those under way that do as much, and one new one for the others."""
        under_way = [self._under_way.get(session) for session in asked.sessions[piece].each()]
        joined = [one is not None and (asked.detach or one[1]) for one in under_way]
        tasks = [one[0] for one, joins in zip(under_way, joined, strict=True) if one is not None and joins]
        new = [n for n, joins in enumerate(joined) if not joins]
        if new:
            sessions = asked.sessions[piece][new]
            keys, tokens = ([column[piece][n] for n in new] for column in (asked.keys, asked.tokens))
            work = self._end(stream, sessions, keys, tokens, asked.detach)  # type: ignore[arg-type]
            tasks.append(self._begin(sessions, work, not asked.detach))
        return list(dict.fromkeys(tasks))

    def _begin(self, sessions: References, work: Coroutine[Any, Any, set[str]], deletes: bool) -> End:
        each = sessions.each()
        task: End = self._supervisor.once("end", work)
        self._condition.ends += 1
        self._under_way.update(dict.fromkeys(each, (task, deletes)))

        def ended(task: End) -> None:
            self._condition.ends -= 1
            for session in each:
                if self._under_way.get(session, (None,))[0] is task:
                    del self._under_way[session]

        task.add_done_callback(ended)
        return task

    async def _end(
        self, stream: Stream, sessions: References, keys: Sequence[str], tokens: Sequence[bytes], detach: bool
    ) -> set[str]:
        """Under the claims that the sessions had when it was asked for: what was claimed since is another's."""
        table = self._table
        async with self._holds.hold(keys, math.inf):
            gone = set(np.array(keys, object)[~table.alive(sessions)].tolist())
            if detach:
                await self._flushed(sessions)
            else:
                ended = list(zip(keys, tokens, strict=True))
                if len(ended) > _SMALL:
                    await self._calls.call(math.inf, self._deletes.work, ended)
                else:
                    await self._calls.together(math.inf, self._deletes, ended)
                self._metrics.sessions_closed.inc(len(keys) - len(gone))
            await self._pins.quiesce(sessions, math.inf)  # a store that has lost its data is written back meanwhile
            rows = table.rows_of(sessions)
            mine = rows[table.stream[rows] == stream.id]
            for handle in table.handle[mine].tolist():
                stream.handles.end(handle, ENDED)
            table.stream[mine] = NO_STREAM  # which needs not be told
            self._ownership.dismiss(rows)
        return gone

    async def _flushed(self, sessions: References) -> None:
        """What a store that was away has not got yet (durability interval) is there: nothing is let go of before."""
        table = self._table
        while len(dirty := self._residency.dirty(rows=table.rows_of(sessions))):
            self._residency.flush(dirty)
            await self._pins.quiesce(sessions, math.inf)
            await asyncio.sleep(_FLUSH_POLL_S)


def _delete(store: Store, ended: Sequence[tuple[str, bytes]]) -> list[None]:
    """Deletes sessions that are under these claims."""
    store.delete([key for key, _ in ended], [token for _, token in ended])
    return [None] * len(ended)
