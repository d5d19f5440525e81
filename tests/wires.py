"""A wire before a Redis of the tests, that loses answers or holds back what is sent."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import threading
import time

WAIT_S = 15.0


class Wire:
    """A proxy before a Redis: it may lose answers (and the connection with them), or hold back what clients send."""

    def __init__(self, path: pathlib.Path, target: pathlib.Path) -> None:
        self.url = f"unix://{path}"
        self._target = str(target)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._lose = b""  # the answer to a request that has this is lost, once
        self._hold = b""  # a request that has this, and the rest of its connection, is held back until `release`
        self._release = threading.Event()
        self.lost = 0
        self.held = threading.Event()
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def lose_answer_to(self, request: bytes) -> None:
        self._lose = request

    def hold(self, request: bytes) -> None:
        self._hold = request

    def release(self) -> None:
        """What was held back goes out, if its connection still stands; returns when that is known."""
        self._release.set()
        time.sleep(0.3)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._sockets += [client, server]
                try:
                    server.connect(self._target)
                except OSError:
                    client.close()
                    continue
                losing = threading.Event()
                for work in (self._forth, self._back):
                    self._threads.append(threading.Thread(target=work, args=(client, server, losing), daemon=True))
                    self._threads[-1].start()

    def _forth(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if self._lose and self._lose in data:
                    self._lose = b""
                    losing.set()
                if self._hold and self._hold in data:
                    self._hold = b""
                    self.held.set()
                    self._release.wait(WAIT_S)
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _back(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                if losing.is_set():
                    self.lost += 1
                    break
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._release.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
