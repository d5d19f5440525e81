"""Starts a data process. Imports next to nothing, so that `engram serve` can start one before it imports its own part."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_FILES_MAX = 65  # the page of counts, and a socket for each address that a name has


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that waits to be told what it shall do, and our end of its control socket."""

    process: subprocess.Popen[bytes]
    end: socket.socket

    def hand_over(self, page: int, listeners: Sequence[socket.socket]) -> None:
        """Gives it the page of counts (sessions/counts.py) and these listening sockets: what it waits for first. Raises OSError
        where it is gone."""
        socket.send_fds(self.end, [b"\0"], [page, *(one.fileno() for one in listeners)])

    def stop(self) -> None:
        """Ends it before it was told anything."""
        self.end.close()
        self.process.kill()
        self.process.wait()


def spawn() -> Spawned:
    """Executed, never forked: nothing of this process's is there."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "engram_service.data_process", str(os.getpid()), str(theirs.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()
    return Spawned(process, ours)


def handed_over(end: socket.socket) -> tuple[int, list[socket.socket]]:
    """In the data process: the page of counts, and the listening sockets. Raises EOFError where the manager is gone."""
    data, files, _, _ = socket.recv_fds(end, 1, _FILES_MAX)
    if not data:
        raise EOFError
    return files[0], [socket.socket(fileno=file) for file in files[1:]]
