"""What stands before a Redis of the tests: a wire that loses answers or holds back what is sent, and an end of TLS."""

from __future__ import annotations

import contextlib
import pathlib
import select
import socket
import ssl
import threading
import time

WAIT_S = 15.0


class Wire:
    """A proxy before a Redis: it may lose answers (and the connection with them), or hold back what clients send."""

    def __init__(self, path: pathlib.Path, target: pathlib.Path) -> None:
        self.path = path
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


class TlsEnd:
    """Speaks TLS, and hands what it is told to a Redis on a unix socket; with a `client_ca` to those alone whom that has signed.

    `record_nbytes`: so much of the answers goes into a TLS record, at most.
    """

    def __init__(
        self, redis_socket: pathlib.Path, pair: tuple[pathlib.Path, pathlib.Path], client_ca: pathlib.Path | None = None,
        record_nbytes: int = 1 << 16,
    ) -> None:  # fmt: skip
        self._redis = str(redis_socket)
        self._record_nbytes = record_nbytes
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*pair)
        if client_ca is not None:
            self._context.load_verify_locations(client_ca)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            end = self._context.wrap_socket(raw, server_side=True)
        except (ssl.SSLError, OSError):
            self.refused += 1
            raw.close()
            return
        back = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError), end, back:
            back.connect(self._redis)
            while True:
                ready = [end] if end.pending() else select.select([end, back], [], [])[0]
                if end in ready:
                    if not (data := end.recv(1 << 16)):
                        return
                    back.sendall(data)
                if back in ready:
                    if not (data := back.recv(1 << 16)):
                        return
                    for start in range(0, len(data), self._record_nbytes):
                        end.sendall(data[start : start + self._record_nbytes])

    def close(self) -> None:
        self._listener.close()
