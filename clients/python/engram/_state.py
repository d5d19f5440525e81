"""What the client knows: its sessions, the steps that were sent, and who waits for them. _core.py and _recovery.py work on it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram._calls import Call, Gather
from engram._errors import EngramError
from engram._fates import Doubts
from engram._log import Part, SentLog
from engram._options import ClientOptions
from engram._outbox import Outbox
from engram._table import SessionTable, Span
from engram._tensors import Codec
from engram._types import ModelInfo


@dataclass(frozen=True, slots=True)
class ModelLink:
    """A model version as this client's sessions use it; sessions of one link attach together."""

    info: ModelInfo
    durability: int
    ttl_ms: int
    input: Codec
    output: Codec
    rows_max: int


class ClientState(ABC):
    """Core is the one that there is."""

    def __init__(
        self, options: ClientOptions, base: int, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]
    ) -> None:
        self.options = options
        self.loop = loop
        self.wake = wake
        self.table = SessionTable(base)
        self.models: list[ModelLink] = []
        self.log = SentLog(self.table, options.buffer_bytes_max)
        self.calls: dict[int, Call] = {}  # with rows sent and unanswered
        self.live: set[Call] = set()  # whom somebody waits for
        self.doubts = Doubts(self.table)
        self.outbox = Outbox(self.table, self.log, self.calls, self.doubts, options.frame_rows_max)
        self.due: list[Part] = []  # what is written next

    # Steps that are sent and not answered

    def call_of(self, slot: int, seq: int) -> tuple[Call | None, int]:
        """Whose row a step is that is not answered, and which of his."""
        for first, last, owner, at in self.spans(slot):
            if first <= seq <= last:
                return self.calls[owner], at + seq - first
        return None, 0

    def spans(self, slot: int) -> list[Span]:
        """A session's steps that are sent and not answered."""
        table = self.table
        if not table.head_call[slot]:
            return []
        answered, first, at = int(table.answered[slot]), int(table.head_first[slot]), int(table.head_at[slot])
        done = max(0, answered + 1 - first)
        head = (first + done, int(table.head_last[slot]), int(table.head_call[slot]), at + done)
        return [head, *table.spans.get(slot, ())]

    def closed_rows(self, call: Call) -> None:
        """After rows of a call were answered or refused."""
        if call.open <= 0:
            self.calls.pop(call.id, None)
            if isinstance(call, Gather) and not call.waiting():
                self.live.discard(call)

    def next_span(self, slot: int) -> None:
        """The head of a session is done: the next span becomes the head."""
        table = self.table
        spans = table.spans[slot]
        first, last, call, at = spans.popleft()
        table.head_first[slot], table.head_last[slot], table.head_call[slot], table.head_at[slot] = (
            first,
            last,
            call,
            at,
        )
        if not spans:
            del table.spans[slot]
            table.more[slot] = False

    def let_on(self) -> None:
        """Sessions that are in doubt no longer, or may be decided, go on."""
        if self.doubts.settled:
            settled, self.doubts.settled = self.doubts.settled, []
            self.outbox.wake(settled)
            self.wake()

    # What becomes of sessions

    @abstractmethod
    def fail_row(self, slot: int, seq: int, error: EngramError) -> None:
        """Fails the call of a step that was sent, and about which the server cannot say whether it was applied."""

    @abstractmethod
    def dispute(self, slots: NDArray[np.int64]) -> None:
        """These sessions were taken over: by another client, or by an attach of our own on an earlier stream, which came late.
        An attach tells, for it never takes a session from another client."""

    @abstractmethod
    def diverged(self, slot: int, seq: int) -> None:
        """The session is not where it must be: nothing that this client has can put it right."""

    @abstractmethod
    def lose(self, slot: int, error: EngramError) -> None:
        """A session is no longer ours: its calls fail, the others are not touched."""
