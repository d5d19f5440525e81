"""The connections of the HTTP port: how many there are, what each is doing, and for how long.

A connection beyond the most takes the place of the one that has kept us waiting longest, so that those who hold connections do not
keep a probe out. protocol.py tells what happens; server.py runs `sweep`.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Protocol

from prometheus_client import Counter

from engram_service.protocols.http.limits import Limits

_SWEEP_S = 0.25


class Doing(enum.Enum):
    """What a connection is at."""

    SENDING = "sending"  # a request's head, or nothing yet
    ANSWERING = "answering"  # the rest is ours, or the answer is on its way
    IDLE = "idle"  # between two requests
    LINGERING = "lingering"  # it was refused, and may still read why


class Connection(Protocol):
    """What the guard knows of one."""

    doing: Doing
    since: float  # the loop's time at which that began

    def waits(self) -> bool:
        """Whether it is for the caller to do something: to send, or to take what is sent to it."""

    def refuse(self) -> None:
        """Says that there is no room, and ends it."""

    def drop(self) -> None:
        """Ends it at once."""


class Guard:
    """All connections of one port. Only its event loop calls this."""

    def __init__(self, limits: Limits, dropped: Counter) -> None:
        self.limits = limits
        self._dropped = dropped
        self._connections: dict[Connection, None] = {}
        self._seconds = {
            Doing.SENDING: limits.request_s,
            Doing.ANSWERING: limits.answer_s,
            Doing.IDLE: limits.idle_s,
            Doing.LINGERING: limits.linger_s,
        }

    def enter(self, connection: Connection) -> None:
        self._connections[connection] = None
        if len(self._connections) <= self.limits.connections_max:
            return
        self._dropped.labels("full").inc()
        waiting = [one for one in self._connections if one is not connection and one.waits()]
        if waiting:
            self._drop(min(waiting, key=lambda one: one.since))
        else:
            connection.refuse()

    def leave(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    async def sweep(self) -> None:
        """Ends connections whose time is up, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = asyncio.get_running_loop().time()
            for one in [one for one in self._connections if now - one.since > self._seconds[one.doing]]:
                if one.doing in (Doing.SENDING, Doing.ANSWERING):
                    self._dropped.labels(one.doing.value).inc()
                self._drop(one)

    def _drop(self, connection: Connection) -> None:
        self.leave(connection)
        connection.drop()
