"""A memory's log as bytes: chunks of patterns stored or forgotten. Pure; used by held.py and memories.py.

    64 bytes: magic, schema, kind, digest before, bits of a pattern, rows, operations, bytes of labels, numbers given
    operations x 32 bytes: id, first number, rows, kind
    rows x 2 bytes: lengths of the labels | labels in UTF-8
    rows x ceil(bits / 8) bytes: patterns; none where they are forgotten
    16 bytes: BLAKE2b of all before

The digest before makes a chain of the log: a chunk fits after one log alone, and a log's last digest is its revision.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_models import LABEL_BYTES_MAX
from engram_service.store import REVISION_NBYTES

NUMBERS_MAX = 2**63  # labels that servers made in a session's life: there must be room to go on
WHOLE, STORE, FORGET = 1, 2, 3  # WHOLE: the memory begins with these rows, whatever was before

_MAGIC, _SCHEMA = b"EGMM", 1
_HEADER = struct.Struct("<4sBB2x16sIIIIQ16x")
_OPERATION = struct.Struct("<16sQII")


class ChunkError(Exception):
    """Bytes that are no chunk, or not the chunk that comes next. The message says why."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What one call did: kept in the log, so that a repeat of it is known wherever it arrives."""

    id: bytes  # 16 bytes
    first: int  # number of its first label, where the server made them
    rows: int
    kind: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows stored or forgotten. bits: uint8 [rows, ceil(size / 8)], or [0, ...] where they are forgotten."""

    kind: int
    size: int
    before: bytes  # revision of the log that it continues
    numbers: int  # labels numbered so far, this chunk's with them
    operations: Sequence[Operation]
    labels: Sequence[str]
    bits: NDArray[np.uint8]


def width_of(size: int) -> int:
    """Bytes of a pattern of so many bits."""
    return -(-size // 8)


def pack_chunk(chunk: Chunk) -> bytes:
    """The chunk as bytes; their last 16 are the revision of a log that ends with it."""
    encoded = [label.encode() for label in chunk.labels]
    text = b"".join(encoded)
    lengths = np.fromiter(map(len, encoded), "<u2", len(encoded))
    head = _HEADER.pack(_MAGIC, _SCHEMA, chunk.kind, chunk.before.ljust(REVISION_NBYTES, b"\0"), chunk.size, len(encoded),
                        len(chunk.operations), len(text), chunk.numbers)  # fmt: skip
    operations = b"".join(_OPERATION.pack(one.id, one.first, one.rows, one.kind) for one in chunk.operations)
    body = b"".join((head, operations, lengths.tobytes(), text, chunk.bits.tobytes()))
    return body + _digest(body)


def begins_log(data: bytes) -> bool:
    """Whether a log begins with this chunk, rather than goes on."""
    return data[len(_MAGIC) + 1] == WHOLE


def unpack_chunk(data: bytes) -> Chunk:
    """Raises ChunkError."""
    if len(data) < _HEADER.size + REVISION_NBYTES or _digest(memoryview(data)[:-REVISION_NBYTES]) != data[-16:]:
        raise ChunkError("a chunk is damaged: its digest does not fit")
    magic, schema, kind, before, size, rows, count, text_nbytes, numbers = _HEADER.unpack_from(data)
    if (magic, schema) != (_MAGIC, _SCHEMA) or kind not in (WHOLE, STORE, FORGET):
        raise ChunkError(f"a chunk has schema {schema}, kind {kind}, which this server does not know")
    start = _HEADER.size + count * _OPERATION.size
    text = start + 2 * rows
    patterns = 0 if kind == FORGET else rows
    if text + text_nbytes + patterns * width_of(size) + REVISION_NBYTES != len(data):
        raise ChunkError("a chunk's length does not fit its header")
    if numbers > NUMBERS_MAX:
        raise ChunkError(f"a chunk has numbered {numbers} labels, at most {NUMBERS_MAX} are known")
    operations = [Operation(*_OPERATION.unpack_from(data, _HEADER.size + at * _OPERATION.size)) for at in range(count)]
    lengths = np.frombuffer(data, "<u2", rows, start)
    bits = np.frombuffer(data, np.uint8, patterns * width_of(size), text + text_nbytes)
    return Chunk(kind, size, before, numbers, operations, _labels(data, lengths, text, text_nbytes),
                 bits.reshape(patterns, width_of(size)))  # fmt: skip


def _labels(data: bytes, lengths: NDArray[np.uint16], start: int, nbytes: int) -> list[str]:
    ends = (start + np.cumsum(lengths, dtype=np.int64)).tolist()
    if (ends[-1] if ends else start) != start + nbytes or ((lengths == 0) | (lengths > LABEL_BYTES_MAX)).any():
        raise ChunkError("a chunk's labels do not fit their lengths")
    try:
        return [data[begin:end].decode() for begin, end in zip([start, *ends], ends, strict=False)]
    except UnicodeDecodeError as error:
        raise ChunkError("a chunk's labels are not UTF-8") from error


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=REVISION_NBYTES).digest()


def chain(chunks: Sequence[Chunk]) -> list[bytes]:
    """Chunks packed one after the other, each with the digest of the one before it; the first keeps its own."""
    packed: list[bytes] = []
    for chunk in chunks:
        before = packed[-1][-REVISION_NBYTES:] if packed else chunk.before
        packed.append(pack_chunk(Chunk(chunk.kind, chunk.size, before, chunk.numbers, chunk.operations, chunk.labels,
                                       chunk.bits)))  # fmt: skip
    return packed
