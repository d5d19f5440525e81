"""Packs the commands of a commit into one buffer with numpy, and reads their replies without one object a row."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.store.keys import META_PREFIX

_KEY_NBYTES = len(META_PREFIX) + 22 + 2 + 16
_OK = b"+OK\r\n"
_ONE = b":1\r\n"


def commands(
    tags: NDArray[np.uint8], tokens: NDArray[np.uint8], values: NDArray[np.uint8], ttl_ms: NDArray[np.uint64]
) -> Iterator[tuple[NDArray[np.intp], memoryview]]:
    """`SET key value XX PX ttl` for every row, as buffers of equally long commands, with the rows of each buffer."""
    if len(values) and (ttl_ms == ttl_ms[0]).all():  # as good as always
        yield np.arange(len(values)), _buffer(tags, tokens, values, int(ttl_ms[0]))
        return
    for ttl in np.unique(ttl_ms):
        rows = np.flatnonzero(ttl_ms == ttl)
        yield rows, _buffer(tags[rows], tokens[rows], values[rows], int(ttl))


def _buffer(tags: NDArray[np.uint8], tokens: NDArray[np.uint8], values: NDArray[np.uint8], ttl_ms: int) -> memoryview:
    digits = b"%d" % ttl_ms
    pieces: list[bytes | NDArray[np.uint8]] = [
        b"*6\r\n$3\r\nSET\r\n$%d\r\n" % _KEY_NBYTES + META_PREFIX,
        tags,
        b"}:",
        tokens,
        b"\r\n$%d\r\n" % values.shape[1],
        values,
        b"\r\n$2\r\nXX\r\n$2\r\nPX\r\n$%d\r\n%s\r\n" % (len(digits), digits),
    ]
    if len(values) == 1:
        return memoryview(b"".join([piece if isinstance(piece, bytes) else piece.tobytes() for piece in pieces]))
    width = sum(len(piece) if isinstance(piece, bytes) else piece.shape[1] for piece in pieces)
    buffer = np.empty((len(values), width), np.uint8)
    start = 0
    for piece in pieces:
        block: NDArray[Any] = np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else piece
        stop = start + block.shape[-1]
        buffer[:, start:stop] = block
        start = stop
    return buffer.reshape(-1).data


def counting(key: bytes) -> bytes:
    """`INCR key`."""
    return b"*2\r\n$4\r\nINCR\r\n$%d\r\n%s\r\n" % (len(key), key)


def read_replies(sock: socket.socket, count: int, counted: bool = False) -> tuple[list[bytes] | None, bytes]:
    """The replies to `count` commands whose replies are single lines, None if all were +OK; and that to one more command, if one
    more was `counted`. Raises ConnectionError, or another OSError where they do not come within the socket's timeout."""
    expected = _OK * count
    least = len(expected) + len(_ONE) * counted  # no reply is shorter than these, so this much comes in any case
    # The kernel waits for all of it. If that gives less, the time is up or the end was there: then nothing is waited for again.
    whole, rest = (0, 0) if isinstance(sock, ssl.SSLSocket) else (socket.MSG_WAITALL, socket.MSG_DONTWAIT)
    data = _receive(sock, least, whole)
    while len(data) < least:
        data += _receive(sock, least - len(data), rest)
    if not counted and data == expected:
        return None, b""
    while data.count(b"\r\n") < count + counted or not data.endswith(b"\n"):
        data += _receive(sock, 65536, 0)
    if data.startswith(expected):
        return None, data[len(expected) : -2]
    lines = data.split(b"\r\n")
    return lines[:count], lines[count] if counted else b""


def _receive(sock: socket.socket, size: int, flags: int) -> bytes:
    data = sock.recv(size, flags)
    if not data:
        raise ConnectionError("the store closed the connection")
    return data
