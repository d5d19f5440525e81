"""File descriptors: how many streams there are files for, and what happens when connections use them up. Made by app.py.

The soft limit is raised to the hard one, and `streams_max` lowered to what fits under it. gRPC takes every connection that comes
until no file can be opened; by then Redis, bundles and the HTTP port want for files too. So some are kept free: while there are
fewer, connections that carry no stream are ended, the newest first of whichever address has the most. Streams are left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from engram_service.observability.health import Health
from engram_service.observability.metrics import Metrics
from engram_service.settings import SettingError, Settings

log = logging.getLogger(__name__)

_CEILING = 1 << 20  # files; more are not asked for, where the hard limit is higher or there is none
_LEAST = 256
_FREE, _OWN = 128, 128  # files that are kept free, and that are not connections; less under low limits
_LATER = 24  # files of this process's own that are opened after it was asked how many connections there may be
_ROOM = 16  # part of the files (1/n) that is for connections without a stream
_LOOK_S = 0.1
_LISTING_S = 1.0  # between looks where the kernel has to list all files to say how many there are (Linux before 6.2)
_SETTLE_S = 0.2  # until gRPC has closed what was ended
_TOLD_S = 10.0
_FILES = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Connection:
    """A connection to the gRPC port. Inodes of sockets are numbered as they are made."""

    file: int
    inode: int
    peer: Address


class Descriptors:
    """The files of this process."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        """Raises the limit. Raises SettingError where it is too low for a server."""
        self._refused = metrics.connections_refused
        self._health = health
        self._limit = _raised()
        if self._limit < _LEAST:
            raise SettingError(
                f"this process may open {self._limit} files, and a server needs {_LEAST}: raise the limit (ulimit -n, or "
                "LimitNOFILE= of a systemd unit)"
            )
        self._files_max = self._limit - min(_FREE, self._limit // 8)
        self._place = _Place()
        self._ended, self._told_at = 0, 0.0

    @property
    def connections_max(self) -> int:
        """More than there are files for, so that `watch` sees it, and less than would leave none for others."""
        return self._files_max - _open_files(self._limit) - _LATER + min(_FREE, self._limit // 8) // 2

    def fitted(self, settings: Settings) -> Settings:
        """With a `streams_max` for which there are files."""
        room = self._files_max - min(_OWN, self._limit // 4)
        streams = room - room // _ROOM
        if settings.streams_max <= streams:
            return settings
        log.warning(
            "streams_max = %d: lowered to %d, for this process may open %d files; raise the limit (ulimit -n, or LimitNOFILE= "
            "of a systemd unit) for more",
            settings.streams_max, streams, self._limit,
        )  # fmt: skip
        return replace(settings, streams_max=streams)

    async def watch(self, port: int, peers: Callable[[], Iterable[str]]) -> None:
        """Keeps files free by ending connections to the port; `peers` are those who have a stream. Runs until cancelled."""
        look_s = _LOOK_S if os.stat(_FILES).st_size else _LISTING_S
        while True:
            await asyncio.sleep(look_s)
            excess = _open_files(self._limit) - self._files_max
            if excess > 0:
                carrying = {_address_of(peer) for peer in peers()}
                ended = await asyncio.to_thread(self._end, port, carrying, excess)
                self._refused.inc(ended)
                self._ended += ended
            self._tell()
            if excess > 0:
                await asyncio.sleep(_SETTLE_S)

    def _end(self, port: int, carrying: set[Address], excess: int) -> int:
        """Ends so many connections and half the reserve more, as far as there are some without a stream; how many."""
        numbers = range(self._limit)  # nearly all are in use; to list them would take one more
        idle = [one for one in _connections(port, numbers, self._place) if one.peer not in carrying]
        return sum(_shut(one, self._place) for one in _newest(idle)[: excess + _FREE // 2])

    def _tell(self) -> None:
        """Now and then, and not for each of thousands."""
        now = time.monotonic()
        if now < self._told_at + _TOLD_S:
            return
        if self._ended:
            self._told_at = now
            why = f"{self._ended} connections without a stream were ended: too few of {self._limit} files were free"
            log.warning("%s", why)
            self._health.warn("descriptors", why)
            self._ended = 0
        elif self._told_at:
            self._told_at = 0.0
            self._health.warn("descriptors", "")


class _Place:
    """The number of a file at which others are looked at. It is taken from the start: when connections have used up the files,
    whatever becomes free is the next connection's at once."""

    def __init__(self) -> None:
        self._nothing, self._number = (os.open(os.devnull, os.O_RDONLY) for _ in range(2))

    @contextlib.contextmanager
    def holding(self, file: int) -> Iterator[socket.socket]:
        """The socket behind a number that gRPC may close, and the kernel give to another, at any moment. Raises OSError."""
        os.dup2(file, self._number, inheritable=False)
        try:
            held = socket.socket(fileno=self._number)
            try:
                yield held
            finally:
                held.detach()
        finally:
            os.dup2(self._nothing, self._number, inheritable=False)


def _raised() -> int:
    """The limit of open files, raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _CEILING if soft == resource.RLIM_INFINITY else soft
    wanted = max(files, _CEILING if hard == resource.RLIM_INFINITY else min(hard, _CEILING))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of open files stays at %d: %s", soft, error)
        return files
    return wanted


def _open_files(limit: int) -> int:
    try:
        return os.stat(_FILES).st_size or len(os.listdir(_FILES))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return limit  # none is left to list them with


def _connections(port: int, numbers: Iterable[int], place: _Place) -> Iterator[_Connection]:
    for number in numbers:
        with contextlib.suppress(OSError, ValueError):  # it is not open, or is nothing of the kind
            kind, _, inode = os.readlink(f"{_FILES}/{number}").partition(":")
            if kind == "socket" and (peer := _peer(number, port, place)) is not None:
                yield _Connection(number, int(inode.strip("[]")), peer)


def _peer(file: int, port: int, place: _Place) -> Address | None:
    """Who is at the other end, if this is a connection to that port. Raises OSError."""
    with place.holding(file) as held:
        if held.family not in (socket.AF_INET, socket.AF_INET6) or held.getsockname()[1] != port:
            return None
        return _plain(held.getpeername())


def _shut(one: _Connection, place: _Place) -> bool:
    """Ends a connection: gRPC finds it closed by the other side. Whether it was still there."""
    try:
        with place.holding(one.file) as held:
            if _plain(held.getpeername()) != one.peer:
                return False
            held.shutdown(socket.SHUT_RDWR)
            return True
    except OSError:
        return False


def _newest(connections: Iterable[_Connection]) -> list[_Connection]:
    """In the order in which they are ended: an address that has many has none to spare for others."""
    by_host: dict[str, list[_Connection]] = defaultdict(list)
    for one in sorted(connections, key=lambda one: one.inode):
        by_host[one.peer[0]].append(one)
    placed = [(place, one) for ones in by_host.values() for place, one in enumerate(ones)]
    return [one for _, one in sorted(placed, key=lambda pair: (pair[0], pair[1].inode), reverse=True)]


def _plain(address: Any) -> Address:
    """Host and port of a socket's address; an IPv4 one that a socket of both kinds has as IPv4."""
    return str(address[0]).removeprefix("::ffff:"), int(address[1])


def _address_of(peer: str) -> Address:
    """The same of what gRPC calls a peer: ipv4:HOST:PORT or ipv6:[HOST]:PORT, with % escapes."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else 0
