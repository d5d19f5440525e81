"""Answers of the server: which rows of whose calls they are, and in which order. Used by _core.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._handles import Handles
from engram._recovery import Recovery
from engram._state import ClientState
from engram.v1 import stream_pb2


class FrameError(Exception):
    """The server sent what cannot be, or refused a whole frame: the stream is given up and taken up again."""


class Answers:
    """Each session's rows are taken in the order of their seqs; those that come early are kept until then."""

    def __init__(self, core: ClientState, recovery: Recovery, handles: Handles) -> None:
        self._core = core
        self._recovery = recovery
        self._handles = handles
        self._table, self._models, self._calls = core.table, core.models, core.calls
        self._log, self._outbox, self._doubts = core.log, core.outbox, core.doubts
        self._wake = core.wake
        self._early: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any] | None]] = []

    def lost(self) -> None:
        """The stream is gone: what came early comes again."""
        self._early.clear()

    def outputs(self, frame: stream_pb2.OutputsFrame) -> None:
        """Takes outputs of steps. Raises FrameError."""
        slots, seqs = self._handles.slots(frame.handles), np.frombuffer(frame.seqs, "<i8")
        if not len(slots):
            return
        known = slots >= 0
        values: NDArray[Any] | None = None
        if frame.outputs:
            model = int(self._table.model[slots[np.argmax(known)]])
            values = self._models[model].output.decode(frame.outputs, len(slots))
        if frame.durable_seqs:
            # Says too, where the durability was left to the server, that it is the interval one.
            self._table.interval[slots[known]] = True
            self._raise_durable(slots, np.frombuffer(frame.durable_seqs, "<i8"))
        if not known.all():
            slots, seqs = slots[known], seqs[known]
            values = None if values is None else values[known]
        if len(slots) == 1 and self._accept_one(int(slots[0]), int(seqs[0]), values):
            pass
        elif bool((seqs == self._table.confirmed[slots] + 1).all()):
            # Each row is its session's next: so no session has two.
            self._accept(slots, seqs, values)
        else:
            self._sort_out(slots, seqs, values)
        while self._early and self._retry_early():
            pass
        self._log.trim()
        if self._outbox.pending:
            self._wake()

    def _sort_out(self, slots: NDArray[np.int64], seqs: NDArray[np.int64], values: NDArray[Any] | None) -> bool:
        """Takes the rows that come next in their sessions, keeps those that came early, drops those that came twice."""
        order = np.lexsort((seqs, slots))
        slots, seqs = slots[order], seqs[order]
        values = None if values is None else values[order]
        new = seqs > self._table.confirmed[slots]
        if not new.all():
            slots, seqs, values = slots[new], seqs[new], None if values is None else values[new]
        if not len(slots):
            return False
        starts = np.flatnonzero(np.concatenate(([True], slots[1:] != slots[:-1])))
        rank = np.arange(len(slots)) - np.repeat(starts, np.diff(np.append(starts, len(slots))))
        next_one = seqs == self._table.confirmed[slots] + 1 + rank
        if next_one.all():
            self._accept(slots, seqs, values)
            return True
        # Prefills and other rows come in frames of their own, and may overtake one another.
        early = ~next_one
        self._early.append((slots[early], seqs[early], None if values is None else values[early]))
        np.maximum.at(self._table.seen, slots[early], seqs[early])
        if next_one.any():
            self._accept(slots[next_one], seqs[next_one], None if values is None else values[next_one])
        return bool(next_one.any())

    def _retry_early(self) -> bool:
        parts, self._early = self._early, []
        progress = [self._sort_out(*part) for part in parts]
        return any(progress)

    def _accept(self, slots: NDArray[np.int64], seqs: NDArray[np.int64], values: NDArray[Any] | None) -> None:
        """Rows in order, each its session's next after the one before."""
        table = self._table
        table.confirmed[slots] = seqs
        fresh = seqs > table.answered[slots]
        if fresh.all():
            table.answered[slots] = seqs
            self._deliver(slots, seqs, values)
        elif fresh.any():
            # The others were answered before a crash and are only replayed.
            fresh_slots, fresh_seqs = slots[fresh], seqs[fresh]
            table.answered[fresh_slots] = fresh_seqs
            self._deliver(fresh_slots, fresh_seqs, None if values is None else values[fresh])
        parked = slots[table.parked[slots]]
        if len(parked):
            self._outbox.wake(parked.tolist())
            self._wake()
        if self._recovery.active:
            held = slots[table.held[slots]]
            if len(held):
                np.maximum.at(table.seen, slots, seqs)
                self._recovery.progressed(np.unique(held).tolist())

    def _accept_one(self, slot: int, seq: int, values: NDArray[Any] | None) -> bool:
        """What `_accept` does, for one row of a session with nothing special about it; whether that was so. A client of one
        session has such frames alone, and the array operations would be most of what they cost."""
        table = self._table
        if seq != table.confirmed[slot] + 1 or seq <= table.answered[slot] or table.held[slot] or table.parked[slot]:
            return False
        table.confirmed[slot] = table.answered[slot] = seq
        identity, at = int(table.head_call[slot]), int(table.head_at[slot] + seq - table.head_first[slot])
        if seq == table.head_last[slot]:
            table.head_call[slot] = 0
            if table.more[slot]:
                self._core.next_span(slot)
        call = self._calls[identity]
        unwanted = call.settle(np.array([at]), values)
        if self._doubts:
            self._tell_doubts(unwanted, values, np.array([slot]), np.array([seq]))
        self._core.closed_rows(call)
        return True

    def _deliver(self, slots: NDArray[np.int64], seqs: NDArray[np.int64], values: NDArray[Any] | None) -> None:
        table = self._table
        while len(slots):
            in_head = (seqs <= table.head_last[slots]) & (table.head_call[slots] != 0)
            if in_head.all():
                self._deliver_heads(slots, seqs, values)
                return
            if not in_head.any():
                raise FrameError("an answer to a step that was not sent")
            self._deliver_heads(slots[in_head], seqs[in_head], None if values is None else values[in_head])
            rest = ~in_head
            slots, seqs, values = slots[rest], seqs[rest], None if values is None else values[rest]

    def _deliver_heads(self, slots: NDArray[np.int64], seqs: NDArray[np.int64], values: NDArray[Any] | None) -> None:
        table = self._table
        calls = table.head_call[slots]
        at = table.head_at[slots] + (seqs - table.head_first[slots])
        if bool((calls == calls[0]).all()):
            self._settle(int(calls[0]), at, values, slots, seqs)
        else:
            order = np.argsort(calls, kind="stable")
            cuts = np.flatnonzero(np.diff(calls[order])) + 1
            for group in np.split(order, cuts):
                some = None if values is None else values[group]
                self._settle(int(calls[group[0]]), at[group], some, slots[group], seqs[group])
        ended = slots[seqs == table.head_last[slots]]
        table.head_call[ended] = 0
        for slot in ended[table.more[ended]].tolist():
            self._core.next_span(slot)

    def _settle(
        self, identity: int, at: NDArray[np.int64], values: NDArray[Any] | None, slots: NDArray[np.int64],
        seqs: NDArray[np.int64],
    ) -> None:  # fmt: skip
        call = self._calls[identity]
        unwanted = call.settle(at, values)
        if self._doubts:
            self._tell_doubts(unwanted, values, slots, seqs)
        self._core.closed_rows(call)

    def _tell_doubts(
        self, unwanted: Sequence[int] | None, values: NDArray[Any] | None, slots: NDArray[np.int64],
        seqs: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Steps were answered; those at the places `unwanted` nobody waits for."""
        if unwanted is None:
            self._doubts.passed(slots, seqs)
        else:
            index = np.array(unwanted)
            self._doubts.passed(np.delete(slots, index), np.delete(seqs, index))
            self._doubts.answered(slots[index], seqs[index], None if values is None else values[index])
        self._core.let_on()

    def durable(self, frame: stream_pb2.DurableFrame) -> None:
        """Takes word that steps are durable."""
        slots = self._handles.slots(frame.handles)
        self._raise_durable(slots, np.frombuffer(frame.durable_seqs, "<i8"))
        self._log.trim()
        if self._outbox.pending:
            self._wake()

    def _raise_durable(self, slots: NDArray[np.int64], seqs: NDArray[np.int64]) -> None:
        known = slots >= 0
        np.maximum.at(self._table.durable, slots[known], seqs[known])
