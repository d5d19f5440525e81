"""Closes and detaches: how sessions leave their stream. Event loop only.

An end that was begun is finished by the server, whoever asked for it and whether he is still there: a client that is cut off, a
deadline that passes or a Redis that hangs leave no session behind. Who asks again joins the end that is under way.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.core import Core
from engram_service.errors import Internal, Refusal, Unavailable, no_session
from engram_service.sessions.admission import column
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.handles import ENDED
from engram_service.sessions.holds import Holds
from engram_service.sessions.refusals import taken_over, void
from engram_service.sessions.streams import Stream
from engram_service.sessions.table import NO_STREAM, References
from engram_service.store import Store

_SLICE = 128  # sessions that are ended between two batches
_FLUSH_POLL_S = 0.005
_GOES_ON = "its end was begun and goes on; ask again to learn when it is done"

End = asyncio.Task[set[str]]  # the keys of sessions that had been lost to somebody else before


class Endings:
    """Ends under way, by key."""

    def __init__(self, core: Core, store: Store, calls: StoreCalls, holds: Holds) -> None:
        self._core = core
        self._store = store
        self._calls = calls
        self._holds = holds
        self._under_way: dict[str, tuple[End, bool]] = {}  # with whether the records are deleted

    def keys_of(self, stream: Stream, frame: stream_pb2.CloseFrame) -> list[str]:
        """The sessions that a CloseFrame is about."""
        rows = self._core.rows_of(stream, column(frame.handles, np.uint32, "handles"))
        return [self._core.table.id_of(row) for row in np.unique(rows[rows >= 0]).tolist()]

    async def close(self, stream: Stream, frame: stream_pb2.CloseFrame) -> list[tuple[int, Refusal]]:
        """Deletes the records of a stream's sessions, or only lets go of them; returns what was refused, by row of the frame."""
        handles = column(frame.handles, np.uint32, "handles")
        rows = self._core.rows_of(stream, handles)
        # To end what this stream has ended is done already.
        errors = [(n, void(int(rows[n]))) for n in np.flatnonzero((rows < 0) & (rows != ENDED)).tolist()]
        keys = {n: self._core.table.id_of(rows.item(n)) for n in np.flatnonzero(rows >= 0).tolist()}
        known = np.unique(rows[rows >= 0])
        tasks: list[End] = []
        for start in range(0, len(known), _SLICE):
            tasks += self._ends(stream, known[start : start + _SLICE], frame.detach)
        _, open_ = await asyncio.wait(tasks, timeout=self._core.settings.step_timeout_s) if tasks else ((), ())
        if open_:
            late = Unavailable("STORE_UNAVAILABLE", f"the session is not ended yet: {_GOES_ON}", retry_after_ms=500)
            return [*errors, *((n, late) for n in np.flatnonzero(rows >= 0).tolist())]
        if failed := next((task for task in tasks if task.cancelled() or task.exception()), None):
            why = "cancelled" if failed.cancelled() else type(failed.exception()).__name__
            fault = Internal("INTERNAL", f"the server failed on this end ({why}); ask again")
            return [*errors, *((n, fault) for n in np.flatnonzero(rows >= 0).tolist())]
        lost = set[str]().union(*(task.result() for task in tasks))
        return [*errors, *((n, taken_over()) for n, key in keys.items() if key in lost)]

    async def delete(self, key: str) -> None:
        """Closes a session whoever holds it. Raises NotFound."""
        existed = self._core.supervisor.once("close", self._delete(key))
        try:
            async with asyncio.timeout(self._core.settings.step_timeout_s):
                found = await asyncio.shield(existed)
        except TimeoutError:
            raise Unavailable(
                "STORE_UNAVAILABLE", f"the session is not closed yet: {_GOES_ON}", retry_after_ms=500
            ) from None
        if not found:
            raise no_session(key)

    def _ends(self, stream: Stream, rows: NDArray[np.int32], detach: bool) -> list[End]:
        """The ends of these sessions: those under way that do as much, and one new one for the others."""
        table = self._core.table
        keys = [table.id_of(row) for row in rows.tolist()]
        joined = {key for key in keys if (found := self._under_way.get(key)) and (detach or found[1])}
        tasks = [self._under_way[key][0] for key in joined]
        new = np.array([row for key, row in zip(keys, rows.tolist(), strict=True) if key not in joined], np.int32)
        if len(new):
            left = [key for key in keys if key not in joined]
            tokens = [table.token[row].tobytes() for row in new.tolist()]
            tasks.append(self._begin(left, self._end(stream, table.refer(new), left, tokens, detach), not detach))
        return list(dict.fromkeys(tasks))

    def _begin(self, keys: Sequence[str], work: Coroutine[Any, Any, set[str]], deletes: bool) -> End:
        core = self._core
        task: End = core.supervisor.once("end", work)
        core.ends += 1
        self._under_way.update(dict.fromkeys(keys, (task, deletes)))

        def ended(task: End) -> None:
            core.ends -= 1
            for key in keys:
                if self._under_way.get(key, (None,))[0] is task:
                    del self._under_way[key]

        task.add_done_callback(ended)
        return task

    async def _end(
        self, stream: Stream, sessions: References, keys: Sequence[str], tokens: Sequence[bytes], detach: bool
    ) -> set[str]:
        """Under the claims that the sessions had when it was asked for: what was claimed since is another's."""
        core, table = self._core, self._core.table
        async with self._holds.hold(keys, math.inf):
            gone = set(np.array(keys, object)[~table.alive(sessions)].tolist())
            if detach:
                await self._flushed(sessions)
            else:
                await self._calls.call(math.inf, self._store.delete, keys, tokens)
                core.metrics.sessions_closed.inc(len(keys) - len(gone))
            await core.quiesce(sessions, math.inf)  # a store that has lost its data is written back meanwhile
            rows = table.rows_of(sessions)
            mine = rows[table.stream[rows] == stream.id]
            for handle in table.handle[mine].tolist():
                stream.handles.end(handle, ENDED)
            table.stream[mine] = NO_STREAM  # which needs not be told
            core.dismiss(rows)
        return gone

    async def _flushed(self, sessions: References) -> None:
        """What a store that was away has not got yet (durability interval) is there: nothing is let go of before."""
        core, table = self._core, self._core.table
        while len(dirty := np.intersect1d(core.residency.dirty(), table.rows_of(sessions))):
            core.residency.flush(dirty)
            await core.quiesce(sessions, math.inf)
            await asyncio.sleep(_FLUSH_POLL_S)

    async def _delete(self, key: str) -> bool:
        core = self._core
        core.ends += 1
        try:
            async with self._holds.hold([key], math.inf):
                existed: bool = await self._calls.call(math.inf, self._store.exists, key)
                await self._calls.call(math.inf, self._store.delete, [key])
                await self._holds.dismiss([key], math.inf)
                if existed:
                    core.metrics.sessions_closed.inc()
        finally:
            core.ends -= 1
        return existed
