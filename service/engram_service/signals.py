"""Signals, heard in a thread: also while the event loop's thread is in an operator of a model, and cannot hear any. Made by app.py.

The first SIGTERM or SIGINT begins the drain; where the loop does not come to it in its time, the process ends without. A second one
ends the process at once, whatever it is about.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_ENDS = (signal.SIGTERM, signal.SIGINT)
_SAME_S = 0.5  # a terminal signals all of its processes, and some of these pass it on: it is the same one then
_GRACE_S = 2.0  # beyond the drain's time


class Signals:
    """Those of the process, from now on."""

    def __init__(self, stop: asyncio.Event, drain_s: float, running: Callable[[], list[str]]) -> None:
        """Sets `stop`. `running`: what is computed just now, by name."""
        self.stop = stop
        self.at_once: list[Callable[[], None]] = []  # what is done whenever the process ends
        self.on_reload: Callable[[], object] = lambda: None
        self._drain_s = drain_s
        self._running = running
        self._loop = asyncio.get_running_loop()
        self._asked = 0.0
        self._heard, self._heard_by = socket.socketpair()
        self._heard_by.setblocking(False)
        for number in (*_ENDS, signal.SIGHUP):
            signal.signal(number, _noted)
        signal.set_wakeup_fd(self._heard_by.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, name="signals", daemon=True).start()

    def _hear(self) -> None:
        while numbers := self._heard.recv(64):
            for number in numbers:
                if number == signal.SIGHUP:
                    self._loop.call_soon_threadsafe(self._reload)
                elif number in _ENDS and not self._asked:
                    self._asked = time.monotonic()
                    self._loop.call_soon_threadsafe(self.stop.set)
                    threading.Thread(target=self._see_to_the_end, name="end", daemon=True).start()
                elif number in _ENDS and time.monotonic() - self._asked >= _SAME_S:
                    log.warning(
                        "ended at once, by a second signal: what was accepted and is not answered may be sent again"
                    )
                    self._leave(128 + number)

    def _reload(self) -> None:
        self.on_reload()

    def _see_to_the_end(self) -> None:
        """A loop that is in an operator which does not end never comes to its drain."""
        time.sleep(self._drain_s + _GRACE_S)
        while True:
            if left := self._running():
                self.leave_behind(left)
            time.sleep(_GRACE_S)

    def leave_behind(self, left: list[str]) -> None:
        """Ends the process though something does not end."""
        told = "left behind, for it does not end: %s; its steps are not answered and may be sent again"
        log.warning(told, ", ".join(left))
        self._leave(0)

    def _leave(self, code: int) -> None:
        for end in self.at_once:
            end()
        os._exit(code)


def _noted(number: int, frame: object) -> None:
    """Python's own part, which does nothing: the thread has been told already."""
