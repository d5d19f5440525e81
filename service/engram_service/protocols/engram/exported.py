"""An exported session as bytes: self-contained and checksummed. Used by unary.py.

magic | lengths of id, model, version, record; chunks of the memory's log | these three and the record | lengths of the chunks,
the chunks | 16 bytes of BLAKE2b over all before
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from engram_service.auth.tenants import id_of
from engram_service.errors import InvalidArgumentError
from engram_service.store import SessionInfo

_MAGIC = b"ENGRAMX2"
_LENGTHS = struct.Struct("<HHHII")
_DIGEST_NBYTES = 16


@dataclass(frozen=True, slots=True)
class Exported:
    """What of a session goes into an export."""

    session_id: str  # without its tenant: whoever imports it gets it
    model: str
    version: str
    record: bytes
    memory: list[bytes]  # chunks of its log; none: it has no memory of its own

    @classmethod
    def of(cls, info: SessionInfo, memory: list[bytes]) -> Exported:
        return cls(id_of(info.session_id), info.model, info.version, info.record, memory)


def exported(session: Exported) -> bytes:
    """The session as bytes."""
    parts = [session.session_id.encode(), session.model.encode(), session.version.encode(), session.record]
    head = _MAGIC + _LENGTHS.pack(*map(len, parts), len(session.memory))
    lengths = np.array([len(chunk) for chunk in session.memory], "<u8").tobytes()
    body = b"".join((head, *parts, lengths, *session.memory))
    return body + _digest(body)


def imported(data: bytes) -> Exported:
    """The session out of exported bytes. Raises InvalidArgumentError."""
    start = len(_MAGIC) + _LENGTHS.size
    body, digest = data[:-_DIGEST_NBYTES], data[-_DIGEST_NBYTES:]
    if len(body) < start or not body.startswith(_MAGIC):
        raise InvalidArgumentError("INVALID_EXPORT", "the bytes are not an exported session")
    if _digest(body) != digest:
        raise InvalidArgumentError("INVALID_EXPORT", "the exported session is damaged: its digest does not fit")
    *lengths, count = _LENGTHS.unpack_from(body, len(_MAGIC))
    parts, start = _cut(body, start, lengths)
    if start + 8 * count > len(body):
        raise _misfit()
    sizes = np.frombuffer(body, "<u8", count, start).tolist()
    memory, end = _cut(body, start + 8 * count, sizes)
    if end != len(body):
        raise _misfit()
    try:
        return Exported(parts[0].decode(), parts[1].decode(), parts[2].decode(), parts[3], memory)
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("INVALID_EXPORT", "the exported session's names are not UTF-8") from error


def _misfit() -> InvalidArgumentError:
    return InvalidArgumentError("INVALID_EXPORT", "the exported session's lengths do not fit it")


def _cut(body: bytes, start: int, lengths: list[int]) -> tuple[list[bytes], int]:
    parts: list[bytes] = []
    for length in lengths:
        parts.append(body[start : start + length])
        start += length
    return parts, start


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_NBYTES).digest()
