"""What a peer can do to others and to the memory of a process with the wire: each attack has a client of gRPC beside it that notices nothing.

The server is a process of its own (tests/interop/server.py), whose memory the kernel tells. Attacks are bounded in bytes and in time.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from http2 import ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, SETTINGS, frame, headers, message
from interop.process import WAIT_S, InteropServer

from engram.v1 import stream_pb2

native = pytest.importorskip(
    "engram_native", reason="the extension is not built: make install builds it where cargo is"
)

PING, WINDOW_UPDATE, CONTINUATION = 6, 8, 9
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HELLO = PREFACE + frame(SETTINGS, 0, 0)
STREAM, DUPLEX = "/engram.v1.EngramService/Stream", "/grpc.testing.TestService/FullDuplexCall"
FLOOD_S, FLOOD_NBYTES = 2.0, 64 << 20  # an attack ends after so long, or so much
GROWTH_NBYTES = 24 << 20  # of the server meanwhile, at most
SLOWEST_S = 1.0  # of the honest client's calls
MIB = 1 << 20
pb: Any = grpc.protos("interop/testing.proto")


def window(size: int) -> bytes:
    """SETTINGS_INITIAL_WINDOW_SIZE."""
    return frame(SETTINGS, 0, 0, b"\0\x04" + struct.pack(">I", size))


def indexed_bomb() -> bytes:
    """A header of 4,000 bytes that goes into the table, and 12,000 references to it: 48 MB out of 16 KB."""
    name, value = b"x-bomb", b"v" * 4000
    entry = b"\x40" + bytes([len(name)]) + name + b"\x7f" + _integer(len(value) - 127) + value
    return headers(DUPLEX) + entry + b"\xbe" * 12_000


def _integer(rest: int) -> bytes:
    out = b""
    while rest >= 128:
        out, rest = out + bytes([rest % 128 + 128]), rest // 128
    return out + bytes([rest])


def odd() -> Iterator[int]:
    return itertools.count(1, 2)


def opened(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, headers(DUPLEX))


def wanted(nbytes: int) -> bytes:
    """A message that asks for an answer of so many bytes."""
    request = pb.StreamingOutputCallRequest(response_parameters=[{"size": nbytes}])
    return message(request.SerializeToString())


def rapid_reset() -> Iterator[bytes]:
    reset = (8).to_bytes(4, "big")
    return (opened(number) + frame(RST_STREAM, 0, number, reset) for number in odd())


def continuations() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, headers(DUPLEX))
    yield from itertools.repeat(frame(CONTINUATION, 0, 1, b"\0\x01a\x01b" * 3000))


def empty_continuations() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, headers(DUPLEX))
    yield from itertools.repeat(frame(CONTINUATION, 0, 1) * 1000)


def header_bombs() -> Iterator[bytes]:
    bomb = indexed_bomb()
    return (
        frame(HEADERS, END_STREAM, number, bomb[:16_000]) + frame(CONTINUATION, END_HEADERS, number, bomb[16_000:])
        for number in odd()
    )


def strangers() -> Iterator[bytes]:
    """Requests that are no gRPC, whose answers have no window to go into."""
    yield window(0)
    block = b"\x82\x86\x84" + b"\x01\x01x"  # GET http / of x
    yield from (frame(HEADERS, END_HEADERS | END_STREAM, number, block) for number in odd())


FLOODS = {
    "rapid reset": rapid_reset,
    "header that never ends": continuations,
    "header that never ends, of nothing": empty_continuations,
    "header bombs": header_bombs,
    "settings": lambda: itertools.repeat(frame(SETTINGS, 0, 0, b"\0\x04\0\0\0\x01" * 100) * 10),
    "acknowledged settings": lambda: itertools.repeat(frame(SETTINGS, ACK, 0) * 100),
    "pings": lambda: itertools.repeat(frame(PING, 0, 0, bytes(8)) * 100),
    "window updates": lambda: itertools.chain(
        [opened(1)], itertools.repeat(frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\x01") * 100)
    ),
    "empty data": lambda: itertools.chain([opened(1)], itertools.repeat(frame(DATA, 0, 1) * 100)),
    "priorities": lambda: (frame(2, 0, number, b"\0\0\0\0\x10") * 10 for number in odd()),
    "frames of unknown kinds": lambda: itertools.repeat(frame(0xFE, 0, 0, bytes(16_000))),
    "calls that never end": lambda: (opened(number) for number in odd()),
    "requests of strangers": strangers,
}


class Honest(threading.Thread):
    """A client that makes one call after the other: how long the slowest took, and what failed."""

    def __init__(self, server: InteropServer, credentials: grpc.ChannelCredentials | None = None) -> None:
        super().__init__(daemon=True)
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = server.address.replace("127.0.0.1", "localhost") if credentials else server.address
        channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self._channel, self._ended = channel, threading.Event()
        self.calls, self.slowest, self.failures = 0, 0.0, [""][:0]
        self._call = channel.unary_unary("/grpc.testing.TestService/UnaryCall")
        self._call(b"", timeout=WAIT_S)
        self.start()

    def run(self) -> None:
        while not self._ended.is_set():
            begun = time.monotonic()
            try:
                self._call(b"", timeout=WAIT_S)
            except grpc.RpcError as error:
                self.failures.append(str(error))
            self.calls += 1
            self.slowest = max(self.slowest, time.monotonic() - begun)
            time.sleep(0.005)

    def __enter__(self) -> Honest:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self.join()
        self._channel.close()

    def check(self) -> None:
        """Ten calls later."""
        wanted, deadline = self.calls + 10, time.monotonic() + WAIT_S
        while self.calls < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.calls >= wanted
        assert self.failures == []
        assert self.slowest < SLOWEST_S


def flood(connection: socket.socket, chunks: Iterator[bytes]) -> int:
    """Sends until it is let go, for a time; how much. What comes is not read."""
    sent, deadline = 0, time.monotonic() + FLOOD_S
    connection.settimeout(FLOOD_S)
    with contextlib.suppress(OSError):
        while sent < FLOOD_NBYTES and time.monotonic() < deadline:
            data = b"".join(itertools.islice(chunks, 100))
            connection.sendall(data)
            sent += len(data)
    return sent


@pytest.fixture(scope="module")
def attacked() -> Iterator[InteropServer]:
    """One for all attacks: what one left behind, the next ones add to."""
    with InteropServer(handshake_s=1.0, rows=100) as server:
        yield server


@pytest.mark.promise(6)
@pytest.mark.parametrize("kind", list(FLOODS))
def test_a_flood_disturbs_nobody_and_takes_no_memory(attacked: InteropServer, kind: str) -> None:
    with Honest(attacked) as honest:
        before = attacked.memory()
        with socket.create_connection(("127.0.0.1", attacked.port)) as connection:
            connection.sendall(HELLO)
            sent = flood(connection, iter(FLOODS[kind]()))
            grown = attacked.memory() - before
            calls = attacked.counters()["calls"]
        print(f"{kind}: {grown / MIB:.1f} MiB for {sent / MIB:.1f} sent")
        assert grown < GROWTH_NBYTES, f"{grown / MIB:.1f} MiB for {sent / MIB:.1f} sent"
        assert calls <= 1024 + 1, "no more than a connection may have"
        honest.check()
        attacked.until(lambda counters: counters["connections"] == 1)
    attacked.until(lambda counters: (counters["connections"], counters["calls"]) == (0, 0))


def test_a_window_of_one_byte_is_served_byte_by_byte(attacked: InteropServer) -> None:
    """20 kB in frames of one byte each: it gets them, and only its own time is spent."""
    with Honest(attacked) as honest, socket.create_connection(("127.0.0.1", attacked.port)) as connection:
        before = attacked.memory()
        data = wanted(20_000)
        connection.sendall(PREFACE + window(1) + opened(1) + frame(DATA, END_STREAM, 1, data))
        connection.settimeout(WAIT_S)
        came, unread, ended = 0, b"", False
        while not ended:
            unread += connection.recv(65536)
            credit = 0
            while len(unread) >= 9 and len(unread) >= 9 + (size := int.from_bytes(unread[:3], "big")):
                kind, flags = unread[3], unread[4]
                unread = unread[9 + size :]
                credit += size if kind == DATA else 0
                ended = kind == HEADERS and bool(flags & END_STREAM)
            came += credit
            connection.sendall((frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\x01")) * credit)
        assert came > 20_000
        assert attacked.memory() - before < GROWTH_NBYTES
        honest.check()


class SlowReader(threading.Thread):
    """Sends steps as fast as the server's windows let it, and gives its answers no window: how many bytes of them went."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=FLOOD_S)
        self.sent, self.cut = 0, False
        self.start()

    def run(self) -> None:
        steps = stream_pb2.StepsFrame(handles=bytes(4), seqs=bytes(8), inputs=bytes(16_000))
        data = message(stream_pb2.StreamRequest(steps=steps).SerializeToString())
        windows, initial, unread = [65535, 65535], 65535, b""  # the connection's and the stream's
        self._socket.sendall(PREFACE + window(0) + frame(HEADERS, END_HEADERS, 1, headers(STREAM)))
        with contextlib.suppress(TimeoutError):
            while not self.cut:
                while min(windows) >= len(data):
                    self._socket.sendall(frame(DATA, 0, 1, data))
                    self.sent += len(data)
                    windows = [one - len(data) for one in windows]
                unread += self._socket.recv(65536)  # until there is nothing more for a time
                while len(unread) >= 9 and len(unread) >= 9 + (size := int.from_bytes(unread[:3], "big")):
                    kind, flags, number = unread[3], unread[4], int.from_bytes(unread[5:9], "big")
                    payload, unread = unread[9 : 9 + size], unread[9 + size :]
                    if kind == WINDOW_UPDATE:
                        windows[number] += int.from_bytes(payload, "big")
                    elif kind == SETTINGS and not flags & ACK:
                        for at in range(0, size, 6):
                            if payload[at + 1] == 4:
                                value = int.from_bytes(payload[at + 2 : at + 6], "big")
                                windows[1], initial = windows[1] + value - initial, value
                        self._socket.sendall(frame(SETTINGS, ACK, 0))
                    else:
                        self.cut |= kind in (RST_STREAM, GOAWAY)

    def close(self) -> None:
        self._socket.close()


