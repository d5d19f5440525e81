"""The sockets that clients connect to: bound once, before anything else, and handed to the data process."""

from __future__ import annotations

import errno
import socket
import time

from engram_service.settings import Settings, split_address

_BACKLOG = 1024
_WAIT_S = 2.0  # for the data process of a manager that was killed, which ends a moment after it
_LOOK_S = 0.02


def bound(settings: Settings) -> list[socket.socket]:
    """A socket for each address of `listen`, on one port. Raises OSError."""
    host, port = split_address(settings.listen, "listen")
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            return _listeners(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < until:
                time.sleep(_LOOK_S)
                continue
            why = f"listen = {settings.listen}: the address is in use or cannot be bound ({error.strerror or error})"
            raise OSError(why) from error


def _listeners(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of a name, on one port. Raises OSError."""
    found: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(
            socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        ):
            bound = (address[0], port or (found[0].getsockname()[1] if found else 0))
            dual = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
            found.append(socket.create_server(bound, family=family, backlog=_BACKLOG, dualstack_ipv6=dual))
            if dual:
                break
    except OSError:
        for one in found:
            one.close()
        raise
    return found
