"""What each tenant has of this server just now, and the limits on it. Event loop only; admission.py and opening.py ask.

Limits are looked up at every use, so that a tokens file which is read again counts at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from engram_service.auth.tokens import Limits
from engram_service.errors import ResourceExhaustedError
from engram_service.sessions.streams import Stream

_SOON_MS, _LATER_MS = 50, 1000  # rows come free at once, streams and sessions when somebody lets go of them
_NO_LIMIT = 1 << 62


class Share:
    """One tenant's part."""

    def __init__(self, tenant: str, limits: Callable[[str], Limits]) -> None:
        self.tenant = tenant
        self.streams: set[Stream] = set()
        self._limits = limits
        self._opening = 0  # sessions that are being opened, and are not in the table yet
        self._unary_rows = 0  # rows in flight of calls without a stream
        self._room = 0  # rows that may certainly come before they must be counted again

    def check_stream(self) -> None:
        """Whether another stream may come. Raises ResourceExhaustedError."""
        limit = self._limits(self.tenant).streams_max
        if limit and len(self.streams) >= limit:
            raise _reached("streams_max", limit, "streams", _LATER_MS)

    @contextlib.contextmanager
    def sessions(self, attached: int, more: int) -> Iterator[Callable[[int], None]]:
        """Room for so many more sessions while they are opened; to be told how many of them are in the table, where they are
        counted from then on. Raises ResourceExhaustedError."""
        limit = self._limits(self.tenant).sessions_max
        if limit and more and attached + self._opening + more > limit:
            raise _reached("sessions_max", limit, "sessions in use at this server", _LATER_MS)
        left = more
        self._opening += more

        def entered(count: int) -> None:
            nonlocal left
            count = min(count, left)
            left -= count
            self._opening -= count

        try:
            yield entered
        finally:
            self._opening -= left

    @property
    def stored_max(self) -> int:
        """Sessions that may be stored, in Redis and so for all servers; 0: no limit."""
        return self._limits(self.tenant).stored_max

    def take(self, rows: int, counted: int = 0) -> None:
        """Room for rows of a stream, so many of which are counted as in flight already. Raises ResourceExhaustedError."""
        if rows > self._room:
            limit = self._limits(self.tenant).rows_max
            in_flight = self._unary_rows + sum(stream.in_flight for stream in self.streams) if limit else 0
            self._room = limit - in_flight + counted if limit else _NO_LIMIT
            if rows > self._room:
                raise _reached("rows_max", limit, "rows in flight", _SOON_MS)
        self._room -= rows

    @contextlib.contextmanager
    def unary(self, rows: int) -> Iterator[None]:
        """Room for the rows of a call without a stream while it lasts. Raises ResourceExhaustedError."""
        self.take_unary(rows)
        try:
            yield
        finally:
            self.give_unary(rows)

    def take_unary(self, rows: int) -> None:
        """The same until `give_unary`. Raises ResourceExhaustedError."""
        self.take(rows)
        self._unary_rows += rows

    def give_unary(self, rows: int) -> None:
        self._unary_rows -= rows

    def forget_room(self) -> None:
        """Limits may have changed: count again."""
        self._room = 0


class Shares:
    """Shares by tenant; no more of them than the tokens file has had tenants."""

    def __init__(self, limits: Callable[[str], Limits]) -> None:
        self._limits = limits
        self._of: dict[str, Share] = {}
        self.limited = False  # whether there is a tenant whose rows are counted

    def of(self, tenant: str) -> Share:
        share = self._of.get(tenant)
        if share is None:
            share = self._of[tenant] = Share(tenant, self._limits)
            self.limited |= self._limits(tenant).rows_max > 0
        return share

    def forget_room(self) -> None:
        for share in self._of.values():
            share.forget_room()
        self.limited = any(self._limits(tenant).rows_max for tenant in self._of)


def stored_full(limit: int) -> ResourceExhaustedError:
    """What is said where a session would be one too many."""
    return _reached("stored_max", limit, "stored sessions; close some", _LATER_MS)


def _reached(name: str, limit: int, what: str, retry_after_ms: int) -> ResourceExhaustedError:
    message = f"this tenant's limit is reached ({name}): {limit} {what}"
    return ResourceExhaustedError("TENANT_LIMIT", message, retry_after_ms=retry_after_ms, limit=name, value=limit)
