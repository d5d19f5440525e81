"""Refused rows, resends and replays: the slow paths that keep a session in order. Used by _core.py.

A session with a refused row is held: nothing new is sent for it until the server has said something about every row that
was on its way, because those behind the refused one come back with SEQ_GAP. Then

  - a row that may succeed later (UNAVAILABLE, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, SEQ_GAP) is sent again with its
    seq, and all that follow it, after the time the server asked for or a growing one of our own;
  - a row that never will is taken out: its call fails with that very error; the rows of other calls behind it move up to
    the seqs that came free and are sent again. So one caller's bad input does not fail another's step;
  - so are rows that were not applied and whose callers have given up: they were told so, and it stays true;
  - a row of which the server cannot say whether it was applied keeps its seq, and is asked for until there is an answer. Its
    caller may have given up: see _fates.py.

That a row was not applied is known where the server says so of every time that it was sent, and where an attach says that the
session stands before it: what was on its way on the earlier stream comes too late.

Resends go in waves of at most the session's window, from the log; see Core.attached for replays after a crash.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram._calls import Call
from engram._errors import RETRYABLE, AbortedError, DataLossError, EngramError, Fate, TakenOverError
from engram._log import Moves
from engram._replay import Replay
from engram._state import ClientState
from engram._table import Span

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

    def __init__(self, core: ClientState) -> None:
        self._core = core
        self._holds: dict[int, Hold] = {}
        self._waves: dict[int, int] = {}
        self._attempts: dict[int, tuple[int, int]] = {}  # slot: (seq, how often it was refused)
        self._gone: dict[
            int, int
        ] = {}  # slot: from this seq on all is refused, and not applied, and not sent again yet
        self._unsure: dict[int, int] = {}  # slot: up to this seq something sent earlier may still be applied
        self._replays: dict[int, Replay] = {}  # slot: where the rows are that are sent again wave by wave
        self._begun = False  # whether this stream has sent anything again
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
        self._replays.clear()
        self._begun = False
        self._touched.clear()
        self._due.clear()
        self._epoch += 1

    def drop(self, slot: int) -> None:
        self._holds.pop(slot, None)
        self._waves.pop(slot, None)
        self._replays.pop(slot, None)
        if self._core.table.lost[slot]:
            self._attempts.pop(slot, None)
            self._gone.pop(slot, None)
            self._unsure.pop(slot, None)

    # What is known of rows without an answer

    def not_applied(self, slot: int, seq: int) -> bool:
        """Whether the server is sure that a step was not applied, and it is not on its way again."""
        return seq >= self._gone.get(slot, seq + 1)

    def _note(self, slot: int, seq: int, error: EngramError) -> None:
        if error.said_applied is None:
            self._unsure[slot] = max(seq, self._unsure.get(slot, 0))
        elif seq > self._unsure.get(slot, 0):
            self._gone[slot] = min(seq, self._gone.get(slot, seq))

    def said(self, slots: NDArray[np.int64], seqs: NDArray[np.int64]) -> None:
        """An attach says where these sessions stand; rows beyond that nobody waits for are withdrawn."""
        table = self._core.table
        moves: Moves = {}
        for slot in self._unsure.keys() & set(slots.tolist()):
            del self._unsure[slot]
        given_up = table.doubt[slots]
        if self._gone:
            given_up = given_up | np.isin(slots, list(self._gone))
        for slot, seq in zip(slots[given_up].tolist(), seqs[given_up].tolist(), strict=True):
            self._gone.pop(slot, None)
            self._remove(slot, max(int(seq), int(table.answered[slot])) + 1, None, moves)
        if moves:
            self._renumber(moves)

    # Refusals

    def refused(self, slot: int, seq: int, error: EngramError) -> None:
        """One row came back with an error; `settle_refusals` follows after the last of a frame."""
        table = self._core.table
        if table.lost[slot] or seq <= table.confirmed[slot] or seq > table.sent[slot]:
            return  # out of date
        if error.reason == "SEQ_GAP":
            self._expects(slot, error)
        if table.lost[slot]:
            return
        self._note(slot, seq, error)
        if isinstance(error, TakenOverError):
            self._core.dispute(np.array([slot]))
            return
        if isinstance(error, (AbortedError, DataLossError)) or error.reason in _FATAL_REASONS:
            self._core.lose(slot, error)
            return
        hold = self._holds.get(slot)
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

    def _expects(self, slot: int, error: EngramError) -> None:
        """The step that the server expects next is not applied. Where it failed, it may be one that it had answered: then the log
        has the steps to replay."""
        table = self._core.table
        if not error.metadata.get("next_seq", "").isdigit():
            return
        stands = int(error.metadata["next_seq"]) - 1
        if stands < self._unsure.get(slot, 0):
            self._unsure[slot] = stands
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
                self._withdraw(slot, moves)
                del self._holds[slot]
                again.append(slot)
            elif table.seen[slot] >= table.row_first[slot]:
                self._drained(slot, hold, again, moves)
        if moves:
            self._renumber(moves)
        if again:
            self.resend(np.array(again, np.int64))

    def _drained(self, slot: int, hold: Hold, again: list[int], moves: Moves) -> None:
        """All that was on its way has been answered or refused."""
        core, table = self._core, self._core.table
        call, at = core.call_of(slot, hold.seq)
        itself_wanted = call is not None and call.wanted(at)
        if not _retryable(hold.error):
            if self.not_applied(slot, hold.seq):
                if table.confirmed[slot] == hold.seq - 1:
                    self._take_out(slot, hold, again, moves)
                return
            core.fail_row(slot, hold.seq, hold.error)
            if hold.due:
                core.dispute(np.array([slot]))  # an attach tells what became of it
                return
        elif self._withdraw(slot, moves) and hold.seq >= moves[slot][0] and not itself_wanted:
            del self._holds[slot]
            again.append(slot)
            return
        if hold.due:
            del self._holds[slot]
            again.append(slot)
        elif not hold.scheduled:
            hold.scheduled = True
            self._note_trouble(slot, hold)
            self._schedule(slot, hold)

    def _withdraw(self, slot: int, moves: Moves) -> bool:
        """Takes out what was not applied and nobody waits for; whether there was any."""
        if slot in self._gone:
            start = max(self._gone[slot], int(self._core.table.answered[slot]) + 1)
            self._remove(slot, start, None, moves)
        return slot in moves

    def _note_trouble(self, slot: int, hold: Hold) -> None:
        call = self._core.calls.get(int(self._core.table.head_call[slot]))
        if call is not None and hold.error.code in RETRYABLE:
            call.trouble = hold.error
        if (doubt := self._core.doubts.get(slot)) is not None:
            doubt.trouble = hold.error

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
            core.lose(slot, DataLossError(message, reason="STATE_REWOUND"))
            return
        call, at = core.call_of(slot, hold.seq)
        assert call is not None  # what is sent and not answered is somebody's
        self._remove(slot, hold.seq, call, moves)
        error = hold.error.of_step(Fate(hold.seq, False))
        error.metadata.setdefault("seq", str(hold.seq))
        error.metadata.setdefault("row", str(at))
        call.refuse(at, error)
        core.closed_rows(call)
        del self._holds[slot]
        again.append(slot)

    def _remove(self, slot: int, start: int, culprit: Call | None, moves: Moves) -> None:
        """Takes out, from a seq on, what nobody waits for, and what fails with the culprit's row that is the first; what stands
        behind moves up."""
        core, table = self._core, self._core.table
        kept: list[Span] = []
        pieces: list[tuple[int, int, int]] = []
        removed = 0
        for first, last, owner, at in core.spans(slot):
            call, begin = core.calls[owner], max(first, start)
            if begin > last:
                kept.append((first, last, owner, at))
                continue
            fails = call is culprit and (not call.wide or first <= start)
            if not fails and call.wanted(at + begin - first):
                kept.append((first - removed, last - removed, owner, at))
                pieces.append((first, last, removed))
                continue
            removed += last - begin + 1
            call.open -= last - begin + 1
            if begin > first:
                kept.append((first, begin - 1, owner, at))
            core.doubts.withdrawn(slot, begin, last)
            if call is not culprit:
                core.closed_rows(call)
        if not removed:
            return
        moves[slot] = (start, pieces)
        table.sent[slot] -= removed
        table.head_call[slot], table.more[slot] = 0, False
        table.spans.pop(slot, None)
        if kept:
            table.spans[slot] = deque(kept)
            table.more[slot] = True
            core.next_span(slot)
        core.let_on()

    def _renumber(self, moves: Moves) -> None:
        self._core.log.renumber(moves)
        for slot in moves:
            self._replays.pop(slot, None)

    # Sending again

    def resend(self, slots: NDArray[np.int64]) -> None:
        """Sends what the log has after `confirmed`, as far as the windows go; sessions with no more than that are free."""
        core, table = self._core, self._core.table
        for slot in self._gone.keys() & set(slots.tolist()) if self._gone else ():
            del self._gone[slot]
        behind = slots[table.sent[slots] > table.confirmed[slots]]
        free = np.ones(len(slots), np.bool_)
        if len(behind):
            self._find(behind)
            by_replay: dict[int, list[int]] = {}
            replays = {id(self._replays[slot]): self._replays[slot] for slot in behind.tolist()}
            for slot in behind.tolist():
                by_replay.setdefault(id(self._replays[slot]), []).append(slot)
            for key, mine in by_replay.items():
                chosen = np.array(mine, np.int64)
                for wave in replays[key].wave(chosen, table.confirmed[chosen], table.window[chosen]):
                    # Rows stand in the order of their seqs: the last assignment is the greatest.
                    table.row_first[wave.slots] = wave.firsts
                    core.due.append(wave)
            more = table.sent[slots] > table.confirmed[slots] + table.window[slots]
            for slot in slots[more].tolist():
                self._waves[slot] = int(table.row_first[slot])
            free = ~more
        table.seen[slots] = 0
        for slot in slots[free].tolist():
            self._waves.pop(slot, None)
            self._replays.pop(slot, None)
        table.held[slots[free]] = False
        core.outbox.wake(slots[free].tolist())
        core.wake()

    def _find(self, slots: NDArray[np.int64]) -> None:
        """Looks rows up that are to be sent again. On a new stream that are those of all sessions, in one go; later a few."""
        table = self._core.table
        missing = [slot for slot in slots.tolist() if slot not in self._replays]
        if missing and not self._begun:
            self._begun = True
            replay = Replay(self._core.log.parts)
            # Those that are not held may send more, which it does not know.
            self._replays.update(dict.fromkeys((slot for slot in replay.slots() if table.held[slot]), replay))
            missing = [slot for slot in missing if slot not in self._replays]
        if missing:
            wanted = np.array(missing, np.int64)
            replay = Replay(self._core.log.newest_of(wanted, table.sent[wanted] - table.confirmed[wanted]), wanted)
            self._replays.update(dict.fromkeys(missing, replay))


def _retryable(error: EngramError) -> bool:
    return error.code in RETRYABLE or error.code == "DEADLINE_EXCEEDED" or error.reason == "SEQ_GAP"
