"""Whether Redis still has all that this server wrote: counters that go up with every change. Kept by the store and the committers.

Each server has a counter of its own in each node and adds one to it behind whatever it writes, on the same connection, and twice
a second besides. Redis's copies of its data (append-only file, snapshot, replica) end somewhere in the order of what was written.
So a Redis that came back with a copy which lacks something that this server was answered lacks that count too, and the next one
that it gives is none that is new. A Redis that came back with everything goes on counting, and so does one that is only slow.

A claim is marked with the process that it was made in (its run), so that one that was made since Redis came back is known from
one that was in the copy.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import NamedTuple

KEPT_MS = (
    30 * 86_400_000
)  # how long a counter outlives its server; a server that was away for longer takes it for a loss
_RUNS_MAX = 256


class Mark(NamedTuple):
    """What is known of a counter as one is added to it."""

    key: bytes
    seen: int
    lost_at: int


class Generations:
    """Counters by key, losses found, runs met. Safe from any thread; does no input or output.

    `on_loss` is called for each loss, before any other thread can learn of it.
    """

    def __init__(self, on_loss: Callable[[], None]) -> None:
        self.losses = 0  # how often Redis, or a node of it, was found to have lost data
        self._on_loss = on_loss
        self._server = secrets.token_hex(6).encode()
        self._lock = threading.Lock()
        self._seen: dict[bytes, int] = {}
        self._lost_at: dict[bytes, int] = {}  # by key: the last loss that it told, in `losses`
        self._run_of: dict[str, str] = {}  # by node
        self._met_at: dict[str, int] = {}  # by run: `losses` when it was first met

    def key(self, node_key: bytes) -> bytes:
        """This server's counter where `node_key` lives."""
        return node_key + b":" + self._server

    def mark(self, key: bytes) -> Mark:
        """To be taken before one is added to the counter, or it is read."""
        with self._lock:
            return self._mark(key)

    def marks(self) -> list[Mark]:
        """Of all counters that are known."""
        with self._lock:
            return [self._mark(key) for key in self._seen]

    def _mark(self, key: bytes) -> Mark:
        return Mark(key, self._seen.get(key, 0), self._lost_at.get(key, 0))

    def counted(self, mark: Mark, value: int) -> bool:
        """One was added to the counter, and gave this. Whether Redis is thereby found to have lost data."""
        with self._lock:
            if self._lost_at.get(mark.key, 0) != mark.lost_at:
                return False  # another thread has found it meanwhile; this may be a count of before or after
            if value > mark.seen:
                self._seen[mark.key] = max(value, self._seen.get(mark.key, 0))
                return False
            self.losses += 1
            self._lost_at[mark.key] = self.losses
            self._on_loss()
            self._seen[mark.key] = value
            return True

    def lost_at(self) -> dict[bytes, int]:
        """By counter, the last loss that it told."""
        with self._lock:
            return dict(self._lost_at)

    def met(self, node: str, run: str) -> None:
        """A connection to this node reached this run of Redis."""
        with self._lock:
            self._run_of[node] = run
            self._met_at.setdefault(run, self.losses)
            if len(self._met_at) > _RUNS_MAX:
                del self._met_at[next(iter(self._met_at))]

    def run(self, node: str) -> str:
        """The run that connections to this node reach; "" where that is not known."""
        with self._lock:
            return self._run_of.get(node, "")

    def runs_since(self, node: str, loss: int) -> list[str]:
        """Runs whose claims are younger than this loss of the node; none: that cannot be told of any."""
        with self._lock:
            now = self._run_of.get(node, "")
            return [now, *(run for run, met in self._met_at.items() if met >= loss and run != now)] if now else []