@pytest.mark.promise(6)
def test_slow_readers_cost_what_they_may_have_under_way() -> None:
    """Sixteen clients send steps and read nothing: answers wait for their windows, and then the clients are read no further."""
    count, rows = 16, 20
    with InteropServer(rows=rows) as server, Honest(server) as honest:
        before = server.memory()
        readers = [SlowReader(server.port) for _ in range(count)]
        for reader in readers:
            reader.join()
        grown, sent = server.memory() - before, sum(reader.sent for reader in readers)
        print(f"slow: {grown / MIB:.1f} MiB for {sent / MIB:.1f} sent")
        assert sent > count * rows * 16_000, "they had as many rows under way as they may"
        # Each: rows of 16 kB whose answers wait, and what its window lets in unread, 1 MiB.
        assert grown < count * 2 * MIB, f"{grown / MIB:.1f} MiB for {sent / MIB:.1f} sent"
        honest.check()
        assert not any(reader.cut for reader in readers), "nobody is cut for being slow"
        for reader in readers:
            reader.close()
        server.until(lambda counters: (counters["connections"], counters["calls"]) == (1, 0))


@pytest.mark.parametrize(
    "kind", ["nothing", "half of a preface", "a preface alone", "TLS hello", "half of a TLS hello"]
)
def test_half_open_connections_are_let_go(certificates: Any, kind: str) -> None:
    encrypted = "TLS" in kind
    certificate, key = certificates.issue("server")
    flags = ["--tls", str(certificate), str(key)] if encrypted else []
    credentials = grpc.ssl_channel_credentials(certificates.ca("ca").read_bytes()) if encrypted else None
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    hello = outgoing.read()
    said = {
        "nothing": b"",
        "half of a preface": PREFACE[:10],
        "a preface alone": PREFACE,
        "TLS hello": hello,
        "half of a TLS hello": hello[:100],
    }[kind]
    with (
        InteropServer(*flags, handshake_s=1.0, idle_s=1.0, keepalive_s=0.5) as server,
        Honest(server, credentials) as honest,
    ):
        before = server.memory()
        with contextlib.ExitStack() as stack:
            for _ in range(500):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                connection.sendall(said)
            server.until(lambda counters: counters["accepted"] == 501)
            grown = server.memory() - before
            server.until(lambda counters: counters["connections"] == 1)
        assert grown < 500 * 100_000, f"{grown / 500:.0f} bytes a connection"
        honest.check()


@pytest.mark.parametrize("kind", ["HTTP/1.1", "HTTP/2"])
def test_who_speaks_no_grpc_is_told_or_sees_the_end(attacked: InteropServer, kind: str) -> None:
    """A browser, a load balancer's probe: in HTTP/2 it gets words; a connection of another kind ends without a reset."""
    get = b"\x82\x86\x84\x01\x01x"  # GET http / of x
    said = (
        HELLO + frame(HEADERS, END_HEADERS | END_STREAM, 1, get)
        if kind == "HTTP/2"
        else b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", attacked.port), timeout=WAIT_S) as connection:
        connection.sendall(said)
        if kind == "HTTP/2":
            came = b""
            while b"this port speaks gRPC" not in came:
                came += (data := connection.recv(65536))
                assert data, came
        else:
            assert connection.recv(65536) == b""
