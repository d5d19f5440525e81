"""The processor's time that a thread's event loop may take, whatever is asked of it."""

from __future__ import annotations

import selectors
import time

_BURST_S = 0.1  # may be taken at once by a loop that had nothing to do for a while
_PAUSE_S_MAX = 0.5


class PacedSelector(selectors.DefaultSelector):
    """Sleeps between two turns of the loop so that its thread has no more than `share` of a core.

    The thread shares the interpreter's lock with the path of a step. A flood of any kind (requests, connections, bytes that
    are no HTTP) so makes the HTTP port slow, and not the steps.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share
        self._credit_s = _BURST_S
        self._at = time.monotonic()
        self._used_s = time.thread_time()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._settle()
        if self._credit_s < 0:
            time.sleep(min(-self._credit_s / self._share, _PAUSE_S_MAX))
        return super().select(timeout)

    def _settle(self) -> None:
        now, used_s = time.monotonic(), time.thread_time()
        earned_s = (now - self._at) * self._share
        self._credit_s = min(_BURST_S, self._credit_s + earned_s) - (used_s - self._used_s)
        self._at, self._used_s = now, used_s
