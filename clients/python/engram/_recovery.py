"""Refused rows, resends and replays: the slow paths that keep a session in order. Used by _core.py.

A session with a refused row is held: nothing new is sent for it until the server has said something about every row that
was on its way, because those behind the refused one come back with SEQ_GAP. Then

  - a row that may succeed later (UNAVAILABLE, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, SEQ_GAP) is sent again with its
    seq, and all that follow it, after the time the server asked for or a growing one of our own;
  - a row that never will is taken out: its call fails with that very error; the rows of other calls behind it move up to
    the seqs that came free and are sent again. So one caller's bad input does not fail another's step. So is a row that was
    not applied in time and whose caller has given up, and all behind it that nobody waits for: else a server with too much to
    do would be kept busy with steps that are worth nothing any more.

Resends go in waves of at most the session's window, from the log; see Core.attached for replays after a crash.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engram._errors import RETRYABLE, Aborted, DataLoss, EngramError, TakenOver
from engram._log import Moves
from engram._table import Span

if TYPE_CHECKING:
    from engram._core import Core

_RETRY_S = 0.05
_RETRY_MAX_S = 2.0
_FATAL_REASONS = frozenset({"INVALID_HANDLE", "FINGERPRINT_MISMATCH", "SESSION_NOT_FOUND"})


@dataclass(slots=True)
class Hold:
    """A session's oldest refused row. `due`: the time to send it again has come, or does not matter."""

    seq: int
    error: EngramError
    scheduled: bool = False
    due: bool = False


