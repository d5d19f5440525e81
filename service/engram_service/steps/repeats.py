"""Steps that are asked for again: each is answered with the output that was kept, or when its first answer comes.

Event loop only; admission.py finds them, and the loop tells when sessions have moved on. Every row that waits here is in flight
until it is answered or refused, whatever becomes of its session meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Catalog, Served
from engram_service.condition import Condition
from engram_service.errors import FailedPreconditionError, InternalError, ServiceError
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import NO_SLOT, Reference, References, SessionTable
from engram_service.steps.answers import Answers
from engram_service.steps.refusals import closed
from engram_service.supervision import Supervisor


class Asked(NamedTuple):
    """Rows that ask for steps again."""

    streams: NDArray[np.uint32]
    sessions: References
    handles: NDArray[np.uint32]
    seqs: NDArray[np.uint64]

    def only(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Asked:
        return Asked(self.streams[index], self.sessions[index], self.handles[index], self.seqs[index])


class _Waiting(NamedTuple):
    """A row whose step is under way."""

    seq: int
    stream: int
    handle: int
    deadline: float


class Repeats:
    """The rows that wait for a step under way, by session; and the tasks that read kept outputs."""

    def __init__(
        self, table: SessionTable, catalog: Catalog, answers: Answers, residency: Residency, pins: Pins,
        condition: Condition, supervisor: Supervisor,
    ) -> None:  # fmt: skip
        self._table = table
        self._catalog = catalog
        self._answers = answers
        self._residency = residency
        self._pins = pins
        self._condition = condition
        self._supervisor = supervisor
        self._waiting: dict[Reference, list[_Waiting]] = {}

    def wait(self, asked: Asked, deadlines: NDArray[np.float64]) -> None:
        """These steps are under way; they are answered with their first answer."""
        rows = (asked.sessions.each(), asked.seqs.tolist(), asked.streams.tolist(), asked.handles.tolist())
        for session, *row in zip(*rows, deadlines.tolist(), strict=True):
            self._waiting.setdefault(session, []).append(_Waiting(*row))

    def answer(self, served: Served, asked: Asked, deadline: float) -> None:
        """Answers steps whose outputs were kept, from the arena, as soon as the sessions are there."""
        self._supervisor.once("repeats", self._answer(served, asked, deadline))

    def moved_on(self, sessions: NDArray[np.int32]) -> None:
        """Steps of these sessions were applied: whoever asked for them again is answered."""
        if not self._waiting:
            return
        table = self._table
        for session in [one for one in table.refer(sessions).each() if one in self._waiting]:
            row, waiting = table.row_of(session), self._waiting.pop(session)
            applied = 0 if row is None else table.applied.item(row)
            if left := [one for one in waiting if one.seq > applied]:
                self._waiting[session] = left
            for one in waiting:
                if row is not None and one.seq <= applied:
                    served = self._catalog.models[table.model.item(row)]
                    self.answer(served, _asked(session, one), one.deadline)

    def refuse(self, sessions: References, refusal: ServiceError, dropped: bool = False) -> None:
        """These sessions are gone, or their steps will not be applied; `dropped`: those that are not admitted any more."""
        for session in sessions.each() if self._waiting else []:
            row, waiting = self._table.row_of(session), self._waiting.pop(session, [])
            under_way = self._table.admitted.item(row) if dropped and row is not None else 0
            if left := [one for one in waiting if one.seq <= under_way]:
                self._waiting[session] = left
            for one in waiting:
                if one.seq > under_way:
                    self._answers.refuse_all(_asked(session, one), refusal)

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
                self._answers.refuse_all(_asked(session, one), self._condition.late())

    async def _answer(self, served: Served, left: Asked, deadline: float) -> None:
        """Sends the outputs of sessions while these are pinned, so that neither slot nor row is another's meanwhile."""
        table, refusal = self._table, InternalError("INTERNAL", "the server failed on this repeated step")
        why: ServiceError = refusal
        try:
            while len(left.seqs):
                here = table.alive(left.sessions)
                if not here.all():
                    self._answers.refuse_all(left.only(~here), closed())
                    left = left.only(here)
                    continue
                rows = left.sessions.rows
                self._residency.want(served, rows)
                free = ~table.busy[rows] & (table.slot[rows] != NO_SLOT)
                if free.any():
                    self._send(served, left.only(free))
                    left = left.only(~free)
                elif not await self._pins.changes(deadline):
                    why = self._condition.late()
                    return
        finally:
            if len(left.seqs):
                self._answers.refuse_all(left, why)

    def _send(self, served: Served, asked: Asked) -> None:
        """The sessions are here, and nothing is at work on them."""
        rows, seqs = asked.sessions.rows, asked.seqs
        kept = seqs > self._table.acked[rows]  # else a later output may be in its place
        if kept.any():
            outputs = served.arena.kept(self._table.slot[rows[kept]], seqs[kept])
            self._answers.outputs(asked.streams[kept], asked.handles[kept], rows[kept], seqs[kept], outputs)
        if not kept.all():
            self._answers.refuse_all(asked.only(~kept), acknowledged())


def acknowledged() -> ServiceError:
    message = "this step's output was acknowledged and is no longer kept"
    return FailedPreconditionError("SEQ_ACKNOWLEDGED", message)


def _asked(session: Reference, one: _Waiting) -> Asked:
    return Asked(np.array([one.stream], np.uint32), References.of([session]), np.array([one.handle], np.uint32),
                 np.array([one.seq], np.uint64))  # fmt: skip
