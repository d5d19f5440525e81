"""Packs the commands of a commit into one buffer with numpy, and reads their replies without one object a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_service.store.keys import META_PREFIX

_KEY_NBYTES = len(META_PREFIX) + 22 + 2 + 16
_OK = b"+OK\r\n"


class Socket(Protocol):
    def recv(self, size: int, /) -> bytes: ...


def commands(
    tags: NDArray[np.uint8], tokens: NDArray[np.uint8], values: NDArray[np.uint8], ttl_ms: NDArray[np.uint64]
) -> Iterator[tuple[NDArray[np.intp], memoryview]]:
    """`SET key value XX PX ttl` for every row, as buffers of equally long commands, with the rows of each buffer."""
    ttls = np.unique(ttl_ms)
    for ttl in ttls:
        rows = np.arange(len(values)) if len(ttls) == 1 else np.flatnonzero(ttl_ms == ttl)
        whole = len(rows) == len(values)
        yield rows, _buffer(*((tags, tokens, values) if whole else (tags[rows], tokens[rows], values[rows])), int(ttl))


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
    width = sum(len(piece) if isinstance(piece, bytes) else piece.shape[1] for piece in pieces)
    buffer = np.empty((len(values), width), np.uint8)
    start = 0
    for piece in pieces:
        block: NDArray[Any] = np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else piece
        stop = start + block.shape[-1]
        buffer[:, start:stop] = block
        start = stop
    return buffer.reshape(-1).data


def read_replies(sock: Socket, count: int) -> list[bytes] | None:
    """The replies to `count` commands whose replies are single lines; None if all were +OK. Raises ConnectionError."""
    expected = _OK * count
    data = b""
    while len(data) < len(expected) and expected.startswith(data):
        data += _receive(sock, len(expected) - len(data))
    if data == expected:
        return None
    chunks = [data]
    lines = data.count(b"\r\n")
    while lines < count or not chunks[-1].endswith(b"\n"):
        # A chunk may end between \r and \n: count over the joined bytes.
        chunks.append(_receive(sock, 65536))
        lines = b"".join(chunks).count(b"\r\n")
    return b"".join(chunks).split(b"\r\n")[:count]


def _receive(sock: Socket, size: int) -> bytes:
    data = sock.recv(min(size, 1 << 20))
    if not data:
        raise ConnectionError("the store closed the connection")
    return data
