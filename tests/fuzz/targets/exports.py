"""Export files: what `engram sessions import` is given, read as the server's ImportSession reads it."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from engram_service.errors import ServiceError
from engram_service.patterns.chunks import ChunkError
from engram_service.protocols.engram.exported import Exported, exported, imported
from engram_service.sessions.ids import check_id
from targets import chunks, records
from targets.world import world

_HEAD = struct.Struct("<8sHHHII")
_DIGEST_NBYTES = 16


def seeds() -> list[bytes]:
    lstm, hopfield = world().lstm, world().hopfield
    made = [
        Exported("cam-7", "lstm", "1", lstm.layout.initial(1, 1_700_000_000_000), []),
        Exported("µ", "lstm", "", records.record(9, 7, 2), []),
        Exported("patterns", "hopfield", "1", hopfield.layout.initial(1, 1_700_000_000_000), chunks.log()),
        Exported("x" * 128, "hopfield", "1", records.record(3, 2, 1, hopfield.layout), chunks.log()[:1]),
    ]
    return [exported(one) for one in made]


def mend(data: bytes) -> bytes:
    """The record's checksum, the memory's digests, and the digest over all."""
    if len(data) < _HEAD.size + _DIGEST_NBYTES:
        return data
    body = data[:-_DIGEST_NBYTES]
    _, *lengths, record_nbytes, count = _HEAD.unpack_from(body)
    at = _HEAD.size + sum(lengths)
    record = records.mended(body[at : at + record_nbytes])
    if len(record) == record_nbytes:
        body = body[:at] + record + body[at + record_nbytes :]
    start = at + record_nbytes
    if count <= 8 and start + 8 * count <= len(body):
        sizes = np.frombuffer(body, "<u8", count, start).tolist()
        if start + 8 * count + sum(sizes) == len(body):
            memory, rest = [], body[start + 8 * count :]
            for size in sizes:
                memory.append(rest[:size])
                rest = rest[size:]
            if all(size >= 64 for size in sizes):
                body = body[: start + 8 * count] + b"".join(chunks.mended(memory))
    return body + hashlib.blake2b(body, digest_size=_DIGEST_NBYTES).digest()


def fuzz_one(data: bytes) -> None:
    try:
        found = imported(data)
        served = world().offers.resolve(found.model, found.version)
        check_id(found.session_id)
    except ServiceError as refusal:
        if refusal.reason not in ("INVALID_EXPORT", "INVALID_SESSION_ID", "MODEL_NOT_FOUND", "VERSION_NOT_FOUND"):
            raise
        return
    assert exported(found) == data, "an export is not what it is read as"
    read = served.layout.unpack([found.record])
    if read.errors:
        return
    records.listed(int(read.seq[0]), int(read.acked[0]), int(read.commit_ms[0]))
    if found.memory:
        try:
            world().memories.check_log(served, found.memory)
        except ChunkError:
            return
        chunks.used(found.memory)
