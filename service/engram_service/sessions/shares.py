"""What each tenant has of the server just now, and the limits on it and on the server. Event loop only; streams.py, opening.py and
admission ask.

Limits are looked up at every use, so that a tokens file which is read again counts at once. They are the whole server's: counts.py
has what other processes count. Rows in flight are counted by tenant only while some tenant's are limited; a batch of others costs
nothing here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.auth.tenants import NUMBERS, SERVER, UNKNOWN
from engram_service.auth.tokens import Limits
from engram_service.errors import ResourceExhaustedError
from engram_service.sessions.counts import ROWS, SESSIONS, STREAMS, Column

_SOON_MS, _LATER_MS = 50, 1000  # rows come free at once, streams and sessions when somebody lets go of them


class Share:
    """One tenant's part."""

    def __init__(self, tenant: str, number: int, limits: Callable[[str], Limits], shares: Shares) -> None:
        self.tenant = tenant
        self.number = number
        self._limits = limits
        self._shares = shares
        self._column = shares.column
        self._has = [0, 0, 0]  # what of the column is the tenant's; of rows only those without a stream

    @property
    def limits(self) -> Limits:
        return self._limits(self.tenant)

    def take_stream(self) -> None:
        """Room for another stream, until `give_stream`. Raises ResourceExhaustedError."""
        limit, most = self.limits.streams_max, self._shares.streams_max
        if not self._column.take(STREAMS, self.number, 1, limit):
            raise _reached("streams_max", limit, "streams", _LATER_MS)
        if not self._column.take(STREAMS, SERVER, 1, most):
            self._column.add(STREAMS, self.number, -1)
            raise too_many_streams(most)
        self._has[STREAMS] += 1

    def give_stream(self) -> None:
        self._add(STREAMS, -1)
        self._column.add(STREAMS, SERVER, -1)

    @contextlib.contextmanager
    def sessions(self, more: int) -> Iterator[Callable[[int], None]]:
        """Room for so many more sessions while they are opened; to be told how many of them are in the table, where they are
        counted from then on. Raises ResourceExhaustedError."""
        limit, most = self.limits.sessions_max, self._shares.sessions_max
        if more and not self._column.take(SESSIONS, self.number, more, limit):
            raise _reached("sessions_max", limit, "sessions in use at this server", _LATER_MS)
        if more and not self._column.take(SESSIONS, SERVER, more, most):
            self._column.add(SESSIONS, self.number, -more)
            message = f"this server has {most} sessions, its limit"
            raise ResourceExhaustedError("TOO_MANY_SESSIONS", message, retry_after_ms=_LATER_MS)
        self._has[SESSIONS] += more
        left = more

        def entered(count: int) -> None:
            nonlocal left
            count = min(count, left)
            left -= count
            self.count_sessions(-count)

        try:
            yield entered
        finally:
            self.count_sessions(-left)

    def count_sessions(self, more: int) -> None:
        """So many more are there, or fewer, whatever the limits."""
        self._add(SESSIONS, more)
        self._column.add(SESSIONS, SERVER, more)

    @property
    def stored_max(self) -> int:
        """Sessions that may be stored, in Redis and so for all servers; 0: no limit."""
        return self.limits.stored_max

    def check_rows(self) -> None:
        """Whether the rows in flight, with those that have just come, are not too many. Raises ResourceExhaustedError."""
        limit = self.limits.rows_max
        if limit and self._column.total(ROWS, self.number) > limit:
            raise _reached("rows_max", limit, "rows in flight", _SOON_MS)

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
        self._add(ROWS, rows)
        try:
            self.check_rows()
        except ResourceExhaustedError:
            self.give_unary(rows)
            raise

    def give_unary(self, rows: int) -> None:
        self._add(ROWS, -rows)

    def renumber(self, number: int) -> None:
        """The tenant has come back, and its number was another's meanwhile."""
        for thing, count in enumerate(self._has):
            self._column.add(thing, self.number, -count)
            self._column.add(thing, number, count)
        self.number = number

    def _add(self, thing: int, more: int) -> None:
        self._has[thing] += more
        self._column.add(thing, self.number, more)


class Shares:
    """Shares by tenant; no more of them than the tokens file has had tenants."""

    def __init__(
        self, limits: Callable[[str], Limits], number_of: Callable[[str], int], column: Column, streams_max: int,
        sessions_max: int,
    ) -> None:  # fmt: skip
        """`streams_max`, `sessions_max`: of all processes of this server together."""
        self.column = column
        self.streams_max, self.sessions_max = streams_max, sessions_max
        self.limited = False  # whether there is a tenant with a limit on rows, and so rows are counted
        self.on_limited: Callable[[bool], None] = lambda limited: None
        self._limits, self._number_of = limits, number_of
        self._of: dict[str, Share] = {}
        self._rows_max = np.zeros(NUMBERS, np.int64)  # by number; 0: no limit

    def of(self, tenant: str) -> Share:
        share = self._of.get(tenant)
        if share is None:
            share = self._of[tenant] = Share(tenant, self._number_of(tenant), self._limits, self)
            self._rows_max[share.number] = share.limits.rows_max
            self._count_rows(self.limited or share.limits.rows_max > 0)
        return share

    def count_sessions(self, tenant: str, more: int) -> None:
        """The table has so many more, or fewer."""
        self.of(tenant).count_sessions(more)

    def over(self, numbers: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of these tenants, by number, have more rows in flight than they may."""
        most = self._rows_max[numbers]
        found: NDArray[np.bool_] = (most > 0) & (self.column.totals(ROWS, numbers) > most)
        return found

    def renew(self) -> None:
        """Limits and numbers may have changed."""
        for tenant, share in self._of.items():
            number = self._number_of(tenant)
            if number not in (share.number, UNKNOWN):  # a tenant that is gone keeps its own
                self._rows_max[share.number] = 0
                share.renumber(number)
        most = {share.number: share.limits.rows_max for share in self._of.values()}
        self._rows_max[list(most)] = list(most.values())
        self._count_rows(any(most.values()))

    def _count_rows(self, limited: bool) -> None:
        if limited != self.limited:
            self.limited = limited
            self.on_limited(limited)


def stored_full(limit: int) -> ResourceExhaustedError:
    """What is said where a session would be one too many."""
    return _reached("stored_max", limit, "stored sessions; close some", _LATER_MS)


def too_many_streams(limit: int) -> ResourceExhaustedError:
    message = f"this server has {limit} streams, its limit"
    return ResourceExhaustedError("TOO_MANY_STREAMS", message, retry_after_ms=_LATER_MS)


def _reached(name: str, limit: int, what: str, retry_after_ms: int) -> ResourceExhaustedError:
    message = f"this tenant's limit is reached ({name}): {limit} {what}"
    return ResourceExhaustedError("TENANT_LIMIT", message, retry_after_ms=retry_after_ms, limit=name, value=limit)
