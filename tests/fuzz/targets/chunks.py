"""A memory's log: chunks out of Redis or an export, one after the other, until one does not fit."""

from __future__ import annotations

import hashlib

import numpy as np

from engram_models import LABEL_BYTES_MAX, PatternError
from engram_service.patterns.chunks import FORGET, STORE, WHOLE, Chunk, ChunkError, Operation, chain
from engram_service.patterns.held import Held, unfold
from engram_service.patterns.memories import _first_number
from engram_service.store import REVISION_NBYTES
from targets.mutation import joined, parted
from targets.world import world

_OWN = world().offers.resolve("hopfield").queries.patterns
_SIZE = world().hopfield.bundle.schema.inputs[0].size
_BEFORE = 8  # where the digest of the log before stands in a chunk


def log() -> list[bytes]:
    """The model's own patterns, some more, one forgotten."""
    assert _OWN is not None
    bits = np.packbits(np.random.default_rng(1).integers(0, 2, (4, _SIZE), np.uint8), axis=1)
    none = np.empty((0, 0), np.uint8)
    operations = [Operation(bytes([n]) * 16, n, 2, STORE) for n in range(2)]
    own = Held(_OWN)
    return chain([
        Chunk(WHOLE, _SIZE, b"", 0, operations[:1], list(own.memory.labels), np.asarray(own.memory.bits)),
        Chunk(STORE, _SIZE, b"", 2, operations, ["p0", "p1"], bits[:2]),
        Chunk(FORGET, _SIZE, b"", 2, [], ["a"], none),
        Chunk(STORE, _SIZE, b"", 2, operations[:1], ["µ", "x" * 40], bits[2:]),
    ])  # fmt: skip


def seeds() -> list[bytes]:
    whole = log()
    return [joined(whole), *(joined(whole[:count]) for count in (1, 2))]


def mend(data: bytes) -> bytes:
    return joined(mended(parted(data)))


def mended(chunks: list[bytes]) -> list[bytes]:
    """The chunks with the digests that make a chain of them."""
    made: list[bytes] = []
    for chunk in chunks:
        before = made[-1][-REVISION_NBYTES:] if made else bytes(REVISION_NBYTES)
        body = chunk[:-REVISION_NBYTES]
        body = body[:_BEFORE] + before + body[_BEFORE + REVISION_NBYTES :]
        made.append(body + hashlib.blake2b(body, digest_size=REVISION_NBYTES).digest())
    return made


def fuzz_one(data: bytes) -> None:
    used(parted(data))


def used(chunks: list[bytes]) -> None:
    """Reads a log as an import and a recall do; a log that is accepted can be gone on with."""
    assert _OWN is not None
    if not chunks:
        return
    try:
        held = unfold(_OWN, chunks)
    except ChunkError:
        return
    assert all(0 < len(label.encode()) <= LABEL_BYTES_MAX for label in held.memory.labels)
    whole = held.whole()
    again = unfold(_OWN, whole)
    assert list(again.memory.labels) == list(held.memory.labels)
    assert np.array_equal(again.memory.bits, held.memory.bits)
    first = _first_number(held, 2)
    names = [f"p{first + row}" for row in range(2)]
    bits = np.zeros((2, (_SIZE + 7) // 8), np.uint8)
    try:
        held.memory.check(bits, names)
        new = held.stored(Operation(b"n" * 16, first, 2, STORE), bits, names, first + 2)
    except PatternError as error:
        if error.reason != "MEMORY_FULL":
            raise
        return
    assert held.follow(new)
