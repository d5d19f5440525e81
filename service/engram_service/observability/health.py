"""Whether this server can do its work, and why not: what /readyz and gRPC health say. Safe to call from any thread.

A failure makes the server not ready until it is cleared; a warning is only shown. Both are told under the name of what they are
about, such as `redis` or `task sweep`. Who decides calls `fail` and `clear`; commands never ask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


class Health:
    """Failures and warnings by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.on_change: Callable[[], None] = lambda: None
        """Called from whichever thread changed something."""
        self._failures: dict[str, tuple[str, float]] = {}  # why, and since when it counts
        self._warnings: dict[str, str] = {}
        self._others: dict[str, Health] = {}  # of other processes of this server

    def fail(self, name: str, why: str, grace_s: float = 0.0) -> None:
        """Not ready from `grace_s` after the first of these calls on, until `clear(name)`."""
        with self._lock:
            _, since = self._failures.get(name, ("", time.monotonic() + grace_s))
            self._failures[name] = (why, since)
        self.on_change()

    def tell(self, name: str, why: str, grace_s: float = 0.0) -> None:
        """`fail`, or `clear` where there is no reason."""
        if why:
            self.fail(name, why, grace_s)
        else:
            self.clear(name)

    def clear(self, name: str) -> None:
        with self._lock:
            if self._failures.pop(name, None) is None:
                return
        self.on_change()

    def warn(self, name: str, why: str) -> None:
        """Shown until `why` is empty."""
        with self._lock:
            if why:
                self._warnings[name] = why
            else:
                self._warnings.pop(name, None)
        self.on_change()

    def failures(self) -> list[str]:
        """`name: why` of what makes the server not ready now; empty: it is ready."""
        now = time.monotonic()
        with self._lock:
            own = [f"{name}: {why}" for name, (why, since) in self._failures.items() if since <= now]
            others = list(self._others.values())
        return list(dict.fromkeys(own + [line for other in others for line in other.failures()]))

    def warnings(self) -> list[str]:
        with self._lock:
            own = [f"{name}: {why}" for name, why in self._warnings.items()]
            others = list(self._others.values())
        return list(dict.fromkeys(own + [line for other in others for line in other.warnings()]))

    # Several processes: their monotonic clocks are one

    def told(self) -> dict[str, Any]:
        """All of it as JSON has it, for another process."""
        with self._lock:
            own = {"failures": dict(self._failures), "warnings": dict(self._warnings)}
            others = [other.told() for other in self._others.values()]
        return {what: {name: why for one in (*others, own) for name, why in one[what].items()} for what in own}

    def hear(self, process: str, told: dict[str, Any]) -> None:
        """What another process of this server says counts as if it were said here, until it says otherwise."""
        other = Health()
        other._failures = {name: (why, since) for name, (why, since) in told["failures"].items()}
        other._warnings = dict(told["warnings"])
        with self._lock:
            self._others[process] = other
        self.on_change()
