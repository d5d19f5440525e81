"""The client's sessions as columns: one array per fact, one element per session. Used by _core.py and what it is made of.

A session's place in the columns is its slot. Slot numbers are used again only when nothing refers to the old session any
more. `uid` of a session is `base` + slot, so that sessions of two clients cannot be mixed up.

    sent >= answered >= acked           what was sent, whose answer has arrived, what the server was told of that
    sent >= confirmed                   what the server at the other end of this stream has answered for; behind `answered`
                                        only while steps lost in a crash are replayed
    head_*                              the oldest span of unanswered seqs: which call, and where in it the first one is
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._errors import EngramError, Fate, SessionClosedError

VOID_HANDLE = 0xFFFFFFFF
HANDLE_PLACE = np.uint32(0xFFFFF)  # the bits of a handle that are a small number; stream.proto

_COLUMNS: dict[str, type[np.generic]] = {
    "handle": np.uint32, "model": np.int32, "window": np.int64,
    "sent": np.int64, "answered": np.int64, "confirmed": np.int64, "durable": np.int64, "acked": np.int64,
    "noticed": np.int64,  # `answered` when the idle sessions were last looked for
    "row_first": np.int64,  # first seq of the last row sent
    "seen": np.int64,  # greatest seq that this stream has answered in any way; kept up for held sessions only
    "head_first": np.int64, "head_last": np.int64, "head_call": np.int64, "head_at": np.int64,
    "more": np.bool_,  # further spans are in `SessionTable.spans`
    "held": np.bool_,  # nothing new may be sent: not attached, or being put right
    "parked": np.bool_,  # calls wait in the outbox for this session
    "doubt": np.bool_,  # of steps sent before it is not known whether they were applied; see _fates.py
    "interval": np.bool_, "lost": np.bool_,
}  # fmt: skip

Span = tuple[int, int, int, int]  # first seq, last seq, call, place of the first in the call


class SessionTable:
    """Columns as attributes, each [capacity]. Slot 0 is nobody's."""

    handle: NDArray[np.uint32]
    model: NDArray[np.int32]
    window: NDArray[np.int64]
    sent: NDArray[np.int64]
    answered: NDArray[np.int64]
    confirmed: NDArray[np.int64]
    durable: NDArray[np.int64]
    acked: NDArray[np.int64]
    noticed: NDArray[np.int64]
    row_first: NDArray[np.int64]
    seen: NDArray[np.int64]
    head_first: NDArray[np.int64]
    head_last: NDArray[np.int64]
    head_call: NDArray[np.int64]
    head_at: NDArray[np.int64]
    more: NDArray[np.bool_]
    held: NDArray[np.bool_]
    parked: NDArray[np.bool_]
    doubt: NDArray[np.bool_]
    interval: NDArray[np.bool_]
    lost: NDArray[np.bool_]

    def __init__(self, base: int, capacity: int = 64) -> None:
        self.base = base
        self.capacity = capacity
        self.count = 1  # slots ever used, slot 0 with them
        self.ids: dict[int, str] = {}
        self.by_id: dict[str, int] = {}
        self.errors: dict[int, EngramError] = {}  # of lost sessions
        self.spans: dict[int, deque[Span]] = {}
        self._freed: deque[tuple[int, int]] = deque()  # (mark, slot)
        for name, dtype in _COLUMNS.items():
            setattr(self, name, np.zeros(capacity, dtype))
        self.lost[0] = True

    def add(self, session_id: str, mark: int) -> int:
        """A slot for a session; `mark` is the log's oldest part, see `free`."""
        if self._freed and self._freed[0][0] < mark:
            slot = self._freed.popleft()[1]
        else:
            if self.count == self.capacity:
                self._grow()
            slot = self.count
            self.count += 1
        for name in _COLUMNS:
            getattr(self, name)[slot] = 0
        self.handle[slot] = VOID_HANDLE
        self.held[slot] = True
        self.ids[slot] = session_id
        self.by_id[session_id] = slot
        return slot

    def free(self, slot: int, mark: int) -> None:
        """Gives a slot back. It is used again once the log holds no part as old as `mark`."""
        session_id = self.ids.pop(slot)
        if self.by_id.get(session_id) == slot:
            del self.by_id[session_id]
        self.errors.pop(slot, None)
        self.lost[slot] = True
        self._freed.append((mark, slot))

    def error_of(self, slot: int) -> EngramError:
        """Why a lost session is lost, for a call that is not sent: a new object each time."""
        error = self.errors.get(slot)
        made = SessionClosedError("the session was closed", reason="SESSION_CLOSED") if error is None else error.copy()
        made.fate = Fate(None, False)
        return made

    def settled(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The seq up to which a session's inputs need not be kept."""
        answered = self.answered[slots]
        safe = np.where(self.interval[slots], np.minimum(answered, self.durable[slots]), answered)
        return np.where(self.lost[slots], np.iinfo(np.int64).max, safe)

    def attached(self) -> NDArray[np.int64]:
        """Slots that have a handle on this stream."""
        return np.flatnonzero((self.handle[: self.count] != VOID_HANDLE) & ~self.lost[: self.count])

    def _grow(self) -> None:
        for name in _COLUMNS:
            old: NDArray[Any] = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(self.capacity, old.dtype)]))
        self.capacity *= 2
