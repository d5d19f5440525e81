"""Crash points: places in a server where one of its processes kills itself, put there by the tests' own entry and unknown to the
service.

Both processes of a server of the campaign are started through `install`, which wraps the functions below. A point is armed by writing
"NAME COUNT" into a process's control file; the COUNT-th call from then on kills the process as kill -9 does.
"""

from __future__ import annotations

import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_POLL_S = 0.02

NAMES = (
    "before-commit",  # a batch is computed; Redis has not heard of it
    "after-commit",  # Redis has the batch; nobody was answered
    "before-claim",
    "after-claim",  # Redis knows the new owner; the client does not
    "drain",  # accepted steps are answered, volatile ones not yet flushed
    "fork",  # the copy is in Redis; the caller was not told
    "import",
    "export",
    "close",  # the record is deleted; the caller was not told
)


class Points:
    """What is armed in this process."""

    def __init__(self, control: pathlib.Path) -> None:
        self._control = control
        self._armed: dict[str, int] = {}
        self._lock = threading.Lock()
        self._inside = ""  # the management call under way whose write to Redis is a point

    def watch(self) -> None:
        threading.Thread(target=self._poll, name="crash-points", daemon=True).start()

    def _poll(self) -> None:
        while True:
            time.sleep(_POLL_S)
            try:
                text = self._control.read_text()
                self._control.unlink()
            except OSError:
                continue
            with self._lock:
                self._armed.clear()
                for line in text.splitlines():
                    name, count = line.split()
                    self._armed[name] = int(count)

    def reached(self, name: str) -> None:
        with self._lock:
            if name not in self._armed:
                return
            self._armed[name] -= 1
            if self._armed[name] > 0:
                return
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.reached(name)
            return original(*args, **kwargs)

        setattr(owner, method, wrapped)

    def after(self, owner: Any, method: str, name: str | Callable[[], str]) -> None:
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.reached(name if isinstance(name, str) else name())
            return result

        setattr(owner, method, wrapped)

    def within(self, owner: Any, method: str, name: str) -> None:
        """While this coroutine runs, `create` of the store is the point of this name."""
        original = getattr(owner, method)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._inside = name
            return await original(*args, **kwargs)

        setattr(owner, method, wrapped)

    @property
    def inside(self) -> str:
        return self._inside


def install(control: pathlib.Path) -> None:
    """Wraps the points of this process, which is about to serve."""
    from engram_service.protocols.engram import unary
    from engram_service.sessions.residency import Residency
    from engram_service.store import Store
    from engram_service.store.lines import NativeLine, PythonLine
    from engram_service.store.links import Link

    points = Points(control)
    for line in (NativeLine, PythonLine):
        points.before(line, "send", "before-commit")
    points.after(Link, "receive", "after-commit")
    points.after(NativeLine, "ready", "after-commit")
    points.before(Store, "claim", "before-claim")
    points.after(Store, "claim", "after-claim")
    points.before(Residency, "flush_all", "drain")
    points.within(unary.UnaryHandlers, "fork_session", "fork")
    points.within(unary.UnaryHandlers, "import_session", "import")
    points.after(Store, "create", lambda: points.inside)
    points.before(unary, "exported", "export")
    points.after(Store, "delete", "close")
    points.watch()
