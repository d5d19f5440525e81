"""When refused rows shall be sent again: as soon as there may be room, and not all at once. No clock of its own.

How fast rows are done is measured while some wait, for only then is it what the machine can do, and not what it was asked for.
admission.py and deadlines.py tell and ask, on the event loop.
"""

from __future__ import annotations

import math

_MEMORY_S = 1.0  # the rate is of about so long
_KNOWN_S = 0.2  # of waiting, before it counts
_RETRY_MIN_S, _RETRY_MAX_S = 0.05, 5.0


class Backlog:
    """The rate at which rows are done, and what was promised of it."""

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0  # answered while others waited, and the time that it took; both fade
        self._before = (0.0, 0, False)  # when `observe` was last called, what had been answered, whether rows waited
        self._promised = 0.0  # rows that were given a time to come again which is still ahead
        self._promised_at = 0.0

    @property
    def rate(self) -> float:
        """Rows a second; 0 while it is not known."""
        return self._rows / self._seconds if self._seconds >= _KNOWN_S else 0.0

    def observe(self, now: float, answered: int, waiting: int) -> None:
        """A few dozen times a second. `answered`: rows so far; `waiting`: rows that no batch has taken."""
        then, answered_then, waited = self._before
        if waiting and waited:
            kept = math.exp((then - now) / _MEMORY_S)
            self._rows = self._rows * kept + answered - answered_then
            self._seconds = self._seconds * kept + now - then
        self._before = (now, answered, bool(waiting))

    def retry_in_ms(self, rows: int) -> int:
        """The hint for refused rows, since `observe` was last called."""
        return self.retry_ms(self._before[0], rows)

    def retry_ms(self, now: float, rows: int) -> int:
        """The hint for refused rows: they are given times one after another, at the rate at which room comes free."""
        if not self.rate:
            return int(1000 * _RETRY_MIN_S)
        self._promised = max(0.0, self._promised - self.rate * (now - self._promised_at)) + rows
        self._promised_at = now
        return int(1000 * min(_RETRY_MAX_S, max(_RETRY_MIN_S, self._promised / self.rate)))
