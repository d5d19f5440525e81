"""What Redis says of sessions, read with the thought that it may be anything. Used by store.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engram_service.errors import DataLossError
from engram_service.store.keys import meta_key, session_tag
from engram_service.store.record import HEADER, MAGIC, SEQ_MAX, TIME_MS_MAX
from engram_service.store.types import ClaimResult, ClaimStatus, DamagedError, SessionInfo


@dataclass(frozen=True, slots=True)
class Meta:
    """What a session's hash says."""

    session_id: str
    model: str
    version: str
    fingerprint: str
    token: str
    epoch: int
    created_ms: int


def damaged(why: object) -> DataLossError:
    """What is said of a session that cannot be read."""
    return DataLossError("RECORD_CORRUPTED", f"the session cannot be used ({why}); close the session to start over")


def _reference(text: bytes) -> tuple[str, str]:
    model, _, version = text.decode().rpartition("/")
    return model, version


def claimed(reply: Any) -> ClaimResult:
    if isinstance(reply, DamagedError):
        return ClaimResult(ClaimStatus.DAMAGED, why=str(reply))
    status = ClaimStatus(reply[0].decode())
    if status in (ClaimStatus.NOT_FOUND, ClaimStatus.CHANGED, ClaimStatus.TAKEN_OVER):
        return ClaimResult(status)
    model, version = _reference(reply[1])
    if status is ClaimStatus.OTHER_MODEL:
        return ClaimResult(status, model, version, reply[2].decode())
    return ClaimResult(status, model, version, reply[2].decode(), int(reply[3]), int(reply[4]), reply[5])


def meta_of(key: bytes, fields: Any) -> Meta | DamagedError | None:
    """A session's hash, if it is one; None: there is none."""
    if isinstance(fields, DamagedError):
        return fields
    if all(value is None for value in fields):
        return None
    if None in fields:
        return DamagedError("its hash lacks a field")
    if b"/" not in fields[1]:
        return DamagedError("the field m of its hash names no model")
    try:
        (model, version), (name, _, fingerprint, token) = (
            _reference(fields[1]),
            (value.decode() for value in fields[:4]),
        )
        meta = Meta(name, model, version, fingerprint, token, int(fields[4]), int(fields[5]))
    except ValueError as error:  # a UnicodeDecodeError is one
        return DamagedError(f"a field of its hash cannot be read: {type(error).__name__}")
    if key != meta_key(session_tag(meta.session_id)):
        return DamagedError("its hash has another session's id")
    if not 0 <= meta.epoch < 2**63 or not 0 <= meta.created_ms <= TIME_MS_MAX:
        return DamagedError("a number in its hash is too great")
    return meta


def info_of(meta: Meta, record: Any, header: Any, ttl_ms: int, with_record: bool) -> SessionInfo | DamagedError | None:
    if not record or isinstance(record, DamagedError):
        return record or None
    seq, acked, commit_ms = int(header["seq"]), int(header["acked"]), int(header["commit_ms"])
    if (
        len(record) < HEADER.itemsize
        or header["magic"] != MAGIC
        or acked > seq
        or seq > SEQ_MAX
        or commit_ms > TIME_MS_MAX
    ):
        return DamagedError("its record is none")
    return SessionInfo(
        session_id=meta.session_id, model=meta.model, version=meta.version, fingerprint=meta.fingerprint, token=meta.token,
        epoch=meta.epoch, created_ms=meta.created_ms, seq=seq, acked=acked, commit_ms=commit_ms, ttl_ms=ttl_ms,
        record=record if with_record else b"",
    )  # fmt: skip
