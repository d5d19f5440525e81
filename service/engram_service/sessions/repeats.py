"""Steps that are asked for again: each is answered with the output that was kept, or when its first answer comes.

Event loop only; core.py finds them and tells when sessions have moved on. Every row that waits here is in flight until it is
answered or refused, whatever becomes of its session meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.errors import FailedPreconditionError, InternalError, ServiceError
from engram_service.sessions.refusals import closed
from engram_service.sessions.streams import Stream
from engram_service.sessions.table import NO_SLOT, Reference, References

if TYPE_CHECKING:
    from engram_service.core import Core


class _Waiting(NamedTuple):
    """A row whose step is under way."""

    seq: int
    stream: Stream
    handle: int
    deadline: float


class Repeats:
    """The rows that wait for a step under way, by session; and the tasks that read kept outputs."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._waiting: dict[Reference, list[_Waiting]] = {}

    def wait(
        self, stream: Stream, sessions: References, handles: NDArray[np.uint32], seqs: NDArray[np.uint64], deadline: float
    ) -> None:  # fmt: skip
        """These steps are under way; they are answered with their first answer."""
        for session, handle, seq in zip(sessions.each(), handles.tolist(), seqs.tolist(), strict=True):
            self._waiting.setdefault(session, []).append(_Waiting(seq, stream, handle, deadline))

    def answer(
        self, stream: Stream, served: Served, sessions: References, handles: NDArray[np.uint32],
        seqs: NDArray[np.uint64], deadline: float,
    ) -> None:  # fmt: skip
        """Answers steps whose outputs were kept, from the arena, as soon as the sessions are there."""
        self._core.supervisor.once("repeats", self._answer(stream, served, sessions, handles, seqs, deadline))

    def moved_on(self, sessions: References) -> None:
        """Steps of these sessions were applied: whoever asked for them again is answered."""
        if not self._waiting:
            return
        table = self._core.table
        for session in [one for one in sessions.each() if one in self._waiting]:
            row, waiting = table.row_of(session), self._waiting.pop(session)
            applied = 0 if row is None else table.applied.item(row)
            if left := [one for one in waiting if one.seq > applied]:
                self._waiting[session] = left
            for one in waiting:
                if row is not None and one.seq <= applied:
                    served = self._core.catalog.models[table.model.item(row)]
                    self.answer(one.stream, served, References.of([session]), *_columns([one]), one.deadline)

    def refuse(self, sessions: References, refusal: ServiceError, dropped: bool = False) -> None:
        """These sessions are gone, or their steps will not be applied; `dropped`: those that are not admitted any more."""
        for session in sessions.each() if self._waiting else []:
            row, waiting = self._core.table.row_of(session), self._waiting.pop(session, [])
            under_way = self._core.table.admitted.item(row) if dropped and row is not None else 0
            if left := [one for one in waiting if one.seq <= under_way]:
                self._waiting[session] = left
            for one in waiting:
                if one.seq > under_way:
                    self._core.refuse_rows(one.stream, *_columns([one]), refusal)

    def expire(self, now: float) -> None:
        """Refuses those whose time is up."""
        for session, waiting in list(self._waiting.items()):
            if not any(one.deadline < now for one in waiting):
                continue
            late = [one for one in waiting if one.deadline < now]
            if left := [one for one in waiting if one.deadline >= now]:
                self._waiting[session] = left
            else:
                del self._waiting[session]
            for one in late:
                self._core.refuse_rows(one.stream, *_columns([one]), self._core.late())

    async def _answer(
        self, stream: Stream, served: Served, sessions: References, handles: NDArray[np.uint32],
        seqs: NDArray[np.uint64], deadline: float,
    ) -> None:  # fmt: skip
        """Sends the outputs of sessions while these are pinned, so that neither slot nor row is another's meanwhile."""
        core, left = self._core, np.arange(len(seqs))
        refusal: ServiceError = InternalError("INTERNAL", "the server failed on this repeated step")
        try:
            while len(left):
                here = core.table.alive(sessions[left])
                if not here.all():
                    core.refuse_rows(stream, handles[left[~here]], seqs[left[~here]], closed())
                    left = left[here]
                    continue
                core.residency.want(served, sessions.rows[left])
                pinned = core.queue.try_hold(sessions.rows[left], core.table.slot[sessions.rows[left]] != NO_SLOT)
                if pinned.any():
                    await self._send(stream, served, sessions[left[pinned]], handles[left[pinned]], seqs[left[pinned]])
                    left = left[~pinned]
                elif not await core.changes(deadline):
                    refusal = core.late()
                    return
        finally:
            if len(left):
                core.refuse_rows(stream, handles[left], seqs[left], refusal)

    async def _send(
        self, stream: Stream, served: Served, sessions: References, handles: NDArray[np.uint32], seqs: NDArray[np.uint64]
    ) -> None:  # fmt: skip
        """The sessions are pinned for us."""
        core, rows = self._core, sessions.rows
        try:
            await core.queue.barrier()  # what was loaded into the slots is there
            kept = seqs > core.table.acked[rows]  # else a later output may be in its place
            if kept.any():
                outputs = served.arena.kept(core.table.slot[rows[kept]], seqs[kept])
                core.send_outputs(stream, handles[kept], rows[kept], seqs[kept], outputs)
            if not kept.all():
                core.refuse_rows(stream, handles[~kept], seqs[~kept], acknowledged())
        finally:
            core.queue.release(np.unique(rows))
            core.after_release()


def acknowledged() -> ServiceError:
    message = "this step's output was acknowledged and is no longer kept"
    return FailedPreconditionError("SEQ_ACKNOWLEDGED", message)


def _columns(waiting: list[_Waiting]) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    handles, seqs = [one.handle for one in waiting], [one.seq for one in waiting]
    return np.array(handles, np.uint32), np.array(seqs, np.uint64)
