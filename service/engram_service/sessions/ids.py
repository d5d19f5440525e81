"""Ids of sessions: which may be used, and new ones."""

from __future__ import annotations

import secrets
import unicodedata
from collections.abc import Sequence

from engram_service.auth.tenants import id_of
from engram_service.errors import InvalidArgumentError, ServiceError

_ID_BYTES_MAX = 128


def new_id() -> str:
    """An id for a session whose client gave none."""
    return secrets.token_urlsafe(12)


def check_ids(ids: Sequence[str]) -> list[ServiceError | None]:
    """For each key, why the id in it cannot be used; None where it can."""
    seen: set[str] = set()
    checked: list[ServiceError | None] = []
    for key in ids:
        checked.append(_check_id(id_of(key), key in seen))
        seen.add(key)
    return checked


def check_id(key: str) -> None:
    """Raises InvalidArgumentError."""
    refusal = check_ids([key])[0]
    if refusal is not None:
        raise refusal


def _check_id(session_id: str, repeated: bool) -> ServiceError | None:
    if not session_id or len(session_id.encode()) > _ID_BYTES_MAX:
        return InvalidArgumentError("INVALID_SESSION_ID", f"a session id has 1 to {_ID_BYTES_MAX} bytes of UTF-8")
    plain = session_id.isascii() and session_id.isprintable() and " " not in session_id
    if not plain and any(unicodedata.category(char) in ("Cc", "Zs", "Zl", "Zp") for char in session_id):
        return InvalidArgumentError(
            "INVALID_SESSION_ID", f"session id {session_id!r} has white space or control characters"
        )
    if repeated:
        return InvalidArgumentError("INVALID_SESSION_ID", f"session id {session_id!r} stands twice in the frame")
    return None
