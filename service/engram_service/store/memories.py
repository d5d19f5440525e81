"""Memories in Redis: of each session that stored patterns, a log of chunks. Used by patterns/memories.py, and by fork and export.

The log is a list that only grows, or is replaced as a whole. Its last chunk's last 16 bytes are the memory's revision, which
the session's hash repeats: a chunk's digest that takes in the digest before it, so that equal revisions are equal logs,
whatever became of the session in between. What a chunk holds is patterns/chunks.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engram_service.store import scripts
from engram_service.store.keys import memory_key, meta_key, session_tag
from engram_service.store.scripts import Script
from engram_service.store.types import MemoryHead, StoreUnavailableError, Written

REVISION_NBYTES = 16
_READ_CHUNKS = 64  # in one answer
_COPY_TRIES = 20

Scripted = Callable[[Script, Sequence[bytes], Sequence[Sequence[Any]], bool], list[Any]]
Pipelined = Callable[[Sequence[bytes], Callable[[Any, int], object]], list[Any]]


def revision_of(chunks: Sequence[bytes]) -> bytes:
    """The revision of a log that ends in these chunks."""
    return chunks[-1][-REVISION_NBYTES:] if chunks else b""


class MemoryLogs:
    """Reads and writes logs. Blocking and thread-safe; raises StoreUnavailableError."""

    def __init__(self, scripted: Scripted, pipelined: Pipelined) -> None:
        self._look, self._write = Script(scripts.LOOK), Script(scripts.WRITE)
        self._scripted = scripted
        self._pipelined = pipelined

    def look(self, session_id: str) -> MemoryHead | None:
        """What the session's memory is at; None if there is no such session. Renews the session's time."""
        found = self._scripted(self._look, [meta_key(session_tag(session_id))], [[]], False)[0]
        if found is None:
            return None
        model, _, version = found[0].decode().rpartition("/")
        return MemoryHead(model, version, found[1].decode(), found[2], int(found[3]), int(found[4]))

    def chunks(self, session_id: str, start: int = 0) -> list[bytes]:
        """The log from chunk `start` on, as it is read: it may be another one by the end."""
        key = memory_key(session_tag(session_id))
        found: list[bytes] = []
        while True:
            part = self._part(key, start + len(found))
            found += part
            if len(part) < _READ_CHUNKS:
                return found

    def _part(self, key: bytes, first: int) -> list[bytes]:
        found: list[bytes] = self._pipelined([key], lambda pipe, at: pipe.lrange(key, first, first + _READ_CHUNKS - 1))[
            0
        ]
        return found

    def write(self, session_id: str, head: MemoryHead, chunks: Sequence[bytes], replace: bool = False) -> Written:
        """Adds chunks to the log that `head` tells of, or puts them in its place. May be repeated after StoreUnavailableError."""
        args = [head.fingerprint, head.revision, head.length, revision_of(chunks), int(replace), *chunks]
        return Written(self._scripted(self._write, [meta_key(session_tag(session_id))], [args], True)[0])

    def copy(self, session_id: str) -> list[bytes]:
        """The whole log as it stood at one time; empty where the session has none."""
        for _ in range(_COPY_TRIES):
            head = self.look(session_id)
            if head is None or not head.revision:
                return []
            chunks = self.chunks(session_id)
            if len(chunks) == head.length and revision_of(chunks) == head.revision:
                return chunks
        raise StoreUnavailableError("the memory changes faster than it can be read")
