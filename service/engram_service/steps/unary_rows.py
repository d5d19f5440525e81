"""Rows that unary calls brought, each with a step of a session of the server's own stream. Event loop only; admission.py and
answers.py ask. What cannot stay a row becomes an event, and with it a task (protocols/engram/step_calls.py).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engram_service.auth.tenants import tenant_of
from engram_service.errors import AbortedError, ServiceError, of_detail
from engram_service.scheduling.columns import occurrence
from engram_service.sessions.shares import Share, Shares
from engram_service.sessions.streams import Streams
from engram_service.sessions.table import SessionTable
from engram_service.steps.refusals import Refused, errors_frame, fates
from engram_service.wire.base import CALL, Arrived, Wire


class UnaryRows:
    """Of all calls under way."""

    def __init__(self, wire: Wire, streams: Streams, table: SessionTable, shares: Shares) -> None:
        self._wire = wire
        self._streams = streams
        self._table = table
        self._shares = shares
        self._counted: dict[int, Share] = {}  # by stream: of tenants with a limit

    def rounds(self, arrived: Arrived) -> list[Arrived]:
        """In which no session has two of these rows: what the next step is, is known after the one before."""
        calls = arrived.streams >= CALL
        if not calls.any():
            return [arrived]
        turn = np.zeros(len(arrived), np.intp)
        turn[calls] = occurrence(arrived.handles[calls])
        if not turn.any():
            return [arrived]
        order = np.argsort(turn, kind="stable")
        arrived, ends = _ordered(arrived, order), np.cumsum(np.bincount(turn)).tolist()
        return [arrived.part(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def number(self, arrived: Arrived, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Steps without a seq get that of the next one. Which rows stay: of others the session is gone, or in doubt, since another
        server, or a new one of its name, may have had it."""
        table, calls = self._table, arrived.streams >= CALL
        known = rows >= 0
        safe = np.where(known, rows, 0)
        admitted = table.admitted[safe]
        following = admitted + np.uint64(1)
        if (new := calls & known & (arrived.seqs == 0)).any():
            arrived.seqs[new], arrived.acknowledged[new] = following[new], admitted[new]
        doubtful = (arrived.seqs != following) & (admitted == table.applied[safe])
        if (back := calls & (doubtful | ~known)).any():
            self._streams.answered(arrived.streams[back])
            for stream in arrived.streams[back].tolist():
                self._wire.again(stream, given=True, numbered=True)
        stay: NDArray[np.bool_] = ~back
        return stay

    def take(self, stream: int, row: int) -> None:
        """Room for a call's row until it is answered. Raises ResourceExhaustedError."""
        share = self._shares.of(tenant_of(self._table.id_of(row)))
        share.take_unary(1)
        self._counted[stream] = share

    def answered(self, streams: NDArray[np.uint32]) -> None:
        """These rows are, or were given up."""
        if self._counted:
            for stream in streams.tolist():
                if (share := self._counted.pop(stream, None)) is not None:
                    share.give_unary(1)

    def refuse(
        self, streams: NDArray[np.uint32], handles: NDArray[np.uint32], seqs: NDArray[np.uint64], refused: Refused
    ) -> None:  # fmt: skip
        """Refuses the rows that a mask of `refused` has; those whose session has gone elsewhere try again."""
        out = np.logical_or.reduce([mask for mask, _ in refused])
        self._streams.answered(streams[out])
        self.answered(streams[out])
        fate = fates(self._table, self._streams.rows_of(streams, handles), seqs)
        frame = errors_frame(handles, seqs, refused, fate).errors
        indexes = np.frombuffer(frame.error_indexes, np.uint32)
        for stream, index in zip(streams[out].tolist(), indexes.tolist(), strict=True):
            refusal = of_detail(frame.errors[index])
            if not self._again(stream, refusal):
                self._wire.finish(stream, refusal)

    def _again(self, stream: int, refusal: ServiceError) -> bool:
        nothing = refusal.metadata.get("applied") == "no"
        if isinstance(refusal, AbortedError):
            return self._wire.again(stream, given=True, numbered=nothing)
        # Whose step is the next one, whatever that is, is told of no gap, which the step before has left.
        return refusal.reason == "SEQ_GAP" and nothing and self._wire.again(stream, given=False, numbered=True)


def _ordered(arrived: Arrived, order: NDArray[np.intp]) -> Arrived:
    widths = arrived.input_nbytes
    if (widths == widths[0]).all():
        inputs = arrived.inputs.reshape(len(arrived), -1)[order].ravel()
    else:
        pieces = np.split(arrived.inputs, np.cumsum(widths[:-1], dtype=np.int64))
        inputs = np.concatenate([pieces[place] for place in order.tolist()])
    columns = replace(arrived, inputs=inputs)
    names = [name for name in Arrived.__slots__ if name != "inputs"]
    return replace(columns, **{name: getattr(arrived, name)[order] for name in names})
