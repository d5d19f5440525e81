"""Keeps back the end of calls that come to nothing, where many come: refused for want of a token, reset, or without a message.

A client may have `connection_calls_max` calls under way on a connection, and gRPC refuses what is beyond that by itself, in
a fraction of the time that Python takes for a call. A call that is kept back counts among them, also after its client has
reset it. So of a connection that floods the server a few calls are looked at every second, and the others cost next to nothing.
Few such calls, as of clients whose token has just expired, are ended at once. Used by gate.py, probes.py, server.py and stream.py.
"""

from __future__ import annotations

import asyncio
import random

_RATE = 50.0  # calls a second that may come to nothing before they are kept back
_BURST = 100.0
_HOLD_S_MAX = 4.0
_SPREAD = 0.75  # of that time, by chance: calls that came together shall not end together
_HELD_MAX = 8192  # kept back at a time; each is some kilobytes. What is beyond is ended at once


class Holdback:
    """One for all connections. Event loop only."""

    def __init__(self, rate: float = _RATE, burst: float = _BURST, hold_s_max: float = _HOLD_S_MAX) -> None:
        self._rate, self._burst, self._hold_s_max = rate, burst, hold_s_max
        self._level = 0.0  # calls above the rate
        self._at = 0.0  # when that was so
        self._held: set[asyncio.Future[None]] = set()
        self._open = True

    def __len__(self) -> int:
        return len(self._held)

    async def hold(self) -> None:
        """Returns, or raises CancelledError, when a call that came to nothing may end."""
        loop = asyncio.get_running_loop()
        seconds = self._seconds(loop.time())
        if not seconds or not self._open or len(self._held) >= _HELD_MAX:
            return
        over: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _settle, over)
        self._held.add(over)
        cancelled = False
        try:
            while not over.done():
                try:
                    await asyncio.shield(over)
                except asyncio.CancelledError:  # its client has gone: that is what it would like
                    cancelled = True
        finally:
            timer.cancel()
            self._held.discard(over)
        if cancelled:
            raise asyncio.CancelledError

    def release(self) -> None:
        """Keeps nothing back any more: the server stops."""
        self._open = False
        for over in self._held:
            _settle(over)

    def _seconds(self, now: float) -> float:
        self._level = max(0.0, self._level - (now - self._at) * self._rate) + 1.0
        self._level = min(self._level, self._burst + self._rate * self._hold_s_max)
        self._at = now
        seconds = max(0.0, (self._level - self._burst) / self._rate)
        return seconds * (1.0 - _SPREAD * random.random())


def _settle(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)
