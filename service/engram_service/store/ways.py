"""Native links, one to each node, on connections that redis-py has made. Used by lines.py."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.places import NATIVE
from engram_service.store.committer import Committers
from engram_service.store.generations import Mark
from engram_service.store.keys import META_PREFIX
from engram_service.store.links import Link
from engram_service.store.nodes import Node
from engram_service.store.tls import TlsSocket
from engram_service.store.types import CommitJob

if NATIVE:  # else nobody makes one
    import engram_native

_OPEN_AGAIN_S = 1.0  # between two attempts to open a connection


class Way:
    """A native link to one node, and the connection that it writes to, which redis-py has made."""

    def __init__(self, node: Node, link: Link) -> None:
        self.node = node
        self.link = link
        self.native: Any = None
        self.blocks: list[tuple[NDArray[np.intp], NDArray[np.uint8]]] = []
        self.mark: Mark | None = None
        self.done = False
        self._asked = -_OPEN_AGAIN_S

    def is_open(self, committers: Committers) -> bool:
        """If not, it comes to be so, where it can."""
        now = time.monotonic()
        if not self.link.is_open and now >= self._asked + _OPEN_AGAIN_S:
            self._asked = now
            committers.open(self.link)
        return self.link.is_open

    def open(self, doubtful: list[int]) -> None:
        """Raises RedisError or OSError."""
        connection = self.link.opened(doubtful)
        if self.native is None:
            sock = connection._sock
            self.native = (
                sock.commit_link() if isinstance(sock, TlsSocket) else engram_native.CommitLink(os.dup(sock.fileno()))
            )

    def send(self, job: CommitJob, key: bytes, wait: bytes, doubtful: list[int]) -> None:
        """Raises RedisError or OSError."""
        self.open(doubtful)
        last = len(self.blocks) - 1
        for n, (rows, values) in enumerate(self.blocks):
            whole = len(rows) == len(job.tags)
            columns = (
                (job.tags, job.tokens, job.ttl_ms) if whole else (job.tags[rows], job.tokens[rows], job.ttl_ms[rows])
            )
            more = n < last
            self.native.send(columns[0], columns[1], values, columns[2], META_PREFIX,
                             b"" if more else key, b"" if more else wait, more)  # fmt: skip

    def drop(self, doubtful: list[int]) -> None:
        """Nobody knows what of it arrived."""
        if self.native is not None:
            self.native.close()
            self.native = None
        self.link.abandon(doubtful)
