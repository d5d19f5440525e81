"""A client of HTTP/2 that keeps no rules: bytes of frames, made by hand, and what the server says to each call."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter

DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(path: str, *more: tuple[str, str]) -> bytes:
    """A header block of plain literals."""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *more]
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def _text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, size = len(data) - 127, b"\x7f"
    while rest >= 128:
        size += bytes([rest % 128 + 128])
        rest //= 128
    return size + bytes([rest]) + data


def message(data: bytes, compressed: bool = False) -> bytes:
    """A message of gRPC."""
    return bytes([compressed]) + struct.pack(">I", len(data)) + data


class Connection:
    """Sends what it is told and reads all that comes: `ended` are the calls that the server has ended, `refused` those that it
    did not take."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(_PREFACE + frame(SETTINGS, 0, 0))
        self.kinds: Counter[int] = Counter()  # frames that came
        self.ended: set[int] = set()
        self.refused: set[int] = set()
        self.text = b""  # of all header blocks
        self.closed = False
        self._calls = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError):
            while chunk := self._socket.recv(65536):
                data += chunk
                while len(data) >= 9 and len(data) >= 9 + (size := int.from_bytes(data[:3], "big")):
                    self._take(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size])
                    data = data[9 + size :]
        self.closed = True

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.kinds[kind] += 1
        if kind == SETTINGS and not flags & ACK:
            self._socket.sendall(frame(SETTINGS, ACK, 0))
        if kind == HEADERS:
            self.text += payload
        if kind in (HEADERS, DATA) and flags & END_STREAM:
            self.ended.add(stream)
        if kind == RST_STREAM:
            (self.refused if int.from_bytes(payload, "big") == 7 else self.ended).add(stream)

    def call(self, block: bytes, data: bytes = b"", end: bool = True, reset: bool = False) -> int:
        """Begins a call and sends what belongs to it, without regard to windows; its number."""
        stream = 1 + 2 * self._calls
        self._calls += 1
        sent = frame(HEADERS, END_HEADERS | (END_STREAM if end and not data else 0), stream, block)
        for at in range(0, len(data), 16384):
            last = at + 16384 >= len(data)
            sent += frame(DATA, END_STREAM if end and last else 0, stream, data[at : at + 16384])
        if reset:
            sent += frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big"))
        self._socket.sendall(sent)
        return stream

    def wait(self, stream: int, seconds: float = 20.0) -> bool:
        """Whether the server ended a call in this time, or refused it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.closed:
            if stream in self.ended or stream in self.refused:
                return True
            time.sleep(0.01)
        return stream in self.ended or stream in self.refused

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._reader.join(5)
