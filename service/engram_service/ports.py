"""Ports for servers of one's own on this machine: local ones (local.py), those of tools and of tests.

The kernel takes the ports of outgoing connections from a range of its own, at random: a server that is stopped and started again on
a port from there may find it in use. So these are below that range, in blocks of which each is one process's as long as it lives.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_FIRST, _END = 10_240, 20_224  # ten thousand above is the bus of a Redis Cluster's node, and none of these
_BLOCK = 128
_BUS_MAX = 55_000
_KERNELS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_KERNELS_USUAL = (32_768, 60_999)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no other process which asks here is given as long as this one lives."""
    return _ports(os.getpid()).take()


class Ports:
    """The ports of one process."""

    def __init__(self) -> None:
        self._blocks = blocks(*_kernels_range())
        random.shuffle(self._blocks)
        self._ours: list[int] = []
        self._marks: list[socket.socket] = []  # one for each block that is ours
        self._ports: Iterator[int] = iter(())

    def take(self) -> int:
        """One that was not given before, as long as there are any."""
        for _ in range(2):  # what is left of a block, then another
            for port in self._ports:
                if _is_free(port):
                    return port
            self._ports = iter(self._more())
        return _any_port()

    def _more(self) -> list[int]:
        """A block that is ours from now on; all that were, where every one is taken."""
        while self._blocks:
            block = self._blocks.pop()
            if self._reserve(block):
                self._ours += block
                return list(block)
        return self._ours

    def _reserve(self, block: range) -> bool:
        """A name in the network's own namespace says whose a block is; it is gone with the process."""
        if sys.platform != "linux":
            return True
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0engram-ports-{block.start}")
        except OSError as error:
            mark.close()
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        self._marks.append(mark)
        return True


def blocks(lowest: int, highest: int) -> list[range]:
    """The blocks that have no port of the kernel's range."""
    return [
        range(first, first + _BLOCK)
        for first in range(_FIRST, _END - _BLOCK + 1, _BLOCK)
        if first + _BLOCK <= lowest or first > highest
    ]


@functools.cache
def _ports(pid: int) -> Ports:
    return Ports()  # a process that was forked has ports of its own


def _kernels_range() -> tuple[int, int]:
    try:
        lowest, highest = _KERNELS.read_text().split()
    except OSError:
        return _KERNELS_USUAL
    return int(lowest), int(highest)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _any_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < _BUS_MAX:
            return port
