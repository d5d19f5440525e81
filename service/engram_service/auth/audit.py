"""Who did what: one log line for every call that manages sessions, takes one out, or was denied. Used by server.py and stream.py.

Lines go to the logger engram.audit whatever log_level is. They have the token's name and never the token, and no inputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from engram_service.auth.tokens import Caller
from engram_service.errors import ServiceError, UnauthenticatedError
from engram_service.observability.metrics import Metrics

AUDITED = frozenset((
    "ListSessions", "ForkSession", "CloseSession", "MoveSession", "ExportSession", "ImportSession", "GetSessionState",
    "StorePatterns", "ForgetPatterns", "ReloadModels",
))  # fmt: skip
_UNKNOWN_PAUSE_S = 1.0  # at most one line in so long about callers without a token, who could otherwise fill the disk

log = logging.getLogger("engram.audit")


class Audit:
    """Writes the lines."""

    def __init__(self, metrics: Metrics) -> None:
        self._denied = metrics.calls_denied
        self._quiet_until = 0.0

    def done(self, method: str, caller: Caller, peer: str, sessions: Sequence[str], outcome: str = "ok") -> None:
        """A call that was let in, and what became of it."""
        if method in AUDITED:
            self._line(method, caller, peer, sessions, outcome)

    def closed(self, caller: Caller, peer: str, sessions: Sequence[str], outcome: str) -> None:
        """Sessions that were closed by a frame of a stream."""
        self._line("Stream close", caller, peer, sessions, outcome)

    def refused(self, method: str, peer: str, reason: str) -> None:
        """A call that the native wire has refused for want of a token that is known, and counted."""
        self._unknown(method, peer, reason)

    def denied(self, method: str, caller: Caller | None, peer: str, refusal: ServiceError) -> None:
        """A call that was not let in, or a stream that was put out."""
        self._denied.labels(refusal.reason).inc()
        if isinstance(refusal, UnauthenticatedError) and caller is None:
            self._unknown(method, peer, refusal.reason)
        else:
            self._line(method, caller or Caller(), peer, (), refusal.reason)

    def _unknown(self, method: str, peer: str, reason: str) -> None:
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _UNKNOWN_PAUSE_S
            self._line(method, Caller(), peer, (), reason)

    def _line(self, method: str, caller: Caller, peer: str, sessions: Sequence[str], outcome: str) -> None:
        who = {"tenant": caller.tenant, "token": caller.token, "peer": peer}
        fields: dict[str, object] = {"method": method, **who, "outcome": outcome}
        named = [session for session in sessions if session]
        if named:
            fields["session"] = named[0] if len(named) == 1 else named
        log.info("audit", extra=fields)
