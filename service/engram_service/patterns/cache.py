"""The memories that this server has at hand, the longest unused let go of first. Used by memories.py from many threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from engram_service.patterns.held import Held


@dataclass(slots=True)
class Slot:
    """Place of one memory. Who looks what it is at, or changes it, has the lock; who only recalls from it is counted."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    quiet: threading.Condition = field(default_factory=threading.Condition)
    readers: int = 0
    held: Held | None = None
    fingerprint: str = ""  # of the model whose network the patterns are in
    created_ms: int = 0  # of the session
    nbytes: int = 0  # as the cache has counted it

    def enter(self) -> None:
        """One more recalls from it. Called with the lock held, so that a change which waits is not overtaken."""
        with self.quiet:
            self.readers += 1

    def leave(self) -> None:
        with self.quiet:
            self.readers -= 1
            self.quiet.notify_all()

    def until_quiet(self) -> None:
        """Waits until nobody recalls from it. Called with the lock held, so that nobody begins to."""
        with self.quiet:
            self.quiet.wait_for(lambda: not self.readers)


class Cache:
    """Slots by session id. `nbytes` is at most `nbytes_max`, unless one memory alone is larger."""

    def __init__(self, nbytes_max: int) -> None:
        self.nbytes = 0
        self._nbytes_max = nbytes_max
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._lock = threading.Lock()

    def slot(self, session_id: str) -> Slot:
        """The session's slot, made if need be."""
        with self._lock:
            slot = self._slots.setdefault(session_id, Slot())
            self._slots.move_to_end(session_id)
            return slot

    def used(self, session_id: str, slot: Slot) -> None:
        """Counts what the slot has grown to, and makes room. Called with the slot's lock held."""
        now = slot.held.memory.nbytes if slot.held is not None else 0
        with self._lock:
            if self._slots.get(session_id) is not slot:
                return  # it was let go of meanwhile
            if not now:
                del self._slots[session_id]
            self.nbytes += now - slot.nbytes
            slot.nbytes = now
            while self.nbytes > self._nbytes_max and len(self._slots) > 1:
                _, oldest = self._slots.popitem(last=False)
                self.nbytes -= oldest.nbytes
