"""A session's memory as this server has it at hand: the patterns, and where in the log they stand. Used by memories.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_models import PatternError, PatternMemory
from engram_service.patterns.chunks import (
    FORGET,
    NUMBERS_MAX,
    STORE,
    WHOLE,
    Chunk,
    ChunkError,
    Operation,
    chain,
    unpack_chunk,
)
from engram_service.store import REVISION_NBYTES, revision_of

_OPERATIONS_MAX = 256  # that are known again; a call is repeated soon or never
_CHUNK_BYTES = 8 << 20  # of a memory that is written as a whole
_CHUNKS_FREE = 512  # a log may have so many, and one more for every so many patterns ...
_PATTERNS_A_CHUNK = 64
_PAST_MAX = 4096  # revisions that are known again
_FORGOTTEN_FREE = 1024  # ... and so many forgotten rows, and as many as there are patterns


class Held:
    """Patterns and their place in the log. Not thread-safe: memories.py locks.

    memory: the patterns. revision, length: of the log that they are the sum of; none: the model's own patterns.
    numbers: labels that servers made so far. losses: the store's count when the log was last found as it is here.
    It begins as a copy of `own`, the model's own patterns.
    """

    def __init__(self, own: PatternMemory) -> None:
        self.memory = own.copy()
        self.revision = b""
        self.length = 0
        self.numbers = 0
        self.losses = 0
        self.operations: OrderedDict[bytes, Operation] = OrderedDict()
        self._past: OrderedDict[bytes, None] = OrderedDict()  # revisions that the log had before
        self._size = self.memory.size
        self._forgotten = 0

    def follow(self, chunks: Sequence[bytes]) -> bool:
        """Applies the chunks that come next in the log; False where they are of another log. Raises ChunkError."""
        for data in chunks:
            chunk = unpack_chunk(data)
            if chunk.before != (self.revision or b"\0" * REVISION_NBYTES):
                return False
            self._apply(chunk)
            self._at(data[-REVISION_NBYTES:])
            self.length += 1
        return True

    def restart(self, chunks: Sequence[bytes]) -> None:
        """The log is another one, of these chunks. Raises ChunkError."""
        self.revision, self.length = b"", 0
        if not self.follow(chunks):
            raise ChunkError("the log does not begin with its first chunk")

    def replaced(self, chunks: Sequence[bytes]) -> None:
        """The log was replaced by these chunks, which say what it said before."""
        self._at(revision_of(chunks))
        self.length, self._forgotten = len(chunks), 0

    def outgrew(self, revision: bytes) -> bool:
        """Whether the log stood there before what is at hand was added: a log that stands there again is an older copy."""
        return revision in self._past and revision != self.revision

    def _at(self, revision: bytes) -> None:
        if self.revision:
            self._past[self.revision] = None
        while len(self._past) > _PAST_MAX:
            self._past.popitem(last=False)
        self.revision = revision

    def _apply(self, chunk: Chunk) -> None:
        if chunk.size != self._size:
            raise ChunkError(f"the log has patterns of {chunk.size} bits, the model of {self._size}")
        try:
            if chunk.kind == WHOLE:
                self.memory.remove(list(self.memory.labels))
                self.operations.clear()
                self._forgotten = 0
            if chunk.kind == FORGET:
                self.memory.remove(chunk.labels)
                self._forgotten += len(chunk.labels)
            elif chunk.labels:
                self.memory.check(chunk.bits, chunk.labels)
                self.memory.add(chunk.bits, chunk.labels)
        except PatternError as error:
            raise ChunkError(f"the log does not fit the model: {error}") from error
        self.numbers = chunk.numbers
        for operation in chunk.operations:
            self.operations[operation.id] = operation
            while len(self.operations) > _OPERATIONS_MAX:
                self.operations.popitem(last=False)

    # What comes next in the log

    def stored(self, operation: Operation, bits: NDArray[np.uint8], labels: Sequence[str], numbers: int) -> list[bytes]:
        """The chunks for new patterns: with the model's own before them where the log is still to begin.

        Raises PatternError where the log could not be read with so many labels numbered.
        """
        if numbers > NUMBERS_MAX:
            raise PatternError("MEMORY_FULL", f"{NUMBERS_MAX} labels were numbered, the limit; give labels of your own")
        begun = [] if self.length else self._whole([])
        return chain([*begun, Chunk(STORE, self._size, self.revision, numbers, [operation], labels, bits)])

    def forgot(self, operation: Operation, labels: Sequence[str]) -> list[bytes]:
        """The chunks for patterns forgotten."""
        begun = [] if self.length else self._whole([])
        none = np.empty((0, 0), np.uint8)
        return chain([*begun, Chunk(FORGET, self._size, self.revision, self.numbers, [operation], labels, none)])

    def emptied(self, operation: Operation) -> list[bytes]:
        """A log of nothing, which still knows the calls that were made."""
        operations = [*self.operations.values(), operation][-_OPERATIONS_MAX:]
        none = np.empty((0, 0), np.uint8)
        return chain([Chunk(WHOLE, self._size, b"", self.numbers, operations, [], none)])

    def whole(self) -> list[bytes]:
        """A log of what there is now."""
        return chain(self._whole(list(self.operations.values())))

    @property
    def wasteful(self) -> bool:
        """Whether the log would do better as a new one of what is left."""
        count = self.memory.count
        long = self.length > _CHUNKS_FREE + count // _PATTERNS_A_CHUNK
        return long or self._forgotten > _FORGOTTEN_FREE + count

    def _whole(self, operations: Sequence[Operation]) -> list[Chunk]:
        labels, bits = list(self.memory.labels), np.asarray(self.memory.bits)
        rows = max(1, _CHUNK_BYTES // (bits.shape[1] + 32)) if labels else 1
        chunks = []
        for start in range(0, max(1, len(labels)), rows):
            kind, known = (STORE, []) if start else (WHOLE, operations)
            part = slice(start, start + rows)
            chunks.append(Chunk(kind, self._size, b"", self.numbers, known, labels[part], bits[part]))
        return chunks


def unfold(own: PatternMemory, chunks: Sequence[bytes]) -> Held:
    """The memory that a whole log is the sum of, of a model with these patterns of its own. Raises ChunkError."""
    held = Held(own)
    held.restart(chunks)
    return held
