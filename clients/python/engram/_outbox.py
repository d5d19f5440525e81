"""What callers want sent. `take` decides, without any I/O, which rows go now: those of sessions that are free to go on and
have room in their window. The rest is parked by session, in order, until `wake`. Used by _core.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram._calls import FEEDBACK, Call, Gather
from engram._fates import Doubts
from engram._log import Part, SentLog
from engram._table import SessionTable


@dataclass(slots=True)
class Wide:
    """Rows of a call, each of another session."""

    call: Call
    slots: NDArray[np.int64]
    at: NDArray[np.int64]


@dataclass(slots=True)
class Long:
    """Rows at..stop-1 of a call, all of one session, in order."""

    call: Call
    slot: int
    at: int
    stop: int


class Outbox:
    """Per-session order is kept: whatever is parked for a session goes before what comes later."""

    def __init__(
        self, table: SessionTable, log: SentLog, calls: dict[int, Call], doubts: Doubts, rows_max: int
    ) -> None:
        self.rows_max = rows_max  # of one call's rows in one frame
        self._table = table
        self._log = log
        self._calls = calls
        self._doubts = doubts
        self._ids = 0
        self._ready: deque[Wide | Long | Gather] = deque()
        self._open_gathers: dict[int, Gather] = {}
        self._parked: dict[int, deque[Long]] = {}
        self._woken: dict[int, None] = {}

    @property
    def pending(self) -> bool:
        """Whether `take` may have something to send."""
        return bool(self._ready or self._woken)

    def gather(self, model: int) -> Gather | None:
        """The gather that single rows of this model may still join."""
        return self._open_gathers.get(model)

    def put_gather(self, model: int, gather: Gather) -> None:
        self._open_gathers[model] = gather
        self._ready.append(gather)

    def put_wide(self, call: Call, slots: NDArray[np.int64]) -> None:
        self._open_gathers.clear()
        self._ready.append(Wide(call, slots, np.arange(len(slots))))

    def put_long(self, call: Call, slot: int) -> None:
        self._open_gathers.clear()
        self._ready.append(Long(call, slot, 0, call.rows))

    def wake(self, slots: list[int]) -> None:
        """These sessions may go on, if anything is parked for them."""
        for slot in slots:
            if slot in self._parked:
                self._woken[slot] = None

    def forget(self, slot: int) -> list[Long]:
        """Drops what is parked for a session, and returns it."""
        self._table.parked[slot] = False
        self._woken.pop(slot, None)
        return list(self._parked.pop(slot, ()))

    def take(self) -> list[Part]:
        """The rows to send now, entered in the table and in the log."""
        parts: list[Part] = []
        woken, self._woken = self._woken, {}
        for slot in woken:
            self._take_parked(slot, parts)
        ready, self._ready = self._ready, deque()
        self._open_gathers.clear()
        while ready:
            if self._log.full:
                self._ready = ready
                break
            item = ready.popleft()
            if isinstance(item, Gather):
                item.seal()
                if item.rows == 1:  # the same, without the arrays
                    self._take_long(Long(item, item.slots[0], 0, 1), parts)
                    continue
                self._take_wide(Wide(item, np.array(item.slots, np.int64), np.arange(item.rows)), parts)
            elif isinstance(item, Wide):
                self._take_wide(item, parts)
            else:
                self._take_long(item, parts)
        return parts

    def _take_wide(self, item: Wide, parts: list[Part]) -> None:
        call, slots, at, table = item.call, item.slots, item.at, self._table
        wanted = call.all_wanted()
        if wanted is not None:
            slots, at = slots[wanted[at]], at[wanted[at]]
        while len(slots):
            later = _repeats(slots)
            now_slots, now_at = (slots, at) if later is None else (slots[~later], at[~later])
            stopped = table.held[now_slots] | table.parked[now_slots] | table.doubt[now_slots]
            stopped |= table.sent[now_slots] - table.confirmed[now_slots] >= table.window[now_slots]
            if stopped.any():
                for slot, place in zip(now_slots[stopped].tolist(), now_at[stopped].tolist(), strict=True):
                    self._park(Long(call, slot, place, place + 1))
                if self._doubts:
                    for slot in now_slots[table.doubt[now_slots]].tolist():
                        self._take_parked(slot, parts)
                now_slots, now_at = now_slots[~stopped], now_at[~stopped]
            if len(now_slots):
                self._send_wide(call, now_slots, now_at, parts)
            if later is None:
                return
            slots, at = slots[later], at[later]

    def _send_wide(self, call: Call, slots: NDArray[np.int64], at: NDArray[np.int64], parts: list[Part]) -> None:
        table = self._table
        seqs = table.sent[slots] + 1
        busy = table.head_call[slots] != 0
        identity = self._identity(call, len(slots))
        if busy.any():
            for slot, seq, place in zip(slots[busy].tolist(), seqs[busy].tolist(), at[busy].tolist(), strict=True):
                table.spans.setdefault(slot, deque()).append((seq, seq, identity, place))
            table.more[slots[busy]] = True
            free = ~busy
            heads, head_seqs, places = slots[free], seqs[free], at[free]
        else:
            heads, head_seqs, places = slots, seqs, at
        table.head_call[heads] = identity
        table.head_first[heads] = table.head_last[heads] = head_seqs
        table.head_at[heads] = places
        table.sent[slots] = table.row_first[slots] = seqs
        assert call.inputs is not None  # wide calls have inputs
        inputs = call.inputs if len(at) == call.rows else call.inputs[at]
        self._add(Part(int(table.model[slots[0]]), slots, seqs, seqs, inputs, call.flags, call.deadline), parts)

    def _take_long(self, item: Long, parts: list[Part]) -> None:
        table = self._table
        if table.doubt[item.slot]:
            self._park(item)
            self._take_parked(item.slot, parts)
        elif table.held[item.slot] or table.parked[item.slot] or not self._send_long(item, parts):
            self._park(item)

    def _take_parked(self, slot: int, parts: list[Part]) -> None:
        items = self._parked.get(slot)
        while items and not self._table.held[slot]:
            if self._log.full:
                self._woken[slot] = None
                return
            if not self._resolved(slot, items[0]):
                return
            if not self._send_long(items[0], parts):
                return
            items.popleft()
        if not items:
            self._parked.pop(slot, None)
            self._table.parked[slot] = False

    def _resolved(self, slot: int, item: Long) -> bool:
        """Whether a session is in doubt no longer, and this may go; its rows may turn out to be answered already."""
        if not self._table.doubt[slot] or not item.call.wanted(item.at):
            return True
        count = self._doubts.resolve(slot, item.call, item.at, item.stop)
        item.at += count or 0
        return count is not None

    def _send_long(self, item: Long, parts: list[Part]) -> bool:
        """Sends as many rows as have room; whether that was all of them."""
        call, slot, table = item.call, item.slot, self._table
        if item.at == item.stop or not call.wanted(item.at):
            return True
        first = int(table.sent[slot]) + 1
        room = int(table.window[slot] - (table.sent[slot] - table.confirmed[slot]))
        count = min(room, item.stop - item.at, self.rows_max)
        if count <= 0:
            return False
        last = first + count - 1
        identity = self._identity(call, count)
        if table.head_call[slot]:
            table.spans.setdefault(slot, deque()).append((first, last, identity, item.at))
            table.more[slot] = True
        else:
            table.head_first[slot], table.head_last[slot] = first, last
            table.head_call[slot], table.head_at[slot] = identity, item.at
        table.sent[slot] = last
        model = int(table.model[slot])
        if call.inputs is None:
            # One row that repeats: the server runs it on its own output.
            table.row_first[slot] = first
            one = np.array([slot], np.int64)
            self._add(
                Part(model, one, np.array([first]), np.array([last]), None, call.flags | FEEDBACK, call.deadline), parts
            )
        else:
            table.row_first[slot] = last
            seqs = np.arange(first, last + 1)
            inputs = call.inputs[item.at : item.at + count]
            self._add(Part(model, np.full(count, slot, np.int64), seqs, seqs, inputs, call.flags, call.deadline), parts)
        item.at += count
        return item.at == item.stop

    def _park(self, item: Long) -> None:
        if self._table.lost[item.slot]:
            item.call.refuse(item.at, self._table.error_of(item.slot))
            return
        items = self._parked.setdefault(item.slot, deque())
        while items and not items[-1].call.wanted(items[-1].at):
            items.pop()  # callers who try again and again leave nothing behind
        items.append(item)
        self._table.parked[item.slot] = True

    def _add(self, part: Part, parts: list[Part]) -> None:
        self._log.append(part)
        parts.append(part)

    def _identity(self, call: Call, rows: int) -> int:
        if not call.id:
            self._ids += 1
            call.id = self._ids
        call.open += rows
        self._calls[call.id] = call
        return call.id


def _repeats(slots: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Which rows are of a session that an earlier row is of; None: no row is."""
    if len(slots) < 2 or bool((slots[1:] > slots[:-1]).all()):
        return None
    order = np.argsort(slots, kind="stable")
    again = slots[order][1:] == slots[order][:-1]
    if not again.any():
        return None
    later = np.zeros(len(slots), np.bool_)
    later[order[1:]] = again
    return later