class Recovery:
    """Holds by slot, and the ends of waves by slot."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._holds: dict[int, Hold] = {}
        self._waves: dict[int, int] = {}
        self._attempts: dict[int, tuple[int, int]] = {}  # slot: (seq, how often it was refused)
        self._touched: dict[int, None] = {}
        self._due: dict[float, list[tuple[int, Hold]]] = {}
        self._epoch = 0

    @property
    def active(self) -> bool:
        """Whether any session is held or in the middle of a resend."""
        return bool(self._holds or self._waves)

    def reset(self) -> None:
        """The stream is gone; after the next one is there, `resend` starts anew."""
        self._holds.clear()
        self._waves.clear()
        self._touched.clear()
        self._due.clear()
        self._epoch += 1

    def drop(self, slot: int) -> None:
        self._holds.pop(slot, None)
        self._waves.pop(slot, None)
        self._attempts.pop(slot, None)

    # Refusals

    def refused(self, slot: int, seq: int, error: EngramError) -> None:
        """One row came back with an error; `settle_refusals` follows after the last of a frame."""
        table = self._core.table
        if table.lost[slot] or seq <= table.confirmed[slot] or seq > table.sent[slot]:
            return  # out of date
        if isinstance(error, TakenOver):
            self._core.dispute(np.array([slot]))
            return
        if isinstance(error, (Aborted, DataLoss)) or error.reason in _FATAL_REASONS:
            self._core.lose(slot, error)
            return
        hold = self._holds.get(slot)
        if error.reason == "SEQ_GAP":
            self._rewind(slot, error)
        if table.lost[slot]:
            return
        if hold is None:
            self._holds[slot] = Hold(seq, error)
            table.held[slot] = True
            table.seen[slot] = max(int(table.seen[slot]), seq)
            self._waves.pop(slot, None)
        else:
            if seq < hold.seq:
                hold.seq, hold.error = seq, error
            table.seen[slot] = max(int(table.seen[slot]), seq)
        self._touched[slot] = None

    def _rewind(self, slot: int, error: EngramError) -> None:
        """A server that failed may expect a step that it had answered: then the log has the steps to replay."""
        table = self._core.table
        if not error.metadata.get("next_seq", "").isdigit():
            return
        stands = int(error.metadata["next_seq"]) - 1
        if stands < table.confirmed[slot]:
            if stands < (table.durable[slot] if table.interval[slot] else table.answered[slot]):
                self._core.diverged(slot, stands)
            else:
                table.confirmed[slot] = stands

    def settle_refusals(self) -> None:
        touched, self._touched = self._touched, {}
        self.progressed(list(touched))

    def progressed(self, slots: list[int]) -> None:
        """Something was answered for these held sessions: perhaps the next thing can be done for them."""
        table = self._core.table
        again: list[int] = []
        moves: Moves = {}
        for slot in slots:
            hold = self._holds.get(slot)
            if hold is None:
                if slot in self._waves and table.confirmed[slot] >= self._waves[slot]:
                    again.append(slot)
            elif table.confirmed[slot] >= hold.seq:
                # The row was computed after all, and its answer came.
                del self._holds[slot]
                again.append(slot)
            elif table.seen[slot] >= table.row_first[slot]:
                self._drained(slot, hold, again, moves)
        if moves:
            self._core.log.renumber(moves)
        if again:
            self.resend(np.array(again, np.int64))

    def _drained(self, slot: int, hold: Hold, again: list[int], moves: Moves) -> None:
        """All that was on its way has been answered or refused."""
        if not _retryable(hold.error) or self._given_up(slot, hold):
            if self._core.table.confirmed[slot] == hold.seq - 1:
                self._take_out(slot, hold, again, moves)
            return
        if hold.due:
            del self._holds[slot]
            again.append(slot)
        elif not hold.scheduled:
            hold.scheduled = True
            self._note_trouble(slot, hold)
            self._schedule(slot, hold)

    def _given_up(self, slot: int, hold: Hold) -> bool:
        """Whether nobody waits for the refused row, and the server is sure that it was not applied."""
        table = self._core.table
        if hold.error.metadata.get("applied") != "no" or hold.seq != table.answered[slot] + 1:
            return False
        call = self._core.calls.get(int(table.head_call[slot]))
        return call is not None and not call.wanted(int(table.head_at[slot] + hold.seq - table.head_first[slot]))

    def _note_trouble(self, slot: int, hold: Hold) -> None:
        call = self._core.calls.get(int(self._core.table.head_call[slot]))
        if call is not None and hold.error.code in RETRYABLE:
            call.trouble = hold.error

    def _schedule(self, slot: int, hold: Hold) -> None:
        seq, count = self._attempts.get(slot, (0, 0))
        count = count + 1 if seq == hold.seq else 1
        self._attempts[slot] = (hold.seq, count)
        own = min(_RETRY_MAX_S, _RETRY_S * 2 ** min(count - 1, 10))
        delay = max(hold.error.retry_after or 0.0, own if count > 1 else 0.0) or _RETRY_S
        # Rounded, so that sessions refused together are sent again together.
        due = round(self._core.loop.time() + delay * random.uniform(1.0, 1.1), 2)
        if due not in self._due:
            self._due[due] = []
            self._core.loop.call_at(due, self._come_due, due, self._epoch)
        self._due[due].append((slot, hold))

    def _come_due(self, due: float, epoch: int) -> None:
        if epoch != self._epoch:
            return
        slots = []
        for slot, hold in self._due.pop(due, []):
            hold.due = True
            if self._holds.get(slot) is hold:
                slots.append(slot)
        self.progressed(slots)

    # A row that never succeeds

    def _take_out(self, slot: int, hold: Hold, again: list[int], moves: Moves) -> None:
        core, table = self._core, self._core.table
        if hold.seq <= table.answered[slot]:
            message = (
                f"step {hold.seq}, which had been answered, was refused when it was replayed: {hold.error.message}"
            )
            core.lose(slot, DataLoss(message, reason="STATE_REWOUND"))
            return
        identity = int(table.head_call[slot])
        call = core.calls[identity]
        first, at = int(table.head_first[slot]), int(table.head_at[slot])
        spans: list[Span] = [(first, int(table.head_last[slot]), identity, at), *table.spans.pop(slot, ())]
        kept: list[Span] = []
        removed = 0
        moves[slot] = (hold.seq, [])
        for number, (start, stop, owner, place) in enumerate(spans):
            other = core.calls[owner]
            if number == 0 or (owner == identity and not call.wide) or not other.wanted(place):
                gone = stop - (hold.seq if number == 0 else start) + 1
                removed += gone
                other.open -= gone
                if other is not call:
                    core.closed_rows(other)
                continue
            kept.append((start - removed, stop - removed, owner, place))
            moves[slot][1].append((start, stop, removed))
        table.sent[slot] -= removed
        table.more[slot] = False
        table.head_call[slot] = 0
        if kept:
            table.spans[slot] = deque(kept)
            core.next_span(slot)
            table.more[slot] = slot in table.spans
        error = hold.error.copy()
        error.metadata.setdefault("seq", str(hold.seq))
        error.metadata.setdefault("row", str(at + hold.seq - first))
        call.refuse(at + hold.seq - first, error)
        core.closed_rows(call)
        del self._holds[slot]
        again.append(slot)

    # Sending again

    def resend(self, slots: NDArray[np.int64]) -> None:
        """Sends what the log has after `confirmed`, as far as the windows go; sessions with no more than that are free."""
        core, table = self._core, self._core.table
        free = np.ones(len(slots), np.bool_)
        if bool((table.sent[slots] > table.confirmed[slots]).any()):
            for part in core.log.after(slots, table.confirmed[slots]):
                starts = np.flatnonzero(np.concatenate(([True], part.slots[1:] != part.slots[:-1])))
                rank = np.arange(len(part.slots)) - np.repeat(starts, np.diff(np.append(starts, len(part.slots))))
                now = rank < table.window[part.slots]
                wave = part if now.all() else part.only(now)
                # Rows stand in the order of their seqs: the last assignment is the greatest.
                table.row_first[wave.slots] = wave.firsts
                core.due.append(wave)
                if wave is not part:
                    for slot in np.unique(part.slots[~now]).tolist():
                        self._waves[slot] = int(table.row_first[slot])
                        free[slots == slot] = False
        table.seen[slots] = 0
        for slot in slots[free].tolist():
            self._waves.pop(slot, None)
        table.held[slots[free]] = False
        core.outbox.wake(slots[free].tolist())
        core.wake()


def _retryable(error: EngramError) -> bool:
    return error.code in RETRYABLE or error.code == "DEADLINE_EXCEEDED" or error.reason == "SEQ_GAP"
